"""Everything that Megatron users combine with a pipeline, under PACI."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from tests.support.helpers import PACI, GetPool, OneProcess, arguments, assert_same_bits, assert_same_run, emulated, without

LLAMA = [
    *("--group-query-attention", "--num-query-groups", "1", "--position-embedding-type", "rope", "--swiglu"),
    *("--normalization", "RMSNorm", "--disable-bias-linear"),
]
RECOMPUTE_ALL = ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"]
# 2 samples a micro-batch: 2 micro-batches per update for 3 updates of 4 x 16 tokens, then 3.
BATCH_SIZES = ["--step-batch-size-schedule", "0:4 192:6"]
EXPERTS = [
    *("--num-experts", "4", "--moe-router-topk", "2", "--moe-router-load-balancing-type", "aux_loss"),
    *("--moe-aux-loss-coeff", "1e-2", "--disable-bias-linear"),
]
DISTRIBUTED_OPTIMIZER = ["--use-distributed-optimizer"]
# Weights of the vocabulary's dimension are padded to a multiple of this times the size.
TENSOR = ["--tensor-model-parallel-size", "2", "--make-vocab-size-divisible-by", "64"]
OVERLAPPED = [*DISTRIBUTED_OPTIMIZER, "--overlap-grad-reduce", "--ddp-bucket-size", "4000"]
GATHERED = [*OVERLAPPED, "--overlap-param-gather"]


MULTI_TOKEN = (
    *("--mtp-num-layers", "1", "--pipeline-model-parallel-layout", "Ettt|tmL", "--position-embedding-type", "rope"),
)


@dataclass(frozen=True)
class Model:
    """A setting that changes the model, its stages or how they compute, but not what a rank holds of a stage."""

    name: str
    flags: tuple[str, ...]
    num_stages: int = 2
    ties: bool = False  # the embedding and the output weights

    def argv(self, corpus: str, *more: str) -> list[str]:
        """A run of 2 micro-batches per update."""
        argv = arguments(corpus, self.num_stages, 2, *self.flags, *more)
        if self.ties:
            argv.remove("--untie-embeddings-and-output-weights")
        return without(argv, "--global-batch-size") if "--step-batch-size-schedule" in self.flags else argv


MODELS = [
    Model("llama", tuple(LLAMA)),
    Model("bf16", ("--bf16",)),
    Model("recompute-selective", ("--recompute-granularity", "selective")),
    Model("recompute-full", tuple(RECOMPUTE_ALL)),
    Model("batch-size-schedule", tuple(BATCH_SIZES)),
    Model("layout", ("--pipeline-model-parallel-layout", "Ettt|tL")),
    Model("experts", tuple(EXPERTS)),
    Model("muon", ("--optimizer", "muon")),
    Model("lion", ("--optimizer", "lion")),
    Model("soap", ("--optimizer", "soap")),
    Model("frozen", ("--freeze-all-layers",), ties=True),
    Model("multi-token-prediction", MULTI_TOKEN),
    Model("multi-token-prediction-tied", MULTI_TOKEN, ties=True),
    Model(
        "embedding-and-loss-as-layers",
        (
            *("--num-layers", "6", "--account-for-embedding-in-pipeline-split"),
            "--account-for-loss-in-pipeline-split",
        ),
        num_stages=4,
    ),
]
BY_STAGES = [pytest.param(model, model.num_stages, id=model.name) for model in MODELS]


@pytest.mark.parametrize(("model", "num_stages"), BY_STAGES)
def test_drained_it_is_megatrons_flush_bit_for_bit(pool: GetPool, corpus: str, model: Model, num_stages: int) -> None:
    flush = pool(num_stages).run("train", argv=model.argv(corpus))
    drained = pool(num_stages).run("train", argv=model.argv(corpus, *PACI, "--paci-drain-interval", "1"))
    assert len(flush[-1].losses) == 6
    assert_same_bits(flush, drained)


@pytest.mark.parametrize(("model", "num_stages"), BY_STAGES)
def test_processes_are_emulated_stages_bit_for_bit(
    pool: GetPool, one_process: OneProcess, corpus: str, model: Model, num_stages: int
) -> None:
    processes = pool(num_stages).run("train", argv=model.argv(corpus, *PACI))
    assert_same_run(processes, one_process(emulated(model.argv(corpus, *PACI))))


def test_recompute_uses_the_weights_of_the_backward(pool: GetPool, corpus: str) -> None:
    """Under flush recomputing changes nothing. Under paci the recomputed forward sees weights newer than the first's."""
    plain, recomputed = arguments(corpus, 2, 2), arguments(corpus, 2, 2, *RECOMPUTE_ALL)
    assert_same_bits(pool(2).run("train", argv=plain), pool(2).run("train", argv=recomputed))
    kept, anew = (pool(2).run("train", argv=[*argv, *PACI]) for argv in (plain, recomputed))
    # Stage 0 first recomputes with other weights after update 1, and its update 2 shows in the loss of window 3.
    assert kept[-1].losses[:2] == anew[-1].losses[:2]
    assert kept[-1].losses[2:] != anew[-1].losses[2:]


