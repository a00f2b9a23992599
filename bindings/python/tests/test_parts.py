"""A step in parts: batches, masks, losses of the host, gradients, updates."""

import inspect
import re
import textwrap
import traceback

import numpy as np
import pytest
from conftest import tokens

import mxfp4train as mxt

ROWS = tokens(3 * 17).reshape(3, 17)
INPUTS, TARGETS = ROWS[:, :-1], ROWS[:, 1:]


def cross_entropy(targets, seen=None):
    """The example of the documentation."""
    documentation = inspect.getdoc(mxt.Trainer.forward_backward)
    text = re.search(r"^ +def loss.*?return losses$", documentation, re.DOTALL | re.MULTILINE)
    names = {"numpy": np, "targets": targets}
    exec(textwrap.dedent(text[0]), names)

    def loss(logits, first_row):
        if seen is not None:
            seen.append((first_row, logits.copy()))
        return names["loss"](logits, first_row)

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
    assert [(first, it.shape, it.dtype) for first, it in seen] == [(0, (48, 61), np.float32)]
    for name, expected in library.gradients.items():
        assert np.allclose(own.gradients[name], expected, rtol=1e-4, atol=1e-6), name
    expected, found = library.update(), own.update()
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    assert losses.mean() == pytest.approx(expected.loss, rel=1e-5)


def test_a_loss_of_ones_own_with_ignored_targets(make_trainer):
    targets = TARGETS.copy()
    # Below 0 by more than there are tokens, which is no place in a row.
    targets[:, :7] = -100
    library, own = make_trainer(recipe="fp32"), make_trainer(recipe="fp32")
    library.forward_backward(INPUTS, targets)
    own.forward_backward(INPUTS, targets, loss=cross_entropy(targets))
    name = "transformer.wpe.weight"
    assert np.allclose(own.gradients[name], library.gradients[name], rtol=1e-4, atol=1e-6)
    assert own.update().loss == pytest.approx(library.update().loss, rel=1e-6)


