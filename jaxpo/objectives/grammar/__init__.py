"""How objectives are composed: terms, parts, policy gradients, units of rows, and strings of a config."""
