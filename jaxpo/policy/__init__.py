"""The policy under training: a decoder-only transformer, and what it says of a batch."""
