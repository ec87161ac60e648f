"""Halting inside vLLM: `--logits-processors haltwise.vllm:HaltProcessor`."""

from haltwise.errors import needing

with needing("haltwise.vllm", "run pip install vllm -e . in the clone of haltwise"):
    from haltwise.vllm.halting import HaltCounts
    from haltwise.vllm.processor import HaltProcessor

__all__ = ["HaltCounts", "HaltProcessor"]
