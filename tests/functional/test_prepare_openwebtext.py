"""The script that prepares the paper's data (examples/gpt): what it would run, and what it leaves for the training."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path

from tests.support.paper_scripts import PACI, PREPARE, bash, printed, value


def test_preparing_prints_its_commands_in_a_dry_run(tmp_path: Path) -> None:
    prefix = tmp_path / "owt"
    by_name = bash(PREPARE, DRY_RUN="1", OUTPUT_PREFIX=str(prefix), WORKERS="5")
    assert by_name.returncode == 0, by_name.stderr
    # The first is a short program, over two lines.
    assert "openai-community/gpt2" in by_name.stdout
    command = shlex.split(by_name.stdout.splitlines()[-1])
    assert value(command, "--input") == "Skylion007/openwebtext" and value(command, "--held-out-fraction") == "0.02"
    assert "--append-eod" in command and value(command, "--workers") == "5"
    assert value(command, "--vocab-file") == f"{tmp_path}/gpt2-bpe/vocab.json"
    given = {"VOCAB_FILE": "v.json", "MERGE_FILE": "m.txt"}
    copy = bash(PREPARE, "a copy/*.parquet", DRY_RUN="1", **given)
    assert copy.stdout.count("\n") == 1, "nothing to fetch"
    assert value(shlex.split(copy.stdout), "--input") == "a copy/*.parquet"
    assert not any(tmp_path.iterdir())
    for variables, message in (
        ({"VOCAB_FILE": "v.json"}, "MERGE_FILE is not set: VOCAB_FILE=v.json needs"),
        ({"DRY_RUN": "x"}, "DRY_RUN=x: must be 0 or 1."),
    ):
        done = bash(PREPARE, **{"DRY_RUN": "1", **variables})
        assert done.returncode == 2 and done.stderr.startswith(f"prepare_openwebtext.sh: error: {message}"), done.stderr


def test_prepared_data_is_what_training_reads_and_is_made_once(tmp_path: Path) -> None:
    import numpy as np

    corpus, prefix = tmp_path / "copy.jsonl", tmp_path / "owt"
    corpus.write_text("".join(json.dumps({"text": "hello " * (1 + n % 5)}) + "\n" for n in range(200)))
    vocab = {"<|endoftext|>": 10, **{piece: n for n, piece in enumerate(["h", "e", "l", "o", "Ġ", "he", "ll", "hell"])}}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nh e\nl l\nhe ll\n")
    variables = {"VOCAB_FILE": f"{tmp_path}/vocab.json", "MERGE_FILE": f"{tmp_path}/merges.txt", "WORKERS": "1"}

    def prepare(**more: str) -> subprocess.CompletedProcess[str]:
        return bash(PREPARE, str(corpus), OUTPUT_PREFIX=str(prefix), **variables, **more)

    done = prepare()
    assert done.returncode == 0, done.stderr
    stats = json.loads(Path(f"{prefix}_stats.json").read_text())
    documents = {name: split["num_documents"] for name, split in stats["splits"].items()}
    assert sum(documents.values()) == 200 and 1 <= documents["valid"] <= 12
    for split, number in documents.items():
        tokens = np.fromfile(f"{prefix}_{split}_document.bin", dtype=np.uint16)
        assert tokens[-1] == 10 and np.count_nonzero(tokens == 10) == number, "each document ends with end-of-text"
    # What training asks for by default is what is there.
    command = printed(PACI, DATA_PREFIX=str(prefix))
    for flag in ("--train-data-path", "--valid-data-path"):
        assert Path(value(command, flag) + ".idx").is_file()
    assert Path(value(command, "--tokenizer-model"), "vocab.json").is_file()

    index_cache = Path(value(command, "--data-cache-path"))
    index_cache.mkdir()
    data = Path(f"{prefix}_train_document.bin")
    before = data.stat().st_mtime_ns
    again = prepare(WORKERS_ARE="ignored")
    assert again.returncode == 0 and "already there" in again.stdout and data.stat().st_mtime_ns == before
    other = prepare(SEED="5")
    assert other.returncode == 2 and data.stat().st_mtime_ns == before
    assert f"OUTPUT_PREFIX={prefix}: holds data made by" in other.stderr and "set FORCE=1" in other.stderr
    assert index_cache.is_dir()
    forced = prepare(SEED="5", FORCE="1")
    assert forced.returncode == 0 and data.stat().st_mtime_ns != before, forced.stderr
    assert not index_cache.exists(), "an index of the data before would be used for the new"
    assert prepare(SEED="5").stdout.count("already there") == 1
