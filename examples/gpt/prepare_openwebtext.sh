#!/usr/bin/env bash
# The data of the PACI paper: OpenWebText as GPT-2 BPE tokens, each document ended by the end-of-text token, 2 % of the
# documents held out.
#
#   examples/gpt/prepare_openwebtext.sh                      the Hugging Face dataset Skylion007/openwebtext, streamed
#   examples/gpt/prepare_openwebtext.sh INPUT [INPUT ...]    a copy: its folder, .parquet or .jsonl files, quoted patterns
#
#   DATASET        the input if no argument is given: a Hugging Face name, a folder, a file, a quoted pattern
#   OUTPUT_PREFIX  path that all outputs start with (default: runs/openwebtext/openwebtext in the project)
#   VOCAB_FILE, MERGE_FILE   GPT-2's vocab.json and merges.txt (default: fetched from openai-community/gpt2)
#   JSON_KEY       key or column that holds the text (default: text)
#   HELD_OUT_FRACTION        share of the documents for validation (default: 0.02, the paper's)
#   SEED           decides which documents those are (default: 1234)
#   WORKERS        processes that tokenize (default: as many as there are cores)
#   PYTHON         the interpreter (default: .venv/bin/python in the project if it is there, else python3)
#   FORCE=1        make it again although it is there
#   DRY_RUN=1      print the commands, and run none
#
# A rerun with the same settings does nothing. An interrupted run leaves no output, and starts over: to have a download
# that resumes, get a copy first (hf download --repo-type dataset Skylion007/openwebtext --local-dir DIR) and give DIR.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

die() {
    printf 'prepare_openwebtext.sh: error: %s\n' "$1" >&2
    exit 2
}

# show COMMAND...: as a line that a shell reads back.
show() {
    printf '%q ' "$@"
    printf '\n'
}

if [ "${1-}" = -h ] || [ "${1-}" = --help ]; then
    sed -n '2,/^set /{/^#/s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}"
    exit 0
fi

for name in FORCE DRY_RUN; do
    case ${!name:-0} in
        0 | 1) ;;
        *) die "$name=${!name}: must be 0 or 1. Leave it out for 0." ;;
    esac
done
vocab_file=${VOCAB_FILE-} merge_file=${MERGE_FILE-}
if [ -n "$vocab_file" ] && [ -z "$merge_file" ]; then
    die "MERGE_FILE is not set: VOCAB_FILE=$vocab_file needs the merges.txt that belongs to it. Set both, or neither."
fi
if [ -z "$vocab_file" ] && [ -n "$merge_file" ]; then
    die "VOCAB_FILE is not set: MERGE_FILE=$merge_file needs the vocab.json that belongs to it. Set both, or neither."
fi

if (($# == 0)); then set -- "${DATASET:-Skylion007/openwebtext}"; fi
prefix=${OUTPUT_PREFIX:-$ROOT/runs/openwebtext/openwebtext}
if [ -z "${PYTHON-}" ]; then
    PYTHON=$ROOT/.venv/bin/python
    if ! [ -x "$PYTHON" ]; then PYTHON=python3; fi
fi
workers=${WORKERS:-$("$PYTHON" -c 'import os; print(os.cpu_count() or 1)')}

fetch=()
if [ -z "$vocab_file" ]; then
    vocabulary=$(dirname "$prefix")/gpt2-bpe
    vocab_file=$vocabulary/vocab.json merge_file=$vocabulary/merges.txt
    fetch=(
        "$PYTHON" -c
'import sys, huggingface_hub as hub
hub.snapshot_download("openai-community/gpt2", allow_patterns=sys.argv[2:], local_dir=sys.argv[1])'
        "$vocabulary" vocab.json merges.txt
    )
fi
# What decides the output. The number of workers does not.
preprocess=(
    "$PYTHON" "$ROOT/tools/preprocess_data.py" --input "$@" --json-key "${JSON_KEY:-text}" --output-prefix "$prefix"
    --tokenizer-type GPT2BPETokenizer --vocab-file "$vocab_file" --merge-file "$merge_file"
    --append-eod --held-out-fraction "${HELD_OUT_FRACTION:-0.02}" --seed "${SEED:-1234}"
)
recipe=$(show "${preprocess[@]:1}")
preprocess+=(--workers "$workers")

if [ "${DRY_RUN:-0}" = 1 ]; then
    if ((${#fetch[@]})); then show "${fetch[@]}"; fi
    show "${preprocess[@]}"
    exit 0
fi

# --- there already?

outputs=("${prefix}"_{train,valid}_document.{bin,idx} "${prefix}_stats.json" "${prefix}_tokenizer/vocab.json")
there=1
for file in "${outputs[@]}"; do
    if ! [ -f "$file" ]; then there=0; fi
done
if ((there)) && [ "${FORCE:-0}" != 1 ]; then
    made=$(cat "${prefix}_recipe.txt" 2>/dev/null || echo "a command that is not on record")
    if [ "$made" = "$recipe" ]; then
        printf '%s: already there, made with the same settings (FORCE=1 makes it again)\n' "$prefix"
        exit 0
    fi
    die "OUTPUT_PREFIX=$prefix: holds data made by: $made; it must not be replaced by mistake.\
 Choose another OUTPUT_PREFIX, or set FORCE=1 to make it again as: $recipe"
fi

# --- make it

mkdir -p "$(dirname "$prefix")"
if ((${#fetch[@]})) && ! { [ -s "$vocab_file" ] && [ -s "$merge_file" ]; }; then
    show "${fetch[@]}"
    "${fetch[@]}" || die "GPT-2's vocabulary cannot be fetched from openai-community/gpt2 (above), and without it there are no tokens.\
 Check the network, or set VOCAB_FILE and MERGE_FILE to copies of its vocab.json and merges.txt."
fi
show "${preprocess[@]}"
# Until the new data is complete nothing may pass for it. Megatron finds its index of the samples by the data's path, and
# would go on using that of the data before.
rm -rf "${prefix}_recipe.txt" "${prefix}_index_cache"
OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} "${preprocess[@]}"
printf '%s\n' "$recipe" >"${prefix}_recipe.txt"
