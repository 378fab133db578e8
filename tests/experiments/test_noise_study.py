"""The noise study, and preferences in a race."""

import functools
import json
from dataclasses import replace

import chex
import jax
import numpy as np
import pytest

from experiments import noise_study
from jaxpo.batch import Rollouts
from jaxpo.learning.state import advance
from jaxpo.objectives import make
from jaxpo.race import race as racing
from jaxpo.race.contenders import select
from jaxpo.race.rules import Rules, in_units, resolved_by
from jaxpo.race.seeds import InTurn, one, race_preferences
from jaxpo.race.setup import draws, make_course, set_up
from jaxpo.runs.iteration import finish

TINY = dict(
    task="toy(digits=2, train_size=40, test_size=10)",
    seeds=2,
    steps=2,
    prompts=4,
    responses=4,
    minibatches=2,
    evaluations=1,
    warm_start=3,
    warm_batch=8,
    width=8,
    layers=1,
)


def resolved(rules, name, **hyperparameters):
    """The run of an objective by the rules."""
    return resolved_by(rules, name, make(name, **hyperparameters), make_course(rules).questions.width)


def test_who_races_on_pairs_and_who_does_not():
    rules = Rules(**TINY)
    racing, left_out = select("all", rules, 5)
    labels = {c.label for c in racing}
    assert labels >= {"grpo", "dpo", "ipo", "rdpo", "simpo", "orpo", "cpo", "slic_hinge", "rpo", "rso", "kto"}
    assert labels >= {"online_ipo", "nash_md", "nash_ema", "ipo_md", "sppo", "inpo"}  # by the verifier as a judge
    assert labels >= {"seppo", "hypo"}  # pairs, and samples of the policy or of its past
    assert "trains a judge of answers" in left_out["bradley_terry_rm"]
    assert "a race has pairs" in left_out["srpo"] and "a race has pairs" in left_out["rationale_dpo"]
    assert "config.steps must be a multiple of 8" in left_out["nash_mp"]
    with pytest.raises(ValueError, match="5 rows of an iteration are not 1 minibatches of units of 2 rows"):
        in_units(Rules(**{**TINY, "prompts": 5, "responses": 1, "minibatches": 1}), 2)
    with pytest.raises(ValueError, match="flipped must be a number in"):
        Rules(flipped=1.5)


@pytest.mark.parametrize(
    "protocol, message",
    [
        ("jugded", "did you mean 'judged'"),
        ("judged(pair='random')", "did you mean 'pairs'"),
        ("judged,rso", "has exactly one"),
        ("nash_md(mixture=0.5)", "set by the objective's own mixture"),
    ],
)
def test_another_protocol_is_named_with_its_arguments(protocol, message):
    name = "nash_md" if "nash" in protocol else "dpo"
    with pytest.raises(ValueError, match=message):
        select(f'{name}(protocol="{protocol}")', Rules(**TINY), 5)
    [contender], _ = select("""dpo(protocol="judged(pairs='adjacent')")""", Rules(**TINY), 5)
    assert contender.resolved.objective.protocol.options == {"pairs": "adjacent"}


def test_as_many_rows_in_pairs_of_which_a_share_is_labelled_wrong():
    rules = Rules(**TINY)
    paired = in_units(rules, 2)
    assert paired.prompts * paired.responses == rules.prompts * rules.responses and paired.responses == 2
    course = make_course(rules)
    questions = course.questions

    def units(name: str, share: float) -> Rollouts:
        data = race_preferences(resolved(rules, name), course, replace(rules, flipped=share))
        return data.units(range(len(data.train)), (0, 0))

    clean, noisy = (units("dpo", share) for share in (0.0, 0.25))
    assert clean.layout == ("chosen", "rejected") and clean.shared_prompt == 2
    chosen, rejected = clean.unit(clean.completions).swapaxes(0, 1)
    texts = [questions.tokenizer.decode(row[m > 0].tolist()) for row, m in zip(chosen, clean.mask[::2], strict=True)]
    scored = questions.task.score([questions.task.train[i] for i in range(len(texts))], texts)
    assert all(s.correct for s in scored)
    exchanged = (noisy.unit(noisy.completions)[:, 0] == rejected).all(1) & (chosen != rejected).any(1)
    assert exchanged.sum() == round(0.25 * len(texts)) > 5
    labels = units("kto", 0.0)
    assert labels.per_row["label"].tolist()[:4] == [1, 0, 0, 0]  # each answer, then one that is another prompt's


