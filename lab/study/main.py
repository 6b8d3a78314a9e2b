"""Trains the paper's study, or the same in small, and reports it with the paper's figures beside. See --help."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import signal
import sys
from pathlib import Path
from typing import NoReturn

from lab.processes import environment
from lab.study import commands
from lab.study.arms import SETS, Study, StudyError
from lab.study.records import RunFolder
from lab.study.run import Run, run_all, run_step, sole_user
from paci_megatron.cli.parser import CommandParser

DESCRIPTION = "Trains the paper's study, or the same in small, and reports it with the paper's figures beside."

EPILOG = """\
sets:
  small        8 stages emulated in one process, a GPT of 2M parameters: flush and PACI, a in {4, 8, 16}, two batches,
               three seeds; a in {1, 2} with and without clipping; recomputation; remedies. Times are computed.
  best         the same model, B = 32, at rates from half to 128 times: each schedule at its own best; beta1, Muon
  paci-v       the same model, B = 32, on 4 stages: flush, PACI, and PACI-V with the same layers as 8 stages in a V
  processes    2 stages as 2 processes, measured time; needs a core or a GPU for each, and --jobs 1
  gpt2-medium  the paper's setting, on 8 GPUs; give the data with --data-prefix
  smoke        two trainings of a few updates, to test

Rerun the same command after an interruption: finished runs are skipped, the others resume from their last checkpoint.

  reproduce_paper.py --set small --output runs/small --jobs 2
  reproduce_paper.py --set gpt2-medium --output runs/paper --data-prefix data/owt --dry-run
"""


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser("reproduce_paper.py", DESCRIPTION, EPILOG)
    parser.add_argument("--set", required=True, choices=SETS, help="what to train, see below")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="runs, report.json, report.md, figures")
    parser.add_argument("--arms", nargs="+", metavar="NAME", help="only these arms, as --dry-run names them")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="default: 1 2 3")
    parser.add_argument("--tokens", type=int, help="tokens of each training, a multiple of what all arms can divide")
    parser.add_argument("--peak-lr", type=float, help="of the set's smallest batch; others by the square root of theirs")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at once (default: 1)")
    parser.add_argument("--text", type=Path, nargs="+", metavar="FILE", help="default: Python's standard library")
    parser.add_argument("--valid-text", type=Path, nargs="+", metavar="FILE", help="default: documents held out of --text")
    parser.add_argument("--data-prefix", metavar="PREFIX", help="data made by preprocess_data.py, instead of --text")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--dry-run", action="store_true", help="print every command and run none")
    mode.add_argument("--report-only", action="store_true", help="report what is finished and run nothing")
    return parser


def _study(arguments: argparse.Namespace) -> Study:
    """The set with the command line's changes. All arms stay: they decide the sizes."""
    study = SETS[arguments.set]()
    seeds = tuple(arguments.seeds or study.seeds)
    study = dataclasses.replace(study, seeds=seeds, tokens=arguments.tokens or study.tokens)
    if arguments.peak_lr is not None:
        smallest = min(arm.batch_size for arm in study.arms)
        study = dataclasses.replace(study, peak_lr=arguments.peak_lr, lr_batch_size=smallest)
    if len(set(study.seeds)) < len(study.seeds):
        raise StudyError(f"--seeds {' '.join(map(str, study.seeds))}: each seed once, please")
    names = [arm.name for arm in study.arms]
    for name in arguments.arms or ():
        if name not in names:
            raise StudyError(f"--arms {name}: the set {study.name} has no such arm; it has {', '.join(names)}")
    if arguments.jobs < 1:
        raise StudyError(f"--jobs {arguments.jobs}: at least 1 training must run at once")
    if arguments.jobs > 1 and not study.is_emulated:
        raise StudyError(
            f"--jobs {arguments.jobs} with --set {study.name}: its times are measured, and trainings beside each other "
            "would slow each other down; use --jobs 1"
        )
    if arguments.valid_text and not arguments.text:
        raise StudyError("--valid-text without --text: give the text to train on, too")
    return study


