"""``--overlap-param-gather`` without a flush: the weights are whole wherever they are read."""

from __future__ import annotations

from typing import Any


class ParamGather:
    """Completes the distributed optimizer's all-gather of new weights where Megatron's forward hooks do not.

    Megatron's hooks gather a bucket as the first forward after an update reaches it, and the next one beside the computing.
    A flush has no backward between an update and that forward. PACI has one before a drain. And Megatron's loop takes the
    hooks away for the first iteration, in which a stage of a V may go on after its update. All ranks that share a stage
    follow one plan, so they gather in the same order.
    """

    def __init__(self, model: Any) -> None:
        """``model`` is Megatron's data-parallel wrapper. Nothing is ever to do unless it overlaps its gathers."""
        self._model = model
        overlaps = getattr(getattr(model, "ddp_config", None), "overlap_param_gather", False)
        self._groups = [*model.bucket_groups, *model.expert_parallel_bucket_groups] if overlaps else []

    def before_forward(self) -> None:
        """A forward comes, whose hooks gather what they reach; without hooks everything is gathered now."""
        if self._groups and not self._model.remove_forward_pre_hook_handles:
            self.complete()

    def complete(self) -> None:
        """Gather what is still to be gathered, and wait for what is under way."""
        for group in self._groups:
            if group.param_gather_handle is not None or not group.param_gather_dispatched:
                group.start_param_sync(force_sync=True)
