"""Log-probabilities of target tokens from hidden states, without the logits [N, V] in memory."""
