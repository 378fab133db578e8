"""Runnable modules: ``python -m experiments.train_rl --config=configs/quickstart.py --workdir=runs/quickstart``."""
