"""Judges: they decide which of several answers is better."""
