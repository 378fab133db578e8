"""What a run trains: a whole policy, or adapters beside frozen weights (LoRA); and the heads its objective asks for.

Everywhere else ``params`` is what is trained: what the optimizer moves, checkpoints hold, protocols average and frozen
companions are copies of. With LoRA that is adapters only, and ``ref`` those that the run began with, which is the base
itself: a reference policy costs no second copy of the weights.
"""

from collections.abc import Mapping

from jax import Array
from ml_collections import ConfigDict

from jaxpo.learning.step import Apply
from jaxpo.policy import heads, lora, transformer
from jaxpo.policy.transformer import Model, Params


def lora_scale(config: ConfigDict) -> float:
    """LoRA's scale, alpha / rank."""
    return config.lora.alpha / config.lora.rank


def random_params(config: ConfigDict, model: Model, shapes: Mapping[str, tuple[int, ...]], key: Array) -> Params:
    """Random parameters to train: a transformer, or adapters of one; and heads of these ``shapes``."""
    params = transformer.init(model.config, key)
    if config.lora.rank:  # only the shapes of the transformer are asked for: nothing of it is computed
        params = lora.init(params, key, rank=config.lora.rank, targets=config.lora.targets)
    return {**params, **heads.init(model.config.width, shapes, key)}


def with_base(config: ConfigDict, base: Params | None, params: Params) -> Params:
    """The parameters that the policy computes with: what is trained, beside ``base`` if that is adapters."""
    return params if base is None else lora.attach(base, params, lora_scale(config))


def seen_with_base(config: ConfigDict, base: Params | None, apply: Apply) -> Apply:
    """``apply`` as a function of what is trained."""
    return lambda params, batch: apply(with_base(config, base, params), batch)
