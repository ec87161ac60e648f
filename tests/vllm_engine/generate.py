"""Runs one vLLM engine in a process of its own: python generate.py FILE, JSON on its input.

In: {"runner": "v1" | "v2", "options": of LLM, "batches": [[[prompt, of SamplingParams], ...], ...]}
FILE: {"runner": the one that ran, "batches": token ids, "seconds": of each batch}
"""

import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any


def choose(runner: str, has_gpu: bool) -> None:
    """Sets what vLLM reads when it is imported."""
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = str(int(runner == "v2"))
    if not has_gpu:
        os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        if runner == "v2":
            interpret_triton()


def interpret_triton() -> None:
    """Lets Triton's interpreter run the second runner's kernels on a CPU, slowly."""
    os.environ |= {"TRITON_INTERPRET": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    from triton.backends import backends  # type: ignore[import-not-found]

    backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True), compiler=None)


def main() -> None:
    """Reads the job, runs it, and writes what came of it."""
    import torch

    job = json.load(sys.stdin)
    choose(job["runner"], torch.cuda.is_available())
    from vllm import LLM, SamplingParams

    llm = LLM(**job["options"], enforce_eager=True, enable_prefix_caching=False)
    is_v2 = llm.llm_engine.vllm_config.use_v2_model_runner
    done: dict[str, Any] = {"runner": "v2" if is_v2 else "v1", "batches": [], "seconds": []}
    for batch in job["batches"]:
        params = [SamplingParams(**asked) for _, asked in batch]
        start = time.perf_counter()
        outputs = llm.generate([prompt for prompt, _ in batch], params, use_tqdm=False)
        done["seconds"].append(time.perf_counter() - start)
        done["batches"].append([list(output.outputs[0].token_ids) for output in outputs])
    Path(sys.argv[1]).write_text(json.dumps(done))


if __name__ == "__main__":
    main()
