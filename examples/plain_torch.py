"""PACI without Megatron's training loop: trains a list of ``nn.Module`` stages, one process each, and checks itself.

    torchrun --nproc-per-node 4 examples/plain_torch.py

With a GPU for each process transfers go over NCCL, otherwise over gloo. At the end rank 0 trains the same stages again with
nothing but autograd and the weight versions of the plan, and compares every weight bit for bit.
"""

import functools
import os

import torch
import torch.distributed as dist
from torch import Tensor, nn

from paci_megatron.runtime.control import Clipping, Control, Record
from paci_megatron.runtime.executor import Executor
from paci_megatron.runtime.groups import ProcessTransport
from paci_megatron.runtime.meters import StageMeter
from paci_megatron.runtime.state import InFlight, UpdateResult
from paci_megatron.runtime.weights import WeightVersions
from paci_megatron.schedule import Kind
from paci_megatron.schedule.plan import Plan

A, UPDATES = 2, 20  # micro-batches per update; optimizer steps of each stage
SHAPE = (4, 32)  # of what one stage sends the next: (samples of a micro-batch, features)


def make_stages(num_stages: int, device: torch.device) -> list[nn.Module]:
    """Your model, cut into stages. Every process makes all of them, the same, and trains one."""
    torch.manual_seed(1)
    return [nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)).to(device) for _ in range(num_stages)]


