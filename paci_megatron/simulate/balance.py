"""Which layers go on which stage, so that the slowest stage is as fast as can be."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from .costs import StageCosts


@dataclass(frozen=True, slots=True)
class Part:
    """Something that is on one stage as a whole: its seconds for one micro-batch."""

    forward_s: float
    backward_s: float

    @property
    def seconds(self) -> float:
        """Forward and backward."""
        return self.forward_s + self.backward_s


@dataclass(frozen=True)
class Model:
    """A model's parts in order: the embedding, the transformer layers, and the final norm, output layer and loss as one.

    ``after_receiving`` is what every stage but the first does besides its parts, ``before_sending`` every stage but the
    last.
    """

    embedding: Part
    layers: tuple[Part, ...]
    loss: Part
    after_receiving: Part = Part(0, 0)
    before_sending: Part = Part(0, 0)

    @property
    def parts(self) -> tuple[Part, ...]:
        """All of them, first to last."""
        return (self.embedding, *self.layers, self.loss)

    def stage_costs(self, counts: Sequence[int], update_s: float = 0) -> list[StageCosts]:
        """What stages of so many parts each take, first to last."""
        ends = [0, *accumulate(counts)]
        costs = []
        for stage, (begin, end) in enumerate(pairwise(ends)):
            held = [*self.parts[begin:end], *self._besides(stage, len(counts))]
            forward_s, backward_s = sum(part.forward_s for part in held), sum(part.backward_s for part in held)
            costs.append(StageCosts(forward_s, backward_s, update_s=update_s))
        return costs

    def _besides(self, stage: int, num_stages: int) -> list[Part]:
        return [self.after_receiving] * (stage > 0) + [self.before_sending] * (stage < num_stages - 1)

    def balance(self, num_stages: int) -> list[int]:
        """How many parts each stage gets for the slowest one to be as fast as can be; of such the most even.

        ``ValueError`` with fewer parts than stages: a stage without any would only pass tensors on.
        """
        besides_s = [sum(part.seconds for part in self._besides(s, num_stages)) for s in range(num_stages)]
        return partition([part.seconds for part in self.parts], besides_s)


def partition(times_s: Sequence[float], besides_s: Sequence[float]) -> list[int]:
    """How many of ``times_s``, in order, each stage gets: at least one each, all together all.

    A stage takes the sum of what it gets and its entry of ``besides_s``, which has an entry a stage. The greatest time of a
    stage is the least possible, exactly, and of the partitions with that, the sum of squares is the least. By dynamic
    programming in N L^2 steps. ``ValueError`` with more stages than times.
    """
    if len(times_s) < len(besides_s):
        raise ValueError(
            f"{len(times_s)} parts for {len(besides_s)} stages: each needs one; use at most {len(times_s)} stages"
        )
    slowest_s, _ = _best(times_s, besides_s, max, lambda stage_s: stage_s)
    _, counts = _best(times_s, besides_s, lambda a, b: a + b, lambda s: s * s if s <= slowest_s else math.inf)
    return counts


def _best(
    times_s: Sequence[float],
    besides_s: Sequence[float],
    together: Callable[[float, float], float],
    value: Callable[[float], float],
) -> tuple[float, list[int]]:
    """The least that ``together`` makes of the stages' values, and how many parts each stage then has."""
    sums_s = [0.0, *accumulate(times_s)]
    parts, num_stages = len(times_s), len(besides_s)
    best = [0.0] + [math.inf] * parts  # by the parts that the stages so far have
    choices: list[list[int]] = []
    for stage in range(num_stages):
        following, chosen = [math.inf] * (parts + 1), [0] * (parts + 1)
        for end in range(stage + 1, parts - (num_stages - 1 - stage) + 1):
            for begin in range(stage, end):
                total = together(best[begin], value(sums_s[end] - sums_s[begin] + besides_s[stage]))
                if total < following[end]:
                    following[end], chosen[end] = total, begin
        best, choices = following, [*choices, chosen]
    ends = [parts]
    for chosen in reversed(choices):
        ends.append(chosen[ends[-1]])
    return best[parts], [end - begin for begin, end in pairwise(reversed(ends))]


def layout(counts: Sequence[int]) -> str:
    """Megatron's ``--pipeline-model-parallel-layout`` for stages of so many parts, such as ``Et*3|t*4|t*3L``."""
    stages, last = [], len(counts) - 1
    for stage, count in enumerate(counts):
        layers = count - (stage == 0) - (stage == last)
        text = "t" if layers == 1 else f"t*{layers}" if layers else ""
        stages.append("E" * (stage == 0) + text + "L" * (stage == last))
    return "|".join(stages)
