"""Megatron's ``train_step`` and schedule function under PACI."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.pipeline_parallel import schedules
from megatron.core.rerun_state_machine import get_rerun_state_machine

from . import run as runs
from . import stage_set
from .run import Run

_flush_schedule = schedules.forward_backward_pipelining_without_interleaving


def train_step(
    run: Run, forward_step_func: Any, data_iterator: Any, iteration: int | None
) -> tuple[dict[str, torch.Tensor], int, bool, bool, int, float | None, int | None, float]:
    """One iteration: run this process's plans up to and including their next updates.

    Returns what ``megatron.training.training.train_step`` does: averaged losses (last stage only), skipped (0
    or 1), should_checkpoint, should_exit, exit_code, grad_norm, num_zeros_in_grad, max_attention_logit. The norm, that of
    all stages together, is None unless the pipeline is drained: it is known some iterations later, see monitor.py.
    """
    if iteration is not None and iteration != run.iteration:
        run.require_drained(f"iteration {iteration}")
        run.iteration = iteration
    rerun_state_machine = get_rerun_state_machine()
    losses: list[dict[str, torch.Tensor]] = []
    # Disabled under paci, so it runs the body once; called for its count of iterations.
    while rerun_state_machine.should_run_forward_backward(data_iterator):
        losses = run.run_iteration(forward_step_func, data_iterator, get_num_microbatches())
    should_checkpoint, should_exit, exit_code = rerun_state_machine.should_checkpoint_and_exit()
    skipped = int(not all(update.successful for update in run.updates))
    averaged = average_losses(losses, run.stages[-1].groups.dp_cp)
    logit = max(stage.max_attention_logit for stage in run.stages)
    return averaged, skipped, should_checkpoint, should_exit, exit_code, run.updates[-1].grad_norm, None, logit


def forward_backward_pipelining_paci(
    *,
    forward_step_func: Any,
    data_iterator: Any,
    model: Any,
    num_microbatches: int,
    seq_length: int,
    micro_batch_size: int,
    decoder_seq_length: int | None = None,
    forward_only: bool = False,
    collect_non_loss_data: bool = False,
    first_val_step: bool | None = None,
    adjust_tensor_shapes_fn: Any = None,
    p2p_communicator: Any = None,
    pg_collection: Any = None,
    force_all_reduce: bool | None = False,
) -> list[Any]:
    """The schedule that ``get_forward_backward_func`` returns, with the signature of Megatron's pipelining functions.

    Unlike them it leaves micro-batches in flight when it returns, and has applied the update: call no
    ``optimizer.step``. Returns the losses of the window's micro-batches, on the last stage. A ``forward_only``
    pass is Megatron's own.
    """
    run = runs.current()
    if run is None or not run.runs_plans:
        raise RuntimeError("no model was set up under paci: call megatron.training.pretrain, which calls this in turn")
    if forward_only:
        run.require_drained("a forward-only pass")
        if run.holds_several:
            return stage_set.forward_only(
                run, forward_step_func, data_iterator, num_microbatches, collect_non_loss_data, first_val_step
            )
        return _flush_schedule(
            forward_step_func=forward_step_func,
            data_iterator=data_iterator,
            model=model,
            num_microbatches=num_microbatches,
            seq_length=seq_length,
            micro_batch_size=micro_batch_size,
            decoder_seq_length=decoder_seq_length,
            forward_only=True,
            collect_non_loss_data=collect_non_loss_data,
            first_val_step=first_val_step,
            adjust_tensor_shapes_fn=adjust_tensor_shapes_fn,
            p2p_communicator=p2p_communicator,
            pg_collection=pg_collection,
        )
    if adjust_tensor_shapes_fn is not None or p2p_communicator is not None or force_all_reduce:
        raise RuntimeError(
            "paci supports none of adjust_tensor_shapes_fn, p2p_communicator and force_all_reduce; "
            "use --pipeline-schedule 1f1b with a script that passes them"
        )
    return run.run_iteration(forward_step_func, data_iterator, num_microbatches)


def average_losses(losses: list[dict[str, torch.Tensor]], group: Any) -> dict[str, torch.Tensor]:
    """The window's loss under each name, from one of each micro-batch; empty on stages without a loss.

    A micro-batch's is a mean, averaged over micro-batches, or a (sum, count) pair, summed over micro-batches and over
    ``group``, the ranks that share the last stage (as ``megatron.training.training.train_step``).
    """
    averaged = {}
    for name in losses[0] if losses else ():
        values = torch.stack([loss[name].view(-1) for loss in losses])  # (micro-batches, 1 or 2)
        if values.shape[1] == 1:
            averaged[name] = values.mean()
        elif values.shape[1] == 2:
            total = values.sum(dim=0)
            torch.distributed.all_reduce(total, group=group)
            averaged[name] = total[0] / total[1]
        else:
            raise ValueError(f"the loss {name!r} has {values.shape[1]} values: expected a mean, or a sum and a count")
    return averaged
