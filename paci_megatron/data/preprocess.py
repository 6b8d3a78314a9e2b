"""From a corpus to `.bin/.idx`: split by document, tokenize, write, and publish all or nothing.

The output depends on nothing but the options and the data: documents are numbered in reading order, the side
of each is drawn from its number and the seed, and the workers' results are taken in that order. In memory are
the chunks under way and 12 bytes of index per document; nothing else grows with the corpus.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from paci_megatron.data import DataError
from paci_megatron.data.corpus import CorpusOptions, Document, iter_documents
from paci_megatron.data.encoding import Encoder, chunked, encode_in_order
from paci_megatron.data.sources import Source, describe
from paci_megatron.data.staging import Staging
from paci_megatron.data.tokenizers import (
    GPT2_BPE,
    HUGGING_FACE,
    SENTENCEPIECE_TYPES,
    TRAINING_SAMPLE_BYTES,
    TokenizerOptions,
    build_tokenizer,
    end_of_document,
    gpt2_files,
    keyed_uniform,
    sample_documents,
    train_sentencepiece,
)

TEXT, TRAIN, VALID = "text", "train", "valid"

Progress = Callable[[Iterable[Document]], Iterable[Document]]


@dataclass(frozen=True, slots=True)
class PreprocessOptions:
    """Everything that decides the output, and `workers`, which does not.

    `vocab_size` is given exactly when a SentencePiece model is to be trained first. `held_out_fraction` is in
    (0, 1), or None for a single data set.
    """

    corpus: CorpusOptions
    tokenizer: TokenizerOptions
    output_prefix: str
    vocab_size: int | None = None
    append_eod: bool = True
    held_out_fraction: float | None = None
    seed: int = 1234
    workers: int = 1

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the data sets to write."""
        return (TEXT,) if self.held_out_fraction is None else (TRAIN, VALID)

    def split_of(self, index: int) -> str:
        """The data set of the document with this number in reading order."""
        if self.held_out_fraction is None:
            return TEXT
        return VALID if keyed_uniform(self.seed, "held out", index) < self.held_out_fraction else TRAIN

    def validate(self) -> None:
        """DataError for the first value that cannot work. Reads no data."""
        fraction = self.held_out_fraction
        if fraction is not None and not 0 < fraction < 1:
            raise DataError(f"--held-out-fraction {fraction}: must be above 0 and below 1, or left out")
        if self.workers < 1:
            raise DataError(f"--workers {self.workers}: must be at least 1")
        if self.output_prefix.endswith(("/", ".")) or not self.output_prefix:
            prefix = self.output_prefix
            raise DataError(f"--output-prefix {prefix}: must end in a name; for example {prefix}/corpus")
        if self.vocab_size is None:
            self.tokenizer.validate()
        elif self.vocab_size < 1:
            raise DataError(f"--vocab-size {self.vocab_size}: must be at least 1")
        elif self.tokenizer.tokenizer_type not in SENTENCEPIECE_TYPES:
            kind = self.tokenizer.tokenizer_type
            raise DataError(f"--train-tokenizer: trains SentencePiece, not {kind}; leave one of them out")
        elif self.tokenizer.tokenizer_model:
            model = self.tokenizer.tokenizer_model
            final = f"{self.output_prefix}_tokenizer.model"
            raise DataError(f"--tokenizer-model {model}: --train-tokenizer writes {final}; leave one out")


def preprocess(options: PreprocessOptions, progress: Progress = iter) -> dict[str, Any]:
    """Writes `PREFIX_{text,train,valid}_document.{bin,idx}` and `PREFIX_stats.json`; returns the latter.

    A trained model goes to `PREFIX_tokenizer.model`, GPT-2's vocabulary to the directory `PREFIX_tokenizer`.
    `progress` wraps each pass over the documents. DataError for what is wrong with the options or the data;
    then, as after any other exception, there is no new output and earlier ones are as they were.
    """
    options.validate()
    sources = options.corpus.sources()
    _refuse_own_output(sources, options.output_prefix)
    with Staging(options.output_prefix) as staging:
        staged, published = _make_tokenizer(options, sources, staging, progress)
        named = " ".join(options.tokenizer.training_flags())
        tokenizer = build_tokenizer(staged, named)
        eod = end_of_document(tokenizer, named) if options.append_eod else None
        encoder = Encoder(tokenizer, eod)
        writers = {name: SplitWriter(staging, f"_{name}_document", encoder.dtype) for name in options.splits}
        _write_documents(progress(iter_documents(sources, options.corpus)), encoder, options, writers)
        for name, writer in writers.items():
            if not writer.stats["num_documents"]:
                raise _empty_error(name, options)
            writer.finish()
        stats = {
            "read": describe(sources),
            "vocab_size": tokenizer.vocab_size,
            "eod": eod,
            "tokenizer_flags": published.training_flags(),
            "splits": {name: writer.stats for name, writer in writers.items()},
        }
        staging.write("_stats.json", json.dumps(stats, indent=2).encode() + b"\n")
        staging.publish()
    return stats


