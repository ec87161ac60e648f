"""A real Ray on this machine, with two workers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from haltwise import InputError
from recording.collect import collect as main
from recording.collect import seeded_questions
from recording.config import TaskFormat
from recording.trace_row import SeededQuestion
from tests.recordings import (
    Deadly,
    DeadlyTaskFormat,
    assert_same,
    rows_of,
    save_tiny_lm,
    small_config,
)

ray = pytest.importorskip("ray")
from recording.spread import LoadedWorker, RayEngine, _HiredWorker  # noqa: E402

ROOT = Path(__file__).parents[2]
SHORT = TaskFormat("short", "", "", "")


@pytest.fixture(scope="module")
def lm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_lm(tmp_path_factory.mktemp("lms") / "tiny")


def test_a_cluster_that_is_not_there_is_refused(lm_folder: Path, tmp_path: Path) -> None:
    for address in ("127.0.0.1:1", "127.0.0.1:port"):
        with pytest.raises(InputError, match=f"^cannot use Ray at '{address}': "):
            main(small_config(lm_folder, tmp_path / "traces", ray=address))


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_worker_niceness", "0")  # else workers starve on a busy machine
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
        )
        yield
        ray.shutdown()


def deadly(job: SeededQuestion) -> SeededQuestion:
    question, seed = job
    return Deadly(**vars(question)), seed


@pytest.mark.whole
def test_a_killed_worker_is_replaced_and_its_questions_are_asked_again(
    local_ray: None, lm_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = small_config(lm_folder, tmp_path / "plain", num=10)
    main(config)
    spread = RayEngine(config, SHORT, "local", 2, job_size=3)
    rows, killed = [], 0
    for row in spread.record(seeded_questions(config)):
        rows.append(row)
        if not killed:
            killed = spread.pids[-1]
            os.kill(killed, signal.SIGKILL)
    assert f"lost worker {killed} on " in capfd.readouterr().out
    expected = rows_of(config.out)
    assert sorted(row["trace_id"] for row in rows) == sorted(expected)
    for row in rows:
        assert_same(row, expected[row["trace_id"]])

    question, seed = next(seeded_questions(config))
    with pytest.raises(InputError, match=r"^gold answer '' is empty: expected "):
        list(spread.record([(replace(question, gold=""), seed)]))

    other = LoadedWorker(spread.recorder | {"dtype": "bfloat16"}, "", 1, "elsewhere")
    with pytest.raises(InputError, match=r"workers on .* and elsewhere differ in dtype: "):
        spread._welcome(_HiredWorker(None), other)
    spread.close()


def test_only_what_is_missing_is_spread_and_a_plain_recording_gives_the_same(
    local_ray: None, lm_folder: Path, tmp_path: Path
) -> None:
    plain = small_config(lm_folder, tmp_path / "plain")
    main(plain)
    config = replace(plain, out=tmp_path / "spread", split=("train",))
    main(config)
    before = rows_of(config.out)
    main(replace(config, split=("train", "dev"), ray="local", workers=1))
    rows, expected = rows_of(config.out), rows_of(plain.out)
    assert rows.keys() == expected.keys() and len(rows) == 14
    assert all(rows[name] == row for name, row in before.items())
    for name, row in rows.items():
        assert_same(row, expected[name])


@pytest.mark.whole
def test_what_is_wrong_with_an_lm_is_told_by_its_worker(local_ray: None, tmp_path: Path) -> None:
    nowhere = small_config(tmp_path / "nowhere", tmp_path / "traces", ray="local", workers=1)
    with pytest.raises(InputError, match=r"^cannot load an LM from "):
        main(nowhere)


@pytest.mark.slow
def test_questions_that_kill_every_worker_end_the_recording(
    local_ray: None, lm_folder: Path, tmp_path: Path
) -> None:
    config = small_config(lm_folder, tmp_path / "traces", num=1)
    spread = RayEngine(config, SHORT, "local", 2, job_size=3)
    jobs = [deadly(job) for job in seeded_questions(config)]
    named = "3 workers died of the 2 questions from "
    with pytest.raises(InputError, match=named + repr(jobs[0][0].question_id)):
        list(spread.record(jobs))
    spread.close()


@pytest.mark.slow
def test_workers_that_die_as_they_load_are_not_replaced_for_ever(
    local_ray: None, lm_folder: Path, tmp_path: Path
) -> None:
    config = small_config(lm_folder, tmp_path / "traces")
    with pytest.raises(InputError, match=r"^3 workers died as they loaded the LM: "):
        RayEngine(config, DeadlyTaskFormat("short", "", "", ""), "local", 2, job_size=1)


@pytest.mark.whole
def test_a_cluster_without_room_is_refused(
    local_ray: None, lm_folder: Path, tmp_path: Path
) -> None:
    config = small_config(lm_folder, tmp_path / "traces", ray="local", workers=3)
    with pytest.raises(InputError, match="the cluster has 2 CPUs, expected 3 or more for 3 work"):
        main(config)
    config = replace(config, workers=None, device="cuda")
    with pytest.raises(InputError, match="the cluster has 0 GPUs, expected 1 or more for 1 work"):
        main(config)


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """A cluster of one machine with one CPU, which other processes join."""
    environment = os.environ | QUIET_WITH_A_TOKEN
    command = [sys.executable, "-c", CLUSTER]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdin and process.stdout
        yield process.stdout.readline().strip()
        process.stdin.close()


# Ray's own clusters ask for a token; who joins by an address has to say so.
QUIET_WITH_A_TOKEN = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token"}
CLUSTER = """
import sys, ray
context = ray.init(
    address="local",
    num_cpus=1,
    include_dashboard=False,
    log_to_driver=False,
    logging_level="ERROR",
)
print(context.address_info["gcs_address"], flush=True)
sys.stdin.read()
"""


def collect(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "collect.py"), *arguments],
        cwd=cwd,
        env=os.environ | QUIET_WITH_A_TOKEN,
        capture_output=True,
        text=True,
        check=False,
        timeout=1200,
    )


@pytest.mark.slow
def test_a_cluster_is_joined_and_gets_the_code_and_the_embedded_lm(
    address: str, tmp_path: Path
) -> None:
    arguments = ["--num=4", "--split=test", "--max-tokens=60", "--out=traces"]
    done = collect(*arguments, f"--ray={address}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(rows_of(tmp_path / "traces")) == 4
    again = collect(*arguments, cwd=tmp_path)
    assert "all 4 traces are there, nothing is new" in again.stdout
