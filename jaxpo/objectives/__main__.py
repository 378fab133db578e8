"""The registry on the command line: ``python -m jaxpo.objectives [list [KIND] | describe NAME [KIND] | docs
[FILE]]``."""

import sys

from jaxpo.objectives.listing import listing, reference
from jaxpo.registry import KINDS, describe, kinds_of, names, unknown

USAGE = """usage: python -m jaxpo.objectives                        every objective, a line each
       python -m jaxpo.objectives list [KIND]            what is registered (of a kind)
       python -m jaxpo.objectives describe NAME [KIND]   source, formula, hyperparameters
       python -m jaxpo.objectives docs [FILE]            the reference in markdown"""


def run(arguments: list[str]) -> str:
    """The text that a command line asks for.

    Raises:
      ValueError: an unknown command, name or kind, with the nearest."""
    match arguments:
        case []:
            return listing("objective")
        case ["list"]:
            return "\n\n".join(f"{kind}\n{listing(kind)}" for kind in KINDS if names(kind))
        case ["list", kind]:
            return listing(kind)
        case ["describe", name]:
            found = kinds_of(name)
            if not found:
                raise ValueError(unknown("name", name, {n for kind in KINDS for n in names(kind)}))
            return "\n".join(describe(name, kind) for kind in found)
        case ["describe", name, kind]:
            return describe(name, kind)
        case ["docs"]:
            return reference()
        case ["docs", file]:
            with open(file, "w") as f:
                f.write(reference())
            return f"wrote {file}"
        case ["-h" | "--help" | "help"]:
            return USAGE
    raise ValueError(USAGE)


def main() -> None:
    """Print it, or the error and status 2."""
    try:
        print(run(sys.argv[1:]))
    except (ValueError, OSError) as error:
        print(error if str(error) == USAGE else f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
