#!/usr/bin/env bash
# On a machine with a CUDA device: build the extension, run the GPU tests, then the benchmarks.
#   PYTHON=python3 OUT=benchmarks/results benchmarks/gpu_run.sh
# Needs a CUDA build of PyTorch with Triton, nvcc, pytest and numpy; changes nothing outside $TARGET
# and $OUT. The exit status is that of the first part that failed.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
OUT=${OUT:-benchmarks/results}
TARGET=${TARGET:-$(mktemp -d)}
# Code for this device alone: three architectures would take three times as long.
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$("$PYTHON" -c \
    'import torch; print("{}.{}".format(*torch.cuda.get_device_capability()))')}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)

SPECTRAL_BUILD_EXT=cuda "$PYTHON" -m pip install --quiet --no-build-isolation --no-deps \
    --upgrade --target "$TARGET" .
export PYTHONPATH="$TARGET${PYTHONPATH:+:$PYTHONPATH}"

# -P: what was installed is tested and timed, not the checkout.
"$PYTHON" -P -m spectral_kernels | tee "$OUT/backends.txt"
status=0
PYTHONPATH="tests:$PYTHONPATH" "$PYTHON" -P -m pytest -q -m gpu tests/test_gpu.py \
    2>&1 | tee "$OUT/gpu_tests.txt" || status=$?
PYTHONPATH="benchmarks:$PYTHONPATH" "$PYTHON" -P benchmarks/gpu_bench.py --output "$OUT" \
    2>&1 | tee "$OUT/gpu_bench.txt" || status=$((status ? status : $?))
exit "$status"
