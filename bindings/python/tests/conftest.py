"""What all tests share: a small model, and data that it can learn."""

import numpy as np
import pytest

import mxfp4train as mxt

SHAPE = {"vocab_size": 61, "context_length": 16, "layers": 2, "heads": 2, "channels": 32}


def tokens(count=4000):
    places = np.arange(count)
    return (places * places + places // 7) % 59


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
