"""The command-line group ``--pipeline-schedule`` / ``--paci-*``. The only argparse code of the package."""

from __future__ import annotations

import argparse

from .config import CLIP_MODES, LINKS, SCHEDULES, TRANSFER_DTYPES, WEIGHT_POLICIES


def add_paci_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the group to Megatron's parser; returns the parser."""
    group = parser.add_argument_group(title="paci")
    _add_schedule_arguments(group)
    _add_paci_arguments(group)
    _add_running_arguments(group)
    _add_safety_arguments(group)
    return parser


def _add_schedule_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--pipeline-schedule",
        choices=SCHEDULES,
        default="1f1b",
        help="1f1b is Megatron's own schedule, which flushes the pipeline before every update. paci never flushes: each "
        "stage updates its weights after every a backwards, where a is the number of micro-batches per update. paci-v is "
        "paci on twice as many stages of half the size, of which each process has two, folded into a V: less memory for "
        "activations, twice the transfers, up to twice the drift.",
    )
    group.add_argument(
        "--paci-v-order",
        default="1:2:0",
        metavar="FORWARD:BACKWARD:WAIT",
        help="What the fixed order of paci-v is made for: forwards and backwards whose times have this ratio, and a tensor "
        "that needs so much time from one process to the next. 1:2:0 holds least; 1:2:1 leaves transfers and uneven times a "
        "sixth of a micro-batch's time, and holds what 1F1B-flush does. paci-megatron plan compares them.",
    )


def _add_paci_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--paci-clip-mode",
        choices=CLIP_MODES,
        default="global",
        help="How --clip-grad applies under paci. global: by the norm over all stages, of a fixed number of updates ago, "
        "and what a stage knows of the current one. stage: each stage by the norm of its own gradients. none: not at all, "
        "like --clip-grad 0.",
    )
    group.add_argument(
        "--paci-drain-interval",
        type=int,
        default=None,
        metavar="UPDATES",
        help="Run the pipeline empty after every so many updates, besides evaluations, checkpoints and the end. 1 "
        "makes paci the same computation as 1f1b. Default: never.",
    )
    group.add_argument(
        "--paci-extra-in-flight",
        default="0",
        metavar="K",
        help="Let the first stage have K more micro-batches in flight, and later stages evenly fewer, so that transfers and "
        "uneven times make their neighbours wait less; N-1 hides most of both. Or a number for each link between stages, "
        "where links differ, like 0,4,0. Costs their activations, and drift: at most ceil((N-1+K)/a) updates. Or auto: the "
        "run measures its stages and links, drains once, and chooses. Or the metrics file of a run with auto, to do the "
        "same again. Default: 0, the memory of 1F1B-flush.",
    )
    group.add_argument(
        "--paci-memory-budget",
        default=None,
        metavar="M",
        help="The most micro-batches that --paci-extra-in-flight auto lets the first stage have in flight: drift is then at "
        "most ceil((M-1)/a) updates. Or what their activations may take there, in bytes, like 12GB or 12GiB: as many as fit "
        "by what one has been measured to take, and at most 2N. Default: 2N, twice what it has without.",
    )
    group.add_argument(
        "--paci-weight-policy",
        choices=WEIGHT_POLICIES,
        default="latest",
        help="Which weights a backward meets, for comparison of methods. latest: the newest, which is PACI. stash: its "
        "forward's, from copies (PipeDream). double-buffer: all of a window meets the same version, the last but one, from "
        "one copy (PipeDream-2BW).",
    )
    group.add_argument(
        "--paci-look-ahead",
        action="store_true",
        help="Forward with about the weights that the backward will meet: the optimizer's main parameters, moved on by the "
        "stage's drift times their last update. For Adam or Muon in 16 bits, where it needs no copy of the weights.",
    )
    group.add_argument(
        "--paci-strict",
        action="store_true",
        help="Refuse the command line where something in it would be switched off under paci.",
    )


def _add_running_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--paci-emulate-stages",
        type=int,
        default=None,
        metavar="N",
        help="Run all N stages of the pipeline in one process, on one CPU or GPU, with the numerics of N processes. The "
        "pipeline size must be 1. Works with either schedule.",
    )
    group.add_argument(
        "--paci-link",
        choices=LINKS,
        default="p2p",
        help="How tensors travel between stages. p2p: by the distributed backend, from GPU to GPU over NCCL. host: through "
        "the host's memory over gloo, so that several stages can be processes on one GPU; for tests, since the host waits "
        "for each copy. Works with either schedule.",
    )
    group.add_argument(
        "--paci-transfer-ctas",
        type=int,
        default=None,
        metavar="BLOCKS",
        help="At most so many thread blocks of the GPU for each pending NCCL transfer between stages. More are faster and "
        "leave less of the GPU. Default: max_ctas of pp in --nccl-communicator-config-path, or 4.",
    )
    group.add_argument(
        "--paci-transfer-dtype",
        choices=TRANSFER_DTYPES,
        default="model",
        help="What activations and gradients travel in between stages. bf16: rounded to it, in half the bytes of an fp32 "
        "model's, for slow links. model: as they are computed.",
    )
    group.add_argument(
        "--paci-metrics-file",
        default=None,
        metavar="PATH",
        help="Append one JSON object a line to this file, for each log interval, evaluation and drain: losses, "
        "perplexities, tokens, seconds, drift, bubble. Works with either schedule.",
    )
    group.add_argument(
        "--paci-trace-dir",
        default=None,
        metavar="DIR",
        help="Write down for each stage, in a file of its own in this folder, when it did each action of its plan: "
        "computing, waiting and transfers apart, and the computing of each layer. paci-megatron plan --trace draws it. "
        "Works with either schedule.",
    )


def _add_safety_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--paci-start-iteration",
        type=int,
        default=0,
        metavar="ITERATION",
        help="Flush as 1f1b does up to this iteration, and not from there on.",
    )
    group.add_argument(
        "--paci-fallback",
        type=int,
        default=0,
        metavar="ITERATIONS",
        help="After a jump of the loss, or gradients that are not finite, flush as 1f1b does for so many iterations. "
        "Default: never.",
    )
    group.add_argument(
        "--paci-transfer-timeout",
        type=float,
        default=None,
        metavar="SECONDS",
        help="End the job if a stage is at one action of its plan for so long, after every rank has said where it is and "
        "which stage it waits for. SIGUSR1 asks a rank to say so at any time. Default: three quarters of "
        "--distributed-timeout-minutes, after which the backend itself ends the job.",
    )
