"""Prompts with verifiable rewards, and the tokenizers that render them. Importing this package never imports jax."""

from jaxpo.tasks.base import TASKS, Example, Score, Task, build, imperfect

__all__ = ["TASKS", "Example", "Score", "Task", "build", "imperfect"]
