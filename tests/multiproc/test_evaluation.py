"""The evaluator against plain loops over the same model, on every split of pipeline, tensor and data parallelism."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lab.processes import ROOT
from tests.support.helpers import PACI, GetPool, arguments, slow
from tests.support.pool import Pool

CONTEXT = 16  # of the model
SPLITS = [(1, 1, 1), (2, 1, 1), (2, 2, 1), *slow((1, 2, 1), (1, 1, 2))]
# Numbers that Megatron's list of a checkpoint's arguments leaves out, and without which the model is another.
UNUSUAL = ["--norm-epsilon", "1e-2", "--apply-residual-connection-post-layernorm"]

OneProcess = Callable[..., Any]


@pytest.fixture(scope="module")
def one_process() -> Iterator[OneProcess]:
    """Run a job in a process of its own, which stays for the module, unless a job fails."""
    pools = [Pool(1)]

    def run(job: str, **arguments: Any) -> Any:
        if pools[-1].is_closed:
            pools.append(Pool(1))
        return pools[-1].run(job, **arguments)[0]

    yield run
    pools[-1].close()


@pytest.fixture(scope="module")
def checkpoint(one_process: OneProcess, corpus: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A PACI checkpoint of two stages with uneven layers, of a model with dropout, after 12 iterations."""
    folder = str(tmp_path_factory.mktemp("checkpoint"))
    argv = [*arguments(corpus, 1, 2, iters=12), *PACI, *UNUSUAL, "--paci-emulate-stages", "2"]
    argv += ["--save", folder, "--save-interval", "6"]
    one_process("train", argv=argv)
    return folder


@pytest.fixture(scope="module")
def ids() -> list[int]:
    """Tokens to score, a number of them that neither context nor stride divides."""
    return np.random.default_rng(5).integers(0, 63, size=211).tolist()


