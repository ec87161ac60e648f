"""Halting inside vLLM: `--logits-processors haltwise.vllm:HaltProcessor`."""

from haltwise.errors import needing

with needing("haltwise.vllm", "vllm -e ."):
    from haltwise.vllm.halting import HaltCounts
    from haltwise.vllm.processor import HaltProcessor

__all__ = ["HaltCounts", "HaltProcessor"]
