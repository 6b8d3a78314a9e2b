"""What takes the place of Megatron's functions before training begins: ``wrap_f`` takes Megatron's f and returns ours."""

from __future__ import annotations

import argparse
import functools
import importlib.util
import re
from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import Any, NoReturn

from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import unwrap_model
from torch.distributed import get_process_group_ranks

from paci_megatron.arguments import add_paci_arguments
from paci_megatron.config import PaciConfig, count_stages, stages_per_process
from paci_megatron.flags import adapt_flags, not_verified
from paci_megatron.platform import cpu, shared_gpu
from paci_megatron.platform.without_te import adapt_to_installed, check_installed
from paci_megatron.runtime.emulate import InProcessTransport
from paci_megatron.runtime.links import Transport
from paci_megatron.runtime.meters import StageMeter
from paci_megatron.schedule.records import record_lag
from paci_megatron.schedule.schedules import even_slack

from . import run as runs
from . import stage_set
from .batch_growth import growth_warning
from .checkpoints import check_load
from .describe import describe
from .early import check_evaluations, check_numbers, check_rates, unknown_flag, without_effect
from .groups import agreement, leave_room_for_transfers, process_transport
from .inputs import exit_on_config_error, megatrons_refusals, refuse
from .interval_timer import IntervalTimer
from .layers import check_layers
from .log import print_first_rank
from .options import check_emulation, check_options, together
from .places import check_places
from .rendezvous import shared_store
from .restarts import restart_warning
from .resume import check_vocabulary, resume_line
from .run import Run
from .stage import Stage
from .train_step import forward_backward_pipelining_paci
from .watchdog import transfer_timeout_s

Function = Callable[..., Any]


def wrap_add_megatron_arguments(original: Function) -> Function:
    """Adds ``--pipeline-schedule`` and the ``--paci-*`` options, and lets ``--help`` print Megatron's."""

    @functools.wraps(original)
    def add_megatron_arguments(parser: Any) -> Any:
        parser = add_paci_arguments(original(parser))
        for action in parser._actions:  # a percent sign in a help text would be taken for a format and end --help
            if action.help:
                action.help = re.sub(r"%%|%(?!\()", "%%", action.help)
            if isinstance(action.type, FunctionType):
                action.type = _refusing(action.type)
        known = list(parser._option_string_actions)

        def error(message: str) -> NoReturn:
            what, _, flag = message.partition(": ")
            refuse(f"{unknown_flag(flag, known) if what == 'unrecognized arguments' else f'{message}.'} All options: --help")

        parser.error = error  # argparse would print a thousand flags on each rank
        return parser

    return add_megatron_arguments


def _refusing(read: Function) -> Function:
    """A function that reads an option's value, with its ``KeyError``, which argparse lets through, as an error of usage."""

    @functools.wraps(read)
    def read_value(text: str) -> Any:
        try:
            return read(text)
        except KeyError:
            raise argparse.ArgumentTypeError(f"invalid value: {text!r}") from None

    return read_value


def wrap_validate_args(original: Function) -> Function:
    """Adapts the command line to the machine, and under PACI refuses or switches off what cannot work."""

    @functools.wraps(original)
    def validate_args(args: Any, defaults: Any = {}) -> Any:  # noqa: B006 - Megatron's signature
        runs_plans = args.pipeline_schedule != "1f1b" or args.paci_emulate_stages is not None
        count_stages(args)
        if cpu.is_active():
            changed = ", ".join(cpu.adapt_arguments(args)) or "as given"
            print_first_rank(f"no CUDA device: running on the CPU over gloo ({changed})")
        with exit_on_config_error():
            lines = together(
                lambda: adapt_flags(args) if runs_plans else [],
                lambda: not_verified(args) if runs_plans else [],
                lambda: check_installed(args),
                lambda: check_numbers(args),
                lambda: check_options(args),
                lambda: check_layers(args),
                lambda: check_emulation(args),
                lambda: check_files(args),
                lambda: shared_gpu.adapt_arguments(args),
            )
        args.paci_set_up = [*adapt_to_installed(args), *lines, *without_effect(args)]
        for line in args.paci_set_up:
            print_first_rank(line)
        validated = original if stages_per_process(args) == 1 else partial(_validated_as_processes, original)
        with exit_on_config_error(), megatrons_refusals():
            result = validated(args, defaults)
            check_rates(args)
            check_evaluations(args)
        if not runs_plans:
            return result
        with exit_on_config_error():
            config = PaciConfig.from_args(args)
            transfer_timeout_s(args)
        if config.clip_mode == "none":
            args.clip_grad = 0.0
        return result

    return validate_args


