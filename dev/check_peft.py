#!/usr/bin/env python3
"""Checks that PEFT reads adapters of this library, and that it computes with them what this library
does: logits of the base model with them, and of the merged one. And that this library computes with
adapters that PEFT has made of a Llama what PEFT does.

Usage: MXFP4TRAIN_LIBRARY=target/release/libmxfp4train.so PYTHONPATH=bindings/python/src \\
       python3 dev/check_peft.py
Needs cffi, numpy, torch, transformers and peft. Prints the largest difference of a logit.
"""
import sys
import tempfile
from pathlib import Path

import numpy as np
import peft
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

import mxfp4train as mxt

SHAPE = {"vocab_size": 61, "context_length": 24, "layers": 3, "heads": 2, "channels": 32}
BOUND = 1e-4


def main():
    folder = Path(tempfile.mkdtemp())
    gpt2 = mxt.Model(mxt.Engine(), **SHAPE)
    gpt2.save(folder / "base")
    worst = ours_to_peft(folder, gpt2, [["attn.c_attn"], ["attn.c_proj", "mlp.c_fc"], ["mlp.c_proj"]])
    torch.manual_seed(3)
    sizes = dict(
        vocab_size=61, max_position_embeddings=24, num_hidden_layers=2, hidden_size=32,
        num_attention_heads=4, num_key_value_heads=2, intermediate_size=40, bos_token_id=0,
        eos_token_id=0, initializer_range=0.2,
    )
    for config in [LlamaConfig(**sizes), Qwen2Config(**sizes, tie_word_embeddings=True)]:
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / "base")
        base = mxt.Model.load(mxt.Engine(), folder / "base")
        worst = max(worst, ours_to_peft(folder, base, [["attn.c_attn"], ["attn.c_proj", "mlp.c_fc"]]))
        for targets in [["q_proj", "v_proj"], ["k_proj", "down_proj"], "all-linear"]:
            worst = max(worst, peft_to_ours(folder, base, targets))
    if not worst <= BOUND:
        sys.exit(f"expected at most {BOUND}")


def peft_to_ours(folder, base, targets):
    """The largest difference of a logit with adapters that PEFT has made."""
    theirs = AutoModelForCausalLM.from_pretrained(folder / "base")
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=targets, init_lora_weights=False)
    theirs = peft.get_peft_model(theirs, config).eval()
    theirs.save_pretrained(folder / "theirs")
    adapted = base.load_lora(folder / "theirs")
    tokens = np.random.default_rng(5).integers(0, 61, 24)
    logits = theirs(torch.tensor(tokens)[None]).logits[0].detach().numpy()
    ours = np.stack([adapted.next_logits(tokens[: t + 1].astype(np.uint32)) for t in range(24)])
    off = np.abs(ours - logits).max() / np.abs(logits).max()
    print(f"of PEFT, {targets}: {off:.1e} of the largest logit")
    return off


def ours_to_peft(folder, base, all_layers):
    """The largest difference of a logit with adapters of ours, alone and merged."""
    rng = np.random.default_rng(7)
    worst = 0.0
    for layers in [*all_layers, mxt.LORA_LAYERS]:
        adapted = base.with_lora(5, alpha=12, layers=layers)
        trainer = mxt.Trainer(adapted, batch_size=4, lr=3e-2, recipe="fp32")
        data = mxt.Dataset((rng.integers(0, 59, 4000) // 3).astype(np.uint32))
        for _ in trainer.steps(data, 20):
            pass
        place = folder / "-".join(layers)
        adapted.save_lora(place)
        adapted.merge_lora().save(folder / "merged")

        base_model = AutoModelForCausalLM.from_pretrained(folder / "base").eval()
        theirs = AutoModelForCausalLM.from_pretrained(folder / "base")
        merged = AutoModelForCausalLM.from_pretrained(folder / "merged")
        theirs = peft.PeftModel.from_pretrained(theirs, str(place)).eval()
        tokens = rng.integers(0, 61, 24)
        batch = torch.tensor(tokens)[None]
        plain = base_model(batch).logits[0].detach().numpy()
        found = [model(batch).logits[0].detach().numpy() for model in (theirs, merged.eval())]
        ours = np.stack([adapted.next_logits(tokens[: t + 1].astype(np.uint32)) for t in range(24)])
        moved = np.abs(ours - plain).max()
        off = max(np.abs(ours - logits).max() for logits in found)
        print(f"{', '.join(layers)}: {off:.1e} of logits that adapters moved by {moved:.1e}")
        worst = max(worst, off)
    return worst


main()
