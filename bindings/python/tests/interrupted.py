"""What test_interrupt.py starts and interrupts."""

import io
import os
import signal
import sys
import threading
import time

import numpy as np

import mxfp4train as mxt

# Whoever runs the tests in the background may have had SIGINT ignored, which programs inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)

HOW, FOLDER = sys.argv[1:]
FOREVER = 1 << 40
ENGINE = mxt.Engine(threads=1)


def make_trainer(**options):
    model = mxt.Model(ENGINE, vocab_size=61, context_length=16, layers=1, heads=2, channels=32)
    return mxt.Trainer(model, **{"batch_size": 2, **options})


def tell(*words):
    print(*words, flush=True)


def interrupted(trainer, call):
    """Makes a call, which SIGINT ends, and tells so."""
    try:
        call()
    except KeyboardInterrupt:
        tell("interrupted", trainer.steps_done)
    else:
        raise AssertionError("expected an interrupted call")
    # No request is left over, and Python's own handler is back.
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.set_wakeup_fd(-1) == -1
    assert trainer.run(DATASET, steps=1).end == "finished"


DATASET = mxt.Dataset(np.arange(4000) * 7 % 59)


def main():
    trainer = make_trainer()
    running = threading.Event()

    def on_step(_step, _evaluation):
        if not running.is_set():
            running.set()
            tell("running")

    def on_step_asleep(step, evaluation):
        on_step(step, evaluation)
        time.sleep(60)

    def on_step_nested(step, evaluation):
        trainer.run(DATASET, steps=FOREVER, on_step=on_step)

    if HOW == "run":
        # No callback of the program's: the first line comes from another thread.
        threading.Timer(0.3, tell, ["running"]).start()
        interrupted(trainer, lambda: trainer.run(DATASET, steps=FOREVER, save_dir=FOLDER))
    elif HOW in ("callback", "asleep", "nested"):
        callback = {"callback": on_step, "asleep": on_step_asleep, "nested": on_step_nested}[HOW]
        interrupted(
            trainer,
            lambda: trainer.run(DATASET, steps=FOREVER, save_dir=FOLDER, on_step=callback),
        )
    elif HOW == "own":
        # A handler of the program's is left alone, and what it raises ends the run as well.
        def handler(*_):
            raise KeyboardInterrupt("own")

        signal.signal(signal.SIGINT, handler)
        try:
            trainer.run(DATASET, steps=FOREVER, save_dir=FOLDER, on_step=on_step)
        except KeyboardInterrupt as exception:
            assert exception.args == ("own",)
            assert signal.getsignal(signal.SIGINT) is handler
            tell("interrupted", trainer.steps_done)
    elif HOW in ("unsaved", "unsaved-asleep"):
        callback = on_step if HOW == "unsaved" else on_step_asleep
        with open(FOLDER, "wb") as file:
            file.write(b"a file where a folder should be")
        try:
            trainer.run(DATASET, steps=FOREVER, save_dir=FOLDER, on_step=callback)
        except KeyboardInterrupt as exception:
            tell("interrupted", type(exception.__cause__).__name__)
    elif HOW.startswith("first-"):
        what = {
            "first-save": lambda: trainer.save({}),
            "first-evaluate": lambda: trainer.evaluate(DATASET),
            "first-generate": lambda: trainer.model.generate([1], max_tokens=5),
        }[HOW]

        def on_first_step(_step, _evaluation):
            threading.Timer(0.002, os.kill, (os.getpid(), signal.SIGINT)).start()
            what()

        tell("running")
        interrupted(trainer, lambda: trainer.run(DATASET, steps=FOREVER, on_step=on_first_step))
    elif HOW == "no-thread":
        start = threading.Thread.start

        def no_thread(_self):
            raise RuntimeError("can't start new thread")

        threading.Thread.start = no_thread
        try:
            trainer.run(DATASET, steps=1)
        except RuntimeError:
            threading.Thread.start = start
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert signal.set_wakeup_fd(-1) == -1
        tell("running")
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            tell("interrupted")
    elif HOW in ("store", "inside", "saving"):

        class Slow:
            saves = 0

            def begin(self):
                if self.saves == 0:
                    tell("running")
                    time.sleep(1)

            def open(self, name):
                raise FileNotFoundError(name)

            def create(self, name, size):
                return io.BytesIO()

            def commit(self):
                self.saves += 1

            def abort(self):
                tell("aborted")

        store = Slow()
        if HOW == "saving":
            store.saves = 1
            threading.Timer(0.1, tell, ["running"]).start()
            try:
                trainer.run(DATASET, steps=FOREVER, on_step=lambda *_: trainer.save(store))
            except KeyboardInterrupt:
                tell("interrupted", trainer.steps_done, "saved", store.saves - 1)
            return
        if HOW == "inside":
            other = make_trainer()

            def run_other(_step, _evaluation):
                other.run(DATASET, steps=FOREVER, save_every=1, save_files=store)

            try:
                trainer.run(DATASET, steps=FOREVER, on_step=run_other)
            except KeyboardInterrupt:
                tell("interrupted", trainer.steps_done, other.steps_done, "saved", store.saves)
            return
        try:
            trainer.run(DATASET, steps=FOREVER, save_every=1, save_files=store)
        except KeyboardInterrupt:
            tell("interrupted", trainer.steps_done, "saved", store.saves)
    elif HOW == "micro":
        slow = make_trainer(batch_size=256, accumulation=16384)
        threading.Timer(0.3, tell, ["running"]).start()
        begin = time.monotonic()
        try:
            slow.run(DATASET, steps=1, save_dir=FOLDER)
        except KeyboardInterrupt:
            tell("interrupted", slow.steps_done, time.monotonic() - begin)
    elif HOW == "step":
        slow = make_trainer(batch_size=256, accumulation=16384)
        threading.Timer(0.3, tell, ["running"]).start()
        try:
            slow.step_unless_stopped(DATASET)
        except KeyboardInterrupt:
            tell("interrupted", slow.steps_done)
    elif HOW == "evaluate":
        long = mxt.Dataset(np.arange(30_000_000, dtype=np.uint32) * 7 % 59)
        threading.Timer(0.3, tell, ["running"]).start()
        interrupted(trainer, lambda: trainer.evaluate(long))
    elif HOW == "generate":
        threading.Timer(0.3, tell, ["running"]).start()
        interrupted(trainer, lambda: trainer.model.generate([1], max_tokens=FOREVER))


main()