@pytest.fixture(scope="module")
def numbers(ids: list[int], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tokens as a text of numbers, which is how Megatron's NullTokenizer writes them."""
    path = tmp_path_factory.mktemp("numbers") / "numbers.txt"
    path.write_text(" ".join(map(str, ids)))
    return str(path)


def loading(checkpoint: str, num_stages: int = 1, tp: int = 1, *more: str) -> list[str]:
    """Megatron's arguments of an evaluation."""
    split = ["--pipeline-model-parallel-size", str(num_stages), "--tensor-model-parallel-size", str(tp)]
    return ["--load", checkpoint, *split, *more]


@pytest.mark.parametrize(("num_stages", "tp", "dp"), SPLITS)
def test_evaluator_is_a_plain_loop(
    pool: GetPool,
    one_process: OneProcess,
    checkpoint: str,
    ids: list[int],
    numbers: str,
    num_stages: int,
    tp: int,
    dp: int,
) -> None:
    protocols = [(CONTEXT, CONTEXT), (CONTEXT, 5), (9, 9), (9, 4)]
    by_loop = one_process("losses_by_loop", argv=loading(checkpoint), ids=ids, protocols=protocols)
    assert len(set(by_loop)) == len(protocols), "the protocols make no difference"
    for (context, stride), expected in zip(protocols, by_loop, strict=True):
        argv = loading(checkpoint, num_stages, tp, "--seq-length", str(context), "--micro-batch-size", "3")
        results = pool(num_stages * tp * dp).run("evaluate_checkpoint", argv=argv, inputs=(numbers,), stride=stride)
        assert [result["nll"] for result in results] == [results[0]["nll"]] * len(results), "ranks disagree"
        assert results[0]["nll"] == pytest.approx(expected, rel=1e-5)
        assert results[0]["token_ppl"] == pytest.approx(math.exp(expected / (len(ids) - 1)), rel=1e-5)
        facts = {"num_tokens": 210, "num_text_tokens": 211, "num_words": 211, "context": context, "stride": stride}
        assert {name: results[0][name] for name in facts} == facts
        assert (results[0]["data_parallel_size"], results[0]["iteration"]) == (dp, 12)


@pytest.mark.parametrize(("num_stages", "tp"), [(1, 1), (2, 1), (1, 2)])
def test_stride_one_is_token_by_token(
    pool: GetPool, one_process: OneProcess, checkpoint: str, ids: list[int], tmp_path: Path, num_stages: int, tp: int
) -> None:
    tiny = ids[:40]
    (tmp_path / "tiny.txt").write_text(" ".join(map(str, tiny)))
    expected = one_process("losses_token_by_token", argv=loading(checkpoint), ids=tiny, context=CONTEXT)
    argv = loading(checkpoint, num_stages, tp)
    result = pool(num_stages * tp).run("evaluate_checkpoint", argv=argv, inputs=(str(tmp_path / "tiny.txt"),), stride=1)[0]
    assert result["num_tokens"] == 39
    assert result["nll"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("num_stages", "tp"), [(1, 1), (2, 1), (1, 2)])
def test_stock_checkpoint_of_another_split(
    pool: GetPool,
    one_process: OneProcess,
    corpus: str,
    ids: list[int],
    numbers: str,
    tmp_path: Path,
    num_stages: int,
    tp: int,
) -> None:
    saved_with = ["--tensor-model-parallel-size", "2", "--save", str(tmp_path), "--save-interval", "4"]
    pool(2).run("train", argv=[*arguments(corpus, 1, 2, iters=4), *saved_with])
    (expected,) = one_process("losses_by_loop", argv=loading(str(tmp_path)), ids=ids, protocols=[(CONTEXT, 7)])
    argv = loading(str(tmp_path), num_stages, tp)
    result = pool(num_stages * tp).run("evaluate_checkpoint", argv=argv, inputs=(numbers,), stride=7)[0]
    assert result["nll"] == pytest.approx(expected, rel=1e-5)


MODELS = {
    "llama": [
        *("--position-embedding-type", "rope", "--rotary-percent", "0.5", "--rotary-base", "5000", "--use-rope-scaling"),
        *("--swiglu", "--normalization", "RMSNorm", "--norm-epsilon", "1e-3", "--disable-bias-linear", "--qk-layernorm"),
        *("--group-query-attention", "--num-query-groups", "1"),
    ],
    "experts": [
        *("--num-experts", "4", "--moe-router-topk", "2", "--moe-ffn-hidden-size", "48", "--moe-router-pre-softmax"),
        "--disable-bias-linear",
    ],
    "tied": [],
}


@pytest.mark.parametrize("model", MODELS)
def test_models_of_all_kinds(
    pool: GetPool, one_process: OneProcess, corpus: str, ids: list[int], numbers: str, tmp_path: Path, model: str
) -> None:
    argv = [*arguments(corpus, 1, 2, *MODELS[model], iters=4), "--save", str(tmp_path), "--save-interval", "4"]
    if model == "tied":
        argv.remove("--untie-embeddings-and-output-weights")
    one_process("train", argv=argv)
    assert one_process("differences_from_training", argv=loading(str(tmp_path))) == {}
    (expected,) = one_process("losses_by_loop", argv=loading(str(tmp_path)), ids=ids, protocols=[(CONTEXT, 7)])
    result = pool(2).run("evaluate_checkpoint", argv=loading(str(tmp_path), 2), inputs=(numbers,), stride=7)[0]
    assert result["nll"] == pytest.approx(expected, rel=1e-5)


def passages_with_known_ends(one_process: OneProcess, checkpoint: str) -> tuple[list[list[int]], list[list[float]]]:
    """Passages of different lengths, of which every third ends as the model expects; and what it expects there."""
    generator = np.random.default_rng(8)
    passages = [generator.integers(0, 63, size=size).tolist() for size in (*range(1, CONTEXT + 1), 3, 9, 30, 21)]
    ends = one_process("next_tokens", argv=loading(checkpoint), passages=[passage[-CONTEXT:] for passage in passages])
    for number, (passage, logs) in enumerate(zip(passages, ends, strict=True)):
        ranked = np.argsort(logs)
        passage.append(int(ranked[-1] if number % 3 == 0 else ranked[5 + number]))
    return passages, ends


@pytest.mark.parametrize(("num_stages", "tp", "dp"), SPLITS)
def test_last_words_are_a_hand_loop(
    pool: GetPool, one_process: OneProcess, checkpoint: str, tmp_path: Path, num_stages: int, tp: int, dp: int
) -> None:
    passages, ends = passages_with_known_ends(one_process, checkpoint)
    path = tmp_path / "lambada.jsonl"
    path.write_text("".join(json.dumps({"text": " ".join(map(str, passage))}) + "\n" for passage in passages))
    nll = -sum(logs[passage[-1]] for passage, logs in zip(passages, ends, strict=True))
    argv = loading(checkpoint, num_stages, tp, "--micro-batch-size", "2")
    result = pool(num_stages * tp * dp).run("evaluate_checkpoint", argv=argv, inputs=(str(path),), task="lambada")[-1]
    assert result["accuracy"] == 7 / 20
    assert result["nll"] == pytest.approx(nll, rel=1e-5)
    assert result["last_word_ppl"] == result["word_ppl"] == pytest.approx(math.exp(nll / 20), rel=1e-5)
    assert (result["num_tokens"], result["num_words"], result["num_documents"]) == (20, 20, 20)


def test_indexed_data_and_json_lines_give_the_same(
    one_process: OneProcess, checkpoint: str, ids: list[int], tmp_path: Path
) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    eod = 63  # NullTokenizer's, the last of its vocabulary of 64
    documents = [ids[:50], ids[50:51], ids[51:]]
    builder = IndexedDatasetBuilder(str(tmp_path / "d.bin"), dtype=np.uint16)
    for document in documents:
        builder.add_document(torch.tensor([*document, eod]), [len(document) + 1])
    builder.finalize(str(tmp_path / "d.idx"))
    lines = [json.dumps({"text": " ".join(map(str, document))}) + "\n" for document in documents]
    (tmp_path / "d.jsonl").write_text("".join(lines))
    argv = loading(checkpoint)
    indexed, text = (
        one_process("evaluate_checkpoint", argv=argv, inputs=(str(tmp_path / name),), stride=6)
        for name in ("d.idx", "d.jsonl")
    )
    joined = [token for document in documents for token in (*document, eod)]
    (expected,) = one_process("losses_by_loop", argv=argv, ids=joined, protocols=[(CONTEXT, 6)])
    assert indexed["nll"] == text["nll"] == pytest.approx(expected, rel=1e-5)
    assert (indexed["num_words"], text["num_words"]) == (None, len(ids))
    apart = one_process("evaluate_checkpoint", argv=argv, inputs=(str(tmp_path / "d.jsonl"),), stride=6, per_document=True)
    by_document = [
        one_process("losses_by_loop", argv=argv, ids=[*document, eod], protocols=[(CONTEXT, 6)])[0] for document in documents
    ]
    assert apart["nll"] == pytest.approx(sum(by_document), rel=1e-5)
    assert apart["num_tokens"] == indexed["num_tokens"] - 2


def test_bf16_is_near_fp32_and_iterations_differ(one_process: OneProcess, checkpoint: str, numbers: str) -> None:
    exact, rounded, earlier = (
        one_process("evaluate_checkpoint", argv=loading(checkpoint, 1, 1, *more), inputs=(numbers,))
        for more in ([], ["--bf16"], ["--ckpt-step", "6"])
    )
    assert (exact["dtype"], rounded["dtype"]) == ("fp32", "bf16")
    assert rounded["nll"] != exact["nll"] == pytest.approx(rounded["nll"], rel=5e-3)
    assert earlier["iteration"] == 6 and earlier["nll"] != exact["nll"]


def test_arguments_that_megatron_leaves_out_are_adopted(one_process: OneProcess, checkpoint: str) -> None:
    names = ["layernorm_epsilon", "apply_residual_connection_post_layernorm", "vocab_size", "tokenizer_type", "bf16"]
    adopted = one_process("adopted_arguments", argv=loading(checkpoint), names=names)
    assert list(adopted.values()) == [1e-2, True, 64, "NullTokenizer", False]
    adopted = one_process("adopted_arguments", argv=loading(checkpoint, 1, 1, "--tokenizer-model", "new.model"), names=names)
    assert (adopted["tokenizer_type"], adopted["vocab_size"]) == ("NullTokenizer", 64)
    own = ["--tokenizer-type", "GPT2BPETokenizer", "--vocab-file", "v.json"]
    adopted = one_process("adopted_arguments", argv=loading(checkpoint, 1, 1, *own), names=["tokenizer_type", "vocab_size"])
    assert list(adopted.values()) == ["GPT2BPETokenizer", None]


@pytest.mark.parametrize(
    ("more", "options", "message"),
    [
        (["--seq-length", "17"], {}, "--seq-length 17: must be from 1 to the model's 16 positions"),
        ([], {"stride": 17}, "--stride 17: must be at most the context length, which is 16"),
        ([], {"stride": 0}, "--stride 0: must be at least 1"),
        ([], {"task": "lambada", "stride": 2}, "--stride 2: --task lambada scores the last word only"),
        ([], {"task": "qa"}, "--task qa: must be one of perplexity, lambada"),
        (["--pipeline-model-parallel-size", "2"], {}, "needs a multiple of 2 processes, and there are 1"),
        (["--micro-batch-size", "0"], {}, "--micro-batch-size 0: must be at least 1"),
        (["--pipeline-schedule", "paci"], {}, "--pipeline-schedule paci is not for evaluation"),
        (["--ckpt-step", "7"], {}, "--ckpt-step 7: not in .*, which has iterations 6, 12"),
        (["--tokenizer-model", "no/such/folder", "--tokenizer-type", "HuggingFaceTokenizer"], {}, "no such folder"),
        (
            ["--vocab-size", "1000", "--tokenizer-type", "NullTokenizer"],
            {"score_first_token": True},
            "token id 999 is outside",
        ),
        ([], {"inputs": ("missing.txt",)}, "missing.txt: no such file"),
        (["--hidden-sizes", "3"], {}, r"unrecognized arguments: --hidden-sizes 3 \(see --help\)"),
        (
            ["--tokenizer-type", "SentencePieceTokenizer"],
            {},
            "--tokenizer-model is missing: SentencePieceTokenizer needs it",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_a_model_is_built(
    one_process: OneProcess, checkpoint: str, numbers: str, more: list[str], options: dict[str, Any], message: str
) -> None:
    argv = ["--load", checkpoint, *more]
    refusal = one_process("refused_evaluation", argv=argv, **{"inputs": (numbers,), **options})
    assert re.search(message, refusal), refusal


def test_command_writes_the_figures_and_prints_a_table(checkpoint: str, numbers: str, tmp_path: Path) -> None:
    output = tmp_path / "figures.json"
    command = [sys.executable, "tools/evaluate_perplexity.py", "--input", numbers, "--output", str(output), "--stride", "8"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
    done = subprocess.run([*command, *loading(checkpoint)], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(output.read_text())
    contract = ["num_tokens", "num_words", "num_bytes", "token_ppl", "word_ppl", "bits_per_byte", "nll"]
    assert list(result)[: len(contract)] == contract
    assert result["token_ppl"] == pytest.approx(math.exp(result["nll"] / result["num_tokens"]))
    assert result["bits_per_byte"] == pytest.approx(result["nll"] / math.log(2) / Path(numbers).stat().st_size)
    assert done.stdout.splitlines()[0].split() == ["token", "perplexity", f"{result['token_ppl']:,.4f}"]
    assert len(done.stdout.splitlines()) < 20, "Megatron's own output is dropped"
    refused = subprocess.run([*command, *loading(checkpoint, 2)], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert refused.returncode == 2 and refused.stdout == ""
    assert refused.stderr.splitlines()[-1].startswith("evaluate_perplexity.py: error: --tensor-model-parallel-size 1 ")


def test_command_prints_the_figures_though_the_disk_is_full(checkpoint: str, numbers: str) -> None:
    command = [sys.executable, "tools/evaluate_perplexity.py", "--input", numbers, "--output", "/dev/full"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
    done = subprocess.run([*command, *loading(checkpoint)], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout.startswith("token perplexity")
    assert done.stderr.splitlines()[-1].startswith(
        "evaluate_perplexity.py: error: --output /dev/full: cannot be written (No"
    )


@pytest.mark.parametrize(
    ("num_stages", "tp", "message"),
    [
        (3, 1, "--pipeline-model-parallel-size 3: does not divide the model's 4 layers"),
        (1, 3, "--tensor-model-parallel-size 3: does not divide the model's 2 attention heads"),
    ],
)
def test_splits_that_do_not_fit_the_model_are_refused(
    pool: GetPool, checkpoint: str, numbers: str, num_stages: int, tp: int, message: str
) -> None:
    argv = loading(checkpoint, num_stages, tp)
    refusals = pool(num_stages * tp).run("refused_evaluation", argv=argv, inputs=(numbers,))
    assert all(refusal.startswith(message) for refusal in refusals), refusals
