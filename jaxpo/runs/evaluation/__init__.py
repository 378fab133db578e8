"""How good a policy or a reward model is, with honest error bars."""
