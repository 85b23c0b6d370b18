#!/usr/bin/env bash
# Everything that is measured on one NVIDIA card, in at most 8 minutes: parity with the CPU, sampling beside PyTorch, the
# training step, and the slowest kernels of each. It prints a table after each part, so that a run that is cut off is not
# lost. It needs no network.
#
#     benchmarks/gpu.sh [--wheels DIR] [--python PYTHON] [--out DIR] [--seconds 480]
#     benchmarks/gpu.sh --rehearse       the same programs on the CPU, with tiny shapes
#
# The machine has Python 3.11 or later, jax with CUDA, numpy, and PyTorch. Wheels of other packages that are missing are
# taken from DIR and unpacked beside the environment, which stays as it is. Without PyTorch or diffusers its programs are
# left out, with one line that says so. DIR of --out gets a log and the figures as JSON.
#
# Exit status: 0 if all parts ran and all results of the GPU agree with the CPU's; 1 otherwise.
set -uo pipefail
cd "$(dirname "$0")/.."

wheels="" python=python3 out="" rehearse="" seconds=480
while [ $# -gt 0 ]; do
    case $1 in
    --rehearse) rehearse=1 seconds=1200; shift ;;
    --wheels | --python | --out | --seconds)
        test $# -ge 2 || { echo "error: $1 needs a value" >&2; exit 2; }
        printf -v "${1#--}" %s "$2"
        shift 2
        ;;
    *) echo "error: unknown flag $1, expected --wheels, --python, --out, --seconds or --rehearse" >&2; exit 2 ;;
    esac
done
out=${out:-$(mktemp -d -t tiue-gpu.XXXXXX)}
mkdir -p "$out"
out=$(cd "$out" && pwd)
began=$SECONDS

export PYTHONPATH="$PWD" PYTHONUNBUFFERED=1 TF_CPP_MIN_LOG_LEVEL=1 XLA_PYTHON_CLIENT_PREALLOCATE=false
export JAX_COMPILATION_CACHE_DIR="$out/xla" JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 # for the profiles
if [ -n "$wheels" ]; then
    "$python" benchmarks/missing_wheels.py "$wheels" "$out/packages" || exit 1
    export PYTHONPATH="$PWD:$out/packages"
fi
if [ -n "$rehearse" ]; then
    export JAX_PLATFORMS=cpu CUDA_VISIBLE_DEVICES=
    export XLA_FLAGS="--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true" # compile sooner
fi

failed=0
# part NAME SECONDS PROGRAM ...: runs a program for at most SECONDS, and for no longer than the time that is left
part() {
    local name=$1 limit=$2 left status=0
    shift 2
    left=$((seconds - (SECONDS - began)))
    echo
    if [ "$left" -lt 15 ]; then
        echo "## $name: left out, $left of $seconds s are left"
        failed=1
        return
    fi
    echo "## $name ($((SECONDS - began)) s after the start)"
    timeout --kill-after=5 "$((limit < left ? limit : left))" "$python" "$@" || status=$?
    case $status in
    0) ;;
    124 | 137) echo "## $name: cut off after $((limit < left ? limit : left)) s" && failed=1 ;;
    *) echo "## $name: FAILED with status $status" && failed=1 ;;
    esac
}

main() {
    local targets=("TiUE" "TiUE, repeated" "one step" "VAE decoder")
    if [ -n "$rehearse" ]; then
        part "parity" "$seconds" benchmarks/gpu_parity.py --tiny --json "$out/parity.json"
        part "sampling, batch of 2" "$seconds" benchmarks/sampling.py --shapes tiny --dtype bfloat16 --batch_size 2 --rounds 1 \
            --kernels TiUE --json "$out/sampling-2.json"
        part "training step" "$seconds" benchmarks/gpu_training.py --tiny --batch_sizes 1 --rounds 1 --kernels \
            --json "$out/training.json"
        return
    fi
    "$python" -c 'import jax, sys; sys.exit(jax.default_backend() != "gpu")' ||
        { echo "error: jax finds no GPU here; --rehearse runs on the CPU" >&2; failed=1; return; }
    nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit --format=csv || true
    part "parity" 90 benchmarks/gpu_parity.py --json "$out/parity.json"
    part "sampling, batch of 16" 130 benchmarks/sampling.py --shapes sd21 --dtype bfloat16 --batch_size 16 --rounds 5 \
        --programs "${targets[@]}" --kernels TiUE --json "$out/sampling-16.json"
    part "training step" 130 benchmarks/gpu_training.py --batch_sizes 8 16 --kernels --json "$out/training.json"
    part "sampling, batch of 1" 100 benchmarks/sampling.py --shapes sd21 --dtype bfloat16 --batch_size 1 --rounds 9 \
        --programs "${targets[@]}" --kernels TiUE --json "$out/sampling-1.json"
    for batch in 1 16; do
        part "loops, batch of $batch" 90 benchmarks/sampling.py --shapes sd21 --dtype bfloat16 --batch_size "$batch" \
            --rounds 3 --no_compile --programs "4-step loop" "25 guided steps" --json "$out/loops-$batch.json"
    done
}

main > >(tee "$out/log.txt") 2> >(tee -a "$out/log.txt" >&2)
echo
echo "$((SECONDS - began)) s; figures in $out"
exit "$failed"
