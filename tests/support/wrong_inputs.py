"""Wrong inputs for every door: what is typed, and words that the answer must have.

In a command ``{empty}`` is a folder with nothing in it that is all a command may write to, ``{at}`` one with what
:func:`prepare` makes.
"""

from __future__ import annotations

import json
from pathlib import Path

MODEL = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --seq-length 16 --max-position-embeddings 16 --tokenizer-type "
    "NullTokenizer --vocab-size 64 --micro-batch-size 2 --global-batch-size 4 --lr 5e-3 --train-iters 4 --num-workers 0 "
    "--eval-interval 100 --eval-iters 1 --untie-embeddings-and-output-weights"
)
PACI = f"{MODEL} --mock-data --pipeline-schedule paci --paci-emulate-stages 2"
DATA = f"{MODEL} --pipeline-schedule paci --paci-emulate-stages 2"

# Refused by the words alone, before Megatron or torch is imported: (arguments, what the answer says).
EARLY = [
    ("--pipeline-schedule pacy", "invalid choice: 'pacy'"),
    ("--pipeline-schedule", "expected one argument"),
    (f"{PACI} --paci-clip-mod stage", "Did you mean --paci-clip-mode?"),
    (f"{PACI} --paci-clip-mode both", "invalid choice: 'both'"),
    (f"{PACI} --paci-drain-interval 0", "--paci-drain-interval 0: must be at least 1 update"),
    (f"{PACI} --paci-drain-interval often", "invalid int value: 'often'"),
    (f"{PACI} --paci-extra-in-flight -1", "--paci-extra-in-flight -1: must be"),
    (f"{PACI} --paci-extra-in-flight many", "--paci-extra-in-flight many"),
    (f"{PACI} --paci-extra-in-flight 1000000", "1000002 micro-batches in flight at the first stage, and the whole"),
    (f"{PACI} --paci-start-iteration -5", "--paci-start-iteration -5: must be 0 (off) or"),
    (f"{PACI} --paci-start-iteration 400", "--paci-start-iteration 400 with --train-iters 4: the training ends before"),
    (f"{PACI} --paci-fallback -1", "--paci-fallback -1: must be"),
    (f"{PACI} --paci-transfer-timeout nan", "--paci-transfer-timeout nan: must be"),
    (f"{PACI} --paci-transfer-timeout 0", "--paci-transfer-timeout 0.0: must be"),
    (f"{PACI} --paci-transfer-ctas 1000", "--paci-transfer-ctas 1000: must be 1 to 64"),
    (f"{PACI} --paci-weight-policy newest", "invalid choice: 'newest'"),
    (f"{PACI} --paci-link carrier-pigeon", "invalid choice: 'carrier-pigeon'"),
    (f"{PACI} --paci-link host", "--paci-link host with --paci-emulate-stages 2"),
    (f"{MODEL} --mock-data --paci-extra-in-flight 1", "with --pipeline-schedule 1f1b: a flush leaves nothing"),
    (f"{MODEL} --mock-data --paci-weight-policy stash", "with --pipeline-schedule 1f1b: a flushed pipeline"),
    (f"{MODEL} --mock-data --pipeline-schedule paci", "a pipeline of one stage has no bubble"),
    (f"{MODEL} --mock-data --pipeline-schedule paci --pipeline-model-parallel-size 2", "must be a multiple of 2"),
    (f"{PACI} --tensor-model-parallel-size 2", "1 process for a model on 2 (tensor 2)"),
    (f"{PACI} --paci-emulate-stages 1", "--paci-emulate-stages 1: a pipeline has at least 2 stages"),
    (f"{PACI} --paci-emulate-stages 9", "--paci-emulate-stages 9 with --num-layers 2: each stage needs a layer"),
    (f"{PACI} --pipeline-model-parallel-size 2", "so the pipeline size must be 1"),
    (f"{PACI} --save {{empty}} --ckpt-format torch", "Use --ckpt-format torch_dist"),
    (f"{PACI} --lr nan", "--lr nan: must be a number of at least 0"),
    (f"{PACI} --lr fast", "invalid float value: 'fast'"),
    (f"{PACI} --min-lr -1", "--min-lr -1.0: must be"),
    (f"{PACI} --clip-grad -1", "--clip-grad -1.0: must be a norm of gradients"),
    (f"{PACI} --clip-grad inf", "--clip-grad inf: must be"),
    (f"{PACI} --weight-decay nan", "--weight-decay nan: must be"),
    (f"{PACI} --adam-beta1 1", "--adam-beta1 1.0: must be from 0 to below 1"),
    (f"{PACI} --hidden-dropout 2", "--hidden-dropout 2.0: must be from 0 to 1"),
    (f"{PACI} --micro-batch-size 0", "--micro-batch-size 0: must be at least 1"),
    (f"{PACI} --global-batch-size -4", "--global-batch-size -4: must be at least 1"),
    (f"{PACI} --num-layers 0", "--num-layers 0: must be at least 1"),
    (f"{PACI} --seq-length 0", "--seq-length 0: must be at least 1"),
    (f"{PACI} --log-interval 0", "--log-interval 0: must be at least 1"),
    (f"{PACI} --train-iters -1", "--train-iters -1: must be"),
    (f"{PACI} --eval-iters -1", "--eval-iters -1: must be"),
    (f"{PACI} --train-iters 1e6", "invalid int value: '1e6'"),
    (f"{PACI} --use-megatron-fsdp", "--use-megatron-fsdp does not work with --pipeline-schedule paci"),
    (f"{PACI} --use-torch-fsdp2 --lr nan", "2 reasons:"),
    (f"{PACI} --paci-metrics-file {{at}}", "is a folder. Give the path of a file"),
    (f"{PACI} --paci-metrics-file {{at}}/notes.txt", "is not the run's own file, and left as it is"),
    (f"{PACI} --paci-metrics-file {{at}}/notes.txt/m.jsonl", "notes.txt is not a folder"),
    (f"{PACI} --paci-trace-dir {{at}}/notes.txt", "notes.txt is not a folder"),
    (f"{PACI} --save {{at}}/notes.txt", "notes.txt is not a folder"),
    (f"{PACI} --save /proc/nowhere", "no file can be made in /proc"),
    (f"{PACI} --tensorboard-dir {{at}}/notes.txt", "notes.txt is not a folder"),
    (f"{PACI} --load {{at}}/broken", "does not name an iteration: it says 'soon'"),
]

