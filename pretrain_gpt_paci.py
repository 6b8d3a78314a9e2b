"""Megatron's GPT pretraining with the PACI schedule available.

    torchrun --nproc-per-node 8 pretrain_gpt_paci.py <your Megatron flags> --pipeline-schedule paci

Every flag of Megatron's own ``pretrain_gpt.py`` keeps its meaning, and without ``--pipeline-schedule paci`` this is
Megatron's own training. The main path: ``pretrain`` calls ``train_step`` (paci_megatron/plugin/loop_patches.py) once per
iteration, which runs this stage's plan (paci_megatron/schedule/plan.py) through the executor
(paci_megatron/runtime/executor.py) up to its next UPDATE.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import paci_megatron
from paci_megatron.plugin.early import check_early, world_size_of_environment
from paci_megatron.plugin.inputs import exit_on_config_error, megatrons_refusals

if TYPE_CHECKING:
    import torch

_PROGRAM_START = time.time()
_SPIKE = 10.0  # --check-for-spiky-loss: how many times the largest loss so far
_FIELDS = (
    *("tokens", "labels", "loss_mask", "position_ids", "attention_mask"),
    *("cu_seqlens", "cu_seqlens_padded", "max_seqlen", "local_cp_size", "hybrid_cp_group"),
)


def predicts_ahead(vp_stage: int | None = None) -> bool:
    """Whether multi-token prediction (``--mtp-num-layers``) happens on this stage."""
    from megatron.core.transformer.multi_token_prediction import mtp_on_this_rank
    from megatron.training import get_args
    from megatron.training.arguments import core_transformer_config_from_args

    args = get_args()
    if args.mtp_num_layers is None:
        return False
    layout = core_transformer_config_from_args(args).pipeline_model_parallel_layout
    return mtp_on_this_rank(layout=layout, mtp_num_layers=args.mtp_num_layers, ignore_virtual=False, vp_stage=vp_stage)


def reads_batches(vp_stage: int | None = None) -> bool:
    """Whether this stage needs tokens or labels: the first, the last, and one that predicts several tokens ahead."""
    from megatron.training.utils import is_first_or_last_pipeline_stage

    return is_first_or_last_pipeline_stage(vp_stage) or predicts_ahead(vp_stage)


def packs_sequences() -> bool:
    """Whether a sample holds several sequences, whose boundaries every stage needs."""
    from megatron.training import get_args

    return bool(get_args().sft or get_args().dataloader_inter_document_masking)


def get_batch(data_iterator: Iterator[dict[str, torch.Tensor]], vp_stage: int | None = None) -> dict[str, Any]:
    """The next micro-batch on this rank: tokens, labels, loss_mask, position_ids, each (micro-batch size, sequence),
    attention_mask, and where sequences are packed their boundaries (cu_seqlens) and the longest of them. Whatever this stage
    does not need is None. ``vp_stage`` is the model chunk under Megatron's interleaved schedule.
    """
    from megatron.core import parallel_state, utils
    from megatron.training import get_args

    args = get_args()
    packed, needed = packs_sequences(), reads_batches(vp_stage)
    if not needed and not packed:
        return dict.fromkeys(_FIELDS)
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    batch: dict[str, Any] = {}
    if tp_rank == 0:
        loaded = next(data_iterator)
        found = ((name, loaded.get(name)) for name in _FIELDS)
        batch = {name: value.cuda(non_blocking=True) if value is not None else None for name, value in found}
    batch = utils.get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=packed,
        is_hybrid_cp=args.hybrid_context_parallel,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=parallel_state.get_tensor_model_parallel_src_rank(),
        broadcast_group=parallel_state.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=tp_rank,
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=predicts_ahead(vp_stage),
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=parallel_state.is_pipeline_first_stage(),
        is_pipeline_last_stage=parallel_state.is_pipeline_last_stage(),
    )
    batch = utils.flatten_batch_for_packed_sequences(batch)
    if not needed:  # a stage in the middle needs to know where the packed sequences begin and end
        return {**dict.fromkeys(_FIELDS), **{k: batch[k] for k in ("cu_seqlens", "cu_seqlens_padded", "max_seqlen")}}
    batch = utils.get_batch_on_this_cp_rank(
        batch,
        is_hybrid_cp=args.hybrid_context_parallel,
        cp_group=parallel_state.get_context_parallel_group(),
        hybrid_cp_group_func=parallel_state.get_hybrid_data_context_parallel_groups,
        use_per_sequence_balancing=args.dataloader_inter_document_masking and not args.sft,
    )
    return {name: batch.get(name) for name in _FIELDS}


def packed_sequences(batch: dict[str, Any]) -> Any:
    """Megatron's description of the sequences packed into ``batch``; None where none are. Counts them for the FLOPs."""
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.training import get_args
    from megatron.training.training import update_seqlen_stats_from_cu_seqlens

    if batch["cu_seqlens"] is None:
        return None
    begins, padded = (batch[name].squeeze(0) if batch[name] is not None else None for name in _FIELDS[5:7])
    update_seqlen_stats_from_cu_seqlens(begins)
    longest, local_size = int(batch["max_seqlen"].item()), batch["local_cp_size"]
    in_kernels = begins if padded is None else padded
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=in_kernels,
        cu_seqlens_kv=in_kernels,
        cu_seqlens_q_padded=padded,
        cu_seqlens_kv_padded=padded,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        local_cp_size=int(local_size.item()) if local_size is not None else None,
        cp_group=batch["hybrid_cp_group"],
        tokens_per_sample=get_args().seq_length,
    )


