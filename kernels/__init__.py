"""Kernels, imported as ``jaxpo.kernels``. Each has a folder with the public function (api), a naive reference and one
file per implementation."""

from jaxpo.kernels.policy_surrogate.api import policy_surrogate
from jaxpo.kernels.token_logprob.api import TokenLogProb, token_logprob, token_logprob_grad
from jaxpo.kernels.token_logprob.loss import token_logprob_loss

__all__ = ["TokenLogProb", "policy_surrogate", "token_logprob", "token_logprob_grad", "token_logprob_loss"]
