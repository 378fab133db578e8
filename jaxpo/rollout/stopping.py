"""Stop strings on the device: an automaton over token ids, exact for every tokenizer.

A stop string that is a control token, such as ``<|im_end|>``, is that token.

A stop string may be spelt by many token sequences, and may begin inside one token and end inside another. So the
strings are compiled into an Aho-Corasick automaton over *bytes*, and a table says which state each token leads to from
each state. Stopping costs one table look-up per token.
"""

from collections import deque
from collections.abc import Mapping, Sequence

import numpy as np


def spelled(strings: Sequence[str], token_bytes: Sequence[bytes], control: Mapping[str, int]) -> list[bytes]:
    """The bytes of each token for `stop_table`: a control token that is a stop string has the bytes of its name.

    Args:
      strings: the stop strings.
      token_bytes: the bytes that each id appends to the text; b"" for control tokens.
      control: the text of each control token -> its id.

    Raises:
      ValueError: a string that can never occur: it has a control token beside other text, and control tokens add no
        text; or no token has one of its bytes.
    """
    out, known = list(token_bytes), {*b"".join(token_bytes)}
    for string in strings:
        inside = [token for token in control if token in string]
        if inside and string not in control:
            raise ValueError(
                f"sampling.stop {string!r} has the control token {max(inside, key=len)!r} beside other text, and a "
                "control token adds no text: name the token alone"
            )
        if inside:
            out[control[string]] = string.encode()
        elif lost := [c for c in string if not {*c.encode()} <= known]:
            raise ValueError(f"sampling.stop {string!r} can never occur: no token of the vocabulary has {lost[0]!r}")
    return out


def stop_table(strings: Sequence[str], token_bytes: Sequence[bytes]) -> np.ndarray:
    """[S + 1, V] int32: the next state after each token. State 0 is the start; state S means that a stop string has
    occurred, and is never left.

    Args:
      strings: the stop strings.
      token_bytes: the bytes that each id appends to the text; b"" (special tokens) restarts the match.

    Raises:
      ValueError: no strings, or an empty string (it would end every row at once).
    """
    if not strings or any(not s for s in strings):
        raise ValueError(f"sampling.stop must hold non-empty strings, not {list(strings)!r}")
    step, final = _aho_corasick([s.encode() for s in strings])
    states = len(step)
    table = np.zeros((states + 1, len(token_bytes)), np.int32)
    table[states] = states
    for token, text in enumerate(token_bytes):
        for state in range(states):
            here = state if text else 0
            for byte in text:
                here = step[here][byte]
                if here in final:
                    here = states
                    break
            table[state, token] = here
    return table


def _aho_corasick(patterns: Sequence[bytes]) -> tuple[list[list[int]], set[int]]:
    """The complete transition table [state][byte], and the states in which a pattern has just ended."""
    children: list[dict[int, int]] = [{}]
    final: set[int] = set()
    for pattern in patterns:
        state = 0
        for byte in pattern:
            if byte not in children[state]:
                children[state][byte] = len(children)
                children.append({})
            state = children[state][byte]
        final.add(state)
    step = [[0] * 256 for _ in children]
    fail = [0] * len(children)
    queue = deque([0])
    while queue:  # breadth first: the failure state of a node is complete before the node is
        state = queue.popleft()
        if fail[state] in final:
            final.add(state)
        for byte in range(256):
            child = children[state].get(byte)
            if child is None:
                step[state][byte] = step[fail[state]][byte] if state else 0
            else:
                step[state][byte] = child
                fail[child] = step[fail[state]][byte] if state else 0
                queue.append(child)
    return step, final
