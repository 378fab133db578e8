"""The training loop and what surrounds it: config, state, checkpoints, evaluation, run directory."""
