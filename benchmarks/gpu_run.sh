#!/usr/bin/env bash
# On a machine with a CUDA device: build the extension, run the GPU tests, then the benchmarks.
#   PYTHON=python3 OUT=benchmarks/results benchmarks/gpu_run.sh
# Needs a CUDA build of PyTorch with Triton, nvcc, pytest, numpy and xxhash; peft, diffusers and transformers
# for what compares with them, which is left out without them. Changes nothing outside $TARGET and
# $OUT. Takes about ten minutes on an H100: the benchmarks stop after $MINUTES.
# Every part runs whether or not the one before failed; the exit status is that of the first that did.
set -uo pipefail
cd "$(dirname "$0")/.." || exit

PYTHON=${PYTHON:-python3}
OUT=${OUT:-benchmarks/results}
TARGET=${TARGET:-$(mktemp -d)}
MINUTES=${MINUTES:-7}
# Code for this device alone: three architectures would take three times as long.
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$("$PYTHON" -c \
    'import torch; print("{}.{}".format(*torch.cuda.get_device_capability()))')}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
status=0
part() { # a name and a command: its output goes to $OUT/<name>.txt too
    local name=$1 ended
    shift
    echo "== $name"
    "$@" 2>&1 | tee "$OUT/$name.txt"
    ended=${PIPESTATUS[0]}
    [ "$ended" -eq 0 ] || echo "== $name FAILED with status $ended"
    [ "$status" -ne 0 ] || status=$ended
}

install() { # with the CUDA kernels, or at least without them
    SPECTRAL_BUILD_EXT=$1 "$PYTHON" -m pip install --quiet --no-build-isolation --no-deps \
        --upgrade --target "$TARGET" .
}
part build install cuda
if [ "$status" -ne 0 ]; then
    part build_without_extension install 0
fi
export PYTHONPATH="benchmarks:tests:$TARGET${PYTHONPATH:+:$PYTHONPATH}"

# Most of the tests' time is the compiler's, so several processes share it.
workers=()
if "$PYTHON" -c 'import xdist' 2>/dev/null; then
    workers=(-n 8)
fi
# -P: what was installed is tested and timed, not the checkout.
part backends "$PYTHON" -P -m spectral_kernels
part gpu_tests timeout 180 "$PYTHON" -P -m pytest -q "${workers[@]}" -m gpu tests/test_gpu.py
part gpu_bench "$PYTHON" -P benchmarks/gpu_bench.py --output "$OUT" --minutes "$MINUTES"
exit "$status"
