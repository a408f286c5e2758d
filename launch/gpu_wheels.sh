#!/usr/bin/env bash
# What launch/gpu_report.sh needs on a GPU machine without a network, in one folder to carry there:
#   bash launch/gpu_wheels.sh [FOLDER]        (default gpu_wheels)
# the wheels that a machine with only PyTorch, triton and transformers lacks, in this environment's versions, for Linux x86-64; and
# in FOLDER/data a small corpus with its tokenizer and its token shards. FOLDER is made anew.
#
# PYTHON_VERSION   of the GPU machine (default 3.12)
# VENV             the environment with moe in it (default .venv if it is there, else the python3 on PATH)
set -euo pipefail
cd "$(dirname "$0")/.."
fail() { echo "launch/gpu_wheels.sh: $*" >&2; exit 2; }

[ $# -le 1 ] || fail "at most one folder, not: $*"
folder="${1:-gpu_wheels}" version="${PYTHON_VERSION:-3.12}"
[[ "$folder" != -* ]] || fail "$folder: it has no options"
[[ "$version" =~ ^3\.[0-9]+$ ]] || fail "PYTHON_VERSION=$version must be as 3.12"
if [ -d "$folder" ] && [ -n "$(ls -A "$folder")" ] && [ ! -e "$folder/requirements.txt" ]; then
    fail "$folder holds other files: name an empty folder, a new one or one that this script made"
fi
PATH="${VENV:-$PWD/.venv}/bin:$PATH"
rm -rf "$folder"
mkdir -p "$folder"

python3 -m moe.bench.gpu.wheels "$version" >"$folder/requirements.txt"
target=(--python-version "$version" --implementation cp)
for platform in 2_28 2_27 2_26 2_24 2_17 2_12 2_5; do
    target+=(--platform "manylinux_${platform}_x86_64")
done
target+=(--platform manylinux2014_x86_64 --platform manylinux2010_x86_64 --platform manylinux1_x86_64)
while read -r requirement; do
    if ! python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: "${target[@]}" \
        --dest "$folder" "$requirement" 2>"$folder/pip.log"; then
        echo "$requirement: no wheel for Python $version; building it from its source"
        DS_BUILD_OPS=0 python3 -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir "$folder" "$requirement"
    fi
done <"$folder/requirements.txt"
rm -f "$folder/pip.log"
for wheel in "$folder"/*.whl; do # one built here must not be bound to this Python
    case "$wheel" in
        *-py3-none-*.whl | *-py2.py3-none-*.whl | *-"cp${version/./}"-*.whl | *-abi3-*.whl) ;;
        *) fail "$wheel does not fit Python $version" ;;
    esac
done
[ "$(find "$folder" -name '*.whl' | wc -l)" = "$(wc -l <"$folder/requirements.txt")" ] || fail "$folder lacks a wheel"

python3 -m moe.bench.gpu.data "$folder"
du -h "$folder"/*.whl "$folder/data" | sort -h
du -sh "$folder"
