"""Published models by their own config.json: the features that are read out of it, and the number of parameters that
their authors state."""

from functools import partial

import jax
import numpy as np
import pytest

from jaxpo.policy.config import rope_frequencies
from jaxpo.policy.families import config_from_hf, config_to_hf
from jaxpo.policy.transformer import init, parameter_count
from tests.policy import tiny_hf

# hidden, layers, heads, key heads, MLP, vocabulary
SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "vocab_size",
)
LLAMA31 = dict(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192, rope_type="llama3"
)
GEMMA = dict(tie_word_embeddings=True, head_dim=256, hidden_activation="gelu_pytorch_tanh")
PUBLISHED = {
    "SmolLM2-135M": (
        ("llama", 576, 30, 9, 3, 1536, 49152),
        dict(rope_theta=100000, tie_word_embeddings=True),
        134_515_008,
        dict(rope_theta=100000, tied=True, head_dim=64, window=None),
    ),
    "Llama-3.1-8B": (
        ("llama", 4096, 32, 32, 8, 14336, 128256),
        dict(rope_theta=500000.0, rope_scaling=LLAMA31, tie_word_embeddings=False, torch_dtype="bfloat16"),
        8_030_261_248,
        dict(rope_scaling=("llama3", 8.0, 1.0, 4.0, 8192), rope_theta=500000.0),
    ),
    "Mistral-7B-v0.1": (
        ("mistral", 4096, 32, 32, 8, 14336, 32000),
        dict(sliding_window=4096, rope_theta=10000.0, tie_word_embeddings=False),
        7_241_732_096,
        dict(window=4096, local_layers=None),
    ),
    "Qwen2.5-0.5B": (
        ("qwen2", 896, 24, 14, 2, 4864, 151936),
        dict(use_sliding_window=False, sliding_window=32768, rope_theta=1e6, tie_word_embeddings=True),
        494_032_768,
        dict(qkv_bias=True, window=None, rope_theta=1e6),
    ),
    "Qwen3-0.6B": (
        ("qwen3", 1024, 28, 16, 8, 3072, 151936),
        dict(head_dim=128, rope_theta=1e6, use_sliding_window=False, tie_word_embeddings=True),
        596_049_920,
        dict(qk_norm=True, qkv_bias=False, head_dim=128),
    ),
    "Qwen3-30B-A3B": (
        ("qwen3_moe", 2048, 48, 32, 4, 6144, 151936),
        dict(
            head_dim=128,
            num_experts=128,
            num_experts_per_tok=8,
            moe_intermediate_size=768,
            norm_topk_prob=True,
            decoder_sparse_step=1,
            mlp_only_layers=[],
            tie_word_embeddings=False,
            rope_theta=1e6,
        ),
        30_532_122_624,
        dict(experts=128, experts_per_token=8, norm_topk=True, mlp_width=768),
    ),
    "gemma-2-2b": (
        ("gemma2", 2304, 26, 8, 4, 9216, 256000),
        dict(
            **GEMMA,
            attn_logit_softcapping=50.0,
            final_logit_softcapping=30.0,
            query_pre_attn_scalar=256,
            sliding_window=4096,
            rope_theta=10000.0,
        ),
        2_614_341_888,
        dict(attention_softcap=50.0, final_softcap=30.0, window=4096, local_layers=tuple(range(0, 26, 2))),
    ),
    "gemma-3-1b": (
        ("gemma3_text", 1152, 26, 4, 1, 6912, 262144),
        dict(
            **GEMMA,
            query_pre_attn_scalar=256,
            sliding_window=512,
            sliding_window_pattern=6,
            rope_theta=1000000,
            rope_local_base_freq=10000,
        ),
        999_885_952,
        dict(
            window=512,
            local_layers=tuple(i for i in range(26) if i % 6 != 5),
            rope_theta=1000000,
            local_rope_theta=10000,
            qk_norm=True,
            post_norms=True,
            activation="gelu_tanh",
        ),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models(name):
    (model_type, *sizes), more, parameters, expected = PUBLISHED[name]
    config = config_from_hf(dict(zip(SIZES, sizes, strict=True), model_type=model_type, **more))
    assert {field: getattr(config, field) for field in expected} == expected
    assert parameter_count(jax.eval_shape(partial(init, config), jax.random.key(0))) == parameters


def yarn_by_hand(dim, theta, factor, length, fast, slow, whole):
    """YaRN's frequencies by a loop over pairs, from the paper's gamma: 1 keeps, 0 divides by the factor."""

    def index(turns):  # of the pair that turns so often within the original length
        return dim * np.log(length / (turns * 2 * np.pi)) / (2 * np.log(theta))

    low, high = index(fast), index(slow)
    if whole:
        low, high = np.floor(low), np.ceil(high)
    low, high = max(low, 0.0), min(high, dim - 1.0)
    out = []
    for i in range(dim // 2):
        gamma = 1 - min(max((i - low) / (high - low if high > low else 0.001), 0.0), 1.0)
        base = theta ** (-2 * i / dim)
        out.append(gamma * base + (1 - gamma) * base / factor)
    return np.array(out)


@pytest.mark.parametrize("whole", (True, False))
@pytest.mark.parametrize(
    "numbers", ((128, 1e6, 4.0, 32768, 32, 1), (64, 1e4, 40.0, 4096, 32, 1), (8, 50.0, 2.0, 16, 3, 1))
)
def test_yarn_frequencies(numbers, whole):
    dim, theta, factor, length, fast, slow = numbers
    got = rope_frequencies(dim, theta, ("yarn", factor, length, fast, slow, 1.1, whole))
    np.testing.assert_allclose(got, yarn_by_hand(*numbers, whole), rtol=1e-6)
    assert got[0] == 1 and got[-1] == pytest.approx(theta ** (-(dim - 2) / dim) / factor, rel=1e-5)


YARN = dict(rope_type="yarn", rope_theta=1e6, factor=4.0, original_max_position_embeddings=32768)


@pytest.mark.parametrize(
    ("changes", "attention"),
    (
        ({}, 0.1 * np.log(4) + 1),
        (dict(attention_factor=1.25), 1.25),
        (dict(mscale=0.707, mscale_all_dim=1.0), (0.0707 * np.log(4) + 1) / (0.1 * np.log(4) + 1)),
        (dict(mscale=1.0), 0.1 * np.log(4) + 1),
        (dict(factor=1.0), 1.0),
    ),
)
def test_yarn_scales_queries_and_keys(changes, attention):
    hf = tiny_hf.hf_config("llama3") | dict(rope_parameters=YARN | changes)
    config = config_from_hf(hf)
    assert config.rope_scaling[:5] == ("yarn", (YARN | changes)["factor"], 32768, 32, 1)
    assert config.attention_scale == pytest.approx(attention**2 / np.sqrt(config.head_dim), rel=1e-12)
    again = config_from_hf(config_to_hf(config))
    assert again == config


def test_yarn_as_older_files_write_it():
    old = tiny_hf.hf_config("qwen2") | dict(max_position_embeddings=131072, rope_theta=1e6)
    del old["rope_parameters"]
    scaling = {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}
    new = config_from_hf(old | dict(rope_scaling=scaling)).rope_scaling
    assert new[:5] == ("yarn", 4.0, 32768, 32, 1)


def test_yarn_beside_layers_with_their_own_positions_is_refused():
    with pytest.raises(ValueError, match="'yarn' scales the scores of all layers"):
        config_from_hf(
            tiny_hf.hf_config("gemma3")
            | dict(rope_parameters={tiny_hf.LOCAL: dict(rope_type="default", rope_theta=10.0), tiny_hf.GLOBAL: YARN})
        )
