"""Values of prefixes by more rollouts: completions of a response's prefixes, and trees."""

import jax
import numpy as np
import pytest

from jaxpo.batch import Rollouts, TokenStats
from jaxpo.config.resolve import resolve
from jaxpo.learning.state import Run, advance
from jaxpo.objectives import make
from jaxpo.protocols.gatherer import Watch
from jaxpo.protocols.prefixes import joined
from jaxpo.rollout.sampling import SamplingOptions
from jaxpo.runs.gatherer import make_gatherer
from jaxpo.runs.workspace import setup
from tests.protocols.fake_gatherer import fake
from tests.runs import tiny

KEY = jax.random.key(0)
P = 3  # prompts: question q is [10 + q] * (1 + q), left-padded


class State:
    params = "params"


def rewarded(rollouts, reward):
    """Every row judged by its prompt and the tokens of its completion."""
    rows = zip(rollouts.prompt, rollouts.completions, rollouts.mask, strict=True)
    return rollouts.replace(
        reward=np.array([reward(q, tuple(y[m > 0].tolist())) for q, y, m in rows], np.float32), correct=None
    )


def encoded(indices):
    length = 1 + np.asarray(indices)
    on = np.arange(P) >= P - length[:, None]
    return np.where(on, 10 + np.asarray(indices)[:, None], 0).astype(np.int32), length.astype(np.int32)


class World:
    """Child j of a path is ``j + 1`` again and again, up to the budget; one that ``ends(j)`` ends after one token.
    Log-probs are a tenth of the tokens. The calls of ``complete`` are kept: paths as tuples, and budgets."""

    def __init__(self, width, reward, ends=lambda j: j == 0):
        self.width, self.judge, self.ends, self.calls, self.notes, self.keys = width, reward, ends, [], {}, []

    def gatherer(self, prompts, **more):
        return fake(
            prompts=prompts,
            width=self.width,
            draw=lambda run, n: (advance(run, position=run.position + n), np.arange(n) + run.position),
            encoded=encoded,
            sampling=lambda run: "options",
            complete=self.complete,
            reward=lambda rollouts: rewarded(rollouts, self.judge),
            note=self.notes.__setitem__,
            **more,
        )

    def complete(self, params, tokens, length, budget, key, options, responses):
        assert params == "params" and options == "options" and tokens.dtype == np.int32
        paths = [tuple(x[tokens.shape[1] - n :].tolist()) for x, n in zip(tokens, length, strict=True)]
        self.calls.append((paths, budget.tolist(), responses))
        self.keys.append(tuple(jax.random.key_data(key).tolist()))
        child, left = np.tile(np.arange(responses), len(tokens)), np.repeat(budget, responses)
        ended = np.array([bool(self.ends(j)) for j in child])
        mask = (np.arange(self.width) < np.where(ended, 1, left)[:, None]).astype(np.float32)
        new = ((child[:, None] + 1) * mask).astype(np.int32)
        return Rollouts(
            tokens=np.concatenate([np.repeat(tokens, responses, 0), new], 1),
            mask=mask,
            truncated=(~ended).astype(np.float32),
            logp_beh=-0.1 * new.astype(np.float32),
            shared_prompt=responses,
        )


# ---- prefixes -------------------------------------------------------------------------------------------------------


def test_completions_go_on_from_any_tokens():
    """Greedy completions of the prefixes of greedy completions are the rest of them, in batches of the run's size."""
    with tiny.quick():
        workspace = setup(tiny.config({"sampling.max_new_tokens": 5}), report=lambda text: None)
        gatherer = make_gatherer(workspace, Watch())
        params = jax.tree.map(lambda x: 4 * x, workspace.init_params(jax.random.key(3)))  # not one token for ever
        greedy, some = SamplingOptions(5, eos_ids=(1,), greedy=True), np.arange(8, dtype=np.int32)
        whole = jax.tree.map(np.asarray, gatherer.generate(params, some, KEY, greedy))
        stop = np.minimum(np.tile([0, 1, 2, 4], 8), whole.mask.sum(1).astype(int) - 1)[:19]
        budget = np.minimum(np.resize([5, 2, 1], 19), 5 - stop)
        prompts = whole.tokens[:19, : whole.prompt_width]
        width = whole.prompt_width + 5
        prefix, length = joined(prompts, whole.prompt_length[:19], whole.completions[:19], stop, width)
        out = gatherer.complete(params, prefix, length, budget, KEY, greedy, 2)
    assert out.rows == 38 and isinstance(out.tokens, np.ndarray)
    assert len({tuple(y) for y in whole.completions.tolist()}) > 1 and 0 < whole.truncated[:19].mean() < 1
    for row in range(38):
        i = row // 2
        rest = whole.completions[i][whole.mask[i] > 0][stop[i] :]
        expected = rest[: budget[i]]
        assert out.completions[row][out.mask[row] > 0].tolist() == expected.tolist()
        ended = len(expected) == len(rest) and not whole.truncated[i]
        assert out.truncated[row] == (not ended)


