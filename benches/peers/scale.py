"""Several GPUs: mxtrain on each of them alone, then on all, and PyTorch's DDP and FSDP2 on as many.

Each rank makes one micro-batch a step, the hardest case, unless --accumulation says more, which
PyTorch's are not measured with. Prints tokens a second by the median of a step's time; `efficiency`
is that over the sum of what each GPU does alone, at the same time as the others, since no two are
equally fast, `ratio` over the best of PyTorch's (bf16, torch.compile, fused AdamW, as in gpu.py).
Everything is run in turn, --rounds times, of which the best counts.
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
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

WARM = 6


def in_ddp(model, rank):
    return torch.compile(DistributedDataParallel(model, device_ids=[rank]))


def in_fsdp(model, _rank):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in model.blocks:
        block.compile()
        fully_shard(block, mp_policy=policy)
    return fully_shard(model, mp_policy=policy)


WAYS = {"ddp": in_ddp, "fsdp": in_fsdp}


def peer(rank, way, gpus, port, shape, steps, report):
    """One process of PyTorch's; rank 0 writes the median of a step's time to `report`."""
    layers, channels, heads, batch, length, vocab = shape
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.cuda.set_device(rank)
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda", rank)
    dist.init_process_group("nccl", rank=rank, world_size=gpus, device_id=device)
    model = GPT(layers, channels, heads, length, vocab).cuda()
    shared = WAYS[way](model, rank)
    # Behind it, since what shards replaces the parameters.
    optimizer = optimizer_of(model)
    torch.manual_seed(rank)

    step = step_of(model, shared, optimizer, (batch, length, vocab))
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


def of_peer(way, shape, gpus, steps):
    """Median seconds of a step."""
    with tempfile.TemporaryDirectory() as folder:
        report = os.path.join(folder, "seconds")
        arguments = (way, gpus, free_port(), shape, steps, report)
        torch.multiprocessing.spawn(peer, args=arguments, nprocs=gpus)
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


def command_of(way, gpus, accumulation):
    transport, *rest = way.split("+")
    words = f"--gpus {gpus} --transport {transport} --accumulation {gpus * accumulation}"
    return words + (" --shard-states" if rest else "")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", default="124M,345M,1.3B")
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count())
    parser.add_argument(
        "--ways", default="auto,auto+shards", help="transports, with +shards for --shard-states"
    )
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches of a rank")
    parser.add_argument("--optimizer", default="adamw,master=split")
    parser.add_argument("--recipe", default="fp8-mxfp4-rht-sr")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--mxtrain", required=True)
    parser.add_argument("--data", required=True, help="folder that `mxtrain prepare` made")
    parser.add_argument("--peers", default="ddp", help="ddp, fsdp, with a comma, or none")
    options = parser.parse_args()
    gpus, accumulation = options.gpus, options.accumulation
    peers = [way for way in options.peers.split(",") if way in WAYS and accumulation == 1]
    name = torch.cuda.get_device_name()
    what = f"{options.recipe}, {options.optimizer}, {accumulation} micro-batches a rank"
    print(f"{gpus} x {name}, PyTorch {torch.__version__}, {what}", flush=True)
    ways = [command_of(way, gpus, accumulation) for way in options.ways.split(",")]
    for model in options.models.split(","):
        shape = MODELS[model]
        tokens = shape[3] * shape[4]
        alone = [f"--device cuda:{gpu} --accumulation {accumulation}" for gpu in range(gpus)]
        best, of_peers = {}, {}
        for _ in range(options.rounds):
            def run(where):
                found = of_mxtrain(options, shape, where, options.steps)
                best[where] = min(best.get(where, (math.inf, 0.0, 0)), found)

            with ThreadPoolExecutor() as pool:
                list(pool.map(run, alone))
            for where in ways:
                run(where)
            for way in peers:
                seconds = of_peer(way, shape, gpus, options.steps)
                of_peers[way] = min(of_peers.get(way, math.inf), seconds)
        sum_of_all = sum(accumulation * tokens / best[where][0] for where in alone)
        rates = {way: gpus * tokens / seconds for way, seconds in of_peers.items()}
        for way, rate in rates.items():
            print(f"{model} {way:48} {rate:9.0f} tokens/s", flush=True)
        for where in alone:
            rate = accumulation * tokens / best[where][0]
            print(f"{model} {where:48} {rate:9.0f} tokens/s", flush=True)
        for where in ways:
            seconds, exchange, used = best[where]
            rate = gpus * accumulation * tokens / seconds
            print(
                f"{model} {where:48} {rate:9.0f} tokens/s, exchange {1e3 * exchange:.2f} ms of "
                f"{1e3 * seconds:.2f}, {used} MiB, efficiency {rate / sum_of_all:.3f}"
                + (f", ratio {rate / max(rates.values()):.3f}" if rates else ""),
                flush=True,
            )


if __name__ == "__main__":
    main()