def _refuse_own_output(sources: list[Source], prefix: str) -> None:
    """A second run would find the vocabulary that the first has put into an input directory."""
    own = Path(f"{prefix}_tokenizer").resolve()
    for source in sources:
        if Path(source.location).resolve().is_relative_to(own):
            raise DataError(f"--input {source.location}: an output of this --output-prefix; choose another")


def _make_tokenizer(
    options: PreprocessOptions, sources: list[Source], staging: Staging, progress: Progress
) -> tuple[TokenizerOptions, TokenizerOptions]:
    """The tokenizer where it is now, and where it will be once published, which is together with the data."""
    given = options.tokenizer
    final = f"{options.output_prefix}_tokenizer"
    if given.tokenizer_type == GPT2_BPE:
        paths = [staging.write(f"_tokenizer/{name}", data) for name, data in gpt2_files(given).items()]
        made = replace(given, tokenizer_type=HUGGING_FACE, vocab_file=None, merge_file=None)
        return replace(made, tokenizer_model=str(paths[0].parent)), replace(made, tokenizer_model=final)
    if options.vocab_size is None:
        return given, given
    documents = progress(iter_documents(sources, options.corpus))
    # What is held out stays unseen by the vocabulary too.
    seen = (document for index, document in enumerate(documents) if options.split_of(index) != VALID)
    texts = sample_documents(seen, TRAINING_SAMPLE_BYTES, options.seed)
    if not any(texts):
        raise _empty_error(options.splits[0], options)
    path = staging.write("_tokenizer.model", train_sentencepiece(texts, options.vocab_size))
    return replace(given, tokenizer_model=str(path)), replace(given, tokenizer_model=f"{final}.model")


def _empty_error(split: str, options: PreprocessOptions) -> DataError:
    inputs = " ".join(options.corpus.inputs)
    if split == TEXT:
        return DataError(f"--input {inputs}: no document has any text; give at least one that has")
    drawn = f"--held-out-fraction {options.held_out_fraction} --seed {options.seed}"
    remedy = "change one of them, or add documents"
    return DataError(f"{drawn}: leaves no document with text for {split} in --input {inputs}; {remedy}")


class SplitWriter:
    """One `.bin/.idx` pair while it is written, and the counts of what is in it."""

    def __init__(self, staging: Staging, suffix: str, dtype: type[np.number]) -> None:
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

        self.stats = {"num_documents": 0, "num_tokens": 0, "num_words": 0, "num_bytes": 0}
        self._staging = staging
        self._idx = staging.path(f"{suffix}.idx")
        with staging.writing():
            self._builder = IndexedDatasetBuilder(str(staging.path(f"{suffix}.bin")), dtype=dtype)
        # Megatron's own lists take six times as much memory per document.
        self._builder.sequence_lengths = array("i")
        self._builder.document_indices = array("q", [0])

    def add(self, ids: np.ndarray, num_words: int, num_bytes: int) -> None:
        """Appends one document. DataError if the disk is full."""
        with self._staging.writing():
            self._builder.add_document(ids, [len(ids)])
        self.stats["num_documents"] += 1
        self.stats["num_tokens"] += len(ids)
        self.stats["num_words"] += num_words
        self.stats["num_bytes"] += num_bytes

    def finish(self) -> None:
        """Closes the `.bin` and writes the `.idx`. DataError if the disk is full."""
        with self._staging.writing():
            self._builder.finalize(str(self._idx))


def _write_documents(
    documents: Iterable[Document],
    encoder: Encoder,
    options: PreprocessOptions,
    writers: dict[str, SplitWriter],
) -> None:
    index = 0
    for ids, lengths, words, num_bytes in encode_in_order(chunked(documents), encoder, options.workers):
        start = 0
        for length, document_words, document_bytes in zip(lengths, words, num_bytes, strict=True):
            # A document without text is left out, but has a number, so that the others keep their side.
            if length:
                writer = writers[options.split_of(index)]
                writer.add(ids[start : start + length], document_words, document_bytes)
            start += length
            index += 1
