"""A pipeline of small stages that the runtime trains alone: its executor, links, records, updates and tied embedding."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch

from paci_megatron.runtime.control import Clipping, Control, Record
from paci_megatron.runtime.executor import Executor
from paci_megatron.runtime.links import Transport
from paci_megatron.runtime.loss_scale import LossScale
from paci_megatron.runtime.meters import StageMeter
from paci_megatron.runtime.state import InFlight
from paci_megatron.runtime.steps import OptimizerSteps
from paci_megatron.runtime.tied_embeddings import TiedEmbedding
from paci_megatron.runtime.update import StageUpdate
from paci_megatron.runtime.weight_drift import WeightDrift
from paci_megatron.runtime.weights import WeightVersions
from paci_megatron.schedule.plan import Plan

WIDTH, VOCABULARY, LENGTH, SAMPLES = 8, 12, 5, 2
SHAPE = (LENGTH, SAMPLES, WIDTH)


class Model(torch.nn.Module):
    """A stage's part: the embedding on the first, the same matrix as output weights on the last, a layer on all."""

    def __init__(self, stage: int, num_stages: int) -> None:
        super().__init__()
        torch.manual_seed(stage)
        self.is_first, self.is_last = stage == 0, stage == num_stages - 1
        self.layer = torch.nn.Linear(WIDTH, WIDTH)
        if self.is_first or self.is_last:
            matrix = torch.randn(VOCABULARY, WIDTH, generator=torch.Generator().manual_seed(100))
            self.tied = torch.nn.Parameter(0.3 * matrix)
        for parameter in self.parameters():
            parameter.main_grad = torch.zeros_like(parameter)  # type: ignore[attr-defined]  # as Megatron's

    def forward(self, microbatch: int, activation: torch.Tensor | None) -> torch.Tensor:
        tokens = torch.randint(VOCABULARY, (LENGTH, SAMPLES), generator=torch.Generator().manual_seed(1000 + microbatch))
        hidden = self.tied[tokens] if activation is None else activation
        hidden = torch.tanh(self.layer(hidden)) + hidden
        if not self.is_last:
            return hidden
        return torch.nn.functional.cross_entropy((hidden @ self.tied.T).flatten(0, 1), tokens.roll(1, 0).flatten())

    def zero_grad_buffer(self) -> None:
        for parameter in self.parameters():
            parameter.main_grad.zero_()  # type: ignore[attr-defined]


class Optimizer:
    """Megatron's optimizer around AdamW, as far as the runtime uses it."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._adam = torch.optim.AdamW(model.parameters(), lr=0.05)
        self.param_groups = self._adam.param_groups
        self.step = self._adam.step
        self.zero_grad = self._adam.zero_grad

    def get_parameters(self) -> list[torch.nn.Parameter]:
        return list(self._model.parameters())

    def prepare_grads(self) -> None:
        for parameter in self._model.parameters():
            parameter.grad = parameter.main_grad  # type: ignore[attr-defined]

    def get_grad_norm(self) -> float:
        # The tied matrix counts once, on the first stage.
        counted = [p for p in self.get_parameters() if not (self._model.is_last and p is self._model.tied)]
        return float(torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in counted if p.grad is not None])))


class Compute:
    """A stage's forwards and backwards; see :class:`paci_megatron.runtime.compute.StageCompute`."""

    def __init__(self, model: Model) -> None:
        self._model = model

    def forward(self, microbatch: int, activation: torch.Tensor | None) -> torch.Tensor:
        return self._model(microbatch, activation)

    def release_output(self, output: torch.Tensor) -> None:
        output.data = torch.empty(1)  # as Megatron does with --deallocate-pipeline-outputs; the graph stays

    def backward(self, entry: InFlight, gradient: torch.Tensor | None) -> torch.Tensor | None:
        # Past the check of shapes, which the emptied output would not pass.
        torch.autograd.Variable._execution_engine.run_backward(
            (entry.output_tensor,), (gradient if gradient is not None else torch.ones(()),), False, False, (), True, True
        )
        for parameter in self._model.parameters():
            if parameter.grad is not None:
                parameter.main_grad.add_(parameter.grad)  # type: ignore[attr-defined]
                parameter.grad = None
        return entry.input_tensor.grad if entry.input_tensor is not None else None


class ToyStage:
    """One stage of the pipeline, for as many plans as are run."""

    def __init__(self, stage_index: int, num_stages: int) -> None:
        self.index, self.num_stages = stage_index, num_stages
        self.model = Model(stage_index, num_stages)
        self.optimizer = Optimizer(self.model)
        self._steps, self._last_total = OptimizerSteps(self.optimizer), Record()
        self.compute = Compute(self.model)
        self.weight_drift = WeightDrift(tuple(self.model.parameters()))
        self.windows: list[tuple[torch.Tensor | None, list[int]]] = []  # what each has of the drift of the weights

    def begin(self, plan: Plan, transport: Transport) -> None:
        """A plan from an empty pipeline to its drain."""
        lag, scale = plan.record_lag, LossScale(SimpleNamespace())
        scale.begin_plan(lag)
        link, exchange = transport.link(self.index, plan), transport.tied_exchange(self.index, lag)
        self._control = Control(link, Clipping("global", 0.5), lag, self._last_total, scale)
        tied = TiedEmbedding(self.model.tied, exchange, self.index == 0, lag) if exchange is not None else None
        update = StageUpdate(
            self.model,
            self.optimizer,
            SimpleNamespace(step=lambda increment: None),
            self._control,
            lambda: self.windows.append(self.weight_drift.take_window()),
            self._steps,
            self.optimizer,
            samples_per_update=1,
            tied=tied,
        )
        meter = StageMeter(self.index, self.num_stages, torch.device("cpu"))
        meter.begin_plan(plan)
        weights = WeightVersions(tuple(self.model.parameters()), "latest", plan.microbatches_per_update)
        compute: Any = self.compute
        self.executor = Executor(
            plan.actions(self.index), compute, link, update, weights, meter, weight_drift=self.weight_drift
        )

    def end(self) -> None:
        """The plan's drain."""
        self.executor.finish()
        self._last_total = self._control.last_total

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """See :class:`paci_megatron.runtime.turns.RunningStage`."""
        yield

    def weights(self) -> list[torch.Tensor]:
        """A copy of all weights."""
        return [parameter.detach().clone() for parameter in self.model.parameters()]
