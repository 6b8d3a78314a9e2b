"""Imported by the server that the pool's workers are forked from."""

import lab.preload  # noqa: F401 - first, since it must import Megatron
import tests.support.jobs  # noqa: F401
