"""Every family beside transformers on torch: logits, greedy answers, and files that go out and in; `make parity`.

What transformers computes is kept in tests/policy/golden, which the fast tests check without torch.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from jaxpo.batch import from_sequences
from jaxpo.policy import heads
from jaxpo.policy.families import config_from_hf
from jaxpo.policy.hf import export, load, open_source
from jaxpo.policy.stats import completion_hidden
from jaxpo.policy.transformer import build
from jaxpo.rollout import SamplingOptions, generate
from tests.policy import tiny_hf

pytestmark = pytest.mark.parity

ATOL = 1e-4


def torch_model(source, folder, dtype="float32"):
    """transformers' model of the source; attention as written down, for the fused form has no soft-cap."""
    import torch
    from transformers import AutoModelForCausalLM

    config = config_from_hf(source.config)
    export(load(source, config), config, folder, hf_config=source.config)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), attn_implementation="eager").eval()


def torch_logits(model, ids):
    import torch

    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


def torch_greedy(model):
    """[prompts, NEW]: transformers' own cache, left padding and all."""
    import torch

    tokens, length = tiny_hf.padded()
    mask = torch.tensor(np.arange(tokens.shape[1]) >= tokens.shape[1] - length[:, None]).long()
    ids = torch.tensor(tokens).long()
    out = model.generate(
        ids, attention_mask=mask, do_sample=False, max_new_tokens=tiny_hf.NEW, eos_token_id=None, pad_token_id=0
    )
    return out[:, tokens.shape[1] :].numpy()


@pytest.fixture(params=tiny_hf.MODELS)
def name(request):
    return request.param


def test_logits_and_greedy_answers(name, tmp_path):
    """Ours within 1e-4 and token for token; also (re)writes what the fast tests compare with."""
    source = tiny_hf.random_source(name)
    theirs = torch_model(source, tmp_path / "model")
    config = config_from_hf(source.config)
    params, model = load(source, config), build(config)
    greedy = torch_greedy(theirs)
    completions = [row.tolist() for row in greedy]
    batch = jax.tree.map(jnp.asarray, from_sequences(tiny_hf.PROMPTS, completions))
    ours = model.logits(params, completion_hidden(model, params, batch))
    for row, (prompt, completion) in enumerate(zip(tiny_hf.PROMPTS, completions, strict=True)):
        expected = torch_logits(theirs, [*prompt, *completion])[len(prompt) - 1 : -1]
        np.testing.assert_allclose(ours[row], expected, atol=ATOL)
        assert np.abs(expected).max() > 0.5  # there is something to agree on
    tokens, length = tiny_hf.padded()
    out = generate(
        model, params, tokens, jax.random.key(0), SamplingOptions(tiny_hf.NEW, greedy=True), prompt_length=length
    )
    np.testing.assert_array_equal(out.completions, greedy)
    keep(name, source, torch_logits(theirs, tiny_hf.PROMPTS[0]), greedy)


def keep(name, source, logits, greedy):
    """Write the golden arrays where they are not there or not the same; rounding is no difference."""
    try:
        kept, old_logits, old_greedy = tiny_hf.read_golden(name)
        same = kept.config == source.config and np.array_equal(old_greedy, greedy)
        same &= np.allclose(old_logits, logits, atol=1e-5)
        same &= all(np.array_equal(kept.arrays[n], x) for n, x in source.arrays.items())
    except (FileNotFoundError, KeyError):
        same = False
    if not same:
        tiny_hf.save_golden(name, source, logits, greedy)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_files_of_transformers_come_back_bit_for_bit(name, dtype, tmp_path):
    """Through float32 parameters; and transformers reads ours as its own."""
    import torch
    from transformers import AutoModelForCausalLM

    torch_model(tiny_hf.random_source(name), tmp_path / "a", dtype).save_pretrained(tmp_path / "b")
    source = open_source(tmp_path / "b")
    config = config_from_hf(source.config)
    export(load(source, config), config, tmp_path / "c", hf_config=source.config)
    with safe_open(tmp_path / "b/model.safetensors", "pt") as a, safe_open(tmp_path / "c/model.safetensors", "pt") as b:
        assert set(a.keys()) == set(b.keys())
        for key in a.keys():
            assert a.get_tensor(key).dtype == getattr(torch, dtype)
            assert torch.equal(a.get_tensor(key), b.get_tensor(key)), key
    one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / x, dtype="auto").state_dict() for x in "bc")
    assert all(torch.equal(one[key], two[key]) for key in one) and one.keys() == two.keys()


def test_a_config_that_is_made_here_is_one_of_transformers(name, tmp_path):
    """Without the config.json that it came with: the same architecture, the same logits."""
    from transformers import AutoModelForCausalLM

    source = tiny_hf.random_source(name)
    config = config_from_hf(source.config)
    export(load(source, config), config, tmp_path / "made")
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "made", attn_implementation="eager").eval()
    ids = [*tiny_hf.PROMPTS[0], *tiny_hf.PROMPTS[3]]
    expected = torch_logits(torch_model(source, tmp_path / "model"), ids)
    np.testing.assert_allclose(torch_logits(made, ids), expected, atol=1e-5)
    assert config_from_hf(json.loads((tmp_path / "made/config.json").read_text())) == config


@pytest.mark.parametrize("head", ["score", "value"])
def test_a_head_of_one_number_is_that_of_a_classifier(name, head, tmp_path):
    """Reward and value models: ``...ForSequenceClassification``, row by row and, where something pads, in a batch."""
    import torch
    from transformers import AutoModelForSequenceClassification

    source = tiny_hf.random_source(name)
    config = config_from_hf(source.config)
    rng = np.random.default_rng(1)
    own = {"weight": jnp.asarray(rng.normal(size=config.width), jnp.float32), "bias": jnp.float32(0.25)}
    params, model = {**load(source, config), "heads": {head: own}}, build(config)
    export(params, config, tmp_path / "out", hf_config=source.config, head=head, pad_id=46)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    assert type(theirs).__name__.endswith("ForSequenceClassification") and theirs.config.num_labels == 1
    expected = []
    for prompt in tiny_hf.PROMPTS:
        batch = jax.tree.map(jnp.asarray, from_sequences([prompt[:1]], [[*prompt[1:], 0]]))
        hidden = completion_hidden(model, params, batch)[0, len(prompt) - 1]  # after the last token of the text
        expected.append(float(heads.apply(params, head, hidden)) - theirs.config.score_bias)
        with torch.no_grad():
            got = theirs(torch.tensor([prompt])).logits
        assert got.shape == (1, 1)
        np.testing.assert_allclose(got[0, 0].numpy(), expected[-1], atol=1e-4)
    width = max(map(len, tiny_hf.PROMPTS))
    rows = torch.tensor([[*prompt, *[46] * (width - len(prompt))] for prompt in tiny_hf.PROMPTS])
    with torch.no_grad():
        got = theirs(rows, attention_mask=(rows != 46).long()).logits[:, 0].numpy()
    np.testing.assert_allclose(got, expected, atol=1e-4)
    assert np.ptp(expected) > 0.1
