"""Datasets, tensors, and arrays on their way in and out."""

import ctypes
import gc
import weakref

import numpy as np
import pytest
from conftest import SHAPE, tokens

import mxfp4train as mxt
from mxfp4train import _arrays as arrays
from mxfp4train import _callbacks as callbacks
from mxfp4train._arrays import Place


def test_datasets_of_arrays_and_files(tmp_path):
    data = tokens(1000)
    dataset = mxt.Dataset(data)
    assert len(dataset) == 1000 and dataset.max_token == data.max()
    assert dataset[0] == data[0] and dataset[-1] == data[-1] and dataset[np.int64(7)] == data[7]
    assert np.array_equal(dataset[10:20], data[10:20]) and len(dataset[20:10]) == 0
    assert np.array_equal(list(dataset), data) and np.array_equal(np.asarray(dataset), data)
    with pytest.raises(IndexError):
        dataset[1000]
    data.astype(np.uint16).tofile(tmp_path / "a.bin")
    np.save(tmp_path / "b.npy", data[::-1].astype(np.int32))
    for source in (tmp_path / "a.bin", str(tmp_path / "a.b*"), [tmp_path / "a.bin"]):
        assert np.array_equal(mxt.Dataset(source)[:], data)
    both = mxt.Dataset([tmp_path / "a.bin", str(tmp_path / "b.npy")], token_type="u16")
    assert len(both) == 2000 and both[1000] == data[-1]
    coverage = both.coverage(10)
    assert (coverage.files, coverage.tokens, coverage.shortest) == (2, 2000, 1000)
    with pytest.raises(mxt.InvalidArgument):
        mxt.Dataset(tmp_path / "none*")
    with pytest.raises(ValueError, match="token_type: expected one of 'auto'"):
        mxt.Dataset(tmp_path / "a.bin", token_type="u9")
    with pytest.raises(ValueError, match="without zero characters"):
        mxt.Dataset("a\0b")


def test_tensors_go_round(engine):
    model = mxt.Model(engine, **SHAPE)
    weights = model.tensors
    assert len(weights) == model.tensor_count
    assert sum(value.size for value in weights.values()) == model.parameter_count
    name = "transformer.h.1.mlp.c_fc.weight"
    assert weights.shapes[name] == (32, 128) and weights[name].dtype == np.float32
    values = np.arange(32 * 128).reshape(32, 128)
    weights[name] = values
    assert np.array_equal(weights[name], values)
    weights[name] = values.T.astype(">f8").T * 0.5
    assert np.array_equal(weights[name], 0.5 * values)
    out = np.empty((32, 128), np.float32)
    weights.read(name, out)
    assert np.array_equal(out, 0.5 * values)
    with pytest.raises(KeyError):
        weights["none"]
    with pytest.raises(ValueError, match=r"expected the shape \(32, 128\), got \(128, 32\)"):
        weights[name] = values.T
    with pytest.raises(mxt.NotFinite):
        weights[name] = np.full((32, 128), np.nan)
    with pytest.raises(TypeError, match="real numbers"):
        weights[name] = values * 1j


def test_what_fits_is_not_copied():
    right = np.arange(12, dtype=np.uint32).reshape(3, 4)
    for given, same in ((right, True), (right.astype(np.int64), False), (right[:, ::2], False)):
        pointer, count = arrays.tokens("it", given, Place("cpu"))
        address = int(arrays.ffi.cast("uintptr_t", pointer))
        assert (address == given.ctypes.data) == same and count == given.size
    floats = np.ones(3, np.float32)
    pointer, _ = arrays.floats("it", floats, Place("cpu"))
    assert int(arrays.ffi.cast("uintptr_t", pointer)) == floats.ctypes.data


class OnGpu:
    """An array that says it is on a GPU, and is not, so that C can reach it here."""

    def __init__(self, array, **instead):
        self.array = array
        self.__cuda_array_interface__ = {
            "shape": array.shape,
            "typestr": array.dtype.str,
            "data": (array.ctypes.data, not array.flags.writeable),
            "strides": None if array.flags.c_contiguous else array.strides,
            "version": 3,
            **instead,
        }


class ByDLPack:
    """An array that says it is on a GPU, by DLPack alone."""

    def __init__(self, array):
        self.array, self.streams = array, []

    def __dlpack_device__(self):
        return (2, 0)

    def __dlpack__(self, stream=None):
        self.streams.append(stream)
        return self.array.__dlpack__()


