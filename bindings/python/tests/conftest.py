"""What all tests share: a small model, and data that it can learn."""

import threading

import numpy as np
import pytest

import mxfp4train as mxt

SHAPE = {"vocab_size": 61, "context_length": 16, "layers": 2, "heads": 2, "channels": 32}


def tokens(count=4000):
    places = np.arange(count)
    return (places * places + places // 7) % 59


class Wires:
    """Two ranks of one process, which meet at every exchange."""

    def __init__(self):
        self.barrier = threading.Barrier(2, timeout=60)
        self.sent = [None, None]

    def group(self, rank):
        def meet(send, receive, part):
            self.sent[rank] = send.copy()
            self.barrier.wait()
            receive[:] = np.concatenate([part(bytes_of) for bytes_of in self.sent])
            self.barrier.wait()

        return mxt.Group(
            rank,
            2,
            lambda send, receive: meet(send, receive, lambda all: all.reshape(2, -1)[rank]),
            lambda mine, all: meet(mine, all, lambda theirs: theirs),
            self.barrier.abort,
        )


@pytest.fixture
def engine():
    return mxt.Engine(threads=2)


@pytest.fixture
def dataset():
    return mxt.Dataset(tokens())


@pytest.fixture
def make_trainer():
    """Makes trainers that begin alike."""

    def make(engine=None, **options):
        model = mxt.Model(engine or mxt.Engine(threads=2), **SHAPE)
        return mxt.Trainer(model, **{"batch_size": 3, "lr": 1e-2, **options})

    return make


@pytest.fixture
def weights_of():
    """All weights of a trainer in a row."""

    def weights(trainer):
        return np.concatenate([value.ravel() for value in trainer.model.tensors.values()])

    return weights
