"""The stop strings' automaton against Python's ``in``, on random strings and random token vocabularies."""

import numpy as np
import pytest

from jaxpo.rollout.stopping import spelled, stop_table


def walk(table, ids):
    """State after each token."""
    state, states = 0, []
    for i in ids:
        state = int(table[state, i])
        states.append(state)
    return states


def expected(strings, token_bytes, ids):
    """Whether a stop string has occurred after each token; a special token (b"") parts the text."""
    text, found, out = b"", False, []
    for i in ids:
        text = text + token_bytes[i] if token_bytes[i] else b""
        found = found or any(s.encode() in text for s in strings)
        out.append(found)
    return out


@pytest.mark.parametrize("alphabet", ["ab", "abc", "aé→"], ids=["two", "three", "multi-byte"])
def test_against_python_in(alphabet):
    rng, seen, missed = np.random.default_rng(len(alphabet.encode())), 0, 0
    letters = sorted(set(alphabet.encode()))  # tokens may cut a character in two
    for _ in range(150):
        strings = ["".join(rng.choice(list(alphabet), rng.integers(1, 5))) for _ in range(rng.integers(1, 4))]
        token_bytes = [
            b"",
            *(bytes(rng.choice(letters, rng.integers(1, 5)).tolist()) for _ in range(rng.integers(1, 6))),
        ]
        table = stop_table(strings, token_bytes)
        last = len(table) - 1
        assert (
            table.shape[1] == len(token_bytes) and table.dtype == np.int32 and 0 <= table.min() and table.max() <= last
        )
        for _ in range(4):
            ids = rng.integers(0, len(token_bytes), 12)
            stopped = [s == last for s in walk(table, ids)]
            assert stopped == expected(strings, token_bytes, ids), (strings, token_bytes, ids)
            seen, missed = seen + stopped[-1], missed + (not stopped[-1])
    assert seen > 40 and missed > 40  # both answers were tested


def test_a_string_inside_one_token_across_tokens_and_inside_another_string():
    token_bytes = [b"", b"x</an", b"swer>", b"</answer> and", b"a", b"</", b"answer"]
    table = stop_table(["</answer>", "swe"], token_bytes)
    last = len(table) - 1
    assert walk(table, [3]) == [last]  # inside one token, text goes on after it
    assert walk(table, [1, 2])[-1] == last  # begins inside one token, ends inside the next
    assert walk(table, [5, 6])[-1] == last  # "swe" occurs within the longer string
    assert last not in walk(table, [1, 0, 4, 5])  # a special token starts the match anew
    assert walk(stop_table(["</answer>"], token_bytes), [1, 0, 2])[-1] == 0
    assert walk(table, [3, 4, 0, 1]) == [last] * 4  # absorbing


def test_overlapping_prefixes_are_not_lost():
    table = stop_table(["aab"], [b"a", b"b"])
    assert walk(table, [0, 0, 0, 0, 1])[-1] == len(table) - 1


@pytest.mark.parametrize("strings", [[], [""], ["a", ""]])
def test_nothing_to_stop_at_is_an_error(strings):
    with pytest.raises(ValueError, match="sampling.stop must hold non-empty strings"):
        stop_table(strings, [b"a"])


def test_a_control_token_is_a_stop_string():
    """It stops by itself, other control tokens do not, and beside other text it could never occur."""
    token_bytes, control = [b"", b"", b"a", b"<|en"], {"<|end|>": 0, "<|start|>": 1}
    strings = ["<|end|>", "aa"]
    table = stop_table(strings, spelled(strings, token_bytes, control))
    last = len(table) - 1
    assert walk(table, [0]) == [last] and walk(table, [2, 2])[-1] == last and walk(table, [2, 1, 2, 3])[-1] != last
    assert spelled(["aa", "<|en"], token_bytes, control) == token_bytes  # a part of its name is text
    with pytest.raises(ValueError, match=r"'<\|end\|>a' has the control token '<\|end\|>' beside other text"):
        spelled(["<|end|>a"], token_bytes, control)
    with pytest.raises(ValueError, match="'aé' can never occur: no token of the vocabulary has 'é'"):
        spelled(["aé"], token_bytes, control)
