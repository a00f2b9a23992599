"""Several GPUs: mxtrain on each of them alone, then on all, and PyTorch's DDP on as many.

Each rank makes one micro-batch a step, the hardest case. Prints tokens a second by the median of a
step's time; `efficiency` is that over the sum of what each GPU does alone, at the same time as the
others, since no two are equally fast, `ratio` over DDP (bf16, torch.compile, fused AdamW, as in
gpu.py). Everything is run in turn, --rounds times, of which the best counts.
"""

import argparse
import json
import math
import os
import signal
import socket
import statistics
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
from gpt import GPT, optimizer_of, step_of
from gpu import MODELS
from torch.nn.parallel import DistributedDataParallel

WARM = 6


def ddp(rank, gpus, port, shape, steps, report):
    """One process of DDP; rank 0 writes the median of a step's time to `report`."""
    layers, channels, heads, batch, length, vocab = shape
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.cuda.set_device(rank)
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda", rank)
    dist.init_process_group("nccl", rank=rank, world_size=gpus, device_id=device)
    model = GPT(layers, channels, heads, length, vocab).cuda()
    optimizer = optimizer_of(model)
    compiled = torch.compile(DistributedDataParallel(model, device_ids=[rank]))
    torch.manual_seed(rank)

    step = step_of(model, compiled, optimizer, (batch, length, vocab))
    for _ in range(WARM):
        loss = step()
    assert math.isfinite(loss.item())
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        step().item()
        seconds.append(time.perf_counter() - start)
    if rank == 0:
        Path(report).write_text(str(statistics.median(seconds)))
    dist.barrier()
    dist.destroy_process_group()


def free_port():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def of_ddp(shape, gpus, steps):
    with tempfile.TemporaryDirectory() as folder:
        report = os.path.join(folder, "seconds")
        arguments = (gpus, free_port(), shape, steps, report)
        torch.multiprocessing.spawn(ddp, args=arguments, nprocs=gpus)
        return float(Path(report).read_text())


def records(log):
    """The whole lines of a log that is being written, of steps."""
    try:
        lines = Path(log).read_text().split("\n")[:-1]
    except FileNotFoundError:
        return []
    return [record for record in map(json.loads, lines) if "loss" in record]


def of_mxtrain(options, shape, where, steps):
    """Median seconds of a step, of its exchange that nothing hides, and MiB of GPUs in use."""
    layers, channels, heads, batch, length, vocab = shape
    with tempfile.TemporaryDirectory() as folder:
        log = os.path.join(folder, "log.jsonl")
        command = (
            f"{options.mxtrain} train --data {options.data} --out {folder}/out --log {log} "
            f"--layers {layers} --channels {channels} --heads {heads} --batch-size {batch} "
            f"--context {length} --vocab-size {vocab} --recipe {options.recipe} --lr 1e-4 "
            f"--optimizer {options.optimizer} "
            f"--warmup 5 --eval-every 0 --save-every 0 --steps 100000 {where}"
        )
        words = Path(folder, "words")
        with words.open("w") as to:
            process = subprocess.Popen(
                command.split(), stdout=subprocess.DEVNULL, stderr=to, start_new_session=True
            )
            until, used = time.monotonic() + 180, 0
            while process.poll() is None and time.monotonic() < until:
                if len(records(log)) > WARM + steps:
                    used = memory()
                    break
                time.sleep(0.2)
            else:
                print(f"mxtrain {where} did not come to {steps} steps:\n{words.read_text()}")
            # Killed, since to end in order is to save, which takes as long as all steps.
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        counted = records(log)[WARM : WARM + steps]
        if not counted:
            return math.inf, 0.0, 0
        median = statistics.median
        exchange = median(record.get("exchange_seconds", 0.0) for record in counted)
        return median(record["seconds"] for record in counted), exchange, used


def memory():
    """MiB that the driver says are in use, of the GPU that has most."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return max(map(int, subprocess.run(query, capture_output=True, text=True).stdout.split()))


def command_of(way, gpus):
    transport, *rest = way.split("+")
    return f"--gpus {gpus} --transport {transport}" + (" --shard-states" if rest else "")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", default="124M,345M,1.3B")
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count())
    parser.add_argument(
        "--ways", default="auto,auto+shards", help="transports, with +shards for --shard-states"
    )
    parser.add_argument("--optimizer", default="adamw,master=split")
    parser.add_argument("--recipe", default="fp8-mxfp4-rht-sr")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--mxtrain", required=True)
    parser.add_argument("--data", required=True, help="folder that `mxtrain prepare` made")
    parser.add_argument("--skip-ddp", action="store_true")
    options = parser.parse_args()
    gpus = options.gpus
    name = torch.cuda.get_device_name()
    what = f"{options.recipe}, {options.optimizer}"
    print(f"{gpus} x {name}, PyTorch {torch.__version__}, {what}", flush=True)
    ways = [command_of(way, gpus) for way in options.ways.split(",")]
    for model in options.models.split(","):
        shape = MODELS[model]
        tokens = shape[3] * shape[4]
        alone = [f"--device cuda:{gpu}" for gpu in range(gpus)]
        best, of_peer = {}, math.inf
        for _ in range(options.rounds):
            def run(where):
                found = of_mxtrain(options, shape, where, options.steps)
                best[where] = min(best.get(where, (math.inf, 0.0, 0)), found)

            with ThreadPoolExecutor() as pool:
                list(pool.map(run, alone))
            for where in ways:
                run(where)
            if not options.skip_ddp:
                of_peer = min(of_peer, of_ddp(shape, gpus, options.steps))
        sum_of_all = sum(tokens / best[where][0] for where in alone)
        peer = gpus * tokens / of_peer
        if peer:
            print(f"{model} {'DDP':32} {peer:9.0f} tokens/s", flush=True)
        for where in alone:
            print(f"{model} {where:32} {tokens / best[where][0]:9.0f} tokens/s", flush=True)
        for where in ways:
            seconds, exchange, used = best[where]
            rate = gpus * tokens / seconds
            print(
                f"{model} {where:32} {rate:9.0f} tokens/s, exchange {1e3 * exchange:.2f} ms of "
                f"{1e3 * seconds:.2f}, {used} MiB, efficiency {rate / sum_of_all:.3f}"
                + (f", ratio {rate / peer:.3f}" if peer else ""),
                flush=True,
            )


if __name__ == "__main__":
    main()
