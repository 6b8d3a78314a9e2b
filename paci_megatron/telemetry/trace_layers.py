"""A model's parts with the times that a trace measured."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, median

from paci_megatron.simulate.balance import Model, Part

from .trace_file import EMBEDDING, INPUT, LOSS, OUTPUT, StageStretch, Stretch, layer_part


def measured_model(stretch: Stretch, first: int, last: int) -> Model:
    """The model's parts, each with its median over iterations ``first`` to ``last``.

    ``ValueError`` if some stage's layers have not been measured in them.
    """
    by_stage = [_parts(stage, first, last) for stage in stretch.stages]
    parts = {part: times for stage in by_stage for part, times in stage.items() if part not in (INPUT, OUTPUT)}
    num_layers = sum(part not in (EMBEDDING, LOSS) for part in parts)
    missing = {EMBEDDING, LOSS, *map(layer_part, range(1, num_layers + 1))} - parts.keys()
    if missing:
        raise ValueError(f"{', '.join(sorted(missing))} not measured in iterations {first} to {last}; take more of them")
    return Model(
        embedding=parts[EMBEDDING],
        layers=tuple(parts[layer_part(number)] for number in range(1, num_layers + 1)),
        loss=parts[LOSS],
        after_receiving=_mean([stage[INPUT] for stage in by_stage if INPUT in stage]),
        before_sending=_mean([stage[OUTPUT] for stage in by_stage if OUTPUT in stage]),
    )


def layer_counts(stretch: Stretch) -> list[int]:
    """How many of the model's parts each stage of the traced run has."""
    counts = []
    for stage in stretch.stages:
        names = {part for event in stage.layers for part in event["forward_s"]}
        counts.append(len(names - {INPUT, OUTPUT}))
    return counts


def _parts(stage: StageStretch, first: int, last: int) -> dict[str, Part]:
    times: dict[str, dict[str, list[float]]] = {"forward": {}, "backward": {}}
    for event in stage.layers:
        if first <= event["iteration"] <= last:
            for direction, by_part in times.items():
                for part, seconds in event[f"{direction}_s"].items():
                    by_part.setdefault(part, []).append(seconds / event[f"{direction}s"])
    forward, backward = times["forward"], times["backward"]
    return {part: Part(median(forward[part]), median(backward[part])) for part in forward if part in backward}


def _mean(parts: Sequence[Part]) -> Part:
    if not parts:
        return Part(0, 0)
    return Part(fmean(part.forward_s for part in parts), fmean(part.backward_s for part in parts))
