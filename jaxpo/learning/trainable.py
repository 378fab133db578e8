"""The parameters that a run trains: a whole policy or LoRA adapters beside frozen weights, and the objective's heads.

In other modules ``params`` always means the trained parameters: the optimizer updates them, checkpoints hold them,
protocols average them, and references are copies of them. With LoRA they are the adapters (and heads) only. The
reference ``ref`` then holds the first adapters, which leave the base unchanged: a reference policy needs no second copy
of the weights.
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
    """Random parameters to train: a transformer or its adapters, and heads of these ``shapes``."""
    params = transformer.init(model.config, key)
    if config.lora.rank:  # needs only the shapes of the transformer, so none of it is computed
        params = lora.init(params, key, rank=config.lora.rank, targets=config.lora.targets)
    return {**params, **heads.init(model.config.width, shapes, key)}


def with_base(config: ConfigDict, base: Params | None, params: Params) -> Params:
    """The parameters that the policy computes with: ``params``, attached to ``base`` if there is one (LoRA)."""
    return params if base is None else lora.attach(base, params, lora_scale(config))


def seen_with_base(config: ConfigDict, base: Params | None, apply: Apply) -> Apply:
    """``apply`` as a function of the trained parameters."""
    return lambda params, batch: apply(with_base(config, base, params), batch)
