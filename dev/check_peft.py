#!/usr/bin/env python3
"""Checks that PEFT reads adapters of this library, and that it computes with them what this library
does: logits of the base model with them, and of the merged one.

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
from transformers import GPT2LMHeadModel

import mxfp4train as mxt

SHAPE = {"vocab_size": 61, "context_length": 24, "layers": 3, "heads": 2, "channels": 32}
BOUND = 1e-4


def main():
    folder = Path(tempfile.mkdtemp())
    base = mxt.Model(mxt.Engine(), **SHAPE)
    base.save(folder / "base")
    rng = np.random.default_rng(7)
    worst = 0.0
    for layers in [["attn.c_attn"], ["attn.c_proj", "mlp.c_fc"], ["mlp.c_proj"], mxt.LORA_LAYERS]:
        adapted = base.with_lora(5, alpha=12, layers=layers)
        trainer = mxt.Trainer(adapted, batch_size=4, lr=3e-2, recipe="fp32")
        data = mxt.Dataset((rng.integers(0, 59, 4000) // 3).astype(np.uint32))
        for _ in trainer.steps(data, 20):
            pass
        place = folder / "-".join(layers)
        adapted.save_lora(place)
        adapted.merge_lora().save(folder / "merged")

        base_model = GPT2LMHeadModel.from_pretrained(folder / "base").eval()
        theirs = GPT2LMHeadModel.from_pretrained(folder / "base")
        merged = GPT2LMHeadModel.from_pretrained(folder / "merged")
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
    if not worst <= BOUND:
        sys.exit(f"expected at most {BOUND}")


main()