def test_dlpack_passes_its_pointer_too():
    right = np.arange(12, dtype=np.uint32).reshape(3, 4)
    for given in (right, right.view(np.int32)):
        array = ByDLPack(given)
        pointer, count = arrays.tokens("it", array, Place("cuda:0"), (3, 4))
        assert int(arrays.ffi.cast("uintptr_t", pointer)) == right.ctypes.data and count == 12
        assert array.streams == [-1]
    array = ByDLPack(np.ones(3, np.float32))
    assert arrays.floats("it", array, Place("cuda:0", 7))[1] == 3 and array.streams == [7]
    with pytest.raises(ValueError, match=r"where the engine is \(cpu\)"):
        arrays.tokens("it", ByDLPack(right), Place("cpu"))
    with pytest.raises(TypeError, match="expected an array of <u4 or <i4, got <i8"):
        arrays.tokens("it", ByDLPack(right.astype(np.int64)), Place("cuda:0"))
    with pytest.raises(ValueError, match="C-contiguous"):
        arrays.tokens("it", ByDLPack(right[:, ::2]), Place("cuda:0"))
    with pytest.raises(ValueError, match="expected the shape"):
        arrays.tokens("it", ByDLPack(right), Place("cuda:0"), (4, 3))
    # What the pointer points to lives as long as it does.
    alone = np.ones(3, np.float32)
    gone = weakref.ref(alone)
    pointer, _ = arrays.floats("it", ByDLPack(alone), Place("cuda:0"))
    del alone
    gc.collect()
    assert gone() is not None
    del pointer
    gc.collect()
    assert gone() is None


def test_arrays_on_a_gpu_pass_their_pointer():
    right = np.arange(12, dtype=np.uint32).reshape(3, 4)
    for given in (right, right.view(np.int32)):
        pointer, count = arrays.tokens("it", OnGpu(given), Place("cuda:0"), (3, 4))
        assert int(arrays.ffi.cast("uintptr_t", pointer)) == right.ctypes.data and count == 12
    contiguous = OnGpu(right, strides=(16, 4))
    assert arrays.tokens("it", contiguous, Place("cuda:0"))[1] == 12
    with pytest.raises(ValueError, match=r"where the engine is \(cpu\)"):
        arrays.tokens("it", OnGpu(right), Place("cpu"))
    with pytest.raises(TypeError, match="expected an array of <u4 or <i4, got <i8"):
        arrays.tokens("it", OnGpu(right.astype(np.int64)), Place("cuda:0"))
    with pytest.raises(ValueError, match="C-contiguous"):
        arrays.tokens("it", OnGpu(right[:, ::2]), Place("cuda:0"))
    with pytest.raises(ValueError, match="expected the shape"):
        arrays.tokens("it", OnGpu(right), Place("cuda:0"), (4, 3))
    floats = np.ones(3, np.float32)
    assert arrays.room("it", OnGpu(floats), Place("cuda:0"))[1] == 3
    floats.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        arrays.room("it", OnGpu(floats), Place("cuda:0"))


def test_a_stream_is_the_engines_or_none():
    array = np.ones(3, np.float32)
    own = Place("cuda:0", 0x5500)
    for place, stream in ((own, None), (own, 0), (own, 0x5500), (Place("cuda:0"), None)):
        assert arrays.floats("it", OnGpu(array, stream=stream), place)[1] == 3
    for place, stream in ((own, 0x5501), (own, 1), (own, 2), (Place("cuda:0"), 1)):
        for take in (arrays.floats, arrays.room):
            with pytest.raises(ValueError, match=f"it: expected an array .* stream {stream};"):
                take("it", OnGpu(array, stream=stream), place)
    with pytest.raises(ValueError, match="cuda_stream: expected the address of a stream, got 0"):
        mxt.Engine(device="cuda", cuda_stream=0)
    with pytest.raises(mxt.MxtError, match="cuda_stream"):
        mxt.Engine(cuda_stream=0x5500)


def test_a_gpus_pointer_reaches_the_library(make_trainer, weights_of):
    # NOTE: the processor's engine takes it for a GPU's, since the trainer says so.
    rows = tokens(3 * 17).reshape(3, 17).astype(np.uint32)
    host, gpu = make_trainer(), make_trainer()
    gpu._place = Place("cuda:0")
    assert host.step_tokens(rows).loss == gpu.step_tokens(OnGpu(rows)).loss
    inputs, targets = np.ascontiguousarray(rows[:, :-1]), np.ascontiguousarray(rows[:, 1:])
    losses = np.zeros((3, 16), np.float32)
    weights = np.ones((3, 16), np.float32)
    host.forward_backward(inputs, targets)
    gpu.forward_backward(OnGpu(inputs), OnGpu(targets), OnGpu(weights), losses=OnGpu(losses))
    assert host.update().loss == gpu.update().loss and losses.min() > 0
    name = "transformer.wpe.weight"
    tensors, out = gpu.model.tensors, np.zeros((16, 32), np.float32)
    tensors.read(name, OnGpu(out))
    assert np.array_equal(out, host.model.tensors[name])
    tensors[name] = OnGpu(out * 2)
    assert np.array_equal(tensors[name], 2 * out)


