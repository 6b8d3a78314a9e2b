"""Curves of any set of training runs, from their metrics files or TensorBoard folders. See --help."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

# A checkout that is not installed works too.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from paci_megatron.telemetry import curves, plotting
from paci_megatron.telemetry.curves import Curve, Run
from paci_megatron.usage import require_writable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

EPILOG = """\
examples:
  plot_curves.py 1F1B-flush=runs/demo/1f1b.jsonl PACI=runs/demo/paci.jsonl --y perplexity --x time --output ppl.png
  plot_curves.py runs/*/tensorboard --split train --smooth 20 --inset --output loss.svg

Runs of the same label, such as seeds, look the same and share a legend entry. A run that was resumed into the same file or
folder is one curve. A TensorBoard folder counts time on the wall's clock, evaluations and saves included; a metrics file
counts training alone.
"""
INSET_SHARE = 0.25


class _Parser(argparse.ArgumentParser):
    """Answers a wrong command line with one line, like everything else that is wrong."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="plot_curves.py",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
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


def _check(arguments: argparse.Namespace) -> None:
    """``ValueError`` for the first value that cannot work."""
    if arguments.smooth < 1:
        raise ValueError(f"--smooth {arguments.smooth}: must be at least 1")
    if arguments.inset is not None and not 0 < arguments.inset < 1:
        raise ValueError(f"--inset {arguments.inset}: must be above 0 and below 1")
    if arguments.seq_length is not None and arguments.seq_length < 1:
        raise ValueError(f"--seq-length {arguments.seq_length}: must be at least 1")
    if arguments.y_range is not None and not arguments.y_range[0] < arguments.y_range[1]:
        low, high = arguments.y_range
        raise ValueError(f"--y-range {low:g} {high:g}: LOW must be below HIGH; exchange them")
    output = arguments.output
    if output.suffix.lower() not in plotting.SUFFIXES:
        raise ValueError(f"--output {output}: not a kind of picture; end it in {', '.join(plotting.SUFFIXES)}")
    require_writable("--output", output)


def _named_paths(values: list[str]) -> list[tuple[str, Path]]:
    """(label, path) of each run. Without a label it is the path's last name, or more of it where two are the same."""
    named = []
    for value in values:
        label, separator, rest = value.partition("=")
        is_labelled = separator and not Path(value).exists()
        named.append((label if is_labelled else None, Path(rest if is_labelled else value)))
    bare = [path for label, path in named if label is None]
    names = [path.stem if len({other.stem for other in bare}) == len(bare) else str(path) for path in bare]
    chosen = iter(names)
    return [(next(chosen) if label is None else label, path) for label, path in named]


def make_figure(runs: list[Run], arguments: argparse.Namespace) -> Figure:
    """The picture of ``runs`` that ``arguments`` describe. ``ValueError`` if a run lacks what is to be drawn."""
    x, y, split = arguments.x, arguments.y, arguments.split
    raw = [curves.curve(run, x, y, split) for run in runs]
    smoothed = [curves.curve(run, x, y, split, arguments.smooth) for run in runs]
    label = {"tokens": "training tokens", "updates": "updates (optimizer steps)"}.get(x, "")
    if x == "time":
        unit, name = plotting.time_unit(max(max(curve.x) for curve in raw))
        clock = "time, evaluations and saves included" if any(run.is_wall_time for run in runs) else "training time"
        label = f"{clock} ({name})"
        raw, smoothed = _scaled(raw, unit), _scaled(smoothed, unit)
    figure, (axes,) = plotting.new_figure()

    def draw(where: Axes) -> None:
        if arguments.smooth > 1:
            plotting.draw(where, raw, faint=True)
        plotting.draw(where, smoothed, markers=split == "validation")

    draw(axes)
    axes.set(xlabel=label, ylabel=f"{'training' if split == 'train' else split} {y}", title=arguments.title)
    if "x" in arguments.log:
        plotting.use_log_x(axes)
    elif x != "time":
        plotting.use_short_counts(axes)
    if arguments.y_range is not None:
        axes.set_ylim(*arguments.y_range)
    if "y" in arguments.log:
        plotting.use_log_ticks(axes)
    plotting.finish(axes)
    if arguments.inset is not None:
        draw(plotting.add_inset(axes, smoothed, arguments.inset))
    columns = min(4, len({run.label for run in runs}))
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=columns, frameon=False)
    return figure


def _scaled(drawn: list[Curve], unit: float) -> list[Curve]:
    return [Curve(label, [value / unit for value in x], y) for label, x, y in drawn]


def main(argv: list[str] | None = None) -> int:
    """Run the command line; 0, or 2 after one line on standard error that says what is wrong."""
    arguments = _parser().parse_intermixed_args(argv)
    try:
        _check(arguments)
        runs = [curves.read_run(path, label, arguments.seq_length) for label, path in _named_paths(arguments.runs)]
        plotting.save(make_figure(runs, arguments), arguments.output)
    except (ValueError, OSError) as error:
        print(f"plot_curves.py: error: {error}", file=sys.stderr)
        return 2
    print(arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
