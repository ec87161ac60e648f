"""Agents: PPO, its export as a head, and the baselines."""
