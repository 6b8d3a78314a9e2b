"""What a command line says that cannot work whatever Megatron, model and machine: found before Megatron is imported.

Importing Megatron takes seconds. What is refused here would be refused later too, by the same functions, or by Megatron.
"""

from __future__ import annotations

import argparse
import difflib
import math
import os
import re
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from paci_megatron.arguments import add_paci_arguments
from paci_megatron.config import ConfigError, check_in_flight, check_num_stages, count_stages, stages_per_process
from paci_megatron.flags import REFUSED, refusals

from .checkpoints import check_load
from .options import check_emulation, check_options, together
from .places import FOLDERS, check_places

_COUNT = (int, lambda n: n >= 1, "at least 1")
_COUNT_OR_OFF = (int, lambda n: n >= 0, "0 (off) or more")
_RATE = (float, lambda x: 0 <= x < math.inf, "a number of at least 0")
_SHARE = (float, lambda x: 0 <= x <= 1, "from 0 to 1")
_BETA = (float, lambda x: 0 <= x < 1, "from 0 to below 1")
MEGATRON_NUMBERS: dict[str, tuple[type, Callable[[Any], bool], str]] = {
    **dict.fromkeys(("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "seq_length"), _COUNT),
    **dict.fromkeys(("max_position_embeddings", "vocab_size", "micro_batch_size", "global_batch_size"), _COUNT),
    **dict.fromkeys(("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"), _COUNT),
    **dict.fromkeys(("expert_model_parallel_size", "log_interval", "distributed_timeout_minutes"), _COUNT),
    **dict.fromkeys(("train_iters", "train_samples", "eval_interval", "eval_iters", "save_interval"), _COUNT_OR_OFF),
    **dict.fromkeys(("exit_interval", "lr_warmup_iters", "num_workers"), _COUNT_OR_OFF),
    **dict.fromkeys(("lr", "min_lr", "weight_decay", "adam_eps", "init_method_std"), _RATE),
    **dict.fromkeys(("hidden_dropout", "attention_dropout"), _SHARE),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), _BETA),
}
"""Of Megatron's arguments: type, which values can work (of NaN no comparison is true), and in words."""

# Further options of Megatron's that the checks look at, and what they are when not given.
_TEXTS = (*FOLDERS[:-1], "load", "pretrained_checkpoint", "non_persistent_ckpt_type", "step_batch_size_schedule")
_DEFAULTS = {
    **dict.fromkeys(("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"), 1),
    **{"ckpt_format": "torch_dist", "clip_grad": 1.0, "pipeline_model_parallel_layout": None, "fp8": None},
}
# With these other files decide, and what is on the command line does not say enough.
_ELSEWHERE = ("--yaml-cfg", "--use-checkpoint-args", "-h", "--help")

_ONLY_UNDER_PACI = (
    *("paci_clip_mode", "paci_drain_interval", "paci_start_iteration", "paci_fallback", "paci_transfer_timeout"),
    *("paci_transfer_ctas", "paci_transfer_dtype", "paci_strict", "paci_look_ahead"),
)


def check_numbers(args: argparse.Namespace) -> None:
    """``ConfigError`` with each number among Megatron's arguments that cannot work."""
    errors = []
    for name, (_, can_work, meaning) in MEGATRON_NUMBERS.items():
        value = getattr(args, name, None)
        if isinstance(value, int | float) and not can_work(value):
            errors.append(f"{flag_of(name)} {value}: must be {meaning}.")
    lr, min_lr = getattr(args, "lr", None), getattr(args, "min_lr", None)
    if lr is not None and min_lr is not None and min_lr > lr:
        errors.append(f"--min-lr {min_lr:g} with --lr {lr:g}: must not be more. Lower --min-lr.")
    if errors:
        raise ConfigError("\n".join(errors))


def check_rates(args: argparse.Namespace) -> None:
    """``ConfigError`` for learning rates with which Megatron's schedule of them would fail, once the model is built.

    ``args`` are validated.
    """
    if getattr(args, "skip_train", False):
        return
    if args.lr is None:
        raise ConfigError("--lr is missing. Give the largest learning rate, for example --lr 3e-4.")
    decay, warmup = args.lr_decay_iters or args.train_iters, args.lr_warmup_iters
    if decay and args.lr_warmup_fraction is None and warmup >= decay:
        flag = "--lr-decay-iters" if args.lr_decay_iters else "--train-iters"
        raise ConfigError(f"--lr-warmup-iters {warmup} with {flag} {decay}: must be fewer. Give at most {decay - 1}.")


def check_evaluations(args: argparse.Namespace) -> None:
    """``ConfigError`` without an interval of evaluations, by which Megatron divides when it counts their samples.

    ``args`` are validated.
    """
    needs_none = args.full_validation or args.skip_train or getattr(args, "perform_rl_step", False)
    if not (args.eval_interval or needs_none):
        given = "is missing" if args.eval_interval is None else "0: must be at least 1"
        raise ConfigError(
            f"--eval-interval {given}. Megatron needs it, with --eval-iters 0 too. "
            f"Give --eval-interval {args.train_iters} to evaluate at the end only, and --eval-iters 0 not to evaluate."
        )


