"""What cannot work, said in one line to whoever started a training command."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

from paci_megatron.config import ConfigError
from paci_megatron.data import DataError


@contextlib.contextmanager
def exit_on_config_error() -> Iterator[None]:
    """Turn a :class:`ConfigError` or :class:`DataError` into one line of the first rank, and exit status 2 on every rank."""
    try:
        yield
    except (ConfigError, DataError) as error:
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"paci-megatron: error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