def test_methods_are_told_the_share():
    assert noise_study.methods(0.0) == {"dpo": "dpo", "cDPO": "dpo(eps=0.1)", "rdpo": "rdpo(eps=0.1)", "ipo": "ipo"}
    assert noise_study.methods(0.4)["rdpo"] == "rdpo(eps=0.4)"
    found = {share: {name: [0.5, 0.7] for name in ("start", *noise_study.methods(share))} for share in (0.0, 0.2)}
    lines = noise_study.table(found).splitlines()
    assert lines[0] == "| flipped labels | 0% | 20% |" and len(lines) == 7
    assert lines[3].startswith("| dpo | 0.600 (0.00–1.00) |")
    with pytest.raises(SystemExit, match="rdpo needs less than half"):
        noise_study.main(["--shares=0,0.5"])


@pytest.mark.slow
def test_study(tmp_path):
    flags = [f"--{name}={value}" for name, value in TINY.items()]
    found = noise_study.main([f"--out={tmp_path}", "--shares=0,0.4", *flags])
    assert set(found) == {0.0, 0.4} and all(len(values) == 2 for values in found[0.4].values())
    assert (tmp_path / "noise.png").read_bytes()[:4] == b"\x89PNG"
    held = json.loads((tmp_path / "flipped_0.4" / "results.json").read_text())
    assert held["rules"]["flipped"] == 0.4 and set(held["objectives"]) == set(noise_study.methods(0.4).values())


@pytest.mark.slow
def test_who_is_judged_samples_and_learns_from_its_own_answers():
    results = racing.race("dpo(protocol='judged'),online_ipo,ipo_md,nash_md,nash_ema,sppo,inpo,dno,gpo", **TINY)
    assert len(results.objectives) == 9 and not results.left_out
    for result in results.objectives.values():
        assert result["sampled"] >= 16 and result["skipped"] == 0 and np.shape(result["curve"]) == (2, 2)


MOVING = {  # completions of a seed in an iteration
    "kto": 0,
    "dpo(protocol='apo_accelerated(iterations=2)')": 0,
    "seppo": 8,
    "hypo": 8,
    "egpo": 32,
    "nash_mp(protocol='nash_mp(stage=2)')": 32,
}


@pytest.mark.slow
def test_protocols_that_move_the_weights_do_so_in_a_race():
    results = racing.race(",".join(MOVING), **{**TINY, "steps": 4, "learning_rate": 1e-3})
    assert {label: r["sampled"] for label, r in results.objectives.items()} == MOVING and not results.left_out


ONE_SEED = Rules(**{**TINY, "seeds": 1, "warm_start": 0, "learning_rate": 0.1})
setup_of = functools.cache(set_up)


def raced(name, **hyperparameters):
    """One seed of an objective, and what is drawn for its first iteration."""
    run = resolved(ONE_SEED, name, **hyperparameters)
    shape = replace(ONE_SEED, prompts=run.config.rollout.prompts, responses=run.rows_per_prompt)
    return InTurn(run, setup_of(ONE_SEED), ONE_SEED), draws(shape, 40, 0)


def test_half_steps_start_where_the_whole_step_does():
    """EGPO in a race: the second iteration of two samples with the half step, and steps from before it."""
    seeds, _ = raced("egpo")
    start, first = jax.device_get(seeds.params), seeds._gather(0)
    run = seeds.runs[0]
    half = run.state.replace(params=jax.tree.map(lambda x: x + 1, run.state.params))
    seeds.runs[0] = finish(seeds.each, seeds.gatherers[0], advance(run, state=half), first)
    assert not np.array_equal(seeds.params["embedding"], start["embedding"])
    batch = seeds._gather(0)
    chex.assert_trees_all_equal(jax.device_get(seeds.params), start)
    assert not np.allclose(batch.logp_beh, 0)


@pytest.mark.slow
def test_an_average_of_weights_moves_with_every_optimizer_step():
    (seeds, drawn), path = raced("nash_ema", b=0.5), []
    start, update = jax.device_get(seeds.params), seeds.all.update

    def watched(*args, **options):
        out = update(*args, **options)
        path.append(jax.device_get(out[0].params))
        return out

    seeds.all = seeds.all._replace(update=watched)
    seeds.iterate(drawn)
    first, last = (one(params, 0) for params in path)
    expected = jax.tree.map(lambda a, b, c: a / 4 + b / 4 + c / 2, one(start, 0), first, last)
    chex.assert_trees_all_close(seeds.runs[0].references["ema"], expected, atol=1e-6)
    chex.assert_trees_all_close(one(seeds.params, 0), last)


@pytest.mark.slow
def test_pairs_race_beside_rewards_and_learn():
    options = dict(seeds=2, steps=20, evaluations=1, width=16, layers=1)
    results = racing.race("dpo,grpo", **options)
    for label in ("dpo", "grpo"):
        curve = np.asarray(results.objectives[label]["curve"])
        assert curve[-1].mean() > curve[0].mean()
    assert results.objectives["dpo"]["sampled"] == 0 < results.objectives["grpo"]["sampled"]
    assert make("dpo").unit.layout
