"""Kernels, imported as ``jaxpo.kernels``: each a folder with the function (api), a naive reference and one file per
implementation."""

from jaxpo.kernels.token_logprob.api import LogProbStats, token_logprob

__all__ = ["LogProbStats", "token_logprob"]
