"""Every command line that cannot work is refused with the flag, the reason and the remedy."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from paci_megatron.config import (
    OVERRIDES,
    UNSUPPORTED,
    ConfigError,
    PaciConfig,
    Unsupported,
    apply_overrides,
    check_emulation,
    check_flags,
    check_host_link_on_gpu,
    check_options,
)


def namespace(**changes: Any) -> argparse.Namespace:
    """Arguments that PACI accepts, with changes."""
    accepted = {
        "pipeline_model_parallel_size": 4,
        "virtual_pipeline_model_parallel_size": None,
        "untie_embeddings_and_output_weights": True,
        "clip_grad": 0.0,
        "paci_clip_mode": "global",
        "paci_start_iteration": 0,
        "paci_fallback": 0,
        "paci_transfer_timeout": 600.0,
        "paci_drain_interval": None,
        "paci_emulate_stages": None,
        "paci_link": "p2p",
        "paci_weight_policy": "latest",
        "global_batch_size": 16,
        "micro_batch_size": 2,
        "data_parallel_size": 2,
        "step_batch_size_schedule": None,
        "pipeline_schedule": "paci",
        "pipeline_model_parallel_layout": None,
        "num_layers": 8,
        "save": None,
        "load": None,
        "ckpt_format": "torch_dist",
        "optimizer": "adam",
        "cuda_graph_impl": "none",
    }
    return argparse.Namespace(**{**accepted, **changes})


def refused_value(rule: Unsupported) -> Any:
    """A value that a user may give the flag."""
    values = {"optimizer": "muon", "cuda_graph_impl": "local", "fp8": "hybrid", "fp4": "e2m1", "loss_scale": 1024.0}
    return values.get(
        rule.attribute, 2 if rule.flag.endswith(("-instances", "-interval", "-layers", "-stage", "-rank", "-mins")) else True
    )


def test_an_ordinary_command_line_is_accepted() -> None:
    check_flags(namespace())
    assert PaciConfig.from_args(namespace()) == PaciConfig(num_stages=4, clip_mode="none")


@pytest.mark.parametrize("rule", UNSUPPORTED, ids=lambda rule: rule.flag)
def test_each_unsupported_flag_is_refused_with_reason_and_remedy(rule: Unsupported) -> None:
    value = refused_value(rule)
    with pytest.raises(ConfigError) as caught:
        check_flags(namespace(**{rule.attribute: value}))
    message = str(caught.value)
    assert message.startswith(rule.flag) and rule.reason in message and rule.remedy in message
    assert value is True or str(value) in message
    assert "\n" not in message


@pytest.mark.parametrize("rule", UNSUPPORTED, ids=lambda rule: rule.flag)
def test_each_unsupported_flag_exists_in_megatron_and_is_off_by_default(rule: Unsupported, megatron_defaults: Any) -> None:
    if rule.attribute == "modelopt_enabled":
        return  # added by scripts that use ModelOpt
    assert rule.flag in megatron_defaults.flags
    assert not rule.is_set(getattr(megatron_defaults.values, rule.attribute))


@pytest.mark.parametrize("override", OVERRIDES, ids=lambda override: override[2])
def test_what_would_stop_the_pipeline_is_switched_off_with_a_line(override: Any, megatron_defaults: Any) -> None:
    attribute, value, flag, _ = override
    assert flag in megatron_defaults.flags
    args = namespace(**{attribute: "something else"})
    (line,) = apply_overrides(args)
    assert flag in line and getattr(args, attribute) == value
    assert apply_overrides(args) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"pipeline_model_parallel_size": 1},
            r"--pipeline-model-parallel-size 1: a pipeline of one stage has no bubble.*two stages",
        ),
        ({"paci_transfer_timeout": 0.0}, r"--paci-transfer-timeout 0: must be more than 0"),
        ({"paci_fallback": -1}, r"--paci-fallback -1: must be 0"),
        ({"paci_drain_interval": 0}, r"--paci-drain-interval 0: must be at least 1"),
        (
            {"virtual_pipeline_model_parallel_size": 2, "pipeline_model_parallel_layout": "E|t|t|t|t|t|t|tL"},
            r"--pipeline-model-parallel-layout E\|t.*2 model chunks.*layout with 4 stages",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PaciConfig.from_args(namespace(**changes))


def test_a_layout_that_leaves_a_stage_empty_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"layout Ett\|\|tt\|ttL leaves stage 1 empty.*Give it a layer"):
        PaciConfig.from_args(namespace(pipeline_model_parallel_layout="Ett||tt|ttL"))
    PaciConfig.from_args(namespace(pipeline_model_parallel_layout="Ett|t|tt|ttL"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"paci_emulate_stages": 1}, r"--paci-emulate-stages 1: a pipeline has at least 2 stages"),
        (
            {"paci_emulate_stages": 4, "pipeline_model_parallel_size": 2},
            r"--paci-emulate-stages 4 with --pipeline-model-parallel-size 2: .*must be 1. Remove one",
        ),
        ({"paci_emulate_stages": 9}, r"--paci-emulate-stages 9 with --num-layers 8: each stage needs a layer.*at most 8"),
        (
            {"paci_emulate_stages": 4, "save": "x", "ckpt_format": "torch"},
            r"--ckpt-format torch: .*Use --ckpt-format torch_dist",
        ),
    ],
)
def test_emulation_that_cannot_work_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_emulation(namespace(**{"pipeline_model_parallel_size": 1, **changes}))


def test_emulation_is_accepted() -> None:
    check_emulation(namespace(pipeline_model_parallel_size=1, paci_emulate_stages=8))


def test_clip_modes() -> None:
    assert PaciConfig.from_args(namespace(clip_grad=1.0)).clip_mode == "global"
    assert PaciConfig.from_args(namespace(clip_grad=1.0, paci_clip_mode="stage")).clip_mode == "stage"
    assert PaciConfig.from_args(namespace(clip_grad=1.0, paci_clip_mode="none")).clip_mode == "none"
    assert PaciConfig.from_args(namespace(clip_grad=0.0, paci_clip_mode="stage")).clip_mode == "none"


def test_two_weight_versions_need_enough_microbatches() -> None:
    assert PaciConfig.from_args(namespace(paci_weight_policy="double-buffer")).weight_policy == "double-buffer"
    with pytest.raises(ConfigError, match=r"4 stages and 2 micro-batches per update.*Raise --global-batch-size to 12\."):
        PaciConfig.from_args(namespace(paci_weight_policy="double-buffer", global_batch_size=8))
    with pytest.raises(ConfigError, match=r"Remove --step-batch-size-schedule"):
        PaciConfig.from_args(namespace(paci_weight_policy="double-buffer", step_batch_size_schedule="0:4 100:8"))


def test_a_weight_policy_needs_the_schedule() -> None:
    check_options(namespace(paci_weight_policy="stash"))
    check_options(namespace(pipeline_schedule="1f1b"))
    with pytest.raises(ConfigError, match=r"stash with --pipeline-schedule 1f1b.*Add --pipeline-schedule"):
        check_options(namespace(paci_weight_policy="stash", pipeline_schedule="1f1b"))


def test_the_host_link_is_refused_where_it_cannot_work() -> None:
    check_options(namespace(paci_link="host"))
    with pytest.raises(ConfigError, match=r"--paci-link host with --paci-emulate-stages 4: .* Remove one of the two"):
        check_options(namespace(paci_link="host", paci_emulate_stages=4))
    fitting = {
        "tensor_model_parallel_size": 1,
        "context_parallel_size": 1,
        "expert_model_parallel_size": 1,
        "use_distributed_optimizer": False,
        "overlap_grad_reduce": False,
    }
    check_host_link_on_gpu(namespace(**fitting))
    for name, value in (("tensor_model_parallel_size", 2), ("use_distributed_optimizer", True)):
        flag = "--" + name.replace("_", "-")
        with pytest.raises(ConfigError, match=f"--paci-link host with {flag}.* on a GPU.*Remove {flag}"):
            check_host_link_on_gpu(namespace(**{**fitting, name: value}))
