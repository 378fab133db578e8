"""The policy-gradient loss of token ratios, its metrics and its gradient, from one pass over the tokens."""
