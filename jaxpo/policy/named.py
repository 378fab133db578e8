"""Policies by name: functions of the options that return (vocabulary size) -> `TransformerConfig`."""

import inspect
from collections.abc import Callable
from typing import Any

from jaxpo.policy.config import TransformerConfig
from jaxpo.policy.families import config_from_hf
from jaxpo.policy.hf import read_config
from jaxpo.registry import register

OfVocabulary = Callable[[int], TransformerConfig]


def transformer(**fields: Any) -> OfVocabulary:
    """A new transformer. The options are all fields of `TransformerConfig` except the size of the vocabulary."""
    return lambda vocab_size: TransformerConfig(vocab_size=vocab_size, **fields)


_fields = [p for name, p in inspect.signature(TransformerConfig).parameters.items() if name != "vocab_size"]
transformer.__signature__ = inspect.Signature(_fields)
register("policy")(transformer)


@register("policy")
def pretrained(
    path: str,
    dtype: str = "float32",
    param_dtype: str = "float32",
    scan_layers: bool = True,
    remat: str = "none",
    attention: str = "auto",
) -> OfVocabulary:
    """A pretrained transformer; its shape and vocabulary come from its own files.

    Args:
      path: a folder with config.json and safetensors, a GGUF file, or a hub id (`jaxpo.hub`).
      dtype, param_dtype, scan_layers, remat, attention: how to compute, as in `TransformerConfig`.
    """
    how = dict(dtype=dtype, param_dtype=param_dtype, scan_layers=scan_layers, remat=remat, attention=attention)
    return lambda vocab_size: config_from_hf(read_config(path), **how)
