"""Measure every objective in float32 against float64, and hold it to the bound that it states.

    JAX_PLATFORMS=cpu python docs/float32.py > docs/float32.md    # all of them, some minutes
    JAX_PLATFORMS=cpu python docs/float32.py grpo dpo             # some

It prints a table, and ends with 1 if a bound is exceeded.
"""

import sys

import jaxpo
from jaxpo.objectives.precision import COMMON, LOOSER, bound_of
from jaxpo.testing.float32 import LONG, OFFSET, build_of, errors

WHAT = ("wild", "long", "binary", "offset")
INTRODUCTION = f"""# float32 against float64

Written by `python docs/float32.py > docs/float32.md`; the contracts hold every objective to its bound.

The same float32 numbers go into the loss twice, computed in float32 and in float64. The error is that of the loss,
relative to the loss (or to 1), or that of the gradient in the policy's statistics, relative to its largest entry,
whichever is larger. Inputs: *wild*, 48 rows of up to 6 tokens with probabilities near 0 and 1 and far-off ratios;
*long*, answers of up to {LONG} tokens near the old policy; *binary*, the same with rewards of two values; *offset*, the
same with rewards around {OFFSET:g}, where any are allowed. The figures are those of a CPU.

The bound is {COMMON.error:g} ({COMMON.why}). Looser ones:

"""


def main(names: list[str]) -> int:
    print(INTRODUCTION + "\n".join(f"- `{name}`, {bound.error:g}: {bound.why}" for name, bound in LOOSER.items()))
    print(f"\n| objective | bound | {' | '.join(WHAT)} |\n|---|---|{'---|' * len(WHAT)}")
    exceeded = []
    for name in names:
        found, bound = errors(build_of(name)), bound_of(name).error
        cells = [f"{found[what]:.1e}" if what in found else "–" for what in WHAT]
        print(f"| `{name}` | {bound:g} | {' | '.join(cells)} |", flush=True)
        exceeded += [name] * (max(found.values()) > bound)
    if exceeded:
        print(f"beyond their bounds: {', '.join(exceeded)}", file=sys.stderr)
    return int(bool(exceeded))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or jaxpo.names()))
