"""Ends a script in one line if what it needs is not installed; scripts import this module first."""

import sys
from importlib.util import find_spec

# A module of each package that haltwise depends on, and of each that its extra `train` brings.
MODULES = [
    "numpy",
    "safetensors",
    "gymnasium",
    "jinja2",
    "mapie",
    "matplotlib",
    "moocore",
    "pyarrow",
    "rich",
    "sklearn",
    "scipy",
    "stable_baselines3",
    "tensorboard",
    "torch",
    "tqdm",
    "transformers",
    "tyro",
]

if missing := [name for name in MODULES if find_spec(name) is None]:
    print(
        f"error: {sys.argv[0]} needs {', '.join(missing)}, not installed: "
        "run pip install -e '.[train]' -c constraints.txt in the clone of haltwise",
        file=sys.stderr,
    )
    sys.exit(2)
