"""A run from start to end: its workspace, the loop, judges, evaluation, and how it is restored."""
