"""What is trained: arms, and the ready sets of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from paci_megatron.schedule.plan import Plan
from paci_megatron.schedule.vee import fold


class StudyError(Exception):
    """A study that cannot run as asked; the message names the value, the constraint and the remedy."""


@dataclass(frozen=True, slots=True)
class Arm:
    """One setting, trained with several seeds. ``batch_size`` in sequences; extra arms come after a study's main ones."""

    schedule: str
    microbatches_per_update: int
    batch_size: int
    clip_grad: float = 0.0
    recompute: bool = False
    lr_factor: float = 1.0
    optimizer: str = "adam"
    beta1: float = 0.9
    start_fraction: float = 0.0  # of the updates, which flush before PACI begins
    weight_policy: str = "latest"
    bf16: bool = False
    look_ahead: bool = False
    stages_per_process: int = 1
    by_stage: str = ""  # what is another on each stage, see by_stage.py
    is_extra: bool = False
    max_seeds: int | None = None

    @property
    def micro_batch_size(self) -> int:
        """Sequences in a micro-batch."""
        return self.batch_size // self.microbatches_per_update

    @property
    def is_flush(self) -> bool:
        """Whether this is Megatron's 1F1B-flush."""
        return self.schedule == "1f1b"

    @property
    def is_plain(self) -> bool:
        """Whether nothing but the schedule and the batch distinguishes it."""
        return (
            not (self.clip_grad or self.recompute or self.start_fraction or self.bf16 or self.by_stage)
            and (self.optimizer, self.lr_factor, self.beta1) == ("adam", 1, 0.9)
            and (self.weight_policy, self.stages_per_process) == ("latest", 1)
        )

    @property
    def name(self) -> str:
        """The folder's name, and what ``--arms`` selects by: ``paci-b16-a8``, ``flush-b16-a8``, ``paci-b16-a2-clip``."""
        parts = ["flush" if self.is_flush else self.schedule, f"b{self.batch_size}", f"a{self.microbatches_per_update}"]
        parts += ["clip"] * bool(self.clip_grad) + ["recompute"] * self.recompute
        parts += [self.optimizer] * (self.optimizer != "adam")
        parts += [f"lr{self.lr_factor:g}"] * (self.lr_factor != 1)
        parts += [f"beta{self.beta1:g}"] * (self.beta1 != 0.9)
        parts += [f"start{self.start_fraction:.0%}".rstrip("%")] * bool(self.start_fraction)
        parts += [self.weight_policy] * (self.weight_policy != "latest")
        parts += ["2-stages"] * (self.is_flush and self.stages_per_process == 2)
        parts += [f"{self.by_stage}-by-stage"] * bool(self.by_stage)
        return "-".join(parts + ["bf16"] * self.bf16 + ["ahead"] * self.look_ahead)

    @property
    def title(self) -> str:
        """The name in figures."""
        return f"{'1F1B-flush' if self.is_flush else 'PACI'} a={self.microbatches_per_update}"

    def max_drift(self, num_stages: int) -> int:
        """The bound on any micro-batch's drift, in updates; the first stage reaches it. ``num_stages`` counts a V's
        processes.
        """
        return 0 if self.is_flush else self._plan(num_stages).max_drift(0)

    def mean_drift(self, num_stages: int) -> float:
        """The mean drift over stages and micro-batches in steady state; PACI's is (N-1)/(2a)."""
        plan = self._plan(num_stages)
        return 0.0 if self.is_flush else fmean(plan.mean_drift(stage) for stage in range(plan.num_stages))

    def _plan(self, num_stages: int) -> Plan:
        if self.schedule != "paci-v":
            return Plan(self.schedule, num_stages, self.microbatches_per_update)
        folded = fold(num_stages)
        return Plan(self.schedule, 2 * num_stages, self.microbatches_per_update, folded.slack, folded=folded)


