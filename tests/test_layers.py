import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = [
    {"installed"},
    {"haltwise"},
    {"command"},
    {"traces", "lms", "runs"},
    {"envs"},
    {"policies"},
    {"agents", "evaluation", "recording"},
    {
        "train",
        "adapt",
        "evaluate",
        "calibrate",
        "cascade",
        "distill",
        "scorecard",
        "search",
        "collect",
        "benchmarks",
    },
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
# Inside of haltwise; its front has what policy and session give to those above them.
ROOMS = [
    {"errors"},
    {"command_line"},
    {"policy"},
    {"session"},
    {"__init__"},
    {"control"},
    {"engine"},
    {"transformers", "vllm", "proxy", "training"},
    {"cli"},
    {"__main__"},
]
FLOOR = {name: floor for floor, names in enumerate(ROOMS) for name in names}
FILES = sorted(
    path.relative_to(ROOT)
    for name in LEVEL
    for path in (*ROOT.glob(f"{name}/**/*.py"), *ROOT.glob(f"{name}.py"))
)


def imports(source: str) -> set[str]:
    """Top-level names of absolute imports, also inside functions; a relative one goes nowhere."""
    tops: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            tops |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            tops.add(str(node.module).partition(".")[0])
    return tops


def uphill(own: str, tops: set[str]) -> set[str]:
    """Imports that leave a package for one of its own layer or of a higher one."""
    return {top for top in tops - {own} if LEVEL.get(top, -1) >= LEVEL[own]}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_arrows_point_one_way(path: Path) -> None:
    tops = imports((ROOT / path).read_text())
    own = path.parts[0].removesuffix(".py")
    assert uphill(own, tops) == set()
    trains = own in ("agents", "benchmarks") or path == Path("haltwise/training/sb3.py")
    assert trains or "stable_baselines3" not in tops


@pytest.mark.parametrize(
    ("own", "source", "expected"),
    [
        ("haltwise", "import numpy, haltwise.head", set()),
        ("haltwise", "def f():\n    from envs.reward import reward", {"envs"}),
        ("envs", "import agents.ppo, traces", {"agents"}),
        ("traces", "from lms import tasks", {"lms"}),
        ("agents", "from evaluation.table import x", {"evaluation"}),
        ("evaluation", "import policies.head, runs", set()),
        ("policies", "from evaluation.outcome import sweep", {"evaluation"}),
        ("train", "from evaluate import main", {"evaluate"}),  # no script is another's library
        ("agents", "from .ppo import x", set()),
        ("evaluate", "import agents, evaluation.table, envs, traces, command", set()),
    ],
)
def test_an_arrow_that_points_up_is_found(own: str, source: str, expected: set[str]) -> None:
    assert uphill(own, imports(source)) == expected


def rooms(source: str) -> set[str]:
    """The rooms of haltwise that are imported; `import haltwise` is its front."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
        parts = [name.split(".") for name in names if name.split(".")[0] == "haltwise"]
        found |= {part[1] if len(part) > 1 else "__init__" for part in parts}
    return found


@pytest.mark.parametrize("path", [path for path in FILES if path.parts[0] == "haltwise"], ids=str)
def test_rooms_of_the_runtime_stand_on_lower_ones(path: Path) -> None:
    own = path.parts[1].removesuffix(".py")
    higher = {
        room for room in rooms((ROOT / path).read_text()) - {own} if FLOOR[room] >= FLOOR[own]
    }
    assert higher == set()
    assert own != "proxy" or "engine" not in rooms((ROOT / path).read_text())


def test_every_script_and_package_has_its_layer() -> None:
    scripts = {path.stem for path in ROOT.glob("*.py")}
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert scripts | packages == set(LEVEL)


def test_only_runs_knows_what_the_files_of_a_run_are_called() -> None:
    names = ["config.json", "operating_points.json", "questions.json", "out_of_fold.", "kept_back"]
    names += [
        "replay.safetensors",
        "live.safetensors",
        "test.json",
        "test.html",
        "test.png",
        "tensorboard",
    ]
    # `installed` names the package tensorboard.
    quoted = re.compile("|".join(rf"""["'/]{re.escape(name)}""" for name in names))
    knowing = {
        path.parts[0]
        for path in FILES
        if path.parts[0] not in ("lms", "haltwise", "installed.py")
        and quoted.search(without_words(path))
    }
    assert knowing == {"runs"}


def without_words(path: Path) -> str:
    """The code of a file, without its docstrings."""
    tree = ast.parse((ROOT / path).read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value = ast.Constant(None)
    return ast.unparse(tree)


@pytest.mark.parametrize(
    ("modules", "heavy"),
    [
        (
            "haltwise, haltwise.training",
            {"torch", "transformers", "gymnasium", "stable_baselines3", "pyarrow"},
        ),
        ("collect, evaluate, adapt, calibrate", {"torch", "transformers", "sklearn", "mapie"}),
        ("train, cascade, scorecard, search", {"transformers", "sklearn", "optuna"}),
    ],
)
@pytest.mark.whole
def test_what_takes_long_to_load_is_imported_where_it_is_used(
    modules: str, heavy: set[str]
) -> None:
    code = f"import sys, {modules}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
