"""Ways to interfere with a training run, for ``jobs.train(within=...)``: each makes a context for a worker."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


@contextlib.contextmanager
def printed_to(folder: str) -> Iterator[None]:
    """What this rank prints goes to ``folder``/<rank>."""
    with open(Path(folder) / str(dist.get_rank()), "w", encoding="utf-8") as file, contextlib.redirect_stdout(file):
        yield


@contextlib.contextmanager
def save_wanted_in_flight(iteration: int) -> Iterator[None]:
    """Make ``train_step`` ask for a checkpoint at ``iteration``, which no argument foretells and Megatron obeys."""
    import megatron.training.training as training

    original = training.train_step

    def train_step(*args: Any, iteration: int, **named: Any) -> Any:
        loss, skipped, should_checkpoint, *others = original(*args, iteration=iteration, **named)
        return (loss, skipped, should_checkpoint or iteration + 1 == wanted, *others)

    wanted = iteration
    training.train_step = train_step
    yield
    training.train_step = original


@contextlib.contextmanager
def killed(point: str, rank: int, marker: str) -> Iterator[None]:
    """``kill -9`` of ``rank`` at ``point``, a key of :func:`kill_points`, after it has written that to the file ``marker``.

    The pool ends the other ranks when it finds out.
    """
    if dist.get_rank() == rank:
        owner, name, before, after = kill_points()[point]
        original = getattr(owner, name)

        def function(*args: Any, **named: Any) -> Any:
            if before(*args, **named):
                die()
            result = original(*args, **named)
            if after(*args, **named):
                die()
            return result

        def die() -> None:
            Path(marker).write_text(point)
            os.kill(os.getpid(), signal.SIGKILL)

        setattr(owner, name, function)  # to stay: the process ends here
    yield


def kill_points() -> dict[str, tuple[Any, str, Callable[..., bool], Callable[..., bool]]]:
    """Where a run that saves after iterations 3, 6 and 9 can be killed.

    A function, as its owner and name, and two answers to its arguments: whether to kill before it runs, and after.
    """
    import megatron.training.training as training
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
    from megatron.training import checkpointing

    from paci_megatron.plugin import run as runs

    def never(*args: Any, **named: Any) -> bool:
        return False

    def is_second_save(folder: Path) -> bool:
        return folder.name == "iter_0000006"

    def half_a_shard_is_written(*args: Any, write_bucket: Any, **named: Any) -> bool:
        path = Path(write_bucket[0])
        if is_second_save(path.parent):
            os.truncate(path, path.stat().st_size // 2)
        return is_second_save(path.parent)

    def all_but_the_index_is_written(writer: Any, *args: Any) -> bool:
        return is_second_save(Path(writer.checkpoint_dir))

    def the_tracker_is_to_be_updated(folder: str) -> bool:
        return (Path(folder) / "iter_0000006" / "metadata.json").exists()

    def the_save_is_complete(iteration: int, *args: Any, **named: Any) -> bool:
        return iteration == 6

    def microbatches_are_in_flight(*args: Any, iteration: int, **named: Any) -> bool:
        run = runs.current()
        return iteration + 1 == 8 and run is not None and not run.is_drained()

    return {
        "half a shard": (FileSystemWriterAsync, "write_preloaded_data", never, half_a_shard_is_written),
        "all but the index": (FileSystemWriterAsync, "finish", all_but_the_index_is_written, never),
        "all but the tracker": (checkpointing, "get_checkpoint_tracker_filename", the_tracker_is_to_be_updated, never),
        "saved": (training, "save_checkpoint_and_time", never, the_save_is_complete),
        "in flight": (training, "train_step", never, microbatches_are_in_flight),
    }


@dataclass(frozen=True)
class Injection:
    """A stage's output of one training micro-batch, or the gradient that comes back for it, times ``factor``."""

    stage: int
    microbatch: int
    factor: float
    backward: bool = False

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Inside, models are built with it; for ``train``'s ``within``."""
        import megatron.training.training as training
        from megatron.core import parallel_state
        from megatron.core.utils import unwrap_model

        from paci_megatron.plugin import run as runs

        original = training.setup_model_and_optimizer

        def setup_model_and_optimizer(*args: Any, **kwargs: Any) -> Any:
            built = original(*args, **kwargs)
            run = runs.current()
            held = [stage.stage_index for stage in run.stages] if run is not None else []
            for stage, chunk in zip(held or [parallel_state.get_pipeline_model_parallel_rank()], built[0], strict=True):
                if stage == self.stage:
                    self._hook(unwrap_model(chunk))
            return built

        training.setup_model_and_optimizer = setup_model_and_optimizer
        yield
        training.setup_model_and_optimizer = original

    def _hook(self, model: torch.nn.Module) -> None:
        count = 0

        def hook(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor | None:
            nonlocal count
            count += module.training
            if not module.training or count - 1 != self.microbatch:
                return None
            if self.backward:
                output.register_hook(lambda gradient: gradient * self.factor)
                return None
            return output * self.factor

        model.register_forward_hook(hook)


@dataclass(frozen=True)
class Terminated:
    """SIGTERM for some ranks, ``after_s`` seconds into their train_step of an iteration; for ``train``'s ``within``."""

    iteration: int
    ranks: tuple[int, ...]
    after_s: float = 0.0
    times: int = 1

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Inside, the signals are sent."""
        import megatron.training.training as training

        original = training.train_step

        def kill() -> None:
            for _ in range(self.times):
                os.kill(os.getpid(), signal.SIGTERM)

        def train_step(*args: Any, **kwargs: Any) -> Any:
            if kwargs["iteration"] == self.iteration and dist.get_rank() in self.ranks:
                threading.Timer(self.after_s, kill).start()
            return original(*args, **kwargs)

        training.train_step = train_step
        yield
        training.train_step = original


@contextlib.contextmanager
def one_more_in_flight() -> Iterator[None]:
    """Plans in which the last stage keeps one micro-batch more than it may."""
    import paci_megatron.schedule.plan as module

    original = module.paci

    def greedy(stage_index: int, num_stages: int, *others: Any) -> Any:
        return original(min(stage_index, num_stages - 2), num_stages, *others)

    module.paci = greedy  # type: ignore[assignment]
    try:
        yield
    finally:
        module.paci = original


@contextlib.contextmanager
def no_drift_allowed() -> Iterator[None]:
    """Let the meters take any drift for a violation."""
    from paci_megatron.runtime.meters import StageMeter

    original = StageMeter.begin_plan

    def begin_plan(self: StageMeter, *args: Any) -> None:
        original(self, *args)
        self._drift_bound = 0

    StageMeter.begin_plan = begin_plan  # type: ignore[method-assign, assignment]
    yield
    StageMeter.begin_plan = original  # type: ignore[method-assign]
