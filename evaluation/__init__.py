"""Evaluation: outcomes, operating points, comparisons, intervals, certificates, table, page."""
