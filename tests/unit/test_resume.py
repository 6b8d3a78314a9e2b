"""What a run says when it resumes under other settings than the checkpoint's."""

from __future__ import annotations

import argparse
from typing import Any

from paci_megatron.plugin.resume import resume_line


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
