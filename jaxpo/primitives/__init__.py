"""Pure array functions: the mathematics that objectives are composed of. They import nothing of jaxpo but each
other."""
