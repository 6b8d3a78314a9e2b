#!/usr/bin/env bash
# Trains GPT-2 Medium on OpenWebText exactly as the PACI paper does (arXiv 2606.07881): 8 stages, 49.8e9 tokens.
#
#   SCHEDULE=paci GLOBAL_BATCH=128 MICROBATCHES=8 examples/gpt/pretrain_gpt2_medium.sh [further flags of Megatron]
#
# These three select the arm, and nothing else changes between arms; flush and PACI differ by --pipeline-schedule alone:
#   SCHEDULE       1f1b (Megatron's flush, the baseline) or paci
#   GLOBAL_BATCH   128 or 256 sequences per update; learning rate and number of updates follow from it
#   MICROBATCHES   4, 8, 16 or 32 micro-batches per update, the paper's a
#
# Where things are, and who runs what:
#   SEED           1234 by default; the paper's spreads are over seeds
#   DATA_PREFIX    what prepare_openwebtext.sh wrote (default: runs/openwebtext/openwebtext in the project)
#   TOKENIZER      folder or Hugging Face name of the GPT-2 tokenizer (default: ${DATA_PREFIX}_tokenizer)
#   OUTPUT         checkpoints, metrics.jsonl, TensorBoard, logs (default: runs/gpt2-medium/ARM); a rerun resumes from it
#   EXTRA_FLAGS    further flags of Megatron, separated by spaces; flags that come last win
#   LAYOUT         layers by stage as --pipeline-model-parallel-layout has it, or "even" for three a stage; see the README
#   GPUS_PER_NODE  8 by default; GPUS_PER_NODE x NNODES must be a multiple of 8, above 8 with data parallelism
#   NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT   for several nodes; pretrain_gpt2_medium.slurm sets them
#   ON_CPU=1       do not insist on a GPU for each stage: to try a command whose EXTRA_FLAGS make the model tiny
#   PYTHON         the interpreter (default: .venv/bin/python in the project if it is there, else python3)
#   DRY_RUN=1      print the command, check that the installed Megatron accepts every flag, and start nothing;
#                  DRY_RUN=print only prints it
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

die() {
    printf 'pretrain_gpt2_medium.sh: error: %s\n' "$1" >&2
    exit 2
}

# must_be NAME REMEDY VALUE...: refuse any other value of the variable NAME.
must_be() {
    local name=$1 remedy=$2 value
    shift 2
    for value in "$@"; do
        if [ "${!name-}" = "$value" ]; then return; fi
    done
    if [ -z "${!name-}" ]; then die "$name is not set: must be one of: $*. $remedy"; fi
    die "$name=${!name}: must be one of: $*. $remedy"
}

# must_match NAME PATTERN MEANING REMEDY
must_match() {
    if ! [[ ${!1} =~ ^($2)$ ]]; then die "$1=${!1}: must be $3. $4"; fi
}

if [ "${1-}" = -h ] || [ "${1-}" = --help ]; then
    sed -n '2,/^set /{/^#/s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}"
    exit 0
fi

# --- the arm

must_be SCHEDULE "Set 1f1b for Megatron's flush, the baseline, or paci." 1f1b paci
must_be GLOBAL_BATCH "The paper has these two; learning rate and length are theirs." 128 256
must_be MICROBATCHES "It is the number of micro-batches per update, the paper's a; their size follows from GLOBAL_BATCH." 4 8 16 32
SEED=${SEED:-1234}
must_match SEED '[1-9][0-9]{0,8}' "a whole number from 1 to 999999999" "Leave it out for 1234."

# Both batch sizes see the same 49.8e9 tokens, and are evaluated and saved after the same numbers of tokens.
case $GLOBAL_BATCH in
    256) # 3e-4, the reference
        train_iters=190000 lr=3e-4 min_lr=3e-5 eval_interval=1000 eval_iters=40 retain_interval=38000 ;;
    128) # 3e-4 x sqrt(128/256)
        train_iters=380000 lr=2.1213203e-4 min_lr=2.1213203e-5 eval_interval=2000 eval_iters=80 retain_interval=76000 ;;
