#!/usr/bin/env bash
# Measures decoding on the CPU, one text, tokens a second: ours, transformers and llama.cpp in turn, on the same
# weights, those of a new GPT-2 of 124M parameters.
#
# Usage: benches/peers/decode.sh [--threads N] [--tokens N] [--rounds N]
#
# Ours is `mxtrain generate` in f32, bf16 and MXFP4; transformers has its own cache, in f32 and bf16; llama.cpp runs
# our exports in f16, bf16 and MXFP4, and its own Q4_0 of the first. Everything is installed, and llama.cpp built, below
# target/ (some GB, a quarter of an hour on two cores). Last line: `ratio R`, ours in MXFP4 over the fastest of the others,
# medians over the rounds.
set -euo pipefail
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
folder=${MXT_PEERS_DECODE:-$repository/target/peers-decode}
venv=${MXT_PEERS_VENV:-$repository/target/peers-venv}
mkdir -p "$folder"
if [[ ! -x $venv/bin/python ]]; then
    python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet --disable-pip-version-check torch==2.11.0 numpy
fi
"$venv/bin/python" -c 'import transformers, cmake, ninja' 2> /dev/null ||
    "$venv/bin/pip" install --quiet --disable-pip-version-check 'transformers<5' cmake ninja

cd "$folder"
llama=$folder/source/vendor/llama.cpp
if [[ ! -d source ]]; then
    "$venv/bin/pip" download --quiet --no-deps --no-binary llama-cpp-python llama-cpp-python==0.3.36
    tar xzf llama_cpp_python-*.tar.gz && mv llama_cpp_python-*/ source
fi
PATH=$venv/bin:$PATH
[[ -x build/bin/llama-quantize ]] || {
    cmake -S "$llama" -B build -G Ninja -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF -DLLAMA_BUILD_TESTS=OFF \
        -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TOOLS=ON -DLLAMA_OPENSSL=OFF > cmake.log 2>&1
    cmake --build build --target llama-bench llama-quantize > build.log 2>&1 || { tail -n 30 build.log; exit 1; }
}

cargo build --release --manifest-path "$repository/Cargo.toml" -p mxtrain 2> /dev/null
mxtrain=${CARGO_TARGET_DIR:-$repository/target}/release/mxtrain
if [[ ! -d model ]]; then
    "$mxtrain" prepare "$repository/README.md" --out tokens --tokenizer gpt2
    "$mxtrain" train --device cpu --data tokens --out model --layers 12 --heads 12 --channels 768 --context 1024 \
        --sequence-length 64 --batch-size 1 --steps 1 --eval-batches 1 > train.log 2>&1
fi
for weights in f16 bf16 mxfp4; do
    [[ -f $weights.gguf ]] || "$mxtrain" export model $weights.gguf --weights $weights
done
[[ -f q4_0.gguf ]] || build/bin/llama-quantize f16.gguf q4_0.gguf Q4_0 > quantize.log 2>&1
exec "$venv/bin/python" "$repository/benches/peers/decode.py" --ours "$mxtrain" "$@"
