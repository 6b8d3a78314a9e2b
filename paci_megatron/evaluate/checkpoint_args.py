"""A model's arguments from its checkpoint: whatever decides what the model computes, and its tokenizer."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from paci_megatron.config import ConfigError
from paci_megatron.data.tokenizers import GPT2_BPE
from paci_megatron.plugin.checkpoints import check_load, to_load

# Megatron's --use-checkpoint-args takes a fixed list of arguments, without some that change the model's function (the norms'
# epsilon, RoPE scaling, ...). These are taken too: every field of the transformer's configuration that is an argument, but
# for what only says how to run or train it,
_HOW_TO_RUN = re.compile(
    r"recompute_|distribute_saved|cuda_graph|enable_cuda_graph|external_cuda_graph|inference_|fp8|fp4|first_last_layers_bf16"
    r"|num_layers_at_(start|end)_in_bf16|offload|fine_grained|min_offloaded|delay_offload|delta_offload|activation_offload"
    r"|moe_(paged|hybridep|deepep|ncclep|flex|enable_deepep|permute|router_fusion|layer_recompute|token_dispatcher|per_layer"
    r"|shared_expert_overlap|enable_routing_replay|pad_experts_for_cuda)|high_priority_a2a|cp_comm_type|mtp_|qk_clip"
    r"|log_max_attention|calculate_per_token_loss|config_logger_dir|test_mode|init_model_with_meta_device|attention_backend"
    r"|flash_|transformer_impl|symmetric_ar|nccl_|batch_invariant|mlp_chunks|cache_mla|clone_scatter"
)
# where the layers are, which is taken if the number of stages is the checkpoint's,
_LAYOUT = (
    "pipeline_model_parallel_layout",
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
)
# and what becomes a part of the configuration under another name.
_OTHER_MODEL_ARGUMENTS = (
    "use_rope_scaling",
    "rope_scaling_factor",
    "rotary_seq_len_interpolation_factor",
    "yarn_original_max_position_embeddings",
    "yarn_beta_fast",
    "yarn_beta_slow",
    "yarn_correction_range_round_to_int",
    "quick_geglu",
    "openai_gelu",
    "bias_gelu_fusion",  # it computes GELU by the tanh approximation
    "make_vocab_size_divisible_by",
)
# Not --trust-remote-code: whether to run a tokenizer's code is not for a checkpoint to say.
TOKENIZER_ARGUMENTS = (
    "tokenizer_type",
    "tokenizer_model",
    "vocab_file",
    "merge_file",
    "vocab_size",
    "vocab_extra_ids",
    "metadata_path",
    "special_tokens",
    "tiktoken_pattern",
    "tiktoken_num_special_tokens",
    "tokenizer_sentencepiece_legacy",
    "tokenizer_sentencepiece_ignore_extra_whitespaces",
    "tokenizer_hf_no_use_fast",
    "tokenizer_hf_no_include_special_tokens",
    "null_tokenizer_eod_id",
    "null_tokenizer_pad_id",
)


def check_checkpoint(load: str | None, step: int | None) -> None:
    """``ConfigError`` unless ``--load`` (and ``--ckpt-step``) name a whole checkpoint in Megatron's default format."""
    if load is None:
        raise ConfigError("--load is missing: give the folder that training wrote with --save.")
    folder = Path(load)
    if not folder.is_dir():
        raise ConfigError(f"--load {load}: no such folder. Give the folder that training wrote with --save.")
    saved = sorted(path.name for path in folder.glob("iter_*") if path.is_dir())
    if step is not None and f"iter_{step:07d}" not in saved:
        there = ", ".join(str(int(name.removeprefix("iter_"))) for name in saved) or "none"
        raise ConfigError(f"--ckpt-step {step}: not in {load}, which has iterations {there}. Give one of these.")
    if step is None and not (folder / "latest_checkpointed_iteration.txt").is_file():
        if re.fullmatch(r"iter_\d+", folder.name):
            step = int(folder.name.removeprefix("iter_"))
            raise ConfigError(f"--load {load} is one iteration's folder. Give --load {folder.parent} --ckpt-step {step}.")
        raise ConfigError(
            f"--load {load}: no latest_checkpointed_iteration.txt in it. Give what training wrote with --save."
        )
    checkpoint = to_load(folder, step)
    if checkpoint is not None and checkpoint.is_dir():
        _check_format(checkpoint)
    check_load(argparse.Namespace(load=load, ckpt_step=step, ckpt_format="torch_dist"))


