"""A checkpoint evaluated on text: Megatron's initialization, model builder and loader, without its training loop."""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from paci_megatron.config import ConfigError
from paci_megatron.data import DataError
from paci_megatron.data.tokenizers import GPT2_BPE, HUGGING_FACE, TOKENIZER_TYPES, TokenizerOptions, gpt2_files
from paci_megatron.data.training_data import check_ids_of
from paci_megatron.evaluate import corpus, lambada, report
from paci_megatron.evaluate.corpus import TextOptions
from paci_megatron.evaluate.scoring import Settings, score
from paci_megatron.evaluate.windows import Window, sliding_windows

from .arguments import evaluation_arguments

TASKS = ("perplexity", "lambada")

# Makes, from a number of windows, a context that is told of windows done.
Bar = Callable[[int], contextlib.AbstractContextManager[Callable[[int], object]]]


@dataclass(frozen=True, slots=True)
class EvaluationOptions:
    """What to evaluate on, and how. ``stride`` None: the context length. ``verbose`` lets Megatron print."""

    text: TextOptions
    task: str = "perplexity"
    stride: int | None = None
    verbose: bool = False

    @property
    def prefixes(self) -> list[str]:
        """The inputs' prefixes if they are ``.bin/.idx``."""
        return corpus.indexed_prefixes(self.text.inputs)

    @property
    def needs_tokenizer(self) -> bool:
        """Whether anything is to be tokenized."""
        return not self.prefixes or self.text.count_by_detokenizing or self.text.score_first_token

    def validate(self) -> None:
        """``ConfigError`` or ``DataError`` for the first value that cannot work with any checkpoint."""
        if self.task not in TASKS:
            raise ConfigError(f"--task {self.task}: must be one of {', '.join(TASKS)}.")
        if self.task == "lambada" and self.stride is not None:
            raise ConfigError(f"--stride {self.stride}: --task lambada scores the last word only. Remove --stride.")
        if self.task == "lambada" and self.prefixes:
            raise ConfigError(f"--input {self.prefixes[0]}: --task lambada needs text. Give a JSONL file.")
        if self.stride is not None and self.stride < 1:
            raise ConfigError(f"--stride {self.stride}: must be at least 1.")
        self.text.validate()


@dataclass(frozen=True, slots=True)
class Material:
    """Token ids cut into windows, and the counts of the report."""

    streams: list[np.ndarray]
    windows: list[Window]
    num_text_tokens: int
    num_documents: int
    num_words: int | None
    num_bytes: int | None


@contextlib.contextmanager
def _no_bar(num_windows: int) -> Iterator[Callable[[int], object]]:
    yield lambda done: None


def evaluate(options: EvaluationOptions, megatron_argv: Sequence[str], bar: Bar = _no_bar) -> dict[str, Any]:
    """Evaluate the checkpoint that Megatron's flags name; returns the figures and how they came about, on every rank.

    The plugin must be installed. ``ConfigError`` or ``DataError`` for what cannot work, before a model is built.
    """
    begin_s = time.perf_counter()
    options.validate()
    with _no_exit(options.verbose):
        args, iteration = evaluation_arguments(megatron_argv, options.prefixes, options.needs_tokenizer)
        if options.stride is not None and options.stride > args.seq_length:
            raise ConfigError(f"--stride {options.stride}: must be at most the context length, which is {args.seq_length}.")
        material = _read(options, args)
        _initialize(args)
        model = _load_model(args)
    with bar(len(material.windows)) as progress:
        settings = Settings(args.seq_length, args.micro_batch_size, predicts=options.task == "lambada")
        scores = score(model, material.streams, material.windows, settings, progress)
    num_tokens = sum(window.num_scored for window in material.windows)
    result = report.figures(float(scores.nll.sum()), num_tokens, material.num_words, material.num_bytes)
    if options.task == "lambada":
        result |= {"accuracy": float(scores.exact.mean()), "last_word_ppl": result["word_ppl"]}
    result |= {"num_text_tokens": material.num_text_tokens, "num_documents": material.num_documents}
    result |= _protocol(options, args) | {"iteration": iteration}
    return result | {"seconds": round(time.perf_counter() - begin_s, 3)}


def _protocol(options: EvaluationOptions, args: argparse.Namespace) -> dict[str, Any]:
    """How the figures come about. Null is what has no meaning for the task or the kind of input."""
    text, slides = options.text, options.task == "perplexity"
    reads_text = slides and not options.prefixes
    return {
        "task": options.task,
        "input": list(text.inputs),
        "read": corpus.describe_inputs(text) if not options.prefixes else None,
        "context": args.seq_length,
        "stride": (options.stride or args.seq_length) if slides else None,
        "rows": text.rows if reads_text else None,
        "detokenizer": text.detokenizer if reads_text else None,
        "append_eod": corpus.appends_eod(text) if reads_text else None,
        "count_words": text.word_rule,
        "per_document": text.per_document if slides else None,
        "score_first_token": text.score_first_token if slides else None,
        "load": args.load,
        "dtype": "bf16" if args.bf16 else "fp32",
        "tensor_model_parallel_size": args.tensor_model_parallel_size,
        "pipeline_model_parallel_size": args.pipeline_model_parallel_size,
        "data_parallel_size": args.data_parallel_size,
    }


