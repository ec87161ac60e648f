"""Agents: PPO, its start from recorded traces, and its export as a head."""
