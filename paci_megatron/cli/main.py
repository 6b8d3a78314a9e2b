"""``paci-megatron COMMAND``: finds the command's module and runs it. See --help."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import NamedTuple

import paci_megatron
from paci_megatron.plugin import machine

PROG = "paci-megatron"


class Command(NamedTuple):
    """A module of this package that has ``main(argv, prog) -> int``, and what it does in a few words."""

    module: str
    help: str


# A module is imported when its command is run: importing Megatron takes seconds.
COMMANDS = {
    "Before training": {
        "doctor": Command("doctor", "this machine: what is installed, which kernels are used, one short verified training"),
        "preprocess": Command("preprocess", "text into Megatron's .bin/.idx, with Megatron's own tokenizers"),
        "check": Command("check", "whether a training command would be accepted, and what PACI would do and switch off"),
        "plan": Command("plan", "simulate PACI and other schedules: speed, memory, drift; draw and balance a trace"),
    },
    "After training": {
        "report": Command("report", "one page about runs: speed, losses, schedule, drift, memory, commands"),
        "plot": Command("plot", "curves of runs from their metrics files or TensorBoard folders"),
        "evaluate": Command("evaluate", "perplexity of a checkpoint on text or .bin/.idx, LAMBADA's accuracy"),
    },
}
# A module that several extras have is asked for by the first of them.
EXTRAS = {module: extra for extra, modules in reversed(machine.EXTRAS.items()) for module in modules}
"""The extra of this package that installs a module which only some commands need."""


def run(command: str, argv: list[str] | None = None, prog: str | None = None) -> int:
    """Run ``command`` with ``argv`` (default: the process's), called ``prog`` in its messages; returns its exit status."""
    module = next(commands[command].module for commands in COMMANDS.values() if command in commands)
    prog = prog or f"{PROG} {command}"
    try:
        return int(import_module(f"paci_megatron.cli.{module}").main(argv, prog))
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        print(f"{prog}: error: {package} is not installed: pip install 'paci-megatron[{EXTRAS[package]}]'", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return 130


def usage() -> str:
    """The help: all commands, in groups."""
    lines = [f"usage: {PROG} COMMAND [options]", f"       {PROG} COMMAND --help | --version | --help"]
    for title, commands in COMMANDS.items():
        lines += ["", f"{title}:", *(f"  {name:<12} {command.help}" for name, command in commands.items())]
    lines += ["", "To train: torchrun <launcher options> -m pretrain_gpt_paci <Megatron's options> --pipeline-schedule paci"]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """The console command; returns its exit status, 2 where there is no such command."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(usage(), file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"{PROG} {paci_megatron.__version__}")
        return 0
    known = [name for commands in COMMANDS.values() for name in commands]
    if argv[0] not in known:
        print(f"{PROG}: error: {argv[0]}: no such command; choose from {', '.join(known)}", file=sys.stderr)
        return 2
    return run(argv[0], argv[1:])


if __name__ == "__main__":
    sys.exit(main())
