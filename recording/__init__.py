"""The recorder: an LM answers questions, with a forced answer at every decision point."""
