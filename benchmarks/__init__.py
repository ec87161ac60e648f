"""Speed and memory beside gymnasium, stable-baselines3 and transformers: `make bench`."""
