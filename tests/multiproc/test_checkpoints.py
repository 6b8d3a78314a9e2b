"""A run that is stopped or killed and resumed is, bit for bit, one that never was; and its checkpoints are Megatron's."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.support import interruptions
from tests.support.helpers import (
    PACI,
    GetPool,
    arguments,
    assert_same_bits,
    assert_same_weights,
    emulated,
    slow,
    without,
)
from tests.support.jobs import TrainingResult
from tests.support.pool import JobError

DISTRIBUTED_OPTIMIZER = ("--use-distributed-optimizer",)
LAYER_WISE = (*DISTRIBUTED_OPTIMIZER, "--optimizer", "muon", "--bf16")
RESHARDABLE = (*DISTRIBUTED_OPTIMIZER, "--dist-ckpt-optim-fully-reshardable")
ASYNCHRONOUS = ("--async-save", "--async-strategy", "mcore")
WITHOUT_DROPOUT = ["--attention-dropout", "0", "--hidden-dropout", "0"]
# What the plugin sets on a machine without CUDA, for Megatron without the plugin.
ON_CPU = [
    *("--distributed-backend", "gloo", "--transformer-impl", "local", "--attention-backend", "unfused"),
    *("--no-gradient-accumulation-fusion", "--no-masked-softmax-fusion", "--no-bias-gelu-fusion"),
    *("--no-bias-dropout-fusion", "--no-persist-layer-norm", "--no-rope-fusion", "--no-bias-swiglu-fusion"),
]

NeverStopped = Callable[..., list[TrainingResult]]


def nine_iterations(corpus: str, num_stages: int, *more: str, dp: int = 1, a: int = 2) -> list[str]:
    """A run that saves after iterations 3, 6 and 9, evaluates after 5 and 9, and has a learning rate with a history."""
    schedule = ["--lr-decay-style", "cosine", "--lr-warmup-iters", "2", "--eval-interval", "5", "--save-interval", "3"]
    return arguments(corpus, num_stages, a, *schedule, *more, iters=9, dp=dp)


def at(folder: Path) -> list[str]:
    """Load from ``folder`` what is there, and save to it."""
    return ["--save", str(folder), "--load", str(folder)]


@pytest.fixture(scope="module")
def never_stopped(pool: GetPool, corpus: str, tmp_path_factory: pytest.TempPathFactory) -> NeverStopped:
    """``never_stopped(num_stages, *more, dp=1)``: the results of a paci run from start to end. Each is made once."""
    done: dict[Any, list[TrainingResult]] = {}

    def run(num_stages: int, *more: str, dp: int = 1) -> list[TrainingResult]:
        key = (num_stages, more, dp)
        if key not in done:
            argv = [*nine_iterations(corpus, num_stages, *more, dp=dp), *PACI]
            done[key] = pool(num_stages * dp).run("train", argv=[*argv, *at(tmp_path_factory.mktemp("never_stopped"))])
            assert len(done[key][-1].losses) == 9
            assert len(done[key][-1].evaluations) == 3, "after 5, after 9, and on the test set after 9"
        return done[key]

    return run


def assert_is_the_rest_of(whole: list[TrainingResult], part: list[TrainingResult], iteration: int) -> None:
    """``part``, resumed after ``iteration``, is what ``whole`` did from there."""
    evaluations_before = 1 if iteration >= 5 else 0
    for rank, (all_of_it, rest) in enumerate(zip(whole, part, strict=True)):
        assert rest.losses == all_of_it.losses[iteration:], f"rank {rank}"
        assert rest.evaluations == all_of_it.evaluations[evaluations_before:], f"rank {rank}"
    assert_same_weights([result.weights for result in part], [result.weights for result in whole])


@pytest.mark.parametrize(
    ("num_stages", "dp", "more"),
    [
        pytest.param(2, 1, (), id="2-stages"),
        pytest.param(4, 1, (), id="4-stages"),
        pytest.param(2, 2, DISTRIBUTED_OPTIMIZER, id="distributed-optimizer"),
        pytest.param(2, 2, LAYER_WISE, id="layer-wise"),
        *slow((2, 1, ASYNCHRONOUS), (2, 2, (*RESHARDABLE, "--bf16")), ids=("asynchronous-save", "reshardable-bf16")),
    ],
)
def test_stopped_and_resumed_is_never_stopped(
    pool: GetPool, corpus: str, never_stopped: NeverStopped, tmp_path: Path, num_stages: int, dp: int, more: tuple[str, ...]
) -> None:
    whole = never_stopped(num_stages, *more, dp=dp)
    argv = [*nine_iterations(corpus, num_stages, *more, dp=dp), *PACI, *at(tmp_path)]
    workers = pool(num_stages * dp)
    stopped = workers.run("train", argv=[*argv, "--exit-interval", "6"])
    assert {result.exit_code for result in stopped} == {0}
    assert stopped[-1].losses == whole[-1].losses[:6]
    assert_is_the_rest_of(whole, workers.run("train", argv=argv), iteration=6)


@pytest.mark.parametrize("emulates", [True, *slow((False,), ids=("v",))])
def test_several_stages_of_a_process_with_a_tied_embedding_and_shared_optimizer_states(
    pool: GetPool, corpus: str, tmp_path: Path, emulates: bool
) -> None:
    """Emulated ones are saved as by processes of their own."""
    argv = nine_iterations(corpus, 2, *DISTRIBUTED_OPTIMIZER, "--pipeline-schedule", "paci" if emulates else "paci-v", dp=2)
    argv.remove("--untie-embeddings-and-output-weights")
    argv = [*argv, *at(tmp_path), "--ckpt-step", "6"]
    workers, several = (pool(2), emulated(argv)) if emulates else (pool(4), argv)
    whole = workers.run("train", argv=without(several, "--ckpt-step"))
    resumed = workers.run("train", argv=several)
    assert [result.losses for result in resumed] == [result.losses[6:] for result in whole]
    if emulates:
        assert pool(4).run("train", argv=argv)[-1].losses == whole[-1].losses[6:]


@pytest.mark.parametrize(
    ("point", "rank", "last", "num_stages"),
    [
        ("half a shard", 1, 3, 2),
        ("all but the tracker", 0, 3, 2),
        ("in flight", 1, 6, 2),
        *slow(("all but the index", 0, 3, 2), ("saved", 0, 6, 2), ("in flight", 2, 6, 4)),
    ],
)
def test_killed_and_resumed_is_never_stopped(
    pool: GetPool,
    corpus: str,
    never_stopped: NeverStopped,
    tmp_path: Path,
    point: str,
    rank: int,
    last: int,
    num_stages: int,
) -> None:
    """``last`` is the iteration of the last complete checkpoint when ``rank`` is killed at ``point``."""
    whole = never_stopped(num_stages)
    folder, marker = tmp_path / "checkpoints", tmp_path / "killed"
    argv = [*nine_iterations(corpus, num_stages), *PACI, *at(folder)]
    with pytest.raises(JobError):
        pool(num_stages).run("train", argv=argv, within=partial(interruptions.killed, point, rank, str(marker)))
    assert marker.read_text() == point
    assert (folder / "latest_checkpointed_iteration.txt").read_text() == str(last)
    assert (folder / "iter_0000006").is_dir()

    assert_is_the_rest_of(whole, pool(num_stages).run("train", argv=argv), iteration=last)
    # Where it had been torn the checkpoint has been written again.
    again = pool(num_stages).run("train", argv=[*argv, "--ckpt-step", "6"])
    assert_is_the_rest_of(whole, again, iteration=6)


def test_a_paci_checkpoint_continues_in_stock_megatron(pool: GetPool, corpus: str, tmp_path: Path) -> None:
    workers, argv = pool(2), nine_iterations(corpus, 2)
    paci = workers.run("train", argv=[*argv, *PACI, *at(tmp_path)])
    load = ["--load", str(tmp_path), "--ckpt-step", "6"]
    stock = workers.run("train", argv=[*argv, *ON_CPU, *load], plugin=False)
    assert len(stock[-1].losses) == 3
    assert stock[-1].losses[0] == paci[-1].losses[6], "the first window has seen no update, under either schedule"
    assert_same_bits(stock, workers.run("train", argv=[*argv, *load]))
    for file in tmp_path.rglob("*"):
        assert file.is_dir() or b"paci_megatron" not in file.read_bytes(), f"{file} needs the plugin to be read"


def test_a_stock_checkpoint_continues_under_paci(pool: GetPool, corpus: str, tmp_path: Path) -> None:
    workers, argv = pool(2), nine_iterations(corpus, 2)
    workers.run("train", argv=[*argv, *ON_CPU, *at(tmp_path)], plugin=False)
    load = ["--load", str(tmp_path), "--ckpt-step", "3"]
    stock = workers.run("train", argv=[*argv, *ON_CPU, *load], plugin=False)
    drained = workers.run("train", argv=[*argv, *load, *PACI, "--paci-drain-interval", "1"])
    assert len(stock[-1].losses) == 6
    assert_same_bits(stock, drained)
    paci = workers.run("train", argv=[*argv, *load, *PACI])
    assert paci[-1].losses[0] == stock[-1].losses[0]
    assert paci[-1].losses[1] != stock[-1].losses[1], "paci runs ahead"


@pytest.mark.parametrize("more", [(), *slow((RESHARDABLE,), ids=("distributed-optimizer",))])
def test_a_checkpoint_loads_at_other_sizes(pool: GetPool, corpus: str, tmp_path: Path, more: tuple[str, ...]) -> None:
    def argv(num_stages: int, tp: int = 1) -> list[str]:
        # Megatron pads the vocabulary to a multiple of this times the size, and each padding counts in the loss.
        vocabulary = ["--make-vocab-size-divisible-by", str(128 // tp), "--tensor-model-parallel-size", str(tp)]
        return [*nine_iterations(corpus, num_stages), *WITHOUT_DROPOUT, *vocabulary, *more]

    whole = pool(2).run("train", argv=[*argv(2), *PACI, *at(tmp_path)])
    # Without dropout 1F1B-flush is the same at any size, and so tells whether the optimizer's state is there.
    after_6 = ["--load", str(tmp_path), "--ckpt-step", "6"]
    continued = pool(2).run("train", argv=[*argv(2), *after_6])[-1]
    for num_stages, tp, schedule in ((2, 2, PACI), (4, 1, PACI), (1, 2, []), (1, 1, [])):
        workers = pool(num_stages * tp)
        loaded = workers.run("train", argv=[*argv(num_stages, tp), *schedule, "--load", str(tmp_path)])[-1]
        further = workers.run("train", argv=[*argv(num_stages, tp), *after_6])[-1]
        assert not loaded.losses and len(loaded.evaluations) == 2 and len(further.losses) == 3
        if tp == 1:
            assert loaded.evaluations == whole[-1].evaluations[1:]
            assert (further.losses, further.evaluations) == (continued.losses, continued.evaluations)
        else:
            assert loaded.evaluations == pytest.approx(whole[-1].evaluations[1:], rel=1e-5)
            assert further.losses == pytest.approx(continued.losses, rel=1e-5)


def test_resuming_under_another_schedule_or_batch_size_says_so_once(pool: GetPool, corpus: str, tmp_path: Path) -> None:
    from megatron.core.dist_checkpointing import load_common_state_dict

    folder, printed = tmp_path / "checkpoints", tmp_path / "printed"
    printed.mkdir()

    def lines(*more: str, a: int = 2, in_one: bool = False) -> list[str]:
        argv = [*nine_iterations(corpus, 2, *more, a=a), "--override-opt-param-scheduler"]
        num_processes = 1 if in_one else 2
        pool(num_processes).run(
            "train",
            argv=emulated(argv) if in_one else argv,
            within=partial(interruptions.printed_to, str(printed)),
        )
        output = "".join((printed / str(rank)).read_text() for rank in range(num_processes))
        assert "validation loss" in output
        return re.findall("^paci-megatron: resuming .*", output, re.MULTILINE)

    assert lines(*PACI, *at(folder)) == []
    saved = load_common_state_dict(folder / "iter_0000006")["args"]
    assert (saved.pipeline_schedule, saved.global_batch_size, saved.micro_batch_size) == ("paci", 4, 2)
    assert (saved.pipeline_model_parallel_size, saved.data_parallel_size) == (2, 1)
    load = ["--load", str(folder), "--ckpt-step", "6"]
    assert lines(*PACI, *load) == []
    said = "paci-megatron: resuming a checkpoint written under paci, 2 micro-batches per update, with"
    # The two processes are then replicas of one stage.
    assert lines(*load, "--pipeline-model-parallel-size", "1") == [f"{said} 1f1b, 1 micro-batches per update"]
    assert lines(*PACI, *load, a=3) == [f"{said} paci, 3 micro-batches per update"]
    assert lines(*PACI, *load, a=3, in_one=True) == [f"{said} paci, 3 micro-batches per update"]


def test_with_microbatches_in_flight_nothing_is_saved(pool: GetPool, corpus: str, tmp_path: Path) -> None:
    """So no checkpoint can be one of a pipeline that was not empty."""
    folder = tmp_path / "checkpoints"
    with pytest.raises(JobError, match="a checkpoint after iteration 2 needs an empty pipeline"):
        pool(2).run(
            "train",
            argv=[*nine_iterations(corpus, 2), *PACI, *at(folder)],
            within=partial(interruptions.save_wanted_in_flight, 2),
        )
    assert not folder.exists() or not list(folder.rglob("*"))
