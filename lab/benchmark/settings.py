"""What is measured: schedules by name, their sizes, and the training command of each measurement."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from paci_megatron.config import Extra
from paci_megatron.schedule.records import record_lag
from paci_megatron.schedule.schedules import parse_slack, speedup_limit
from paci_megatron.schedule.vee import fold
from paci_megatron.simulate.costs import Costs, StageCosts
from paci_megatron.simulate.engine import Simulation
from paci_megatron.simulate.peers import Schedule, find_schedule
from paci_megatron.usage import UsageError, require

from .padding import StageTimes

FLUSH = "1f1b"
BARE = "paci-bare"
AUTO = "paci:auto"
NAMES = (
    "1f1b, interleaved:CHUNKS, paci, paci:EXTRA_IN_FLIGHT, paci:auto, paci:auto:MEMORY_BUDGET, paci-bare, paci-v, "
    "paci-v:FORWARD:BACKWARD:WAIT"
)


@dataclass(frozen=True)
class Arm:
    """A schedule that can be run: ``plan`` is what the simulator knows it as; of paci:auto until it has chosen.

    ``is_bare`` leaves out what PACI's stages tell each other: no clipping, no control records. ``budget`` is that of
    paci:auto, None for the default.
    """

    name: str
    plan: Schedule
    is_bare: bool = False
    budget: int | None = None

    @property
    def is_auto(self) -> bool:
        """Whether the run chooses what is in flight."""
        return self.name.partition(":")[2].partition(":")[0] == "auto"

    @property
    def is_paci(self) -> bool:
        """Whether it never flushes."""
        return self.name.startswith("paci")

    def limit(self, num_stages: int, microbatches_per_update: int) -> float:
        """The most it can gain over 1F1B-flush where all stages take the same time."""
        n, a = num_stages, microbatches_per_update
        return speedup_limit(n, a) if self.is_paci else (a + n - 1) / (a + (n - 1) / self.plan.chunks)

    @property
    def order(self) -> str:
        """Of a V, as ``--paci-v-order`` has it."""
        return self.name.partition(":")[2] or "1:2:0"

    def in_flight(self, num_stages: int) -> int:
        """The most micro-batches of the first stage."""
        if self.plan.folded:
            return fold(num_stages, *map(int, self.order.split(":"))).in_flight(0)
        if self.is_auto:
            return self.budget or 2 * num_stages  # the default
        return num_stages + sum(parse_slack(self.plan.extra_in_flight, num_stages))

    def flags(self) -> list[str]:
        """What the command line of its training has more than that of 1F1B-flush."""
        if self.plan.folded:
            return ["--pipeline-schedule", "paci-v", "--paci-v-order", self.order]
        if self.plan.chunks > 1:
            return ["--num-virtual-stages-per-pipeline-rank", str(self.plan.chunks)]
        if self.is_auto:
            budget = ["--paci-memory-budget", str(self.budget)] if self.budget else []
            return ["--pipeline-schedule", "paci", "--paci-extra-in-flight", "auto", *budget]
        flags = ["--pipeline-schedule", "paci"] if self.is_paci else []
        return flags + (["--paci-extra-in-flight", self.plan.extra_in_flight] if self.plan.extra_in_flight != "0" else [])


def find_arm(name: str) -> Arm:
    """The arm of that name, such as ``paci:1``; ``UsageError`` if there is none."""
    base = name.partition(":")[0]
    auto, _, budget = name.partition(f"{AUTO}:")
    if name == AUTO or (not auto and budget.isdecimal()):
        return Arm(name, find_schedule("paci"), budget=int(budget) if budget else None)
    if name == BARE:
        return Arm(name, find_schedule("paci"), is_bare=True)
    if base not in ("1f1b", "interleaved", "paci", "paci-v"):
        raise UsageError(f"--schedules {name}: no schedule that can be run here; choose from {NAMES}")
    try:
        return Arm(name, find_schedule(name))
    except ValueError as error:
        raise UsageError(f"--schedules {name}: {error}") from None


@dataclass(frozen=True)
class Case:
    """One combination to measure."""

    arm: Arm
    num_stages: int
    microbatches_per_update: int

    def __str__(self) -> str:
        return f"N={self.num_stages} a={self.microbatches_per_update} {self.arm.name}"

    @property
    def slug(self) -> str:
        """The case as a folder's name."""
        return f"{self.arm.name.replace(':', '-')}-n{self.num_stages}-a{self.microbatches_per_update}"

    @property
    def drain_iterations(self) -> int:
        """Iterations at the end in which stages may already be running out of work."""
        return -(-self.arm.in_flight(self.num_stages) // self.microbatches_per_update) + 1

    @property
    def least_warmup(self) -> int:
        """Iterations that fill the pipeline and let it settle, and at least three for one-off costs."""
        lag = record_lag(self.num_stages, self.microbatches_per_update)
        chooses = Extra.measured_updates(lag) if self.arm.is_auto else 0
        return chooses + max(3, 2 * self.drain_iterations)

    def as_chosen(self, slack: tuple[int, ...]) -> Case:
        """The case for the simulator: with this slack, if it is paci:auto and has chosen."""
        chose = self.arm.is_auto and slack
        return replace(self, arm=find_arm(f"paci:{','.join(map(str, slack))}")) if chose else self


@dataclass(frozen=True)
class Model:
    """The model that is trained. ``num_layers`` None is what suits the schedules; sizes are Megatron's."""

    hidden_size: int
    num_attention_heads: int
    seq_length: int
    micro_batch_size: int
    vocab_size: int
    num_layers: int | None = None


# Next to nothing to compute, so that eight stages' work fits between the sleeps on two cores.
TIMED_MODEL = Model(hidden_size=32, num_attention_heads=2, seq_length=32, micro_batch_size=1, vocab_size=64)
# Tens of milliseconds on one core; the output layer and the loss take about as long as a transformer layer.
REAL_MODEL = Model(hidden_size=160, num_attention_heads=2, seq_length=128, micro_batch_size=2, vocab_size=3072)


@dataclass(frozen=True)
class Settings:
    """A benchmark. ``stage_ms`` are the timed stages' forward and backward, one pair for all or one each; None is real
    compute. ``straggler`` is a stage, how many times as long it takes, and in how many of the measured iterations, those in
    the middle. ``warmup`` None is what each case needs. ``megatron_flags`` go to every training.
    """

    schedules: tuple[str, ...]
    num_stages: tuple[int, ...]
    microbatches_per_update: tuple[int, ...]
    model: Model
    stage_ms: tuple[tuple[float, float], ...] | None = None
    jitter: float = 0.0
    seed: int = 0
    straggler: tuple[int, float, int] | None = None
    iterations: int = 30
    warmup: int | None = None
    repeats: int = 2
    megatron_flags: tuple[str, ...] = ()

    def check(self) -> None:
        """``UsageError`` if no measurement could be made so."""
        for name, values in (("num-stages", self.num_stages), ("microbatches-per-update", self.microbatches_per_update)):
            for value in values:
                least = 2 if name == "num-stages" else 1
                require(value >= least, f"--{name} {value}: give at least {least}")
        for name, number in (("iterations", self.iterations), ("repeats", self.repeats), ("warmup", self.warmup)):
            require(number is None or number >= 1, f"--{name} {number}: give at least 1")
        require(0 <= self.jitter < 1, f"--jitter {self.jitter:g}: give a share of the time, from 0 to below 1")
        message = f"--jitter {self.jitter:g}: only timed stages can be varied; add --timed-stage-ms FORWARD:BACKWARD"
        require(not self.jitter or self.stage_ms is not None, message)
        if self.straggler is not None:
            stage, factor, count = self.straggler
            text = f"--straggler {stage}:{factor:g}:{count}"
            require(self.stage_ms is not None, f"{text}: only timed stages can be slowed down; add --timed-stage-ms")
            require(0 <= stage < min(self.num_stages), f"{text}: give a stage from 0 to {min(self.num_stages) - 1}")
            require(1 <= factor < math.inf, f"{text}: give a factor of at least 1")
            require(1 <= count <= self.iterations, f"{text}: give 1 to --iterations {self.iterations}")
        require(len(set(self.schedules)) == len(self.schedules), "--schedules: name each schedule once")
        for n in self.num_stages:
            given = len(self.stage_ms or (0,))
            message = f"--num-stages {n}: --timed-stage-ms has {given} stages; give the times of {n}, or of one for all"
            require(given in (1, n), message)
            self._check_layers(n)

    def _check_layers(self, num_stages: int) -> None:
        layers, parts = self.num_layers(num_stages), num_stages * self._chunks
        extra = " and the loss, which counts as one," if self.stage_ms is None else ""
        fits = (layers + (self.stage_ms is None)) % parts == 0
        message = f"--num-layers {layers}: the layers{extra} are dealt to {parts} parts of the model; give a multiple"
        require(fits, message + (f" of {parts} less one" if extra else ""))

    @property
    def _chunks(self) -> int:
        return math.lcm(*(find_arm(name).plan.chunks for name in self.schedules))

    def num_layers(self, num_stages: int) -> int:
        """Layers of the model, the same for all schedules on so many stages."""
        if self.model.num_layers is not None:
            return self.model.num_layers
        parts = num_stages * self._chunks
        return parts if self.stage_ms is not None else 2 * parts - 1

    def groups(self) -> tuple[list[list[Case]], list[str]]:
        """The cases to be compared with each other, a group for each size, and why others do not exist."""
        groups, notes = [], []
        arms = [find_arm(name) for name in self.schedules]
        for n in self.num_stages:
            for a in self.microbatches_per_update:
                problems = {arm.name: arm.plan.problem(n, a) for arm in arms}
                notes += [problem for problem in problems.values() if problem is not None]
                group = [Case(arm, n, a) for arm in arms if problems[arm.name] is None]
                groups += [group] if group else []
        return groups, notes

    def warmup_of(self, case: Case) -> int:
        """Iterations before the measured ones."""
        return case.least_warmup if self.warmup is None else self.warmup

    def train_iters(self, case: Case) -> int:
        """All iterations: warm-up, measured, and those in which the pipeline runs empty."""
        return self.warmup_of(case) + self.iterations + case.drain_iterations

    def timed_costs(self, num_stages: int) -> Costs | None:
        """What the stages were told to take; None with real compute."""
        if self.stage_ms is None:
            return None
        stages = [StageCosts(forward / 1000, backward / 1000) for forward, backward in self.stage_ms]
        return Costs(tuple(stages * num_stages if len(stages) == 1 else stages), jitter=self.jitter, seed=self.seed)

    def stage_times(self, case: Case) -> tuple[StageTimes, ...] | None:
        """What each process of a training is told to take; None with real compute."""
        costs, chunks = self.timed_costs(case.num_stages), case.arm.plan.chunks
        if costs is None:
            return None
        times = [StageTimes(each.forward_s, each.backward_s, costs.jitter, costs.seed, chunks) for each in costs.stages]
        if self.straggler is not None:
            stage, factor, count = self.straggler
            before = self.warmup_of(case) + (self.iterations - count) // 2
            actions = 2 * case.microbatches_per_update * chunks  # of an iteration
            times[stage] = replace(times[stage], slow=(factor, before * actions, (before + count) * actions))
        return tuple(times)

    def simulate(self, case: Case, costs: Costs, slack: tuple[int, ...] = ()) -> Simulation:
        """The run of ``case`` as the simulator foretells it, from start to end; ``slack`` is what paci:auto has chosen."""
        plan = case.as_chosen(slack).arm.plan
        return plan.simulate(case.microbatches_per_update, self.train_iters(case), costs)

    def predicted_tokens_per_second(self, case: Case, costs: Costs, slack: tuple[int, ...] = ()) -> float:
        """The simulator's throughput over the same iterations as are measured."""
        warmup = self.warmup_of(case)
        microbatches_per_s = self.simulate(case, costs, slack).microbatches_per_s(warmup, warmup + self.iterations)
        return microbatches_per_s * self.model.micro_batch_size * self.model.seq_length

    def training_arguments(self, case: Case, metrics_file: str, train_iters: int | None = None) -> list[str]:
        """The training's command line, without the script: what a user would give, logging and metrics included."""
        model, a = self.model, case.microbatches_per_update
        values = {
            "pipeline-model-parallel-size": case.num_stages,
            "num-layers": self.num_layers(case.num_stages),
            "hidden-size": model.hidden_size,
            "num-attention-heads": model.num_attention_heads,
            "seq-length": model.seq_length,
            "max-position-embeddings": model.seq_length,
            "micro-batch-size": model.micro_batch_size,
            "global-batch-size": model.micro_batch_size * a,
            "train-iters": self.train_iters(case) if train_iters is None else train_iters,
            "tokenizer-type": "NullTokenizer",
            "vocab-size": model.vocab_size,
            "lr": 1e-4,
            "lr-decay-style": "constant",
            "clip-grad": 0.0 if case.arm.is_bare else 1.0,
            "log-interval": 1,
            "eval-interval": 10**9,
            "eval-iters": 0,
            "num-workers": 0,
            "paci-metrics-file": metrics_file,
        }
        flags = [word for flag, value in values.items() for word in (f"--{flag}", str(value))]
        flags += ["--mock-data", "--untie-embeddings-and-output-weights"]
        flags += ["--account-for-loss-in-pipeline-split"] if self.stage_ms is None else []
        return [*flags, *case.arm.flags(), *self.megatron_flags]


def parse_stage_ms(text: str) -> tuple[float, float]:
    """Milliseconds of a forward and a backward from ``FORWARD:BACKWARD``."""
    try:
        forward, backward = (float(part) for part in text.split(":"))
    except ValueError:
        raise UsageError(f"--timed-stage-ms {text}: expected FORWARD:BACKWARD, like 100:200") from None
    positive = 0 < forward < math.inf and 0 < backward < math.inf
    require(positive, f"--timed-stage-ms {text}: a forward and a backward take time; give milliseconds above 0")
    return forward, backward