@dataclass(frozen=True)
class Study:
    """A set of arms and what they have in common. ``flags`` are Megatron's; None for those without a value.

    Every arm evaluates and saves at the same ``num_periods`` numbers of tokens, and so drains there.
    """

    name: str
    num_stages: int
    is_emulated: bool
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    seq_length: int
    tokens: int
    peak_lr: float
    lr_batch_size: int
    flags: Mapping[str, Any]
    num_periods: int = 8
    logs_per_period: int = 5
    vocab_size: int | None = None
    held_out_fraction: float = 0.02
    is_paper: bool = False
    eval_sequences: int | None = None

    def __post_init__(self) -> None:
        for arm in self.arms:
            if arm.batch_size % arm.microbatches_per_update:
                raise StudyError(
                    f"arm {arm.name}: a batch of {arm.batch_size} sequences has no {arm.microbatches_per_update} equal "
                    "micro-batches; choose a number that divides it"
                )
        if self.tokens < 1 or self.tokens % self.tokens_unit:
            raise StudyError(
                f"{self.tokens} tokens: all arms must evaluate at the same tokens, so take a multiple of {self.tokens_unit}"
            )

    @property
    def tokens_unit(self) -> int:
        """What the number of tokens must be a multiple of, for equal evaluations and log lines in all arms."""
        largest = math.lcm(*(arm.batch_size for arm in self.arms))
        return largest * self.seq_length * self.num_periods * self.logs_per_period

    def train_iters(self, arm: Arm) -> int:
        """The arm's updates."""
        return self.tokens // (arm.batch_size * self.seq_length)

    def lr(self, arm: Arm) -> float:
        """The arm's peak learning rate, which goes with the square root of its batch."""
        return float(f"{arm.lr_factor * self.peak_lr * math.sqrt(arm.batch_size / self.lr_batch_size):.6g}")

    def runs(self) -> Iterator[tuple[Arm, int]]:
        """Every arm and seed in the order to run them: seed after seed, each with the main arms first."""
        for index, seed in enumerate(self.seeds):
            for arm in sorted(self.arms, key=lambda arm: arm.is_extra):
                if arm.max_seeds is None or index < arm.max_seeds:
                    yield arm, seed


def _pairs(batch_sizes: Iterable[int], counts: tuple[int, ...], repeat_flush: bool) -> tuple[Arm, ...]:
    """Flush and PACI for every batch size and number of micro-batches.

    Under flush the micro-batches of an update only cut the same batch differently, so losses agree to rounding. Without
    ``repeat_flush`` the first number of micro-batches has all seeds, and the others are trained once to show it. With
    measured times all must be.
    """
    return tuple(
        Arm(schedule, a, batch, max_seeds=1 if schedule == "1f1b" and a != counts[0] and not repeat_flush else None)
        for batch in batch_sizes
        for a in counts
        for schedule in ("1f1b", "paci")
    )


_OPTIMIZER: dict[str, Any] = {
    "lr-decay-style": "cosine",
    "lr-warmup-fraction": 0.01,
    "adam-beta2": 0.95,
    "adam-eps": 1e-8,
    "weight-decay": 0.1,
    "untie-embeddings-and-output-weights": None,
}
# Short updates at low rates, to have many: drift costs most while each of them changes much. The warm-up is a larger share
# than the paper's 1 %, which is thousands of updates there. Dropout is off: training sees less than one pass, so there is
# nothing to overfit. Narrow models learn badly from Megatron's default initialisation of 0.02.
_SMALL: dict[str, Any] = {
    **_OPTIMIZER,
    "hidden-dropout": 0.0,
    "attention-dropout": 0.0,
    "init-method-std": 0.05,
    "lr-warmup-fraction": 0.1,
    "num-workers": 0,
}


