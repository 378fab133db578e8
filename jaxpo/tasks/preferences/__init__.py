"""Preferences: records of answers, sets of records from files or tasks, and their encoding as rows of tokens."""
