"""Agents: how one is trained with PPO, started from recorded traces, and exported as a head."""
