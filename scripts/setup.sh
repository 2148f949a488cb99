#!/bin/sh
# Makes or renews the virtual environment of this checkout: sh scripts/setup.sh PYTHON FOLDER
# Called by the Makefile when the folder is missing or pyproject.toml or requirements.lock is newer than it.
# TORCH_INDEX=<address of a package index> takes torch from there, for example a CPU or a certain CUDA build.
set -eu
python=$1
venv=$2

fail() {
    printf '%s\n' "$@" >&2
    exit 1
}

say() {
    printf '\033[1m%s\033[0m\n' "$*"
}

command -v "$python" >/dev/null 2>&1 || fail "'$python' is not a program here." \
    "Install Python 3.10 or newer, or name yours: make PYTHON=/path/to/python3"
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || fail "'$python' is Python $version, and 3.10 or newer is needed." \
    "Name a newer one: make PYTHON=python3.12"

# A folder whose interpreter does not start (a half-made one, or its Python was removed) is made anew.
if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    say "Making $venv with Python $version"
    "$python" -m venv --clear "$venv" || fail "'$python -m venv' failed." \
        "On Debian and Ubuntu this part of Python is a package of its own: apt install python3-venv"
fi
pip() {
    "$venv/bin/python" -m pip --disable-pip-version-check --no-input "$@"
}

# torch first and with its dependencies. Without an NVIDIA GPU its CPU build is preferred, wherever pip knows of one.
torch=$(sed -n 's/^torch==\([0-9.]*\).*/\1/p' requirements.lock)
if "$venv/bin/python" -c "import importlib.metadata as m, sys; sys.exit(m.version('torch').split('+')[0] != '$torch')" 2>/dev/null; then
    :  # there already; which build it is was decided when it was installed
elif [ -n "${TORCH_INDEX:-}" ]; then
    say "Installing torch $torch from $TORCH_INDEX"
    pip install -qq --index-url "$TORCH_INDEX" "torch==$torch"
elif command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi >/dev/null 2>&1; then
    say "Installing torch $torch for the GPU"
    pip install -qq -c requirements.lock "torch===$torch"
else
    say "Installing torch $torch"
    pip install -qq -c requirements.lock "torch==$torch+cpu" 2>/dev/null || pip install -qq -c requirements.lock "torch==$torch"
fi
say "Installing the packages of requirements.lock (about a minute)"
pip install -qq --no-deps -r requirements.lock
pip install -qq --no-deps --no-build-isolation --editable .
say "Ready: $venv"
