"""Evaluation: outcomes, operating points, intervals, table and picture."""