def _extras(batch_size: int, larger_batch_size: int) -> tuple[Arm, ...]:
    """Where drift is large, with and without clipping; recomputation; the weight policies of others; twice the rate, there
    also remedies: flushing at first, a rate or a beta1 by stage, and in bf16 a look-ahead. One seed each, but for bf16.
    """
    twice = Arm("paci", 4, larger_batch_size, lr_factor=2.0, is_extra=True, max_seeds=1)
    twice_in_bf16 = dataclasses.replace(twice, bf16=True, max_seeds=None)
    return (
        *(Arm("paci", a, batch_size, clip, is_extra=True, max_seeds=1) for a in (2, 1) for clip in (0.0, 1.0)),
        Arm("1f1b", 4, batch_size, 1.0, is_extra=True, max_seeds=1),
        Arm("paci", 4, batch_size, recompute=True, is_extra=True, max_seeds=1),
        *(Arm("paci", 8, batch_size, weight_policy=p, is_extra=True, max_seeds=1) for p in ("stash", "double-buffer")),
        Arm("1f1b", 4, larger_batch_size, lr_factor=2.0, is_extra=True, max_seeds=1),
        *(dataclasses.replace(twice, microbatches_per_update=a) for a in (4, 8, 16)),
        *(dataclasses.replace(twice, start_fraction=fraction) for fraction in (0.25, 0.1, 0.5)),
        *(dataclasses.replace(twice, by_stage=what) for what in ("rate", "beta1")),
        dataclasses.replace(twice_in_bf16, schedule="1f1b"),
        twice_in_bf16,
        dataclasses.replace(twice_in_bf16, look_ahead=True),
        dataclasses.replace(twice_in_bf16, look_ahead=True, start_fraction=0.25, max_seeds=1),
    )


def _small() -> Study:
    model = {"num-layers": 8, "hidden-size": 128, "num-attention-heads": 4}
    return Study(
        name="small",
        num_stages=8,
        is_emulated=True,
        arms=(*_pairs((16, 32), (4, 8, 16), repeat_flush=False), *_extras(16, 32)),
        seeds=(1, 2, 3),
        seq_length=32,
        tokens=655_360,
        peak_lr=1.5e-4,  # half the paper's
        lr_batch_size=256,
        flags={**_SMALL, **model},
        vocab_size=2048,
    )


def _best() -> Study:
    """Each schedule at its own best peak rate: factors of the small study's, around the best first, for AdamW and Muon.

    Muon's update has Adam's size for each element (Megatron's ``--muon-scale-mode spectral``), so its rates are alike. In so
    few updates the best rates are far above the small study's: the factors go on until each schedule loses again.
    """
    rates = (8.0, 4.0, 16.0, 2.0, 32.0, 64.0, 128.0, 1.0, 0.5)
    muon = tuple(Arm(schedule, 4, 32, lr_factor=lr, optimizer="muon") for lr in rates[:7] for schedule in ("1f1b", "paci"))
    # The copy-free look-ahead needs 16 bits: with it, and flush, around their best rates; without it in one place each.
    in_bf16 = (
        *(Arm("1f1b", 4, 32, lr_factor=lr) for lr in (8.0, 32.0, 64.0)),
        *(Arm("paci", 4, 32, lr_factor=lr, look_ahead=True) for lr in (8.0, 16.0, 32.0)),
        *(Arm("paci", 8, 32, lr_factor=lr, look_ahead=True) for lr in (32.0, 64.0)),
        Arm("paci", 4, 32, lr_factor=8.0),
        *(Arm("1f1b", 4, 32, lr_factor=lr, optimizer="muon") for lr in (32.0, 64.0)),
        *(Arm("paci", 4, 32, lr_factor=lr, optimizer="muon", look_ahead=True) for lr in (32.0, 64.0, 128.0)),
        *(Arm("paci", 8, 32, lr_factor=lr, optimizer="muon", look_ahead=True) for lr in (64.0, 128.0)),
        Arm("paci", 4, 32, lr_factor=64.0, optimizer="muon"),
    )
    beta1 = tuple(Arm(schedule, 4, 32, lr_factor=2.0, beta1=b) for b in (0.95, 0.98) for schedule in ("1f1b", "paci"))
    arms = (
        *(Arm(schedule, 4, 32, lr_factor=lr) for lr in rates for schedule in ("1f1b", "paci")),
        *(Arm("paci", 8, 32, lr_factor=lr) for lr in rates),
        *muon,
        *beta1,
        *(Arm("paci", 16, 32, lr_factor=lr) for lr in rates),
        *(Arm("paci", 8, 32, lr_factor=lr, optimizer="muon") for lr in rates[:7]),
        # At a rate where PACI loses much: is it the delay or the inconsistency, and does it help to flush at first?
        Arm("paci", 4, 32, lr_factor=8.0, weight_policy="stash"),
        Arm("paci", 4, 32, lr_factor=8.0, start_fraction=0.25),
        *(dataclasses.replace(arm, bf16=True) for arm in in_bf16),
    )
    arms = tuple(dataclasses.replace(arm, is_extra=True) for arm in arms)
    return dataclasses.replace(_small(), name="best", tokens=327_680, arms=arms)