def check_files(args: Any) -> None:
    """``ConfigError`` for what the run cannot write or load, unless its command is only checked, for another machine."""
    if not getattr(args, "paci_only_checked", False):
        together(lambda: check_places(args), lambda: check_load(args))


def _validated_as_processes(original: Function, args: Any, defaults: Any) -> Any:
    """Validate the arguments of processes with several stages each as if each stage had processes of its own."""
    if args.paci_emulate_stages is not None:
        args.pipeline_model_parallel_size = args.paci_emulate_stages
    args.world_size *= stages_per_process(args)
    result = original(args, defaults)
    args.world_size //= stages_per_process(args)
    return result


def wrap_initialize_megatron(original: Function) -> Function:
    """Waits for all ranks; makes process groups of a pipeline of processes, however many stages each has; allows a CPU."""

    @functools.wraps(original)
    def initialize_megatron(*positional: Any, **named: Any) -> Any:
        from megatron.training import get_args

        args = get_args()
        if cpu.is_active():
            named["allow_no_cuda"] = True
        if (line := restart_warning()) is not None:
            print_first_rank(line)
        if named.get("store") is None:
            with exit_on_config_error():
                named["store"] = shared_store(args)
        several = stages_per_process(args)
        if several > 1 and args.paci_emulate_stages is None:  # the two ends of a V share their embedding on the last rank
            named["get_embedding_ranks"] = lambda pipeline: [pipeline[-1]]
        args.pipeline_model_parallel_size //= several
        result = original(*positional, **named)
        args.pipeline_model_parallel_size *= several
        return result

    return initialize_megatron


def wrap_setup_model_and_optimizer(original: Function) -> Function:
    """Megatron builds the model and the optimizer; the run is made around them."""

    @functools.wraps(original)
    def setup_model_and_optimizer(*positional: Any, **named: Any) -> Any:
        from megatron.training import get_args, get_timers

        args = get_args()
        runs_plans = args.pipeline_schedule != "1f1b" or args.paci_emulate_stages is not None
        run = Run(args, PaciConfig.from_args(args) if runs_plans else None)
        runs.set_current(run)
        if args.pipeline_schedule != "1f1b" and (line := leave_room_for_transfers(args)) is not None:
            print_first_rank(line)
        pipeline = parallel_state.get_pipeline_model_parallel_group()
        if run.holds_several:
            assert run.config is not None
            stages = stage_set.build_stages(run, run.config.held_stages(pipeline.rank()), original, *positional, **named)
            model, scheduler = [stage.model for stage in stages], stages[0].scheduler
            optimizer: Any = stage_set.StageOptimizers(stages)
        else:
            model, optimizer, scheduler = original(*positional, **named)
            if optimizer is None or not (runs_plans or args.paci_metrics_file or args.paci_trace_dir):
                runs.set_current(None)  # nothing to run (--skip-train) or to measure
                return model, optimizer, scheduler
            meter = StageMeter(pipeline.rank(), pipeline.size(), next(model[0].parameters()).device)
            if not runs_plans:
                run.start_measuring(meter, model[0])
                return model, optimizer, scheduler
            process_groups = ProcessGroupCollection.use_mpu_process_groups()
            stages = [Stage(pipeline.rank(), pipeline.size(), model[0], optimizer, scheduler, process_groups, meter)]
        config = PaciConfig.from_args(args)
        run.start(stages, _transport(args, config, stages, pipeline), optimizer)
        for line in (*describe(config, args.clip_grad, get_num_microbatches()), *growth_warning(config, args)):
            print_first_rank(line)
        get_timers()("interval-time", log_level=0)
        get_timers()._timers["interval-time"] = IntervalTimer("interval-time")
        return model, optimizer, scheduler

    return setup_model_and_optimizer


