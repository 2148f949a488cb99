#!/bin/sh
# Writes requirements.lock anew from pyproject.toml: sh scripts/lock.sh PYTHON
# Versions in the present file are kept where they still fit; to raise one, delete its line first. uv resolves for all
# supported Python versions and platforms at once, which pip cannot do.
set -eu
python=$1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$python" -m venv "$work/venv"
"$work/venv/bin/python" -m pip --disable-pip-version-check install --quiet uv
cp requirements.lock "$work/resolved.txt"
sed -n '/^torch==/p' requirements.lock >"$work/torch.txt"
"$work/venv/bin/uv" pip compile --quiet --universal --python-version 3.10 --extra dev --no-header --no-annotate \
    --constraint "$work/torch.txt" --output-file "$work/resolved.txt" pyproject.toml

{
    sed -n '/^# Exact/,/^[^#]/{/^#/p;}' requirements.lock
    sed -e '/^nvidia-/d' -e '/^cuda-/d' -e '/^triton/d' \
        -e "s/sys_platform == 'emscripten' or //" -e "/== 'emscripten'/d" \
        -e "s/ and sys_platform != 'emscripten'//" -e "s/ ; sys_platform != 'emscripten'//" "$work/resolved.txt"
    sed -n '/^# The demo/,$p' requirements.lock
} >"$work/requirements.lock"
cp "$work/requirements.lock" requirements.lock
