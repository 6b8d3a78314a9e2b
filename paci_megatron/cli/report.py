"""``paci-megatron report``: one page about training runs, from their metrics files and traces. See --help."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from paci_megatron.telemetry.curves import named_path
from paci_megatron.telemetry.run_report.page import write_report
from paci_megatron.usage import require, require_writable

from .parser import CommandParser

DESCRIPTION = """\
One page about any set of training runs: speed and its limit, losses, the measured and the simulated schedule, drift and
its bounds, clipping, memory, what was switched off, commands and versions. It needs a browser and nothing else.
"""

EPILOG = """\
examples:
  %(prog)s runs/demo --output report.html
  %(prog)s 1F1B-flush=runs/flush.jsonl PACI=runs/paci.jsonl --output report.html

A run's trace is looked for where the run has written it, and beside its metrics file. A run that was resumed into the same
file is one run. The first run of 1F1B-flush, or else the first run, is what the others are compared with.
"""


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = CommandParser(prog, DESCRIPTION, EPILOG)
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="[LABEL=]RUN",
        help="a file of --paci-metrics-file, or a folder that holds such files (default label: the schedule, or its name)",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the page, .html")
    return parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command line; 0, or 2 after one line on standard error that says what is wrong."""
    prog = prog or "paci-megatron report"
    options = _parser(prog).parse_intermixed_args(argv)
    output = options.output
    try:
        require(output.suffix.lower() in (".html", ".htm"), f"--output {output}: not a page; end it in .html")
        require_writable("--output", output)
        write_report([named_path(run) for run in options.runs], output)
    except (ValueError, OSError) as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 2
    print(output)
    return 0
