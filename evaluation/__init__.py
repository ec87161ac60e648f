"""Evaluation: how policies are tuned, compared and certified, and how the results are shown."""
