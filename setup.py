"""Builds jaxpo. Everything else about the project's tools is in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "([^"]+)"$', (ROOT / "jaxpo/__init__.py").read_text(), re.MULTILINE).group(1)

EXTRAS = {
    # Both bring the libtpu that the installed jax pins (newer ones misprint compiled programs). [tpu] runs on the chips
    # of this host; [plan] compiles for chips that are not there, on any Linux machine.
    "tpu": ["jax[tpu]"],
    "plan": ["jax[tpu]"],
    "cuda": ["jax[cuda13]"],
    "tensorboard": ["tensorboardX>=2.6"],
    "wandb": ["wandb>=0.19"],
    "math": ["math-verify>=0.8"],
    "gguf": ["gguf>=0.17"],
    "data": ["pyarrow>=20"],  # Parquet
    "datasets": ["datasets>=4.7"],
    "notebooks": ["jupyterlab>=4.2", "nbclient>=0.10", "ipykernel>=6.29"],
    # The systems that jaxpo is compared with: the only extras with torch in them.
    "parity": ["torch>=2.6", "trl>=1.0", "peft>=0.18", "sentencepiece>=0.2"],
    "bench": ["torch>=2.6", "trl>=1.0", "datasets>=4.7", "google-tunix>=0.1.7", "liger-kernel>=0.8"],
}
EXTRAS["test"] = [
    "hypothesis>=6.100",
    "pytest>=8.3",
    "pytest-xdist>=3.6",
    "ruff>=0.9",
    "build>=1.2",
    "setuptools>=77",
    *EXTRAS["tensorboard"],
    *EXTRAS["math"],
    *EXTRAS["gguf"],
    *EXTRAS["data"],
]

setup(
    name="jaxpo",
    version=VERSION,
    description="Policy optimization of language models in JAX; every objective a pure function.",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    # The top-level folder kernels/ is the sub-package jaxpo.kernels.
    packages=[
        *find_packages(include=["jaxpo", "jaxpo.*"]),
        "jaxpo.kernels",
        *(f"jaxpo.kernels.{name}" for name in find_packages("kernels")),
    ],
    package_dir={"jaxpo.kernels": "kernels"},
    package_data={"jaxpo": ["py.typed"]},
    install_requires=[
        "absl-py>=2.1",
        "chex>=0.1.90",
        "etils[epath]>=1.10",
        "flax>=0.12",
        "huggingface_hub>=1.3",  # models and data sets of the hub
        "jax>=0.10,<0.12",
        "jinja2>=3.1",  # chat templates of transformers' tokenizers
        "matplotlib>=3.9",
        "ml-collections>=1.0",
        "numpy>=2.0",
        "optax>=0.2.6",
        "orbax-checkpoint>=0.12",
        "PyYAML>=6.0",  # the cards of data sets
        "reasoning-gym~=0.1.25",  # a newer series may generate other items from the same seed
        "rich>=13.7",
        "safetensors>=0.6",
        "scipy>=1.13",
        "tensorstore>=0.1.84",
        "tokenizers>=0.22",
        "tqdm>=4.66",
        "transformers>=5.0",
    ],
    extras_require=EXTRAS,
)
