"""The planner without libtpu: its table and JSON, its errors, and what it would try."""

import importlib.util
import json
from dataclasses import replace

import jax
import pytest

from experiments import plan as program
from jaxpo.config.resolve import resolve
from jaxpo.parallel import make_mesh
from jaxpo.plan import operations, search, topology, trace
from jaxpo.plan.plan import Plan, StepPlan, memory_of, plan_step, refusal, shard_bytes
from jaxpo.plan.program import Collective
from tests.runs import tiny

GIB = 2**30
V5E = topology.parse("v5e:2x4")
CONFIG = f"--config={tiny.FILE}"


def step(name, times, peak, seconds, **fields):
    memory = dict(parameters=1.0 * GIB, temporaries=(peak - 1.0) * GIB)
    terms = dict(compute=seconds, memory=seconds / 2, interconnect=seconds / 4)
    collectives = [Collective("all-gather", 7, 3.0 * GIB)]
    work = dict(operations=4e12, useful=3e12, hbm=2.0 * GIB, collectives=collectives, seconds=terms)
    return StepPlan(name, times, 1.0, memory, **(work | fields))


def a_plan(*steps):
    return Plan(V5E, dict(data=1, fsdp=4, tensor=2), 2, "full", 100, 6400, 900, list(steps))


FITS = a_plan(step("rollout", 1, 9, 1.0), step("update", 2, 12, 0.5))


def test_sums_of_a_plan():
    assert FITS.fits and FITS.seconds == 2.0 and FITS.tokens_per_second == 3200
    assert FITS.chip_hours == 900 * 2 * 8 / 3600 == 4.0
    assert FITS.utilization == pytest.approx(3 * 3e12 / (2 * 8 * 197e12))
    assert not a_plan(step("rollout", 1, 16.1, 1.0)).fits
    assert not a_plan(step("rollout", 1, 9, 1.0), StepPlan("update", 1, 1.0, error="no room")).fits


def test_table(capsys):
    program.show(FITS, price=1.5)
    lines = {line.split("  ")[1].strip(): line.split() for line in capsys.readouterr().out.splitlines() if "  " in line}
    text = {name: " ".join(words) for name, words in lines.items()}
    assert "rollout update iteration" in text["of one chip and one call"]
    assert text["bytes in all"].endswith("9.00 GiB 12.00 GiB")
    assert text["of 15.75 GiB HBM"].endswith("57% 76%")
    assert text["sent: all-gather"].endswith("3.00 GiB 3.00 GiB 9.00 GiB")
    assert text["operations, all chips"].endswith("4 T 4 T 12 T")
    assert text["roofline time"].endswith("1.00 s 500 ms 2.00 s")
    assert text["bound by"].endswith("compute compute")


def test_what_is_said_of_the_run(capsys):
    program.show(FITS, price=1.5)
    out = capsys.readouterr().out
    assert "v5e:2x4: 8 chips (v5litepod-8), mesh data=1 fsdp=4 tensor=2, 2 microbatches, remat full" in out
    assert "3,200 sampled tokens/s, MFU 0.3%" in out and "4.0 chip-hours at least, 6 at 1.5 a chip-hour" in out
    refused = StepPlan("update", 1, 1.0, error="Used 30.1G of 15.75G hbm.", buffers=["4.5G bf16[1,16,8191,8704] dot"])
    program.show(a_plan(step("rollout", 1, 17, 1.0, endless=2), refused), price=0)
    out = capsys.readouterr().out
    assert "rollout does not fit beside what waits: 17.00 GiB of 15.75 GiB" in out
    assert "rollout: 2 loops of unknown length were counted once" in out
    assert (
        "update is refused by the compiler: Used 30.1G of 15.75G hbm." in out and "4.5G bf16[1,16,8191,8704] dot" in out
    )
    assert "chip-hours" not in out


def test_json(tmp_path):
    program.write(tmp_path / "plan.json", FITS, [("--config.mesh.fsdp=8", FITS)], price=2.0)
    numbers = json.loads((tmp_path / "plan.json").read_text())
    assert numbers["chips"] == 8 and numbers["cloud"] == "v5litepod-8" and numbers["cost"] == 8.0
    update = numbers["steps"][1]
    assert update["bound"] == "compute" and update["peak"] == 12 * GIB and update["time"] == 0.5
    assert update["collectives"] == [dict(kind="all-gather", calls=7, bytes=3.0 * GIB)]
    assert numbers["proposals"][0]["change"] == "--config.mesh.fsdp=8" and numbers["proposals"][0]["plan"]["fits"]


