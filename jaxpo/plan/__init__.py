"""Plan a run for chips that you do not have: its memory and time."""
