"""``paci-megatron doctor``: whether this machine can train under PACI. See --help."""

from __future__ import annotations

from collections.abc import Sequence

from paci_megatron.plugin.machine import examine

from .parser import CommandParser

DESCRIPTION = (
    "Checks this machine, a line each: PASS, FAIL, or SKIP for what is missing and not needed, with the line to type. Says "
    "what is installed, whether Megatron fits and which kernels will be used, and trains for a moment with two processes, "
    "on two GPUs where there are two, else on the CPU: PACI with a drain at every update must have the losses of "
    "Megatron's 1F1B-flush bit for bit, and without drains the drift that its schedule has. Takes under a minute on a CPU "
    "and leaves no files. Exit status 1 if a check failed."
)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Print a line for each check; 1 if one failed, else 0."""
    parser = CommandParser(prog or "doctor", DESCRIPTION)
    parser.add_argument("--without-training", action="store_true", help="leave out the short training")
    arguments = parser.parse_args(argv)
    failed = False
    for finding in examine(trains=not arguments.without_training):
        failed = failed or finding.status == "FAIL"
        print(f"{finding.status}  {finding.name:<18}", finding.said.replace("\n", "\n      "), flush=True)
    return int(failed)
