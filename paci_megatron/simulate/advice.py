"""What each schedule would give on a pipeline with given costs, and whether PACI is worth it there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import fmean

from paci_megatron.schedule.schedules import even_slack, flush_bubble_fraction, max_drift, speedup_limit

from .costs import Costs, StageCosts
from .engine import Simulation
from .peers import Schedule, find_schedule
from .slack import cheapest_slack

WORTHWHILE = 0.05
"""A smaller gain is not worth another optimization than the synchronous one."""

DRIFT_COST = {1: (0.007, 0.51, 0.011), 2: (0.013, 1.00, 0.063)}
"""What drift of at most so many updates cost with Adam at the lowest learning rate that was measured, and each schedule at
its own best one in 320 updates, with Adam and with Muon and a look-ahead, in perplexity after the same tokens:
``docs/results.md``, eight stages, B = 32."""

COMPARABLE_MEMORY = 1.5
"""A synchronous schedule is an alternative to PACI if it holds at most so many times its activations."""


@dataclass(frozen=True)
class Outcome:
    """What a schedule gives from drain to drain, by simulation. Lists have an entry a stage.

    ``peak_activations`` is in activations of one micro-batch on one stage. Drift is in updates, its mean that of the steady
    state. ``updates_late`` is for schedules that keep older weights, and so have no drift: how many updates older than
    the weights it is applied to those of a gradient may be.
    """

    schedule: str
    title: str
    microbatches_per_s: float
    speedup_vs_flush: float
    bubble_fraction: list[float]
    peak_activations: list[float]
    extra_weight_copies: list[int]
    max_drift: list[int]
    mean_drift: list[float]
    updates_late: int


@dataclass(frozen=True)
class Scenario:
    """A pipeline to plan for: what everything takes, and ``updates`` of a micro-batches between two drains."""

    microbatches_per_update: int
    updates: int
    costs: Costs

    @property
    def num_stages(self) -> int:
        """As many as there are costs."""
        return len(self.costs.stages)

    @cached_property
    def flush_microbatches_per_s(self) -> float:
        """Throughput of 1F1B-flush, which all else is compared with."""
        return self.simulate(find_schedule("1f1b")).microbatches_per_s()

    def simulate(self, schedule: Schedule, record: bool = False) -> Simulation:
        """One stretch from drain to drain; ``ValueError`` if ``schedule`` does not exist for this size."""
        return schedule.simulate(self.microbatches_per_update, self.updates, self.costs, record)

    def outcome(self, schedule: Schedule) -> Outcome:
        """What ``schedule`` gives; ``ValueError`` if it does not exist for this size."""
        run = self.simulate(schedule)
        stages = range(self.num_stages)
        lags = [stage.max_drift for stage in run.stages]
        # A micro-batch that entered after as many updates as the lag can reach met the pipeline full.
        settled = min(max(lags), len(run.stages[0].marks) - 2)
        keeps_none = schedule.kept_weights == "none"
        copies = {"none": [0 for _ in lags], "in flight": lags, "uniform": [max(lags) for _ in lags]}
        return Outcome(
            schedule=schedule.name,
            title=schedule.title,
            microbatches_per_s=run.microbatches_per_s(),
            speedup_vs_flush=run.microbatches_per_s() / self.flush_microbatches_per_s,
            bubble_fraction=[run.bubble_fraction(stage) for stage in stages],
            peak_activations=[run.peak_activations(stage) for stage in stages],
            extra_weight_copies=copies[schedule.kept_weights],
            max_drift=lags if keeps_none else [0 for _ in lags],
            mean_drift=[run.mean_drift(stage, settled) if keeps_none else 0.0 for stage in stages],
            updates_late=0 if keeps_none else max(lags),
        )

    def balanced(self) -> Scenario:
        """The same work spread evenly over the stages."""
        stages = self.costs.stages
        even = StageCosts(
            forward_s=fmean(stage.forward_s for stage in stages),
            backward_s=fmean(stage.backward_s for stage in stages),
            weight_s=fmean(stage.weight_gradient_s for stage in stages),
            update_s=fmean(stage.update_s for stage in stages),
        )
        return replace(self, costs=replace(self.costs, stages=(even,) * len(stages)))


def smallest_a(num_stages: int, drift: int = 1, extra_in_flight: int = 0) -> int:
    """The fewest micro-batches per update for which no stage drifts by more than ``drift`` updates."""
    a, slack = 1, even_slack(num_stages, extra_in_flight)
    while max_drift(0, num_stages, a, slack) > drift:
        a += 1
    return a


def advise(scenario: Scenario, others: Sequence[Outcome] = ()) -> list[str]:
    """Sentences: whether PACI helps, and what would change that. ``others`` are outcomes to hold it against."""
    if scenario.num_stages == 1:
        return ["PACI will not help: with one stage there is no bubble."]
    paci = scenario.outcome(find_schedule("paci"))
    computing_s = [stage.forward_s + stage.backward_s for stage in scenario.costs.stages]
    if max(computing_s) == min(computing_s):
        balance_gain, imbalance = 0.0, []
    else:
        balance_gain, sentence = _imbalance(scenario, paci, computing_s)
        imbalance = [sentence]
    reasons = [
        *_small_bubble(scenario, paci),
        *_other_limits(scenario, paci, balance_gain, max(computing_s)),
        *_rival(paci, others),
    ]
    limit = speedup_limit(scenario.num_stages, scenario.microbatches_per_update)
    speed = f"{paci.speedup_vs_flush:.2f}x the throughput of 1F1B-flush, where the bubble allows {limit:.2f}x"
    helps = not reasons and paci.speedup_vs_flush >= 1 + WORTHWHILE
    verdict = f"PACI helps: {speed}." if helps else f"PACI will not help much: {'; '.join([*reasons, speed])}."
    cost = _drift_cost(max(paci.max_drift))
    return [verdict, _smallest(scenario.num_stages), *_more_in_flight(scenario, paci), *imbalance, *cost]


def _small_bubble(scenario: Scenario, paci: Outcome) -> list[str]:
    if paci.speedup_vs_flush >= 1 + WORTHWHILE:
        return []
    n, a, updates = scenario.num_stages, scenario.microbatches_per_update, scenario.updates
    bubble, with_paci = flush_bubble_fraction(n, a), flush_bubble_fraction(n, a * updates)
    if bubble < WORTHWHILE:
        return [f"the bubble of 1F1B-flush is only {bubble:.1%}"]
    if with_paci > bubble / 2:
        return [f"with a drain every {updates} updates {with_paci:.1%} of the time is still bubble, so drain less often"]
    return []


def _other_limits(scenario: Scenario, paci: Outcome, balance_gain: float, slowest_s: float) -> list[str]:
    reasons = []
    link_s = max(scenario.costs.links_s)
    if link_s > slowest_s:
        message, stage = f"{link_s * 1000:g} ms", f"{slowest_s * 1000:g} ms"
        reasons.append(f"the links set the pace, a message occupies one for {message} and a stage computes for {stage}")
    if balance_gain > max(paci.speedup_vs_flush - 1, WORTHWHILE):
        reasons.append("balanced stages would gain more than PACI does, so balance them first")
    return reasons


def _rival(paci: Outcome, others: Sequence[Outcome]) -> list[str]:
    """The fastest synchronous schedule of comparable memory, if it comes close."""
    memory = max(paci.peak_activations)
    rivals = [
        other
        for other in others
        if not any(other.max_drift) and not other.updates_late and max(other.peak_activations) <= memory * COMPARABLE_MEMORY
        if other.schedule != "1f1b" and other.microbatches_per_s * (1 + WORTHWHILE) >= paci.microbatches_per_s
    ]
    if not rivals:
        return []
    best = max(rivals, key=lambda other: other.microbatches_per_s)
    share = best.microbatches_per_s / paci.microbatches_per_s
    held = f"{max(best.peak_activations):g} activations instead of {memory:g}"
    return [f"{best.title} reaches {share:.0%} of its speed without drift, holding {held}"]


def _smallest(num_stages: int) -> str:
    a = smallest_a(num_stages)
    limit = speedup_limit(num_stages, a)
    return f"Drift stays within 1 update from {a} micro-batches per update on, where the bubble allows {limit:.2f}x."


def _drift_cost(drift: int) -> list[str]:
    """What drift has cost where it was measured: the simulator knows nothing of losses."""
    if drift == 0:
        return []
    measured = min(drift, max(DRIFT_COST))
    least, most, remedied = DRIFT_COST[measured]
    beyond = f" A drift of up to {drift} costs more." if drift > measured else ""
    return [
        f"With Adam a drift of up to {measured} update{'s' * (measured > 1)} cost {least:.1%} of perplexity at a low "
        f"learning rate, and {most:.0%} at each schedule's best one in very short runs of a small model (docs/results.md); "
        f"there {remedied:.0%} with --optimizer muon and --paci-look-ahead.{beyond} Compare both schedules at your rate."
    ]


def _more_in_flight(scenario: Scenario, paci: Outcome) -> list[str]:
    """What more micro-batches in flight buy: one, and one more for each stage that follows."""

    def sentence(name: str, what: str) -> str:
        more = scenario.outcome(find_schedule(name))
        gain = more.microbatches_per_s / paci.microbatches_per_s - 1
        buys = f"{gain:.1%} throughput" if gain >= 0.005 else "nothing here"
        activations = f"{max(more.peak_activations):g} activations instead of {max(paci.peak_activations):g}"
        drift = f"a drift of up to {max(more.max_drift)} instead of {max(paci.max_drift)}"
        return f"{what} buys {buys}, for {activations} and {drift}."

    most = scenario.num_stages - 1
    sentences = [sentence("paci:1", "One more micro-batch in flight (paci:1)")]
    if most > 1:
        sentences.append(sentence(f"paci:{most}", f"One more for each stage that follows (paci:{most})"))
    slack = cheapest_slack(scenario.microbatches_per_update, scenario.costs, most=scenario.num_stages)
    if any(slack):
        name = f"paci:{','.join(map(str, slack))}"
        sentences.append(sentence(name, f"The cheapest that hides nearly all of the waiting ({name})"))
    return sentences


def _imbalance(scenario: Scenario, paci: Outcome, computing_s: list[float]) -> tuple[float, str]:
    """By how much PACI would be faster with balanced stages, as a share, and the sentence about it."""
    even = scenario.balanced()
    gain = even.simulate(find_schedule("paci")).microbatches_per_s() / paci.microbatches_per_s - 1
    flush_gain = even.flush_microbatches_per_s / scenario.flush_microbatches_per_s - 1
    slowest = computing_s.index(max(computing_s))
    return gain, (
        f"Stage {slowest} is the slowest: {max(computing_s) * 1000:g} ms a micro-batch, {fmean(computing_s) * 1000:g} ms on "
        f"average. Balanced stages would make PACI {gain:.1%} faster, 1F1B-flush {flush_gain:.1%}."
    )
