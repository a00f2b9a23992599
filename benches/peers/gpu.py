"""PyTorch's side of dev/gpu/peers.sh: a training step of a GPT-2 or a Llama on a GPU, in turn with our binary.

torch.compile, bf16 autocast, PyTorch's flash attention, fused AdamW, TF32 for what stays in f32; for
small models also with CUDA graphs (mode "reduce-overhead"), of which the better counts. With --fp8
linear layers are those of fp8.py, and blocks are compiled one by one, which takes seconds: all of 24
blocks take minutes. Prints tokens a second and peak memory of each, and `ratio R` (ours over
PyTorch's) for each recipe. A recipe may end in what is recomputed, as in bf16/pointwise.
"""

import argparse
import math
import os
import re
import statistics
import subprocess
import time

import fp8
import torch
from gpt import GPT, optimizer_of, step_of
from llama import Llama
from torch import nn

# layers, channels, heads, batch, sequence, vocabulary: the same as benches/train_step.rs.
MODELS = {
    "d6": (6, 384, 6, 8, 256, 128),
    "d12": (12, 768, 12, 1, 512, 50304),
    "124M": (12, 768, 12, 32, 1024, 50304),
    "345M": (24, 1024, 16, 16, 1024, 50304),
    "1.3B": (24, 2048, 16, 8, 1024, 50304),
}
# With kv heads behind the heads, and the width of the MLP.
LLAMAS = {
    "llama-350M": (24, 1024, 16, 4, 2816, 8, 2048, 32000),
    "llama-1.1B": (22, 2048, 32, 4, 5632, 4, 2048, 32000),
}


def pytorch(shape, steps, mode, linear=nn.Linear):
    """Median tokens a second, and the peak of what PyTorch took from the GPU, in GiB."""
    *sizes, batch, length, vocab = shape
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    kind = GPT if len(sizes) == 3 else Llama
    model = kind(*sizes, length, vocab, linear).cuda()
    optimizer = optimizer_of(model)
    if linear is nn.Linear:
        compiled = torch.compile(model, mode=mode)
    else:
        compiled = model
        for block in model.blocks:
            block.compile(mode=mode)
        model.loss = torch.compile(model.loss, mode=mode)

    step = step_of(model, compiled, optimizer, (batch, length, vocab))
    for _ in range(3):  # compile, and allocate the moments
        loss = step()
    assert math.isfinite(loss.item())
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        loss = step()
        loss.item()
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_reserved() / 2**30
    torch._dynamo.reset()
    return batch * length / statistics.median(seconds), peak


def watched(command):
    """Output of a command, and the most memory that it took from the GPU by the driver's count."""
    before = torch.cuda.mem_get_info()[0]
    least = before
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    while process.poll() is None:
        least = min(least, torch.cuda.mem_get_info()[0])
        time.sleep(0.02)
    return process.stdout.read(), (before - least) / 2**30


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", choices=[*MODELS, *LLAMAS], default="124M")
    parser.add_argument("--recipes", default="bf16,mxfp4-rht-sr")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--fp8", action="store_true")
    parser.add_argument("--ours", required=True)
    options = parser.parse_args()
    modes = ["default"] + ["reduce-overhead"] * options.model.startswith("d")
    linear, what = nn.Linear, "bf16"
    shape = (MODELS | LLAMAS)[options.model]
    if options.fp8:
        fp8.check()
        modes, linear, what = ["default"], fp8.Linear, "fp8"
    rate, peak = max(pytorch(shape, options.steps, mode, linear) for mode in modes)
    torch.cuda.empty_cache()
    name = torch.cuda.get_device_name()
    print(f"{options.model} on {name}, PyTorch {torch.__version__}")
    print(f"{'pytorch compile ' + what:24} {rate:9.0f} tokens/s  {peak:6.1f} GiB", flush=True)
    for recipe in options.recipes.split(","):
        name, _, recompute = recipe.partition("/")
        os.environ.update(MXT_BENCH_DEVICE="cuda", MXT_BENCH_RECOMPUTE=recompute or "nothing")
        output, ours_peak = watched([options.ours, options.model, name])
        found = re.search(r"(\d+) tokens/s", output)
        if not found:
            print(f"ours {recipe}: no figure\n{output}")
            continue
        ours_rate = float(found[1])
        print(f"{'ours ' + recipe:24} {ours_rate:9.0f} tokens/s  {ours_peak:6.1f} GiB", end="  ")
        print(f"ratio {ours_rate / rate:.3f}")


if __name__ == "__main__":
    main()
