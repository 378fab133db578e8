"""The files of a run: checkpoints with a manifest, the run directory, plots."""
