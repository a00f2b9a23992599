#!/usr/bin/env bash
# Shows that llama.cpp runs the models of `mxtrain export`: trains small ones on GPT-2's tokens and on bytes, GPT-2s and
# models of the classes Llama, Qwen2 and Qwen3, exports them to GGUF, and compares the files with those of llama.cpp's
# own converter and the texts that both programs write.
#
# In f32 and f16 the texts have to be the same. In bf16 and MXFP4 both round what they multiply weights with, each in
# its own way, so that a token may win in one that is a close second in the other: at least half of them have to be.
#
# Usage: dev/llama-cpp.sh [FOLDER]    (target/llama-cpp; ten minutes on two cores and 2 GB, once)
#
# Needs Linux on x86-64, pip, a C++ compiler, and MXTRAIN or cargo. llama.cpp comes from the source distribution of
# llama-cpp-python. PYTHON may name a Python that has torch (2.8 or newer), transformers, gguf,
# sentencepiece, protobuf, cmake and ninja.
set -euo pipefail
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
folder=$(realpath -m "${1:-$repository/target/llama-cpp}")
steps=${STEPS:-600}
prompts=('The kernel' 'MXFP4 products run' 'A step allocates' 'Weights are')
mkdir -p "$folder"
cd "$folder"

mxtrain=${MXTRAIN:-}
if [[ -z $mxtrain ]]; then
    cargo build --release --manifest-path "$repository/Cargo.toml" -p mxtrain
    mxtrain=${CARGO_TARGET_DIR:-$repository/target}/release/mxtrain
fi

python=${PYTHON:-}
if [[ -z $python ]]; then
    python=$folder/venv/bin/python
    if [[ ! -x $python ]]; then
        python3 -m venv venv
        "$python" -m pip install -q cmake ninja 'transformers<5' 'numpy<2.3' sentencepiece 'protobuf<7' jinja2 networkx sympy gguf
        "$python" -m pip install -q --no-deps torch==2.11.0
    fi
