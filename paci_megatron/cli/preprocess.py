"""``paci-megatron preprocess``: text into Megatron's `.bin/.idx`, with Megatron's own tokenizers. See --help."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from paci_megatron.data import DataError
from paci_megatron.data.corpus import SPLIT_DOCUMENTS, CorpusOptions, Document
from paci_megatron.data.preprocess import PreprocessOptions, preprocess
from paci_megatron.data.tokenizers import TOKENIZER_TYPES, TRAINING_SAMPLE_BYTES, TokenizerOptions
from paci_megatron.data.training_data import split_flags

from .parser import CommandParser

DESCRIPTION = "Turns text into Megatron's .bin/.idx. Same options, same bytes, with any number of workers."

EPILOG = """\
examples:
  %(prog)s --input 'books/*.txt' --output-prefix data/books --workers 8 \\
      --train-tokenizer --vocab-size 8000 --held-out-fraction 0.02
  %(prog)s --input openwebtext --output-prefix data/owt --workers 32 --held-out-fraction 0.005 \\
      --tokenizer-type GPT2BPETokenizer --vocab-file vocab.json --merge-file merges.txt

written, all at once when everything is complete:
  PREFIX_text_document.bin/.idx, or with --held-out-fraction PREFIX_train_document and PREFIX_valid_document
  PREFIX_stats.json       documents, tokens, words and bytes of each, and the tokenizer flags to train with
  PREFIX_tokenizer.model  with --train-tokenizer
  PREFIX_tokenizer/       with GPT2BPETokenizer: the same for HuggingFaceTokenizer, which needs no network
"""


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = CommandParser(prog, DESCRIPTION, EPILOG)
    _add_corpus_arguments(parser.add_argument_group("corpus"))
    _add_tokenizer_arguments(parser.add_argument_group("tokenizer"))
    output = parser.add_argument_group("output")
    output.add_argument("--output-prefix", required=True, metavar="PREFIX", help="path that all outputs start with")
    output.add_argument(
        "--append-eod",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="end each document with the end-of-document token (default: yes)",
    )
    output.add_argument("--held-out-fraction", type=float, help="share of the documents for PREFIX_valid_document")
    output.add_argument("--seed", type=int, default=1234, help="decides which are held out (default: 1234)")
    output.add_argument("--workers", type=int, default=1, help="processes that tokenize (default: 1)")
    return parser


def _add_corpus_arguments(group: Any) -> None:
    group.add_argument(
        "--input",
        nargs="+",
        required=True,
        help="files (JSON Lines, Parquet or UTF-8 text, by what is in them; gz, bz2, xz or zst too), quoted patterns, a "
        "folder with files of one of these kinds or written by save_to_disk, or the name of a Hugging Face data set",
    )
    group.add_argument("--json-key", default="text", help="key or column that holds the text (default: text)")
    group.add_argument(
        "--split-documents",
        default="file",
        metavar="|".join(SPLIT_DOCUMENTS),
        help="a document of plain text: a file, a line, or what blank lines separate (default: file)",
    )
    group.add_argument("--dataset-config", help="configuration of a Hugging Face data set")
    group.add_argument("--dataset-split", default="train", help="split of such a data set (default: train)")


def _add_tokenizer_arguments(group: Any) -> None:
    # Not argparse's choices: an unknown type is refused like any other value that cannot work.
    group.add_argument("--tokenizer-type", metavar="TYPE", help="Megatron's name: " + ", ".join(TOKENIZER_TYPES))
    group.add_argument("--tokenizer-model", help="SentencePiece file, or Hugging Face name or directory")
    group.add_argument("--vocab-file", help="vocab.json of GPT2BPETokenizer")
    group.add_argument("--merge-file", help="merges.txt of GPT2BPETokenizer")
    group.add_argument(
        "--tokenizer-hf-no-include-special-tokens",
        action="store_true",
        help="leave out what a Hugging Face tokenizer adds around a text",
    )
    group.add_argument("--trust-remote-code", action="store_true", help="let a Hugging Face tokenizer run its code")
    group.add_argument(
        "--train-tokenizer",
        action="store_true",
        help="train a SentencePiece BPE model first, on the documents that are not held out, at most "
        f"{TRAINING_SAMPLE_BYTES >> 20} MiB of them",
    )
    group.add_argument("--vocab-size", type=int, help="number of pieces of the model to train")


def _options(arguments: argparse.Namespace) -> PreprocessOptions:
    if arguments.train_tokenizer != (arguments.vocab_size is not None):
        raise DataError("--train-tokenizer and --vocab-size: one is missing; give both, or neither")
    if arguments.tokenizer_type is None and not arguments.train_tokenizer:
        types = ", ".join(TOKENIZER_TYPES)
        raise DataError(f"--tokenizer-type is missing; give one of {types}, or --train-tokenizer")
    return PreprocessOptions(
        corpus=CorpusOptions(
            inputs=tuple(arguments.input),
            json_key=arguments.json_key,
            split_documents=arguments.split_documents,
            dataset_config=arguments.dataset_config,
            dataset_split=arguments.dataset_split,
        ),
        tokenizer=TokenizerOptions(
            tokenizer_type=arguments.tokenizer_type or "SentencePieceTokenizer",
            tokenizer_model=arguments.tokenizer_model,
            vocab_file=arguments.vocab_file,
            merge_file=arguments.merge_file,
            tokenizer_hf_no_include_special_tokens=arguments.tokenizer_hf_no_include_special_tokens,
            trust_remote_code=arguments.trust_remote_code,
        ),
        output_prefix=arguments.output_prefix,
        vocab_size=arguments.vocab_size,
        append_eod=arguments.append_eod,
        held_out_fraction=arguments.held_out_fraction,
        seed=arguments.seed,
        workers=arguments.workers,
    )


def _progress(documents: Iterable[Document]) -> Iterable[Document]:
    from tqdm import tqdm

    # disable=None: shown only where a person is watching.
    return tqdm(documents, unit=" documents", disable=None)


def _report(stats: dict[str, Any], prefix: str) -> None:
    print(f"read: {stats['read']}")
    for name, counts in stats["splits"].items():
        numbers = ", ".join(f"{value:,} {key.removeprefix('num_')}" for key, value in counts.items())
        print(f"{prefix}_{name}_document: {numbers}")
    if "text" in stats["splits"]:
        data = ["--data-path", f"{prefix}_text_document", *split_flags(stats["splits"]["text"]["num_documents"])]
    else:
        data = ["--train-data-path", f"{prefix}_train_document", "--valid-data-path", f"{prefix}_valid_document"]
    print(f"train with: {shlex.join(stats['tokenizer_flags'] + data)}")


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command line; 0, or 2 after one line on standard error that says what is wrong."""
    prog = prog or "paci-megatron preprocess"
    options = _parser(prog).parse_args(argv)
    try:
        stats = preprocess(_options(options), _progress)
    except DataError as error:
        # Messages of other libraries come in several lines.
        print(f"{prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    _report(stats, options.output_prefix)
    return 0
