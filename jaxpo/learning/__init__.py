"""What learns: the optimizer step, the training state, references, optimizers and the compiled programs."""
