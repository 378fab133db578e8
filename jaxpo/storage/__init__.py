"""What a run leaves behind: checkpoints with a manifest, the run directory, pictures."""