@dataclass(frozen=True)
class Split:
    """A way to split a stage's work over two ranks, and the same work on fewer."""

    name: str
    flags: tuple[str, ...]
    micro_batch_size: int = 2  # a rank's
    unsplit_flags: tuple[str, ...] = ()
    unsplit_micro_batch_size: int = 4
    unsplit_world_size: int = 2


SPLITS = [
    Split("data", ()),
    Split("distributed-optimizer", tuple(DISTRIBUTED_OPTIMIZER)),
    Split("distributed-optimizer-overlapped", tuple(OVERLAPPED)),
    Split("distributed-optimizer-gathered-in-forwards", tuple(GATHERED)),
    Split("overlap-grad-reduce", ("--overlap-grad-reduce", "--ddp-bucket-size", "4000")),
    Split("tensor", tuple(TENSOR), micro_batch_size=4),
    Split("tensor-and-sequence", (*TENSOR, "--sequence-parallel"), micro_batch_size=4),
    # The auxiliary loss is each replica's own, so experts are compared at the same number of replicas.
    *(
        Split(
            f"experts-{dispatcher}",
            (*EXPERTS, "--expert-model-parallel-size", "2", "--moe-token-dispatcher-type", dispatcher),
            unsplit_flags=tuple(EXPERTS),
            unsplit_micro_batch_size=2,
            unsplit_world_size=4,
        )
        for dispatcher in ("allgather", "alltoall")
    ),
]


@pytest.fixture(scope="module")
def checkpoint(pool: GetPool, corpus: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Split], Path]:
    """The checkpoint that a split and its whole both continue."""
    folders: dict[tuple[str, ...], Path] = {}

    def get(split: Split) -> Path:
        if split.unsplit_flags not in folders:
            folder = folders[split.unsplit_flags] = tmp_path_factory.mktemp("checkpoint")
            argv = split_argv(corpus, split.unsplit_micro_batch_size, *split.unsplit_flags, iters=1)
            pool(split.unsplit_world_size).run("train", argv=[*argv, "--save", str(folder), "--save-interval", "1"])
        return folders[split.unsplit_flags]

    return get


def split_argv(corpus: str, micro_batch_size: int, *flags: str, iters: int = 8) -> list[str]:
    """A window of 2 micro-batches of 4 samples without dropout, which is drawn by rank."""
    argv = arguments(corpus, 2, 2, *flags, "--attention-dropout", "0", "--hidden-dropout", "0", iters=iters)
    argv = without(argv, "--micro-batch-size", "--global-batch-size")
    return [*argv, "--micro-batch-size", str(micro_batch_size), "--global-batch-size", "8", "--vocab-size", "126"]


