#!/usr/bin/env python3
"""Compares GGUF files of `mxtrain export` with what others make of the same checkpoint.

Usage: python3 dev/check_gguf.py OURS.gguf THEIRS.gguf        (needs gguf, numpy)
       python3 dev/check_gguf.py OURS.gguf FOLDER             (and torch 2.8 or newer, safetensors)

THEIRS is llama.cpp's own conversion: tensors have to be the same, byte for byte, and so have all keys
that say what is computed. FOLDER is an export in MXFP4 as safetensors: what the blocks of both
stand for has to be the same numbers, which the gguf package reads from one and PyTorch from the other.
"""
import pathlib
import sys

import gguf
import numpy

# What no two programs call the same: names, and ends of texts that GPT-2's tokens have once.
FREE = ("general.", "GGUF.", "tokenizer.ggml.unknown_token_id")


def read(path):
    reader = gguf.GGUFReader(path)
    keys = {name: field.contents() for name, field in reader.fields.items()}
    return keys, {tensor.name: tensor for tensor in reader.tensors}


def check_file(ours, theirs):
    (our_keys, our_tensors), (their_keys, their_tensors) = read(ours), read(theirs)
    for name in sorted(our_keys.keys() | their_keys.keys()):
        if not name.startswith(FREE) and our_keys.get(name) != their_keys.get(name):
            sys.exit(f"{name}: {our_keys.get(name)!r:.200}, theirs {their_keys.get(name)!r:.200}")
    if our_tensors.keys() != their_tensors.keys():
        sys.exit(f"other tensors: {sorted(our_tensors.keys() ^ their_tensors.keys())}")
    for name, tensor in our_tensors.items():
        other = their_tensors[name]
        if tensor.tensor_type != other.tensor_type or list(tensor.shape) != list(other.shape):
            sys.exit(f"{name}: {tensor.tensor_type} {tensor.shape}, theirs {other.tensor_type} {other.shape}")
        if tensor.data.tobytes() != other.data.tobytes():
            sys.exit(f"{name}: other numbers")
    print(f"{ours}: {len(our_tensors)} tensors and all keys are those of llama.cpp's converter")


def check_folder(ours, folder):
    import torch
    from safetensors.torch import load_file

    stored = load_file(pathlib.Path(folder) / "model.safetensors")
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    short = {"attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj", "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}
    blocks = 0
    for name, tensor in read(ours)[1].items():
        if tensor.tensor_type != gguf.GGMLQuantizationType.MXFP4 or name == "output.weight":
            continue
        _, layer, part, _ = name.split(".")
        codes = f"transformer.h.{layer}.{short[part]}.weight"
        pairs = stored[codes].view(torch.uint8)
        elements = values[torch.stack([pairs & 15, pairs >> 4], -1).flatten(1).int()]
        scales = torch.exp2(stored[f"{codes}.scales"].view(torch.uint8).float() - 127)
        expected = elements * scales.repeat_interleave(32, 1)
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
    check = check_folder if pathlib.Path(sys.argv[2]).is_dir() else check_file
    check(*sys.argv[1:])
