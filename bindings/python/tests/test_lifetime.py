"""Objects and their ends, threads, errors, callbacks that raise."""

import copy
import gc
import itertools
import os
import pickle
import threading
import traceback
import weakref

import numpy as np
import pytest
from conftest import SHAPE, Wires

import mxfp4train as mxt
from mxfp4train import _callbacks as callbacks


def test_objects_are_closed_in_any_order(dataset):
    for order in itertools.permutations(range(5)):
        engine = mxt.Engine(threads=1)
        model = mxt.Model(engine, **SHAPE)
        trainer = mxt.Trainer(model, batch_size=1)
        objects = [engine, model, trainer, mxt.Decoder(model), trainer.snapshot()]
        for place in order:
            if not trainer.closed:
                trainer.step(dataset)
            objects[place].close()
            objects[place].close()
        assert all(one.closed for one in objects)


def test_a_closed_object_says_so(engine, dataset):
    with mxt.Model(engine, **SHAPE) as model, mxt.Trainer(model, batch_size=1) as trainer:
        assert "parameters" in repr(model) and "0 steps done" in repr(trainer)
    assert repr(model) == "<mxfp4train.Model: closed>"
    for use in (
        lambda: trainer.step(dataset),
        lambda: trainer.run(dataset, steps=1),
        lambda: model.config,
        lambda: model.tensors,
        lambda: trainer.gradients,
        lambda: mxt.Trainer(model),
    ):
        with pytest.raises(mxt.Closed, match=r"expected an open (Trainer|Model)"):
            use()
    assert (model.parameter_count, trainer.steps_done) == (0, 0)
    trainer.request_stop()
    dataset.close()
    assert len(dataset) == 0


def test_what_nothing_refers_to_is_freed():
    lines = []
    engine = mxt.Engine(threads=1, log=lambda level, line: lines.append((level, line)))
    assert lines[0][0] == "info" and "cpu" in lines[0][1]
    trainer = mxt.Trainer(mxt.Model(engine, **SHAPE), batch_size=1)
    gone, lent = weakref.ref(trainer), len(callbacks.lent)
    del engine
    gc.collect()
    # What was made from the engine has its log.
    del lines[:]
    assert len(callbacks.lent) == lent and mxt.Trainer(trainer.model, batch_size=1) and lines
    del trainer
    gc.collect()
    assert gone() is None and len(callbacks.lent) == lent - 1


def test_a_call_leaves_no_cycle(make_trainer, dataset):
    # Else what a callback refers to, as a trainer with its memory, waits for the collector.
    gc.disable()
    try:
        for call in (
            lambda trainer, use: trainer.run(dataset, steps=1, on_step=lambda *_: use),
            lambda trainer, use: trainer.model.generate([1], max_tokens=1, on_token=lambda _: use),
            lambda trainer, use: trainer.forward_backward(
                np.zeros((3, 16), int), loss=lambda logits, _: use and np.zeros(len(logits))
            ),
            lambda trainer, use: trainer.evaluate(dataset, max_batches=1),
            lambda trainer, use: (trainer.gradients, repr(trainer), trainer.options),
        ):
            trainer = make_trainer()
            gone = weakref.ref(trainer)
            call(trainer, trainer)
            del trainer
            assert gone() is None
    finally:
        gc.enable()


class Corpus:
    """A class as programs have it: C calls what has the object that it is called for."""

    def __init__(self, rows=None):
        self.rows = rows
        self.dataset = mxt.Dataset.from_windows(10, self.fill)

    def fill(self, number, window, weights):
        window[:] = number


class Logger:
    def __init__(self):
        self.lines = []
        self.engine = mxt.Engine(threads=1, log=self.log)
        self.model = mxt.Model(self.engine, **SHAPE)
        self.trainer = mxt.Trainer(self.model, batch_size=1)
        self.decoder = mxt.Decoder(self.model)
        self.snapshot = self.trainer.snapshot()

    def log(self, _level, line):
        self.lines.append(line)


class Rank:
    def __init__(self, wires, number):
        group = wires.group(number)
        self.functions = group.all_to_all, group.all_gather
        group = mxt.Group(number, 2, self.all_to_all, self.all_gather, self.abort)
        self.engine = mxt.Engine(threads=1, group=group)
        self.model = mxt.Model(self.engine, **SHAPE)

    def all_to_all(self, send, receive):
        self.functions[0](send, receive)

    def all_gather(self, mine, everyones):
        self.functions[1](mine, everyones)

    def abort(self):
        pass