def test_forward_is_the_loss_alone(make_trainer, weights_of):
    trainer, alone = make_trainer(recipe="fp32"), make_trainer(recipe="fp32")
    before, mask = weights_of(trainer), np.arange(16) >= 5
    weights = np.broadcast_to(mask, TARGETS.shape) * 0.5
    losses = np.empty(TARGETS.shape, np.float32)
    for given in ({}, {"loss": cross_entropy(TARGETS)}):
        stats = trainer.forward(INPUTS, TARGETS, weights, losses=losses, **given)
        assert isinstance(stats, mxt.EvalStats) and stats.tokens == 3 * 11
        assert stats.loss == pytest.approx(losses[:, mask].mean(), rel=1e-5)
        assert stats.perplexity == pytest.approx(np.exp(stats.loss), rel=1e-5)
        halved = trainer.forward(INPUTS, TARGETS, weights, 2 * weights.sum(), **given)
        assert halved.loss == pytest.approx(stats.loss / 2, rel=1e-6)
    assert trainer.forward(INPUTS, loss=cross_entropy(TARGETS)).tokens == 48
    with pytest.raises(mxt.InvalidArgument):
        trainer.update()
    # It changes nothing of batches that wait, nor of a step.
    trainer.forward_backward(INPUTS, TARGETS, weights)
    gradient = trainer.gradients["transformer.wpe.weight"]
    assert trainer.forward(INPUTS, TARGETS, weights).loss == stats.loss
    with pytest.raises(ArithmeticError):
        trainer.forward(INPUTS, loss=lambda *_: 1 // 0)
    with pytest.raises(mxt.Stopped):
        trainer.forward(INPUTS, loss=lambda *_: mxt.STOP)
    with pytest.raises(mxt.InvalidArgument):
        trainer.forward(INPUTS, np.full(TARGETS.shape, -1))
    assert np.array_equal(trainer.gradients["transformer.wpe.weight"], gradient)
    assert np.array_equal(weights_of(trainer), before)
    alone.forward_backward(INPUTS, TARGETS, weights)
    expected, found = alone.update(), trainer.update()
    assert found.loss == expected.loss and found.grad_norm == expected.grad_norm
    assert trainer.forward(INPUTS, TARGETS, weights).loss < stats.loss


def test_divisors(make_trainer):
    trainer = make_trainer()
    for call in (trainer.forward_backward, trainer.forward):
        for zero in (0, 0.0, np.float32(0), -0.0):
            with pytest.raises(ValueError, match="divisor: expected another number than 0"):
                call(INPUTS, TARGETS, divisor=zero)
        with pytest.raises(mxt.InvalidArgument, match="divisor"):
            call(INPUTS, TARGETS, divisor=float("nan"))
        with pytest.raises(TypeError, match="divisor: expected a number"):
            call(INPUTS, TARGETS, divisor="48")
    # What weights come to is a mean that a float can hold.
    for weight in (1e-30, 1e30):
        with pytest.raises(mxt.InvalidArgument):
            trainer.forward(INPUTS, TARGETS, np.full(TARGETS.shape, weight))
        trainer.forward_backward(INPUTS, TARGETS, np.full(TARGETS.shape, weight))
        with pytest.raises(mxt.InvalidArgument):
            trainer.update()


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
    # What has been changed is no sum of batches any more.
    with pytest.raises(mxt.InvalidArgument):
        trainer.forward_backward(INPUTS, TARGETS)
    trainer.update()
    decay = 1 - np.float32(1e-2) * np.float32(0.1)
    assert np.allclose(trainer.model.tensors[name], decay * position, rtol=1e-6)
    trainer.forward_backward(INPUTS, TARGETS)
    with pytest.raises(mxt.InvalidArgument):
        trainer.step_tokens(ROWS)
    trainer.zero_gradients()
    for use in (trainer.update, lambda: trainer.gradients[name]):
        with pytest.raises(mxt.InvalidArgument):
            use()
    # A program may bring all gradients itself.
    trainer.gradients[name] = before
    assert np.array_equal(trainer.gradients[name], before)
    with pytest.raises(mxt.InvalidArgument):
        trainer.forward_backward(INPUTS, TARGETS)
    assert trainer.update().grad_norm == pytest.approx(np.linalg.norm(before), rel=1e-5)
    # After scaling, and an update that fails.
    trainer.forward_backward(INPUTS, TARGETS)
    trainer.scale_gradients(0.5)
    with pytest.raises(mxt.InvalidArgument):
        trainer.forward_backward(INPUTS, TARGETS)
    trainer.zero_gradients()
    trainer.forward_backward(INPUTS, np.full(TARGETS.shape, -1))
    for use in (trainer.update, lambda: trainer.gradients[name]):
        with pytest.raises(mxt.InvalidArgument):
            use()
    trainer.step_tokens(ROWS)
    assert trainer.gradients[name].any()


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


def test_documents_are_as_if_each_were_alone(make_trainer):
    documents = np.repeat([[9, 0, 4]], [6, 1, 9], axis=1).repeat(3, axis=0)
    trainer = make_trainer()
    together, losses = (np.zeros((3, 16), np.float32) for _ in range(2))
    trainer.forward(INPUTS, TARGETS, losses=together)
    for numbers in (documents, documents.astype(np.int8), documents.tolist()):
        trainer.forward(INPUTS, TARGETS, documents=numbers, losses=losses)
        assert np.array_equal(losses[:, :6], together[:, :6])
        assert not np.any(losses[:, 6:] == together[:, 6:])
    for first, end in ((6, 7), (7, 16)):
        alone = mxt.Trainer(trainer.model, batch_size=3, sequence_length=end - first)
        found = np.zeros((3, end - first), np.float32)
        alone.forward(INPUTS[:, first:end], TARGETS[:, first:end], losses=found)
        assert np.array_equal(found, losses[:, first:end])
    trainer.forward_backward(INPUTS, TARGETS, documents=documents)
    assert trainer.update().loss == pytest.approx(losses.mean(), rel=1e-5)
    with pytest.raises(ValueError, match="documents: expected"):
        trainer.forward_backward(INPUTS, TARGETS, documents=documents[:, 1:])
    with pytest.raises(ValueError, match="documents: expected tokens from 0"):
        trainer.forward_backward(INPUTS, TARGETS, documents=documents - 1)


def test_a_token_ends_documents(make_trainer):
    end = int(INPUTS[1, 5])
    numbers = np.zeros((3, 17), np.uint32)
    numbers[:, 1:] = np.cumsum(ROWS == end, axis=1)[:, :-1]
    given, by_token = make_trainer(), make_trainer(document_end=end)
    assert (given.options.document_end, by_token.options.document_end) == (None, end)
    expected = given.forward(INPUTS, TARGETS, documents=numbers[:, :-1]).loss
    assert by_token.forward(INPUTS, TARGETS).loss == expected
    assert given.forward(INPUTS, TARGETS).loss != expected

    def fill(number, tokens, weights, documents):
        assert not documents.any() and len(documents) == len(weights) == len(tokens) - 1
        tokens[:] = ROWS[number]
        documents[:] = numbers[number, :-1]

    def unmarked(number, tokens, weights, documents):
        tokens[:] = ROWS[number]

    packed, plain = (mxt.Dataset.from_packed_windows(3, of) for of in (fill, unmarked))
    loss = given.evaluate(packed).loss
    assert loss == pytest.approx(expected, rel=1e-6)
    assert by_token.evaluate(plain).loss == by_token.evaluate(packed).loss == loss
    assert given.evaluate(plain).loss != loss
    with pytest.raises(mxt.InvalidArgument, match="document_end"):
        make_trainer(document_end=61)
