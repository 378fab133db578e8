"""A run's configuration: its fields, how a name adds fields of its own, every check, and the command line."""
