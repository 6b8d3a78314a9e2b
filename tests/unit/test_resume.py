"""What a run says when it resumes under other settings than the checkpoint's."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import pytest

from paci_megatron.config import ConfigError
from paci_megatron.plugin.resume import check_vocabulary, resume_line, wrap_check_and_set, wrap_load_checkpoint


def arguments(**changed: Any) -> argparse.Namespace:
    """Arguments after Megatron's validation, of a paci run with 4 micro-batches per update; None removes one."""
    values: dict[str, Any] = dict(
        pipeline_schedule="paci",
        global_batch_size=16,
        micro_batch_size=2,
        data_parallel_size=2,
        seq_length=16,
        consumed_train_samples=96,
        step_batch_size_schedule=None,
        decrease_batch_size_if_needed=False,
    )
    values.update(changed)
    return argparse.Namespace(**{name: value for name, value in values.items() if value is not None})


def test_nothing_is_said_if_nothing_changes_for_paci() -> None:
    assert resume_line(arguments(), arguments(consumed_train_samples=0)) is None
    # The same number of micro-batches on twice the replicas.
    assert resume_line(arguments(), arguments(global_batch_size=32, data_parallel_size=4)) is None
    assert resume_line(arguments(pipeline_schedule="1f1b"), arguments(pipeline_schedule="1f1b", global_batch_size=8)) is None


def test_a_change_of_schedule_is_said() -> None:
    assert resume_line(arguments(), arguments(pipeline_schedule="1f1b")) == (
        "resuming a checkpoint written under paci, 4 micro-batches per update, with 1f1b, 4 micro-batches per update"
    )
    # Megatron without the plugin knows no --pipeline-schedule.
    assert resume_line(arguments(pipeline_schedule=None), arguments()) == (
        "resuming a checkpoint written under 1f1b, 4 micro-batches per update, with paci, 4 micro-batches per update"
    )


def test_a_change_of_microbatches_per_update_is_said() -> None:
    expected = "resuming a checkpoint written under paci, 4 micro-batches per update, with paci, {} micro-batches per update"
    assert resume_line(arguments(), arguments(global_batch_size=12)) == expected.format(3)
    assert resume_line(arguments(), arguments(micro_batch_size=1)) == expected.format(8)
    assert resume_line(arguments(), arguments(data_parallel_size=8)) == expected.format(1)


def test_both_are_counted_where_the_checkpoint_stands() -> None:
    # Thresholds are in tokens: 16 samples a batch for the first 64 samples, then 32.
    schedule = arguments(step_batch_size_schedule="0:16 1024:32", global_batch_size=32)
    line = resume_line(arguments(), schedule)
    assert line is not None and line.endswith("with paci, 8 micro-batches per update")
    assert resume_line(arguments(consumed_train_samples=48), schedule) is None


def test_a_checkpoint_that_does_not_tell_its_batch_size() -> None:
    assert resume_line(arguments(global_batch_size=None), arguments()) == (
        "resuming a checkpoint written under paci, an unknown number of micro-batches per update, with paci, "
        "4 micro-batches per update"
    )


def vocabulary(padded: int | None, vocab_size: int | None = None, tp: int = 1) -> argparse.Namespace:
    """What a run's arguments say of it."""
    sizes = {"vocab_size": vocab_size, "make_vocab_size_divisible_by": 128, "tensor_model_parallel_size": tp}
    return argparse.Namespace(load="runs/gpt", padded_vocab_size=padded, **sizes)


@pytest.mark.parametrize(
    ("saved", "now", "tokenizer"),
    [
        (vocabulary(128, 64), vocabulary(1024, 1000), 1000),
        (vocabulary(50304), vocabulary(32000), 32000),
        (vocabulary(50304), vocabulary(51200, tp=8), 50305),
        (vocabulary(50304), vocabulary(50176), 50176),
        (vocabulary(50304), vocabulary(32000), None),
    ],
)
def test_another_vocabulary_is_refused(saved: argparse.Namespace, now: argparse.Namespace, tokenizer: int | None) -> None:
    with pytest.raises(
        ConfigError,
        match=rf"--load runs/gpt.* of {saved.padded_vocab_size} tokens with padding.* one of {now.padded_vocab_size}.*Give",
    ):
        check_vocabulary(saved, now, tokenizer)


def test_the_same_vocabulary_with_other_padding_is_accepted() -> None:
    check_vocabulary(vocabulary(50304), vocabulary(51200, tp=8), 50257)
    check_vocabulary(vocabulary(51200, tp=8), vocabulary(50304), 50257)
    check_vocabulary(vocabulary(128, 64), vocabulary(128, 100), 100)  # has rows for all
    check_vocabulary(vocabulary(None), vocabulary(128), 100)


def test_another_batch_size_names_the_flags(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    monkeypatch.setenv("RANK", "0")
    scheduler = argparse.Namespace(override_opt_param_scheduler=False, use_checkpoint_opt_param_scheduler=False)
    check_and_set = wrap_check_and_set(OptimizerParamScheduler._check_and_set)
    assert check_and_set(scheduler, 80, 80, "total number of iterations") == 80
    assert check_and_set(scheduler, "cosine", "cosine", "decay style") == "cosine"
    with pytest.raises(SystemExit) as caught:
        check_and_set(scheduler, 160, 80, "total number of iterations")
    said = capsys.readouterr().err
    assert caught.value.code == 2 and said.count("\n") == 1
    assert said.startswith("paci-megatron: error: total number of iterations is 160 on the command line and 80 in the")
    assert "Add --override-opt_param-scheduler" in said and "--use-checkpoint-opt_param-scheduler" in said


@pytest.mark.parametrize(("code", "status"), [(None, 2), (0, 2), (3, 3)])
def test_a_checkpoint_that_is_not_loaded_is_a_failure(code: int | None, status: int) -> None:
    def load_checkpoint(*arguments: Any) -> Any:
        sys.exit(code)

    with pytest.raises(SystemExit) as caught:
        wrap_load_checkpoint(load_checkpoint)("model", None, None)
    assert caught.value.code == status
    assert wrap_load_checkpoint(lambda *arguments: (7, 0))("model") == (7, 0)