# ---- chain ----------------------------------------------------------------------------------------------------------


CHAIN = 6
SURE, LOW = np.log(0.95), np.log(0.5)
TOKENS = np.array([[3, 4, 5, 6, 7, 8], [2, 3, 4, 5, 0, 0]])
MASK = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]], np.float32)
LOGP = np.array([[SURE, LOW, LOW, SURE, LOW, LOW], [LOW, LOW, SURE, LOW, LOW, LOW]])  # what is masked is none


def chain_world(logp=LOGP):
    world = World(CHAIN, lambda q, y: 100 * q + sum(y), ends=lambda j: False)

    def generate(params, indices, key, options):
        prompt, length = encoded(indices)
        tokens = np.concatenate([prompt, TOKENS], 1).astype(np.int32)
        return Rollouts(tokens=tokens, mask=MASK, prompt_length=length, prompt=indices.astype(np.int32))

    def score(params, rollouts):
        return TokenStats(logp=np.asarray(logp, np.float32))

    return world, world.gatherer(2, generate=generate, score=score)


def test_chain_by_hand():
    """Every second token of low probability is a cutpoint: 1 and 4 of the first row, 0 and 3 of the second."""
    world, gatherer = chain_world()
    protocol = make("spo_segment", "protocol", interval=2, rollouts=3)
    assert protocol.facts.provides == {"mc_value"}
    run, batch = protocol.collect(Run(State()), gatherer, KEY)
    paths = [(10, 3), (10, 3, 4, 5, 6), (11, 11), (11, 11, 2, 3, 4)]
    assert world.calls == [(paths, [5, 2, 6, 3], 3)] and run.position == 2
    # completion j of a prefix is j + 1 for the rest of the budget: 2 on the average
    values = {(0, 1): 3 + 5 * 2, (0, 4): 3 + 4 + 5 + 6 + 2 * 2, (1, 0): 100 + 6 * 2, (1, 3): 100 + 2 + 3 + 4 + 3 * 2}
    mc_value = batch.per_token["mc_value"]
    assert mc_value.shape == (2, CHAIN) and mc_value.dtype == np.float32
    for at, value in values.items():
        assert mc_value[at] == pytest.approx(value)
    assert batch.reward.tolist() == [33, 114] and world.notes == {"chain/cutpoints": 2}


def test_the_objective_finds_the_same_cutpoints():
    """Raw advantages of the segments add up to reward - V(first cutpoint)."""
    from jaxpo.primitives.token_advantages import cutpoints, segment_advantage

    world, gatherer = chain_world()
    _, batch = make("spo_segment", "protocol", interval=2, rollouts=3).collect(Run(State()), gatherer, KEY)
    logp = LOGP.astype(np.float32)
    gain = segment_advantage(batch.reward, batch.per_token["mc_value"], logp, batch.mask, interval=2)
    total = np.where(np.asarray(cutpoints(logp, batch.mask, interval=2)), gain, 0).sum(1)
    np.testing.assert_allclose(total, [33 - 13, 114 - 112], rtol=1e-6)


def test_a_chain_without_cutpoints():
    world, gatherer = chain_world(np.full((2, CHAIN), SURE))
    _, batch = make("spo_segment", "protocol").collect(Run(State()), gatherer, KEY)
    assert world.calls == [] and not batch.per_token["mc_value"].any() and world.notes == {"chain/cutpoints": 0}


# ---- tree -----------------------------------------------------------------------------------------------------------


LEAVES = {  # by question and path; of the second question only the first level tells
    (0, (1,)): 1,
    (0, (2, 2, 1)): 0,
    (0, (2, 2, 2, 2, 2)): 1,
    (1, (1,)): 0,
    (1, (2, 2, 1)): 1,
    (1, (2, 2, 2, 2, 2)): 1,
}


def grown(world=None, key=KEY, prompts=2, **options):
    world = world or World(5, lambda q, y: LEAVES[int(q), y])
    protocol = make("spo_segment", "protocol", form="tree", **{"branching": (2, 2), "segment": 2, **options})
    run, batch = protocol.collect(Run(State()), world.gatherer(prompts), key)
    assert run.position == prompts
    return world, batch