# Refused after Megatron is imported, by Megatron's own checks, the plugin's, or the data's.
LATE = [
    (f"{PACI} --num-layer 4", "unrecognized arguments: --num-layer 4. Did you mean --num-layers?"),
    (f"{PACI} stray words", "unrecognized arguments: stray words"),
    (f"{PACI} --attention-backend fastest", "--attention-backend: invalid value: 'fastest'"),
    (f"{PACI} --num-attention-heads 3", "refused by Megatron: "),
    (f"{PACI} --global-batch-size 5", "refused by Megatron: eval_global_batch_size (5) must be divisible by"),
    (f"{PACI} --max-position-embeddings 4", "refused by Megatron: "),
    (f"{PACI} --pipeline-model-parallel-layout Et|t|t|tL", "Number of decoder layers 4"),
    (f"{PACI} --paci-transfer-timeout 1000", "--paci-transfer-timeout 1000 with --distributed-timeout-minutes 10"),
    (f"{PACI} --paci-strict --log-energy", "--paci-strict: --log-energy is off under paci"),
    (f"{PACI} --optimizer muon --use-distributed-optimizer", "--optimizer muon with --use-distributed-optimizer"),
    (f"{PACI} --context-parallel-size 2 --paci-weight-policy double-buffer", "process"),
    (f"{PACI} --paci-look-ahead", "--paci-look-ahead in fp32: the model's weights are the optimizer's own"),
    (f"{PACI} --paci-look-ahead --bf16 --optimizer sgd", "--paci-look-ahead with --optimizer sgd: how far it moves"),
    (f"{PACI} --lr-warmup-iters 10", "--lr-warmup-iters 10 with --train-iters 4: must be fewer"),
    (f"{PACI} --min-lr 1", "--min-lr 1 with --lr 0.005: must not be more"),
    (PACI.replace("--lr 5e-3", ""), "--lr is missing"),
    (PACI.replace("--eval-interval 100", ""), "--eval-interval is missing. Megatron needs it, with --eval-iters 0 too"),
    (f"{PACI} --eval-interval 0", "--eval-interval 0: must be at least 1"),
    (PACI.replace("--micro-batch-size 2", ""), "--micro-batch-size is missing"),
    (PACI.replace("--mock-data", ""), "no training data: give --data-path PREFIX"),
    (f"{PACI} --tokenizer-type SentencePieceTokenizer --tokenizer-model {{at}}/none.model", "no such file"),
    (f"{DATA} --data-path {{at}}/none", "none.idx"),
    (f"{DATA} --data-path {{at}}/short", "short.bin"),
    (f"{DATA} --data-path {{at}}/text", "text.idx"),
    (f"{DATA} --data-path {{at}}/good --split 1,2,3,4", "--split 1,2,3,4: not up to three numbers"),
    (f"{DATA} --data-path {{at}}/good --split 0,0,0", "--split 0,0,0: nothing is left"),
    (f"{DATA} --data-path 0.5 {{at}}/good 0.5", "weights and prefixes do not take turns"),
    (f"{DATA} --data-path -1 {{at}}/good", ""),
    (f"{DATA} --data-path {{at}}/good --mock-data --train-data-path x", ""),
    (f"{PACI} --ckpt-step 7 --load {{at}}", "7"),
]

