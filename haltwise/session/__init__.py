"""Halting without a framework: texts and numbers come in, decisions and reports go out."""
