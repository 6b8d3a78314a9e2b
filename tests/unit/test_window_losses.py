"""The losses of a stage that has come to the end of a window before the training loop has asked for an earlier one."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from paci_megatron.runtime.compute import StageCompute
from paci_megatron.runtime.loss_scale import LossScale


def test_each_window_has_its_own_losses_however_late_they_are_taken() -> None:
    compute = StageCompute(
        torch.nn.Linear(1, 1),
        SimpleNamespace(),
        microbatches_per_update=2,
        in_flight_cap=1,
        is_last_stage=True,
        context_parallel_size=1,
        loss_scale=LossScale(None),
    )
    compute.losses += [{"lm loss": torch.tensor(float(microbatch))} for microbatch in range(6)]
    assert [float(compute.window_loss()) for _ in range(2)] == [0.5, 2.5]
    assert [float(loss["lm loss"]) for loss in compute.take_losses()] == [0, 1]
    assert float(compute.window_loss()) == 4.5
    assert [float(loss["lm loss"]) for loss in compute.take_losses()] == [2, 3]
    assert [float(loss["lm loss"]) for loss in compute.take_losses()] == [4, 5]
