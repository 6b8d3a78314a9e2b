"""What a pipeline's stages and links take, from text and in text."""

from __future__ import annotations

import math

from paci_megatron.usage import UsageError, require

from .engine import Costs, StageCosts


def parse_stage_ms(text: str, update_ms: float) -> StageCosts:
    """The costs of one stage from ``FORWARD:BACKWARD[:WEIGHT]``."""
    try:
        forward_s, backward_s, *rest = (float(part) / 1000 for part in text.split(":"))
        (weight_s,) = rest or [backward_s / 2]
    except ValueError:
        raise UsageError(f"--stage-ms {text}: expected FORWARD:BACKWARD or FORWARD:BACKWARD:WEIGHT, like 100:200") from None
    positive = 0 < forward_s < math.inf and 0 < backward_s < math.inf
    require(positive, f"--stage-ms {text}: a forward and a backward take time; give milliseconds above 0")
    message = f"--stage-ms {text}: WEIGHT is a part of BACKWARD; give 0 to {backward_s * 1000:g}, or leave it out"
    require(0 <= weight_s <= backward_s, message)
    return StageCosts(forward_s, backward_s, weight_s, update_ms / 1000)


def describe(costs: Costs) -> str:
    """The costs in one line."""

    def times(stage: StageCosts) -> str:
        ms = (stage.forward_s, stage.backward_s, stage.weight_gradient_s)
        return ":".join(f"{seconds * 1000:.4g}" for seconds in ms)

    stages = costs.stages
    each = "all " + times(stages[0]) if len(set(stages)) == 1 else " ".join(times(stage) for stage in stages)
    parts = [f"stages (forward:backward:weight gradients, ms): {each}"]
    for what, seconds in (
        ("update", stages[0].update_s),
        ("transfer latency", costs.latency_s),
        ("transfer on its link", costs.link_s),
    ):
        if seconds:
            parts.append(f"{what} {seconds * 1000:.4g} ms")
    return ", ".join(parts + ([f"jitter {costs.jitter:.0%}"] if costs.jitter else []))
