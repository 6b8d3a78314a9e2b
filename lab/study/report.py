"""``report.md``: the report's tables, with the paper's figures beside ours."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from . import paper


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *rows]]
    return [*lines, ""]


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _spread(value: dict[str, Any], form: str) -> str:
    return form.format(value["mean"]) + ("" if value["std"] is None else f" ± {form.format(value['std'])}")


def markdown(report: dict[str, Any], figures: Sequence[str]) -> str:
    """The whole file. ``figures`` are file names beside it."""
    seeds = ", ".join(map(str, report["seeds"]))
    lines = [
        f"# {report['set']}: 1F1B-flush and PACI with {report['num_stages']} stages",
        "",
        f"{report['finished_runs']} of {report['planned_runs']} runs are finished: {report['tokens']:,} tokens each, seeds "
        f"{seeds}. Spreads are sample standard deviations over seeds. A seed decides the initial weights and the order of "
        "the data, the same for all arms. The paper's columns are GPT-2 Medium with 8 stages on OpenWebText: their absolute "
        "values are of another model and corpus. Its smaller batch stands beside our smaller one.",
        "",
    ]
    if report["stages_share_a_device"]:
        lines += [
            "The stages share a device, so no time here is measured as a whole: **times and speeds are computed** by the "
            "simulator from each stage's measured computing time for a micro-batch (median over all runs of the same batch "
            "and number of micro-batches; a third of it forward; transfers free).",
            "",
        ]
    lines += (
        _best(report)
        + _final(report)
        + _weight_copies(report)
        + _thresholds(report)
        + _variability(report)
        + _throughput(report)
    )
    lines += ["## Figures" * bool(figures), "", *(f"![{name}]({name})" for name in figures), ""]
    return "\n".join(lines)


def _batches(report: dict[str, Any]) -> list[int]:
    return sorted({row["batch_size"] for row in report["arms"]})


def _paper_key(report: dict[str, Any], row: dict[str, Any]) -> tuple[str, int, int]:
    batch = paper.counterpart(_batches(report), row["batch_size"])
    return row["schedule"], batch, row["microbatches_per_update"]


def _is_plain(row: dict[str, Any]) -> bool:
    return str(row["arm"]).count("-") == 2


def _final(report: dict[str, Any]) -> list[str]:
    rows = []
    for row in report["arms"]:
        against = row["against_flush"]
        key = _paper_key(report, row) if _is_plain(row) else None
        perplexity = paper.PERPLEXITY.get(key) if key else None
        loss = paper.TRAINING_LOSS.get(key) if key else None
        rows.append(
            [
                row["arm"],
                str(len(row["seeds"])),
                f"{row['max_drift']} (≤ {row['max_drift_bound']})",
                f"{row['stage_mean_drift']:.2f}",
                _number(row["weight_change"], "{:.2%}"),
                _spread(row["validation_loss"], "{:.4f}"),
                _spread(row["validation_perplexity"], "{:.2f}"),
                _against(against),
                _spread(row["training_loss"], "{:.4f}"),
                "" if perplexity is None else f"{perplexity[0]:.3f} ± {perplexity[1]:.3f}",
                _number(loss, "{:.3f}"),
            ]
        )
    header = [
        *(
            "arm",
            "seeds",
            "max drift",
            "stage mean drift",
            "drift, of the weights",
            "validation loss",
            "validation perplexity",
        ),
        *("perplexity against flush", "training loss", "paper: perplexity", "paper: training loss"),
    ]
    note = (
        "Validation is on all held-out sequences after training. Against flush: at the same batch, rate and seed, mean "
        "and spread of the differences. The training loss is the mean of the last eighth of the updates or so (one "
        "evaluation period). "
        "Drift is met at the first stage at most; the stage mean is that of the steady state."
    )
    spreads = {
        row["batch_size"]: row["against_flush"]["flush_loss_std"]
        for row in report["arms"]
        if row["against_flush"] and row["against_flush"]["flush_loss_std"] is not None
    }
    seeds = "; ".join(f"batch {batch}: {value:.4f}" for batch, value in spreads.items())
    return ["## At the end of training", "", note, "", *_table(header, rows)] + (
        [f"Spread of flush's own validation loss over seeds: {seeds}.", ""] if seeds else []
    )


def _best(report: dict[str, Any]) -> list[str]:
    """Each schedule at its own best rate: the perplexity at every rate, and the best one's against flush's best."""
    if not report["best"]:
        return []
    factors = sorted({factor for row in report["best"] for factor in row["perplexity_by_lr_factor"]})
    by_rate = [
        [row["arms"], *(_number(row["perplexity_by_lr_factor"].get(factor), "{:.2f}") for factor in factors)]
        for row in report["best"]
    ]
    best = [
        [
            row["arms"],
            f"{row['best_lr']:.3g} (x{row['best_lr_factor']:g})" + ", the edge" * row["is_at_the_edge"],
            str(len(row["seeds"])),
            _spread(row["validation_perplexity"], "{:.2f}"),
            _against(row["against_best_flush"]),
            str(row["max_drift"]),
            _number(row["weight_change"], "{:.2%}"),
            _number(row.get("perplexity"), "{:g}"),
            _number(row.get("speedup"), "{:.2f}x"),
        ]
        for row in report["best"]
    ]
    header = [
        *("arms", "best peak rate", "seeds", "validation perplexity", "against flush at its best", "max drift"),
        *("drift, of the weights", "perplexity ≤", f"speed-up over flush, same a, each at its best ({report['times_are']})"),
    ]
    note = (
        "Perplexities by factor of the peak rate are over the seeds that all rates have. *The edge*: no higher or no lower "
        "rate was trained, so the true best may lie beyond. Drift of the weights: the mean over the run, of the stage with "
        "the most."
    )
    rates = ["arms", *(f"x{factor:g}" for factor in factors)]
    return ["## Each at its own best rate", "", note, "", *_table(rates, by_rate), *_table(header, best)]


def _against(difference: dict[str, Any] | None) -> str:
    return "" if difference is None else _spread(difference["perplexity_change"], "{:+.2%}").replace("± +", "± ")


def _weight_copies(report: dict[str, Any]) -> list[str]:
    rows = [
        [row["arm"], f"{row['copied_weight_bytes'] / 1e6:.2f} MB", _spread(row["validation_perplexity"], "{:.2f}")]
        for row in report["arms"]
        if row["copied_weight_bytes"]
    ]
    if not rows:
        return []
    note = (
        "Older weights that a stage keeps for its backwards, measured: the most on any stage. All other arms keep none. "
        "stash is PipeDream's, double-buffer PipeDream-2BW's."
    )
    return ["## Copies of weights", "", note, "", *_table(["arm", "copies on a stage", "validation perplexity"], rows)]


def _thresholds(report: dict[str, Any]) -> list[str]:
    if not report["thresholds"]:
        return []
    rows = []
    for row in report["thresholds"]:
        best = row["best_flush_microbatches_per_update"]
        rows.append(
            [
                str(row["batch_size"]),
                f"{row['perplexity']:g}",
                str(row["microbatches_per_update"]),
                _number(row["seconds"], "{:.1f}"),
                _number(row["flush_seconds"], "{:.1f}"),
                _number(row["speedup"], "{:.2f}x"),
                "" if best is None else f"{row['best_flush_seconds']:.1f} (a={best})",
                _number(row["speedup_over_best_flush"], "{:.2f}x"),
            ]
        )
    how = report["times_are"]
    header = [
        *("batch", "perplexity ≤", "a", f"PACI, s ({how})", f"flush, same a, s ({how})", "speed-up"),
        *(f"best flush, s ({how})", "speed-up over best flush"),
    ]
    same = ", ".join(f"{x}x (a={a}, batch {b})" for (b, a), x in paper.SAME_COUNT_SPEEDUP.items())
    best_flush = ", ".join(f"{x}x (batch {b})" for b, x in paper.BEST_FLUSH_SPEEDUP.items())
    by_threshold = ", ".join(f"≤ {p:g} {x}x (batch {b})" for (b, p), x in paper.THRESHOLD_SPEEDUP.items())
    beside = (
        f"The paper's, measured on 8 GPUs: same number of micro-batches {same}; against the best flush {best_flush}; by "
        f"perplexity, against the best flush {by_threshold}."
    )
    return ["## Time to a perplexity", "", *_table(header, rows), beside, ""]


def _variability(report: dict[str, Any]) -> list[str]:
    rows: list[list[str]] = []
    for row in report["arms"]:
        if row["training_loss_spread"] is not None:
            theirs = paper.TRAINING_LOSS_SPREAD.get(_paper_key(report, row)) if _is_plain(row) else None
            rows.append([row["arm"], f"{row['training_loss_spread']:.2e}", _number(theirs, "{:.2e}")])
    if not rows:
        return []
    note = (
        "Standard deviation over seeds of the training loss at each log line, its mean over the last two evaluation "
        "periods. Seeds here read the data in different orders, which is part of it."
    )
    return ["## From run to run", "", note, "", *_table(["arm", "spread of the training loss", "paper"], rows)]


def _throughput(report: dict[str, Any]) -> list[str]:
    if not report["throughput"]:
        return []
    rows = [
        [
            str(row["batch_size"]),
            str(row["microbatches_per_update"]),
            _number(row["flush_tokens_per_second"], "{:,.0f}"),
            _number(row["paci_tokens_per_second"], "{:,.0f}"),
            _number(row["speedup"], "{:.2f}x"),
            f"{row['limit']:.2f}x",
            str(row["flush_held_sequences"]),
            str(row["paci_held_sequences"]),
        ]
        for row in report["throughput"]
    ]
    how = report["times_are"]
    header = [
        *("batch", "a", f"flush, tokens/s ({how})", f"PACI, tokens/s ({how})", "ratio", "(a+N-1)/a"),
        *("flush: sequences held (computed)", "PACI: sequences held (computed)"),
    ]
    note = (
        "Sequences held: those whose activations the first stage keeps at its peak, min(a, N) micro-batches under flush "
        "and N under PACI. The paper finds equal peak memory, a throughput that does not depend on a, and that limit."
    )
    return ["## Throughput and activations by number of micro-batches", "", note, "", *_table(header, rows)]
