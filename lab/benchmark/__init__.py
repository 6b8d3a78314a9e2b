"""Measures the throughput of schedules on real processes; see ``tools/benchmark_throughput.py``."""