def test_what_is_no_numpy_array_but_has_dlpack():
    if not hasattr(np, "from_dlpack"):
        pytest.skip("this numpy has no from_dlpack")

    class Other:
        def __init__(self, array):
            self.array = array

        def __dlpack__(self, **options):
            return self.array.__dlpack__(**options)

        def __dlpack_device__(self):
            return self.array.__dlpack_device__()

    data = np.arange(5, dtype=np.int64)
    assert np.array_equal(mxt.Dataset(Other(data))[:], data)


def test_memory_of_c_is_seen_without_a_copy():
    memory = (ctypes.c_float * 6)(*range(6))
    pointer = arrays.ffi.cast("float *", ctypes.addressof(memory))
    seen = arrays.view(pointer, np.float32, (2, 3))
    seen[1, 2] = 9
    assert memory[5] == 9 and arrays.view(pointer, np.float32, (0, 3)).shape == (0, 3)


def test_tokens_in_memory_are_not_copied(make_trainer):
    data = tokens()
    losses = set()
    for kind in (np.uint16, np.uint32):
        lent, array = len(callbacks.lent), data.astype(kind)
        dataset = mxt.Dataset.from_memory(array)
        array[7] = 3
        assert dataset[7] == 3
        array[7] = data[7]
        gone = weakref.ref(array)
        del array
        losses.add(make_trainer().step(dataset).loss)
        assert gone() is not None and len(callbacks.lent) == lent + 1
        dataset.close()
        assert gone() is None and len(callbacks.lent) == lent
    losses.add(make_trainer().step(mxt.Dataset(data)).loss)
    assert len(losses) == 1
    for wrong in (data, data.astype(np.uint32)[::2]):
        with pytest.raises(TypeError, match="expected a C-contiguous array of uint16 or uint32"):
            mxt.Dataset.from_memory(wrong)
    lent = len(callbacks.lent)
    with pytest.raises(mxt.InvalidArgument):
        mxt.Dataset.from_windows(0, print)
    assert len(callbacks.lent) == lent


def test_windows_that_the_program_fills(make_trainer):
    rows, seen = tokens(6 * 17).reshape(6, 17), []

    def fill(number, window, weights):
        seen.append((number, window.shape, weights.tolist()))
        window[:] = rows[number]
        weights[:10] = 0

    trainer, dataset = make_trainer(), mxt.Dataset.from_windows(6, fill)
    first = trainer.step(dataset)
    numbers = [number for number, *_ in seen]
    assert seen[0][1:] == ((17,), [1] * 16) and len(numbers) == 3
    other, losses = make_trainer(), np.empty((3, 16), np.float32)
    mask = np.broadcast_to(np.arange(16) >= 10, (3, 16))
    given = rows[numbers]
    other.forward_backward(given[:, :-1], given[:, 1:], mask, losses=losses)
    assert other.update().loss == pytest.approx(first.loss, rel=1e-6)
    trainer.step(dataset)
    assert sorted(number for number, *_ in seen) == [0, 1, 2, 3, 4, 5]
    assert trainer.evaluate(dataset).tokens == 6 * 6
    with pytest.raises(mxt.Unsupported):
        dataset[0:1]

    def broken(_number, _tokens, _weights):
        raise EOFError("no such window")

    with pytest.raises(EOFError, match="no such window"):
        trainer.step(mxt.Dataset.from_windows(6, broken))
    with pytest.raises(EOFError):
        trainer.run(mxt.Dataset.from_windows(6, broken), steps=3)
    with pytest.raises(TypeError, match="fill: expected a function, got 6"):
        mxt.Dataset.from_windows(6, 6)
    assert trainer.steps_done == 2


def test_weights_of_windows(make_trainer):
    def windows(weight):
        def fill(number, window, weights):
            window[:] = number
            weights[:] = weight

        return mxt.Dataset.from_windows(6, fill)

    trainer = make_trainer()
    expected = trainer.evaluate(windows(1)).loss
    assert trainer.evaluate(windows(3)).loss == pytest.approx(expected, rel=1e-6)
    for weight, error in (
        (-1, mxt.InvalidArgument),
        (np.inf, mxt.NotFinite),
        (1e-30, mxt.InvalidArgument),
        (1e30, mxt.InvalidArgument),
    ):
        with pytest.raises(error):
            trainer.step(windows(weight))
    assert trainer.steps_done == 0
    # Nothing is learned, which is a step all the same.
    stats = trainer.step(windows(0))
    assert (stats.step, stats.loss, stats.grad_norm) == (1, 0, 0)
    with pytest.raises(mxt.InvalidArgument):
        trainer.evaluate(windows(0))
