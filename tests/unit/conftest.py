"""Fixtures of the tests of preprocessing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from paci_megatron.data import encoding, tokenizers
from tests.support.preprocessing import TEXTS, VOCAB_SIZE, write_jsonl


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model trained on TEXTS."""
    path = tmp_path_factory.mktemp("model") / "spm.model"
    path.write_bytes(tokenizers.train_sentencepiece(TEXTS, VOCAB_SIZE))
    return path


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Any:
    """Megatron's tokenizer for `model`."""
    return tokenizers.build_tokenizer(tokenizers.TokenizerOptions("SentencePieceTokenizer", str(model)), "spm")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """TEXTS as JSON Lines."""
    return write_jsonl(tmp_path / "corpus.jsonl", TEXTS)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks from a small corpus."""
    monkeypatch.setattr(encoding, "CHUNK_BYTES", 200)
