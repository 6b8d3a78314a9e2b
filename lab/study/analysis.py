"""What a study's runs show, as the content of ``report.json``."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from . import statistics as st
from . import timing
from .arms import Arm, Study
from .best import best_rows
from .records import Event


@dataclass(frozen=True)
class RunResult:
    """A finished run, from its metrics."""

    arm: Arm
    seed: int
    events: list[Event]

    def _named(self, name: str) -> list[Event]:
        return [event for event in self.events if event["event"] == name]

    def evaluations(self) -> list[tuple[int, int, float, float]]:
        """(iteration, tokens, training seconds, loss) of each evaluation in training.

        Megatron evaluates once more after the last iteration, on other samples: the two are averaged.
        """
        by_iteration: dict[int, list[Event]] = {}
        for event in self._named("evaluation"):
            if "test" not in event["prefix"]:
                by_iteration.setdefault(event["iteration"], []).append(event)
        return [
            (iteration, same[0]["tokens"], same[0]["train_s"], fmean(event["loss"] for event in same))
            for iteration, same in by_iteration.items()
        ]

    def final_loss(self) -> float:
        """The loss on all held-out sequences after training."""
        tests = [event["loss"] for event in self._named("evaluation") if "test" in event["prefix"]]
        return float(tests[-1]) if tests else self.evaluations()[-1][3]

    def training_losses(self) -> list[float]:
        """The mean training loss of each log interval. Megatron logs the first update by itself, too: it is left out,
        since arms of different batches have it at different tokens."""
        return [event["loss"] for event in self._named("train") if event["iteration"] > 1]

    def max_drift(self) -> int:
        """The largest drift that any stage met."""
        return max((stage["max_drift"] for event in self._named("drain") for stage in event["stages"]), default=0)

    def copied_weight_bytes(self) -> int:
        """The most that any stage held in copies of older weights."""
        stages = (stage for event in self._named("drain") for stage in event["stages"])
        return max((stage.get("copied_weight_bytes", 0) for stage in stages), default=0)

    def weight_change(self) -> float | None:
        """The mean drift over the run of the stage with the most, as a share of its weights."""
        by_stage: dict[int, list[tuple[int, float]]] = {}
        for event in self._named("drain"):
            for stage in event["stages"]:
                if "mean_weight_change" in stage:
                    by_stage.setdefault(stage["stage_index"], []).append((stage["updates"], stage["mean_weight_change"]))
        means = [sum(n * change for n, change in parts) / sum(n for n, _ in parts) for parts in by_stage.values()]
        return max(means, default=None)

    def measured_tokens_per_second(self) -> float:
        """All tokens over all seconds of training, fills and drains included."""
        last = self._named("train")[-1]
        return float(last["tokens"] / last["train_s"])


class Analysis:
    """The runs of a study that are finished, by arm."""

    def __init__(self, study: Study, results: Sequence[RunResult]) -> None:
        self.study = study
        self.by_arm: dict[Arm, list[RunResult]] = {}
        for result in results:
            self.by_arm.setdefault(result.arm, []).append(result)
        self.batch_sizes = sorted({arm.batch_size for arm in self.by_arm})
        self.arms = list(self.by_arm)

    @property
    def timing(self) -> str:
        """How every time of the report came about."""
        return "computed" if self.study.is_emulated else "measured"

    def stage_seconds(self, arm: Arm) -> list[float] | None:
        """The stage times for arms of this batch and number of micro-batches, the same for flush and PACI."""
        same = [
            (other, result.events)
            for other, results in self.by_arm.items()
            if (other.batch_size, other.microbatches_per_update) == (arm.batch_size, arm.microbatches_per_update)
            and (other.recompute, other.optimizer, other.bf16) == (arm.recompute, arm.optimizer, arm.bf16)
            and other.stages_per_process == arm.stages_per_process
            for result in results
        ]
        return timing.seconds_per_microbatch(same)

    def curve(self, arm: Arm, seconds_of: Arm | None = None) -> st.Curve:
        """The mean validation curve over seeds, on its own time or, where time is computed, on that of ``seconds_of``."""
        if not self.study.is_emulated:
            return st.mean_curve([[st.Point(*e[1:]) for e in run.evaluations()] for run in self.by_arm[arm]])
        timed = seconds_of or arm
        period = self.study.train_iters(arm) // self.study.num_periods
        stage_seconds = self.stage_seconds(timed)
        assert stage_seconds is not None
        period_s = timing.period_seconds(timed, period, stage_seconds)
        return st.mean_curve(
            [[st.Point(e[1], e[0] / period * period_s, e[3]) for e in run.evaluations()] for run in self.by_arm[arm]]
        )

    def reference(self, arm: Arm) -> Arm | None:
        """Flush of the same batch, rate, optimizer, precision and stages with the most seeds, or the first."""
        names = ("batch_size", "lr_factor", "optimizer", "beta1", "bf16", "stages_per_process")
        setting = {name: getattr(arm, name) for name in names}
        flush = [
            other
            for other in self.arms
            if other.is_flush
            and dataclasses.replace(other, **setting) == other
            and dataclasses.replace(
                other, lr_factor=1.0, optimizer="adam", beta1=0.9, bf16=False, stages_per_process=1
            ).is_plain
        ]
        return max(flush, key=lambda arm: len(self.by_arm[arm]), default=None)

    def flush_curve(self, batch_size: int, count: int) -> st.Curve | None:
        """Flush's curve with ``count`` micro-batches.

        Under flush their number changes the loss by rounding only. Where time is computed the curve of the flush arm with
        the most seeds is put on the time of ``count`` micro-batches; where it is measured that arm must have been trained.
        """
        arm = Arm("1f1b", count, batch_size)
        trained = next((a for a in self.arms if a.name == arm.name), None)
        if not self.study.is_emulated:
            return self.curve(trained) if trained else None
        reference = self.reference(arm)
        if reference is None or self.stage_seconds(arm) is None:
            return None
        return self.curve(reference, seconds_of=arm)

    def counts(self, batch_size: int) -> list[int]:
        """The numbers of micro-batches in the main arms of this batch."""
        return sorted({a.microbatches_per_update for a in self.arms if a.batch_size == batch_size and not a.is_extra})

    def main_paci(self, batch_size: int) -> list[Arm]:
        """PACI's main arms of this batch, by micro-batches."""
        arms = [a for a in self.arms if a.batch_size == batch_size and not a.is_flush and not a.is_extra and a.is_plain]
        return sorted(arms, key=lambda arm: arm.microbatches_per_update)

    def arm_rows(self) -> list[dict[str, Any]]:
        """One row an arm: losses, perplexity, drift, and the difference to flush at the same batch."""
        return [
            self._arm_row(arm) for arm in sorted(self.arms, key=lambda a: (a.is_extra, a.batch_size, a.is_flush is False))
        ]

    def _arm_row(self, arm: Arm) -> dict[str, Any]:
        runs, num_stages = self.by_arm[arm], self.study.num_stages
        # The last evaluation period: the learning rate has fallen, and the mean is over many updates.
        tail = self.study.logs_per_period
        loss = st.spread([run.final_loss() for run in runs])
        return {
            "arm": arm.name,
            "schedule": arm.schedule,
            "batch_size": arm.batch_size,
            "microbatches_per_update": arm.microbatches_per_update,
            "seeds": [run.seed for run in runs],
            "max_drift": max(run.max_drift() for run in runs),
            "max_drift_bound": arm.max_drift(num_stages),
            "stage_mean_drift": arm.mean_drift(num_stages),
            "weight_change": next((run.weight_change() for run in runs if run.weight_change() is not None), None),
            "validation_loss": loss._asdict(),
            "validation_perplexity": st.spread([math.exp(run.final_loss()) for run in runs])._asdict(),
            "training_loss": st.spread([fmean(run.training_losses()[-tail:]) for run in runs])._asdict(),
            "training_loss_spread": st.spread_over_runs([run.training_losses()[-2 * tail :] for run in runs]),
            "copied_weight_bytes": max(run.copied_weight_bytes() for run in runs),
            "against_flush": self._against_flush(arm),
        }

    def _against_flush(self, arm: Arm) -> dict[str, Any] | None:
        """The difference to flush at the same batch and rate."""
        reference = self.reference(arm)
        if reference is None or reference is arm:
            return None
        difference = self.difference(arm, reference)
        return None if difference is None else {"flush_arm": reference.name, **difference}

    def difference(self, arm: Arm, reference: Arm) -> dict[str, Any] | None:
        """The relative difference of perplexity to ``reference`` by seed, beside the spread of its loss; None if no seed
        has trained both.
        """
        flush = {run.seed: run.final_loss() for run in self.by_arm[reference]}
        pairs = [run.final_loss() - flush[run.seed] for run in self.by_arm[arm] if run.seed in flush]
        if not pairs:
            return None
        flush_std = st.spread(list(flush.values())).std
        difference = st.spread([math.expm1(d) for d in pairs])
        return {"perplexity_change": difference._asdict(), "flush_loss_std": flush_std}

    def threshold_rows(self) -> list[dict[str, Any]]:
        """For each batch and perplexity: seconds of every arm, and PACI's speed-ups."""
        rows: list[dict[str, Any]] = []
        for batch_size in self.batch_sizes:
            arms = self.main_paci(batch_size)
            reference = self.reference(arms[0]) if arms else None
            if reference is None:
                continue
            curves = {arm: self.curve(arm) for arm in arms}
            flush = {count: self.flush_curve(batch_size, count) for count in self.counts(batch_size)}
            reference_losses = [point.loss for point in self.curve(reference)]
            reachable = max(min(p.loss for p in curve) for curve in [*curves.values(), self.curve(reference)])
            for perplexity in st.thresholds(reference_losses, reachable):
                flush_s = {count: st.time_to(curve, perplexity) for count, curve in flush.items() if curve}
                rows.extend(self._threshold_row(arm, perplexity, curves[arm], flush_s) for arm in arms)
        return rows

    @staticmethod
    def _threshold_row(arm: Arm, perplexity: float, curve: st.Curve, flush_s: dict[int, float | None]) -> dict[str, Any]:
        seconds = st.time_to(curve, perplexity)
        same = flush_s.get(arm.microbatches_per_update)
        reached = {count: s for count, s in flush_s.items() if s is not None}
        best = min(reached, key=lambda count: reached[count], default=None)

        def speedup(flush_seconds: float | None) -> float | None:
            return flush_seconds / seconds if flush_seconds is not None and seconds else None

        return {
            "batch_size": arm.batch_size,
            "microbatches_per_update": arm.microbatches_per_update,
            "perplexity": perplexity,
            "seconds": seconds,
            "flush_seconds": same,
            "speedup": speedup(same),
            "best_flush_microbatches_per_update": best,
            "best_flush_seconds": None if best is None else reached[best],
            "speedup_over_best_flush": speedup(None if best is None else reached[best]),
        }

    def throughput_rows(self) -> list[dict[str, Any]]:
        """For each batch and number of micro-batches: both schedules' speed, its ratio and limit, and activations held."""
        rows: list[dict[str, Any]] = []
        for batch_size in self.batch_sizes:
            for count in self.counts(batch_size):
                pair = [Arm(schedule, count, batch_size) for schedule in ("1f1b", "paci")]
                speeds = [self._tokens_per_second(arm) for arm in pair]
                held = [timing.in_flight(arm, self.study.num_stages) * arm.micro_batch_size for arm in pair]
                rows.append(
                    {
                        "batch_size": batch_size,
                        "microbatches_per_update": count,
                        "flush_tokens_per_second": speeds[0],
                        "paci_tokens_per_second": speeds[1],
                        "speedup": speeds[1] / speeds[0] if speeds[0] and speeds[1] else None,
                        "limit": (count + self.study.num_stages - 1) / count,
                        "flush_held_sequences": held[0],
                        "paci_held_sequences": held[1],
                    }
                )
        return rows

    def _tokens_per_second(self, arm: Arm) -> float | None:
        if self.study.is_emulated:
            stage_seconds = self.stage_seconds(arm)
            return timing.tokens_per_second(arm, self.study.seq_length, stage_seconds) if stage_seconds else None
        trained = next((a for a in self.arms if a.name == arm.name), None)
        if trained is None:
            return None
        return fmean(run.measured_tokens_per_second() for run in self.by_arm[trained])

    def as_dict(self) -> dict[str, Any]:
        """The whole report."""
        study = self.study
        runs = list(study.runs())
        return {
            "set": study.name,
            "num_stages": study.num_stages,
            "stages_share_a_device": study.is_emulated,
            "times_are": self.timing,
            "tokens": study.tokens,
            "seq_length": study.seq_length,
            "seeds": list(study.seeds),
            "planned_runs": len(runs),
            "finished_runs": sum(len(results) for results in self.by_arm.values()),
            "arms": self.arm_rows(),
            "best": best_rows(self),
            "thresholds": self.threshold_rows(),
            "throughput": self.throughput_rows(),
        }
