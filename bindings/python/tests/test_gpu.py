"""Arrays in a GPU's memory, where there is a GPU."""

import ctypes

import numpy as np
import pytest
from conftest import tokens

import mxfp4train as mxt


@pytest.fixture(scope="module")
def cuda():
    """The driver, with the primary context of the first GPU."""
    try:
        engine = mxt.Engine(device="cuda:0")
    except mxt.MxtError as error:
        pytest.skip(f"no GPU: {error}")
    driver = ctypes.CDLL("libcuda.so.1")
    context = ctypes.c_void_p()
    assert driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0) == 0
    yield engine, driver, context
    driver.cuDevicePrimaryCtxRelease_v2(0)


class OnGpu:
    """A copy of an array on the GPU."""

    def __init__(self, cuda, array):
        _, self.driver, self.context = cuda
        self.array = np.ascontiguousarray(array)
        pointer = ctypes.c_uint64()
        assert self.driver.cuCtxPushCurrent_v2(self.context) == 0
        size = ctypes.c_size_t(self.array.nbytes)
        assert self.driver.cuMemAlloc_v2(ctypes.byref(pointer), size) == 0
        self.pointer, self.size = pointer, size
        host = ctypes.c_void_p(self.array.ctypes.data)
        assert self.driver.cuMemcpyHtoD_v2(pointer, host, size) == 0
        self.pop()
        self.__cuda_array_interface__ = {
            "shape": self.array.shape,
            "typestr": self.array.dtype.str,
            "data": (pointer.value, False),
            "strides": None,
            "version": 3,
        }

    def pop(self):
        assert self.driver.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p())) == 0

    def values(self):
        assert self.driver.cuCtxPushCurrent_v2(self.context) == 0
        assert self.driver.cuCtxSynchronize() == 0
        found = np.empty_like(self.array)
        host = ctypes.c_void_p(found.ctypes.data)
        assert self.driver.cuMemcpyDtoH_v2(host, self.pointer, self.size) == 0
        self.pop()
        return found


def test_arrays_on_the_gpu_train_as_those_of_the_host(cuda, make_trainer):
    rows = tokens(3 * 17).reshape(3, 17).astype(np.uint32)
    host, gpu = (make_trainer(cuda[0], recipe="bf16") for _ in range(2))
    assert host.step_tokens(rows).loss == gpu.step_tokens(OnGpu(cuda, rows)).loss
    inputs, targets = rows[:, :-1], rows[:, 1:]
    weights = np.linspace(0.5, 1, 48, dtype=np.float32).reshape(3, 16)
    expected = np.empty((3, 16), np.float32)
    losses = OnGpu(cuda, expected)
    host.forward_backward(inputs, targets, weights, losses=expected)
    gpu.forward_backward(
        OnGpu(cuda, inputs.astype(np.int32)),
        OnGpu(cuda, targets),
        OnGpu(cuda, weights),
        losses=losses,
    )
    assert host.update().loss == gpu.update().loss
    assert np.array_equal(losses.values(), expected)


def test_tensors_and_logits_on_the_gpu(cuda, make_trainer):
    model = make_trainer(cuda[0]).model
    tensors, name = model.tensors, "transformer.wpe.weight"
    expected = tensors[name]
    out = OnGpu(cuda, np.zeros((16, 32), np.float32))
    tensors.read(name, out)
    assert np.array_equal(out.values(), expected)
    tensors[name] = OnGpu(cuda, 2 * expected)
    assert np.array_equal(tensors[name], 2 * expected)
    logits = OnGpu(cuda, np.zeros(61, np.float32))
    model.next_logits(OnGpu(cuda, np.arange(5, dtype=np.uint32)), out=logits)
    assert np.array_equal(logits.values(), model.next_logits(range(5)))
    decoder = mxt.Decoder(model)
    decoder.push(OnGpu(cuda, np.arange(5, dtype=np.uint32)))
    assert decoder.tokens().tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(TypeError, match="expected an array of <f4"):
        tensors[name] = OnGpu(cuda, expected.astype(np.float16))
