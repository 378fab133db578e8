"""Who decides between answers."""