@contextlib.contextmanager
def _no_exit(verbose: bool) -> Iterator[None]:
    """Keeps back what Megatron prints and warns of on the way to a model, unless ``verbose``; errors are not affected.

    ``ConfigError`` where Megatron ends the program, with what it printed last: it does so with status 0, too.
    """
    said = io.StringIO()
    with contextlib.ExitStack() as stack:
        if not verbose:
            stack.enter_context(contextlib.redirect_stdout(said))
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
        try:
            yield
        except SystemExit as stop:
            lines = said.getvalue().split("\n")
            last = next((line.strip() for line in reversed(lines) if line.strip()), "it gave no reason")
            reason = stop.code if isinstance(stop.code, str) else "see above" if verbose else last
            raise ConfigError(
                f"Megatron ended the evaluation: {reason}. Correct that, or see more with --verbose."
            ) from stop


def _read(options: EvaluationOptions, args: argparse.Namespace) -> Material:
    """The inputs as windows; ``DataError`` if they cannot be read or have tokens that the model does not know."""
    text, context = options.text, args.seq_length
    tokenizer: Any = _build_tokenizer(args) if options.needs_tokenizer else None
    num_ids = args.padded_vocab_size or getattr(tokenizer, "vocab_size", 0)
    if options.task == "lambada":
        examples = lambada.last_words(corpus.find_text(text), tokenizer, num_ids, context)
        count, num_tokens = len(examples.streams), sum(map(len, examples.streams))
        material = Material(examples.streams, examples.windows, num_tokens, count, count, examples.num_bytes)
    else:
        if options.prefixes:
            read = corpus.read_indexed(options.prefixes, text, tokenizer)
        else:
            read = corpus.read_text(text, tokenizer, num_ids)
        windows = [
            window
            for index, stream in enumerate(read.streams)
            for window in sliding_windows(index, len(stream), context, options.stride or context)
        ]
        counts = (read.num_tokens, read.num_documents, read.num_words, read.num_bytes)
        material = Material(read.streams, windows, *counts)
    largest = max(int(stream.max()) for stream in material.streams)
    check_ids_of(f"--input {' '.join(text.inputs)}", largest, args)
    return material


def _build_tokenizer(args: argparse.Namespace) -> Any:
    """Megatron's tokenizer; ``DataError`` if it cannot be made."""
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    kind, name = args.tokenizer_type, args.tokenizer_model
    if kind is None:
        raise DataError("--tokenizer-type: the checkpoint names none; give the one that the model was trained with")
    fields = ("tokenizer_type", "tokenizer_model", "vocab_file", "merge_file")
    if kind in TOKENIZER_TYPES:
        TokenizerOptions(*(getattr(args, field) for field in fields)).validate()
    if kind == HUGGING_FACE and _is_missing_folder(name):
        raise DataError(f"--tokenizer-model {name}: no such folder; give the one that the model was trained with")
    used = copy.copy(args)
    used.pad_vocab_size = False  # the checkpoint says how far
    with tempfile.TemporaryDirectory() as folder:
        if kind == GPT2_BPE:  # Megatron's own asks the Hugging Face hub
            options = TokenizerOptions(*(getattr(args, field) for field in fields))
            for file, content in gpt2_files(options).items():
                Path(folder, file).write_bytes(content)
            used.tokenizer_type, used.tokenizer_model = HUGGING_FACE, folder
            used.vocab_file = used.merge_file = None
        try:
            return build_tokenizer(used)
        except (ValueError, RuntimeError, OSError) as error:
            raise DataError(f"--tokenizer-type {kind}: cannot be loaded: {error}; check the tokenizer's files") from error


def _is_missing_folder(name: str) -> bool:
    """Whether a Hugging Face tokenizer's name is that of a folder, not on the hub, which does not exist."""
    path = Path(name).expanduser()
    in_folder = path.parent.name != "" and path.parent.is_dir()
    return (in_folder or name.startswith((".", "/", "~")) or len(path.parts) > 2) and not path.exists()


def _initialize(args: argparse.Namespace) -> None:
    """Megatron's process groups and globals, without a tokenizer."""
    from megatron.training import training
    from megatron.training.global_vars import set_global_variables

    for name, value in (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "0"), ("RANK", "0"), ("WORLD_SIZE", "1")):
        os.environ.setdefault(name, value)  # one process, without torchrun
    set_global_variables(args, build_tokenizer=False)
    training.initialize_megatron()


def _load_model(args: argparse.Namespace) -> list[torch.nn.Module]:
    """This rank's part of the checkpoint's model, as a list of one."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.argument_utils import gpt_config_from_args
    from megatron.training.checkpointing import load_checkpoint

    config = gpt_config_from_args(args)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    builder = config.get_builder_cls()(config)
    model: list[torch.nn.Module] = builder.build_distributed_models(
        pg_collection=groups, wrap_with_ddp=False, data_parallel_random_init=False
    )
    load_checkpoint(model, None, None)
    return model
