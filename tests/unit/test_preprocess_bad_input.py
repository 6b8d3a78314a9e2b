"""Preprocessing answers bad input with one line, and leaves nothing; vocabularies of other kinds."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from paci_megatron.data import DataError, corpus, tokenizers
from tests.support.preprocessing import TEXTS, as_saved_dataset, as_saved_splits, read, run, texts_of, write_jsonl


def bad_inputs(folder: Path, model: Path) -> dict[str, tuple[list[object], str]]:
    """Name of the case -> arguments, and what the line must say. All but the first two have a good tokenizer."""
    import pyarrow
    import pyarrow.parquet

    (folder / "empty.txt").touch()
    (folder / "latin.txt").write_bytes("naïve".encode("latin-1"))
    (folder / "a.txt.gz").write_bytes(b"\x1f\x8b")
    (folder / "no_json.jsonl").write_text('{"text": "a"}\n{"text": }\n')
    (folder / "list.jsonl").write_text('["text"]\n')
    (folder / "keys.jsonl").write_text('{"text": "a"}\n{"body": "b", "id": 1}\n')
    (folder / "number.jsonl").write_text('{"text": 5}\n')
    (folder / "surrogate.jsonl").write_text('{"text": "\\ud800"}\n')
    (folder / "corrupt.parquet").write_bytes(b"PAR1 not really")
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"], "id": [1]}), folder / "keys.parquet")
    (folder / "mixed").mkdir()
    (folder / "mixed" / "a.txt").touch()
    (folder / "mixed" / "a.jsonl").touch()
    (folder / "nothing").mkdir()
    as_saved_splits(folder / "splits")
    as_saved_dataset(folder / "broken")
    next((folder / "broken").glob("*.arrow")).write_bytes(b"junk")
    good = write_jsonl(folder / "good.jsonl", TEXTS[:5])
    (folder / "corrupt.model").write_text("not a model")
    no_eod = folder / "no_eod.model"
    no_eod.write_bytes(sentencepiece_without_eos())
    kind = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model"]
    training = ["--input", good, "--train-tokenizer", "--vocab-size"]

    def of(*arguments: object) -> list[object]:
        return [*kind, model, "--input", *arguments]

    return {
        "missing file": (of(folder / "none.txt"), "none.txt: no such file"),
        "missing path": (of(folder / "none" / "data"), "none/data: no such file"),
        "no match": (of(folder / "*.md"), "*.md: no file matches"),
        "named twice": (of(good, folder / "*.jsonl"), "good.jsonl is named more than once"),
        "compressed": (of(folder / "a.txt.gz"), "a.txt.gz: cannot be read: Compressed file ended"),
        "empty": (of(folder / "empty.txt"), "empty.txt: no document has any text"),
        "encoding": (of(folder / "latin.txt"), "latin.txt: not UTF-8 at byte 2; convert it"),
        "mixed directory": (of(folder / "mixed"), "mixed: holds JSON Lines and text files; say which to read"),
        "empty directory": (of(folder / "nothing"), "holds no .jsonl, .ndjson, .jsonlines, .parquet, .txt file"),
        "not JSON": (of(folder / "no_json.jsonl"), "no_json.jsonl:2: not valid JSON (Expecting value at column 10)"),
        "not an object": (of(folder / "list.jsonl"), "list.jsonl:1: a JSON list; each line must be one JSON object"),
        "wrong key": (of(folder / "keys.jsonl"), "keys.jsonl:2: no key 'text'; its keys are: body, id; name one"),
        "not text": (of(folder / "number.jsonl"), "number.jsonl:1: key 'text' holds int, not text"),
        "surrogate": (of(folder / "surrogate.jsonl"), "surrogate.jsonl:1: not text: a lone surrogate at character 0"),
        "corrupt parquet": (of(folder / "corrupt.parquet"), "corrupt.parquet: cannot be read"),
        "parquet key": (of(folder / "keys.parquet"), "keys.parquet row 1: no key 'text'; its keys are: body, id"),
        "unknown split": (of(folder / "splits", "--dataset-split", "dev"), "dev: not in"),
        "corrupt data set": (of(folder / "broken"), "broken: cannot be read"),
        "split documents": (of(good, "--split-documents", "page"), "page: must be one of file, line, blank-line"),
        "fraction": (of(good, "--held-out-fraction", "1.5"), "--held-out-fraction 1.5: must be above 0 and below 1"),
        "nothing held out": (of(good, "--held-out-fraction", "1e-9"), "leaves no document with text for valid"),
        "workers": (of(good, "--workers", "0"), "--workers 0: must be at least 1"),
        "not a number": (of(good, "--seed", "x"), "--seed: invalid int value: 'x'"),
        "unknown flag": (of(good, "--sead", "1"), "unrecognized arguments: --sead 1"),
        "unknown tokenizer": (
            ["--input", good, "--tokenizer-type", "Word"],
            "Word: unknown; must be one of SentencePieceTokenizer,",
        ),
        "no tokenizer": (["--input", good], "--tokenizer-type is missing"),
        "no model": (["--input", good, *kind[:2]], "--tokenizer-model is missing"),
        "missing model": (["--input", good, *kind, folder / "no.model"], "no.model: no such file"),
        "corrupt model": (["--input", good, *kind, folder / "corrupt.model"], "corrupt.model: cannot be loaded"),
        "no eod": (["--input", good, *kind, no_eod], "no_eod.model: has no end-of-document token"),
        "vocabulary too large": ([*training, 9999], "--vocab-size 9999: SentencePiece cannot train it: Vocabulary"),
        "vocabulary too small": ([*training, 20], "--vocab-size 20: SentencePiece cannot train it: the text has so many"),
        "vocabulary of nothing": (
            ["--input", folder / "empty.txt", *training[2:], 300],
            "empty.txt: no document has any text",
        ),
        "size alone": (of(good, "--vocab-size", "300"), "one is missing; give both, or neither"),
        "train and use": ([*training, 300, *kind, model], "leave one out"),
        "train another": ([*training, 300, "--tokenizer-type", "GPT2BPETokenizer"], "trains SentencePiece, not GPT2"),
        "no vocabulary": (["--input", good, "--tokenizer-type", "GPT2BPETokenizer"], "--vocab-file is missing"),
    }


def sentencepiece_without_eos() -> bytes:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, vocab_size=100, model_type="char", eos_id=-1,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    cases = bad_inputs(tmp_path / "in", model)
    capsys.readouterr()
    for name, (arguments, said) in cases.items():
        code = run("--output-prefix", tmp_path / "out" / "corpus", *arguments)
        out, err = capsys.readouterr()
        assert code == 2, name
        assert out == "", name
        assert err.startswith("preprocess_data.py: error: "), name
        assert err.count("\n") == 1, (name, err)
        assert said in err, (name, err)
        assert not (tmp_path / "out").exists(), name


def test_output_that_cannot_be_written(tmp_path: Path, data: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "taken_stats.json").mkdir()
    (tmp_path / "taken_text_document.idx").write_text("earlier")
    cases = {
        "a file is in the way": (tmp_path / "file" / "out", "Not a directory; choose a writable directory"),
        "no name": (f"{tmp_path}/new/", "/: must end in a name"),
        "a directory is in the way": (tmp_path / "taken", "taken_stats.json: it is a directory"),
    }
    before = sorted(tmp_path.iterdir())
    for name, (prefix, said) in cases.items():
        assert run("--input", data, "--output-prefix", prefix, model=model) == 2, name
        err = capsys.readouterr().err
        assert said in err and err.count("\n") == 1, (name, err)
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "taken_text_document.idx").read_text() == "earlier"


def test_a_document_that_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "MAX_DOCUMENT_BYTES", 100)
    (tmp_path / "a.txt").write_text("x" * 60 + "\n" + "é" * 30)
    (tmp_path / "b.txt").write_text("x\n" + "y" * 101)
    (tmp_path / "c.txt").write_text("x" * 99 + "\n\n" + "x" * 99)
    for name, split_documents, where in (
        ("a.txt", "file", "a.txt"),
        ("a.txt", "blank-line", "a.txt:1"),
        ("b.txt", "line", "b.txt:2"),
    ):
        with pytest.raises(DataError) as raised:
            texts_of(tmp_path / name, split_documents=split_documents)
        assert str(raised.value).startswith(f"{tmp_path}/{where}: a document of more than 0 MiB; cut it")
    assert len(texts_of(tmp_path / "c.txt", split_documents="blank-line")) == 2


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load_dataset(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach the hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match="--input openwebtext: cannot be read: Couldn't reach the hub; check"):
        texts_of("openwebtext")


def test_transformers_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="HuggingFaceTokenizer: needs transformers; pip install transformers"):
        tokenizers.TokenizerOptions("HuggingFaceTokenizer", "gpt2").validate()


# GPT-2 BPE and Hugging Face


def write_gpt2(folder: Path) -> tuple[Path, Path]:
    """A vocabulary of the 256 bytes, "he", "ll", "hell" and the end-of-text token, in GPT-2's two files."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    pieces = [*bytes_to_unicode().values(), "he", "ll", "hell", "<|endoftext|>"]
    vocab, merges = folder / "v.json", folder / "m.txt"
    vocab.write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    merges.write_text("#version: 0.2\nh e\nl l\nhe ll\n")
    return vocab, merges