def check_early(words: Sequence[str], world_size: int | None, on_this_machine: bool = True) -> None:
    """``ConfigError`` with all that can be told of a command line by itself; ``words`` may have others before its flags.

    ``world_size`` is the number of processes, None if it is not known. The places where a run writes are looked at if it is
    to run ``on_this_machine``.
    """
    if any(word.partition("=")[0] in _ELSEWHERE for word in words):
        return
    args = _parse(words)
    count_stages(args)
    runs_plans = args.pipeline_schedule != "1f1b" or args.paci_emulate_stages is not None
    checks: list[Callable[[], list[str] | None]] = [
        lambda: check_numbers(args),
        lambda: check_options(args),
        lambda: check_emulation(args),
    ]
    if on_this_machine:
        checks += [lambda: check_places(args), lambda: check_load(args)]
    if runs_plans:
        checks.insert(0, lambda: _check_refused(args))
    if args.pipeline_schedule != "1f1b" and args.paci_emulate_stages is None:
        checks.append(lambda: check_num_stages(args))
    together(*checks)
    if world_size is not None:
        _check_world_size(args, world_size)
        if runs_plans:
            check_in_flight(args)


def without_effect(args: argparse.Namespace) -> list[str]:
    """A line for options of PACI's that are given and do nothing, because the schedule is another."""
    if args.pipeline_schedule != "1f1b":
        return []
    default = vars(add_paci_arguments(argparse.ArgumentParser()).parse_args([]))
    given = [flag_of(name) for name in _ONLY_UNDER_PACI if getattr(args, name) != default[name]]
    return [f"only with --pipeline-schedule paci, and without effect here: {', '.join(given)}"] if given else []


def world_size_of_environment() -> int | None:
    """The number of processes that the launcher has started; 1 without one."""
    text = os.environ.get("WORLD_SIZE", "1")
    return int(text) if text.isdecimal() else None


def flag_of(name: str) -> str:
    """The option that an argument comes from."""
    return f"--{name.replace('_', '-')}"


def unknown_flag(flag: str, known: Sequence[str]) -> str:
    """What is said of a flag that there is not, and what follows it; with the one that was meant if it can be told."""
    words = re.split(r"[ =]", flag)
    close = difflib.get_close_matches(words[0], known, n=1, cutoff=0.8)
    return f"unrecognized arguments: {flag}" + (f". Did you mean {close[0]}?" if close else ".")


def _parse(words: Sequence[str]) -> argparse.Namespace:
    parser = _EarlyParser(add_help=False, allow_abbrev=False)
    add_paci_arguments(parser)
    ours = [option for action in parser._actions for option in action.option_strings]
    for name, (kind, _, _) in MEGATRON_NUMBERS.items():
        parser.add_argument(flag_of(name), type=kind)
    for name in _TEXTS:
        parser.add_argument(flag_of(name))
    parser.add_argument("--ckpt-format")
    parser.add_argument("--clip-grad", type=float)
    parser.add_argument("--ckpt-step", type=int)
    parser.add_argument("--exit-on-missing-checkpoint", action="store_true")
    for rule in REFUSED:
        parser.add_argument(rule.flag, dest=rule.attribute, nargs="?", const=True, default=None, type=_value)
    parser.set_defaults(**_DEFAULTS)
    args, others = parser.parse_known_args(list(words))
    for word in others:
        if word.startswith(("--paci-", "--pipeline-schedule")):
            raise ConfigError(unknown_flag(word, ours))
    return args


def _check_refused(args: argparse.Namespace) -> None:
    if reasons := refusals(args):
        raise ConfigError("\n".join(reasons))


def _check_world_size(args: argparse.Namespace, world_size: int) -> None:
    """``ConfigError`` unless the processes are a whole number of models; sets the number of pipelines."""
    sizes = {name: getattr(args, f"{name}_model_parallel_size") for name in ("tensor", "pipeline")}
    sizes["context"] = args.context_parallel_size
    if args.paci_emulate_stages is None:
        sizes["pipeline"] //= stages_per_process(args)
    each = math.prod(sizes.values())
    args.data_parallel_size, rest = divmod(world_size, each)
    if rest or not args.data_parallel_size:
        shown = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
        emulate = " Or emulate the stages in one process: --paci-emulate-stages." if world_size == 1 else ""
        raise ConfigError(
            f"{world_size} process{'es' if world_size > 1 else ''} for a model on {each} ({shown}): must be a multiple of "
            f"{each}. Start so many (torchrun --nproc-per-node {each}), or change the sizes.{emulate}"
        )


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


class _EarlyParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}.")
