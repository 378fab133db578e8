"""Plans of a small run through the real compiler, for chips that are not there (`make tpu_aot`; needs libtpu)."""

import importlib.util
import json
from functools import partial

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import NamedSharding, PartitionSpec

from experiments import plan as program
from jaxpo.batch import Rollouts
from jaxpo.parallel import ROWS, make_mesh, shardings
from jaxpo.plan import topology, trace
from jaxpo.plan.plan import make_plan
from jaxpo.plan.program import traffic
from jaxpo.policy import transformer
from jaxpo.policy.stats import completion_hidden
from jaxpo.policy.transformer import TransformerConfig
from tests.runs import tiny

pytestmark = pytest.mark.tpu_aot

POLICY = ["width=256", "heads=2", "kv_heads=2", "head_dim=128", "layers=1", "dtype=bfloat16", "remat=full"]
SMALL = [
    f"--config={tiny.FILE}",
    "--topology=v5e:2x4",
    *(f"--config.policy.{field}" for field in POLICY),
    "--config.mesh.data=1",
    "--config.mesh.fsdp=4",
    "--config.mesh.tensor=2",
    "--config.training.epochs=1",
    "--config.training.minibatches=1",
]


@pytest.fixture(scope="module", autouse=True)
def libtpu():
    if importlib.util.find_spec("libtpu") is None:  # a tier that skips everything would have checked nothing
        pytest.fail("libtpu is not installed: make tpu_aot installs it")
    yield  # the planner turns the cache of compiled programs off
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


def run(tmp_path, *flags):
    program.main([*SMALL, f"--json={tmp_path / 'plan.json'}", *flags])
    return json.loads((tmp_path / "plan.json").read_text())


def test_a_run_that_fits(tmp_path, capsys):
    numbers = run(tmp_path, "--price=2")
    out = capsys.readouterr().out
    assert numbers["fits"] and [s["name"] for s in numbers["steps"]] == ["rollout", "scoring", "update"]
    for step in numbers["steps"]:
        assert step["operations"] > 0 and step["hbm"] > 0 and step["time"] > 0 and not step["endless"]
        assert {c["kind"] for c in step["collectives"]} >= {"all-reduce"}
        assert step["bound"] in out and step["peak"] < 2**30
    update = numbers["steps"][-1]
    assert update["useful"] < update["operations"]  # remat
    assert numbers["cost"] == pytest.approx(2 * numbers["chip_hours"])
    assert "8 chips (v5litepod-8), mesh data=1 fsdp=4 expert=1 context=1 tensor=2" in out and "MFU" in out


def test_a_cache_that_does_not_fit_and_a_shorter_one_that_does(tmp_path, capsys):
    """64k tokens of 2048 rows: 17 GB of keys and values a chip."""
    long = ["--config.mesh.tensor=1", "--config.mesh.fsdp=8", "--config.objective.beta=0"]
    long += ["--config.rollout.responses=256", "--config.training.microbatches=256"]
    numbers = run(tmp_path, *long, "--config.sampling.max_new_tokens=65536")
    out = capsys.readouterr().out
    assert not numbers["fits"]
    rollout = numbers["steps"][0]
    assert "exceeds available HBM (15.75G)" in rollout["error"] and rollout["error"] in out
    assert "GiB" in rollout["buffers"][0]
    proposal = numbers["proposals"][-1]
    assert proposal["plan"]["fits"] and proposal["plan"]["max_new_tokens"] < 65536
    assert f"{proposal['change']}: fits" in out


def test_the_search_compiles_the_best_and_returns_one_that_fits(tmp_path, capsys):
    numbers = run(tmp_path, "--search=2")
    assert numbers["fits"] and capsys.readouterr().err.count("compiling --config.mesh.data=") == 2


def test_fused_attention_needs_less_memory_and_moves_less():
    """8192 tokens a row: the scores of a part of the queries beside a few blocks that never leave the chip."""
    config = tiny.config({"mesh.data": 1, "mesh.fsdp": 4, "mesh.tensor": 2, "sampling.max_new_tokens": 8192})
    config.policy.update(width=256, heads=4, kv_heads=2, head_dim=128, dtype="bfloat16", remat="full")
    config.training.update(epochs=1, minibatches=1, microbatches=4)
    slice_, update = topology.parse("v5e:2x4"), {}
    for form in ("xla", "splash"):
        config.policy.attention = form
        (update[form],) = make_plan(config, slice_, only={"update"}, say=lambda message: None).steps
        assert update[form].error is None
    xla, splash = update["xla"], update["splash"]
    assert splash.memory["temporaries"] < 0.3 * xla.memory["temporaries"]
    assert splash.hbm < 0.1 * xla.hbm
    assert splash.operations < 0.85 * xla.operations  # half of the scores lie behind the diagonal


def test_a_reference_in_the_hosts_memory_is_no_argument_in_hbm():
    """It comes a layer at a time: neither the arguments nor the temporaries hold the copy that waits there."""
    config = tiny.config({"mesh.data": 1, "mesh.fsdp": 4, "mesh.tensor": 2, "training.offload_reference": True})
    config.policy.update(width=1024, heads=8, kv_heads=2, head_dim=128, layers=8, mlp_width=3072, dtype="bfloat16")
    slice_ = topology.parse("v5e:2x4")
    (scoring,) = make_plan(config, slice_, only={"reference"}, say=lambda message: None).steps
    assert scoring.error is None and scoring.memory["reference"] == 0 and scoring.host > 2**23
    assert scoring.memory["batch"] < 2**20 and scoring.memory["temporaries"] < 0.3 * scoring.host
    assert scoring.seconds["host link"] > 0


def test_experts_and_positions_over_a_mesh():
    """The grouped products and the fused attention lower inside their shard_maps, forward and backward."""
    mesh = make_mesh(dict(expert=2, context=2, tensor=2), topology.devices(topology.parse("v5e:2x4")))
    config = TransformerConfig(
        *(512, 256, 1, 2), head_dim=128, mlp_width=128, experts=8, experts_per_token=2, dtype="bfloat16", remat="full"
    )
    model = transformer.build(config, mesh)
    shapes = jax.eval_shape(partial(transformer.init, config), jax.random.key(0))
    params = trace.placed(shapes, shardings(shapes, mesh))
    rows = NamedSharding(mesh, PartitionSpec(ROWS))
    tokens, mask = (jax.ShapeDtypeStruct((4, n), t, sharding=rows) for n, t in ((2176, int), (2048, float)))

    def loss(params, tokens, mask):
        batch = Rollouts(tokens=tokens, mask=mask, shared_prompt=2)
        return completion_hidden(model, params, batch, mesh).astype(float).sum()

    with jax.set_mesh(mesh):
        text = jax.jit(jax.grad(loss)).lower(params, tokens, mask).compile().as_text()
    assert "ragged-dot" in text and "splash" in text
    kinds = {c.kind for c in traffic(text, mesh.size).collectives}
    assert {"all-gather", "all-reduce"} <= kinds, kinds
