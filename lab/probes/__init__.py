"""Probes of the running plugin: what its action loop and its host code cost. Each has a door of its own in ``tools/``."""
