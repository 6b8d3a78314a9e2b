"""Whether the job is to stop, which one rank may know before the others."""

from __future__ import annotations

import argparse
import time


def can_exit(args: argparse.Namespace) -> bool:
    """Whether this run's arguments let anything but its end stop it."""
    return bool(args.exit_signal_handler or args.exit_duration_in_mins)


def exit_wanted() -> bool:
    """Whether this rank has had the signal of ``--exit-signal-handler``, or ``--exit-duration-in-mins`` are over."""
    from megatron.training import get_args, get_signal_handler, training

    args = get_args()
    # The handler's own method asks all ranks.
    if args.exit_signal_handler and get_signal_handler()._signal_received:
        return True
    minutes = args.exit_duration_in_mins
    return bool(minutes) and time.time() - training._TRAIN_START_TIME > 60 * minutes
