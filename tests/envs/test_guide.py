"""The guide to the environments runs as it stands, and its tables are true."""

import re
from itertools import takewhile
from pathlib import Path

import numpy as np
import pytest
from stable_baselines3 import DQN
from torch import nn

from envs.halt_env import HaltEnv
from envs.trace_env import TraceEnv
from haltwise import FEATURE_GROUPS, HaltHead, HeadConfig, feature_names
from tests.envs.live_cases import halting, observing
from traces import Traces

GUIDE = (Path(__file__).parents[2] / "docs" / "ENVIRONMENTS.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)


@pytest.mark.whole
def test_the_blocks_run_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for i, block in enumerate(BLOCKS):
        exec(compile(block, f"block {i}", "exec"), names)
    told = capsys.readouterr().out
    assert "mean and spread of the return" in told
    early, late = map(float, re.findall(r"early and late: (\S+) (\S+)", told)[0])
    assert late > early
    assert re.search(r"sum-\w+ \S+ (True|False) (True|False) \d+ tokens", told)
    assert HaltHead.load("checkpoints/own-head").config == names["config"]


def test_q_values_of_the_guides_form_become_a_head(worked_example: Traces) -> None:
    """The output is the difference of the last layer's rows."""
    env = TraceEnv(worked_example, observing(("pace",)), halting())
    layers = {"net_arch": [64, 64], "activation_fn": nn.Tanh}
    dqn = DQN("MlpPolicy", env, buffer_size=10, policy_kwargs=layers, seed=0)
    first, second, values = (m for m in dqn.q_net.q_net if isinstance(m, nn.Linear))
    last = [values.weight[1:] - values.weight[:1], values.bias[1:] - values.bias[:1]]
    tensors = [first.weight, first.bias, second.weight, second.bias, *last]
    names = ("w0", "b0", "w1", "b1", "w2", "b2")
    weights = {name: of.detach().numpy() for name, of in zip(names, tensors, strict=True)}
    head = HaltHead(HeadConfig(observing(("pace",)), halting(), default_price=1.0), weights)
    obs = np.random.default_rng(0).normal(size=(100, 4)).astype(np.float32)
    decided = dqn.predict(obs, deterministic=True)[0] == 1
    assert (decided == (head.log_odds_of(obs) > 0)).all() and 0 < decided.sum() < 100


def table(text: str, header: str) -> list[list[str]]:
    """The rows of the table that has some header."""
    lines = [line.strip() for line in text.split(header)[1].splitlines()]
    rows = takewhile(lambda line: line.startswith("|"), lines[2:])
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_the_observation_tables_are_true() -> None:
    assert HaltEnv.__doc__ is not None
    told = table(HaltEnv.__doc__, "| Group | Features | Made from the signals |")
    for row, (name, group) in zip(told, FEATURE_GROUPS.items(), strict=True):
        assert row == [name, str(len(feature_names([name]))), ", ".join(group.signals)]
    guide = table(GUIDE, "| group | features, in order | made from the signals |")
    for row, (name, group) in zip(guide, FEATURE_GROUPS.items(), strict=True):
        found, names = (
            [re.sub(r"`|\(.*\)", "", cell).strip() for cell in row],
            feature_names([name]),
        )
        shown = names if name != "hidden" else (names[0], "...", names[-1])
        assert found == [name, ", ".join(shown), ", ".join(group.signals)]
