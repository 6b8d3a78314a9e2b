"""Weights that Megatron clips by attention's largest logits after each update are clipped under PACI."""

from __future__ import annotations

from tests.support.helpers import PACI, GetPool, OneProcess, arguments, assert_same_bits, assert_same_run, emulated
from tests.support.qk_clip import attention_logits


def test_clipped_weights_are_megatrons_when_drained_and_the_emulations_when_not(
    pool: GetPool, corpus: str, one_process: OneProcess
) -> None:
    argv = arguments(corpus, 2, 3, "--bf16", "--qk-clip", "--qk-clip-threshold", "0.02", "--log-max-attention-logit")
    workers = pool(2)
    flush = workers.run("train", argv=argv, within=attention_logits)
    drained = workers.run("train", argv=[*argv, *PACI, "--paci-drain-interval", "1"], within=attention_logits)
    assert_same_bits(flush, drained)
    free = arguments(corpus, 2, 3, "--bf16", "--log-max-attention-logit")
    assert workers.run("train", argv=free, within=attention_logits)[-1].losses != flush[-1].losses, "nothing was clipped"
    processes = workers.run("train", argv=[*argv, *PACI], within=attention_logits)
    assert_same_run(processes, one_process(emulated([*argv, *PACI]), within=attention_logits))
    assert processes[-1].losses != flush[-1].losses, "no drift: paci did not run ahead"
