"""Adapters beside peft on torch: ours in peft, and peft's in ours, with the same logits; `make parity`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpo.batch import from_sequences
from jaxpo.policy import lora
from jaxpo.policy.adapters import load_adapter, read_adapter, write_adapter
from jaxpo.policy.families import config_from_hf
from jaxpo.policy.hf import export, load
from jaxpo.policy.stats import completion_hidden, token_stats
from jaxpo.policy.transformer import build
from tests.policy import tiny_hf

pytestmark = pytest.mark.parity

IDS = [3, 5, 7, 9, 11, 2, 4, 6]
MODULES = {
    "attention": (["q_proj", "k_proj", "v_proj", "o_proj"], ("wq", "wk", "wv", "wo")),
    "all": ("all-linear", lora.TARGETS),
}


@pytest.fixture(params=["llama3", "qwen2", "gemma2", "gemma3"])
def source(request):
    return tiny_hf.random_source(request.param)


def base_of(source, folder, kind="CausalLM", **how):
    import transformers

    config = config_from_hf(source.config)
    params = load(source, config)
    if "head" in how:
        params = {**params, "heads": how.pop("heads")}
        export(params, config, folder, hf_config=source.config, head="score")
    else:
        export(params, config, folder, hf_config=source.config)
    auto = getattr(transformers, f"AutoModelFor{kind}")
    return auto.from_pretrained(folder, dtype="float32", attn_implementation="eager").eval()


def logits_of(model):
    import torch

    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0].numpy()


def ours(source, adapters, scale):
    config = config_from_hf(source.config)
    params, model = lora.attach(load(source, config), adapters, scale), build(config)
    batch = jax.tree.map(jnp.asarray, from_sequences([IDS[:1]], [[*IDS[1:], 0]]))
    return model.logits(params, completion_hidden(model, params, batch))[0]


@pytest.mark.parametrize("modules", MODULES)
@pytest.mark.parametrize("stabilized", [False, True])
def test_an_adapter_of_peft_comes_in(source, modules, stabilized, tmp_path):
    import peft
    import torch

    torch.manual_seed(0)
    names, targets = MODULES[modules]
    how = dict(r=3, lora_alpha=7, target_modules=names, use_rslora=stabilized, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(base_of(source, tmp_path / "base"), peft.LoraConfig(**how)).eval()
    plain = logits_of(theirs)
    for name, x in theirs.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(x, std=0.2)
    theirs.save_pretrained(tmp_path / "adapter")
    found = read_adapter(tmp_path / "adapter")
    assert (found.rank, found.targets) == (3, targets)
    adapters = load_adapter(tmp_path / "adapter", config_from_hf(source.config))
    expected = logits_of(theirs)
    np.testing.assert_allclose(ours(source, adapters, found.alpha / found.rank), expected, atol=1e-4)
    assert np.abs(expected - plain).max() > 0.1


def moved(source, targets):
    config = config_from_hf(source.config)
    made = lora.init(load(source, config), jax.random.key(1), rank=3, targets=targets)
    return jax.tree.map(lambda x: 0.2 * jax.random.normal(jax.random.key(x.size), x.shape), made)


@pytest.mark.parametrize("modules", MODULES)
def test_an_adapter_of_ours_goes_out(source, modules, tmp_path):
    import peft

    adapters = moved(source, MODULES[modules][1])
    write_adapter(adapters, config_from_hf(source.config), tmp_path / "out", alpha=6.0, base=str(tmp_path / "base"))
    theirs = peft.PeftModel.from_pretrained(base_of(source, tmp_path / "base"), tmp_path / "out").eval()
    np.testing.assert_allclose(ours(source, adapters, 2.0), logits_of(theirs), atol=1e-4)


def test_an_adapter_with_a_score_goes_out(source, tmp_path):
    """A reward model: adapter and head in one folder, of SEQ_CLS."""
    import peft

    config = config_from_hf(source.config)
    head = {"weight": jax.random.normal(jax.random.key(5), (config.width,)), "bias": jnp.zeros(())}
    params = {**moved(source, ("wq", "w_down")), "heads": {"score": head}}
    zero = {"score": jax.tree.map(jnp.zeros_like, head)}
    write_adapter(params, config, tmp_path / "out", alpha=6.0, base=str(tmp_path / "base"), head="score")
    base = base_of(source, tmp_path / "base", "SequenceClassification", head="score", heads=zero)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "out").eval()
    whole = lora.attach(load(source, config), params, 2.0)
    batch = jax.tree.map(jnp.asarray, from_sequences([IDS[:2]], [IDS[2:]]))
    wants = frozenset({"logp", "score"})
    score = token_stats(build(config), whole, batch, wants=wants).score
    np.testing.assert_allclose(score, logits_of(theirs), atol=1e-4)
