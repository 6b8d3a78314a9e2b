"""What is to be scored, as token ids, with the words and bytes that its loss is divided by."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from paci_megatron.data import DataError
from paci_megatron.data.corpus import SPLIT_DOCUMENTS, CorpusOptions, Document, iter_documents
from paci_megatron.data.encoding import token_ids
from paci_megatron.data.sources import Source, describe
from paci_megatron.data.tokenizers import end_of_document

from .text import DETOKENIZERS, ROW_RULES, WORD_RULES, arrange_rows, count_words, detokenizer

Progress = Callable[[Iterable[Document]], Iterable[Document]]


@dataclass(frozen=True, slots=True)
class TextOptions:
    """How inputs become token ids and counts. ``append_eod`` None: see :func:`appends_eod`. ``words`` None: ``spaces`` with
    the WikiText detokenizer, else ``whitespace``.
    """

    inputs: tuple[str, ...]
    json_key: str = "text"
    split_documents: str = "file"
    detokenizer: str = "none"
    rows: str = "as-is"
    words: str | None = None
    append_eod: bool | None = None
    per_document: bool = False
    score_first_token: bool = False
    count_by_detokenizing: bool = False

    @property
    def word_rule(self) -> str:
        """The word rule in use."""
        return self.words or ("spaces" if self.detokenizer == "wikitext" else "whitespace")

    def validate(self) -> None:
        """``DataError`` for the first value that is none of those allowed."""
        for flag, value, allowed in (
            ("--split-documents", self.split_documents, SPLIT_DOCUMENTS),
            ("--detokenizer", self.detokenizer, DETOKENIZERS),
            ("--rows", self.rows, ROW_RULES),
            ("--count-words", self.word_rule, WORD_RULES),
        ):
            if value not in allowed:
                raise DataError(f"{flag} {value}: must be one of {', '.join(allowed)}")


@dataclass
class Corpus:
    """Token ids by stream, each at least 2 (the first is context only), and counts; words and bytes are None if unknown.

    ``num_tokens`` are those of the text, scored or not.
    """

    streams: list[np.ndarray]
    num_tokens: int
    num_documents: int
    num_words: int | None
    num_bytes: int | None


def indexed_prefixes(inputs: Sequence[str]) -> list[str]:
    """The inputs as prefixes of ``.bin/.idx`` if they are that; ``DataError`` if some are and some are not."""
    prefixes = [re.sub(r"\.(bin|idx)$", "", value) for value in inputs]
    indexed = [prefix for prefix in prefixes if Path(f"{prefix}.idx").is_file() or Path(f"{prefix}.bin").is_file()]
    if indexed and len(indexed) != len(inputs):
        text = next(value for value, prefix in zip(inputs, prefixes, strict=True) if prefix not in indexed)
        raise DataError(f"--input: {indexed[0]} is a .bin/.idx and {text} is text; evaluate one after the other")
    return indexed


def find_text(options: TextOptions) -> Iterable[Document]:
    """The documents of text inputs, lazily; ``DataError`` if one is missing or of no known kind."""
    corpus, sources = _sources(options)
    return iter_documents(sources, corpus)


def _sources(options: TextOptions) -> tuple[CorpusOptions, list[Source]]:
    corpus = CorpusOptions(inputs=options.inputs, json_key=options.json_key, split_documents=options.split_documents)
    sources = corpus.sources()
    for source in sources:
        if source.kind == "hub":
            raise DataError(f"--input {source.location}: no such file, nor a {source.location}.idx; correct the path")
    return corpus, sources


def describe_inputs(options: TextOptions) -> str:
    """How many files of which kind are read as text."""
    return describe(_sources(options)[1])


def appends_eod(options: TextOptions) -> bool:
    """Whether documents end with the end-of-document token, as in training; by default if they are not one text file."""
    if options.append_eod is not None:
        return options.append_eod
    _, sources = _sources(options)
    return options.split_documents != "file" or [source.kind for source in sources] != ["text"]


def read_text(options: TextOptions, tokenizer: Any, num_ids: int, progress: Progress = iter) -> Corpus:
    """Text inputs, tokenized. Words and bytes are those of the text as it is, before it is detokenized.

    The model has ``num_ids`` token ids. ``DataError`` if an input cannot be read or has other ids, or there is nothing to
    score.
    """
    appends = appends_eod(options)
    eod = end_of_document(tokenizer, "the tokenizer") if appends or options.score_first_token else None
    undo = detokenizer(options.detokenizer)
    documents: list[np.ndarray] = []
    num_words = num_bytes = 0
    for document in progress(find_text(options)):
        ids = token_ids(tokenizer, undo(arrange_rows(document.text, options.rows)), document.origin, num_ids)
        if ids and eod is not None and appends and ids[-1] != eod:
            ids.append(eod)
        if ids:
            documents.append(np.array(ids, dtype=np.int32))
        num_words += count_words(document.text, options.word_rule)
        num_bytes += document.num_bytes
    return _corpus(documents, options, eod, num_words, num_bytes)


def read_indexed(prefixes: Sequence[str], options: TextOptions, tokenizer: Any = None) -> Corpus:
    """All documents of ``.bin/.idx`` files, in order, with the tokens as stored.

    Words and bytes come from ``PREFIX_stats.json`` where paci-megatron preprocess has left it, or if
    ``count_by_detokenizing``, from the detokenized documents; otherwise they are unknown. ``tokenizer`` is needed for the
    latter, and for ``score_first_token``.
    """
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    documents: list[np.ndarray] = []
    counts: list[tuple[int, int] | None] = []
    for prefix in prefixes:
        dataset = IndexedDataset(prefix)
        ends = dataset.document_indices
        parts = [
            np.concatenate([dataset[i] for i in range(begin, end)]) for begin, end in itertools.pairwise(ends) if end > begin
        ]
        documents += parts
        num_tokens = sum(map(len, parts))
        if options.count_by_detokenizing:
            counts.append(_detokenized_counts(parts, tokenizer, options))
        else:
            counts.append(_recorded_counts(prefix, num_tokens))
    eod = end_of_document(tokenizer, "the tokenizer") if options.score_first_token else None
    known = [pair for pair in counts if pair is not None]
    if len(known) < len(counts):
        return _corpus(documents, options, eod, None, None)
    return _corpus(documents, options, eod, sum(words for words, _ in known), sum(size for _, size in known))


def _corpus(
    documents: list[np.ndarray], options: TextOptions, eod: int | None, num_words: int | None, num_bytes: int | None
) -> Corpus:
    """The documents as one stream, or as one each. ``DataError`` if nothing can be scored."""
    num_tokens = sum(map(len, documents))
    streams = documents if options.per_document or not documents else [np.concatenate(documents)]
    if options.score_first_token:
        streams = [np.concatenate([np.array([eod], dtype=stream.dtype), stream]) for stream in streams]
    streams = [stream for stream in streams if len(stream) > 1]
    if not streams:
        inputs = " ".join(options.inputs)
        raise DataError(f"--input {inputs}: has no token that another precedes, so nothing can be scored; give more text")
    return Corpus(streams, num_tokens, len(documents), num_words, num_bytes)


def _recorded_counts(prefix: str, num_tokens: int) -> tuple[int, int] | None:
    """Words and bytes that preprocessing has recorded of this split, None if it has not, or if it was of other data."""
    name = re.fullmatch(r"(.*)_(text|train|valid)_document", prefix, re.DOTALL)
    path = Path(f"{name[1]}_stats.json") if name else None
    if name is None or path is None or not path.is_file():
        return None
    try:
        split = json.loads(path.read_text(encoding="utf-8"))["splits"][name[2]]
        return (split["num_words"], split["num_bytes"]) if split["num_tokens"] == num_tokens else None
    except (ValueError, KeyError, TypeError):
        return None


def _detokenized_counts(documents: Sequence[np.ndarray], tokenizer: Any, options: TextOptions) -> tuple[int, int] | None:
    """Words and bytes of the documents' texts, without end-of-document tokens; None if tokenizing them differs."""
    eod = tokenizer.eod
    num_words = num_bytes = 0
    for document in documents:
        ids = document.tolist()
        while ids and ids[-1] == eod:
            ids.pop()
        text = tokenizer.detokenize(ids) if ids else ""
        if (tokenizer.tokenize(text) if text else []) != ids:
            return None
        num_words += count_words(text, options.word_rule)
        num_bytes += len(text.encode())
    return num_words, num_bytes
