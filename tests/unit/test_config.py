"""Every command line that cannot work is refused with the flag, the reason and the remedy."""

from __future__ import annotations

import argparse
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from paci_megatron.arguments import add_paci_arguments
from paci_megatron.config import ConfigError, Extra, PaciConfig, check_num_stages, count_stages, extra_of, memory_budget
from paci_megatron.platform.shared_gpu import check_host_link_on_gpu
from paci_megatron.plugin.options import NUMBERS, check_emulation, check_options, together
from paci_megatron.schedule.vee import fold

AHEAD = {"paci_look_ahead": True, "bf16": True, "fp16": False}


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
        "paci_transfer_timeout": None,
        "paci_transfer_ctas": None,
        "distributed_timeout_minutes": 10,
        "distributed_timeout_seconds_after_init": None,
        "paci_drain_interval": None,
        "paci_emulate_stages": None,
        "paci_link": "p2p",
        "paci_weight_policy": "latest",
        "paci_look_ahead": False,
        "paci_extra_in_flight": "0",
        "paci_memory_budget": None,
        "paci_v_order": "1:2:0",
        "paci_transfer_dtype": "model",
        "paci_trace_dir": None,
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
        "sft": False,
        "dataloader_inter_document_masking": False,
        "fp8": None,
        "fp8_recipe": "delayed",
        "fp4": None,
    }
    return argparse.Namespace(**{**accepted, **changes})


def test_an_ordinary_command_line_is_accepted() -> None:
    assert PaciConfig.from_args(namespace()) == PaciConfig(
        num_stages=4, clip_mode="none", slack=(0, 0, 0), extra=Extra(((0, (0, 0, 0)),))
    )


def test_a_look_ahead_is_pacis_alone() -> None:
    assert PaciConfig.from_args(namespace(**AHEAD)).look_ahead
    assert PaciConfig.from_args(namespace(**AHEAD, optimizer="muon", muon_scalar_optimizer="adam")).look_ahead
    assert not PaciConfig.from_args(namespace(**AHEAD, pipeline_schedule="1f1b", paci_emulate_stages=4)).look_ahead


