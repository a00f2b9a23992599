#!/usr/bin/env python3
"""Makes FOLDER/losses.safetensors, which tests/parts.rs compares with: what PyTorch and transformers
make of masked, weighted and smoothed losses of the model in FOLDER, a Hugging Face gpt2 folder.

Usage: python3 dev/make_loss_oracle.py FOLDER BATCH SEQUENCE
Then:  MXT_LOSS_ORACLE=FOLDER cargo test --test parts
"""
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy
from transformers import GPT2LMHeadModel


def main():
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    folder, batch, length = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    model = GPT2LMHeadModel.from_pretrained(folder, attn_implementation="eager").float()
    for dropout in model.modules():
        if isinstance(dropout, torch.nn.Dropout):
            dropout.p = 0.0
    torch.manual_seed(batch * length)
    vocab = model.config.vocab_size
    tokens = torch.randint(vocab, (batch, length))
    tensors = {"tokens": tokens.int()}

    def keep(name, loss):
        model.zero_grad()
        loss.backward()
        tensors[f"{name}.loss"] = loss.detach().clone().reshape(1)
        for parameter, value in model.named_parameters():
            tensors[f"{name}.grad.{parameter}"] = value.grad.clone()

    # As transformers masks: a label of -100 counts for nothing, and position t predicts label t + 1.
    labels = torch.where(torch.rand(batch, length) < 0.4, -100, tokens)
    labels[0] = -100  # a sequence of padding
    tensors["labels"] = labels.int()
    keep("masked", model(tokens, labels=labels).loss)

    targets = torch.randint(vocab, (batch, length))
    tensors["targets"] = targets.int()

    def losses(**settings):
        logits = model(tokens).logits.flatten(0, 1)
        return cross_entropy(logits, targets.flatten(), reduction="none", **settings)

    weights = torch.rand(batch * length) * 2
    tensors["weights"] = weights.clone()
    tensors["losses"] = losses().detach().clone()
    keep("weighted", (weights * losses()).sum() / weights.sum())
    keep("smoothed", losses(label_smoothing=0.1).mean())

    # Two batches as one step: transformers' num_items_in_batch.
    halves = [slice(0, batch // 2), slice(batch // 2, batch)]
    items = (labels[:, 1:] != -100).sum()
    total = sum(
        cross_entropy(
            model(tokens[half]).logits[:, :-1].flatten(0, 1), labels[half, 1:].flatten(),
            reduction="sum", ignore_index=-100,
        )
        for half in halves
    )
    keep("accumulated", total / items)
    versions = {"made_by": f"PyTorch {torch.__version__}"}
    save_file(tensors, folder / "losses.safetensors", metadata=versions)


main()
