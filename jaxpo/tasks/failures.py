"""What becomes of errors in functions of the user: they are told once, kept, and end a run only if nothing works."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

FILE = "failures.txt"


class NoVerdict(ValueError):
    """Not one call of a user's function succeeded, so there is nothing to learn from."""


@dataclass
class Failures:
    """Tells the first error of each kind, and keeps it in a file.

    say: shows a message to the user.
    folder: where ``failures.txt`` is written; None = nowhere.
    told: the function and the type of error -> the first such error.
    """

    say: Callable[[str], None] = print
    folder: Path | None = None
    told: dict[tuple[str, str], str] = field(default_factory=dict)

    def tell(self, what: str, errors: Iterable[str | None]) -> None:
        """Print the errors of a function that are of a new type, with their tracebacks, and append them to the file.

        Args:
          what: names the function, such as ``reward 'judged'``.
          errors: of its calls (`jaxpo.tasks.workers.Failure` or plain texts); None = the call succeeded.
        """
        for error in errors:
            kind = (what, (error or "").partition(":")[0])
            if error is None or kind in self.told:
                continue
            self.told[kind] = error
            text = f"{what} failed; errors of this kind are counted from here on, and not shown again:\n{whole(error)}"
            self.say(f"WARNING: {text}")
            if self.folder is not None:
                with open(self.folder / FILE, "a", encoding="utf-8") as file:
                    file.write(f"{text}\n\n")

    def check_any(self, what: str, failed: int, calls: int) -> None:
        """Stop where no call succeeded.

        Args:
          what: names the function, as for `tell`, which came before.
          failed: how many calls failed, in all processes.
          calls: of how many.

        Raises:
          NoVerdict: all of them failed; it shows the first error.
        """
        if calls and failed == calls:
            first = next((e for (name, _), e in self.told.items() if name == what), "(another process shows it)")
            raise NoVerdict(
                f"{what}: none of {calls} calls succeeded, so there is nothing to learn from; the first error:\n"
                f"{whole(first)}"
            )


def whole(error: str) -> str:
    """The traceback of an error, or its line if it has none."""
    return (getattr(error, "traceback", "") or error).rstrip()
