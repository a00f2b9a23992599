"""A step in parts: batches, masks, losses of the host, gradients, updates."""

import traceback

import numpy as np
import pytest
from conftest import tokens

import mxfp4train as mxt

ROWS = tokens(3 * 17).reshape(3, 17)
INPUTS, TARGETS = ROWS[:, :-1], ROWS[:, 1:]


def cross_entropy(targets, seen=None):
    def loss(logits, first_row):
        rows = np.arange(len(logits))
        if seen is not None:
            seen.append((first_row, logits.shape, logits.dtype))
        wanted = targets.reshape(-1)[first_row:][: len(logits)]
        logits -= logits.max(axis=1, keepdims=True)
        np.exp(logits, out=logits)
        logits /= logits.sum(axis=1, keepdims=True)
        losses = -np.log(logits[rows, wanted])
        logits[rows, wanted] -= 1
        return losses

    return loss


def test_parts_have_the_bits_of_a_step(make_trainer, weights_of):
    whole, parts = make_trainer(accumulation=2), make_trainer(accumulation=2)
    for _ in range(3):
        expected = whole.step_tokens(np.concatenate([ROWS, ROWS[::-1]]))
        for rows in (ROWS, ROWS[::-1]):
            parts.forward_backward(rows[:, :-1], rows[:, 1:])
        found = parts.update()
        assert (found.step, found.loss, found.grad_norm, found.tokens) == (
            expected.step,
            expected.loss,
            expected.grad_norm,
            expected.tokens,
        )
    assert np.array_equal(weights_of(whole), weights_of(parts))


def test_masks_and_ignored_targets_say_the_same(make_trainer):
    mask = np.zeros(TARGETS.shape, bool)
    mask[:, 5:] = True
    forms = [
        (TARGETS, mask, None),
        (TARGETS, mask.astype(float), None),
        (np.where(mask, TARGETS, -100), None, None),
        (np.where(mask, TARGETS, mxt.IGNORED).astype(np.uint32), None, None),
        (np.where(mask, TARGETS, -1).astype(np.int16), None, float(mask.sum())),
    ]
    found = []
    for targets, weights, divisor in forms:
        trainer = make_trainer()
        losses = np.full(TARGETS.shape, np.nan, np.float32)
        trainer.forward_backward(INPUTS, targets, weights, divisor, losses=losses)
        stats = trainer.update()
        assert stats.loss == pytest.approx(losses[mask].mean(), rel=1e-6)
        assert (losses[~mask] == 0).all() == (weights is None)
        found.append((stats.loss, stats.grad_norm))
    assert all(it == pytest.approx(found[0], rel=1e-6) for it in found)


def test_a_loss_of_ones_own_is_the_librarys(make_trainer):
    library, own, seen = make_trainer(recipe="fp32"), make_trainer(recipe="fp32"), []
    library.forward_backward(INPUTS, TARGETS)
    losses = np.empty(TARGETS.shape, np.float32)
    own.forward_backward(INPUTS, loss=cross_entropy(TARGETS, seen), losses=losses)
    assert seen[0] == (0, (48, 61), np.float32) and sum(shape[0] for _, shape, _ in seen) == 48
    for name, expected in library.gradients.items():
        assert np.allclose(own.gradients[name], expected, rtol=1e-4, atol=1e-6), name
    expected, found = library.update(), own.update()
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    assert losses.mean() == pytest.approx(expected.loss, rel=1e-5)


def test_gradients(make_trainer):
    trainer = make_trainer()
    assert set(trainer.gradients) == set(trainer.model.tensors)
    trainer.forward_backward(INPUTS, TARGETS)
    name = "transformer.wpe.weight"
    before = trainer.gradients[name]
    assert before.shape == (16, 32) and np.abs(before).max() > 0
    trainer.scale_gradients(2)
    assert np.array_equal(trainer.gradients[name], 2 * before)
    trainer.scale_gradients(0.5, tensor=name)
    assert np.array_equal(trainer.gradients[name], before)
    position = trainer.model.tensors[name]
    trainer.gradients[name] = np.zeros((16, 32))
    trainer.update()
    decay = 1 - np.float32(1e-2) * np.float32(0.1)
    assert np.allclose(trainer.model.tensors[name], decay * position, rtol=1e-6)
    trainer.forward_backward(INPUTS, TARGETS)
    with pytest.raises(mxt.InvalidArgument):
        trainer.step_tokens(ROWS)
    trainer.zero_gradients()
    with pytest.raises(mxt.InvalidArgument):
        trainer.update()
    # A program may bring all gradients itself.
    trainer.gradients[name] = before
    assert trainer.update().grad_norm == pytest.approx(np.linalg.norm(before), rel=1e-5)


def test_what_a_loss_raises_is_raised(make_trainer, weights_of):
    trainer = make_trainer()
    before = weights_of(trainer)

    def deep_down(_logits, _first_row):
        raise ArithmeticError("no such loss")

    with pytest.raises(ArithmeticError, match="no such loss") as caught:
        trainer.forward_backward(INPUTS, TARGETS, loss=deep_down)
    assert "deep_down" in [frame.name for frame in traceback.extract_tb(caught.tb)]
    with pytest.raises(mxt.InvalidArgument):
        trainer.update()
    for answer in (None, 1.0, np.zeros(3), ["a"] * 48):
        with pytest.raises(ValueError, match="expected to return the loss of each of 48 rows"):
            trainer.forward_backward(INPUTS, loss=lambda _logits, _first, it=answer: it)
    with pytest.raises(mxt.Stopped):
        trainer.forward_backward(INPUTS, loss=lambda _logits, _first: mxt.STOP)
    busy = []

    def calls_the_trainer(logits, _first_row):
        with pytest.raises(mxt.Busy) as caught:
            trainer.update()
        busy.append(caught.value)
        logits[:] = 0
        return np.zeros(len(logits))

    trainer.forward_backward(INPUTS, loss=calls_the_trainer)
    assert len(busy) == 1 and np.array_equal(weights_of(trainer), before)


def test_arrays_that_do_not_fit(make_trainer):
    trainer = make_trainer()
    right = np.zeros(TARGETS.shape, np.float32)
    for name in ("weights", "losses"):
        with pytest.raises(ValueError, match=rf"{name}: expected the shape \(3, 16\)"):
            trainer.forward_backward(INPUTS, TARGETS, **{name: np.zeros((16, 3), np.float32)})
    for losses in (right.astype(float), right.copy(order="F"), right.tolist()):
        with pytest.raises(TypeError, match="losses: expected"):
            trainer.forward_backward(INPUTS, TARGETS, losses=losses)
    right.flags.writeable = False
    with pytest.raises(TypeError, match="read-only"):
        trainer.forward_backward(INPUTS, TARGETS, losses=right)
    with pytest.raises(ValueError, match="tokens: expected tokens from 0"):
        trainer.forward_backward(INPUTS - 1, TARGETS)
    with pytest.raises(mxt.MxtError):
        trainer.forward_backward(INPUTS)