def _paci_v() -> Study:
    """Four processes, each with a stage of two layers or, in a V, two stages of one; at twice the small study's rate.

    Each stage draws its first weights from a seed of its own, so a V is compared with a flush of as many stages.
    """
    vee = (
        Arm(schedule, a, 32, stages_per_process=2, is_extra=True)
        for schedule, a in (("1f1b", 4), ("paci-v", 4), ("paci-v", 8))
    )
    arms = (*_pairs((32,), (4, 8), repeat_flush=False), *vee)
    return dataclasses.replace(_small(), name="paci-v", num_stages=4, peak_lr=3e-4, arms=arms)


def _processes() -> Study:
    model = {"num-layers": 3, "account-for-loss-in-pipeline-split": None, "hidden-size": 160, "num-attention-heads": 2}
    return Study(
        name="processes",
        num_stages=2,
        is_emulated=False,
        arms=_pairs((8,), (1, 2, 4), repeat_flush=True),
        seeds=(1, 2, 3),
        seq_length=128,
        tokens=819_200,
        peak_lr=2.5e-4,
        lr_batch_size=16,
        flags={**_SMALL, **model},
        vocab_size=3072,
    )


def _smoke() -> Study:
    model = {"num-layers": 2, "hidden-size": 32, "num-attention-heads": 2}
    return Study(
        name="smoke",
        num_stages=2,
        is_emulated=True,
        arms=(Arm("1f1b", 2, 4), Arm("paci", 2, 4)),
        seeds=(1,),
        seq_length=32,
        tokens=4 * 32 * 12,
        peak_lr=1e-2,
        lr_batch_size=4,
        flags={**_SMALL, **model},
        num_periods=3,
        logs_per_period=2,
        vocab_size=512,
        held_out_fraction=0.3,
    )


def _gpt2_medium() -> Study:
    """The paper's setting. Its updates are rounded to what lets every arm evaluate at the same tokens."""
    model = {"num-layers": 24, "hidden-size": 1024, "num-attention-heads": 16, "openai-gelu": None, "bf16": None}
    dropout = {"hidden-dropout": 0.1, "attention-dropout": 0.1}
    # As in examples/gpt/pretrain_gpt2_medium.sh, which says why; a test compares the two.
    stages = {"pipeline-model-parallel-layout": "Et*3|t*3|t*3|t*3|t*4|t*4|t*4|L", "rerun-mode": "disabled"}
    pairs = ((128, 8), (256, 16), (128, 4), (256, 8))
    return Study(
        name="gpt2-medium",
        num_stages=8,
        is_emulated=False,
        arms=tuple(Arm(schedule, a, batch) for batch, a in pairs for schedule in ("1f1b", "paci")),
        seeds=(1, 2, 3),
        seq_length=1024,
        tokens=190_000 * 256 * 1024,
        peak_lr=3e-4,
        lr_batch_size=256,
        flags={**_OPTIMIZER, **model, **dropout, **stages, "num-workers": 2},
        num_periods=190,
        logs_per_period=10,
        held_out_fraction=0.02,
        is_paper=True,
        eval_sequences=2048,
    )


SETS = {
    "small": _small,
    "best": _best,
    "paci-v": _paci_v,
    "processes": _processes,
    "smoke": _smoke,
    "gpt2-medium": _gpt2_medium,
}
