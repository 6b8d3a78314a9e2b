"""Preprocessing that is killed, fails or is interrupted leaves what was there before."""

from __future__ import annotations

import errno
import itertools
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from paci_megatron.cli import preprocess as command
from paci_megatron.data import DataError, encoding
from paci_megatron.data.corpus import Document
from paci_megatron.data.staging import Staging
from tests.support.preprocessing import TEXTS, contents, read, run, write_jsonl


def in_a_child(target: Callable[[], None]) -> int | None:
    """Exit code of a forked process: faster than a new one, which would import Megatron again."""
    process = multiprocessing.get_context("fork").Process(target=target)
    process.start()
    process.join(60)
    assert not process.is_alive()
    return process.exitcode


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_run_leaves_the_earlier_output(
    tmp_path: Path, data: Path, model: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    import psutil

    prefix, children = tmp_path / "out" / "corpus", tmp_path / "children"
    arguments = ("--output-prefix", prefix, "--workers", workers)
    assert run("--input", data, *arguments, model=model) == 0
    earlier = contents(tmp_path / "out")
    shorter = write_jsonl(tmp_path / "shorter.jsonl", TEXTS[:-1])

    def killed_late(documents: Iterable[Document]) -> Iterator[Document]:
        for i, document in enumerate(documents):
            if i == 50:
                children.write_text(" ".join(str(child.pid) for child in psutil.Process().children()))
                os.kill(os.getpid(), signal.SIGKILL)
            yield document

    with monkeypatch.context() as patch:
        patch.setattr(command, "_progress", killed_late)
        code = in_a_child(lambda: sys.exit(run("--input", shorter, *arguments, model=model)))
    assert code == -signal.SIGKILL
    after = {name: data for name, data in contents(tmp_path / "out").items() if ".partial/" not in name}
    assert after == earlier
    pids = [int(pid) for pid in children.read_text().split()]
    assert len(pids) == (workers if workers > 1 else 0)
    orphans = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    assert not psutil.wait_procs(orphans, timeout=10)[1], "workers end with their parent"

    # What the killed run left behind is not in the way of the next.
    assert run("--input", shorter, *arguments, model=model) == 0
    assert sorted(contents(tmp_path / "out")) == sorted(earlier)
    assert len(read(Path(f"{prefix}_text_document"))) == len(TEXTS) - 1


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("workers", [1, 2])
def test_a_failed_run_leaves_the_earlier_output_and_nothing_else(
    tmp_path: Path, data: Path, model: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("--input", data, "--output-prefix", tmp_path / "out" / "corpus", "--workers", workers)
    assert run(*arguments, model=model) == 0
    earlier = contents(tmp_path / "out")

    def failing(documents: Iterable[Document]) -> Iterator[Document]:
        yield from itertools.islice(documents, 50)
        raise RuntimeError("a bug")

    monkeypatch.setattr(command, "_progress", failing)
    with pytest.raises(RuntimeError, match="a bug"):
        run(*arguments, "--seed", 5, model=model)
    assert contents(tmp_path / "out") == earlier
    with pytest.raises(RuntimeError, match="a bug"):
        run("--input", data, "--output-prefix", tmp_path / "new" / "deep" / "corpus", model=model)
    assert not (tmp_path / "new").exists()


def test_a_full_disk_is_one_line_and_leaves_nothing(
    tmp_path: Path, data: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    def add_document(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(IndexedDatasetBuilder, "add_document", add_document)
    assert run("--input", data, "--output-prefix", tmp_path / "out" / "corpus", model=model) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_interrupt_from_the_keyboard(
    tmp_path: Path, data: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(documents: Iterable[Document]) -> Iterator[Document]:
        yield from itertools.islice(documents, 3)
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "_progress", interrupted)
    assert run("--input", data, "--output-prefix", tmp_path / "out" / "corpus", model=model) == 130
    assert capsys.readouterr().err == "preprocess_data.py: interrupted\n"
    assert not (tmp_path / "out").exists()


def test_two_runs_with_one_prefix(tmp_path: Path) -> None:
    def second() -> None:
        with pytest.raises(DataError, match="another run is writing it"), Staging(str(tmp_path / "out")):
            pass

    with Staging(str(tmp_path / "out")) as staging:
        staging.write("_stats.json", b"first")
        assert in_a_child(second) == 0
        staging.publish()
    assert contents(tmp_path) == {"out_stats.json": b"first"}


class Killed:
    """Stands for a worker that the kernel kills for lack of memory."""

    def __call__(self, chunk: list[Document]) -> encoding.Encoded:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


def test_a_worker_that_dies_ends_the_run() -> None:
    chunks = [[Document("x", "here", 1)]] * 10
    with pytest.raises(DataError, match="--workers 2: one of them was killed"):
        list(encoding.encode_in_order(chunks, Killed(), 2))  # type: ignore[arg-type]
