"""A run folder; nothing else knows the names of its files.

config.json                      what the run was begun with
audits/                          the traces that it learns from, if they are audits
head.json, head.safetensors      the head; a folder with a head is a whole run
head.former.json                 head.json as it was before its prices were replaced at last
operating_points.json            the frozen points of every policy
questions.json                   what was learned from, and which fold kept what back
asked.json                       for what certificates the head has been asked, and how often
kept_back/SEED-FOLD/             heads that never saw a fold's questions
folds/                           what the training by folds has finished, to go on from
replay.safetensors, live.safetensors             the agents
out_of_fold.json, .png           the results that the points were chosen on
test.json, .html, .png           the results on test questions
tensorboard/                     TensorBoard's files
scorecard.json                   the rules, if the head is a scorecard
search.sqlite, .json, .html      the candidates of a search, and what it has found; no head then
"""

from __future__ import annotations

import json
import math
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from command import whole_file, write_json
from haltwise import HaltHead, InputError
from runs.learned import Learned

#: By name of a policy, its number at one gate; None is never halting.
Points = dict[str, float | None]
#: By gate, its points. A gate is how much mean EM they were chosen to lose at most.
Gates = dict[float, Points]

_CONFIG, _POINTS, _QUESTIONS = "config.json", "operating_points.json", "questions.json"
_ASKED, _OUT_OF_FOLD, _HEAD = "asked.json", "out_of_fold.json", "head.json"
_WRITTEN_BY = "expected a folder written by train.py"
_UNREADABLE = (ValueError, TypeError, KeyError, AttributeError, RecursionError)


@dataclass(frozen=True)
class Beginning:
    """What a run was begun with, as config.json tells it."""

    traces: Path
    """The recorded traces that the run learns from."""
    settings: Mapping[str, Any]
    """The settings of the script that began the run, by name."""