def test_the_compilers_message():
    message = """RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 30.21G of 15.75G hbm. Exceeded hbm capacity by 14.46G.

Total hbm usage >= 30.46G:
    reserved        258.00M

  Largest program allocations in hbm:

  1. Size: 8.00G
     Operator: op_name="jit(run_step)/while/body/dot_general" source_file="x.py" source_line=3
     Shape: bf16[4,16,8192,8192]{3,2,1,0:T(8,128)(2,1)}
     Unpadded size: 8.00G
     XLA label: fusion.1
     ==========================

  2. Size: 64.0M
     Shape: f32[4096,4096]{1,0:T(8,128)}
"""  # noqa: E501
    sentence, buffers = refusal(message)
    assert sentence.endswith("Used 30.21G of 15.75G hbm. Exceeded hbm capacity by 14.46G.")
    assert buffers == ["8.00G bf16[4,16,8192,8192] jit(run_step)/while/body/dot_general", "64.0M f32[4096,4096]"]
    short = "RESOURCE_EXHAUSTED: Ran out of memory on HBM, 16.44G exceeds available HBM (15.75G)."
    assert refusal(short) == ("Ran out of memory on HBM, 16.44G exceeds available HBM (15.75G).", [])
    assert refusal("INTERNAL: RET_CHECK failure (x.cc:1)\ntrace") == ("INTERNAL: RET_CHECK failure (x.cc:1)", [])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--topology=CHIP:SHAPE is required"),
        (["--topology=v5e:2x3"], "unknown shape of a v5e slice '2x3': did you mean '2x4'"),
        (["--topology=v7:2x2"], "unknown chip of --topology 'v7'"),
        (["--topolgy=v5e:2x4"], "unknown flag '--topolgy': did you mean '--topology'"),
        (["--topology=v5e:2x4", "--price=-1"], "--price must be a number of at least 0, not -1"),
        (["--topology=v5e:2x4", "--search=-2"], "--search must be a whole number of at least 0, not -2"),
        (["--topology=v5e:2x4", "--json=/nowhere/plan.json"], "--json=/nowhere/plan.json: there is no such folder"),
    ],
)
def test_bad_flags(flags, message):
    with pytest.raises(SystemExit, match=f"error: {message}"):
        program.main([CONFIG, *flags])


def test_without_libtpu(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "libtpu" else find(name, *a))
    with pytest.raises(SystemExit, match="needs libtpu"):
        program.main([CONFIG, "--topology=v5e:2x4"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh.fsdp": 3}, "mesh .* does not fit 8 devices"),
        ({"mesh.tensor": 4}, "config.mesh.tensor 4 does not divide config.policy.heads 2"),
        ({"rollout.prompts": 6, "training.minibatches": 1}, "config.rollout.prompts 6 does not divide"),
    ],
)
def test_a_config_that_cannot_be_spread_fails_before_anything_is_compiled(monkeypatch, changes, message):
    monkeypatch.setattr(topology, "devices", lambda where: jax.devices())
    flags = [f"--config.{path}={value}" for path, value in changes.items()]
    with pytest.raises(SystemExit, match=message):
        program.main([CONFIG, "--topology=v5e:2x4", *flags])


# ---- the steps of a run, on the CPU devices


