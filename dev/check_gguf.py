#!/usr/bin/env python3
"""Compares GGUF files of `mxtrain export` with what others make of the same checkpoint.

Usage: python3 dev/check_gguf.py OURS.gguf THEIRS.gguf        (needs gguf, numpy)
       python3 dev/check_gguf.py OURS.gguf FOLDER             (and torch 2.8 or newer, safetensors, transformers)

THEIRS is llama.cpp's own conversion: tensors have to be the same, byte for byte, and so have all keys
that say what is computed. FOLDER is, of a file in MXFP4, an export in MXFP4 as safetensors: what the
blocks of both stand for has to be the same numbers, which the gguf package reads from one and PyTorch from
the other. Of a file in f32 FOLDER is the model: transformers has to compute the same logits from both, where
it reads all of such a file: no positions as Llama 3.1's, heads of Qwen3's 128 channels alone, GPT-2's 1024
positions alone.
"""
import pathlib
import sys

import gguf
import numpy

# What no two programs call the same: names, and ends of texts that GPT-2's tokens have once.
FREE = ("general.", "GGUF.", "tokenizer.ggml.unknown_token_id")
# Made of powers, of which libraries have other last bits.
POWERS = "rope_freqs.weight"
BOUND = 1e-4


def read(path):
    reader = gguf.GGUFReader(path)
    keys = {name: field.contents() for name, field in reader.fields.items()}
    return keys, {tensor.name: tensor for tensor in reader.tensors}


def whole(keys):
    """Adds what llama.cpp takes for keys that are not there, of which we write more than its converter."""
    of, tokens = keys["general.architecture"], "tokenizer.ggml"
    size = keys[f"{of}.embedding_length"] // keys[f"{of}.attention.head_count"]
    is_scored = keys[f"{tokens}.model"] == "llama"
    usual = {f"{tokens}.add_{which}_token": False for which in ("eos", "sep")}
    usual |= {f"{tokens}.add_bos_token": is_scored, f"{tokens}.add_space_prefix": is_scored}
    if of != "gpt2":
        size = keys.get(f"{of}.attention.key_length", size)
        for name in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
            usual[f"{of}.{name}"] = size
        usual[f"{of}.vocab_size"] = len(keys[f"{tokens}.tokens"])
    return usual | keys


def check_file(ours, theirs):
    (our_keys, our_tensors), (their_keys, their_tensors) = read(ours), read(theirs)
    our_keys, their_keys = whole(our_keys), whole(their_keys)
    for name in sorted(our_keys.keys() | their_keys.keys()):
        if not name.startswith(FREE) and our_keys.get(name) != their_keys.get(name):
            sys.exit(f"{name}: {our_keys.get(name)!r:.200}, theirs {their_keys.get(name)!r:.200}")
    if our_tensors.keys() != their_tensors.keys():
        sys.exit(f"other tensors: {sorted(our_tensors.keys() ^ their_tensors.keys())}")
    for name, tensor in our_tensors.items():
        other = their_tensors[name]
        if tensor.tensor_type != other.tensor_type or list(tensor.shape) != list(other.shape):
            sys.exit(f"{name}: {tensor.tensor_type} {tensor.shape}, theirs {other.tensor_type} {other.shape}")
        if name == POWERS:
            same = numpy.allclose(tensor.data, other.data, rtol=2e-6, atol=0)
        else:
            same = tensor.data.tobytes() == other.data.tobytes()
        if not same:
            sys.exit(f"{name}: other numbers")
    print(f"{ours}: {len(our_tensors)} tensors and all keys are those of llama.cpp's converter")


def check_logits(ours, folder):
    import torch
    from transformers import AutoModelForCausalLM

    path = pathlib.Path(ours)
    ours = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = torch.randint(theirs.config.vocab_size, (2, theirs.config.max_position_embeddings))
    with torch.no_grad():
        error = (ours(tokens).logits - theirs(tokens).logits).abs().max().item()
    if not error <= BOUND:
        sys.exit(f"{path}: logits differ from those of {folder} by {error:.1e}")
    print(f"{path}: transformers computes the logits of {folder} within {error:.1e}, by {type(ours).__name__}")


def check_blocks(ours, folder):
    import torch
    from safetensors.torch import load_file

    stored = load_file(pathlib.Path(folder) / "model.safetensors")
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    keys, tensors = read(ours)
    of = keys["general.architecture"]
    prefix, short = "model.layers", {
        "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    if of == "gpt2":
        prefix, short = "transformer.h", {
            "attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj", "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj",
        }
    blocks = 0
    for name, tensor in tensors.items():
        if tensor.tensor_type != gguf.GGMLQuantizationType.MXFP4 or name == "output.weight":
            continue
        _, layer, part, _ = name.split(".")
        codes = f"{prefix}.{layer}.{short[part]}.weight"
        pairs = stored[codes].view(torch.uint8)
        elements = values[torch.stack([pairs & 15, pairs >> 4], -1).flatten(1).int()]
        scales = torch.exp2(stored[f"{codes}.scales"].view(torch.uint8).float() - 127)
        expected = elements * scales.repeat_interleave(32, 1)
        if of == "llama" and part in ("attn_q", "attn_k"):
            halves = expected.view(-1, 2, keys["llama.attention.key_length"] // 2, expected.shape[1])
            expected = halves.transpose(1, 2).reshape(expected.shape)
        found = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if not numpy.array_equal(found, expected.numpy()):
            sys.exit(f"{name}: other numbers than {codes}")
        blocks += found.size // 32
    if blocks == 0:
        sys.exit(f"{ours}: no tensor in MXFP4")
    print(f"{ours}: {blocks} blocks stand for the numbers of those in {folder}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    check = check_file
    if pathlib.Path(sys.argv[2]).is_dir():
        is_f32 = read(sys.argv[1])[0]["general.file_type"] == 0
        check = check_logits if is_f32 else check_blocks
    check(*sys.argv[1:])