def test_gpt2_bpe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers", reason="Megatron's GPT2BPETokenizer needs it")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    vocab, merges = write_gpt2(tmp_path)
    (tmp_path / "a.txt").write_text("hello hé")
    gpt2 = ("--tokenizer-type", "GPT2BPETokenizer", "--vocab-file", vocab, "--merge-file", merges)
    assert run("--input", tmp_path / "a.txt", "--output-prefix", tmp_path / "out", *gpt2) == 0
    pieces = list(json.loads(vocab.read_text()))
    eod = pieces.index("<|endoftext|>")
    expected = [[*map(pieces.index, ["hell", "o", "Ġ", "h", "Ã", "©"]), eod]]
    assert read(tmp_path / "out_text_document") == expected

    # The flags it prints are for what it has written, and give the same again.
    stats = json.loads((tmp_path / "out_stats.json").read_text())
    assert (stats["vocab_size"], stats["eod"]) == (len(pieces), eod)
    flags = stats["tokenizer_flags"]
    assert flags == ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", f"{tmp_path}/out_tokenizer"]
    assert run("--input", tmp_path / "a.txt", "--output-prefix", tmp_path / "again", *flags) == 0
    assert read(tmp_path / "again_text_document") == expected


def test_bad_gpt2_files(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers", reason="Megatron's GPT2BPETokenizer needs it")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    vocab, merges = write_gpt2(tmp_path)
    vocab.write_text("{")
    text = tmp_path / "a.txt"
    text.write_text("hello")
    gpt2 = ("--tokenizer-type", "GPT2BPETokenizer", "--vocab-file", vocab, "--merge-file")
    huggingface = ("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model")
    cases: list[tuple[tuple[object, ...], str]] = [
        ((*gpt2, merges), f"--vocab-file {vocab} --merge-file {merges}: cannot be loaded"),
        ((*gpt2, tmp_path / "none"), "none: no such file"),
        ((*huggingface, tmp_path / "none"), "none: cannot be loaded"),
    ]
    for arguments, said in cases:
        assert run("--input", text, "--output-prefix", tmp_path / "out" / "a", *arguments) == 2
        err = capsys.readouterr().err
        assert said in err and err.count("\n") == 1, err
        assert not (tmp_path / "out").exists()


def test_own_vocabulary_is_not_read_as_text(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out_tokenizer").mkdir()
    (tmp_path / "out_tokenizer" / "merges.txt").write_text("a b")
    assert run("--input", tmp_path, "--output-prefix", tmp_path / "out", model=model) == 2
    assert "merges.txt: an output of this --output-prefix" in capsys.readouterr().err
