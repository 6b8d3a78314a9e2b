"""Megatron's GPT pretraining with the PACI schedule available.

    torchrun --nproc-per-node 8 pretrain_gpt_paci.py <your Megatron flags> --pipeline-schedule paci

Every Megatron flag keeps its meaning, and without ``--pipeline-schedule paci`` this is Megatron's own training. The
main path: ``pretrain`` calls ``train_step`` (paci_megatron/plugin/train_step.py) once per iteration, which runs this
stage's plan (paci_megatron/schedule/schedules.py) through the executor (paci_megatron/runtime/executor.py) up to its next
UPDATE.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Iterator
from typing import Any

import torch

import paci_megatron

_PROGRAM_START = time.time()


def get_batch(data_iterator: Iterator[dict[str, torch.Tensor]], vp_stage: int | None = None) -> dict[str, Any]:
    """The next micro-batch on this rank: tokens, labels, loss_mask, position_ids, each (micro-batch size, sequence),
    and attention_mask. The first stage has no labels, the last no tokens, and those between have nothing. ``vp_stage`` is
    the model chunk under Megatron's interleaved schedule, where only the first stage's first and the last one's last count.
    """
    from megatron.core import parallel_state
    from megatron.core.utils import get_batch_on_this_cp_rank, get_batch_on_this_tp_rank
    from megatron.training import get_args

    names = ("tokens", "labels", "loss_mask", "position_ids", "attention_mask")
    first = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage)
    last = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
    if not (first or last):
        return dict.fromkeys(names)
    args = get_args()
    batch: dict[str, Any] = {}
    if parallel_state.get_tensor_model_parallel_rank() == 0:
        loaded = next(data_iterator)
        batch = {name: loaded[name].cuda(non_blocking=True) if name in loaded else None for name in names}
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=parallel_state.get_tensor_model_parallel_src_rank(),
        broadcast_group=parallel_state.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=False,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=first,
        is_pipeline_last_stage=last,
    )
    cp_group = parallel_state.get_context_parallel_group()
    batch = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=cp_group)
    return {name: batch.get(name) for name in names}


def loss_func(
    loss_mask: torch.Tensor, token_losses: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """The micro-batch's loss from the model's per-token losses (micro-batch size, sequence).

    Returns the summed loss, the number of tokens in it, and both again as the report (2,) that is averaged for the log.
    ``RuntimeError`` on a NaN or infinite loss unless ``--no-check-for-nan-in-loss-and-grad`` is given.
    """
    from megatron.core.rerun_state_machine import get_rerun_state_machine
    from megatron.training import get_args

    mask = loss_mask.view(-1).float()
    loss = torch.sum(token_losses.view(-1).float() * mask)
    num_tokens = mask.sum().detach().to(torch.int)
    if get_args().check_for_nan_in_loss_and_grad:
        for rejects, name in ((torch.isnan, "NaN"), (torch.isinf, "Inf")):
            get_rerun_state_machine().validate_result(
                result=loss,
                rejection_func=rejects,
                message=f"found {name} in local forward loss calculation",
                tolerance=0.0,
                fatal=True,
            )
    report = torch.stack([loss.detach(), num_tokens.to(loss.dtype)])
    return loss, num_tokens, {"lm loss": report}


def forward_step(data_iterator: Iterator[dict[str, torch.Tensor]], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    """This stage's forward of one micro-batch, and the function that turns the last stage's output into a loss."""
    from megatron.core.utils import get_attr_wrapped_model

    batch = get_batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
    output = model(
        batch["tokens"],
        batch["position_ids"],
        batch["attention_mask"],
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
    )
    return output, functools.partial(loss_func, batch["loss_mask"])


def datasets_provider(num_samples: list[int], vp_stage: int | None = None) -> tuple[Any, Any, Any]:
    """Megatron's GPT data sets for (train, validation, test), of the given numbers of samples."""
    from megatron.core import parallel_state
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
    from megatron.training import get_args
    from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage

    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    sequences_per_dataset = None
    if args.per_dataset_sequences_path is not None:
        with open(args.per_dataset_sequences_path, encoding="utf-8") as file:
            sequences_per_dataset = json.load(file)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=build_tokenizer(args),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        object_storage_cache_path=args.object_storage_cache_path,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
        fast_cache_load=args.dataloader_fast_cache_load,
        defer_npy_index_mmap=args.dataloader_defer_npy_index_mmap,
        sequences_per_dataset=sequences_per_dataset,
    )

    def is_built_here() -> bool:
        return is_first_or_last_pipeline_stage(vp_stage) and parallel_state.get_tensor_model_parallel_rank() == 0

    kind = MockGPTDataset if args.mock_data else GPTDataset
    train, valid, test = BlendedMegatronDatasetBuilder(kind, num_samples, is_built_here, config).build()
    return train, valid, test


def main() -> None:
    """Run the training that the command line describes."""
    paci_megatron.install()
    run()


def run() -> None:
    """The same, with the plugin installed."""
    from megatron.core.enums import ModelType
    from megatron.training import inprocess_restart, pretrain, set_startup_timestamps
    from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args, parse_args

    from paci_megatron.plugin.inputs import check_inputs, exit_on_config_error

    set_startup_timestamps(program_start=_PROGRAM_START, main_entry=time.time())
    with exit_on_config_error():
        check_inputs(parse_args())
    pretrain, store = inprocess_restart.maybe_wrap_for_inprocess_restart(pretrain)
    args = parse_and_validate_args(args_defaults={"tokenizer_type": "GPT2BPETokenizer"})
    config = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))
    datasets_provider.is_distributed = True  # type: ignore[attr-defined]
    pretrain(config, datasets_provider, ModelType.encoder_or_decoder, forward_step, store=store)


if __name__ == "__main__":
    main()