def edges(batch):
    """By prompt and response tokens, with the prompt's question: (advantage, value, truncated) of the rows that
    count."""
    out = {}
    for i in np.flatnonzero(batch.count):
        start = batch.prompt_width - batch.prompt_length[i]
        assert not batch.tokens[i, :start].any()
        prompt = tuple(batch.tokens[i, start : batch.prompt_width].tolist())
        response = tuple(batch.completions[i][batch.mask[i] > 0].tolist())
        assert (prompt, response) not in out and prompt[0] == 10 + batch.prompt[i]
        out[prompt, response] = (batch.per_row["edge_adv"][i], batch.reward[i], batch.truncated[i])
    return out


FIRST = {  # V(2, 2) = 1/2, V() = 3/4
    ((10,), (1,)): (0.25, 1, 0),
    ((10,), (2, 2)): (-0.25, 0.5, 0),
    ((10, 2, 2), (1,)): (-0.5, 0, 0),
    ((10, 2, 2), (2, 2, 2)): (0.5, 1, 1),
}
SECOND = {((11, 11), (1,)): (-0.5, 0, 0), ((11, 11), (2, 2)): (0.5, 1, 0)}  # V(2, 2) = 1, V() = 1/2


def test_a_tree_by_hand():
    world, batch = grown(max_edges=4)
    assert world.calls == [([(10,), (11, 11)], [2, 2], 2), ([(10, 2, 2), (11, 11, 2, 2)], [3, 3], 2)]
    assert len(set(world.keys)) == 2
    assert edges(batch) == FIRST | SECOND
    assert world.notes == {"tree/reward": 0.625, "tree/edges": 3, "tree/zero_frac": 0.25}


def test_the_rows_of_a_tree():
    """Always as many, those of a question side by side; what is left over does not count and has no tokens."""
    _, batch = grown(max_edges=4)
    assert batch.rows == 8 and batch.shared_prompt == 1
    assert batch.tokens.shape == (8, P + 2 + 5)  # the longest path before an edge has two tokens
    assert batch.count.tolist() == [1, 1, 1, 1, 1, 1, 0, 0]
    assert batch.prompt.tolist() == batch.group.tolist() == [0] * 4 + [1] * 4
    fillers = batch.count == 0
    assert not batch.mask[fillers].any() and not batch.per_row["edge_adv"][fillers].any()
    assert batch.mask[~fillers].any(1).all() and len(set(batch.seed.tolist())) == 8
    np.testing.assert_allclose(batch.logp_beh * batch.mask, -0.1 * batch.completions * batch.mask)
    assert (batch.prompt_length >= 1).all()


def test_siblings_advantages_add_up_to_zero():
    reward = np.random.default_rng(0)
    known = {}

    def judge(q, y):
        return known.setdefault((int(q), y), reward.random())

    _, batch = grown(World(5, judge), branching=(3, 3), max_edges=20)
    total = {}
    for (prompt, _), (gain, *_) in edges(batch).items():
        total[prompt] = total.get(prompt, 0) + gain
    assert len(total) == 6 and all(x == pytest.approx(0, abs=1e-6) for x in total.values())


def test_a_tree_of_one_level_gives_centred_group_rewards():
    rewards = np.array([0.3, 0.9, 0.6, 0.2])
    world, batch = grown(World(5, lambda q, y: rewards[y[0] - 1]), branching=(4,), max_edges=4, prompts=1)
    assert world.calls == [([(10,)], [5], 4)] and batch.prompt_width == P
    got = {response[0]: gain for (_, response), (gain, *_) in edges(batch).items()}
    assert got == {j + 1: pytest.approx(x, abs=1e-6) for j, x in enumerate(rewards - rewards.mean())}


def test_divided_by_the_siblings_std():
    _, batch = grown(max_edges=4, divide_std=True)
    for edge, (gain, *_) in edges(batch).items():
        assert gain == pytest.approx(np.sign((FIRST | SECOND)[edge][0]), rel=1e-6)


@pytest.mark.parametrize("divide_std", (False, True))
def test_rounding_is_no_advantage(divide_std):
    """The mean of three 0.1 is not 0.1, and their std not 0."""
    assert np.mean([0.1] * 3) - 0.1 != 0
    world, batch = grown(World(5, lambda q, y: 0.1), branching=(3, 3), divide_std=divide_std)
    assert batch.rows == 64 and not batch.count.any() and not batch.mask.any() and world.notes["tree/zero_frac"] == 1


