"""What a stranger wrote is shown, not obeyed."""

import io

import pytest
from rich.console import Console

from jaxpo.storage.rundir import closing_table
from jaxpo.text.terminal import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    (
        ("plain, ä, 漢, 🙂", "plain, ä, 漢, 🙂"),
        ("two\n\tlines", "two\n\tlines"),
        ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),
        ("over\rwritten\b\x7f\x9b31m", r"over\rwritten\x08\x7f\x9b31m"),
        ("abc\u202edcba\u2066", r"abc\u202edcba\u2066"),
        ("a\u2028b\udcff", r"a\u2028b\udcff"),
    ),
)
def test_control_sequences_are_shown_as_python_writes_them(text, shown):
    assert printable(text) == shown


def test_a_table_shows_markup_and_control_sequences_as_they_are():
    file = io.StringIO()
    closing_table("[red]t[/red]", [("[bold]a", "\x1b[2J")], columns=("[/]", "x"), file=file)
    assert all(part in file.getvalue() for part in ("[red]t", "[bold]a", "[/]", r"\x1b[2J"))
    assert "\x1b" not in file.getvalue() and isinstance(Console(file=file), Console)
