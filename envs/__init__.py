"""Environments in which a policy decides when an LM has thought enough."""

import gymnasium

gymnasium.register(id="haltwise/Halt-v0", entry_point="envs.live:HaltEnv")