_PLAN = "plan --microbatches-per-update 4 --num-stages 4"
COMMANDS = [
    ("trian", "trian: no such command; choose from"),
    ("check -- ./train.sh", "./train.sh ...: not a torchrun command"),
    ("check --assume tpu -- torchrun x.py", "--assume tpu: choose from"),
    ("check -- torchrun --nproc-per-node 2 x.py --paci-extra-in-flight -1", "--paci-extra-in-flight -1: must be"),
    (_PLAN, "--stage-ms, --metrics and --trace: give exactly one"),
    (f"{_PLAN} --stage-ms 100", "100"),
    (f"{_PLAN} --stage-ms fast:slow", "fast:slow"),
    (f"{_PLAN} --stage-ms=-1:2", "-1:2"),
    (f"{_PLAN} --stage-ms nan:1", "nan:1"),
    (f"{_PLAN} --stage-ms 1:2 1:2", "--num-stages 4: --stage-ms has 2 stages"),
    (f"{_PLAN} --stage-ms 1:2 --updates 0", "--updates 0: give at least 1"),
    (f"{_PLAN} --stage-ms 1:2 --latency-ms nan", "--latency-ms nan"),
    (f"{_PLAN} --stage-ms 1:2 --bandwidth-gb-per-s 0", "--bandwidth-gb-per-s 0"),
    (f"{_PLAN} --stage-ms 1:2 --jitter 1", "--jitter 1: give a share"),
    (f"{_PLAN} --stage-ms 1:2 --schedules fastest", "fastest"),
    (f"{_PLAN} --stage-ms 1:2 --timeline {{empty}}/x.gif", "x.gif"),
    (f"{_PLAN} --stage-ms 1:2 --timeline /proc/no/x.html", "/proc"),
    (f"{_PLAN} --stage-ms 1:2 --activation-bytes -1", "--activation-bytes -1"),
    (f"{_PLAN} --metrics {{at}}/none.jsonl", "none.jsonl"),
    (f"{_PLAN} --metrics {{at}}/notes.txt", "notes.txt"),
    (f"{_PLAN} --trace {{at}}", ""),
    (f"{_PLAN} --stage-ms 1:2 --balance", "--balance needs --trace DIR"),
    ("plan --microbatches-per-update 0 --num-stages 4 --stage-ms 1:2", "--microbatches-per-update 0: give at least 1"),
    ("plan --num-stages 4 --stage-ms 1:2", "--microbatches-per-update is missing"),
    ("plan --num-stages 0 --microbatches-per-update 4 --stage-ms 1:2", "--num-stages 0: give at least 1"),
    ("plot {at}/none.jsonl --output {empty}/x.png", "none.jsonl"),
    ("plot {at}/notes.txt --output {empty}/x.png", "notes.txt"),
    ("plot {at}/run.jsonl --output {empty}/x.doc", "x.doc: not a kind of picture"),
    ("plot {at}/run.jsonl --output {empty}/no/x.png", "no folder"),
    ("plot {at}/run.jsonl --output {empty}/x.png --smooth 0", "--smooth 0"),
    ("plot {at}/run.jsonl --output {empty}/x.png --inset 2", "--inset 2"),
    ("plot {at}/run.jsonl --output {empty}/x.png --y-range 3 1", "--y-range 3 1"),
    ("plot {at}/run.jsonl --output {empty}/x.png --seq-length 0", "--seq-length 0: must be at least 1"),
    ("plot --output {empty}/x.png", "required: [LABEL=]PATH"),
    ("preprocess --input {at}/notes.txt --output-prefix {empty}/x", "--tokenizer-type is missing"),
    ("preprocess --input {at}/none.txt --output-prefix {empty}/x --train-tokenizer --vocab-size 99", "none.txt"),
    ("preprocess --input {at}/notes.txt --output-prefix {empty}/x --tokenizer-type Words", "Words"),
    ("preprocess --input {at}/notes.txt --output-prefix {empty}/x --train-tokenizer", "give both, or neither"),
    ("preprocess --input {at}/notes.txt --output-prefix {empty}/x --train-tokenizer --vocab-size 0", "0"),
    (
        "preprocess --input {at}/notes.txt --output-prefix {empty}/x --train-tokenizer --vocab-size 9 --workers 0",
        "--workers 0",
    ),
    (
        "preprocess --input {at}/notes.txt --output-prefix {empty}/x --train-tokenizer --vocab-size 9 --held-out-fraction 1",
        "1",
    ),
    (
        "preprocess --input {at}/notes.txt --output-prefix {empty}/x --tokenizer-type GPT2BPETokenizer --vocab-file no.json",
        "no.json",
    ),
    ("preprocess --input {at}/latin1.txt --output-prefix {empty}/x --train-tokenizer --vocab-size 300", "latin1.txt"),
    ("preprocess --input {at}/broken.jsonl --output-prefix {empty}/x --train-tokenizer --vocab-size 300", "broken.jsonl"),
    ("evaluate --input {at}/notes.txt --output {at}", "a folder; give the path of a file"),
    ("evaluate --input {at}/notes.txt --output {at}/no/x.json", "no folder"),
    ("evaluate --output {empty}/x.json", "--input"),
]


def prepare(at: Path) -> None:
    """Files that are not what a command takes them for."""
    import numpy as np
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    (at / "notes.txt").write_text("my notes\n")
    (at / "latin1.txt").write_bytes(b"caf\xe9 au lait\n" * 50)
    (at / "broken.jsonl").write_text('{"text": "one"}\n{"text": \n')
    (at / "run.jsonl").write_text(json.dumps({"event": "train", "iteration": 1, "loss": 1.0, "tokens": 1}) + "\n")
    (at / "broken").mkdir()
    (at / "broken" / "latest_checkpointed_iteration.txt").write_text("soon")
    for name in ("good", "short", "text"):
        builder = IndexedDatasetBuilder(f"{at}/{name}.bin", dtype=np.int32)
        for _ in range(100):
            builder.add_document(torch.arange(50, dtype=torch.int32), [50])
        builder.finalize(f"{at}/{name}.idx")
    (at / "short.bin").write_bytes((at / "short.bin").read_bytes()[:1000])
    (at / "text.idx").write_text("not an index")
