#!/usr/bin/env python3
"""Shows that TensorBoard reads what `mxtrain train --tensorboard` writes, as the log has it.

Usage: python3 dev/check_tensorboard.py [MXTRAIN]   (needs tensorboard)

Trains a tiny model, resumes it, and resumes it once more from the earlier checkpoint. TensorBoard's
own reader must then have every step once, with the numbers of the last line of the log that is of
this step. MXTRAIN is a built program; cargo builds one otherwise.
"""
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = pathlib.Path(__file__).resolve().parent.parent
MODEL = "--layers 1 --heads 2 --channels 32 --context 32 --batch-size 2 --threads 1 --device cpu"
OF_STEP = {f"train/{name}": name for name in ("loss", "lr", "grad_norm", "seconds")}
OF_EVAL = {f"validation/{name}": name for name in ("loss", "seconds")}
RATES = ["train/tokens_per_second", "validation/tokens_per_second"]


def program():
    if len(sys.argv) > 1:
        return pathlib.Path(sys.argv[1]).resolve()
    subprocess.run(["cargo", "build", "--release", "-p", "mxtrain"], cwd=ROOT, check=True)
    return ROOT / "target/release/mxtrain"


def main():
    mxtrain = program()
    with tempfile.TemporaryDirectory() as folder:
        def run(line):
            subprocess.run([mxtrain, *line.split()], cwd=folder, check=True, capture_output=True)

        run(f"prepare {ROOT}/tests/text/prose.txt --out data")
        reports = "--log log.jsonl --tensorboard runs --eval-every 3"
        run(f"train --data data --out model --steps 4 {reports} {MODEL}")
        shutil.copytree(f"{folder}/model", f"{folder}/earlier")
        run(f"train --resume model --steps 9 {reports}")
        run(f"train --resume earlier --steps 12 {reports}")

        lines = [json.loads(line) for line in open(f"{folder}/log.jsonl")]
        logged = {
            kind: {line["step"]: line for line in lines if line["type"] == kind}
            for kind in ("step", "eval")
        }
        found = EventAccumulator(f"{folder}/runs").Reload()
        tags = set(found.Tags()["scalars"])
        expected = {*OF_STEP, *OF_EVAL, *RATES}
        if tags != expected:
            sys.exit(f"expected the tags {sorted(expected)}, found {sorted(tags)}")
        if list(logged["step"]) != list(range(1, 13)):
            sys.exit(f"the log has steps {list(logged['step'])}")
        for kind, fields in (("step", OF_STEP), ("eval", OF_EVAL)):
            steps = logged[kind]
            for tag, field in fields.items():
                events = found.Scalars(tag)
                if [event.step for event in events] != list(steps):
                    sys.exit(f"{tag}: expected steps {list(steps)}, found {events}")
                for event in events:
                    expected = steps[event.step][field]
                    if abs(event.value - expected) > 1e-6 * abs(expected):
                        sys.exit(f"{tag}: the log has {expected}, TensorBoard {event}")
        files = sorted(path.name for path in pathlib.Path(folder, "runs").iterdir())
        print(f"{len(tags)} scalars in {len(files)} files: as in the log")


if __name__ == "__main__":
    main()
