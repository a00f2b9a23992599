"""PyTorch's side of cpu.sh: a step of a GPT-2 or a Llama four ways, in turn with our benchmark binary."""

import argparse
import math
import os
import re
import statistics
import subprocess
import time

import torch
from gpt import GPT, optimizer_of
from llama import Llama

# layers, channels, heads, batch, sequence, vocabulary: the same as benches/train_step.rs.
MODELS = {
    "d6": (6, 384, 6, 8, 256, 128),
    "d12": (12, 768, 12, 1, 512, 50304),
    # With kv heads behind the heads, and the width of the MLP.
    "llama-d6": (6, 384, 6, 2, 1024, 8, 256, 128),
}


def make_step(shape, compiled, bf16):
    *sizes, batch, length, vocab = shape
    torch.manual_seed(0)
    model = (GPT if len(sizes) == 3 else Llama)(*sizes, length, vocab)
    optimizer = optimizer_of(model)
    loss_of = torch.compile(model) if compiled else model

    def step():
        window = torch.randint(vocab, (batch, length + 1))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            loss = loss_of(window[:, :-1], window[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        assert math.isfinite(loss.item())

    return step


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", choices=MODELS, default="d6")
    parser.add_argument("--recipe", default="mxfp4-rht-sr")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--ours", required=True)
    options = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    shape = MODELS[options.model]
    tokens = shape[-3] * shape[-2]

    ways = {
        f"pytorch {'compile' if compiled else 'eager'} {'bf16' if bf16 else 'fp32'}": make_step(
            shape, compiled, bf16
        )
        for compiled in (True, False)
        for bf16 in (True, False)
    }
    for step in ways.values():
        step(), step()  # compile, and allocate the moments
    rates = {name: [] for name in ways} | {"ours": []}
    for _ in range(options.rounds):
        for name, step in ways.items():
            start = time.perf_counter()
            for _ in range(options.steps):
                step()
            rates[name].append(tokens * options.steps / (time.perf_counter() - start))
        ours = subprocess.run(
            [options.ours, options.model, options.recipe], capture_output=True, text=True, check=True
        )
        rates["ours"].append(float(re.search(r"(\d+) tokens/s", ours.stdout)[1]))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    for name, rate in medians.items():
        name = f"ours {options.recipe}" if name == "ours" else name
        print(f"{name:24} {rate:8.0f} tokens/s")
    print(f"ratio {medians['ours'] / max(v for k, v in medians.items() if k != 'ours'):.2f}")


if __name__ == "__main__":
    main()
