#!/usr/bin/env python3
"""Makes FOLDER/lora, adapters as PEFT saves them, with expected.safetensors beside them, which
tests/lora.rs compares with: loss, gradients and logits of the model in FOLDER, a Hugging Face gpt2
folder, with these adapters, and the logits with them merged.

Usage: python3 dev/make_lora_oracle.py FOLDER BATCH SEQUENCE
Needs torch, transformers, peft and safetensors.
"""
import sys
from pathlib import Path

import peft
import torch
from safetensors.torch import save_file
from transformers import GPT2LMHeadModel


def main():
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    folder, batch, length = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    base = GPT2LMHeadModel.from_pretrained(folder, attn_implementation="eager").float()
    for dropout in base.modules():
        if isinstance(dropout, torch.nn.Dropout):
            dropout.p = 0.0
    torch.manual_seed(batch * length)
    # "c_proj" is attention's and the MLP's; the MLP's first layer has none.
    config = peft.LoraConfig(
        r=5, lora_alpha=12, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True,
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    tokens = torch.randint(base.config.vocab_size, (batch, length))
    tensors = {"tokens": tokens.int(), "length": torch.tensor([length]).int()}
    out = model(tokens, labels=tokens)
    out.loss.backward()
    tensors["loss"] = out.loss.detach().clone().reshape(1)
    tensors["logits"] = out.logits.detach().clone()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            name = name.removeprefix("base_model.model.").replace(".default.", ".")
            tensors[f"grad.{name}"] = parameter.grad.clone()
    model.save_pretrained(folder / "lora")
    (folder / "lora" / "README.md").unlink(missing_ok=True)
    merged = model.merge_and_unload()
    tensors["merged"] = merged(tokens).logits.detach().clone()
    versions = {"made_by": f"PyTorch {torch.__version__}, peft {peft.__version__}"}
    save_file(tensors, folder / "lora" / "expected.safetensors", metadata=versions)


main()
