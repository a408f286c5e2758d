#!/usr/bin/env bash
# Installs what experts.backend=megablocks needs, MegaBlocks and grouped_gemm, compiled against the installed torch (about four
# minutes), and checks their products on this machine's GPU:
#   bash launch/install_megablocks.sh
# The versions are pinned with their hashes. MegaBlocks 0.10.0 requires a torch of its time, so dependencies are left alone, and is
# edited for CUDA 13, whose CUB no longer has an argument that it passes.
#
# TORCH_CUDA_ARCH_LIST   GPUs to compile for, as 9.0 for H100 and H200 (default: those of this machine)
# VENV                   the environment with moe in it (default .venv if it is there, else the python3 on PATH)
set -euo pipefail
MEGABLOCKS=megablocks==0.10.0
REQUIREMENTS="$MEGABLOCKS --hash=sha256:956fd9880fa869f7468da125da230733d5f84e10a9f8c2991e5e16523c6fe1e0
grouped_gemm==0.3.0 --hash=sha256:f0555da33a975610e9160f52449082c5e699525524581a0e5f990b14b02676a3
stanford-stk==0.7.1 --hash=sha256:fc46140c2572ee9c008b2ac67ee6656f63f49c1074da8aea0923fa8290702871"

fail() { echo "launch/install_megablocks.sh: $*" >&2; exit 2; }

# Prints the CUDA version of torch, the folder of nvcc, and the folder of CUDA's headers that pip installed, if it did.
toolkit() {
    python3 - <<'PYTHON'
import sys
from pathlib import Path

import torch
from torch.utils.cpp_extension import CUDA_HOME

if torch.version.cuda is None:
    sys.exit(f"torch {torch.__version__} has no CUDA: install a CUDA build of torch first")
if CUDA_HOME is None or not (Path(CUDA_HOME) / "bin" / "nvcc").is_file():
    sys.exit(f"nvcc is not on PATH nor in CUDA_HOME: install the toolkit of CUDA {torch.version.cuda}, torch's version")
packages = Path(torch.__file__).parents[1] / "nvidia" / f"cu{torch.version.cuda.partition('.')[0]}" / "include"
print(torch.version.cuda, CUDA_HOME, packages if packages.is_dir() else "")
PYTHON
}

# edit_for_cuda13 FOLDER: drops the argument `debug_synchronous` of both calls of CUB in MegaBlocks' sources.
edit_for_cuda13() {
    python3 - "$1/csrc/cumsum.h" <<'PYTHON'
import re
import sys
from pathlib import Path

header = Path(sys.argv[1])
text, found = re.subn(r",\s*debug_synchronous\)", ")", header.read_text())
if found != 2:
    sys.exit(f"{header}: {found} calls pass debug_synchronous, not 2: these are not the sources that the edit is for")
header.write_text(text)
PYTHON
}

# Compares grouped_gemm's products and MegaBlocks' row kernels with the plain code, on the GPU.
check() {
    python3 - <<'PYTHON'
import sys

import torch

from moe.config import ExpertBackend
from moe.kernels.grouped_swiglu import grouped_ffn

if not torch.cuda.is_available():
    sys.exit("installed, but not checked: there is no GPU here")
torch.manual_seed(0)
counts = torch.tensor([300, 0, 17, 707], device="cuda")
shapes = (1024, 256), (4, 1024, 256), (4, 256, 512)
tensors = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) / 16 for shape in shapes]
results = [grouped_ffn(tensors[0], counts, *tensors[1:], backend) for backend in (ExpertBackend.loop, ExpertBackend.megablocks)]
error = (results[0] - results[1]).abs().max().item() / results[0].abs().max().item()
if not error < 0.02:
    sys.exit(f"installed, but the results differ from the plain code's by {error:.3g} of the largest")
print(f"experts.backend=megablocks runs: its results differ from the plain code's by at most {error:.2g} of the largest")
PYTHON
}

main() {
    local cuda home headers folder
    [ $# = 0 ] || fail "$*: it takes no arguments"
    cd "$(dirname "${BASH_SOURCE[0]}")/.."
    PATH="${VENV:-$PWD/.venv}/bin:$PATH"
    cuda="$(toolkit 2>&1)" || fail "$cuda"
    read -r cuda home headers <<<"$cuda"
    folder="$(mktemp -d)"
    # shellcheck disable=SC2064
    trap "rm -rf '$folder'" EXIT
    export CUDA_HOME="$home" PATH="$home/bin:$PATH" CPATH="$headers${CPATH:+:$CPATH}"
    python3 -m pip install --quiet --disable-pip-version-check ninja setuptools wheel packaging
    echo "$REQUIREMENTS" >"$folder/requirements.txt"
    python3 -m pip download --quiet --disable-pip-version-check --no-deps --no-build-isolation --no-binary=:all: --require-hashes \
        --dest "$folder" --requirement "$folder/requirements.txt"
    tar -xzf "$folder/${MEGABLOCKS/==/-}.tar.gz" -C "$folder"
    if [ "${cuda%%.*}" -ge 13 ]; then
        edit_for_cuda13 "$folder/${MEGABLOCKS/==/-}" || exit 1
    fi
    echo "compiling for CUDA $cuda ..."
    python3 -m pip install --disable-pip-version-check --no-deps --no-build-isolation \
        "$folder"/grouped_gemm-*.tar.gz "$folder"/stanford_stk-*.tar.gz "$folder/${MEGABLOCKS/==/-}"
    check
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
    main "$@"
fi
