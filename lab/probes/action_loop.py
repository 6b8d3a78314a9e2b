"""What a stage's action loop costs: its plan through the executor, against Megatron's own functions in a bare loop.

Takes the options below and those of pretrain_gpt_paci.py, with two emulated stages; measures the first of them, with a
gradient that is always there in the place of the second. Both sides do the same forwards, backwards and updates.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import paci_megatron
import pretrain_gpt_paci
from paci_megatron.runtime.control import Record
from paci_megatron.runtime.hand_over import HandOver, LocalRecords
from paci_megatron.runtime.link_times import LinkTimes
from paci_megatron.runtime.links import Neighbour, StageLink
from paci_megatron.schedule.plan import Plan


class _Ready(HandOver):
    """A direction that has the same thing ready whenever it is asked, and lets go of what is sent."""

    def __init__(self, received: Any) -> None:
        super().__init__()
        self._received = received

    def send(self, sent: Any) -> None: ...

    def has_arrived(self) -> bool:
        return True

    def receive(self) -> Any:
        return self._received


class _Alone:
    """A first stage's transport to a second one that has every gradient ready, and takes no time."""

    receives_hold_device = False

    def __init__(self, gradient: torch.Tensor) -> None:
        tensors, records = _Ready(gradient), _Ready(Record())
        self._link = StageLink(None, Neighbour(tensors, tensors, LocalRecords(records, records)))

    def link(self, stage_index: int, plan: Plan) -> StageLink:
        return self._link

    def tied_exchange(self, stage_index: int, record_lag: int) -> None:
        return None

    def agree(self, record: Record) -> Record:
        return record

    def rank_of(self, stage_index: int) -> int:
        return 0

    def link_times(self) -> dict[int, LinkTimes]:
        return {}


class Measurement:
    """Times ``updates`` updates of the first stage, each way, ``repeats`` times in turns."""

    def __init__(self, forward_step: Any, data: Any, updates: int, repeats: int) -> None:
        from megatron.core.num_microbatches_calculator import get_num_microbatches

        from paci_megatron.plugin import run as runs

        run = runs.current()
        assert run is not None
        self._args, self._run, self._stage = run.args, run, run.stages[0]
        self._forward_step, self._data = forward_step, run.iterator_of(self._stage, data)
        self._updates, self._repeats, self._a = updates, repeats, get_num_microbatches()
        config = self._stage.model_config
        shape = (self._args.seq_length, self._args.micro_batch_size, config.hidden_size)
        device = next(self._stage.model.parameters()).device
        # Small, or the weights would leave for nowhere; there is no loss here to hold them.
        self._gradient = 1e-6 * torch.randn(shape, device=device).to(config.pipeline_dtype)

    def run(self) -> dict[str, float]:
        """``{"loop_ms", "bare_ms", "overhead"}``: milliseconds of an update, medians, and how much slower the loop is."""
        for way in (self._loop, self._bare):
            way()  # warm up
        times: dict[Callable[[], None], list[float]] = {self._loop: [], self._bare: []}
        for _ in range(self._repeats):
            for way, seconds in times.items():
                torch.cuda.synchronize()
                begin_s = time.perf_counter()
                way()
                torch.cuda.synchronize()
                seconds.append(time.perf_counter() - begin_s)
        loop_ms, bare_ms = (1000 * statistics.median(seconds) / self._updates for seconds in times.values())
        return {"loop_ms": loop_ms, "bare_ms": bare_ms, "overhead": loop_ms / bare_ms - 1}

    def _loop(self) -> None:
        """The stage's plan, from one drain to the next."""
        from paci_megatron.plugin.running_plan import RunningPlan

        config = self._run.config
        assert config is not None
        plan = Plan("paci", config.num_stages, self._a, is_drain=lambda update: update == self._updates)
        transport, optimizer = _Alone(self._gradient), self._stage.optimizer
        running = RunningPlan(plan, 0, self._stage, config, self._args, transport, optimizer, lambda update, total: None)
        running.compute.forward_step_func, running.compute.data_iterator = self._forward_step, self._data
        for _ in range(self._updates):
            with running.at_work():
                running.executor.run_to_update()
        running.finish()

    def _bare(self) -> None:
        """The same work by Megatron's functions."""
        from megatron.core.pipeline_parallel.schedules import backward_step, deallocate_output_tensor, forward_step

        stage, model, config = self._stage, self._stage.model, self._stage.model_config
        for _ in range(self._updates):
            with stage.active():
                for microbatch in range(self._a):
                    output, _ = forward_step(
                        self._forward_step,
                        self._data,
                        model,
                        self._a,
                        None,
                        [],
                        config,
                        cp_group_size=1,
                        is_first_microbatch=microbatch == 0,
                        current_microbatch=microbatch,
                        is_last_stage=False,
                    )
                    deallocate_output_tensor(output, config.deallocate_pipeline_outputs)
                    backward_step(None, output, self._gradient, config)
                config.finalize_model_grads_func([model], None, pg_collection=stage.groups, force_all_reduce=False)
                stage.optimizer.step()
                stage.scheduler.step(increment=self._a * self._args.micro_batch_size)
                model.zero_grad_buffer()
                stage.optimizer.zero_grad()


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, add_help=False)
    parser.add_argument("--measure-output", type=Path, required=True, help="where the JSON goes")
    parser.add_argument("--measure-updates", type=int, default=8)
    parser.add_argument("--measure-repeats", type=int, default=5)
    options, sys.argv[1:] = parser.parse_known_args()
    paci_megatron.install()
    import megatron.training.training as training
    from megatron.core.distributed import finalize_model_grads

    def measured(forward_step: Any, model: Any, optimizer: Any, scheduler: Any, data: Any, *_: Any, **__: Any) -> Any:
        for chunk in model:
            chunk.train()
            chunk.config.grad_scale_func = optimizer.scale_loss
            chunk.config.finalize_model_grads_func = finalize_model_grads
        figures = Measurement(forward_step, data, options.measure_updates, options.measure_repeats).run()
        options.measure_output.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
        return 0, 0.0

    training.train = measured
    pretrain_gpt_paci.run()
