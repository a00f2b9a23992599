#!/usr/bin/env bash
# Measures PyTorch and this library on the same model and GPU, one after the other, and prints ratios.
#
# Usage: dev/gpu/peers.sh [--model 124M|345M|1.3B|llama-350M|llama-1.1B] [--recipes NAME,NAME..] [--steps N] [--fp8]
#
# Needs python3 with PyTorch. MXT_GPU_BENCH names the train_step benchmark where there is no cargo;
# dev/gpu/pack.sh makes it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
ours=${MXT_GPU_BENCH:-}
if [[ -z $ours ]]; then
    cargo build --release --bench train_step 2>/dev/null
    ours=$(ls -t target/release/deps/train_step-* | grep -v '\.d$' | head -n 1)
fi
exec python3 benches/peers/gpu.py --ours "$ours" "$@"
