"""Runs batch jobs on one vLLM engine in a process of its own: python batch_jobs.py FILE < JSON.

In: {"runner": "v1" | "v2", "options": of LLM, "jobs": [[folder of the head, of generate_all], ...]}
FILE: {"runner": the one that ran, "jobs": of each its answers in order, "plain": the token ids that
the engine gives to the prompts of the first job by itself, greedily}
"""

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from generate import choose  # type: ignore[import-not-found]


def main() -> None:
    """Reads the jobs, runs them, and writes what came of it."""
    import torch

    asked = json.load(sys.stdin)
    choose(asked["runner"], torch.cuda.is_available())
    from vllm import LLM, SamplingParams

    from haltwise import HaltHead
    from haltwise.vllm import generate_all

    llm = LLM(**asked["options"], enforce_eager=True, block_size=32)
    is_v2 = llm.llm_engine.vllm_config.use_v2_model_runner
    done: dict[str, Any] = {"runner": "v2" if is_v2 else "v1", "jobs": [], "seconds": []}
    _, first = asked["jobs"][0]
    params = SamplingParams(temperature=0, max_tokens=first["max_new_tokens"])
    outputs = llm.generate(first["prompts"], params, use_tqdm=False)
    done["plain"] = [list(output.outputs[0].token_ids) for output in outputs]
    for folder, arguments in asked["jobs"]:
        start = time.perf_counter()
        answers = generate_all(llm, HaltHead.load(folder), **arguments)
        rows = [asdict(answer) for answer in sorted(answers, key=lambda answer: answer.index)]
        done["seconds"].append(time.perf_counter() - start)
        done["jobs"].append(rows)
    Path(sys.argv[1]).write_text(json.dumps(done))


if __name__ == "__main__":
    main()
