"""Records traces: an LM answers questions, with a forced answer at every decision point.

    python collect.py --task all --num 1000 --out checkpoints/traces
    python collect.py --lm NAME_OR_PATH --self-test
    python collect.py --lm NAME_OR_PATH --engine vllm --device cuda --ray auto --out FOLDER
    python collect.py --engine openai --base-url http://127.0.0.1:8080 --lm MODEL --out FOLDER
    python collect.py --json-lines FILE_OR_FOLDER --out checkpoints/traces

A killed recording goes on where it stopped: run the same command again. docs/CLUSTER.md tells how
to record on many machines.

The last form takes traces that somebody else has recorded, such as a server of its audits: one JSON
object a line, by column name of the trace schema, the same columns in every line. A first line
{"haltwise.recorder": {...}} may tell how they were recorded, and labels may come later.
"""

import installed  # noqa: F401, tells what is missing

from command import run
from recording.collect import CollectConfig, collect

if __name__ == "__main__":
    run(collect, CollectConfig)
