"""What cannot work, said in one line to whoever started a training command."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import time
import traceback
from collections.abc import Iterator
from typing import NoReturn

from paci_megatron.config import ConfigError
from paci_megatron.data import DataError

# How long the others wait for the first rank to end the job. Files may be wrong on one machine only: then its own first rank
# has to speak, and in doubt each.
_LOCAL_FIRST_S, _OTHERS_S = 3.0, 6.0
_REFUSALS = (AssertionError, ValueError, TypeError, RuntimeError, ZeroDivisionError, OSError)

_MISSING = re.compile(r"^assert args\.(\w+) is not None|^(\w+) argument is None")


class MegatronError(RuntimeError):
    """The Megatron that Python finds is not one that the plugin fits."""


@contextlib.contextmanager
def exit_on_config_error() -> Iterator[None]:
    """Turn a :class:`ConfigError`, :class:`DataError` or :class:`MegatronError` into :func:`refuse`."""
    try:
        yield
    except (ConfigError, DataError, MegatronError) as error:
        refuse(str(error))


def refuse(reason: str) -> NoReturn:
    """End every rank with status 2, after one line of the first, which is the same on all of them.

    torchrun tells the others to end as soon as one has, so they wait, to leave the line to the first.
    """
    rank, under_torchrun = os.environ.get("RANK", "0"), "TORCHELASTIC_RUN_ID" in os.environ
    if rank != "0":
        if not under_torchrun:
            sys.exit(2)
        time.sleep(_LOCAL_FIRST_S if os.environ.get("LOCAL_RANK") == "0" else _OTHERS_S)
        reason = f"rank {rank}: {reason}"
    print(f"paci-megatron: error: {reason}", file=sys.stderr, flush=True)
    sys.exit(2)


@contextlib.contextmanager
def megatrons_refusals() -> Iterator[None]:
    """:class:`ConfigError` in one line for an error within, where Megatron checks or interprets a command line."""
    try:
        yield
    except ConfigError:
        raise
    except _REFUSALS as error:
        # Many of Megatron's assertions have no message but the condition itself.
        reason = str(error) or traceback.extract_tb(error.__traceback__)[-1].line or type(error).__name__
        if (missing := _MISSING.search(reason)) is not None:
            raise ConfigError(f"--{(missing[1] or missing[2]).replace('_', '-')} is missing. Megatron needs it.") from error
        raise ConfigError(f"refused by Megatron: {' '.join(reason.split())}") from error
