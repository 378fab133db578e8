"""Pure array functions: the mathematics that objectives are composed of. Of jaxpo they import only each other and
`jaxpo.arguments`."""
