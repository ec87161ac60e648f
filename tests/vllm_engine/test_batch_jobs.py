"""Batch jobs on the real vLLM with the real embedded LM; see the Makefile for what it needs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from copy import deepcopy
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from haltwise import HaltHead
from haltwise.transformers import generate_all
from lms.embedded import prompt_of
from lms.tasks import questions

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed"),
]

ROOT = Path(__file__).parents[2]
LM = ROOT / "checkpoints/embedded"
LOOKS, BLIND = ROOT / "checkpoints/embedded-head", ROOT / "checkpoints/embedded-blind-head"
NUM_TOKENS = 200
PROMPTS = [prompt_of(q) for task in ("sum", "let", "leap") for q in questions(task, "test", 12)]
RULES = ("after wait", "every 24 tokens, every 12 while the answer repeats, at most 9")
CPU = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
# The largest difference of two log probabilities at which either token is as good as the other.
TIE = 1e-3

Job = tuple[Path, dict[str, Any]]


def run(jobs: list[Job], runner: str = "v1") -> dict[str, Any]:
    sizes = {"max_model_len": 512, "max_num_seqs": 8, "dtype": "float32"}
    told = [[str(folder), arguments] for folder, arguments in jobs]
    asked = {"runner": runner, "options": {"model": str(LM)} | sizes, "jobs": told}
    with NamedTemporaryFile() as result:
        done = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("batch_jobs.py")), result.name],
            input=json.dumps(asked),
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=1800,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        found: dict[str, Any] = json.load(result)
    assert found["runner"] == runner
    print(runner, [round(seconds, 1) for seconds in found["seconds"]], "s")
    return found


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(LM, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(LM)


def job(folder: Path = LOOKS, prompts: list[str] = PROMPTS, **arguments: Any) -> Job:
    return folder, {"prompts": prompts, "max_new_tokens": NUM_TOKENS} | arguments


def under(rule: str, folder: Path) -> Path:
    """The shipped head that looks at answers, with another decision rule."""
    head = HaltHead.load(LOOKS)
    halting = replace(head.config.halting, decision_rule=rule)
    HaltHead(replace(head.config, halting=halting), head.weights).save(folder)
    return folder


def beside(model: Any, tokenizer: Any, done: Job) -> list[dict[str, Any]]:
    """The same job of transformers."""
    folder, arguments = done
    asked: dict[str, Any] = {"num_slots": 8} | arguments
    answers = generate_all(model, tokenizer, HaltHead.load(folder), **asked)
    rows = [asdict(answer) for answer in sorted(answers, key=lambda answer: answer.index)]
    found: list[dict[str, Any]] = json.loads(json.dumps(rows))
    return found


def assert_same(
    model: Any, tokenizer: Any, rows: list[dict[str, Any]], expected: list[dict[str, Any]]
) -> None:
    """Compares two jobs, but for a prompt whose tokens part where two are as good as tied.

    Looks take a token more here where the head sees how the thought may end.
    """
    num_parted = 0
    for row, other in zip(rows, expected, strict=True):
        assert len(row.pop("thoughts")) == len(other.pop("thoughts")) == 1
        looks = [answer["report"].pop("num_probe_tokens") for answer in (row, other)]
        more = looks[0] - looks[1]
        assert abs(more - row["report"]["num_points"]) <= 1 or more == 0
        if row != other:
            num_parted += 1
            pairs = enumerate(zip(row["ids"], other["ids"], strict=False))
            same = next(i for i, (token, its) in pairs if token != its)
            tokens = tokenizer.encode(PROMPTS[row["index"]]) + row["ids"][:same]
            best = model(torch.tensor([tokens])).logits[0, -1].log_softmax(-1).topk(2).values
            assert best[0] - best[1] < TIE
    assert num_parted <= 1


@pytest.fixture(scope="module")
def greedy(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Job], dict[str, Any]]:
    """Greedy jobs, and what came of them."""
    folders = [under(rule, tmp_path_factory.mktemp("head")) for rule in RULES]
    jobs = [
        job(min_tokens=NUM_TOKENS + 1),  # it looks, and never halts
        job(price=0.0),
        job(price=1.0),
        job(price=5.0, min_tokens=30, max_tokens=50, num_slots=3),
        job(price=0.0, max_tokens=30),
        *(job(folder, price=1.0) for folder in folders),
        job(BLIND, price=1.0),
    ]
    return jobs, run(jobs)


@torch.inference_mode()
def test_answers_halts_and_looks_are_those_of_transformers(
    greedy: tuple[list[Job], dict[str, Any]], model: Any, tokenizer: Any
) -> None:
    places = set()
    for asked, rows in zip(greedy[0], deepcopy(greedy[1]["jobs"]), strict=True):
        assert_same(model, tokenizer, rows, beside(model, tokenizer, asked))
        assert not any(row["trouble"] for row in rows)
        places |= {(row["report"]["reason"], row["report"]["position"]) for row in rows}
    assert len(PROMPTS) == 36 and len(places) > 12
    assert {reason for reason, _ in places} == {
        "halted",
        "capped",
        "closed by the LM",
        "token budget",
    }


def test_where_nothing_halts_the_tokens_are_those_of_vllm_itself(
    greedy: tuple[list[Job], dict[str, Any]],
) -> None:
    looked, free = greedy[1]["jobs"][:2]
    assert [row["ids"] for row in looked] == [row["ids"] for row in free] == greedy[1]["plain"]
    assert all(row["report"]["num_probe_tokens"] > row["report"]["num_points"] for row in looked)
    assert all(row["report"]["num_probe_tokens"] == 0 for row in free)


@torch.inference_mode()
def test_sampled_tokens_have_the_lms_distribution(model: Any, tokenizer: Any) -> None:
    """What a token leaves of the LM's own distribution function is uniform, wherever it stands.

    The largest distance of an empirical from the uniform distribution function exceeds 2.5 /
    sqrt(n) once in 135,000 times.
    """
    temperature, never = 1.5, NUM_TOKENS + 1
    jobs = [job(temperature=temperature, seed=seed, min_tokens=never) for seed in range(3)]
    done = run(jobs)["jobs"]
    rng, uniforms, places = np.random.default_rng(0), [], []
    for row in (row for rows in done for row in rows):
        prompt = tokenizer.encode(PROMPTS[row["index"]])
        logits = model(torch.tensor([prompt + row["ids"]])).logits[0, len(prompt) - 1 : -1]
        chances = (logits.double() / temperature).softmax(-1).numpy()
        for place, (token, chance) in enumerate(zip(row["ids"], chances, strict=True)):
            uniforms.append(chance[:token].sum() + rng.random() * chance[token])
            places.append(place)
    starts = np.array(places) % 12 == 0  # a request begins there
    assert len(uniforms) > 5000 and starts.sum() > 400
    for found in (np.array(uniforms), np.array(uniforms)[starts]):
        ranks = (np.arange(len(found)) + 0.5) / len(found)
        assert np.abs(np.sort(found) - ranks).max() < 2.5 / np.sqrt(len(found))
    assert len({tuple(row["ids"]) for rows in done for row in rows}) == 3 * len(PROMPTS)


def test_prompts_that_cannot_be_run_and_prompts_alike() -> None:
    prompts = [PROMPTS[0], "", "1 " * 600 + "<think>", PROMPTS[0]]
    _, rows = run([job(prompts=PROMPTS[:1], price=1.0), job(prompts=prompts, price=1.0)])["jobs"]
    one, empty, long, other = rows
    most = 512 - NUM_TOKENS - 1 - 16
    assert f"has 0 tokens, expected 1 to {most}: the LM's context less" in empty["trouble"]
    assert f"has 601 tokens, expected 1 to {most}: the LM's context less" in long["trouble"]
    assert (one["ids"], one["report"]["position"]) == (other["ids"], other["report"]["position"])
    assert one["report"]["reason"] == "halted"


def test_the_second_model_runner_runs_the_same_job(model: Any, tokenizer: Any) -> None:
    if not find_spec("triton"):
        pytest.skip("triton is not installed")
    asked = job(prompts=PROMPTS[:36:6], price=1.0)
    (rows,) = run([asked], "v2")["jobs"]
    assert_same(model, tokenizer, rows, beside(model, tokenizer, asked))


def test_the_guides_job_runs_as_it_stands() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/SERVING.md").read_text(), re.DOTALL)
    (snippet,) = (block for block in blocks if "import haltwise.vllm" in block)
    assert len(snippet.splitlines()) <= 10
    done = subprocess.run(
        [sys.executable, "-c", snippet],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | CPU,
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert re.search(r"(?m)^8 halted .*</think>", done.stdout)
