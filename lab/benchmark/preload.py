"""Imported by the server that the benchmark's ranks are forked from."""

import lab.preload  # noqa: I001 - first, since it must import Megatron
import lab.benchmark.worker  # noqa: F401
