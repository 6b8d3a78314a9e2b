"""One stage as the host sees it: its model part, its optimizer, and the executor of the running plan."""

from __future__ import annotations

import argparse
import contextlib
import copy
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.utils import get_model_config, unwrap_model

from paci_megatron.config import PaciConfig
from paci_megatron.runtime.compute import StageCompute
from paci_megatron.runtime.control import Clipping, Control, Record
from paci_megatron.runtime.executor import Executor
from paci_megatron.runtime.links import StageLink
from paci_megatron.runtime.meters import BoundError, StageMeter
from paci_megatron.runtime.readings import Readings
from paci_megatron.runtime.saved import SavedActivations
from paci_megatron.runtime.tied_embeddings import TensorExchange, TiedEmbedding
from paci_megatron.runtime.update import StageUpdate, UpdateResult
from paci_megatron.runtime.weights import WeightVersions
from paci_megatron.schedule import Action, Kind, one_f_one_b_flush, paci, with_transfers
from paci_megatron.schedule.records import record_lag, with_records
from paci_megatron.schedule.schedules import IsDrain, max_in_flight, never
from paci_megatron.telemetry.trace import StageTrace

from .exits import exit_wanted

OnTotal = Callable[[int, Record], None]

_FINGERPRINT_PART = 1 << 20


@dataclass(frozen=True)
class Wiring:
    """How a stage reaches the others. Links and exchanges are made once a plan, for the plan's record lag.

    ``agree`` makes one record of those of all ranks of the first stage. ``exchange`` is there if embeddings are tied, on the
    two stages that hold them.
    """

    link: Callable[[int], StageLink]
    agree: Callable[[Record], Record] = lambda record: record
    exchange: Callable[[int], TensorExchange] | None = None
    rank_of: Callable[[int], int] = lambda stage_index: 0


class _Alone:
    """In place of a process group: nobody to reduce with."""

    def size(self) -> int:
        return 1


