#!/bin/sh
# Creates the development environment, or brings it up to date.
#
#   tools/make_venv.sh [DIR]     create or repair DIR (default .venv) and install paci-megatron with its dev tools
#   tools/make_venv.sh --print   only print the interpreter that would be used
#
# PYTHON=/path/to/python is used when set. Otherwise the first usable one of: python3.12, python3.13 and python3 on
# PATH, those of pyenv, those of uv. 3.12 comes first because constraints.txt is tested with it; Megatron has wheels
# for 3.12 and 3.13. A version manager leaves launchers on PATH that run no Python at all, so each candidate is run.
set -eu

VERSIONS="3.12 3.13"

newline='
'
tried=""
chosen=""

# Run by each candidate: prints the interpreter behind it (not a launcher or another environment), or says what is wrong.
probe='
import sys
version = "%d.%d" % sys.version_info[:2]
if version not in sys.argv[1:]:
    sys.exit("is Python " + version)
try:
    import ensurepip, venv
except ImportError as error:
    sys.exit("cannot create environments (%s); on Debian and Ubuntu: apt install python%s-venv" % (error, version))
print(getattr(sys, "_base_executable", None) or sys.executable)
'

first_import='
import datasets, matplotlib.pyplot, megatron.training, sentencepiece, torch
from transformers import AutoTokenizer
'

note() {
    tried="$tried  $1$newline"
}

# try PATH_OF_PYTHON: sets `chosen` and succeeds when it is usable, notes why not otherwise.
try() {
    # shellcheck disable=SC2086  # VERSIONS is a list
    if answer=$("$1" -c "$probe" $VERSIONS 2>&1 </dev/null); then
        # A warning may precede the answer.
        chosen=${answer##*"$newline"}
        [ -x "$chosen" ] && return 0
        note "$1: does not say which program it is"
    else
        status=$?
        reason=${answer%%"$newline"*}
        note "$1: ${reason:-exits with status $status}"
    fi
    chosen=""
    return 1
}

# try_path NAME: every NAME on PATH, not only the first, which may be a launcher that does not work.
try_path() {
    found=no
    saved_ifs=$IFS
    IFS=:
    for directory in $PATH; do
        IFS=$saved_ifs
        if [ -f "${directory:-.}/$1" ] && [ -x "${directory:-.}/$1" ]; then
            found=yes
            try "${directory:-.}/$1" && return 0
        fi
    done
    IFS=$saved_ifs
    [ $found = yes ] || note "$1: not on PATH"
    return 1
}

try_pyenv() {
    root=${PYENV_ROOT:-}
    [ -n "$root" ] || root=$(pyenv root 2>/dev/null) || root=${HOME:-}/.pyenv
    found=no
    for version in $VERSIONS; do
        for python in "$root/versions/$version".*/bin/python; do
            [ -x "$python" ] || continue
            found=yes
            try "$python" && return 0
        done
    done
    [ $found = yes ] || note "pyenv: no Python of these versions in $root/versions"
    return 1
}

try_uv() {
    if ! command -v uv >/dev/null 2>&1; then
        note "uv: not on PATH"
        return 1
    fi
    for version in $VERSIONS; do
        # --system: not the environment that is active or lies in this directory.
        python=$(uv python find --system "$version" 2>/dev/null) || continue
        try "$python" && return 0
    done
    note "uv: has no usable Python of these versions"
    return 1
}

choose_python() {
    if [ -n "${PYTHON:-}" ]; then
        python=$(command -v "$PYTHON") || python=$PYTHON
        try "$python" && return 0
    else
        for version in $VERSIONS; do
            try_path "python$version" && return 0
        done
        try_path python3 && return 0
        try_pyenv && return 0
        try_uv && return 0
    fi
    {
        echo "error: no usable Python found. Needed: version ${VERSIONS% *} or ${VERSIONS#* }, with the venv module. Tried:"
        printf '%s' "$tried"
        echo "Install one, with any of:"
        echo "  apt install python3.12 python3.12-venv    (Debian, Ubuntu)"
        echo "  pyenv install 3.12"
        echo "  uv python install 3.12"
        echo "or name one: make PYTHON=/path/to/python3.12"
    } >&2
    return 1
}

create() {
    venv=$1
    # Without a working pip it is missing or half created. --clear empties the folder.
    if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        choose_python
        echo "Creating $venv from $chosen"
        "$chosen" -m venv --clear "$venv"
    fi
    # The stamp goes first and comes back last: while it is missing, the next make repeats the installation.
    rm -f "$venv/.installed"
    echo "Installing paci-megatron and what it needs into $venv: some minutes, and 5 GB with PyTorch for CUDA"
    # Compiling every file of every package would take a third of the time, and few of them are ever imported.
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '.[dev]'
    # A first import of the large packages compiles what is used, and shows that the environment is sound.
    echo "Importing what was installed"
    if ! output=$(PYTHONDONTWRITEBYTECODE='' "$venv/bin/python" -c "$first_import" 2>&1); then
        printf '%s\n' "$output" "error: $venv does not work; remove it and try again" >&2
        return 1
    fi
    touch "$venv/.installed"
}

if [ "${1:-}" = --print ]; then
    choose_python
    printf '%s\n' "$chosen"
else
    cd "$(dirname "$0")/.."
    create "${1:-.venv}"
fi