def make_optimizer(stage: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(stage.parameters(), lr=3e-3)


class Compute:
    """A stage's forwards and backwards: a paci_megatron.runtime.executor.Compute."""

    def __init__(self, stage: nn.Module, is_last: bool, device: torch.device) -> None:
        self.stage, self.is_last, self.device = stage, is_last, device
        self.losses: list[Tensor] = []

    def forward(self, microbatch: int, activation: Tensor | None) -> Tensor:
        data = torch.randn(SHAPE, generator=torch.Generator().manual_seed(microbatch % 4)).to(self.device)
        output = self.stage(data if activation is None else activation)
        if self.is_last:  # the loss, whose gradients add up to those of the update
            output = nn.functional.mse_loss(output, data.roll(1, dims=1)) / A
            self.losses.append(output.detach())
        return output

    def release_output(self, output: Tensor) -> None:
        """Nothing: the output stays until its backward."""

    def backward(self, entry: InFlight, gradient: Tensor | None) -> Tensor | None:
        entry.output_tensor.backward(gradient)
        return None if entry.input_tensor is None else entry.input_tensor.grad


class Update:
    """A stage's optimizer steps: a paci_megatron.runtime.executor.Update."""

    def __init__(self, stage: nn.Module, control: Control) -> None:
        self.parameters, self.optimizer = tuple(stage.parameters()), make_optimizer(stage)
        self.control, self.pass_total = control, control.pass_total

    def report(self, update: int, later: Record) -> None:
        """The gradients are complete: a stage with replicas would sum them over these. Squared norms would go into the
        record, and ``control.coefficient(update)`` would then clip by the global norm."""
        self.control.report(update, Record(), later)

    def apply(self, update: int) -> UpdateResult:
        # Micro-batches in flight have saved these weights and are to use the new ones, which autograd would refuse.
        with torch.autograd._unsafe_preserve_version_counter(self.parameters):
            self.optimizer.step()
        self.optimizer.zero_grad()
        return UpdateResult(successful=True)

    def finish(self) -> None:
        """Nothing is left to do at a drain."""


def train(stage: nn.Module, plan: Plan, device: torch.device) -> list[Tensor]:
    """Train this process's stage to the plan's drain; the losses by micro-batch, on the last stage."""
    index, n, lag = dist.get_rank(), plan.num_stages, plan.record_lag
    transport = ProcessTransport(range(n), SHAPE, torch.float32, device, lag, over_nccl=device.type == "cuda")
    link = transport.link(index, plan)
    compute = Compute(stage, index == n - 1, device)
    update = Update(stage, Control(link, Clipping(), lag))
    meter = StageMeter(index, n, device)
    meter.begin_plan(plan)
    executor = Executor(
        plan.actions(index), compute, link, update, WeightVersions(tuple(stage.parameters()), "latest", A), meter
    )
    for _ in range(UPDATES):
        executor.run_to_update()  # returns with the next micro-batches in flight
    executor.finish()
    figures = meter.take_figures()
    print(f"stage {index}: drift at most {figures.max_drift}, on average {figures.mean_drift:.2f} updates", flush=True)
    return compute.losses


def replay(num_stages: int, plan: Plan, device: torch.device) -> list[list[Tensor]]:
    """The weights after training, by stage, from autograd and the plan's order alone: no executor, and no links."""
    stages, stepped = make_stages(num_stages, device), make_stages(num_stages, device)
    parameters = [list(stage.parameters()) for stage in stages]
    optimizers = [make_optimizer(stage) for stage in stepped]
    computes = [Compute(stage, s == num_stages - 1, device) for s, stage in enumerate(stages)]
    versions: dict[tuple[int, Kind, int], int] = {}  # the weights' version at each forward and backward
    for s in range(num_stages):
        version = 0
        for action in plan.actions(s):
            versions[s, action.kind, action.index] = version
            version += action.kind is Kind.UPDATE
            if version == UPDATES:
                break

    def put(s: int, kind: Kind, m: int) -> None:
        for parameter, value in zip(parameters[s], weights(s, versions[s, kind, m]), strict=True):
            parameter.data.copy_(value)  # under the graphs of the micro-batches in flight

    @functools.cache
    def forward(s: int, m: int) -> tuple[Tensor | None, Tensor]:
        x = forward(s - 1, m)[1].detach().requires_grad_() if s > 0 else None
        put(s, Kind.FORWARD, m)
        return x, computes[s].forward(m, x)

    @functools.cache
    def backward(s: int, m: int) -> list[Tensor]:
        """The gradients of the stage's parameters, and after them that of its input."""
        x, y = forward(s, m)
        gradient = backward(s + 1, m)[-1] if s < num_stages - 1 else None
        put(s, Kind.BACKWARD, m)
        return list(torch.autograd.grad(y, [*parameters[s], *([] if x is None else [x])], gradient))

    @functools.cache
    def weights(s: int, version: int) -> list[Tensor]:
        if version > 0:
            weights(s, version - 1)
            window = [backward(s, m) for m in range((version - 1) * A, version * A)]
            for i, parameter in enumerate(stepped[s].parameters()):
                parameter.grad = functools.reduce(torch.add, [gradients[i] for gradients in window])
            optimizers[s].step()
        return [parameter.detach().clone() for parameter in stepped[s].parameters()]

    return [[weights(s, k) for s in range(num_stages)] for k in range(UPDATES + 1)][-1]


def main() -> None:
    on_gpu = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    rank, n = dist.get_rank(), dist.get_world_size()
    plan = Plan("paci", n, A, is_drain=lambda update: update == UPDATES, gradients_ahead=not on_gpu)
    plan.check()  # no stage waits for ever, and no drift exceeds its bound
    stage = make_stages(n, device)[rank]
    losses = train(stage, plan, device)
    if rank == n - 1:
        print(f"loss {sum(losses[:A]):.4f} at the first update, {sum(losses[-A:]):.4f} at the last", flush=True)
    trained: list[list[Tensor]] = [[] for _ in range(n)]
    dist.all_gather_object(trained, [parameter.detach().cpu() for parameter in stage.parameters()])
    if rank == 0:
        for s, expected in enumerate(replay(n, plan, device)):
            assert all(map(torch.equal, trained[s], (tensor.cpu() for tensor in expected))), f"stage {s} differs"
        print(f"the weights of all {n} stages equal the replay in one process, bit for bit")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
