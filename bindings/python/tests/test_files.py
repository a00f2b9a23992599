"""Checkpoints without a folder: in memory, in mappings, in stores of the host's own."""

import ctypes
import io
import threading
import zipfile

import pytest

import mxfp4train as mxt

NAMES = ["config.json", "model.safetensors", "trainer.json", "trainer.safetensors"]


def of_folder(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_bytes_are_those_of_a_folder(tmp_path, make_trainer, dataset):
    trainer = make_trainer()
    trainer.step(dataset)
    trainer.save(tmp_path / "whole")
    files, mapping, copied = mxt.Files(), {"tokenizer.json": b"{}"}, {}
    trainer.save(files)
    trainer.save(mapping)
    trainer.snapshot().save(copied)
    assert sorted(files) == NAMES and len(files) == 4
    assert dict(files) == copied == of_folder(tmp_path / "whole")
    assert mapping.pop("tokenizer.json") == b"{}" and mapping == copied
    # The training state would not fit.
    trainer.model.save(mapping, weights="bf16")
    trainer.model.save(files, weights="bf16")
    trainer.model.save(tmp_path / "model", weights="bf16")
    assert dict(files) == mapping == of_folder(tmp_path / "model")


def test_a_run_goes_on_from_memory(engine, make_trainer, dataset):
    trainer = make_trainer(engine)
    trainer.step(dataset)
    files, lent = mxt.Files(), mxt.Files()
    trainer.save(files)
    for name in files:
        lent.lend(name, files[name])
    resumed = [mxt.Trainer.load(engine, place) for place in (files, lent, dict(files))]
    rounded = mxt.Trainer.load(engine, lent, optimizer="adamw,moments=int8")
    assert rounded.options.optimizer == "adamw,moments=int8"
    assert mxt.Model.load(engine, lent).config == trainer.model.config
    for _ in range(2):
        loss = trainer.step(dataset).loss
        assert [it.step(dataset).loss for it in resumed] == [loss] * 3


def test_files_are_a_mapping():
    files = mxt.Files()
    assert not files and list(files) == [] and "x" not in files
    files["x"] = b"1234"
    files["empty"] = b""
    files.lend("lent", memoryview(bytearray(b"567")))
    assert list(files) == ["empty", "lent", "x"]
    assert (files["x"], files["empty"], files["lent"]) == (b"1234", b"", b"567")
    files["x"] = bytearray(b"8")
    assert files.pop("x") == b"8" and "x" not in files
    for missing in ("x", 7):
        with pytest.raises(KeyError):
            files[missing]
        with pytest.raises(KeyError):
            del files[missing]
    with pytest.raises(mxt.InvalidArgument, match="empty"):
        files[""] = b"x"
    with pytest.raises(TypeError):
        files["x"] = "text"
    files.close()
    with pytest.raises(mxt.Closed):
        files["x"] = b""


def test_lent_memory_is_kept_as_long_as_it_is_used():
    class Content(bytearray):
        pass

    import weakref

    gone = []
    files = mxt.Files()
    for name in "ab":
        content = Content(b"123")
        weakref.finalize(content, gone.append, name)
        files.lend(name, content)
        del content
    assert gone == []
    files["a"] = b""
    assert gone == ["a"]
    files.close()
    assert gone == ["a", "b"]


class Zip:
    """A store: each save is an archive of its own, and the last whole one is read."""

    def __init__(self, fails_at=None):
        self.whole = self.new = self.archive = None
        self.calls, self.fails_at, self.log = 0, fails_at, []

    def call(self, what):
        self.calls += 1
        self.log.append(what)
        if self.calls == self.fails_at:
            raise OSError("the disk is on fire")

    def open(self, name):
        self.call("open")
        with zipfile.ZipFile(io.BytesIO(self.whole)) as archive:
            try:
                return archive.open(name)
            except KeyError:
                raise FileNotFoundError(name) from None

    def begin(self):
        self.call("begin")
        self.new = io.BytesIO()
        self.archive = zipfile.ZipFile(self.new, "w")

    def create(self, name, size):
        self.call("create")
        assert size > 0
        return self.archive.open(name, "w")

    def commit(self):
        self.call("commit")
        self.archive.close()
        self.whole = self.new.getvalue()

    def abort(self):
        self.log.append("abort")
        self.new = self.archive = None


def test_a_store_of_the_hosts(engine, make_trainer, dataset):
    trainer = make_trainer(engine)
    store, mapping = Zip(), {}
    trainer.save(store)
    trainer.save(mapping)
    with zipfile.ZipFile(io.BytesIO(store.whole)) as archive:
        assert {name: archive.read(name) for name in archive.namelist()} == mapping
    resumed = mxt.Trainer.load(engine, store)
    assert resumed.step(dataset).loss == trainer.step(dataset).loss
    with pytest.raises(mxt.FormatError, match=r"config\.json"):
        mxt.Model.load(engine, {})


def test_a_run_saves_to_files(engine, make_trainer, dataset):
    trainer = make_trainer(engine)
    seen = []
    for place in (mxt.Files(), {}, Zip()):

        def look(step, _, place=place):
            if not isinstance(place, Zip):
                seen.append(len(place))

        result = trainer.run(dataset, steps=2, save_every=1, save_files=place, on_step=look)
        assert result.saved and result.save_errors == 0
        assert mxt.Trainer.load(engine, place).steps_done == trainer.steps_done
    assert seen == [4] * 4
    with pytest.raises(OSError, match="on fire"):
        trainer.run(dataset, steps=9, save_every=1, save_files=Zip(fails_at=3))
    assert trainer.steps_done == 7
    with pytest.raises(TypeError, match="save_files"):
        trainer.run(dataset, steps=1, save_files="folder")


@pytest.mark.parametrize("cause", [None, KeyError("mine")])
def test_a_callback_that_raises_loses_no_save(engine, make_trainer, dataset, tmp_path, cause):
    class Mine(BaseException):
        pass

    def end(step, _):
        if step.step == 2:
            raise Mine from cause

    # Whatever ends the run, it saves.
    for place in (mxt.Files(), {}, Zip()):
        trainer = make_trainer(engine)
        with pytest.raises(Mine) as raised:
            trainer.run(dataset, steps=9, save_files=place, on_step=end)
        assert raised.value.__cause__ is cause
        assert mxt.Trainer.load(engine, place).steps_done == trainer.steps_done == 2
    # Also where that is a save before, which takes seven calls.
    place = Zip(fails_at=9)
    trainer = make_trainer(engine)
    with pytest.raises(OSError, match="on fire"):
        trainer.run(dataset, steps=9, save_every=1, save_files=place)
    assert mxt.Trainer.load(engine, place).steps_done == trainer.steps_done == 2
    # Where it cannot, both are told.
    (tmp_path / "file").write_text("in the way")
    for how in ({"save_dir": tmp_path / "file"}, {"save_files": Zip(fails_at=3)}):
        trainer = make_trainer(engine)
        with pytest.raises(Mine) as raised:
            trainer.run(dataset, steps=9, on_step=end, **how)
        told = raised.value.__cause__
        if cause is not None:
            assert told is cause and "mxt_trainer_run" in raised.value.__notes__[0]
            continue
        assert isinstance(told, mxt.MxtError) and "mxt_trainer_run" in str(told)
        if "save_files" in how:
            assert "on fire" in str(told.__cause__)


def test_causes_are_of_the_run_and_do_not_loop(engine, make_trainer, dataset):
    error = OSError("the same one")

    class Sticky(Zip):
        def begin(self):
            raise error

    def end(_step, _evaluation):
        raise error

    before = ValueError("before the run")
    try:
        raise before
    except ValueError:
        with pytest.raises(OSError, match="the same one"):
            make_trainer(engine).run(dataset, steps=3, save_files=Sticky(), on_step=end)
    assert error.__cause__.__cause__ is None and before.__cause__ is None


def test_what_could_not_be_saved_beside_a_window_is_told(make_trainer, tmp_path):
    (tmp_path / "file").write_text("in the way")

    def fill(number, tokens, weights):
        if fill.calls == 4:
            raise ValueError("data")
        fill.calls += 1
        tokens[:] = number % 59

    fill.calls = 0
    with pytest.raises(ValueError, match="data") as raised:
        windows = mxt.Dataset.from_windows(50, fill)
        make_trainer().run(windows, steps=100, save_dir=tmp_path / "file")
    assert "steps before it be saved: " in raised.value.__notes__[0]


def test_files_of_a_run_are_its_threads(make_trainer, dataset):
    files, seen = mxt.Files(), []

    def look(_step, _evaluation):
        def from_elsewhere():
            for read in (lambda: files["config.json"], lambda: list(files)):
                try:
                    seen.append(read())
                except mxt.Busy as error:
                    seen.append(type(error))

        other = threading.Thread(target=from_elsewhere)
        other.start()
        other.join()
        assert len(files["config.json"]) > 0 and "Files" in repr(files)

    make_trainer().run(dataset, steps=2, save_every=1, save_files=files, on_step=look)
    assert seen == [mxt.Busy] * 4 and len(list(files)) == 4


def test_what_a_store_raises_is_raised(engine, make_trainer, dataset):
    trainer = make_trainer(engine)
    store = Zip()
    trainer.save(store)
    before = store.whole
    trainer.step(dataset)
    for fails_at in range(1, 100):
        store.calls, store.fails_at, store.log = 0, fails_at, []
        try:
            trainer.save(store)
            break
        except OSError as error:
            assert "on fire" in str(error) and store.whole == before
            assert store.log[-1] == ("begin" if fails_at == 1 else "abort")
            assert trainer.steps_done == 1
    assert fails_at == 7 and store.log[-1] == "commit" and store.whole != before
    for fails_at in range(1, 5):
        store.calls, store.fails_at = 0, fails_at
        with pytest.raises(OSError, match="on fire"):
            mxt.Trainer.load(engine, store)
    # Nothing of it is left.
    store.fails_at = None
    assert mxt.Trainer.load(engine, store).steps_done == 1


def test_a_mapping_that_fails_is_what_it_was(make_trainer, dataset):
    class Full(dict):
        limit = None

        def __setitem__(self, name, content):
            if self.limit == name:
                self.limit = None
                raise OSError("full")
            super().__setitem__(name, content)

    trainer, mapping = make_trainer(), Full()
    trainer.save(mapping)
    before = dict(mapping)
    trainer.step(dataset)
    for name in NAMES:
        mapping.limit = name
        with pytest.raises(OSError, match="full"):
            trainer.save(mapping)
        assert dict(mapping) == before


def test_threads_share_files(make_trainer):
    trainer, files = make_trainer(), mxt.Files()
    trainer.save(files)
    whole = dict(files)
    wrong = []

    def read():
        for _ in range(20):
            wrong.extend(name for name in NAMES if files[name] != whole[name])

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(10):
        trainer.save(files)
    for thread in threads:
        thread.join()
    assert wrong == []


def test_memory_in_use(dataset, make_trainer):
    engine = mxt.Engine(threads=1)
    assert engine.memory().device_bytes == 0
    trainer = make_trainer(engine)
    trainer.step(dataset)
    memory = engine.memory()
    assert memory.device_bytes == memory.device_peak > 0 == memory.host_bytes
    assert memory.device_limit >= memory.device_bytes and memory.host_limit > 0
    with trainer.snapshot():
        assert engine.memory().host_bytes > 0
    assert engine.memory().host_bytes == 0 < engine.memory().host_peak


def test_memory_of_the_hosts(dataset, make_trainer):
    blocks, most = {}, [99]

    def allocate(count, alignment):
        if len(blocks) == most[0]:
            return None
        block = ctypes.create_string_buffer(count + alignment)
        address = -(-ctypes.addressof(block) // alignment) * alignment
        blocks[address] = (block, count, alignment)
        return address

    def deallocate(address, count, alignment):
        assert blocks.pop(address)[1:] == (count, alignment)

    engine = mxt.Engine(threads=1, allocate=allocate, deallocate=deallocate)
    trainer = make_trainer(engine)
    assert trainer.step(dataset).loss == make_trainer().step(dataset).loss
    in_use = sum(count for _, count, _ in blocks.values())
    assert engine.memory().device_bytes == in_use > 0
    most[0] = len(blocks)
    with pytest.raises(mxt.OutOfMemory, match="allocator"):
        trainer.snapshot()
    del trainer
    engine.close()
    assert blocks == {}
    with pytest.raises(TypeError, match="both"):
        mxt.Engine(allocate=allocate)
