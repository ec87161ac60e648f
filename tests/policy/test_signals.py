from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from runpy import run_path
from typing import Any

import numpy as np
import pytest

from haltwise import FEATURE_GROUPS, FeatureState, InputError, Signals
from haltwise.policy.features import Feature, FeatureGroup
from haltwise.policy.signals import SIGNAL_KINDS, Float, SignalKind, signals_from
from haltwise.session.stream import check_served
from tests.heads import random_head
from traces import read_traces, schema, store, write_shard

ONE = np.zeros(1, dtype=np.int64)


def test_every_signal_is_in_the_table_and_a_field() -> None:
    assert set(SIGNAL_KINDS) == {field.name for field in fields(Signals)}


@dataclass(frozen=True)
class MoodySignals(Signals):
    """With the field that a contributor would add."""

    mood: Float | None = None


class Moods(FeatureGroup):
    features = (Feature("mood", "in a better mood", "in a worse mood"),)
    signals = ("mood",)

    def update(self, signals: Any, rows: Any) -> Any:
        return (signals.mood,)


def test_a_new_signal_is_a_column_and_is_served_if_it_is_of_the_text(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, make_row: Callable[..., Any]
) -> None:
    monkeypatch.setitem(SIGNAL_KINDS, "mood", SignalKind("text"))
    monkeypatch.setitem(FEATURE_GROUPS, "moods", Moods)
    assert signals_from("text") == ("num_reflections", "mood")

    afresh = run_path(str(schema.__file__))
    for name in ("SCHEMA", "SIGNALS", "POINTWISE"):
        monkeypatch.setattr(store, name, afresh[name])
    write_shard(tmp_path / "0.parquet", [make_row(mood=[0.5, np.nan, 2.0])], {})
    mood = read_traces(tmp_path).signals["mood"]
    assert mood.dtype == np.float32
    np.testing.assert_array_equal(mood, [0.5, np.nan, 2.0])

    seen = MoodySignals(ONE, mood=np.ones(1, dtype=np.float32))
    assert FeatureState(1, ("moods",)).update(seen, ONE).tolist() == [[1]]
    head = random_head(0, ("pace", "moods"), probing="at_halt")
    check_served(head)
    monkeypatch.setitem(SIGNAL_KINDS, "mood", SignalKind("hidden_state"))
    with pytest.raises(
        InputError, match=r"which a server does not show; .* pace --probing at_halt$"
    ):
        check_served(head)
