#!/usr/bin/env bash
# Where the time of a training step goes: every kernel's own time by Nsight Compute, summed by name.
#
# Usage: dev/gpu/profile.sh MODEL RECIPE [ROWS]
#
# The step is one that is not recorded yet. Kernels run one by one and the chip's clock is left as it is,
# so the sum is that of a step without overlap. MXT_GPU_BENCH names the train_step benchmark
# (dev/gpu/pack.sh makes it).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
ours=${MXT_GPU_BENCH:-target/gpu/train_step}
MXT_BENCH_STEPS=0 MXT_BENCH_DEVICE=cuda ncu --metrics gpu__time_duration.sum --clock-control none --csv \
    "$ours" "$1" "$2" 2>&1 | python3 -c '
import collections, csv, re, sys
lines = [line for line in sys.stdin if line.startswith("\"")]
kernels = collections.defaultdict(list)
unit = {"ns": 1e-6, "us": 1e-3, "usecond": 1e-3, "nsecond": 1e-6, "ms": 1.0, "msecond": 1.0}
for row in csv.DictReader(lines):
    ms = float(row["Metric Value"].replace(",", "")) * unit[row["Metric Unit"]]
    # Without the return type, casts in the arguments of the template, and parameters.
    name = re.sub(r"^void |\((?:unsigned int|int|bool|Format)\)|\([^()]*\)$", "", row["Kernel Name"])
    if name in ("copy_to_bf16", "fill_normal"):  # make the model
        continue
    kernels[name[:64]].append(ms)
total = sum(map(sum, kernels.values()))
rows = sorted(kernels.items(), key=lambda item: -sum(item[1]))
for name, times in rows[: int(sys.argv[1])]:
    print(f"{sum(times):8.2f} ms {100 * sum(times) / total:5.1f}% {len(times):5} x  {name}")
print(f"{total:8.2f} ms of {sum(map(len, kernels.values()))} kernels")
' "${3:-24}"
