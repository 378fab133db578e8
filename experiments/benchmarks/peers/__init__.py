"""The systems that `experiments.benchmarks.step` compares: one script each, run in a process of its own."""

import sys

# `transformers` imports any library named `kernels` that it finds, and in a checkout would find this project's folder
# of that name. None makes Python answer "not installed".
sys.modules["kernels"] = None