@functools.cache
def distillation_loss() -> Any:
    """Megatron's loss against a teacher's stored logits (``--logits-load-dir``), which reads them ahead."""
    from megatron.training import get_args
    from megatron.training.distillation import LossFuncCallable

    args = get_args()
    return LossFuncCallable(
        logprobs_dir=args.logits_load_dir,
        decode_threads=args.logits_load_decode_threads,
        prefetch_factor=args.logits_load_prefetch_factor,
        msc_prefetch_depth=args.logits_load_msc_prefetch_depth,
        kd_loss_alpha=args.logits_load_kd_loss_alpha,
        ignore_errors=args.logits_load_ignore_errors,
    )


def loss_func(
    loss_mask: torch.Tensor, token_losses: torch.Tensor, model: torch.nn.Module | None = None
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """The micro-batch's loss from the model's per-token losses (micro-batch size, sequence).

    Returns the summed loss, the number of tokens in it, and both again (2,) to be averaged for the log.
    ``RuntimeError`` on a NaN or infinite loss unless ``--no-check-for-nan-in-loss-and-grad`` is given.
    """
    import torch
    from megatron.core.rerun_state_machine import get_rerun_state_machine
    from megatron.training import get_args

    args, checks = get_args(), []
    if args.logits_load_dir is not None:
        loss, num_tokens, logged = distillation_loss()(loss_mask, token_losses, model=model)
    else:
        mask = loss_mask.view(-1).float()
        loss = torch.sum(token_losses.view(-1).float() * mask)
        num_tokens = mask.sum().detach().to(torch.int)
        logged = {"lm loss": torch.stack([loss.detach(), num_tokens.to(loss.dtype)])}
    if args.check_for_nan_in_loss_and_grad:
        checks += [(torch.isnan, "found NaN in local forward loss calculation", True)]
        checks += [(torch.isinf, "found Inf in local forward loss calculation", True)]
    machine = get_rerun_state_machine()
    if args.check_for_spiky_loss:
        spikes = functools.partial(machine.is_unexpectedly_large, threshold=_SPIKE, context="loss")
        checks.append((spikes, "Spiky loss", False))
    for rejects, message, fatal in checks:
        machine.validate_result(result=loss, rejection_func=rejects, message=message, tolerance=0.0, fatal=fatal)
    return loss, num_tokens, logged


def forward_step(
    data_iterator: Iterator[dict[str, torch.Tensor]], model: torch.nn.Module, return_schedule_plan: bool = False
) -> tuple[Any, Any]:
    """This stage's forward of one micro-batch, and the function that turns the last stage's output into a loss.

    ``return_schedule_plan`` is for Megatron's ``--overlap-moe-expert-parallel-comm``, which runs the forward later.
    """
    from megatron.core.utils import StragglerDetector, get_attr_wrapped_model
    from megatron.training import get_timers

    timers, straggler = get_timers(), StragglerDetector()
    timers("batch-generator", log_level=2).start()
    with straggler(bdata=True):
        batch = get_batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
    packed = packed_sequences(batch)
    timers("batch-generator").stop()
    inputs = (batch["tokens"], batch["position_ids"], batch["attention_mask"])
    targets = {"labels": batch["labels"], "loss_mask": batch["loss_mask"]}
    with straggler:
        if return_schedule_plan:
            output = model.build_schedule_plan(*inputs, **targets)  # type: ignore[operator]  # Megatron's
        else:
            output = model(*inputs, **targets, packed_seq_params=packed)
    return output, functools.partial(loss_func, batch["loss_mask"], model=model)


def dataset_config() -> Any:
    """Megatron's configuration of the GPT data sets, or of those with the middle to be filled in (``--fim-data``)."""
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
    from megatron.training import get_args
    from megatron.training.datasets.fim_dataset import GPTFIMDatasetConfig
    from megatron.training.utils import get_blend_and_blend_per_split

    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    sequences_per_dataset = None
    if args.per_dataset_sequences_path is not None:
        with open(args.per_dataset_sequences_path, encoding="utf-8") as file:
            sequences_per_dataset = json.load(file)
    same_name = (
        *("split", "multiple_validation_sets", "full_validation", "num_dataset_builder_threads", "mmap_bin_files"),
        *("reset_position_ids", "reset_attention_mask", "eod_mask_loss", "object_storage_cache_path"),
        *("mid_level_dataset_surplus", "allow_ambiguous_pad_tokens", "context_parallel_size", "data_parallel_size"),
        "hybrid_context_parallel",
    )
    values: dict[str, Any] = {name: getattr(args, name) for name in same_name}
    values |= {
        "random_seed": args.seed,
        "sequence_length": args.seq_length,
        "blend": blend,
        "blend_per_split": blend_per_split,
        "path_to_cache": args.data_cache_path,
        "tokenizer": build_tokenizer(args),
        "create_attention_mask": args.create_attention_mask_in_dataloader,
        "fast_cache_load": args.dataloader_fast_cache_load,
        "defer_npy_index_mmap": args.dataloader_defer_npy_index_mmap,
        "sequences_per_dataset": sequences_per_dataset,
        "sequence_parallel_size": args.tensor_model_parallel_size * args.sequence_parallel,
        "inter_document_masking": args.dataloader_inter_document_masking,
    }
    if not args.fim_data:
        return GPTDatasetConfig(**values)
    tokens = {name: getattr(args, f"fim_{name}_token") for name in ("prefix", "middle", "suffix", "pad", "eod")}
    fim = {name: getattr(args, name) for name in ("fim_rate", "fim_spm_rate", "fim_split_sample")}
    fim |= {name: getattr(args, name) for name in ("fim_fragment_rate", "fim_no_prefix")}
    return GPTFIMDatasetConfig(**values, **fim, fim_extra_tokens=tokens)


def datasets_provider(num_samples: list[int], vp_stage: int | None = None) -> tuple[Any, Any, Any]:
    """Megatron's data sets for (train, validation, test), of the given numbers of samples."""
    from megatron.core import parallel_state
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, MockGPTDataset
    from megatron.training import get_args
    from megatron.training.datasets.fim_dataset import GPTFIMDataset
    from megatron.training.datasets.sft_dataset import SFTDataset

    from paci_megatron.data.training_data import check_token_ids

    args = get_args()
    with exit_on_config_error():
        check_token_ids(args)

    def is_built_here() -> bool:
        return parallel_state.get_tensor_model_parallel_rank() == 0 and (packs_sequences() or reads_batches(vp_stage))

    kind: Any = SFTDataset if args.sft else MockGPTDataset if args.mock_data else GPTDataset
    if args.fim_data and kind is GPTDataset:
        kind = GPTFIMDataset
    train, valid, test = BlendedMegatronDatasetBuilder(kind, num_samples, is_built_here, dataset_config()).build()
    return train, valid, test


def embedding_ranks(pipeline: list[int]) -> list[int]:
    """The ranks of a pipeline that hold the word embedding: the first stage's, the last one's where they are tied, and those
    that predict several tokens ahead.
    """
    from megatron.core.transformer.multi_token_prediction import get_mtp_ranks
    from megatron.training import get_args
    from megatron.training.arguments import core_transformer_config_from_args

    args = get_args()
    ranks = {pipeline[0]}
    if len(pipeline) > 1:
        ranks |= set(get_mtp_ranks(pipeline, core_transformer_config_from_args(args)))
        if not args.untie_embeddings_and_output_weights:
            ranks.add(pipeline[-1])
    return sorted(ranks)


def main() -> None:
    """Run the training that the command line describes."""
    with exit_on_config_error():
        check_early(sys.argv[1:], world_size_of_environment())  # before Megatron is imported, which takes seconds
        paci_megatron.install()
    run()


def run() -> None:
    """The same, with the plugin installed."""
    from megatron.core.enums import ModelType
    from megatron.training import inprocess_restart, pretrain, set_startup_timestamps
    from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args, parse_args

    from paci_megatron.data.training_data import check_training_files

    set_startup_timestamps(program_start=_PROGRAM_START, main_entry=time.time())
    with exit_on_config_error():
        check_training_files(parse_args())
    pretrain, store = inprocess_restart.maybe_wrap_for_inprocess_restart(pretrain)
    args = parse_and_validate_args(args_defaults={"tokenizer_type": "GPT2BPETokenizer"})
    with exit_on_config_error(), megatrons_refusals():
        config = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))
    datasets_provider.is_distributed = True  # type: ignore[attr-defined]
    pretrain(
        config,
        datasets_provider,
        ModelType.encoder_or_decoder,
        forward_step,
        store=store,
        get_embedding_ranks=embedding_ranks,
    )


if __name__ == "__main__":
    main()
