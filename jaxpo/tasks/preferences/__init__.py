"""Preferences: records of answers, sets of them from files or tasks, and their encoding as rows of tokens."""