@pytest.fixture(scope="module")
def run():
    resolved = resolve(tiny.config({"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}), 8)
    mesh = make_mesh(dict(data=2, fsdp=2, tensor=2))
    return resolved.config, mesh, trace.trace_run(resolved, mesh, trace.data_of(resolved))


def test_steps_are_those_of_an_iteration(run):
    config, mesh, of_run = run
    assert [(s.name, s.times) for s in of_run.steps] == [("rollout", 1), ("scoring", 2), ("update", 4)]
    assert set(of_run.state) == {"params", "opt_state", "ref"}
    params = of_run.state["params"]
    assert shard_bytes(params) * 8 > sum(4 * x.size for x in jax.tree.leaves(params)) > shard_bytes(params) * 2
    once = operations.count(of_run.steps[0].trace().jaxpr, loop=(1,))
    assert operations.count(of_run.steps[0].trace().jaxpr, loop=(2,)) > once > 0


PAIRS = {"objective": {"name": "dpo"}, "data": {"name": "task", "flipped": 0.0}, "training.microbatches": 2}


@pytest.mark.parametrize(
    ("objective", "held"),
    (
        ({"name": "simpo", "beta": 2.0}, set()),  # a beta, and no reference
        ({"name": "dpo", "beta": 0.1, "reference_free": True}, set()),
        ({"name": "dpo", "beta": 0.1}, {"ref"}),
        ({"name": "ipo", "tau": 0.1}, {"ref"}),  # a reference, and no beta
    ),
    ids=lambda x: "-".join(map(str, x.values())) if isinstance(x, dict) else "",
)
def test_references_are_those_that_the_objective_needs(objective, held):
    resolved = resolve(tiny.config(PAIRS | {"objective": objective}), 1)
    mesh = make_mesh(dict(data=1), jax.devices()[:1])
    of_run = trace.trace_run(resolved, mesh, trace.data_of(resolved))
    assert set(resolved.references) == held == set(of_run.state) - {"params", "opt_state"}


PREFERENCES = {
    "pairs from data": ({}, ["scoring", "update"]),
    "a reward model": (
        {"objective": {"name": "bradley_terry_rm"}, "training.epochs": 1, "training.minibatches": 1}, ["update"]
    ),
    "samples as the rejected": ({"protocol": {"name": None, "rejected": "policy"}}, ["rollout", "scoring", "update"]),
    "answers that a judge compares": ({"data": {"name": None}}, ["rollout", "scoring", "update"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", PREFERENCES)
def test_runs_on_preferences(kind):
    changes, steps = PREFERENCES[kind]
    resolved, mesh = resolve(tiny.config(PAIRS | changes), 1), make_mesh({"data": 1}, jax.devices()[:1])
    config, run = resolved.config, trace.trace_run(resolved, mesh, trace.data_of(resolved))
    assert [step.name for step in run.steps] == steps
    batch = run.steps[-1].arguments[1]
    assert batch.rows == 2 * config.rollout.prompts and batch.layout == ("chosen", "rejected")
    assert batch.mask.shape == (batch.rows, config.sampling.max_new_tokens)
    assert operations.count(run.steps[-1].trace().jaxpr) > 0


OF_ROWS = {  # rows a prompt, numbers and weights of tokens
    "opa_dpo": ({}, 5, {"severity": (8,), "relevance": (8,)}),
    "preference_orchestrator": ({"heads.gate": 3}, 1, {"rm_scores": (3,)}),
    "kto": ({"data": {"name": None}}, 8, {"label": ()}),
}


@pytest.mark.parametrize("name", OF_ROWS)
def test_what_rows_of_preferences_bear(name):
    changes, rows, fields = OF_ROWS[name]
    changes = PAIRS | {"objective": {"name": name}, "sampling.max_new_tokens": 8} | changes
    resolved, mesh = resolve(tiny.config(changes), 1), make_mesh({"data": 1}, jax.devices()[:1])
    update = trace.trace_run(resolved, mesh, trace.data_of(resolved)).steps[-1]
    batch = update.arguments[1]
    assert batch.rows == rows * resolved.config.rollout.prompts == resolved.rows
    assert fields.items() <= {k: x.shape[1:] for k, x in {**batch.per_row, **batch.per_token}.items()}.items()
    assert operations.count(update.trace().jaxpr) > 0


def test_a_step_planned_on_the_devices_that_there_are(run):
    config, mesh, of_run = run
    scoring = of_run.steps[1]
    told = []
    out = plan_step(scoring, of_run, config, mesh, V5E.chip, 5.0, told.append)
    assert out.error is None and told[0].startswith("scoring: compiled in")
    assert out.operations > 0 and out.hbm > 0 and sum(c.bytes for c in out.collectives) > 0
    assert out.memory["parameters"] == out.memory["reference"] == shard_bytes(of_run.state["params"])
    assert out.time == max(out.seconds.values()) > 0 and out.useful == 5.0


def test_cache_is_a_part_of_the_temporaries(run):
    config, mesh, of_run = run

    class Stats:
        temp_size_in_bytes, argument_size_in_bytes, output_size_in_bytes = 10**6, 10**6, 30
        alias_size_in_bytes, generated_code_size_in_bytes = 10, 7

    memory = memory_of(of_run.steps[0], of_run, config, mesh, Stats)
    prompts, width = 8 * of_run.data.prompt_width, 8 * 4 * 2
    assert memory["cache"] == 2 * 1 * 2 * 8 * (width + prompts) * 4 // 8
    assert memory["cache"] + memory["temporaries"] == 10**6
    assert memory["results"] == 20 and memory["program"] == 7


# ---- what else would do


def test_meshes():
    found = [tuple(m.values()) for m in search.meshes(8)]
    assert len(found) == len(set(found)) == 10 and all(d * f * t == 8 for d, f, t in found)


def test_ranking_keeps_to_what_divides_and_prefers_what_fits():
    config = tiny.config()
    data = trace.data_of(search.on_one_device(config))
    order = search.ranked(config, V5E, data)
    assert order and all(m["mesh.tensor"] <= 2 for m, _ in order)  # two heads
    assert all(m["mesh.data"] * m["mesh.fsdp"] * m["mesh.tensor"] == 8 for m, _ in order)
    seconds = [guess.seconds for _, guess in order]
    assert seconds == sorted(seconds) and all(guess.bytes < V5E.chip.hbm for _, guess in order)
    crowded = V5E._replace(chip=V5E.chip._replace(hbm=order[0][1].bytes * 0.999))
    assert search.ranked(config, crowded, data)[0][0] != order[0][0]


def test_proposals_stop_at_the_first_that_fits(monkeypatch):
    config, tried = tiny.config({"mesh.data": 4, "mesh.fsdp": 2}), []

    def make_plan(config, where, *, data, only=None, known=None, say):
        tried.append((config.training.microbatches, config.policy.remat, only))
        small = config.training.microbatches == 2
        return a_plan(step("update", 1, 9 if small else 20, 1.0))

    monkeypatch.setattr(search, "make_plan", make_plan)
    too_large = replace(FITS, steps=[step("update", 1, 20, 1.0)])
    config.policy.remat = "none"
    found = search.proposals(config, V5E, too_large, say=lambda message: None)
    assert [(change, p.fits) for change, p in found] == [
        ("--config.policy.remat=full", False),
        ("--config.training.microbatches=2", True),
    ]
    assert tried[-1] == (2, "none", None) and tried[0] == (1, "full", {"update"})
