"""Writes the tables of Megatron's flags in docs/flags.md, from paci_megatron/flags.py and from what is tested:

python -m lab.checks.flag_tables
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

from paci_megatron.flags import REFUSED, SWITCHED_OFF

GUIDE = Path(__file__).parents[2] / "docs/flags.md"
SUPPORTED: tuple[tuple[str, str, str], ...] = (
    ("--tensor-model-parallel-size", "as without the split", "multiproc/test_parallelism.py"),
    ("--sequence-parallel", "as without the split", "multiproc/test_parallelism.py"),
    ("--expert-model-parallel-size", "as without the split", "multiproc/test_parallelism.py"),
    ("--use-distributed-optimizer", "as without the split", "multiproc/test_parallelism.py"),
    ("--num-distributed-optimizer-instances", "as without the split; needs `einops`", "multiproc/test_parallelism.py"),
    ("--overlap-grad-reduce", "as without the overlap", "multiproc/test_parallelism.py"),
    ("--overlap-param-gather", "as without, bit for bit; off with dist_muon", "multiproc/test_parallelism.py"),
    ("--num-experts", "its metrics are means over the iterations since the last drain", "multiproc/test_parallelism.py"),
    ("--mtp-num-layers", "the last stage's copy of the embedding is one more tied pair", "multiproc/test_parallelism.py"),
    ("--pipeline-model-parallel-layout", "", "multiproc/test_parallelism.py"),
    ("--account-for-embedding-in-pipeline-split", "", "multiproc/test_parallelism.py"),
    ("--account-for-loss-in-pipeline-split", "", "multiproc/test_parallelism.py"),
    ("--recompute-granularity", "a backward agrees with the weights it recomputes with", "multiproc/test_parallelism.py"),
    ("--optimizer", "adam, muon, lion and soap", "multiproc/test_parallelism.py"),
    ("--optimizer", "dist_muon, which is muon with --use-distributed-optimizer: in bf16", "multiproc/test_layer_wise.py"),
    ("--freeze-all-layers", "", "multiproc/test_parallelism.py"),
    ("--step-batch-size-schedule", "drains where the number of micro-batches changes", "multiproc/test_parallelism.py"),
    ("--bf16", "", "multiproc/test_parallelism.py"),
    ("--fp16", "the loss scale follows Megatron's rule later, see below", "multiproc/test_loss_scale.py"),
    ("--loss-scale", "", "multiproc/test_loss_scale.py"),
    ("--clip-grad", "by the global norm of an earlier update, see the user guide", "multiproc/test_control.py"),
    ("--calculate-per-token-loss", "", "multiproc/test_control.py"),
    ("--qk-clip", "after each update of a stage", "multiproc/test_qk_clip.py"),
    ("--log-max-attention-logit", "after each update of a stage", "multiproc/test_qk_clip.py"),
    ("--dataloader-inter-document-masking", "one sample a micro-batch", "multiproc/test_packing.py"),
    ("--sft", "one sample a micro-batch", "unit/test_config.py"),
    ("--exit-signal-handler", "a drain comes soon", "multiproc/test_stopping.py"),
    ("--exit-duration-in-mins", "a drain comes soon", "multiproc/test_stopping.py"),
    ("--exit-interval", "", "multiproc/test_stopping.py"),
    ("--async-save", "", "multiproc/test_checkpoints.py"),
)
"""Megatron's flags that change how stages work together: what holds under PACI, and the test that shows it."""

BEGIN, END = "<!-- {}: by python -m lab.checks.flag_tables -->\n", "<!-- end of {} -->\n"


def tables() -> dict[str, str]:
    """Each table in Markdown, by the name it has in the guide."""
    return {
        "supported": _table(
            ("flag", "under paci", "test"), ((flag, note, f"`tests/{test}`") for flag, note, test in SUPPORTED)
        ),
        "switched off": _table(
            ("flag", "why", "what that costs"), ((rule.flag, rule.reason, rule.cost) for rule in SWITCHED_OFF)
        ),
        "refused": _table(("flag", "why", "instead"), ((rule.flag, rule.reason, rule.remedy) for rule in REFUSED)),
    }


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """Neighbouring rows that say the same become one."""
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for said, same in groupby(rows, key=lambda row: row[1:]):
        flags = ", ".join(f"`{row[0]}`" for row in same)
        lines.append(f"| {' | '.join((flags, *said))} |")
    return "\n".join(lines) + "\n"


def with_tables(text: str) -> str:
    """The guide's text with its tables as they should be; ``ValueError`` where the comments around one are missing."""
    for name, table in tables().items():
        before, begin, rest = text.partition(BEGIN.format(name))
        _, end, after = rest.partition(END.format(name))
        if not (begin and end):
            raise ValueError(f"{GUIDE}: no comments around the table {name!r}")
        text = f"{before}{begin}\n{table}\n{end}{after}"
    return text


if __name__ == "__main__":
    GUIDE.write_text(with_tables(GUIDE.read_text(encoding="utf-8")), encoding="utf-8")