esac

# --- where it runs

num_stages=8
GPUS_PER_NODE=${GPUS_PER_NODE:-8} NNODES=${NNODES:-1} NODE_RANK=${NODE_RANK:-0} MASTER_PORT=${MASTER_PORT:-29500}
must_match GPUS_PER_NODE '[1-9][0-9]{0,5}' "a whole number from 1" "It is the number of GPUs to use on each node."
must_match NNODES '[1-9][0-9]{0,5}' "a whole number from 1" "It is the number of nodes."
must_match NODE_RANK '0|[1-9][0-9]{0,5}' "a whole number from 0" "It is this node's number."
must_match MASTER_PORT '[1-9][0-9]{0,4}' "a port number" "Leave it out for 29500."
DRY_RUN=${DRY_RUN:-0} ON_CPU=${ON_CPU:-0}
must_be DRY_RUN "Leave it out to train." 0 1 print
must_be ON_CPU "Leave it out to train on GPUs." 0 1
if ((NODE_RANK >= NNODES)); then die "NODE_RANK=$NODE_RANK: must be below NNODES=$NNODES. Number the nodes from 0."; fi
world_size=$((GPUS_PER_NODE * NNODES))
if ((world_size % num_stages)); then
    die "GPUS_PER_NODE=$GPUS_PER_NODE x NNODES=$NNODES is $world_size GPUs: must be a multiple of $num_stages, one for each stage.\
 Change one of them."
fi
pipelines=$((world_size / num_stages))
if ((GLOBAL_BATCH % (MICROBATCHES * pipelines))); then
    die "GLOBAL_BATCH=$GLOBAL_BATCH on $pipelines pipelines of $MICROBATCHES micro-batches: must divide evenly.\
 Use $num_stages GPUs, as the paper does, or a power of two times that."
fi
micro_batch_size=$((GLOBAL_BATCH / (MICROBATCHES * pipelines)))

launch=(--nproc-per-node "$GPUS_PER_NODE")
if ((NNODES == 1)); then
    launch=(--standalone "${launch[@]}")
