"""The tokenizer of a corpus, trained here or given, and built by Megatron so that training has the same ids.

Importing this module does not import Megatron, which takes seconds; `build_tokenizer` does.
"""

from __future__ import annotations

import contextlib
import heapq
import importlib.util
import io
import json
import logging
import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from paci_megatron.data import DataError
from paci_megatron.data.corpus import Document

SENTENCEPIECE_TYPES = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")
GPT2_BPE = "GPT2BPETokenizer"
HUGGING_FACE = "HuggingFaceTokenizer"
TOKENIZER_TYPES = (*SENTENCEPIECE_TYPES, GPT2_BPE, HUGGING_FACE)

# SentencePiece keeps its training text in memory, so it gets a sample of at most this size.
TRAINING_SAMPLE_BYTES = 64 << 20
# SentencePiece skips longer lines without a word; ours are cut to this many characters, at most 4 bytes each.
_TRAINING_LINE_CHARACTERS = 2000


@dataclass(frozen=True, slots=True)
class TokenizerOptions:
    """Megatron's tokenizer flags of the same names."""

    tokenizer_type: str
    tokenizer_model: str | None = None
    vocab_file: str | None = None
    merge_file: str | None = None
    tokenizer_hf_no_include_special_tokens: bool = False
    trust_remote_code: bool = False

    def validate(self) -> None:
        """DataError for an unknown type, a flag that is missing, or a file that does not exist."""
        kind = self.tokenizer_type
        if kind not in TOKENIZER_TYPES:
            raise DataError(f"--tokenizer-type {kind}: unknown; must be one of {', '.join(TOKENIZER_TYPES)}")
        if kind == GPT2_BPE:
            _require_file("--vocab-file", self.vocab_file, kind)
            _require_file("--merge-file", self.merge_file, kind)
        elif not self.tokenizer_model:
            raise DataError(f"--tokenizer-model is missing: {kind} needs it; name the model")
        elif kind in SENTENCEPIECE_TYPES:
            _require_file("--tokenizer-model", self.tokenizer_model, kind)
        if kind in (GPT2_BPE, HUGGING_FACE) and importlib.util.find_spec("transformers") is None:
            raise DataError(f"--tokenizer-type {kind}: needs transformers; pip install transformers")

    def training_flags(self) -> list[str]:
        """The flags with which Megatron trains on a corpus that was tokenized with these options."""
        flags = []
        for name in ("tokenizer_type", "tokenizer_model", "vocab_file", "merge_file"):
            if getattr(self, name):
                flags += [_flag(name), getattr(self, name)]
        switches = ("tokenizer_hf_no_include_special_tokens", "trust_remote_code")
        return flags + [_flag(name) for name in switches if getattr(self, name)]


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _require_file(flag: str, value: str | None, kind: str) -> None:
    if not value:
        raise DataError(f"{flag} is missing: {kind} needs it; name the file")
    if not Path(value).is_file():
        raise DataError(f"{flag} {value}: no such file, and {kind} needs it; correct the path")


def megatron_arguments(options: TokenizerOptions) -> SimpleNamespace:
    """What Megatron's builder reads: `options`, and Megatron's default for every other flag."""
    return SimpleNamespace(
        tokenizer_type=options.tokenizer_type,
        tokenizer_model=options.tokenizer_model,
        vocab_file=options.vocab_file,
        merge_file=options.merge_file,
        tokenizer_hf_no_include_special_tokens=options.tokenizer_hf_no_include_special_tokens,
        trust_remote_code=options.trust_remote_code,
        tokenizer_hf_no_use_fast=False,
        tokenizer_sentencepiece_legacy=False,
        tokenizer_sentencepiece_ignore_extra_whitespaces=True,
        special_tokens=None,
        chat_template=None,
        metadata_path=None,
        # Padding depends on how training is parallelized, and changes no id.
        pad_vocab_size=False,
    )


@contextlib.contextmanager
def quiet_imports() -> Iterator[None]:
    """Silences what Megatron and torch say, on import, of optional packages; none is needed here."""
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def build_tokenizer(options: TokenizerOptions, named: str) -> Any:
    """Megatron's tokenizer; DataError, which calls it `named`, if its files are not what the type needs."""
    with quiet_imports():
        from megatron.core.tokenizers.utils import build_tokenizer as megatron

        # It would warn of documents longer than the context of the model that the tokenizer was made for.
        logging.getLogger("transformers.tokenization_utils_base").setLevel(logging.ERROR)
        try:
            return megatron.build_tokenizer(megatron_arguments(options))
        except (ValueError, RuntimeError, OSError) as error:
            raise DataError(f"{named}: cannot be loaded: {error}; check the file, or the name") from error


