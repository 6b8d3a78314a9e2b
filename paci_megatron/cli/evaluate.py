"""``paci-megatron evaluate``: perplexity of a Megatron checkpoint on text. See --help."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import paci_megatron
from paci_megatron.data import DataError
from paci_megatron.data.tokenizers import quiet_imports
from paci_megatron.evaluate import EvaluationError
from paci_megatron.evaluate.corpus import TextOptions
from paci_megatron.evaluate.report import table
from paci_megatron.evaluate.text import DETOKENIZERS, ROW_RULES, WORD_RULES
from paci_megatron.usage import UsageError, require_writable

from .parser import CommandParser

DESCRIPTION = """\
Perplexity of a Megatron checkpoint on .bin/.idx data or text, or LAMBADA's last-word accuracy. The checkpoint may have been
saved with any number of pipeline stages and tensor-parallel ranks; its arguments say what the model and tokenizer are.
"""

EPILOG = """\
examples:
  %(prog)s --load runs/gpt --input data/owt_valid_document
  %(prog)s --load runs/gpt --input wiki.test.raw --stride 512 --output wiki.json
  torchrun --nproc-per-node 4 -m paci_megatron.cli.main evaluate --load runs/gpt --input lambada.jsonl \\
      --task lambada --pipeline-model-parallel-size 2 --bf16

Megatron's flags are taken too. Those of use here:
  --load DIR                        the checkpoint (required); --ckpt-step N for another iteration than the last
  --seq-length N                    context length (default: the checkpoint's)
  --micro-batch-size N              windows at once (default: 4)
  --bf16                            compute in bf16 (default: fp32, whatever the training)
  --pipeline-model-parallel-size, --tensor-model-parallel-size   with torchrun; further processes share the windows
  --tokenizer-type, --tokenizer-model, --vocab-file, --merge-file   in place of the checkpoint's tokenizer
"""


def _parser(prog: str) -> argparse.ArgumentParser:
    usage = "%(prog)s --load DIR --input FILE [options] [Megatron's flags]"
    parser = CommandParser(prog, DESCRIPTION, EPILOG, usage)
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="FILE",
        help="the prefix of a .bin/.idx, or text as paci-megatron preprocess reads it: JSON Lines, Parquet, plain text",
    )
    # Not argparse's choices: a wrong value is refused like any other that cannot work.
    parser.add_argument("--task", default="perplexity", metavar="perplexity|lambada", help="what to measure")
    parser.add_argument("--stride", type=int, help="tokens from one window to the next (default: the context length)")
    parser.add_argument("--output", metavar="FILE", help="write the figures as JSON")
    parser.add_argument("--verbose", action="store_true", help="show what Megatron prints")
    _add_text_arguments(parser.add_argument_group("text"))
    return parser


def _add_text_arguments(group: Any) -> None:
    group.add_argument("--json-key", default="text", help="key or column that holds the text (default: text)")
    group.add_argument("--split-documents", default="file", metavar="file|line|blank-line", help="of plain text")
    group.add_argument(
        "--detokenizer",
        default="none",
        metavar="|".join(DETOKENIZERS),
        help="wikitext: undo WikiText's tokenisation first; words and bytes are still those of the original",
    )
    group.add_argument(
        "--rows",
        default="as-is",
        metavar="|".join(ROW_RULES),
        help="blank-line: join the lines of a text with a blank line, the protocol with Hugging Face's WikiText",
    )
    group.add_argument(
        "--count-words",
        metavar="|".join(WORD_RULES),
        help="what separates words (default: spaces with --detokenizer wikitext, as Megatron counts; else whitespace)",
    )
    group.add_argument(
        "--append-eod",
        action=argparse.BooleanOptionalAction,
        help="end each document with the end-of-document token (default: yes, unless the input is one text file)",
    )
    group.add_argument("--per-document", action="store_true", help="no context from one document to the next")
    group.add_argument(
        "--score-first-token", action="store_true", help="score the first token too, in the context of end-of-document"
    )
    group.add_argument(
        "--count-by-detokenizing", action="store_true", help="words and bytes of a .bin/.idx from its detokenized text"
    )


@contextlib.contextmanager
def _bar(num_windows: int) -> Iterator[Callable[[int], object]]:
    from tqdm import tqdm

    # disable=None: shown only where a person is watching.
    with tqdm(total=num_windows, unit=" windows", disable=None if _is_first_rank() else True) as bar:
        yield bar.update


def _is_first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _fail(prog: str, message: str) -> int:
    if _is_first_rank():
        # Messages of other libraries come in several lines.
        print(f"{prog}: error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return 2


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command line; 0, or 2 after one line on standard error that says what is wrong."""
    prog = prog or "paci-megatron evaluate"
    arguments, megatron_argv = _parser(prog).parse_known_args(argv)
    fields = ("json_key", "split_documents", "detokenizer", "rows", "append_eod", "per_document", "score_first_token")
    text = TextOptions(
        inputs=tuple(arguments.input),
        words=arguments.count_words,
        count_by_detokenizing=arguments.count_by_detokenizing,
        **{field: getattr(arguments, field) for field in fields},
    )
    output = Path(arguments.output) if arguments.output else None
    try:
        if output is not None and _is_first_rank():
            require_writable("--output", output)
    except UsageError as error:
        return _fail(prog, str(error))
    # Before Megatron is imported, which would log at INFO.
    logging.basicConfig(level=logging.INFO if arguments.verbose else logging.ERROR)
    # The plugin says on standard output what it replaces, which is for the figures here.
    with quiet_imports(), contextlib.redirect_stdout(sys.stdout if arguments.verbose else io.StringIO()):
        paci_megatron.install()
        from paci_megatron.evaluate.evaluator import EvaluationOptions, evaluate

    options = EvaluationOptions(text, arguments.task, arguments.stride, arguments.verbose)
    try:
        result = evaluate(options, megatron_argv, _bar)
    except (paci_megatron.ConfigError, DataError, EvaluationError) as error:
        return _fail(prog, str(error))
    if _is_first_rank():
        # Printed first: they are there even if the disk is full.
        print(table(result), flush=True)
        try:
            if output is not None:
                output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            return _fail(prog, f"--output {output}: cannot be written ({error.strerror}); the figures are above")
    return 0
