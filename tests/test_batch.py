"""Batches: what they hold, how they grow, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpo.batch import (
    Demonstrations,
    MissingField,
    Pairs,
    Rollouts,
    TokenStats,
    complete,
    concatenate,
    from_sequences,
    pad,
    slices,
    take,
    validate,
    validate_stats,
)
from jaxpo.fields import role_id

PROMPTS, COMPLETIONS = [[1, 2], [3], [4, 5, 6]], [[7], [8, 9], []]


def full(b: int = 4, p: int = 3, t: int = 2, **fields) -> Rollouts:
    """Numbers that tell their place, in every kind of field."""
    tokens = np.arange(b * (p + t), dtype=np.int32).reshape(b, p + t)
    grid = np.arange(b * t, dtype=np.float32).reshape(b, t)
    batch = Rollouts(
        tokens=tokens,
        mask=np.ones((b, t), np.float32),
        reward=np.arange(b, dtype=np.float32),
        logp_old=-grid,
        group=np.arange(b, dtype=np.int32) // 2,
        adv=grid,
        logp_ref=grid,
        per_row={"difficulty": np.arange(b)},
        per_token={"top": np.stack([grid, grid], -1)},
        weights={"a": grid, "b": grid[:, 0]},
    )
    return validate(batch.replace(**fields))


# ---- making them --------------------------------------------------------------------------------------------------


def test_from_sequences_pads_prompts_left_and_completions_right():
    batch = from_sequences(PROMPTS, COMPLETIONS, pad_id=99, reward=np.ones(3))
    np.testing.assert_array_equal(batch.tokens, [[99, 1, 2, 7, 99], [99, 99, 3, 8, 9], [4, 5, 6, 99, 99]])
    np.testing.assert_array_equal(batch.mask, [[1, 0], [1, 1], [0, 0]])
    np.testing.assert_array_equal(batch.prompt_length, [2, 1, 3])
    np.testing.assert_array_equal(batch.completions, [[7, 99], [8, 9], [99, 99]])
    assert (batch.rows, batch.width, batch.prompt_width, batch.lengths.tolist()) == (3, 2, 3, [1, 2, 0])
    wide = from_sequences(PROMPTS, COMPLETIONS, prompt_width=5, width=4)
    assert wide.tokens.shape == (3, 9) and wide.mask.shape == (3, 4)


def test_the_mask_comes_from_lengths_not_from_ids():
    assert from_sequences([[0]], [[0, 5, 0]], pad_id=0).mask.tolist() == [[1, 1, 1]]


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([[1]], []), {}, "1 prompts but 0 completions"),
        (
            ([[1], [1, 2]], [[1], [1]]),
            {"prompt_width": 1},
            "row 1: a prompt of 2 and a completion of 1 tokens do not fit prompt_width=1",
        ),
        (([[1]], [[1, 2, 3]]), {"width": 2}, "row 0: .*completion of 3 .* width=2"),
    ],
)
def test_from_sequences_refuses(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        from_sequences(*arguments, **options)


def test_demonstrations_are_an_experts():
    assert Demonstrations(PROMPTS, COMPLETIONS).role.tolist() == [role_id("expert")] * 3


def test_pairs_are_units_of_two_rows():
    batch = Pairs([[1], [2, 3]], [[4, 5], [6]], [[7], [8, 9]])
    assert batch.layout == ("chosen", "rejected") and batch.shared_prompt == 2
    assert batch.role.tolist() == [role_id("chosen"), role_id("rejected")] * 2 and batch.group.tolist() == [0, 0, 1, 1]
    np.testing.assert_array_equal(batch.tokens, [[0, 1, 4, 5], [0, 1, 7, 0], [2, 3, 6, 0], [2, 3, 8, 9]])
    np.testing.assert_array_equal(batch.unit(batch.mask), [[[1, 1], [1, 0]], [[1, 0], [1, 1]]])
    with pytest.raises(ValueError, match="2 prompts, 1 chosen and 2 rejected"):
        Pairs([[1], [2]], [[1]], [[1], [2]])


def test_unit_without_layout_is_a_row():
    assert full().unit(jnp.arange(4)).shape == (4, 1)


def test_roles_have_numbers():
    assert role_id("own") == 0
    with pytest.raises(ValueError, match="unknown role 'choosen': did you mean 'chosen'"):
        role_id("choosen")


# ---- by name ------------------------------------------------------------------------------------------------------


def test_a_field_is_given_and_found_by_its_name():
    grid, row = np.ones((4, 2)), np.arange(4.0)
    batch = Rollouts(mask=grid, logp_ref=grid, logp_tutor=-grid, margin=row, reward=row)
    assert batch.per_token.keys() == {"logp_ref", "logp_tutor"} and batch.per_row.keys() == {"margin"}
    assert batch.get("logp_ref") is grid and batch.get("margin") is row is batch.reward
    both = Rollouts(mask=grid, per_token={"top": grid}, mc_value=grid)
    assert both.per_token.keys() == {"top", "mc_value"}


def test_a_field_is_replaced_and_taken_out_by_its_name():
    batch = full()
    more = batch.replace(mc_value=batch.adv, margin=batch.reward)
    assert more.get("mc_value") is batch.adv and more.per_row.keys() == {"difficulty", "margin"}
    assert "mc_value" not in batch.per_token, "what was is not changed"
    less = more.replace(logp_ref=None, margin=None)
    assert less.per_token.keys() == {"top", "mc_value"} and less.per_row.keys() == {"difficulty"}
    assert less.replace(logp_ref=None).per_token.keys() == less.per_token.keys()


def test_an_unknown_name_is_told_with_the_nearest():
    with pytest.raises(ValueError, match="unknown field of a batch 'mc_valeu': did you mean 'mc_value'"):
        Rollouts(mask=np.ones((4, 2)), mc_valeu=np.ones((4, 2)))
    with pytest.raises(ValueError, match=r"'height'.* a field of your own goes into per_token=dict\(height=...\)"):
        full().replace(height=np.ones(4))


# ---- roles and layout ---------------------------------------------------------------------------------------------

PAIR = ("chosen", "rejected")


def roles(*names: str) -> np.ndarray:
    return np.array([role_id(name) for name in names], np.int32)


@pytest.mark.parametrize(
    ("role", "message"),
    [
        (roles(*PAIR[::-1], *PAIR), r"row 0 is 'rejected', and Rollouts.layout .* that it is 'chosen'"),
        (roles(*PAIR, "chosen", "own"), "row 3 is 'own', .* that it is 'rejected'"),
    ],
)
def test_a_role_that_contradicts_the_layout(role, message):
    with pytest.raises(ValueError, match=message):
        validate(full(layout=PAIR).replace(role=role))
    with pytest.raises(ValueError, match=message):
        pad(full(layout=PAIR).replace(role=role), rows=6)
    with pytest.raises(ValueError, match=message):
        pad(full(layout=PAIR).replace(role=role), width=3)
    with pytest.raises(ValueError, match=message):
        concatenate([full(layout=PAIR, role=roles(*PAIR, *PAIR)), full(layout=PAIR).replace(role=role)])


def test_roles_that_agree_grow_with_their_units():
    batch = full(layout=PAIR, role=roles(*PAIR, *PAIR), shared_prompt=2)
    grown = pad(batch, rows=6)
    assert grown.role.tolist() == roles(*PAIR * 3).tolist() and grown.count.tolist() == [1, 1, 1, 1, 0, 0]
    assert complete(full(layout=PAIR)).role.tolist() == batch.role.tolist()
    filler = batch.replace(role=roles(*PAIR, "own", "own"), count=np.array([1, 1, 0, 0]))
    assert validate(filler) is filler, "what does not count may be anything"


# ---- asking and completing ----------------------------------------------------------------------------------------


def test_get_finds_every_field():
    batch = full()
    assert batch.get("reward") is batch.reward and batch.get("logp_ref") is batch.per_token["logp_ref"]
    assert batch.get("logp_old") is batch.logp_old and batch.get("top") is batch.per_token["top"]
    assert batch.get("difficulty") is batch.per_row["difficulty"]
    assert set(batch.fields()) == {
        "tokens",
        "mask",
        "reward",
        "logp_old",
        "group",
        "adv",
        "logp_ref",
        "difficulty",
        "top",
    }


def test_a_missing_field_is_named_with_what_there_is():
    with pytest.raises(
        MissingField, match=r"no 'correct'.*pass Rollouts\(correct=...\).*has: .*logp_ref.*reward"
    ) as error:
        full().get("correct")
    assert error.value.field == "correct" and isinstance(error.value, ValueError)


def test_complete_fills_what_has_one_meaning_and_nothing_else():
    batch = complete(Rollouts(mask=jnp.ones((3, 2))))
    expected = {"count": [1, 1, 1], "group": [0, 1, 2], "role": [0, 0, 0], "prompt": [0, 1, 2], "seed": [0, 1, 2]}
    assert {name: getattr(batch, name).tolist() for name in expected} == expected
    assert batch.seed.dtype == jnp.uint32 and batch.count.dtype == jnp.float32
    assert batch.fields() == ["mask", "count", "group", "role", "prompt", "seed"]
    kept = complete(Rollouts(mask=jnp.ones((3, 2)), group=jnp.array([5, 5, 5]), count=jnp.zeros(3)))
    assert kept.group.tolist() == [5, 5, 5] and kept.count.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mask": None}, "Rollouts.mask is required"),
        ({"mask": np.ones(4)}, r"Rollouts.mask must have shape \[B, T\]"),
        (
            {"logp_old": np.ones((4, 3))},
            r"Rollouts.logp_old has shape \(4, 3\); its first axes must be \(4, 2\) \(B=4, T=2, from mask\)",
        ),
        ({"reward": np.ones((4, 1))}, r"Rollouts.reward has shape \(4, 1\) where it must be \(4,\), one number a row"),
        ({"count": np.ones(3)}, "Rollouts.count"),
        ({"adv": np.ones(3)}, "Rollouts.adv"),
        ({"tokens": np.ones((4, 1), int)}, r"Rollouts.tokens has shape \(4, 1\); it must be \[B, P\+T\] with B=4, T=2"),
        ({"logp_ref": np.ones((4, 3))}, r"Rollouts.per_token\['logp_ref'\]"),
        ({"per_row": {"x": np.ones(3)}}, r"Rollouts.per_row\['x'\]"),
        ({"per_token": {"x": np.ones((4, 3))}}, r"Rollouts.per_token\['x'\]"),
        ({"weights": {"x": np.ones(3)}}, r"Rollouts.weights\['x'\]"),
        (
            {"layout": ("chosen", "rejected", "kl")},
            "Rollouts.layout says 3 consecutive rows belong together, but 4 rows",
        ),
        ({"layout": ("chosen", "rejekted")}, "unknown role 'rejekted': did you mean 'rejected'"),
        ({"shared_prompt": 3}, "Rollouts.shared_prompt says 3"),
        ({"shared_prompt": 0}, "Rollouts.shared_prompt says 0"),
    ],
)
def test_validate_names_the_field(fields, message):
    with pytest.raises(ValueError, match=message):
        validate(full().replace(**fields))


def test_batches_and_stats_are_pytrees():
    batch = full(shared_prompt=2)
    again = jax.tree.unflatten(jax.tree.structure(batch), jax.tree.leaves(batch))
    assert again.shared_prompt == 2 and "logp_ref" in again.per_token
    assert jax.jit(lambda b: b.replace(reward=b.reward * 2))(batch).reward.tolist() == [0, 2, 4, 6]
    assert jax.tree.leaves(TokenStats()) == []


# ---- rows: take, slices, pad, concatenate ---------------------------------------------------------------------------


def assert_rows(batch: Rollouts, source: Rollouts, rows: list[int]) -> None:
    """``batch`` is the rows of ``source``, in every leaf."""
    jax.tree.map(
        lambda got, whole: np.testing.assert_array_equal(got, np.asarray(whole)[rows]),
        batch.replace(shared_prompt=1),
        source.replace(shared_prompt=1),
    )


@pytest.mark.parametrize(("rows", "expected"), [([2, 0, 0], [2, 0, 0]), ([True, False, False, True], [0, 3]), ([], [])])
def test_take(rows, expected):
    batch = full(shared_prompt=2)
    taken = take(batch, np.array(rows, bool if rows and rows[0] is True else int))
    assert_rows(taken, batch, expected)
    assert taken.shared_prompt == 1, "an order that was given says nothing of shared prompts"
    assert take(batch, np.array([2, 3]), shared_prompt=2).shared_prompt == 2


def test_slices_cut_rows_in_order():
    batch = full(shared_prompt=4)
    parts = slices(batch, 2)
    assert parts.shared_prompt == 2 and parts.mask.shape == (2, 2, 2)
    for i in range(2):
        assert_rows(jax.tree.map(lambda x, i=i: x[i], parts), batch, [2 * i, 2 * i + 1])
    assert slices(batch, 4).shared_prompt == 1


@pytest.mark.parametrize(("n", "layout"), [(3, ()), (4, ("chosen", "rejected"))])
def test_slices_refuse_to_cut_a_unit(n, layout):
    unit = max(len(layout), 1)
    with pytest.raises(ValueError, match=f"4 rows in units of {unit} cannot be cut into {n} equal slices"):
        slices(full(layout=layout), n)


def test_pad_grows_every_axis():
    batch = full(shared_prompt=2, count=np.array([1, 2, 1, 1], np.float32))
    grown = validate(pad(batch, rows=6, width=5, prompt_width=4))
    assert (grown.rows, grown.width, grown.prompt_width) == (6, 5, 4) and grown.shared_prompt == 2
    np.testing.assert_array_equal(grown.tokens[:4, 1:6], batch.tokens)  # one to the left, three to the right
    assert grown.prompt_length.tolist()[:4] == [3, 3, 3, 3], "real prompt tokens are still told from padding"
    assert grown.count.tolist() == [1, 2, 1, 1, 0, 0] and float(grown.mask[4:].sum()) == 0
    for name in ("mask", "logp_old", "adv", "logp_ref", "top"):
        x, old = np.asarray(grown.get(name)), np.asarray(batch.get(name))
        np.testing.assert_array_equal(x[:4, :2], old)
        assert not x[:4, 2:].any() and not x[4:].any()
    assert grown.weights["a"].shape == (6, 5) and grown.weights["b"].shape == (6,)
    assert len(set(grown.group.tolist())) == 4, "fillers join no group"
    assert not set(grown.group[4:].tolist()) & set(grown.group[:4].tolist())


def test_pad_to_the_same_size_changes_nothing():
    batch = full()
    jax.tree.map(np.testing.assert_array_equal, pad(batch, rows=4, width=2, prompt_width=3), batch)


def test_pad_without_count_counts_the_real_rows():
    assert pad(full(), rows=6).count.tolist() == [1, 1, 1, 1, 0, 0]


@pytest.mark.parametrize("size", [{"rows": 3}, {"width": 1}, {"prompt_width": 2}])
def test_pad_does_not_shrink(size):
    with pytest.raises(ValueError, match="cannot pad axis"):
        pad(full(), **size)


def test_concatenate_pads_to_the_widest():
    a, b = full(b=2, p=3, t=2), full(b=4, p=1, t=4)
    both = concatenate([a, b])
    assert (both.rows, both.width, both.prompt_width) == (6, 4, 3)
    assert both.prompt_length.tolist() == [3, 3, 1, 1, 1, 1]
    np.testing.assert_array_equal(both.completions[:2, :2], a.completions)
    np.testing.assert_array_equal(both.tokens[2:, 2:], b.tokens)
    np.testing.assert_array_equal(both.logp_old[2:], b.logp_old)
    assert concatenate([full(shared_prompt=4), full(shared_prompt=2)]).shared_prompt == 2


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "concatenate needs at least one batch"),
        ([full(), full(reward=None)], "Rollouts.reward is present in some of the batches only"),
        ([full(), full(logp_ref=None)], "Rollouts.logp_ref is present in some of the batches only"),
        ([full(), full(layout=("chosen", "rejected"))], "Rollouts.layout differs"),
        ([full(), full(weights={})], "weights"),
    ],
)
def test_concatenate_refuses(batches, message):
    with pytest.raises(ValueError, match=message):
        concatenate(batches)


def test_rows_can_be_padded_and_joined_again():
    batch = full()
    again = concatenate([pad(batch, rows=6), take(pad(batch, rows=6), np.array([0, 1]))])
    assert again.rows == 8 and again.count.tolist() == [1, 1, 1, 1, 0, 0, 1, 1]


# ---- what a policy says of them -------------------------------------------------------------------------------------


def test_stats_of_the_right_shape_pass():
    grid, row = jnp.ones((4, 2)), jnp.ones(4)
    stats = TokenStats(logp=grid, entropy=grid, score=row, embed=jnp.ones((4, 6)), derived={"margin": grid})
    assert validate_stats(stats, full(), {"logp", "score", "embed", "margin"}) is stats


@pytest.mark.parametrize(
    ("given", "wants", "message"),
    [
        ({"logp": (4, 2)}, {"logp", "value"}, r"gives no 'value', which this objective wants: return TokenStats\(val"),
        ({"logp": (4, 2)}, {"margin"}, r"gives no 'margin', .*: return TokenStats\(derived=\{'margin': ...\}\)"),
        ({"logp": (4, 3)}, {"logp"}, r"TokenStats.logp has shape \(4, 3\) where it must be \(4, 2\) \(B=4, T=2\)"),
        ({"logp": (4, 2), "score": (4, 1)}, {"score"}, r"TokenStats.score has shape \(4, 1\) where it must be \(4,\)"),
        ({"embed": (3, 6)}, {"embed"}, r"TokenStats.embed has shape \(3, 6\) where it must be \(4,\)"),
        ({"logp": (4, 2), "entropy": (4,)}, {"logp"}, "TokenStats.entropy"),
    ],
)
def test_stats_are_checked_before_they_are_used(given, wants, message):
    stats = TokenStats(**{name: jnp.ones(shape) for name, shape in given.items()})
    with pytest.raises(ValueError, match=message):
        validate_stats(stats, full(), wants)


def test_derived_statistics_are_checked_too():
    stats = TokenStats(logp=jnp.ones((4, 2)), derived={"margin": jnp.ones((4, 1))})
    with pytest.raises(ValueError, match=r"TokenStats.derived\['margin'\] has shape \(4, 1\)"):
        validate_stats(stats, full(), {"logp"})