def _transport(args: Any, config: PaciConfig, stages: list[Stage], pipeline: Any) -> Transport:
    """How ``stages`` reach each other, and those of the other processes of Megatron's group ``pipeline``."""
    if config.emulates:
        return InProcessTransport(config.num_stages, stages[0].ties_embeddings, agreement(args))
    slack = config.slack if config.folded is not None else even_slack(config.num_stages, config.extra.most)
    lag = record_lag(config.num_stages, get_num_microbatches(), slack)
    return process_transport(args, stages, config.stage_ranks(get_process_group_ranks(pipeline)), lag)


def wrap_build_train_valid_test_data_iterators(original: Function) -> Function:
    """Several stages in a process each read what their own process would."""

    @functools.wraps(original)
    def build_train_valid_test_data_iterators(provider: Any) -> Any:
        run = runs.current()
        if run is None or not run.holds_several:
            return original(provider)
        return stage_set.build_data_iterators(original, run.stages, provider)

    return build_train_valid_test_data_iterators


def wrap_is_pp_last_stage(original: Function) -> Function:
    """An evaluation decides by it, from the place of the first stage here, where the losses are."""

    @functools.wraps(original)
    def is_pp_last_stage(pp_group: Any) -> bool:
        run = runs.current()
        return run.stages[-1].is_last if run is not None and run.holds_several and run.stages else original(pp_group)

    return is_pp_last_stage


def wrap_generate_state_dict(original: Function) -> Function:
    """A checkpoint has what a resumed run needs beside Megatron's, among the arguments, and all stages of a process."""

    @functools.wraps(original)
    def generate_state_dict(
        args: Any, model: Any, optimizer: Any, opt_param_scheduler: Any, rng_state: Any, **named: Any
    ) -> Any:
        run = runs.current()
        if run is None:
            return original(args, model, optimizer, opt_param_scheduler, rng_state, **named)
        if not run.holds_several:
            return original(run.args_to_save(args), model, optimizer, opt_param_scheduler, rng_state, **named)
        stages = run.stages
        if run.is_loading:
            stages = sorted(stages, key=lambda stage: unwrap_model(stage.model) is not unwrap_model(model)[0])
        return stage_set.generate_state_dict(original, stages, run.args_to_save(args), run.is_loading, **named)

    return generate_state_dict


def wrap_get_forward_backward_func(original: Function) -> Function:
    """Returns the PACI schedule where plans are run."""

    @functools.wraps(original)
    def get_forward_backward_func(*positional: Any, **named: Any) -> Function:
        run = runs.current()
        return forward_backward_pipelining_paci if run is not None and run.runs_plans else original(*positional, **named)

    return get_forward_backward_func


def wrap_check_checkpoint_args(original: Function) -> Function:
    """Sees the arguments that a checkpoint was saved with: says what changes for PACI, and keeps what a run goes on from."""

    @functools.wraps(original)
    def check_checkpoint_args(checkpoint_args: Any, *positional: Any, **named: Any) -> None:
        from megatron.training import get_args, global_vars

        original(checkpoint_args, *positional, **named)
        with exit_on_config_error():
            check_vocabulary(checkpoint_args, get_args(), getattr(global_vars._GLOBAL_TOKENIZER, "vocab_size", None))
        run = runs.current()
        if run is not None:
            run.restored = getattr(checkpoint_args, "paci_state", None)
        line = resume_line(checkpoint_args, get_args())
        # Emulated stages load one after the other; the first speaks for all.
        if line is not None and parallel_state.get_pipeline_model_parallel_rank() == 0:
            print_first_rank(line)

    return check_checkpoint_args


def wrap_compile_helpers(original: Function) -> Function:
    """The wheel brings the dataset helpers compiled, and not the Makefile with which Megatron would compile them."""

    @functools.wraps(original)
    def compile_helpers() -> None:
        if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is None:
            original()

    return compile_helpers
