"""Text and tokens: tokenizers, and the vocabulary and tensors of GGUF files. Nothing here imports jax."""
