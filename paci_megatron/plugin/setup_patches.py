"""What stands in Megatron's place at each patch point: a factory takes the original and returns the replacement.

Here is what happens before training begins, and how a run is set up; what stands in the training loop is in loop_hooks.py.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.transformer.moe.moe_logging import set_moe_metrics_tracker
from megatron.core.utils import unwrap_model

from paci_megatron.arguments import add_paci_arguments
from paci_megatron.config import PaciConfig, apply_overrides, check_emulation, check_flags, check_options
from paci_megatron.platform import cpu, shared_gpu
from paci_megatron.platform.without_te import adapt_to_installed, check_installed
from paci_megatron.runtime.meters import StageMeter

from . import emulation
from . import flush_trace as tracing
from . import monitor as monitors
from . import run as contexts
from .drains import Boundaries, MicrobatchForecast
from .inputs import exit_on_config_error
from .layers import check_layers
from .moe_metrics import DrainedMoEMetrics
from .monitor import RunMonitor
from .places import check_places
from .resume import resume_line
from .stage import Stage
from .train_step import forward_backward_pipelining_paci

Function = Callable[..., Any]


def reset() -> None:
    """Forget the run in progress."""
    monitors.set_current(None)
    contexts.set_current(None)
    tracing.set_current(None)


def _emulates() -> bool:
    context = contexts.current()
    return context is not None and context.config.emulates


def _print_first_rank(args: Any, line: str) -> None:
    if args.rank == 0:
        print(f"paci-megatron: {line}", flush=True)


def parser_with_paci_arguments(original: Function) -> Function:
    @functools.wraps(original)
    def add_megatron_arguments(parser: Any) -> Any:
        return add_paci_arguments(original(parser))

    return add_megatron_arguments


def arguments_checked(original: Function) -> Function:
    @functools.wraps(original)
    def validate_args(args: Any, defaults: Any = {}) -> Any:  # noqa: B006 - Megatron's signature
        lines = cpu.adapt_arguments(args) if cpu.is_active() else []
        if cpu.is_active():
            _print_first_rank(args, f"no CUDA device: running on the CPU over gloo ({', '.join(lines) or 'as given'})")
        with exit_on_config_error():
            check_installed(args)
            check_options(args)
            check_layers(args)
            check_places(args)
            lines = shared_gpu.adapt_arguments(args)
        for line in (*adapt_to_installed(args), *lines):
            _print_first_rank(args, line)
        if args.pipeline_schedule != "paci" and args.paci_emulate_stages is None:
            return original(args, defaults)
        with exit_on_config_error():
            check_flags(args)
            for line in apply_overrides(args):
                _print_first_rank(args, line)
            if args.paci_emulate_stages is None:
                result = original(args, defaults)
            else:
                check_emulation(args)
                result = _validated_as_processes(original, args, defaults)
            config = PaciConfig.from_args(args)
        if config.clip_mode == "none":
            args.clip_grad = 0.0
        return result

    return validate_args


def _validated_as_processes(original: Function, args: Any, defaults: Any) -> Any:
    """Validate an emulated pipeline's arguments as if each stage had processes of its own."""
    num_stages = args.paci_emulate_stages
    args.pipeline_model_parallel_size = num_stages
    args.world_size *= num_stages
    result = original(args, defaults)
    args.world_size //= num_stages
    return result


def initialized_without_pipeline(original: Function) -> Function:
    """Wrap ``initialize_megatron``: emulated stages share a process, so for process groups the pipeline size is 1."""

    @functools.wraps(original)
    def initialize_megatron(*positional: Any, **named: Any) -> Any:
        from megatron.training import get_args

        args = get_args()
        if cpu.is_active():
            named["allow_no_cuda"] = True
        if args.paci_emulate_stages is None:
            return original(*positional, **named)
        args.pipeline_model_parallel_size = 1
        result = original(*positional, **named)
        args.pipeline_model_parallel_size = args.paci_emulate_stages
        return result

    return initialize_megatron


def model_set_up(original: Function) -> Function:
    @functools.wraps(original)
    def setup_model_and_optimizer(*positional: Any, **named: Any) -> Any:
        from megatron.training import get_args

        reset()
        args = get_args()
        if args.paci_emulate_stages is not None:
            stages = emulation.build_stages(original, args, PaciConfig.from_args(args), *positional, **named)
            _begin_plans(args, stages)
            optimizers = emulation.StageOptimizers([stage.optimizer for stage in stages])
            return [stage.model for stage in stages], optimizers, stages[0].scheduler
        model, optimizer, scheduler = original(*positional, **named)
        if optimizer is None:  # --skip-train
            return model, optimizer, scheduler
        pipeline = parallel_state.get_pipeline_model_parallel_group()
        meter = StageMeter(pipeline.rank(), pipeline.size(), next(model[0].parameters()).device)
        if args.pipeline_schedule == "paci":
            config = PaciConfig.from_args(args)
            _begin_plans(args, [contexts.distributed_stage(config, args, model[0], optimizer, scheduler, meter)])
        elif args.paci_metrics_file or args.paci_trace_dir:
            boundaries = _begin_monitor(args, [meter])
            trace = tracing.stage_trace(args, model[0], pipeline.rank(), pipeline.size())
            if trace is not None:
                tracing.set_current(tracing.FlushTrace(trace, boundaries))
        return model, optimizer, scheduler

    return setup_model_and_optimizer


