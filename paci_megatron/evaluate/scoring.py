"""The model's loss on windows of tokens, through Megatron's own schedule, on any number of pipeline and tensor ranks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from .windows import Batch, Window, make_batch

# Windows that are shorter than the context, as LAMBADA's are, are filled up to a multiple of this, so that there are few
# shapes. Any tensor-parallel size divides it.
_LENGTH_STEP = 64


class Scores(NamedTuple):
    """For each window the summed loss of its scored tokens in nats (float64), and whether the most probable token was the
    right one at each (bool, False if not asked for).
    """

    nll: np.ndarray
    exact: np.ndarray


class Settings(NamedTuple):
    """``context`` and ``micro_batch_size`` in tokens and windows; ``predicts`` asks for the most probable tokens."""

    context: int
    micro_batch_size: int
    predicts: bool = False


def score(
    model: list[torch.nn.Module],
    streams: Sequence[np.ndarray],
    windows: Sequence[Window],
    settings: Settings,
    progress: Callable[[int], object] = lambda num_windows: None,
) -> Scores:
    """The scores of all windows, on every rank; each rank must call it with the same arguments.

    Data-parallel ranks share the windows. ``progress`` is told how many windows are done, on every rank.
    """
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    replicas, replica = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    device = next(model[0].parameters()).device
    table = torch.zeros(2, len(windows), dtype=torch.float64, device=device)
    # Longest first: what does not fit into memory shows at once.
    order = sorted(range(len(windows)), key=lambda index: -windows[index].length)
    rows = settings.micro_batch_size
    # A call runs the pipeline empty at its end, so it has several micro-batches for each stage.
    share = rows * replicas * 8 * stages
    for module in model:
        module.eval()
    run = get_forward_backward_func()
    for begin in range(0, len(order), share):
        chosen = order[begin : begin + share]
        num_microbatches = -(-len(chosen) // (rows * replicas))
        length = _padded(windows[chosen[0]].length, settings.context)
        mine = chosen[replica::replicas]
        batches = [
            make_batch(streams, windows, mine[first : first + rows], rows, length)
            for first in range(0, num_microbatches * rows, rows)
        ]
        with torch.no_grad():
            reports = run(
                forward_step_func=functools.partial(_forward_step, predicts=settings.predicts),
                data_iterator=iter(batches),
                model=model,
                num_microbatches=num_microbatches,
                seq_length=length,
                micro_batch_size=rows,
                forward_only=True,
                collect_non_loss_data=True,
            )
        if parallel_state.is_pipeline_last_stage() and parallel_state.get_tensor_model_parallel_rank() == 0:
            for batch, report in zip(batches, reports, strict=True):
                done = [(row, window) for row, window in enumerate(batch.windows) if window >= 0]
                for row, window in done:
                    table[:, window] = report[:, row]
        progress(len(chosen))
    dist.all_reduce(table)  # each window's scores are on one rank, and zeros elsewhere
    nll, exact = table.cpu().numpy()
    return Scores(nll, exact > 0)


def _padded(length: int, context: int) -> int:
    """The number of tokens that windows of at most ``length`` are filled up to."""
    return min(context, -(-length // _LENGTH_STEP) * _LENGTH_STEP)


def _forward_step(
    data_iterator: Iterator[Batch], model: torch.nn.Module, predicts: bool
) -> tuple[torch.Tensor, Callable[..., torch.Tensor]]:
    """This stage's forward of one batch, and the function that makes the last stage's output into a report (2, rows)."""
    batch = next(data_iterator)
    device = next(model.parameters()).device
    tokens, labels, scored = (torch.from_numpy(array).to(device) for array in batch[:3])
    positions = torch.arange(tokens.size(1), device=device).expand_as(tokens)
    # No attention mask: without one Megatron's attention is causal.
    if predicts:
        output = model(tokens, positions, None, labels=None, runtime_gather_output=True)
        return output, functools.partial(_report_of_logits, labels, scored)
    return model(tokens, positions, None, labels=labels), functools.partial(_report_of_losses, scored)


def _report_of_losses(scored: torch.Tensor, losses: torch.Tensor, non_loss_data: bool = True) -> torch.Tensor:
    """Summed losses of each row, from the losses (rows, length) of every token."""
    nll = (losses.double() * scored).sum(dim=1)
    return torch.stack([nll, torch.zeros_like(nll)])


def _report_of_logits(
    labels: torch.Tensor, scored: torch.Tensor, logits: torch.Tensor, non_loss_data: bool = True
) -> torch.Tensor:
    """Summed losses and all-right flags of each row, from the logits (rows, length, vocabulary) of every token."""
    losses = torch.zeros(labels.shape, dtype=torch.float64, device=labels.device)
    losses[scored] = torch.nn.functional.cross_entropy(logits[scored].float(), labels[scored], reduction="none").double()
    right = (logits.argmax(dim=-1) == labels) | ~scored
    return torch.stack([losses.sum(dim=1), right.all(dim=1).double()])
