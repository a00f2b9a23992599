#!/usr/bin/env python3
"""Makes an oracle of any size, of the form of tests/oracle/gpt2-tiny, with PyTorch and transformers.

Usage: python3 dev/make_oracle.py OUT VOCAB SEQUENCE CHANNELS HEADS LAYERS BATCH CONTEXT [KEY=JSON..]
       with keys of GPT2Config, such as n_inner=37 or tie_word_embeddings=false, or with
       model_type='"llama"', mistral, qwen2 or qwen3 and keys of its class, intermediate_size for one
Then:  MXT_ORACLE=OUT cargo test --test oracle
"""
import json
import sys

import torch
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM

SETTINGS = (
    "AdamW lr 1e-3 betas 0.9 0.95 eps 1e-8; weight_decay 0.1 on tensors of 2 or more dimensions, "
    "0 on others; gradients clipped to global norm 0.5 first; same batch each step"
)


def main():
    if len(sys.argv) < 9:
        sys.exit(__doc__)
    out = sys.argv[1]
    vocab, length, channels, heads, layers, batch, context = map(int, sys.argv[2:9])
    keys = dict(pair.split("=", 1) for pair in sys.argv[9:])
    keys = {key: json.loads(value) for key, value in keys.items()}
    torch.manual_seed(vocab)
    sizes = dict(
        n_positions=context, n_embd=channels, n_head=heads, n_layer=layers, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0,
    )
    kind = keys.pop("model_type", "gpt2")
    if kind != "gpt2":
        sizes = dict(
            max_position_embeddings=context, hidden_size=channels, num_attention_heads=heads,
            num_hidden_layers=layers, pad_token_id=None,
        )
    settings = dict(vocab_size=vocab, bos_token_id=0, eos_token_id=0) | sizes | keys
    config = AutoConfig.for_model(kind, **settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():  # so that no bias is 0 and no norm's weight 1
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(out)

    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8)
    tokens = torch.randint(vocab, (batch, length + 1))
    tensors, metadata = {"tokens": tokens.int()}, {"optimizer": SETTINGS}
    for step in range(3):
        logits = model(tokens[:, :-1]).logits
        targets = tokens[:, 1:].flatten()
        losses = cross_entropy(logits.flatten(0, 1), targets, reduction="none").view(batch, length)
        optimizer.zero_grad()
        losses.mean().backward()
        if step == 0:
            tensors["losses"] = losses.detach().clone()
            tensors["logits_last"] = logits[:, -1].detach().clone()
            for name, parameter in model.named_parameters():
                tensors[f"grad.{name}"] = parameter.grad.clone()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        metadata[f"loss_{step}"] = f"{losses.mean().item():.8f}"
        metadata[f"grad_norm_{step}"] = f"{norm.item():.8f}"
        optimizer.step()
    for name, parameter in model.named_parameters():
        tensors[f"after3.{name}"] = parameter.detach().clone()
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, f"{out}/expected.safetensors", metadata=metadata)


if __name__ == "__main__":
    main()