@dataclass(frozen=True)
class Run:
    """A run folder. Nothing is read before it is asked for; every file is written whole."""

    folder: Path

    @property
    def audits(self) -> Path:
        """The folder of the traces that the run learns from, if it learns from audits."""
        return self.folder / "audits"

    @property
    def replay_agent(self) -> Path:
        """The file of the agent, as PPO on replay left it."""
        return self.folder / "replay.safetensors"

    @property
    def live_agent(self) -> Path:
        """The file of the agent, as PPO on the running LM left it; without that there is none."""
        return self.folder / "live.safetensors"

    @property
    def folds(self) -> Path:
        """The folder that keeps what the training by folds has finished."""
        return self.folder / "folds"

    @property
    def tensorboard(self) -> Path:
        """The folder of TensorBoard's files."""
        return self.folder / "tensorboard"

    @property
    def out_of_fold_plot(self) -> Path:
        """The file of the picture of the results that the points were chosen on."""
        return self.folder / "out_of_fold.png"

    @property
    def test_json(self) -> Path:
        """The file of the results on test questions."""
        return self.folder / "test.json"

    @property
    def test_page(self) -> Path:
        """The file of the page about the results on test questions."""
        return self.folder / "test.html"

    @property
    def test_plot(self) -> Path:
        """The file of the picture of the results on test questions."""
        return self.folder / "test.png"

    @property
    def search_storage(self) -> Path:
        """The SQLite file of the candidates of a search."""
        return self.folder / "search.sqlite"

    @property
    def search_json(self) -> Path:
        """The file of what a search has found."""
        return self.folder / "search.json"

    @property
    def search_page(self) -> Path:
        """The file of the page about what a search has found."""
        return self.folder / "search.html"

    def is_part(self, path: Path) -> bool:
        """Returns whether a file is one that the run cannot do without."""
        own = {_CONFIG, _POINTS, _QUESTIONS, _HEAD, "head.safetensors"}
        return path.name in own and path.parent.resolve() == self.folder.resolve()

    def begin(self, content: Mapping[str, Any]) -> None:
        """Makes the folder, which must be new, and writes down what the run is begun with.

        A folder that has the run's audits alone is new.

        Args:
            content: Holds the path of the traces as "traces", the settings as "config", and
                whatever else is to be kept.
        """
        self.folder.mkdir(parents=True, exist_ok=self.audits.exists())
        write_json(self.folder / _CONFIG, dict(content))

    def beginning(self) -> Beginning:
        """Reads what the run was begun with.

        Raises:
            InputError: If the run does not tell, or the file is not readable.
        """
        path = self.folder / _CONFIG
        try:
            content = json.loads(path.read_text())
            return Beginning(Path(content["traces"]), dict(content.get("config", {})))
        except (OSError, *_UNREADABLE):
            raise InputError(f"{path} names no traces: expected a run, or --traces FILE") from None

    def head(self) -> HaltHead:
        """Reads the head.

        Raises:
            InputError: If there is none, or it is damaged.
        """
        return HaltHead.load(self.folder)

    def save_head(self, head: HaltHead) -> None:
        """Writes the head, which makes the folder a whole run: it comes last."""
        head.save(self.folder)

    def replace_prices(self, head: HaltHead) -> str:
        """Writes the head with other prices, and keeps the file that had the former ones.

        Returns:
            The shell command that makes the head what it was.
        """
        here, former = self.folder / _HEAD, self.folder / "head.former.json"
        with whole_file(former) as temporary:
            shutil.copyfile(here, temporary)
        self.save_head(head)
        return shlex.join(["cp", str(former), str(here)])

    def learned(self) -> Learned:
        """Reads what the run learned from.

        Raises:
            InputError: If the run does not tell, or the file is not readable.
        """
        path = self.folder / _QUESTIONS
        try:
            return Learned.from_json(json.loads(path.read_text()))
        except FileNotFoundError:
            raise InputError(f"no {_QUESTIONS} in {self.folder}: {_WRITTEN_BY}") from None
        except _UNREADABLE as error:
            raise InputError(f"{path}: not readable ({error!r})") from None

    def save_learned(self, learned: Learned) -> None:
        """Writes what the run learned from."""
        self._write(_QUESTIONS, json.dumps(learned.to_json()))

    def asked(self) -> dict[str, int]:
        """Reads for what certificates the head has been asked, each with how often.

        Raises:
            InputError: If the file is not readable.
        """
        path = self.folder / _ASKED
        try:
            return {str(what): int(num) for what, num in json.loads(path.read_text()).items()}
        except FileNotFoundError:
            return {}
        except _UNREADABLE as error:
            raise InputError(f"{path}: not readable ({error!r})") from None

    def save_asked(self, asked: Mapping[str, int]) -> None:
        """Writes for what certificates the head has been asked."""
        write_json(self.folder / _ASKED, dict(asked))

    def operating_points(self) -> Gates:
        """Reads the frozen points of every gate.

        Raises:
            InputError: If the run has none, or they are not numbers by gate and policy.
        """
        path = self.folder / _POINTS
        if not path.is_file():
            raise InputError(f"no {_POINTS} in {self.folder}: {_WRITTEN_BY}")
        try:
            gates: Gates = {
                float(gate): {
                    str(policy): None if parameter is None else float(parameter)
                    for policy, parameter in points.items()
                }
                for gate, points in json.loads(path.read_text())["gates"].items()
            }
        except _UNREADABLE as error:
            raise InputError(
                f"{path}: not readable ({error!r}), "
                'expected {"gates": {"0.0": {"head": price, "confidence": threshold, ...}, ...}}'
            ) from None
        _check_points(path, gates)
        return gates

    def save_operating_points(self, gates: Gates) -> None:
        """Writes the frozen points of every gate."""
        content = {"gates": {str(gate): points for gate, points in gates.items()}}
        self._write(_POINTS, json.dumps(content, indent=2))

    def kept_back(self, learned: Learned) -> dict[tuple[int, int], HaltHead]:
        """Reads the heads of the run's folds, by seed and fold.

        Args:
            learned: What the run learned from, which tells what folds there are.

        Raises:
            InputError: If a head is missing or damaged.
        """
        return {at: HaltHead.load(self._kept_back(at)) for at in learned.trainings}

    def save_kept_back(self, heads: Mapping[tuple[int, int], HaltHead]) -> None:
        """Writes the heads of folds, by seed and fold."""
        for at, head in heads.items():
            head.save(self._kept_back(at))

    def copy_kept_back(self, folders: Mapping[tuple[int, int], Path]) -> None:
        """Copies the heads of folds from the folders that hold them, by seed and fold."""
        for at, source in folders.items():
            shutil.copytree(source, self._kept_back(at), dirs_exist_ok=True)

    def save_out_of_fold(self, content: Mapping[str, Any]) -> None:
        """Writes the results that the points were chosen on."""
        write_json(self.folder / _OUT_OF_FOLD, dict(content))

    def out_of_fold(self) -> dict[str, Any]:
        """Reads the results that the points were chosen on; they are empty if there are none.

        Raises:
            InputError: If the file is not readable.
        """
        path = self.folder / _OUT_OF_FOLD
        try:
            return dict(json.loads(path.read_text()))
        except FileNotFoundError:
            return {}
        except _UNREADABLE as error:
            raise InputError(f"{path}: not readable ({error!r})") from None

    def save_scorecard(self, content: Mapping[str, Any]) -> None:
        """Writes the rules of a head that is a scorecard, and what is measured of them."""
        write_json(self.folder / "scorecard.json", dict(content))

    def _kept_back(self, at: tuple[int, int]) -> Path:
        """Returns the folder of the head that a seed and fold left."""
        seed, k = at
        return self.folder / "kept_back" / f"{seed}-{k}"

    def _write(self, name: str, text: str) -> None:
        """Writes a file of the run, whole or not at all, with a line end after the text."""
        with whole_file(self.folder / name) as temporary:
            temporary.write_text(text + "\n")


def _check_points(path: Path, gates: Gates) -> None:
    """Refuses points that no run can have, with the file that they were read from.

    Raises:
        InputError: If there is no gate, one is not from 0 to 1 or has no head, or a number is not
            finite or is no price.
    """
    if not gates or not all(0 <= gate <= 1 for gate in gates):
        raise InputError(f"{path}: gates are {list(gates)}, expected some from 0 to 1")
    if not all("head" in points for points in gates.values()):
        raise InputError(f"{path}: a gate has no 'head', expected its price or null")
    if not all(math.isfinite(p) for points in gates.values() for p in points.values() if p):
        raise InputError(f"{path}: a point is not finite, expected numbers or null")
    prices = [points["head"] for points in gates.values()]
    if any(price is not None and price <= 0 for price in prices):
        raise InputError(f"{path}: a head's price is not positive, expected above 0, or null")
