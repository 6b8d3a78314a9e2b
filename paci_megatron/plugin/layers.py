"""Says which flags make the layers fit the stages, where Megatron only says that they do not."""

from __future__ import annotations

import argparse

from paci_megatron.config import ConfigError


def check_layers(args: argparse.Namespace) -> None:
    """``ConfigError`` if Megatron cannot spread ``--num-layers`` over the stages as the other flags say.

    Left to Megatron: virtual stages, hybrid models, and embedding or loss counted as a layer.
    """
    num_stages, num_layers = args.paci_emulate_stages or args.pipeline_model_parallel_size, args.num_layers
    others = (
        "pipeline_model_parallel_layout",
        "num_layers_per_virtual_pipeline_stage",
        "num_virtual_stages_per_pipeline_rank",
        "hybrid_layer_pattern",
        "account_for_embedding_in_pipeline_split",
        "account_for_loss_in_pipeline_split",
    )
    if num_stages < 2 or num_layers is None or any(getattr(args, name, None) for name in others):
        return
    ends = {
        flag: value
        for flag in ("--decoder-first-pipeline-num-layers", "--decoder-last-pipeline-num-layers")
        if (value := getattr(args, flag[2:].replace("-", "_"), None)) is not None
    }
    rest, others_left = num_layers - sum(ends.values()), num_stages - len(ends)
    if rest == 0 if others_left == 0 else rest >= others_left and rest % others_left == 0:
        return
    given = "".join(f", {flag} {value}" for flag, value in ends.items())
    reason = f"--num-layers {num_layers} on {num_stages} stages{given}: the layers do not spread evenly over the stages"
    if num_layers < num_stages:
        raise ConfigError(f"{reason}, and each needs one. Use at most {num_layers} stages.")
    layers = [num_layers // num_stages + (stage >= num_stages - num_layers % num_stages) for stage in range(num_stages)]
    layout = "E" + "|".join("t" * count for count in layers) + "L"
    remedy = f"--pipeline-model-parallel-layout {layout!r}"
    # The first stage also has the embedding, so its share is the smallest that leaves the others equal ones.
    first = num_layers % (num_stages - 1) or num_stages - 1
    if num_stages > 2 and first < num_layers:
        remedy = f"--decoder-first-pipeline-num-layers {first}, or {remedy}"
    raise ConfigError(f"{reason}. Give {remedy}{', in place of these' if given else ''}.")