def _begin_monitor(args: Any, meters: list[StageMeter]) -> Boundaries:
    boundaries = Boundaries(args, args.paci_drain_interval, MicrobatchForecast(args))
    monitors.set_current(RunMonitor(args, meters, boundaries))
    return boundaries


def _begin_plans(args: Any, stages: list[Stage]) -> None:
    """Make the objects that this run's train steps use."""
    from megatron.training import get_timers

    boundaries = _begin_monitor(args, [stage.meter for stage in stages])
    context = contexts.TrainingContext(PaciConfig.from_args(args), args, boundaries, stages)
    if getattr(args, "paci_state", None) is not None:  # from a checkpoint
        context.restore(args.paci_state)
    contexts.set_current(context)
    if args.num_experts is not None:
        set_moe_metrics_tracker(DrainedMoEMetrics(context.is_drained))
    for stage in stages:
        stage.trace = tracing.stage_trace(args, stage.model, stage.stage_index, context.config.num_stages)
    for line in context.describe(get_num_microbatches()):
        _print_first_rank(args, line)
    # The log line's time is then that of the stage which prints it; a barrier over all would stop the pipeline.
    stage_group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
    get_timers()("interval-time", log_level=0).set_barrier_group(stage_group)


def data_iterators_by_stage(original: Function) -> Function:
    """Wrap ``build_train_valid_test_data_iterators``: emulated stages each read what their own process would."""

    @functools.wraps(original)
    def build_train_valid_test_data_iterators(provider: Any) -> Any:
        context = contexts.current()
        if context is None or not context.config.emulates:
            return original(provider)
        return emulation.build_data_iterators(original, context.stages, provider)

    return build_train_valid_test_data_iterators


def last_stage_is_here(original: Function) -> Function:
    """Wrap ``is_pp_last_stage``, by which an evaluation decides where the losses are."""

    @functools.wraps(original)
    def is_pp_last_stage(pp_group: Any) -> bool:
        return _emulates() or original(pp_group)

    return is_pp_last_stage


def state_of_all_stages(original: Function) -> Function:
    """Wrap ``generate_state_dict``: a checkpoint of emulated stages holds them all."""

    @functools.wraps(original)
    def generate_state_dict(
        args: Any, model: Any, optimizer: Any, opt_param_scheduler: Any, rng_state: Any, **named: Any
    ) -> Any:
        context = contexts.current()
        loading = emulation.stages_being_loaded()
        if loading is not None:
            stages = sorted(loading, key=lambda stage: unwrap_model(stage.model) is not unwrap_model(model)[0])
        elif context is not None and context.config.emulates:
            stages = context.stages
        else:
            return original(args, model, optimizer, opt_param_scheduler, rng_state, **named)
        return emulation.generate_state_dict(original, stages, args, **named)

    return generate_state_dict


def schedule_chosen(original: Function) -> Function:
    @functools.wraps(original)
    def get_forward_backward_func(*positional: Any, **named: Any) -> Function:
        return forward_backward_pipelining_paci if contexts.runs_plans() else original(*positional, **named)

    return get_forward_backward_func


def resume_reported(original: Function) -> Function:
    """Wrap ``check_checkpoint_args``, which sees the arguments a checkpoint was saved with: say what changes for PACI."""

    @functools.wraps(original)
    def check_checkpoint_args(checkpoint_args: Any, *positional: Any, **named: Any) -> None:
        from megatron.training import get_args

        original(checkpoint_args, *positional, **named)
        get_args().paci_state = getattr(checkpoint_args, "paci_state", None)
        line = resume_line(checkpoint_args, get_args())
        # Emulated stages load one after the other; the first speaks for all.
        if line is not None and parallel_state.get_pipeline_model_parallel_rank() == 0:
            _print_first_rank(get_args(), line)

    return check_checkpoint_args


def compiled_in_the_wheel(original: Function) -> Function:
    """The wheel brings the dataset helpers compiled, and not the Makefile with which Megatron would compile them."""

    @functools.wraps(original)
    def compile_helpers() -> None:
        if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is None:
            original()

    return compile_helpers
