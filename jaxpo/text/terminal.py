"""Text of unknown origin on a terminal: completions, names of files, what verifiers say."""

import unicodedata

# Besides control characters: what turns the direction of text around, so that it reads as something else.
TURNING = frozenset(map(chr, (*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x061C)))
KEPT = frozenset("\n\t")


def printable(text: str) -> str:
    r"""Replace what a terminal would obey by what Python would write: ``ESC [2J`` becomes ``\x1b[2J``. Lines and tabs
    stay.

    Control characters, lone surrogates, separators of lines other than ``\n``, and marks that turn the direction of
    text are replaced."""
    return "".join(x if x in KEPT or not _obeyed(x) else x.encode("unicode_escape").decode() for x in text)


def _obeyed(x: str) -> bool:
    return x in TURNING or unicodedata.category(x) in ("Cc", "Cs", "Zl", "Zp")
