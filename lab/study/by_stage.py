"""Pretraining with another learning rate or beta1 on each stage: remedies for drift that were tried, and are no options.

torchrun -m lab.study.by_stage rate|beta1 <flags of pretrain_gpt_paci.py> --pipeline-schedule paci
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

from paci_megatron.runtime.update import StageUpdate


def rate(update: StageUpdate) -> None:
    """The scheduled rate by (1 + delay)^-p on a stage of this mean drift; p goes from 1 to 0 over the warm-up."""
    scheduler = update._scheduler
    power = max(0.0, 1 - scheduler.num_steps / scheduler.lr_warmup_steps)
    for group in update._optimizer.param_groups:  # the scheduler writes the next update's rates after this one
        group["lr"] *= (1 + update._delay) ** -power


def beta1(update: StageUpdate) -> None:
    """A beta1 whose mean over gradients is of the same age in spite of the delay: beta1 / (1 - beta1) updates less delay."""
    from megatron.training import get_args

    common: float = get_args().adam_beta1
    age = max(0.0, common / (1 - common) - update._delay)
    for group in update._optimizer.param_groups:
        group["betas"] = age / (1 + age), group["betas"][1]


def main() -> None:
    """Train as ``pretrain_gpt_paci.py`` does, with the first argument's change before every update of a stage."""
    before_update: Callable[[StageUpdate], None] = {"rate": rate, "beta1": beta1}[sys.argv.pop(1)]
    apply = StageUpdate.apply

    def apply_changed(self: StageUpdate, update: int) -> object:
        before_update(self)
        return apply(self, update)

    StageUpdate.apply = apply_changed  # type: ignore[method-assign,assignment]
    runpy.run_path(str(Path(__file__).parents[2] / "pretrain_gpt_paci.py"), run_name="__main__")


if __name__ == "__main__":
    main()
