"""Read a compiled program's text: count the bytes that it sends between chips and moves to and from memory.

Loop bodies count as often as they run.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
# Instructions that neither read nor write: new names for values, or the end of what another instruction began.
FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast while conditional call after-all partition-id replica-id "
    "opt-barrier all-reduce-done all-gather-done collective-permute-done copy-done slice-done async-done "
    "send-done recv-done add-dependency domain get-dimension-size".split()
)
SLICES = ("dynamic-slice", "gather")  # they read only the part that they return
UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # they write this operand into the first, in place
ARRAY = re.compile(r"([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](\{[^{}]*\})?")
ELSEWHERE = re.compile(r"S\(\d+\)")  # another memory space: not HBM
INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = ")
COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
CALLED = re.compile(r"(?:calls|body|to_apply|called_computations|branch_computations)=(\{[^}]*\}|%?[\w.-]+)")


class Instruction(NamedTuple):
    """An instruction of the text: ``name = shape opcode(operands), rest``."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    rest: str
    root: bool


Computation = dict[str, Instruction]


class Collective(NamedTuple):
    """All collectives of a kind.

    kind: one of ``COLLECTIVES``.
    calls: calls by one device.
    bytes: bytes that a chip sends, by ring algorithms.
    """

    kind: str
    calls: int
    bytes: float


class Traffic(NamedTuple):
    """The traffic of one device in one run of the program.

    collectives: all collectives, by kind.
    hbm: bytes read from and written to memory.
    endless: number of loops whose trips could not be read; their bodies count once.
    """

    collectives: list[Collective]
    hbm: float
    endless: int


def traffic(text: str, devices: int, *, loop: float | None = None) -> Traffic:
    """Count collectives and memory traffic in ``compiled.as_text()``.

    In a group of n chips, a collective with a result of s bytes makes each chip send: all-reduce ``2 s (n-1)/n``,
    all-gather and all-to-all ``s (n-1)/n``, reduce-scatter ``s (n-1)``, a permutation s. Memory traffic is the bytes
    that every instruction reads and writes (a fusion is one instruction); slices and updates in place count only their
    part. Arrays that the compiler keeps in another memory space (VMEM) cost nothing.

    Args:
      text: the program.
      devices: number of devices that it runs on.
      loop: trips of a loop whose end the text does not tell.
    """
    computations, entry = parse(text)
    times, endless = trips(computations, entry, loop)
    calls, sent, hbm, seen = defaultdict(int), defaultdict(float), 0.0, set()
    for name, n in times.items():
        for instruction in computations[name].values():
            kind = instruction.opcode.removesuffix("-start")
            if kind in COLLECTIVES and not _again(instruction, seen):
                calls[kind] += n
                sent[kind] += n * _sent(kind, instruction, devices)
        if name in _scheduled(computations, entry):
            hbm += n * sum(_moved(i, computations[name], computations) for i in computations[name].values())
    return Traffic([Collective(kind, calls[kind], sent[kind]) for kind in sorted(calls)], hbm, endless)


# ---- the text


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """Parse the computations, by name; also return the name of the entry computation."""
    computations, entry, here = {}, "", None
    for line in text.splitlines():
        head = COMPUTATION.match(line)
        if head:
            here = computations[head[2]] = {}
            entry = head[2] if head[1] else entry
        elif here is not None and (start := INSTRUCTION.match(line)):
            instruction = _instruction(line[start.end() :], start[2], bool(start[1]))
            here[instruction.name] = instruction
    return computations, entry


