"""Halting inside vLLM: `--logits-processors haltwise.vllm:HaltProcessor`."""

from haltwise.vllm.processor import HaltCounts, HaltProcessor

__all__ = ["HaltCounts", "HaltProcessor"]