def end_of_document(tokenizer: Any, named: str) -> int:
    """The id that Megatron takes as the end of a document; DataError if the tokenizer, `named`, has none."""
    eod = tokenizer.eod
    # SentencePiece says -1 for a model trained without `</s>`, a Hugging Face tokenizer None.
    if eod is None or eod < 0:
        raise DataError(f"{named}: has no end-of-document token; use another tokenizer, or --no-append-eod")
    return eod


def gpt2_files(options: TokenizerOptions) -> dict[str, bytes]:
    """The files, by name, of a directory with which `HuggingFaceTokenizer` reads the given GPT-2 vocabulary.

    Megatron's GPT2BPETokenizer asks the Hugging Face hub for `gpt2`: without a network it fails, and with
    transformers 5 it takes the hub's vocabulary instead of the given files. The directory has the same ids
    and neither problem. DataError if a file cannot be read.
    """
    assert options.vocab_file and options.merge_file, "validated before"
    return {
        "config.json": json.dumps({"model_type": "gpt2"}).encode() + b"\n",
        "vocab.json": _read_bytes("--vocab-file", options.vocab_file),
        "merges.txt": _read_bytes("--merge-file", options.merge_file),
    }


def _read_bytes(flag: str, path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{flag} {path}: cannot be read: {error.strerror}; check its permissions") from error


def keyed_uniform(seed: int, purpose: str, index: int) -> float:
    """A number in [0, 1) that depends on nothing but its arguments."""
    digest = blake2b(f"{purpose}:{seed}:{index}".encode(), digest_size=8).digest()
    # A float holds 53 bits; with more, the last values would round up to 1.
    return (int.from_bytes(digest) >> 11) / 2**53


def sample_documents(documents: Iterable[Document], max_bytes: int, seed: int) -> list[str]:
    """The texts of a uniform sample of `documents`, in their order, of at most `max_bytes` (or one document).

    One pass that holds nothing but the sample: each document draws a number, and the lowest numbers stay.
    """
    heap: list[tuple[float, int, Document]] = []
    size = 0
    for index, document in enumerate(documents):
        heapq.heappush(heap, (-keyed_uniform(seed, "sample", index), index, document))
        size += document.num_bytes
        while size > max_bytes and len(heap) > 1:
            size -= heapq.heappop(heap)[2].num_bytes
    return [document.text for _, _, document in sorted(heap, key=lambda entry: entry[1])]


def train_sentencepiece(texts: Iterable[str], vocab_size: int) -> bytes:
    """A SentencePiece BPE model of exactly `vocab_size` pieces; DataError if the texts do not allow that.

    Every text comes back from it as it was (no normalization, unknown characters as bytes, runs of spaces kept), but for the
    symbol U+2581, which SentencePiece writes for a space and gives back as one. It has `</s>`, id 2, which Megatron takes as
    the end of a document. The same texts give the same bytes.
    """
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_training_lines(texts),
            model_writer=model,
            vocab_size=vocab_size,
            # On 12 MB of source code: 20 times faster to train than unigram, the default, and fewer tokens.
            model_type="bpe",
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            max_sentence_length=4 * _TRAINING_LINE_CHARACTERS,
            # The model may depend on the number of threads, which must not depend on the machine.
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        # "INTERNAL: file(line) [condition] text": only the text is for a user.
        reason = str(error).rpartition("] ")[2] or "there is no text to train on"
        if (few := re.search(r"required_chars\. \d+ vs (\d+)", reason)) is not None:
            # Its own remedy is a flag that is not here: with fewer characters the vocabulary would not be complete.
            reason = f"the text has so many different characters that it must be at least {few[1]}"
        raise DataError(f"--vocab-size {vocab_size}: SentencePiece cannot train it: {reason}") from error
    return model.getvalue()


def _training_lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for line in text.split("\n"):
            for start in range(0, len(line), _TRAINING_LINE_CHARACTERS):
                yield line[start : start + _TRAINING_LINE_CHARACTERS]