def _prepared(study: Study, arguments: argparse.Namespace, output: Path) -> commands.Data:
    """Make the data, or take it from where it is."""
    folder = output / "data"
    if arguments.data_prefix:
        return commands.existing_data(study, str(Path(arguments.data_prefix).resolve()))
    if study.vocab_size is None:
        raise StudyError(f"--set {study.name}: it trains on a corpus of its own; make it and give --data-prefix PREFIX")
    corpus = folder / "corpus.jsonl"
    text = [path.resolve() for path in arguments.text or [corpus]]
    valid = [path.resolve() for path in arguments.valid_text or ()]
    record = RunFolder(folder)
    steps = commands.preprocess_commands(study, folder, text, valid)
    record.claim([part for step in steps for part in step])
    if not record.is_done:
        if not arguments.text:
            from examples.gpt.demo_corpus import standard_library, write_corpus

            write_corpus(standard_library(), corpus)
        for step in steps:
            print(f"$ python {shlex.join(step)}", flush=True)
            run_step("preprocessing", step, record.log, environment(on_gpu=False))
        record.finish(0)
    return commands.prepared_data(study, folder, bool(valid))


def _runs(study: Study, arguments: argparse.Namespace, data: commands.Data, output: Path) -> list[Run]:
    runs = []
    for arm, seed in study.runs():
        if not arguments.arms or arm.name in arguments.arms:
            name = f"{arm.name}-seed{seed}"
            folder = output / "runs" / name
            command = commands.training_command(study, arm, seed, data, folder)
            runs.append(Run(name, command, RunFolder(folder), study.train_iters(arm)))
    return runs


def _dry_run(study: Study, arguments: argparse.Namespace, output: Path) -> None:
    folder = output / "data"
    prefix = arguments.data_prefix or ("data/openwebtext" if study.is_paper else str(folder / "text"))
    if not arguments.data_prefix and not study.is_paper:
        text = arguments.text or [folder / "corpus.jsonl"]
        for step in commands.preprocess_commands(study, folder, text, arguments.valid_text or []):
            print(f"python {shlex.join(step)}\n")
    data = commands.placeholder_data(study, prefix)
    for run in _runs(study, arguments, data, output):
        print(f"# {run.name}\npython {shlex.join(run.command)}\n")


def _report(study: Study, output: Path) -> None:
    """Write the report of what is finished."""
    from lab.study.analysis import Analysis, RunResult
    from lab.study.figures import write_figures
    from lab.study.report import markdown

    folders = ((arm, seed, RunFolder(output / "runs" / f"{arm.name}-seed{seed}")) for arm, seed in study.runs())
    results = [RunResult(arm, seed, folder.events()) for arm, seed, folder in folders if folder.is_done]
    if not results:
        raise StudyError(
            f"--output {output}: no run of the set {study.name} is finished there, so there is nothing to report"
        )
    analysis = Analysis(study, results)
    report = analysis.as_dict()
    figures = write_figures(analysis, report, output)
    (output / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (output / "report.md").write_text(markdown(report, figures), encoding="utf-8")
    for name in ("report.json", "report.md", *figures):
        print(output / name)


def _terminated(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def main(argv: list[str] | None = None) -> int:
    """Run the command line; 0, 1 if something failed, 2 if asked for what cannot be, or 130 if interrupted."""
    arguments = _parser().parse_args(argv)
    output = arguments.output.resolve()
    signal.signal(signal.SIGTERM, _terminated)
    try:
        study = _study(arguments)
        if arguments.dry_run:
            _dry_run(study, arguments, output)
        elif arguments.report_only:
            _report(study, output)
        else:
            with sole_user(output):
                data = _prepared(study, arguments, output)
                run_all(_runs(study, arguments, data, output), arguments.jobs, environment(on_gpu=study.is_paper))
                _report(study, output)
    except StudyError as error:
        print(f"reproduce_paper.py: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nreproduce_paper.py: interrupted; rerun the same command to go on", file=sys.stderr)
        return 130
    return 0