class Stage:
    """A stage of the pipeline in this process. The executor exists from the first micro-batch after a drain to the next."""

    def __init__(
        self,
        stage_index: int,
        config: PaciConfig,
        model: Any,
        optimizer: Any,
        scheduler: Any,
        groups: Any,
        meter: StageMeter,
        wiring: Wiring,
        active: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        """``model`` is Megatron's wrapped chunk, ``groups`` its process groups."""
        self.stage_index = stage_index
        self.model = model
        self.model_config = get_model_config(model)
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.groups = groups
        self.meter = meter
        self.trace: StageTrace | None = None
        self.active = active
        self._config = config
        self._wiring = wiring
        self._finalize_groups = copy.copy(groups)
        self._finalize_groups.embd = _Alone()  # tied gradients are summed in runtime/tied_embeddings.py
        self.last_total = Record()  # of the last update before a drain
        self.readings = Readings()
        self._watches_loss = False
        self._saved: SavedActivations | None = None
        self._control: Control | None = None
        self._executor: Executor | None = None
        self._compute: StageCompute | None = None
        self._microbatches_per_update = self._begin = self._in_flight_cap = 0
        self._is_drain: IsDrain = never

    @property
    def is_last(self) -> bool:
        """Whether this is the stage with the loss."""
        return self.stage_index == self._config.num_stages - 1

    def measure_saved_activations(self) -> None:
        """Count what forwards leave for backwards until the pipeline has been full, for the meter."""
        self._saved = SavedActivations(self.model.parameters())

    def is_drained(self) -> bool:
        """Whether no plan is running."""
        return self._executor is None

    def begin_plan(self, a: int, is_drain: IsDrain, args: argparse.Namespace, iteration: int, on_total: OnTotal) -> None:
        """Start a plan of ``a`` micro-batches per update after ``iteration``, with an empty pipeline. ``on_total`` is told
        each total.
        """
        index, num_stages, extra = self.stage_index, self._config.num_stages, self._config.extra_in_flight
        lag = record_lag(num_stages, a, extra)
        self._microbatches_per_update, self._is_drain, self._begin = a, is_drain, iteration
        self._watches_loss = bool(args.paci_fallback) and self.is_last
        self._in_flight_cap = max_in_flight(index, num_stages, extra)
        self.meter.begin_plan(a, extra)
        self._compute = StageCompute(
            self.model,
            self.model_config,
            microbatches_per_update=a,
            in_flight_cap=self._in_flight_cap,
            is_last_stage=self.is_last,
            context_parallel_size=self.groups.cp.size(),
        )
        link = self._wiring.link(lag)
        clipping = Clipping(self._config.clip_mode, args.clip_grad)
        self._control = Control(link, clipping, lag, self.last_total, self._wiring.agree, on_total)
        update = StageUpdate(
            self.model,
            self.optimizer,
            self.scheduler,
            self._control,
            self._finalize,
            samples_per_update=a * args.micro_batch_size * args.data_parallel_size * args.gtp_weight_remat_size,
            take_num_tokens=self._take_num_tokens if self.model_config.calculate_per_token_loss else None,
            remarks=partial(self._remarks, args.log_interval),
            readings=self.readings,
            tied=self._tied_embedding(lag),
        )
        weights = WeightVersions(tuple(self.model.parameters()), self._config.weight_policy, a)
        plan = self._plan(index, a, is_drain)
        self._executor = Executor(plan, self._compute, link, update, weights, self.meter, self.trace)
        if self.trace is not None:
            self.trace.begin_plan(a, iteration)

    def _plan(self, index: int, a: int, is_drain: IsDrain) -> Iterator[Action]:
        """The actions of the stage at ``index``."""
        num_stages, extra = self._config.num_stages, self._config.extra_in_flight
        if self._config.schedule == "paci":
            actions = paci(index, num_stages, a, is_drain, extra)
        else:
            actions, is_drain = one_f_one_b_flush(index, num_stages, a), lambda update: True
        actions = with_transfers(actions, index, num_stages, a, is_drain, extra)
        return with_records(actions, num_stages, a, is_drain, extra)

    def _tied_embedding(self, lag: int) -> TiedEmbedding | None:
        exchange = self._wiring.exchange(lag) if self._wiring.exchange is not None else None
        if exchange is None:
            return None
        weight = unwrap_model(self.model).shared_embedding_or_output_weight()
        return TiedEmbedding(weight, exchange, self.stage_index == 0, lag)

    @property
    def holds_tied_embedding(self) -> bool:
        """Whether this stage has a replica of a matrix that the first and last stage share."""
        return self._wiring.exchange is not None

    def tied_fingerprint(self) -> int:
        """A number that the same matrix, bit for bit, gives on the other stage."""
        weight = unwrap_model(self.model).shared_embedding_or_output_weight().detach()
        bits = weight.contiguous().view(torch.int16).view(-1)
        # A part at a time: the whole as 64-bit numbers would be the most memory that training ever takes.
        weights = torch.arange(_FINGERPRINT_PART, device=bits.device) % 65521 + 1
        total = torch.zeros((), dtype=torch.int64, device=bits.device)
        for index, part in enumerate(bits.split(_FINGERPRINT_PART)):
            total += (part.long() * weights[: part.numel()]).sum() * (2 * index + 1)
        return int(total)

    def _remarks(self, log_interval: int, update: int) -> Record:
        """What else this stage tells the others as its window ends, and its figures for the log."""
        if (self._begin + update) % log_interval == 0:
            self.meter.end_interval()
        least, most = self.meter.bubbles
        loss = float(self.readings.read("loss")) if self._watches_loss else 0.0
        return Record(
            exits=float(exit_wanted()),
            loss=loss,
            least_bubble=least,
            most_bubble=most,
            max_drift=float(self.meter.max_drift),
        )

    def _take_num_tokens(self) -> torch.Tensor | None:
        """The window's tokens over all replicas of the last stage, which alone knows them, (1,)."""
        if not self.is_last:
            return None
        assert self._compute is not None
        num_tokens = self._compute.take_num_tokens()
        torch.distributed.all_reduce(num_tokens, group=self.groups.dp_cp)
        return num_tokens

    def feed(self, forward_step_func: Any, data_iterator: Any) -> None:
        """Set where the next forwards come from."""
        assert self._compute is not None
        self._compute.forward_step_func = forward_step_func
        self._compute.data_iterator = data_iterator

    def has_input(self) -> bool:
        """See :meth:`Executor.has_input`."""
        assert self._executor is not None
        return self._executor.has_input()

    def run_to_update(self) -> UpdateResult | None:
        """See :meth:`Executor.run_to_update`."""
        assert self._executor is not None
        try:
            with self._saved.watched() if self._saved is not None else contextlib.nullcontext():
                result = self._executor.run_to_update()
            self._note_saved_activations()
            return result
        except BoundError as error:
            raise BoundError(f"{error}. The plan around it:\n{self.plan_text()}") from error
        except Exception as error:
            error.add_note(f"paci-megatron: {self.where()}")
            raise

    def _window_loss(self) -> torch.Tensor:
        """The mean loss of the window just computed, on the last stage."""
        assert self._compute is not None
        values = torch.stack([next(iter(report.values())).view(-1).float() for report in self._compute.window_losses()])
        total = values.sum(dim=0)
        return total[0] / (total[1] if len(total) > 1 else len(values))

    def _note_saved_activations(self) -> None:
        if self._saved is None or self._executor is None:
            return
        self.meter.saved_activation_bytes = self._saved.peak_bytes
        if self._executor.state.forwards >= 2 * self._in_flight_cap:  # the peak has been, and counting costs time
            self._saved = None

    def waiting_s(self) -> float:
        """For how long the action at hand has been going on; 0 outside the plan. From any thread."""
        executor = self._executor
        return time.monotonic() - executor.since_s if executor is not None and executor.current is not None else 0.0

    def where(self) -> str:
        """Where this stage is in its plan, and whom it waits for. From any thread."""
        executor = self._executor
        if executor is None:
            return f"stage {self.stage_index}: drained"
        iteration = self._begin + executor.updates + 1
        text = f"stage {self.stage_index}, update of iteration {iteration}, last finished {executor.finished}"
        action = executor.current
        if action is None:
            return f"{text}, outside the plan"
        peer = {
            Kind.FORWARD: self.stage_index - 1,
            Kind.TOTAL: self.stage_index - 1,
            Kind.SEND_BACKWARD: self.stage_index - 1,
            Kind.BACKWARD: self.stage_index + 1,
            Kind.REPORT: self.stage_index + 1,
            Kind.SEND_FORWARD: self.stage_index + 1,
        }.get(action.kind)
        at = f"{text}, at {action} for {self.waiting_s():.0f} s"
        if peer is None or not 0 <= peer < self._config.num_stages:
            return at
        return f"{at}, which needs stage {peer} (rank {self._wiring.rank_of(peer)})"

    def plan_text(self) -> str:
        """The plan of all stages, from the update before this stage's last to the one after its next. From any thread."""
        executor = self._executor
        if executor is None:
            return ""
        around = range(max(executor.updates - 1, 1), executor.updates + 3)
        rows = []
        for stage in range(self._config.num_stages):
            text, update = [], 1
            for action in self._plan(stage, self._microbatches_per_update, self._is_drain):
                if update in around:
                    text.append(str(action))
                update += action.kind is Kind.UPDATE
                if update not in around and update > around[0]:
                    break
            rows.append(f"stage {stage}: {' '.join(text)}")
        return "\n".join(rows)

    def take_losses(self) -> list[Any]:
        """The loss reports of the window just updated."""
        assert self._compute is not None
        return self._compute.take_losses()

    def end_plan(self) -> None:
        """End the running plan at a drain."""
        assert self._executor is not None
        assert self._control is not None
        self._executor.finish()
        self._executor = None
        if self.trace is not None:
            self.trace.end_plan()
        self.last_total = self._control.last_total

    def _finalize(self) -> None:
        """Complete the window's gradients with Megatron's own function, but for what concerns other stages."""
        self.model_config.finalize_model_grads_func(
            [self.model], None, pg_collection=self._finalize_groups, force_all_reduce=False
        )
        if self._watches_loss:
            self.readings.copy("loss", self._window_loss())
