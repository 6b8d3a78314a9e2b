"""``paci-megatron check``: whether a training command would be accepted, and what PACI would do with it. See --help."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import shlex
import sys
from collections.abc import Sequence

from paci_megatron import ConfigError, install
from paci_megatron.platform import assumed
from paci_megatron.plugin.check import check_command, check_without_megatron

from .parser import CommandParser

DESCRIPTION = (
    "Checks training commands without starting them: every flag against torchrun's parser, the installed Megatron's and "
    "PACI's, for the number of processes that the command asks for. Reads one command a line from standard input if none is "
    "given. Prints a line that begins with 'ok: ' or 'error: ' for each, and what belongs to it indented below. Exit status "
    "2 if any is wrong."
)
EPILOG = """\
examples:
  %(prog)s -- torchrun --nproc-per-node 8 -m pretrain_gpt_paci --pipeline-schedule paci ...
  %(prog)s --assume gpu,te -- torchrun --nnodes 4 --nproc-per-node 8 -m paci_megatron SCRIPT ...
  %(prog)s --assume gpu,te < commands.txt
"""


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Check the command given, or each line of standard input; 0 if all can run, else 2."""
    parser = CommandParser(prog or "check", DESCRIPTION, EPILOG, usage="%(prog)s [--assume NAMES] [-- COMMAND ...]")
    parser.add_argument(
        "--assume",
        default="",
        metavar="NAMES",
        help=f"what the job's machine has, of {', '.join(assumed.NAMES)}, with commas. Default: what this one has",
    )
    argv = list(sys.argv[1:] if argv is None else argv)
    # Whatever does not begin with an option is the command.
    at = argv.index("--") if "--" in argv else next((i for i, a in enumerate(argv) if _begins_command(argv, i)), len(argv))
    names = [name for name in parser.parse_args(argv[:at]).assume.split(",") if name]
    if unknown := [name for name in names if name not in assumed.NAMES]:
        parser.error(f"--assume {','.join(unknown)}: choose from {', '.join(assumed.NAMES)}")
    given = argv[at + 1 :] if argv[at : at + 1] == ["--"] else argv[at:]
    commands = [given] if given else [shlex.split(line) for line in sys.stdin if line.strip()]
    if not commands:
        parser.error("no command given")
    logging.disable(logging.WARNING)  # the answer is one line for each command
    return 2 if sum([_answer(command, names) for command in commands]) else 0


def _begins_command(argv: Sequence[str], index: int) -> bool:
    return not argv[index].startswith("-") and (index == 0 or argv[index - 1] != "--assume")


def _answer(command: list[str], assumed_names: list[str]) -> bool:
    """Print what is said to a command; whether it cannot run."""
    try:
        check_without_megatron(command)
        _install(tuple(assumed_names))
        summary, *lines = check_command(command)
    except ConfigError as error:
        print(f"error: {error}", flush=True)
        return True
    print(f"ok: {summary}", *lines, sep="\n  ", flush=True)
    return False


@functools.cache
def _install(assumed_names: tuple[str, ...]) -> None:
    """Imports Megatron, which takes seconds: once, and only for a command that needs it."""
    assumed.assume(assumed_names)
    with contextlib.redirect_stderr(io.StringIO()):  # what optional packages say about themselves
        install()
