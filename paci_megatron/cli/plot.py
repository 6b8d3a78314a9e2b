"""``paci-megatron plot``: curves of training runs, from their metrics files or TensorBoard folders. See --help."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from paci_megatron.telemetry import curves, plotting
from paci_megatron.telemetry.curve_figure import Look, make_figure
from paci_megatron.usage import require, require_writable

from .parser import CommandParser

DESCRIPTION = "Curves of any set of training runs, from their metrics files or TensorBoard folders."

EPILOG = """\
examples:
  %(prog)s 1F1B-flush=runs/demo/1f1b.jsonl PACI=runs/demo/paci.jsonl --y perplexity --x time --output ppl.png
  %(prog)s runs/*/tensorboard --split train --smooth 20 --inset --output loss.svg

Runs of the same label, such as seeds, look the same and share a legend entry. A run that was resumed into the same file or
folder is one curve. A TensorBoard folder counts time on the wall's clock, evaluations and saves included; a metrics file
counts training alone.
"""
INSET_SHARE = 0.25


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = CommandParser(prog, DESCRIPTION, EPILOG)
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="[LABEL=]PATH",
        help="a file of --paci-metrics-file or a folder of --tensorboard-dir (default label: its name)",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help=".png, .svg or .pdf")
    parser.add_argument("--y", choices=curves.Y_AXES, default="loss", help="default: loss, in nats per token")
    parser.add_argument("--x", choices=curves.X_AXES, default="tokens", help="default: tokens")
    parser.add_argument("--split", choices=curves.SPLITS, default="validation", help="default: validation")
    parser.add_argument("--smooth", type=int, default=1, metavar="N", help="running mean of the loss over N points")
    parser.add_argument(
        "--inset",
        type=float,
        nargs="?",
        const=INSET_SHARE,
        metavar="SHARE",
        help=f"enlarge the last SHARE of the horizontal range (default: {INSET_SHARE})",
    )
    parser.add_argument("--log", choices=("x", "y", "xy"), default="", help="logarithmic axes")
    parser.add_argument("--y-range", type=float, nargs=2, metavar=("LOW", "HIGH"), help="limits of the vertical axis")
    parser.add_argument("--title")
    parser.add_argument("--seq-length", type=int, help="tokens per sample, for TensorBoard folders that do not say it")
    return parser


def _named_paths(values: list[str]) -> list[tuple[str, Path]]:
    """(label, path) of each run. Without a label it is the path's last name, or more of it where two are the same."""
    named = [curves.named_path(value) for value in values]
    bare = [path for label, path in named if label is None]
    differ = len({path.stem for path in bare}) == len(bare)
    return [((path.stem if differ else str(path)) if label is None else label, path) for label, path in named]


def _look(options: argparse.Namespace) -> Look:
    """What the options say of the picture; ``ValueError`` for the first that cannot work."""
    names = ("x", "y", "split", "smooth", "inset", "log", "y_range", "title")
    look = Look(**{name: getattr(options, name) for name in names})
    look.validate()
    length, output = options.seq_length, options.output
    require(length is None or length >= 1, f"--seq-length {length}: must be at least 1")
    kinds = ", ".join(plotting.SUFFIXES)
    require(output.suffix.lower() in plotting.SUFFIXES, f"--output {output}: not a kind of picture; end it in {kinds}")
    require_writable("--output", output)
    return look


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command line; 0, or 2 after one line on standard error that says what is wrong."""
    prog = prog or "paci-megatron plot"
    options = _parser(prog).parse_intermixed_args(argv)
    try:
        look = _look(options)
        runs = [curves.read_run(path, label, options.seq_length) for label, path in _named_paths(options.runs)]
        plotting.save(make_figure(runs, look), options.output)
    except (ValueError, OSError) as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 2
    print(options.output)
    return 0