def _closing(text: str, start: int) -> int:
    """The index at which the parenthesis that opens at ``start`` closes."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    raise ValueError(f"an unclosed parenthesis in a compiled program: {text[:80]}")


def _instruction(text: str, name: str, root: bool) -> Instruction:
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    shape, text = text[:end], text[end:].lstrip()
    start = text.index("(")
    stop = _closing(text, start)
    operands = tuple(re.findall(r"%([\w.-]+)", text[start:stop]))
    return Instruction(name, shape, text[:start], operands, text[start:], root)


def nbytes(shape: str, *, hbm: bool = False) -> float:
    """The bytes of an array or a tuple of arrays; with ``hbm``, only of arrays in HBM."""
    total = 0.0
    for kind, dims, layout in ARRAY.findall(shape):
        if hbm and ELSEWHERE.search(layout):
            continue
        bits = 8 if kind == "pred" else int((re.search(r"\d+", kind) or [0])[0])
        total += math.prod(int(d) for d in dims.split(",") if d) * bits / 8
    return total


# ---- loops


def _called(instruction: Instruction) -> list[str]:
    return [name for found in CALLED.findall(instruction.rest) for name in re.findall(r"[\w.-]+", found)]


def trips(computations: dict[str, Computation], entry: str, loop: float | None = None) -> tuple[dict[str, float], int]:
    """How often each computation runs, and the number of loops with unknown trips.

    Such loops make ``loop`` trips; without it they make one, and only then they are counted as unknown.
    """
    times: dict[str, float] = defaultdict(int)
    endless = 0

    def visit(name: str, n: float) -> None:
        nonlocal endless
        times[name] += n
        for instruction in computations[name].values():
            inner = n
            if instruction.opcode == "while":
                bound = _bound(instruction, computations) or loop
                endless += bound is None
                inner = n * (1 if bound is None else bound)
            for called in _called(instruction):
                visit(called, inner)

    visit(entry, 1)
    return dict(times), endless


def _bound(loop: Instruction, computations: dict[str, Computation]) -> int | None:
    """The most trips of a loop that counts from 0: the number that its condition compares the counter with."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest)
    if known:
        return int(known[1])
    condition = computations[re.search(r"condition=%?([\w.-]+)", loop.rest)[1]]
    bounds = []
    for instruction in condition.values():
        parts = [instruction, *(i for name in _called(instruction) for i in computations[name].values())]
        bounds += [int(p[1]) for i in parts if i.opcode == "constant" and (p := re.match(r"\((\d+)\)", i.rest))]
    return max(bounds, default=None)


# ---- collectives


def _again(instruction: Instruction, seen: set[tuple[str, str]]) -> bool:
    """Whether this part of a transfer was counted before: TPUs fuse the parts of one transfer with computations."""
    chain = re.search(r'chain_id="(\d+)"', instruction.rest)
    if chain is None:
        return False
    link = chain[1], re.search(r"channel_id=(\d+)", instruction.rest)[1]
    if link in seen:
        return True
    seen.add(link)
    return False


def _sent(kind: str, instruction: Instruction, devices: int) -> float:
    n = group_size(instruction.rest, devices)
    size = nbytes(instruction.shape)
    if instruction.opcode.endswith("-start"):  # (operand, result, ...)
        arrays = [nbytes(m[0]) for m in re.finditer(ARRAY, instruction.shape)]
        size = max(arrays) if kind in ("all-gather", "collective-permute") else arrays[-1]
    share = (n - 1) / n
    return (
        size
        * {
            "all-reduce": 2 * share,
            "all-gather": share,
            "all-to-all": share,
            "reduce-scatter": n - 1,
            "collective-permute": 1,
            "collective-broadcast": 1,
        }[kind]
    )


def group_size(rest: str, devices: int) -> int:
    """The number of devices of a group, from ``replica_groups`` in any of its notations."""
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return len(found[1].split(","))
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", rest):
        return int(found[2])
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", found[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", found[2]))
    return devices


# ---- memory


def _scheduled(computations: dict[str, Computation], entry: str) -> set[str]:
    """Computations whose instructions run one by one: the program, its loops and branches, but not its fusions."""
    out, waiting = set(), [entry]
    while waiting:
        name = waiting.pop()
        out.add(name)
        for i in computations[name].values():
            if i.opcode in ("while", "conditional", "call"):
                waiting += [called for called in _called(i) if called not in out]
    return out


