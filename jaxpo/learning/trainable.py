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
from jaxpo.policy.config import TransformerConfig
from jaxpo.policy.stats import CRITIC
from jaxpo.policy.transformer import Model, Params


def lora_scale(config: ConfigDict) -> float:
    """LoRA's scale, alpha / rank."""
    return config.lora.alpha / config.lora.rank


def random_params(
    config: ConfigDict,
    model: Model,
    shapes: Mapping[str, tuple[int, ...]],
    key: Array,
    critic: TransformerConfig | None = None,
) -> Params:
    """Random parameters to train: a transformer or its adapters, heads of these ``shapes``, and under "critic" a critic
    of its own."""
    params = transformer.init(model.config, key)
    if config.lora.rank:  # needs only the shapes of the transformer, so none of it is computed
        params = lora.init(params, key, rank=config.lora.rank, targets=config.lora.targets)
    beside = {} if critic is None else {CRITIC: random_critic(critic, key)}
    return {**params, **heads.init(model.config.width, shapes, key), **beside}


def random_critic(config: TransformerConfig, key: Array) -> Params:
    """A transformer with a value head that gives 0 everywhere."""
    return {**transformer.init(config, key), **heads.init(config.width, {"value": ()}, key)}


def policy_alone(params: Params) -> Params:
    """The parameters without a critic of its own: what samples, and what references are copies of."""
    return {name: x for name, x in params.items() if name != CRITIC} if params and CRITIC in params else params


def with_base(config: ConfigDict, base: Params | None, params: Params) -> Params:
    """The parameters that the policy computes with: ``params``, attached to ``base`` if there is one (LoRA)."""
    return params if base is None else lora.attach(base, params, lora_scale(config))


def seen_with_base(config: ConfigDict, base: Params | None, apply: Apply) -> Apply:
    """``apply`` as a function of the trained parameters."""
    return lambda params, batch: apply(with_base(config, base, params), batch)
