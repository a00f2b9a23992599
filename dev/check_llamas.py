#!/usr/bin/env python3
"""Takes folders of llama, mistral, qwen2 and qwen3 from transformers to this library and back: tensors have
to be equal, and logits near.

Usage: MXFP4TRAIN_LIBRARY=target/release/libmxfp4train.so PYTHONPATH=bindings/python/src \\
       python3 dev/check_llamas.py
Needs cffi, numpy, torch and transformers. Prints the largest difference of a logit of each.
"""
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import mxfp4train as mxt

BOUND = 1e-4
LENGTH = 80
SIZES = dict(
    vocab_size=101, max_position_embeddings=96, hidden_size=48, num_attention_heads=6,
    num_key_value_heads=2, num_hidden_layers=3, intermediate_size=70, bos_token_id=0, eos_token_id=0,
    pad_token_id=None, initializer_range=0.3,
)
STRETCHED = dict(
    rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
MODELS = [
    ("llama", {}),
    ("llama", dict(tie_word_embeddings=True, rope_parameters=STRETCHED)),
    ("llama", dict(rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=1e4))),
    ("mistral", dict(sliding_window=None, head_dim=12)),
    ("qwen2", dict(num_key_value_heads=1)),
    ("qwen3", dict(head_dim=20, tie_word_embeddings=True)),
]


def off(kind, keys, dtype):
    """The largest difference of a logit, of the model that has been there and back."""
    folder = Path(tempfile.mkdtemp())
    config = AutoConfig.for_model(kind, **(SIZES | keys))
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    # In several files, as large models are.
    model.to(dtype).save_pretrained(folder / "there", max_shard_size="60KB")
    ours = mxt.Model.load(mxt.Engine(device="cpu"), folder / "there")
    ours.save(folder / "back")
    there, back = (
        AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32).eval()
        for name in ("there", "back")
    )
    assert type(there) is type(back)
    before, after = there.state_dict(), back.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before), kind
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, LENGTH).astype(np.uint32)
    logits = back(torch.tensor(tokens.astype(np.int64))[None]).logits[0].detach().numpy()
    found = np.stack([ours.next_logits(tokens[: t + 1]) for t in range(LENGTH)])
    return np.abs(found - logits).max(), np.abs(logits).max()


def main():
    torch.manual_seed(1)
    worst = 0.0
    for kind, keys in MODELS:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            found, largest = off(kind, keys, dtype)
            print(f"{kind} in {dtype}: {found:.1e}, of logits up to {largest:.1f}")
            worst = max(worst, found)
    if not worst <= BOUND:
        sys.exit(f"expected at most {BOUND}")


main()
