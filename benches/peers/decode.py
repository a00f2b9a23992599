"""The rounds of decode.sh, in the folder that it has filled: a model, its GGUF files, llama.cpp's programs."""

import argparse
import json
import os
import re
import statistics
import subprocess
import time

import torch
from transformers import AutoModelForCausalLM


def ours(options, weights):
    line = f"generate --checkpoint model --device cpu --threads {options.threads} --weights {weights} --greedy"
    line += f" --ignore-eos --tokens {options.tokens} --prompt The"
    out = subprocess.run([options.ours, *line.split()], capture_output=True, text=True, check=True)
    return float(re.search(r"([\d.]+) tokens/s", out.stderr)[1])


def llama(options, file):
    line = f"build/bin/llama-bench -m {file}.gguf -p 0 -n {options.tokens} -t {options.threads} -r 1 -ngl 0 -o json"
    out = subprocess.run(line.split(), capture_output=True, text=True, check=True)
    return json.loads(out.stdout)[0]["avg_ts"]


def transformers(options, dtype):
    model = AutoModelForCausalLM.from_pretrained("model", dtype=dtype).eval()
    prompt = torch.tensor([[464]])

    def run(tokens):
        start = time.perf_counter()
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            pad_token_id=0,
        )
        return time.perf_counter() - start

    run(2)
    # Without what comes before the second token.
    first = run(1)
    return (options.tokens - 1) / (run(options.tokens) - first)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ours", required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    ways = {f"ours {weights}": (ours, weights) for weights in ("f32", "bf16", "mxfp4")}
    ways |= {f"transformers {name}": (transformers, getattr(torch, name)) for name in ("float32", "bfloat16")}
    ways |= {f"llama.cpp {file}": (llama, file) for file in ("f16", "bf16", "q4_0", "mxfp4")}
    rates = {name: [] for name in ways}
    for _ in range(options.rounds):
        for name, (measure, what) in ways.items():
            rates[name].append(measure(options, what))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    for name, rate in medians.items():
        low, high = min(rates[name]), max(rates[name])
        print(f"{name:24} {rate:7.1f} tokens/s ({low:.1f} to {high:.1f})")
    others = max(rate for name, rate in medians.items() if not name.startswith("ours"))
    print(f"ratio {medians['ours mxfp4'] / others:.2f}")


if __name__ == "__main__":
    main()
