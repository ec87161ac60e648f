"""Environments in which a policy decides when a language model (LM) has thought enough.

Importing this package registers two environments with Gymnasium. `gymnasium.make` gives one
episode at a time, `gymnasium.make_vec` many that are stepped together:

    haltwise/Halt-v0     a running LM      envs.halt_env.HaltEnv      envs.live.LiveEnv
    haltwise/Replay-v0   recorded traces   envs.trace_env.TraceEnv    envs.replay.ReplayEnv

docs/ENVIRONMENTS.md shows how to train an agent of one's own in them.
"""

import gymnasium

gymnasium.register(
    id="haltwise/Halt-v0",
    entry_point="envs.halt_env:HaltEnv",
    vector_entry_point="envs.live:LiveEnv",
)
gymnasium.register(
    id="haltwise/Replay-v0",
    entry_point="envs.trace_env:TraceEnv",
    vector_entry_point="envs.replay:ReplayEnv",
)
