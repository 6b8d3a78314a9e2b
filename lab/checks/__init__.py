"""Checks of a machine: that training on it does what the tests on a CPU promise. Run by ``tools/gpu_check.py``."""