def test_no_more_edges_than_asked():
    drawn = []
    for seed in (0, 0, 1, 2, 3):
        world, batch = grown(key=jax.random.key(seed), max_edges=2)
        found = edges(batch)
        assert batch.count.tolist() == [1] * 4 and world.notes["tree/edges"] == 2
        assert all((FIRST | SECOND)[edge] == value for edge, value in found.items())
        assert sum(prompt[0] == 10 for prompt, _ in found) == 2
        drawn.append(sorted(found))
    assert drawn[0] == drawn[1] and len(set(map(str, drawn))) > 1


def test_a_tree_ends_when_no_branch_is_open():
    world, batch = grown(World(5, lambda q, y: y[0], ends=lambda j: True), max_edges=3)
    assert len(world.calls) == 1 and batch.tokens.shape == (6, P + 2 + 5)  # the same shape, whatever was sampled
    assert sorted(edges(batch).values()) == [(-0.5, 1, 0)] * 2 + [(0.5, 2, 0)] * 2


def test_a_branch_stops_at_the_budget():
    """Levels beyond it are never sampled (`check` refuses a config in which none could be)."""
    world, batch = grown(World(5, lambda q, y: sum(y)), branching=(2, 2, 2, 2), segment=2, max_edges=8)
    assert [budget for _, budget, _ in world.calls] == [[2, 2], [2, 2], [1, 1]]
    truncated = {prompt + response for (prompt, response), (*_, cut) in edges(batch).items() if cut}
    assert truncated == {(10, 2, 2, 2, 2, 2), (11, 11, 2, 2, 2, 2, 2)}


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    (
        (dict(form="star"), "form"),
        (dict(interval=0), "interval must be a whole number of at least 1, not 0"),
        (
            dict(form="tree", branching=(6, 0)),
            r"branching must be a tuple .each a whole number of at least 1., not \(6, 0\)",
        ),
        (dict(form="tree", branching=()), "branching must name the children"),
        (dict(form="tree", segment=2.5), "segment must be a whole number"),
        (dict(form="tree", rollouts=3), "rollouts"),
        (dict(form="chain", segment=3), "segment"),
        (dict(form="chain", max_edges=3), "max_edges"),
        (dict(form="chain", branching=(2, 2)), "branching has no effect with form='chain'"),
        (dict(form="chain", divide_std=True), "divide_std has no effect with form='chain'"),
    ),
)
def test_hyperparameters_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        make("spo_segment", "protocol", **options)


TREE = {"objective": {"name": "spo_segment", "form": "tree"}}


@pytest.mark.parametrize(
    ("changes", "message"),
    (
        (
            {"protocol": {"name": None, "branching": (2, 2), "segment": 1}},
            "config.rollout.responses must be 1 with protocol 'spo_segment' and form='tree', not 4",
        ),
        (
            {"rollout.responses": 1, "protocol": {"name": None, "branching": (2, 2, 2), "segment": 2}},
            "the last level of the tree begins after 4 tokens, and config.sampling.max_new_tokens is 3",
        ),
    ),
)
def test_configs_without_a_tree(changes, message):
    with pytest.raises(ValueError, match=message):
        resolve(tiny.config(TREE | changes), 1)


# ---- whole runs -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_chains_run(tmp_path):
    changes = {
        "objective": {"name": "spo_segment", "interval": 1},
        "protocol": {"name": None, "rollouts": 2},
        "evaluation.pass_at": (),
        "evaluation.every": 100,
    }
    with tiny.quick():
        run = tiny.run(tiny.config(changes), tmp_path / "run")
    assert "AGAIN" not in run.printed and run.result.iteration == 4
    lines = tiny.trained(run.path)
    assert sum(line["chain/cutpoints"] for line in lines) > 0
    assert all(line["step/nonfinite"] == 0 and line["mismatch/logp_abs_max"] < 1e-4 for line in lines)


@pytest.mark.slow
def test_trees_run(tmp_path):
    changes = TREE | {
        "protocol": {"name": None, "branching": (3, 2), "segment": 1, "max_edges": 4},
        "rollout.responses": 1,
        "evaluation.pass_at": (),
        "evaluation.every": 100,
    }
    with tiny.quick():
        run = tiny.run(tiny.config(changes), tmp_path / "run")
    assert "AGAIN" not in run.printed and run.result.iteration == 4
    lines = tiny.trained(run.path)
    assert sum(line["tree/edges"] for line in lines) > 0
    assert all(line["step/nonfinite"] == 0 and line["mismatch/logp_abs_max"] < 1e-4 for line in lines)