def _moved(instruction: Instruction, around: Computation, computations: dict[str, Computation]) -> float:
    """The bytes of HBM that an instruction reads and writes."""
    opcode = instruction.opcode
    if opcode in FREE or 'custom_call_target="AllocateBuffer"' in instruction.rest:
        return 0.0
    estimate = re.search(r'"bytes_accessed":"(\d+)"', instruction.rest)
    if opcode == "custom-call" and estimate:
        return float(estimate[1])
    written = nbytes(instruction.shape, hbm=True)
    if opcode in ("copy-start", "slice-start"):  # (to, from, ...)
        return 2 * written if opcode == "slice-start" else written
    shapes = [around[name].shape for name in instruction.operands if name in around]
    if opcode in SLICES:
        return 2 * written
    if opcode in UPDATES:
        return 2 * nbytes(shapes[UPDATES[opcode]], hbm=True)
    if opcode == "fusion":
        return _of_fusion(instruction, shapes, computations[_called(instruction)[0]], computations)
    return written + sum(nbytes(shape, hbm=True) for shape in shapes)


def _of_fusion(
    fusion: Instruction, shapes: list[str], inside: Computation, computations: dict[str, Computation]
) -> float:
    read = sum(
        _read(p, shape, inside, computations)
        for p, shape in zip(_parameters(inside), shapes, strict=True)
        if nbytes(shape, hbm=True)
    )
    root = next(i for i in inside.values() if i.root)
    results = [inside[name] for name in root.operands] if root.opcode == "tuple" else [root]
    arrays = [m[0] for m in re.finditer(ARRAY, fusion.shape)]
    if len(arrays) != len(results):
        return read + nbytes(fusion.shape, hbm=True)
    return read + sum(
        _written(result, inside, computations)
        for result, array in zip(results, arrays, strict=True)
        if nbytes(array, hbm=True)
    )


def _parameters(inside: Computation) -> list[Instruction]:
    found = [i for i in inside.values() if i.opcode == "parameter"]
    return sorted(found, key=lambda i: int(re.match(r"\((\d+)\)", i.rest)[1]))


def _users(name: str, inside: Computation) -> Iterator[tuple[Instruction, str]]:
    """Yield the instructions that use a value, and the name they use, looking through changes of its shape."""
    for user in inside.values():
        if name in user.operands:
            if user.opcode in ("bitcast", "reshape", "copy") and not user.root:
                yield from _users(user.name, inside)
            else:
                yield user, name


def _read(parameter: Instruction, shape: str, inside: Computation, computations: dict[str, Computation]) -> float:
    whole, parts = nbytes(shape), 0.0
    for user, name in _users(parameter.name, inside):
        if user.opcode in SLICES:
            parts += nbytes(user.shape)
        elif user.opcode == "tuple" or "AsyncCollective" in user.rest:  # passed on, not read
            continue
        elif user.opcode in UPDATES and name == user.operands[0]:
            continue
        elif user.opcode == "fusion":  # a fusion within one
            within = computations[_called(user)[0]]
            own = [p for p, operand in zip(_parameters(within), user.operands, strict=True) if operand == name]
            parts += sum(_read(p, shape, within, computations) for p in own)
        else:
            return whole
    return min(whole, parts)


def _written(result: Instruction, inside: Computation, computations: dict[str, Computation]) -> float:
    while result.opcode in ("bitcast", "reshape", "copy", "convert") and result.operands[0] in inside:
        result = inside[result.operands[0]]
    if result.opcode == "parameter" or "AsyncCollective" in result.rest:
        return 0.0
    if result.opcode in UPDATES:
        return nbytes(inside[result.operands[UPDATES[result.opcode]]].shape)
    if result.opcode == "fusion":  # a fusion within one
        within = computations[_called(result)[0]]
        root = next(i for i in within.values() if i.root)
        return nbytes(result.shape) if root.opcode == "tuple" else _written(root, within, computations)
    return nbytes(result.shape)
