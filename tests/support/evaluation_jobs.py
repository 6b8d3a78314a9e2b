"""Jobs of the pool's workers that evaluate a checkpoint, and plain loops over the same model to compare with."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

import paci_megatron


def evaluate_checkpoint(argv: list[str], **options: Any) -> dict[str, Any]:
    """The evaluation's figures. ``options`` are those of EvaluationOptions and TextOptions."""
    with _plugin():
        from paci_megatron.evaluate.corpus import TextOptions
        from paci_megatron.evaluate.evaluator import EvaluationOptions
        from paci_megatron.evaluate.evaluator import evaluate as run

        of_text = {name: options.pop(name) for name in list(options) if name in TextOptions.__slots__}
        result = run(EvaluationOptions(TextOptions(**of_text), **options), argv)
    dist.barrier()
    return result


def refused_evaluation(argv: list[str], **options: Any) -> str:
    """The message with which the evaluation is refused, and nothing else built."""
    from megatron.core import parallel_state

    try:
        evaluate_checkpoint(argv, **options)
    except ValueError as error:
        assert not parallel_state.model_parallel_is_initialized(), "refused too late"
        return str(error)
    raise AssertionError("not refused")


def adopted_arguments(argv: list[str], names: Sequence[str]) -> dict[str, Any]:
    """These arguments' values after the checkpoint's have been adopted."""
    with _plugin():
        args = _completed(argv)
        return {name: getattr(args, name) for name in names}


def differences_from_training(argv: list[str]) -> dict[str, tuple[Any, Any]]:
    """The arguments that decide what the model computes and that are not as in training: (training's, the evaluation's)."""
    with _plugin():
        from megatron.training.checkpointing import load_args_from_checkpoint

        from paci_megatron.evaluate.checkpoint_args import model_arguments

        args = _completed(argv)
        saved = load_args_from_checkpoint(argparse.Namespace(**vars(args)))[1]
        pairs = {name: (getattr(saved, name), getattr(args, name)) for name in model_arguments(args)}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _completed(argv: list[str]) -> Any:
    from paci_megatron.evaluate.arguments import evaluation_arguments

    return evaluation_arguments(argv, [], needs_tokenizer=False)[0]


def losses_by_loop(argv: list[str], ids: list[int], protocols: Sequence[tuple[int, int]]) -> list[float]:
    """For each (context, stride) the summed loss of ``ids``, window by window through the whole model's logits."""
    with _whole_model(argv) as logits_of:
        return [_sliding_loss(logits_of, ids, *protocol) for protocol in protocols]


def _sliding_loss(logits_of: Any, ids: list[int], context: int, stride: int) -> float:
    """As perplexity of fixed-length models is usually computed: slide, and count what was not counted before."""
    total, counted = 0.0, 1  # nothing predicts the first token
    for begin in range(0, len(ids), stride):
        end = min(begin + context + 1, len(ids))
        logits = logits_of(ids[begin : end - 1]).double()
        for target in range(counted, end):
            total -= float(logits[target - begin - 1].log_softmax(-1)[ids[target]])
        counted = end
        if end == len(ids):
            break
    return total


def losses_token_by_token(argv: list[str], ids: list[int], context: int) -> float:
    """The summed loss of ``ids``, each predicted by a pass of its own over the ``context`` tokens before it."""
    with _whole_model(argv) as logits_of:
        total = 0.0
        for target in range(1, len(ids)):
            before = ids[max(0, target - context) : target]
            total -= float(logits_of(before)[-1].double().log_softmax(-1)[ids[target]])
        return total


def next_tokens(argv: list[str], passages: list[list[int]]) -> list[list[float]]:
    """For each passage the log probabilities (vocabulary) of the token that follows."""
    with _whole_model(argv) as logits_of:
        return [logits_of(passage)[-1].double().log_softmax(-1).tolist() for passage in passages]


@contextlib.contextmanager
def _plugin() -> Iterator[None]:
    from .jobs import _forget_run

    paci_megatron.install()
    try:
        yield
    finally:
        _forget_run()
        paci_megatron.uninstall()


@contextlib.contextmanager
def _whole_model(argv: list[str]) -> Iterator[Any]:
    """A function from token ids to logits (length, vocabulary): the checkpoint's model in this one process."""
    with _plugin(), torch.no_grad():
        from paci_megatron.evaluate import evaluator as evaluation

        args = _completed(argv)
        evaluation._initialize(args)
        model = evaluation._load_model(args)[0].eval()

        def logits_of(ids: list[int]) -> torch.Tensor:
            tokens = torch.tensor([ids])
            return model(tokens, torch.arange(len(ids))[None], None)[0]

        yield logits_of
