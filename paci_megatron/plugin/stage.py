"""A stage of the pipeline in this process, for as long as the run lasts."""

from __future__ import annotations

import argparse
import contextlib
import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from megatron.core.utils import get_model_config, unwrap_model

from paci_megatron.runtime.control import Record
from paci_megatron.runtime.look_ahead import LookAhead
from paci_megatron.runtime.loss_scale import LossScale
from paci_megatron.runtime.meters import StageMeter
from paci_megatron.runtime.readings import Readings
from paci_megatron.runtime.saved import SavedActivations
from paci_megatron.runtime.steps import OptimizerSteps
from paci_megatron.telemetry.trace import StageTrace

_FINGERPRINT_PART = 1 << 20


def transfer_dtype(args: argparse.Namespace, model_config: Any) -> torch.dtype:
    """What activations and their gradients are sent in from stage to stage."""
    dtype: torch.dtype = torch.bfloat16 if args.paci_transfer_dtype == "bf16" else model_config.pipeline_dtype
    return dtype


class _Alone:
    """In place of a process group: nobody to reduce with."""

    def size(self) -> int:
        return 1


class Stage:
    """What one stage consists of: its model part, optimizer and scheduler, its process groups, and what measures it.

    What it does is in :class:`~.running_plan.RunningPlan`, of which there is one from each drain to the next.
    """

    def __init__(
        self,
        stage_index: int,
        num_stages: int,
        model: Any,
        optimizer: Any,
        scheduler: Any,
        groups: Any,
        meter: StageMeter,
        active: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        """``model`` is Megatron's wrapped chunk, ``groups`` its process groups. Whatever the stage does happens inside
        ``active``, where Megatron sees its place in the pipeline and its random numbers.
        """
        self.stage_index = stage_index
        self.is_first, self.is_last = stage_index == 0, stage_index == num_stages - 1
        self.model = model
        self.model_config = get_model_config(model)
        self.optimizer = optimizer
        self.steps = OptimizerSteps(optimizer)
        self.scheduler = scheduler
        self.groups = groups
        self.meter = meter
        self.active = active
        self.trace: StageTrace | None = None
        self.readings = Readings()
        self.loss_scale = LossScale(optimizer)
        self.last_total = Record()  # of all stages, of the last update before a drain
        self.max_attention_logit = 0.0  # of the forwards between the last two updates, where Megatron is asked for it
        self.look_ahead: LookAhead | None = None  # where it is asked for
        self.saved: SavedActivations | None = None  # counts what forwards leave for backwards, while it is wanted
        # The model decides, not the flag: a script may build an untied one of its own.
        shares = getattr(unwrap_model(model), "share_embeddings_and_output_weights", False)
        # Multi-token prediction has a copy of the embedding on the last stage.
        self.ties_embeddings = bool(shares or self.model_config.mtp_num_layers)
        self._finalize_groups = copy.copy(groups)
        self._finalize_groups.embd = _Alone()  # tied gradients are summed in runtime/tied_embeddings.py

    def tied_weight(self) -> torch.nn.Parameter | None:
        """The matrix that the first and last stage train together, (vocabulary, hidden), where the model ties it and this
        is one of them. A frozen one (``--freeze-all-layers``) has no gradient to share.
        """
        if not self.ties_embeddings or not (self.is_first or self.is_last):
            return None
        weight: torch.nn.Parameter = unwrap_model(self.model).shared_embedding_or_output_weight()
        return weight if weight.requires_grad else None

    def tied_fingerprint(self) -> int | None:
        """A number that the same tied matrix, bit for bit, gives on the other stage; None where there is none."""
        weight = self.tied_weight()
        if weight is None:
            return None
        bits = weight.detach().contiguous().view(torch.int16).view(-1)
        # A part at a time: the whole as 64-bit numbers would be the most memory that training ever takes.
        weights = torch.arange(_FINGERPRINT_PART, device=bits.device) % 65521 + 1
        total = torch.zeros((), dtype=torch.int64, device=bits.device)
        for index, part in enumerate(bits.split(_FINGERPRINT_PART)):
            total += (part.long() * weights[: part.numel()]).sum() * (2 * index + 1)
        return int(total)

    def finalize_gradients(self) -> None:
        """Complete a window's gradients with Megatron's own function, but for what concerns other stages."""
        self.model_config.finalize_model_grads_func(
            [self.model], None, pg_collection=self._finalize_groups, force_all_reduce=False
        )
