"""Sampling, logits, scores, decoders."""

import numpy as np
import pytest
from conftest import SHAPE, tokens

import mxfp4train as mxt


@pytest.fixture
def model(engine):
    return mxt.Model(engine, **SHAPE)


def softmax_log(logits):
    shifted = logits.astype(float) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def test_generate(model):
    text = model.generate([1, 2, 3], max_tokens=12, seed=5)
    assert text.dtype == np.uint32 and text.shape == (12,) and text.max() < 61
    assert np.array_equal(model.generate(np.array([1, 2, 3]), max_tokens=12, seed=5), text)
    likely = model.generate([1, 2, 3], max_tokens=1, temperature=0)
    assert likely[0] == model.next_logits([1, 2, 3]).argmax()
    seen = []
    assert len(model.generate([1], max_tokens=9, on_token=seen.append)) == 9 == len(seen)
    assert seen == model.generate([1], max_tokens=9).tolist()
    stopped = model.generate([1], on_token=lambda token: mxt.STOP if token == seen[3] else None)
    assert stopped.tolist() == seen[: seen.index(seen[3]) + 1]
    stops = model.generate([1], max_tokens=9, stop_tokens=[seen[2]])
    assert stops.tolist() == seen[: seen.index(seen[2]) + 1]
    draft = model.generate([1], max_tokens=9, draft="ngram", slide=True, top_k=0, weights="f32")
    assert draft.tolist() == seen
    with pytest.raises(mxt.InvalidArgument):
        model.generate([])
    with pytest.raises(mxt.InvalidArgument):
        model.generate([1], temperature=-1)
    with pytest.raises(ValueError, match="draft: expected one of 'none', 'ngram'"):
        model.generate([1], draft="dice")


def test_what_on_token_raises_is_raised(model):
    def on_token(token):
        raise LookupError(token)

    with pytest.raises(LookupError):
        model.generate([1], on_token=on_token)
    assert len(model.generate([1], max_tokens=2)) == 2


def test_scores(model):
    texts = [tokens(10), np.array([], int), tokens(16)[::-1]]
    scores, states = model.score(texts, hidden=True)
    assert [score.shape for score in scores] == [(10,), (0,), (16,)]
    assert [state.shape for state in states] == [(10, 32), (0, 32), (16, 32)]
    assert scores[0][0] == 0
    for place in range(1, 10):
        expected = softmax_log(model.next_logits(texts[0][:place]))[texts[0][place]]
        assert scores[0][place] == pytest.approx(expected, rel=1e-5)
    # The head makes logits of the states.
    logits = states[2][-1] @ model.tensors["transformer.wte.weight"].T
    assert np.allclose(logits, model.next_logits(texts[2]), atol=1e-5)
    assert model.score([]) == []
    with pytest.raises(mxt.InvalidArgument):
        model.score([np.zeros(17, int)])


def test_a_decoder_gives_the_models_logits(model):
    decoder = mxt.Decoder(model, sequences=3)
    text = tokens(8)
    decoder.push(text[:5])
    decoder.push(text[5:])
    assert np.array_equal(decoder.logits(), model.next_logits(text))
    assert decoder.tokens().tolist() == text.tolist() and decoder.tokens().dtype == np.uint32
    every = decoder.logits_from(3)
    assert every.shape == (5, 61) and np.array_equal(every[0], model.next_logits(text[:4]))
    decoder.fork(0, 2)
    decoder.push([7], sequence=2)
    both = decoder.logits_of([2, 0])
    assert np.array_equal(both[1], decoder.logits()) and not np.array_equal(both[0], both[1])
    decoder.rewind(4)
    out = np.empty(61, np.float32)
    assert decoder.logits(out=out) is out and np.array_equal(out, model.next_logits(text[:4]))
    continued = decoder.generate(max_tokens=3, seed=9)
    assert decoder.tokens().tolist() == [*text[:4], *continued]
    decoder.push([1], sequence=1)
    each = decoder.generate_each([0, 1, 2], max_tokens=4, seed=1)
    assert [len(one) for one in each] == [4, 4, 4]
    assert decoder.tokens(sequence=1).tolist() == [1, *each[1]]
    with pytest.raises(mxt.InvalidArgument):
        decoder.push(tokens(17))
    with pytest.raises(mxt.InvalidArgument):
        decoder.logits(sequence=3)
    with pytest.raises(mxt.TokenRange):
        decoder.push([61])


def test_a_decoder_follows_its_model(engine, dataset):
    model = mxt.Model(engine, **SHAPE)
    decoder = mxt.Decoder(model)
    decoder.push([1, 2])
    before = decoder.logits()
    mxt.Trainer(model, batch_size=2).step(dataset)
    assert not np.array_equal(decoder.logits(), before)
    assert np.array_equal(decoder.logits(), model.next_logits([1, 2]))
    model.close()
    assert decoder.logits().shape == (61,)