else
    if [ -z "${MASTER_ADDR-}" ]; then
        die "MASTER_ADDR is not set: with NNODES=$NNODES it must be the address of node 0. Set it, the same on every node."
    fi
    # The rank is given and not drawn on arrival, so that neighbouring stages stay on one node, the same in every rerun.
    launch=(--nnodes "$NNODES" --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" "${launch[@]}")
fi

if [ -z "${PYTHON-}" ]; then
    PYTHON=$ROOT/.venv/bin/python
    if ! [ -x "$PYTHON" ]; then PYTHON=python3; fi
fi

# --- the command

arm=$SCHEDULE-b$GLOBAL_BATCH-a$MICROBATCHES-seed$SEED
DATA_PREFIX=${DATA_PREFIX:-$ROOT/runs/openwebtext/openwebtext}
TOKENIZER=${TOKENIZER:-${DATA_PREFIX}_tokenizer}
OUTPUT=${OUTPUT:-$ROOT/runs/gpt2-medium/$arm}
# The output layer takes as long as 3.8 transformer layers, so it has the last stage to itself. The first stages keep the
# most micro-batches in flight, so they have the fewer layers.
LAYOUT=${LAYOUT:-'Et*3|t*3|t*3|t*3|t*4|t*4|t*4|L'}

model=(
    --num-layers 24 --hidden-size 1024 --num-attention-heads 16 --seq-length 1024 --max-position-embeddings 1024
    --position-embedding-type learned_absolute --untie-embeddings-and-output-weights
    --normalization LayerNorm --hidden-dropout 0.1 --attention-dropout 0.1
)
stages=(--pipeline-model-parallel-size "$num_stages")
if [ "$LAYOUT" != even ]; then stages+=(--pipeline-model-parallel-layout "$LAYOUT"); fi
batch=(--micro-batch-size "$micro_batch_size" --global-batch-size "$GLOBAL_BATCH" --train-iters "$train_iters")
optimizer=(
    --optimizer adam --adam-beta1 0.9 --adam-beta2 0.95 --adam-eps 1e-8
    --weight-decay 0.1 # Megatron decays matrices only: not biases, not norms
    --lr "$lr" --min-lr "$min_lr" --lr-warmup-fraction 0.01 --lr-decay-style cosine
    --clip-grad 0 --bf16
)
data=(
    --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$TOKENIZER"
    --train-data-path "${DATA_PREFIX}_train_document" --valid-data-path "${DATA_PREFIX}_valid_document"
    --data-cache-path "${DATA_PREFIX}_index_cache"
)
run=(
    --seed "$SEED"
    --save "$OUTPUT/checkpoints" --load "$OUTPUT/checkpoints"
    --save-interval "$eval_interval" --save-retain-interval "$retain_interval" # five to keep, and the newest
    --eval-interval "$eval_interval" --eval-iters "$eval_iters"
    --log-interval 100 --log-throughput --tensorboard-dir "$OUTPUT/tensorboard" --paci-metrics-file "$OUTPUT/metrics.jsonl"
    --rerun-mode disabled # PACI cannot have it, so the baseline does without its collectives too
    --distributed-timeout-minutes 60 # the first node's first process builds the index of 49.8e9 tokens
)
# Everything but a line end separates; read -a leaves no word to the shell's globbing.
extra=()
if [ -n "${EXTRA_FLAGS-}" ]; then read -r -d '' -a extra <<<"$EXTRA_FLAGS" || true; fi

command=(
    "$PYTHON" -m torch.distributed.run "${launch[@]}" "$ROOT/pretrain_gpt_paci.py"
    "${model[@]}" "${stages[@]}" "${batch[@]}" "${optimizer[@]}" "${data[@]}" "${run[@]}"
    --pipeline-schedule "$SCHEDULE"
    # Bash before 4.4 takes an empty array for an unset variable.
    ${extra[@]+"${extra[@]}"} "$@"
)

# One line that a shell reads back.
printf '%q ' "${command[@]}"
printf '\n'
case $DRY_RUN in
    print) exit 0 ;;
    1) exec "$PYTHON" "$ROOT/tools/check_training_command.py" "${command[@]}" ;;
esac

# --- what is cheaper to find out before eight processes start

for file in "${DATA_PREFIX}"_{train,valid}_document.{bin,idx}; do
    if ! [ -f "$file" ]; then
        die "$file: no such file; it must hold the tokenized data.\
 Run OUTPUT_PREFIX=$DATA_PREFIX examples/gpt/prepare_openwebtext.sh, or set DATA_PREFIX to what it wrote."
    fi
done
if [ "$TOKENIZER" = "${DATA_PREFIX}_tokenizer" ] && ! [ -d "$TOKENIZER" ]; then
    die "TOKENIZER=$TOKENIZER: no such folder; it must hold the tokenizer of the data.\
 Set TOKENIZER to where it is, or to a Hugging Face name such as openai-community/gpt2."
fi
if ! ((ON_CPU)); then
    gpus=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')
    if ((gpus < GPUS_PER_NODE)); then
        die "GPUS_PER_NODE=$GPUS_PER_NODE: this machine has $gpus that PyTorch can use; there must be one for each process.\
 Set GPUS_PER_NODE and NNODES to what there is; a single machine can run the small study instead (tools/reproduce_paper.py)."
    fi
fi
# A resumed run must be the run that was begun: Megatron itself would go on with another schedule or batch size.
begun=$OUTPUT/arm.txt
if [ -f "$begun" ] && [ "$(cat "$begun")" != "$arm" ]; then
    die "OUTPUT=$OUTPUT: holds the arm $(cat "$begun"), and this one is $arm; they must not mix.\
 Choose another OUTPUT, or delete $begun to go on with its checkpoint all the same."
fi
mkdir -p "$OUTPUT"
if ((NODE_RANK == 0)); then printf '%s\n' "$arm" >"$begun"; fi

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec > >(tee -a "$OUTPUT/log-node$NODE_RANK.txt") 2>&1
exec "${command[@]}"
