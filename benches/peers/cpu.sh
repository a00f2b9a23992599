#!/usr/bin/env bash
# Measures PyTorch and this library in turn on the same model, training steps on the CPU.
#
# Usage: benches/peers/cpu.sh [--model d6|d12|llama-d6] [--recipe NAME] [--rounds N]
#
# PyTorch runs four ways: eager and torch.compile, f32 and bf16 autocast, with fused AdamW and its own
# attention. It is installed into a virtual environment below target/ (some GB). Last line: `ratio R`,
# our tokens a second over the best of PyTorch's, medians over the rounds.
set -euo pipefail
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
venv=${MXT_PEERS_VENV:-$repository/target/peers-venv}
if [[ ! -x $venv/bin/python ]]; then
    python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet --disable-pip-version-check torch==2.11.0 numpy
fi
cd "$repository"
cargo build --release --bench train_step 2>/dev/null
ours=$(ls -t target/release/deps/train_step-* | grep -v '\.d$' | head -n 1)
exec "$venv/bin/python" benches/peers/cpu.py --ours "$ours" "$@"
