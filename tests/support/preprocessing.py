"""A small corpus, the preprocessing command in this process, and what it has written."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from paci_megatron.cli import main
from paci_megatron.data.corpus import CorpusOptions, iter_documents

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tools" / "preprocess_data.py"
VOCAB_SIZE = 320

WORDS = ["pipeline", "stage", "micro-batch", "weight", "drain", "update", "naïve", "管道", "\t{x: 1}", "", "two"]
TEXTS = [
    " ".join(WORDS[(i * j) % len(WORDS)] for j in range(3 + i % 17)) + f"\n\n    line {i}\r\nlast {i}" for i in range(60)
]


def write_jsonl(path: Path, texts: Iterable[str], key: str = "text") -> Path:
    """A JSON Lines file of documents with these texts."""
    path.write_text("".join(json.dumps({"id": 1, key: text}) + "\n" for text in texts), encoding="utf-8")
    return path


def run(*arguments: object, model: Path | None = None) -> int:
    """The command line in this process; with `model`, as a SentencePiece tokenizer."""
    tokenizer = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(model)] if model else []
    try:
        return main.run("preprocess", [*map(str, arguments), *tokenizer], "preprocess_data.py")
    except SystemExit as stop:
        assert isinstance(stop.code, int)
        return stop.code


def read(prefix: Path) -> list[list[int]]:
    """The documents of a `.bin/.idx`, read by Megatron."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(prefix))
    assert list(dataset.document_indices) == list(range(len(dataset) + 1)), "one sequence is one document"
    return [dataset[i].tolist() for i in range(len(dataset))]


def contents(directory: Path) -> dict[str, bytes]:
    """Every file below a directory."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def as_saved_dataset(directory: Path) -> None:
    """TEXTS as `datasets` saves one."""
    import datasets

    datasets.Dataset.from_dict({"text": TEXTS, "id": range(len(TEXTS))}).save_to_disk(str(directory))


def as_saved_splits(directory: Path) -> None:
    """TEXTS as the first of two splits."""
    import datasets

    train = datasets.Dataset.from_dict({"text": TEXTS})
    other = datasets.Dataset.from_dict({"text": ["not this"]})
    datasets.DatasetDict({"train": train, "other": other}).save_to_disk(str(directory))


def texts_of(*inputs: object, **options: str) -> list[str]:
    """What is read of the inputs, document by document."""
    chosen = CorpusOptions(tuple(map(str, inputs)), **options)
    return [document.text for document in iter_documents(chosen.sources(), chosen)]
