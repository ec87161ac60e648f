"""Halting inside transformers' `generate`, in batch jobs, and from a hub repository."""

from haltwise.errors import from_clone, needing

with needing("haltwise.transformers", from_clone("hf")):
    from haltwise.engine.batch_job import BatchAnswer
    from haltwise.transformers.batch_job import generate_all
    from haltwise.transformers.probing import ProbingGeneration
    from haltwise.transformers.processor import HaltProcessor

__all__ = ["BatchAnswer", "HaltProcessor", "ProbingGeneration", "generate_all"]