def _check_format(checkpoint: Path) -> None:
    """``ConfigError`` if the checkpoint is not in the format torch_dist: Megatron ends, or reads it in one split only."""
    found = None
    if any(checkpoint.glob("mp_rank_*")):
        found = "torch"
    else:
        with contextlib.suppress(OSError, ValueError, AttributeError):  # for check_load, which says what is wrong
            found = json.loads((checkpoint / "metadata.json").read_text()).get("sharded_backend")
    if found not in (None, "torch_dist"):
        remedy = "Convert it: train on from it with --ckpt-convert-format torch_dist --ckpt-convert-save DIR"
        raise ConfigError(f"{checkpoint}: in the format {found}, and only torch_dist, the default, is evaluated. {remedy}.")


def adopt(args: argparse.Namespace, given: set[str]) -> int:
    """Complete ``args`` with the arguments of the checkpoint ``args.load``; returns the checkpoint's iteration.

    ``given`` are the names on the command line: those of the layout and the tokenizer are left as they are.
    ``ConfigError`` if the checkpoint holds no arguments, or those of a model that is not a GPT.
    """
    from megatron.training.checkpointing import load_args_from_checkpoint

    args.use_tokenizer_model_from_checkpoint_args = False  # it would override the command line
    loaded = load_args_from_checkpoint(args)
    if not isinstance(loaded, tuple):
        raise ConfigError(
            f"--load {args.load}: the checkpoint holds no arguments, so its model is unknown. Give one of Megatron's."
        )
    saved = loaded[1]
    if getattr(saved, "hybrid_layer_pattern", None) is not None:
        raise ConfigError(f"--load {args.load} holds a hybrid model; only GPT models are evaluated.")
    names = [name for name in (*model_arguments(args), *_tokenizer_arguments(args, saved, given)) if name not in given]
    if args.pipeline_model_parallel_size == getattr(saved, "pipeline_model_parallel_size", None):
        names += [] if given.intersection(_LAYOUT) else _LAYOUT
    _copy(saved, args, names)
    args.mtp_num_layers = None  # its losses are for training
    return int(args.iteration)


def _tokenizer_arguments(args: argparse.Namespace, saved: Any, given: set[str]) -> tuple[str, ...]:
    """The names of what the checkpoint says about the tokenizer: of one of another type, the files alone."""
    if "tokenizer_type" not in given or args.tokenizer_type == getattr(saved, "tokenizer_type", None):
        return TOKENIZER_ARGUMENTS
    return ("vocab_file", "merge_file") if args.tokenizer_type == GPT2_BPE else ("tokenizer_model",)


def model_arguments(args: argparse.Namespace) -> list[str]:
    """The names in ``args`` that decide what the model computes."""
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.transformer import MLATransformerConfig

    parallel = {field.name for field in dataclasses.fields(ModelParallelConfig)}
    model = [field.name for field in dataclasses.fields(MLATransformerConfig) if field.name not in parallel]
    kept = [name for name in model if not _HOW_TO_RUN.match(name) and name not in _LAYOUT]
    return [name for name in (*kept, *_OTHER_MODEL_ARGUMENTS) if hasattr(args, name)]


def _copy(source: Any, target: argparse.Namespace, names: Iterable[str]) -> None:
    for name in names:
        if hasattr(source, name):
            setattr(target, name, getattr(source, name))