@pytest.mark.parametrize(
    ("split", "num_stages", "dp"),
    [
        pytest.param(split, 2, 2, id=split.name, marks=pytest.mark.slow if split.name == "experts-allgather" else ())
        for split in SPLITS
    ],
)
def test_split_stages_train_as_whole_ones(
    pool: GetPool, corpus: str, checkpoint: Callable[[Split], Path], split: Split, num_stages: int, dp: int
) -> None:
    """Both continue one checkpoint, because initial weights are drawn by rank."""
    resuming = ["--load", str(checkpoint(split)), "--no-load-optim", "--no-load-rng", "--finetune", *PACI]
    whole_argv = split_argv(corpus, split.unsplit_micro_batch_size, *split.unsplit_flags, *resuming)
    whole = pool(split.unsplit_world_size).run("train", argv=whole_argv)
    argv = split_argv(corpus, split.micro_batch_size, *split.flags, *resuming)
    parts = pool(num_stages * dp).run("train", argv=argv, count_collectives=True)
    assert [part.collectives for part in parts] == [{}] * 4, "a collective across stages between drains"
    assert all(part.collectives_within_stage for part in parts), "the stage's ranks do not work together"
    assert len(whole[-1].losses) == 8
    np.testing.assert_allclose(parts[-1].losses, whole[-1].losses, rtol=1e-5)
    np.testing.assert_allclose(parts[-1].evaluations, whole[-1].evaluations, rtol=1e-5)


@pytest.mark.parametrize(("num_stages", "dp"), [(2, 2)])
def test_each_instance_of_the_distributed_optimizer_has_the_stages_norm(
    pool: GetPool, corpus: str, num_stages: int, dp: int
) -> None:
    """Clipped, drained: Megatron's flush with as many instances. Not drained: as with one, to rounding."""
    argv = arguments(corpus, num_stages, 2, *DISTRIBUTED_OPTIMIZER, dp=dp)
    argv = [*without(argv, "--clip-grad"), "--clip-grad", "0.1"]
    instances = ["--num-distributed-optimizer-instances", "2"]
    run = pool(num_stages * dp).run
    flush = run("train", argv=[*argv, *instances])
    drained = run("train", argv=[*argv, *instances, *PACI, "--paci-drain-interval", "1"])
    np.testing.assert_allclose(drained[-1].losses, flush[-1].losses, rtol=1e-6)
    one = run("train", argv=[*argv, *PACI])
    several = run("train", argv=[*argv, *instances, *PACI], count_collectives=True)
    assert [rank.collectives for rank in several] == [{}] * (num_stages * dp), "a collective across stages between drains"
    np.testing.assert_allclose(several[-1].losses, one[-1].losses, rtol=1e-6)


OFTEN = ("data", "experts-alltoall", "distributed-optimizer-gathered-in-forwards")


@pytest.mark.parametrize(
    ("split", "num_stages", "dp"),
    [pytest.param(split, 2, 2, id=split.name, marks=() if split.name in OFTEN else pytest.mark.slow) for split in SPLITS],
)
def test_split_emulated_stages_are_split_processes(
    pool: GetPool, corpus: str, split: Split, num_stages: int, dp: int
) -> None:
    argv = split_argv(corpus, split.micro_batch_size, *split.flags, *PACI)
    processes = pool(num_stages * dp).run("train", argv=argv)
    one = pool(dp).run("train", argv=emulated(argv))
    by_stage = [processes[:dp], processes[dp:]]
    for rank in range(dp):
        assert_same_run([stage[rank] for stage in by_stage], one[rank])


@pytest.mark.parametrize(
    "schedule",
    [
        pytest.param(["--paci-drain-interval", "3"], id="paci"),
        pytest.param(["--paci-drain-interval", "1"], id="drained"),
        pytest.param(["--paci-weight-policy", "double-buffer"], id="double-buffer"),
    ],
)
@pytest.mark.parametrize(("num_stages", "dp"), [(2, 2)])
def test_weights_gathered_in_forwards_are_those_gathered_in_the_step(
    pool: GetPool, corpus: str, schedule: list[str], num_stages: int, dp: int
) -> None:
    """Bit for bit, with tied embeddings; drained, also Megatron's flush that gathers in forwards.

    With one micro-batch per update a backward follows an update directly before each drain.
    """
    argv = arguments(corpus, num_stages, 1, *OVERLAPPED, dp=dp, iters=8)
    argv.remove("--untie-embeddings-and-output-weights")
    run = pool(num_stages * dp).run
    in_forwards = run("train", argv=[*argv, "--overlap-param-gather", *PACI, *schedule])
    assert_same_bits(run("train", argv=[*argv, *PACI, *schedule]), in_forwards)
    if schedule[-1] == "1":
        assert_same_bits(run("train", argv=[*argv, "--overlap-param-gather"]), in_forwards)
