"""The laboratory's learning rate and beta1 by stage."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lab.study.by_stage import beta1, rate
from lab.study.commands import Data, training_command
from lab.study.main import SETS


def stage_update(delay: float, done: int = 0) -> Any:
    groups = [{"lr": 0.6, "betas": (0.9, 0.95)}, {"lr": 0.06, "betas": (0.9, 0.95)}]
    scheduler = SimpleNamespace(num_steps=done, lr_warmup_steps=100)
    return SimpleNamespace(_delay=delay, _scheduler=scheduler, _optimizer=SimpleNamespace(param_groups=groups))


@pytest.mark.parametrize(
    ("delay", "done", "factor"), [(2.0, 0, 1 / 3), (2.0, 50, 3**-0.5), (2.0, 100, 1), (2.0, 900, 1), (0.0, 0, 1)]
)
def test_a_rate_is_lower_by_delay_until_the_warmup_ends(delay: float, done: int, factor: float) -> None:
    update = stage_update(delay, done)
    rate(update)
    assert [group["lr"] for group in update._optimizer.param_groups] == pytest.approx([0.6 * factor, 0.06 * factor])


@pytest.mark.parametrize("delay", [0.0, 1.75, 40.0])
def test_gradients_and_delay_are_of_the_same_age_together(delay: float, monkeypatch: pytest.MonkeyPatch) -> None:
    import megatron.training

    monkeypatch.setattr(megatron.training, "get_args", lambda: SimpleNamespace(adam_beta1=0.9))
    update = stage_update(delay)
    for _ in range(2):  # every update anew, from the common beta1
        beta1(update)
    for group in update._optimizer.param_groups:
        own, beta2 = group["betas"]
        assert own / (1 - own) == pytest.approx(max(0.0, 9 - delay)) and beta2 == 0.95


def test_only_the_arms_by_stage_train_with_it() -> None:
    study = SETS["small"]()
    for arm in study.arms:
        command = training_command(study, arm, 1, Data("train", "valid", (), 8), Path("run"))
        assert ("lab.study.by_stage" in command) == arm.name.endswith("-by-stage")
        assert ("pretrain_gpt_paci.py" in command) != ("lab.study.by_stage" in command)
