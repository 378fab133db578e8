"""A run's configuration: its fields, how names fill in their own fields, every check, the command line."""
