"""Measurements of jaxpo beside other systems; each module is a command."""
