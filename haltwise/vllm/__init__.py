"""Halting inside vLLM: `--logits-processors haltwise.vllm:HaltProcessor`, and batch jobs."""

from haltwise.errors import needing

with needing("haltwise.vllm", "run pip install vllm -e . in the clone of haltwise"):
    from haltwise.engine.batch_job import BatchAnswer
    from haltwise.vllm.batch_job import generate_all
    from haltwise.vllm.halting import HaltCounts
    from haltwise.vllm.processor import HaltProcessor

__all__ = ["BatchAnswer", "HaltCounts", "HaltProcessor", "generate_all"]
