"""The policy under training: a decoder-only transformer, and the statistics that it gives for a batch."""