def test_cycles_through_callbacks_are_collected(make_trainer):
    lent, trainer = len(callbacks.lent), make_trainer()

    def of_dataset():
        corpus = Corpus()
        trainer.step(corpus.dataset)
        return [corpus]

    def of_log():
        logger = Logger()
        assert any("trainer" in line for line in logger.lines)
        return [logger]

    def of_group():
        wires, ranks = Wires(), []
        threads = [
            threading.Thread(target=lambda it=number: ranks.append(Rank(wires, it)))
            for number in range(2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(ranks) == 2
        return ranks

    for make in (of_dataset, of_log, of_group):
        made = make()
        gone = [weakref.ref(it) for it in made]
        assert len(callbacks.lent) > lent
        del made
        gc.collect()
        assert [it() for it in gone] == [None] * len(gone), make
        # The library has given all of it back, so what it had itself is freed, too.
        assert len(callbacks.lent) == lent, make


def test_what_is_closed_keeps_no_callback(make_trainer, dataset):
    class Function:
        def __init__(self, owner=None):
            self.owner = owner

        def __call__(self, *_):
            if self.owner is not None:
                self.owner[0].close()

    log, fill = Function(), Function()
    logs, fills = weakref.ref(log), weakref.ref(fill)
    engine, windows = mxt.Engine(threads=1, log=log), mxt.Dataset.from_windows(3, fill)
    trainer = make_trainer(engine)
    del log, fill
    engine.close()
    windows.close()
    assert fills() is None and logs() is not None
    trainer.close()
    assert logs() is None
    # One that is closed by what it calls is there until the call returns.
    owner = []
    owner.append(mxt.Dataset.from_windows(6, Function(owner)))
    fills = weakref.ref(owner[0]._lent[0].content)
    other = make_trainer()
    assert other.step(owner[0]).step == 1 and owner[0].closed and fills() is None


def test_a_snapshot_has_the_log_of_what_it_holds(tmp_path):
    lines = [], []
    of_log = [mxt.Engine(threads=1, log=lambda _, line, to=to: to.append(line)) for to in lines]
    trainers = [mxt.Trainer(mxt.Model(engine, **SHAPE), batch_size=1) for engine in of_log]
    logs = [weakref.ref(engine._lent[0]) for engine in of_log]
    snapshot = trainers[0].snapshot()
    snapshot.renew(trainers[1])
    del of_log, trainers
    gc.collect()
    assert logs[0]() is None and logs[1]() is not None
    snapshot.save(tmp_path / "out")
    del snapshot
    gc.collect()
    assert logs[1]() is None


def test_a_callback_that_is_gone_stops():
    gone = callbacks.Owned(print)
    pointer = gone.pointer()
    callbacks.on_log(pointer, 2, callbacks.ffi.new("char[]", b"is there"))
    del gone
    memory = callbacks.ffi.new("uint32_t[9]"), callbacks.ffi.new("float[8]")
    assert callbacks.on_window(pointer, 0, *memory, 8) == 1
    assert callbacks.on_all_to_all(pointer, *memory, 4) == 1
    assert callbacks.on_all_gather(pointer, *memory, 4) == 1
    callbacks.on_log(pointer, 2, callbacks.ffi.new("char[]", b"is gone"))
    callbacks.on_abort(pointer)


def test_an_engine_that_cannot_be_made_keeps_nothing():
    lent = len(callbacks.lent)
    with pytest.raises(mxt.MxtError, match="device"):
        mxt.Engine(device="abacus", log=print)
    with pytest.raises(ValueError, match="threads: expected a whole number from 0"):
        mxt.Engine(threads=-1, log=print)
    assert len(callbacks.lent) == lent


def test_objects_are_not_copied(engine):
    for duplicate in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="cannot be copied or pickled"):
            duplicate(engine)


def test_a_busy_trainer_refuses_other_threads(make_trainer, dataset):
    trainer, inside, done = make_trainer(), threading.Event(), threading.Event()

    def loss(logits, _first_row):
        inside.set()
        assert done.wait(60)
        logits[:] = 0
        return np.zeros(len(logits))

    tokens = np.zeros((3, 16), np.uint32)
    working = threading.Thread(
        target=trainer.forward_backward, args=(tokens,), kwargs={"loss": loss}
    )
    working.start()
    assert inside.wait(60)
    try:
        for call in (lambda: trainer.step(dataset), trainer.update, lambda: trainer.save("x")):
            with pytest.raises(mxt.Busy) as caught:
                call()
            assert caught.value.status == -5
        assert trainer.steps_done == 0
        # It is freed when the call returns.
        trainer.close()
    finally:
        done.set()
        working.join()
    with pytest.raises(mxt.Closed):
        trainer.update()


def test_threads_train_beside_each_other(dataset):
    losses = {}

    def train(number):
        model = mxt.Model(mxt.Engine(threads=1), **SHAPE)
        losses[number] = [
            stats.loss for stats in mxt.Trainer(model, batch_size=1).steps(dataset, 9)
        ]

    threads = [threading.Thread(target=train, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert losses[0] == losses[1] == losses[2] == losses[3]


def test_a_stop_from_another_thread(make_trainer, dataset):
    trainer, begun = make_trainer(), threading.Event()
    stopper = threading.Thread(target=lambda: begun.wait(60) and trainer.request_stop())
    stopper.start()
    result = trainer.run(dataset, steps=1 << 40, on_step=lambda *_: begun.set())
    stopper.join()
    assert result.end == "request" and result.steps == trainer.steps_done


def test_what_on_step_raises_is_raised(make_trainer, dataset, tmp_path):
    trainer = make_trainer()

    def on_step(step, _):
        if step.step == 2:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough") as caught:
        trainer.run(dataset, steps=9, save_dir=tmp_path / "out", on_step=on_step)
    assert "on_step" in [frame.name for frame in traceback.extract_tb(caught.tb)]
    assert trainer.steps_done == 2
    assert mxt.Trainer.load(mxt.Engine(threads=1), tmp_path / "out").steps_done == 2

    # One that comes through two runs.
    def nested(_step, _evaluation):
        trainer.run(dataset, steps=1, on_step=on_error)

    def on_error(_step, _evaluation):
        raise SystemExit(3)

    with pytest.raises(SystemExit):
        trainer.run(dataset, steps=9, on_step=nested)
    assert trainer.steps_done == 4
    # The library's error is the callback's then, too.
    with pytest.raises(mxt.InvalidArgument):
        trainer.run(dataset, steps=2, on_step=lambda *_: trainer.set_lr(-1))


def test_what_a_log_raises_is_raised(dataset):
    def log(_level, line):
        if "trainer" in line:
            raise BufferError(line)

    model = mxt.Model(mxt.Engine(threads=1, log=log), **SHAPE)
    with pytest.raises(BufferError, match="trainer: recipe"):
        mxt.Trainer(model, batch_size=1)
    # Nothing of it is left: neither the trainer, nor the exception.
    assert model.config.layers == 2


def test_errors_say_what_was_expected(engine, tmp_path, dataset):
    with pytest.raises(mxt.InvalidArgument, match="heads") as caught:
        mxt.Model(engine, heads=7)
    assert caught.value.status == -2 and isinstance(caught.value, ValueError)
    assert pickle.loads(pickle.dumps(caught.value)).status == -2
    with pytest.raises(mxt.FileError) as caught:
        mxt.Model.load(engine, tmp_path / "none")
    assert isinstance(caught.value, OSError) and "none" in str(caught.value)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "config.json").write_text("{")
    with pytest.raises(mxt.MxtError):
        mxt.Model.load(engine, tmp_path / "bad")
    model = mxt.Model(engine, **SHAPE)
    trainer = mxt.Trainer(model, batch_size=1)
    with pytest.raises(mxt.NoSuchTensor, match=r"^mxt_trainer_scale_gradients") as caught:
        trainer.scale_gradients(1, tensor="none")
    assert isinstance(caught.value, KeyError)
    for options, message in (
        ({"recipe": "fp1"}, "fp1"),
        ({"schedule": "square"}, "schedule: expected one of 'constant', 'cosine'"),
        ({"batch_size": 1.5}, "batch_size: expected a whole number, got 1.5"),
        ({"batch_size": -1}, "batch_size: expected a whole number from 0"),
        ({"lr": "much"}, "lr: expected a number"),
        ({"recipe": 4}, "recipe: expected text, got 4"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            mxt.Trainer(model, **options)
    with pytest.raises(TypeError):
        mxt.Trainer(model, learning_rate=1)
    # Text that is no UTF-8 names files all the same.
    model.save(os.fsencode(tmp_path) + b"/\xff")
    assert (tmp_path / os.fsdecode(b"\xff") / "config.json").exists()


def test_a_child_makes_an_engine_of_its_own(make_trainer, dataset):
    trainer = make_trainer()
    trainer.step(dataset)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with pytest.raises(mxt.Forked):
                trainer.step(dataset)
            code = 0 if make_trainer(mxt.Engine(threads=1)).step(dataset).step == 1 else 2
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