fi
# PyTorch's own build wants 2 GB of CUDA libraries, none of which the converter uses. Stand-ins do whose every function
# says that there is no device (100).
stubs=
if ! "$python" -c 'import torch' 2> /dev/null; then
    stubs=$folder/stubs
    mkdir -p "$stubs"
    torch=$("$python" -c 'import importlib.util as u; print(u.find_spec("torch").submodule_search_locations[0])')
    nm -D --undefined-only "$torch"/lib/*.so 2> /dev/null | sed -n 's/^ *U \(_*\(cu\|nccl\|nv\)[A-Za-z0-9_]*\).*/\1/p' |
        sort -u | sed 's/.*/int &(void) { return 100; }/' > "$stubs/functions.c"
    for library in "$torch"/lib/*.so*; do
        readelf -d "$library" 2> /dev/null | sed -n 's/.*(NEEDED).*\[\(lib\(cu\|nccl\|nv\)[^]]*\)\].*/\1/p'
    done | sort -u | while read -r name; do
        version=$(readelf -V "$torch"/lib/*.so 2> /dev/null |
            awk -v name="$name" '/File:/ { on = $5 == name } on && /Name:/ { found = $3 } END { print found }')
        echo "${version:-$name} { *; };" > "$stubs/versions"
        cc -w -shared -fPIC -fno-builtin -o "$stubs/$name" -Wl,-soname,"$name" -Wl,--version-script="$stubs/versions" \
            "$stubs/functions.c"
    done
fi

if [[ ! -d source ]]; then
    "$python" -m pip download -q --no-deps --no-binary llama-cpp-python llama-cpp-python==0.3.36
    tar xzf llama_cpp_python-*.tar.gz && mv llama_cpp_python-*/ source
fi
llama=$folder/source/vendor/llama.cpp
PATH=$(dirname "$python"):$PATH
[[ -x build/bin/llama-simple ]] || {
    cmake -S "$llama" -B build -G Ninja -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF -DLLAMA_BUILD_TESTS=OFF \
        -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_EXAMPLES=ON -DLLAMA_OPENSSL=OFF > cmake.log 2>&1
    cmake --build build --target llama-simple > build.log 2>&1 || { tail -n 30 build.log; exit 1; }
}

# check FILE OTHER: whether a GGUF file of ours has what it should
check() {
    LD_LIBRARY_PATH=$stubs "$python" "$repository/dev/check_gguf.py" "$@"
}

# convert FOLDER TYPE: the file of the export is that of llama.cpp's converter
convert() {
    LD_LIBRARY_PATH=$stubs "$python" "$llama/convert_hf_to_gguf.py" "$1" --outtype "$2" --outfile "$1-$2-theirs.gguf" \
        > "convert-$1-$2.log" 2>&1 || { tail -n 5 "convert-$1-$2.log"; exit 1; }
    check "$1-$2.gguf" "$1-$2-theirs.gguf"
}

# compare FOLDER TYPE: both texts for every prompt
compare() {
    local prompt weights=$2 same=0
    # Numbers of f16 are those of f32 here but for the last bits.
    [[ $2 != f16 ]] || weights=f32
    for prompt in "${prompts[@]}"; do
        "$mxtrain" generate --device cpu --checkpoint "$1" --weights "$weights" --greedy --tokens 32 \
            --prompt "$prompt" > ours.txt 2> ours.log
        OMP_THREAD_LIMIT=2 build/bin/llama-simple -m "$1-$2.gguf" -n 32 "$prompt" > theirs.txt 2> llama.log
        if cmp -s ours.txt theirs.txt; then
            same=$((same + 1))
            echo "$1 as $2: the same text: $(tr '\n' '/' < ours.txt)"
        else
            tail -n +1 ours.txt theirs.txt
        fi
    done
    echo "$1 as $2: $same of ${#prompts[@]} texts are the same"
    case $2 in
        f32 | f16) ((same == ${#prompts[@]})) ;;
        *) ((2 * same >= ${#prompts[@]})) ;;
    esac
}

# train NAME TOKENIZER STEPS OPTIONS..
train() {
    # Without runs of blanks, which a small model would write all the time. NOTE: a text that never changes. With
    # some texts the model finds two tokens alike but for a hundredth, and llama.cpp, which keeps keys and values in
    # f16, the other one of them likelier.
    tr -s ' \n-' < "$repository/tests/text/prose.txt" > text.txt
    "$mxtrain" prepare text.txt --out "tokens-$2" --tokenizer "$2"
    "$mxtrain" train --device cpu --data "tokens-$2" --out "$1" --overwrite --batch-size 2 --lr 3e-3 --steps "$3" "${@:4}" \
        > "train-$1.log" 2>&1
}

# class NAME TOKENIZER VOCABULARY KEYS..: a model of one of transformers' classes, trained on from other weights
class() {
    LD_LIBRARY_PATH=$stubs "$python" "$repository/dev/make_oracle.py" "$1-first" "$3" 32 64 4 2 1 128 \
        num_key_value_heads=2 intermediate_size=192 "${@:4}" > "class-$1.log" 2>&1
    train "$1" "$2" "$steps" --init-from "$1-first"
}

train gpt2 gpt2 "$steps" --layers 2 --channels 64 --context 128 --vocab-size 50304
# Its converter knows tokenizers by their tokens of one text, and that of bytes is not on its list.
train bytes bytes "$steps" --layers 2 --channels 64 --context 128
# Pairs of q and k change places, in heads that are wider than the model.
class llama gpt2 50304 'model_type="llama"' head_dim=24 tie_word_embeddings=true bos_token_id=50256 eos_token_id=50256
class stretched bytes 256 'model_type="llama"' 'rope_parameters={"rope_type": "llama3", "rope_theta": 10000.0,
    "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}'
class qwen2 bytes 256 'model_type="qwen2"'
# The only heads that transformers' reader of GGUF knows.
class qwen3 bytes 256 'model_type="qwen3"' head_dim=128 tie_word_embeddings=true
for model in gpt2 bytes llama stretched qwen2 qwen3; do
    for type in f32 f16 bf16 mxfp4; do
        "$mxtrain" export "$model" "$model-$type.gguf" --weights $type --overwrite
        [[ ! $model =~ ^(gpt2|llama)$ || $type == mxfp4 ]] || convert $model $type
        compare $model $type
    done
    [[ ! $model =~ ^qwen ]] || check "$model-f32.gguf" "$model"
    "$mxtrain" export "$model" "$model-mxfp4" --weights mxfp4 --overwrite
    check "$model-mxfp4.gguf" "$model-mxfp4"
done