def test_all_reasons_come_at_once() -> None:
    def refuse(message: str) -> list[str]:
        raise ConfigError(message)

    assert together(lambda: ["one"], lambda: None, lambda: ["two"]) == ["one", "two"]
    with pytest.raises(ConfigError, match=r"^--b 2: no$"):
        together(lambda: ["one"], lambda: refuse("--b 2: no"))
    with pytest.raises(ConfigError, match=r"^3 reasons:\n  --a: no\n  --b: no\n  --c: no$"):
        together(lambda: refuse("--a: no\n--b: no"), lambda: [], lambda: refuse("--c: no"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"pipeline_model_parallel_size": 1},
            r"--pipeline-model-parallel-size 1: a pipeline of one stage has no bubble.*two stages",
        ),
        (
            {"virtual_pipeline_model_parallel_size": 2, "pipeline_model_parallel_layout": "E|t|t|t|t|t|t|tL"},
            r"--pipeline-model-parallel-layout E\|t.*2 model chunks.*layout with 4 stages",
        ),
        (
            {"optimizer": "muon", "use_layer_wise_distributed_optimizer": True, "bf16": False},
            r"^--optimizer muon with --use-distributed-optimizer and without --bf16: .* bf16 only. Add --bf16, or remove",
        ),
        ({**AHEAD, "bf16": False}, r"^--paci-look-ahead in fp32: the model's weights are the optimizer's own.*Add --bf16"),
        ({**AHEAD, "optimizer": "soap"}, r"^--paci-look-ahead with --optimizer soap: how far .* known of Adam and Muon"),
        (
            {**AHEAD, "optimizer": "muon", "muon_scalar_optimizer": "lion"},
            r"^--paci-look-ahead with --muon-scalar-optimizer lion: how far .* known of Adam and Muon",
        ),
        (
            {**AHEAD, "use_precision_aware_optimizer": True},
            r"^--paci-look-ahead with --use-precision-aware-optimizer: the optimizer itself then writes",
        ),
        (
            {**AHEAD, "reuse_grad_buf_for_mxfp8_param_ag": True},
            r"^--paci-look-ahead with --reuse-grad-buf-for-mxfp8-param-ag: new weights are then gathered",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PaciConfig.from_args(namespace(**changes))


@pytest.mark.parametrize("schedule", ["paci", "1f1b"])
@pytest.mark.parametrize(
    ("name", "values", "meaning"),
    [
        ("paci_transfer_timeout", (0.0, -1.0, math.nan, math.inf, -math.inf), "a number of seconds, more than 0"),
        ("paci_fallback", (-1,), r"0 \(off\) or a number of iterations"),
        ("paci_start_iteration", (-5,), r"0 \(off\) or a number of iterations"),
        (
            "paci_extra_in_flight",
            ("-1", "some", "1,"),
            "0 or a number of micro-batches, or one for each link between stages, like 0,4,0; "
            "or auto, or the metrics file of a run with auto",
        ),
        ("paci_drain_interval", (0, -1), "at least 1 update"),
        ("paci_transfer_ctas", (0, -4, 65), "1 to 64 thread blocks"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(
    name: str, values: tuple[float | str, ...], meaning: str, schedule: str
) -> None:
    for value in values:
        with pytest.raises(ConfigError, match=rf"^--{name.replace('_', '-')} {value}: must be {meaning}\.$"):
            check_options(namespace(**{name: value, "pipeline_schedule": schedule}))


def test_every_number_of_the_command_line_group_is_checked() -> None:
    options = add_paci_arguments(argparse.ArgumentParser())._actions
    numbers = {option.option_strings[0] for option in options if option.type in (int, float)}
    assert numbers == {flag for flag, *_ in NUMBERS} | {"--paci-emulate-stages"}  # by check_emulation


@pytest.mark.parametrize("norm", [-1.0, math.nan, math.inf, -math.inf])
def test_a_clipping_norm_that_makes_no_sense_is_refused(norm: float) -> None:
    with pytest.raises(ConfigError, match=rf"^--clip-grad {norm}: must be a norm of gradients, or 0, which clips nothing"):
        check_options(namespace(clip_grad=norm))
    check_options(namespace(clip_grad=norm, pipeline_schedule="1f1b"))  # Megatron's own, as it was


@pytest.mark.parametrize("flag", ["--sft", "--dataloader-inter-document-masking"])
def test_packed_sequences_have_one_sample_a_micro_batch(flag: str) -> None:
    packed = {flag[2:].replace("-", "_"): True}
    with pytest.raises(ConfigError, match=rf"^{flag} with --micro-batch-size 2 on several stages.*Use --micro-batch-size 1"):
        PaciConfig.from_args(namespace(**packed))
    PaciConfig.from_args(namespace(**packed, micro_batch_size=1))


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pipeline_model_parallel_size": 2}, "paci-v on one process, with two stages"),
        ({"paci_emulate_stages": 5, "pipeline_model_parallel_size": 1}, "--paci-emulate-stages 5 .* Give an even number"),
        ({"paci_extra_in_flight": "2"}, "--paci-extra-in-flight 2 with --pipeline-schedule paci-v: its order says"),
        ({"paci_v_order": "1:2"}, "--paci-v-order 1:2: expected FORWARD:BACKWARD:WAIT"),
        ({"paci_v_order": "1:20:0"}, "--paci-v-order 1:20:0: no V for a forward and backward of 1:20"),
        ({"paci_transfer_dtype": "bf16"}, "--paci-transfer-dtype bf16 with --pipeline-schedule paci-v"),
        ({"eval_micro_batch_size": 4}, "--eval-micro-batch-size 4 with --pipeline-schedule paci-v: .* Give 2"),
        ({"save": "x", "ckpt_format": "torch"}, "--pipeline-schedule paci-v with --ckpt-format torch"),
        ({"fp8": "hybrid"}, "--pipeline-schedule paci-v with --fp8-recipe delayed"),
        ({"skip_train": True}, "--pipeline-schedule paci-v with --skip-train"),
        ({"skip_train": True, "paci_emulate_stages": 4, "pipeline_model_parallel_size": 1}, "4 with --skip-train"),
    ],
)
def test_a_v_that_cannot_work_is_refused(changes: dict[str, Any], message: str) -> None:
    args = namespace(pipeline_schedule="paci-v", **changes)
    with pytest.raises(ConfigError, match=message):
        together(lambda: check_options(args), lambda: check_emulation(args), lambda: check_num_stages(args))


def test_a_v_has_its_ends_on_the_last_rank() -> None:
    args = namespace(pipeline_schedule="paci-v", pipeline_model_parallel_size=3)
    count_stages(args)
    config = PaciConfig.from_args(args)
    assert (config.num_stages, config.num_processes, config.slack) == (6, 3, fold(3).slack)
    assert [config.held_stages(rank) for rank in range(3)] == [(2, 3), (1, 4), (0, 5)]
    assert config.stage_ranks([10, 11, 12]) == [12, 11, 10, 10, 11, 12]
    one = PaciConfig.from_args(namespace(pipeline_schedule="paci-v", pipeline_model_parallel_size=6, paci_emulate_stages=6))
    assert one.emulates and one.slack == config.slack and one.held_stages(0) == tuple(range(6))


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
    check_options(namespace(paci_weight_policy="stash", paci_extra_in_flight=1))
    with pytest.raises(ConfigError, match=r"--paci-extra-in-flight 1 with --pipeline-schedule 1f1b: a flush leaves nothing"):
        check_options(namespace(paci_extra_in_flight=1, pipeline_schedule="1f1b"))
    check_options(namespace(pipeline_schedule="1f1b"))
    with pytest.raises(ConfigError, match=r"stash with --pipeline-schedule 1f1b.*Add --pipeline-schedule"):
        check_options(namespace(paci_weight_policy="stash", pipeline_schedule="1f1b"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_virtual_stages_per_pipeline_rank": 2},
            r"--paci-trace-dir runs/trace with --num-virtual-stages-per-pipeline-rank 2: .*one model chunk a stage",
        ),
        (
            {"num_layers_per_virtual_pipeline_stage": 1},
            r"--paci-trace-dir runs/trace with --num-layers-per-virtual-pipeline-stage 1: .* Remove one of the two",
        ),
        (
            {"pipeline_model_parallel_layout": "E|t|t|t|t|t|t|ttL"},
            r"layout E\|t.*: 8 model chunks on 4 stages, and a trace knows one a stage. Remove one of the two",
        ),
    ],
)
def test_a_trace_of_several_chunks_a_stage_is_refused(changes: dict[str, Any], message: str) -> None:
    options = namespace(**{"pipeline_schedule": "1f1b", "paci_trace_dir": "runs/trace", **changes})
    with pytest.raises(ConfigError, match=message):
        check_options(options)
    options.paci_trace_dir = None
    check_options(options)


def test_a_trace_works_with_either_schedule_and_emulated() -> None:
    for schedule in ("1f1b", "paci"):
        check_options(namespace(pipeline_schedule=schedule, paci_trace_dir="x", pipeline_model_parallel_layout="Et|t|t|tL"))
    emulated = {"paci_emulate_stages": 4, "pipeline_model_parallel_size": 1, "pipeline_model_parallel_layout": "Et|t|t|tL"}
    check_options(namespace(**{"paci_trace_dir": "x", **emulated}))


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
    for name, value in (
        ("tensor_model_parallel_size", 2),
        ("use_distributed_optimizer", True),
        ("use_layer_wise_distributed_optimizer", True),  # as which Megatron takes the same flag with Muon
    ):
        flag = "--" + name.replace("_layer_wise", "").replace("_", "-")
        with pytest.raises(ConfigError, match=f"--paci-link host with {flag}.* on a GPU.*Remove {flag}"):
            check_host_link_on_gpu(namespace(**{**fitting, name: value}))


def test_auto_has_twice_the_activations_unless_told_otherwise() -> None:
    none = (0, (0, 0, 0))
    assert extra_of(namespace(paci_extra_in_flight="auto")) == Extra((none,), most=4, is_auto=True)
    assert extra_of(namespace(paci_extra_in_flight="auto", paci_memory_budget="6")) == Extra((none,), most=2, is_auto=True)
    in_bytes = Extra((none,), most=4, is_auto=True, most_bytes=12_500_000_000)
    assert extra_of(namespace(paci_extra_in_flight="auto", paci_memory_budget="12.5GB")) == in_bytes


@pytest.mark.parametrize(
    ("text", "found"),
    [("7", (7, None)), ("3B", (None, 3)), ("1.5 kb", (None, 1500)), ("2GiB", (None, 2 << 30)), ("1TB", (None, 10**12))],
)
def test_a_budget_is_of_micro_batches_or_bytes(text: str, found: tuple[int | None, int | None]) -> None:
    assert memory_budget(text) == found and memory_budget(None) == (None, None)


@pytest.mark.parametrize("text", ["0", "-2", "1.5", "12G", "GB", "0GB", "0.1B", "nan", "1e9", "many", "3 4"])
def test_other_budgets_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=f"^--paci-memory-budget {text}: must be a number of micro-batches, or of bytes"):
        memory_budget(text)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"paci_extra_in_flight": "auto", "paci_memory_budget": "3"},
            "in flight at the first without any more",
        ),
        ({"paci_memory_budget": "8"}, "--paci-memory-budget 8 with --paci-extra-in-flight 0: it bounds what auto chooses"),
        ({"paci_extra_in_flight": "auto", "paci_emulate_stages": 4}, "emulated stages take turns and wait for nobody"),
        ({"paci_extra_in_flight": "auto", "pipeline_schedule": "1f1b"}, "a flush leaves nothing in flight"),
    ],
)
def test_auto_is_refused_where_there_is_nothing_to_choose(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_options(namespace(**values))


def test_a_metrics_file_has_what_an_earlier_run_chose(tmp_path: Path) -> None:
    """Of iterations that were trained again the last choice counts."""
    path = tmp_path / "metrics.jsonl"
    run, train = {"event": "run", "iteration": 0}, {"event": "train", "iteration": 20, "iterations": 1, "train_s": 1.0}
    train |= {"time_s": 1.0, "ms_per_iteration": 1.0}
    events = [
        run,
        {"event": "slack", "iteration": 10, "slack": [0, 2, 0]},
        {"event": "slack", "iteration": 18, "slack": [9, 9, 9]},
        train,
        run | {"iteration": 12},
        {"event": "slack", "iteration": 18, "slack": [1, 2, 0]},
        train,
    ]
    path.write_text("".join(json.dumps(event) + "\n" for event in events))
    chosen = ((0, (0, 0, 0)), (10, (0, 2, 0)), (18, (1, 2, 0)))
    assert extra_of(namespace(paci_extra_in_flight=str(path))) == Extra(chosen, most=3)
    with pytest.raises(ConfigError, match="chosen for 4 stages, and here are 2"):
        extra_of(namespace(paci_extra_in_flight=str(path), pipeline_model_parallel_size=2))
    path.write_text(json.dumps(run) + "\n")
    with pytest.raises(ConfigError, match="no choice of a run with --paci-extra-in-flight auto is in it"):
        extra_of(namespace(paci_extra_in_flight=str(path)))
