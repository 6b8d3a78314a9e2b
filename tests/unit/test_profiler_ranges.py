"""Each action of a plan is a range of that name in PyTorch's profiler, and so in nsys."""

from __future__ import annotations

import torch

from paci_megatron.runtime.emulate import InProcessTransport
from paci_megatron.runtime.turns import run_to_update
from paci_megatron.schedule.plan import Plan
from tests.support.toy_pipeline import ToyStage


def test_a_profile_has_every_action_by_its_name() -> None:
    plan = Plan("paci", 2, 2, (), lambda update: update == 2)
    stages = [ToyStage(stage, 2) for stage in range(2)]
    transport = InProcessTransport(2, True, lambda record: record)
    for stage in stages:
        stage.begin(plan, transport)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(2):
            run_to_update(stages)
    names = {event.key for event in profile.key_averages()}
    assert {*(f"{kind}{m}" for kind in ("F", "B", "SF", "SB") for m in range(4)), "R1", "T1", "U1", "U2"} <= names
