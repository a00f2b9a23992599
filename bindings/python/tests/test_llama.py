"""Llama's blocks: shapes, folders of transformers, tensors that files have in parts."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import SHAPE

import mxfp4train as mxt

ORACLES = Path(__file__).resolve().parents[3] / "tests" / "oracle"

# Nothing in it is what a default or another number says, too.
LLAMA = {
    **SHAPE,
    "architecture": "llama",
    "heads": 4,
    "kv_heads": 2,
    "head_size": 6,
    "mlp_channels": 20,
    "layer_norm_epsilon": 0.25,
    "tied_head": False,
    "qk_norm": True,
    "rope_theta": 5e5,
    "rope_scaling": "llama3",
    "rope_factor": 8.0,
    "rope_low_frequency": 0.5,
    "rope_high_frequency": 3.0,
    "rope_original_context": 9,
}

QKV = "model.layers.0.self_attn.{}_proj.weight"
MLP = "model.layers.1.mlp.{}_proj.weight"


@pytest.fixture
def model(engine):
    return mxt.Model(engine, **LLAMA)


def safetensors(path):
    """The arrays of a file, and its metadata."""
    content = path.read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:begin])
    metadata = header.pop("__metadata__", {})
    types = {"F32": np.float32, "I32": np.int32}
    arrays = {}
    for name, of in header.items():
        first, end = (begin + offset for offset in of["data_offsets"])
        arrays[name] = np.frombuffer(content[first:end], types[of["dtype"]]).reshape(of["shape"])
    return arrays, metadata


def test_shapes(engine, model):
    config = model.config
    assert {name: getattr(config, name) for name in LLAMA} == LLAMA
    assert config.qkv_bias is False and config.qk_norm is True
    assert mxt.Model(engine, **config._asdict()).config == config

    plain = mxt.Model(engine, **SHAPE, architecture="llama", activation="gelu").config
    assert (plain.kv_heads, plain.head_size, plain.mlp_channels) == (0, 0, 0)
    assert (plain.rope_theta, plain.rope_scaling, plain.rope_factor) == (10000, None, 1)
    assert mxt.Model(engine, **SHAPE, architecture="llama", rope_scaling="none").config == plain
    qwen2 = {**SHAPE, "architecture": "llama", "qkv_bias": True, "rope_scaling": "linear"}
    config = mxt.Model(engine, **qwen2, rope_factor=2).config
    assert config.qkv_bias is True and (config.rope_scaling, config.rope_factor) == ("linear", 2)
    small = engine.plan(model={**qwen2, "kv_heads": 1}, trainer={"batch_size": 2})
    assert small.weights < engine.plan(model=qwen2, trainer={"batch_size": 2}).weights


@pytest.mark.parametrize(
    "change, text",
    [
        ({"kv_heads": 3}, "kv_heads: 3 do not divide 4 heads"),
        ({"head_size": 5}, "head_size: expected an even number"),
        ({"qkv_bias": True}, "qkv_bias: expected no bias beside norms"),
        ({"scale_attention": False}, "scale_attention"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"rope_scaling": "linear", "rope_factor": 0.5}, "rope_factor: expected a number from 1"),
        ({"rope_low_frequency": 3}, "rope_high_frequency: expected more than"),
        ({"rope_original_context": 0}, "rope_original_context"),
        ({"architecture": "gpt2"}, "architecture llama has"),
    ],
)
def test_what_is_no_llama(engine, change, text):
    with pytest.raises(mxt.InvalidArgument, match=text):
        mxt.Model(engine, **{**LLAMA, **change})


def test_names_and_kinds_of_arguments(engine):
    with pytest.raises(ValueError, match="architecture: expected one of 'gpt2', 'llama', got 'x'"):
        mxt.Model(engine, architecture="x")
    with pytest.raises(ValueError, match="rope_scaling: expected one of 'none', 'linear', 'll"):
        mxt.Model(engine, architecture="llama", rope_scaling="yarn")
    with pytest.raises(TypeError, match="rope_theta: expected a number"):
        mxt.Model(engine, architecture="llama", rope_theta="10000")
    with pytest.raises(ValueError, match="kv_heads: expected a whole number from 0"):
        mxt.Model(engine, architecture="llama", kv_heads=-1)
    with pytest.raises(TypeError, match="qk_norm: expected a whole number"):
        mxt.Model(engine, architecture="llama", qk_norm="yes")


def test_tensors_in_parts(model):
    weights = model.tensors
    whole = weights[QKV.format("qkv")]
    q, k, v = (weights[QKV.format(name)] for name in "qkv")
    assert (q.shape, k.shape, v.shape) == ((24, 32), (12, 32), (12, 32))
    assert np.array_equal(np.concatenate([q, k, v]), whole)
    gate, up = weights[MLP.format("gate")], weights[MLP.format("up")]
    assert gate.shape == (20, 32)
    assert np.array_equal(np.concatenate([gate, up]), weights[MLP.format("gate_up")])

    # They are there, and are not listed: all tensors have every number once.
    assert QKV.format("q") in weights and QKV.format("q") not in list(weights)
    assert weights.get("no.such") is None and 7 not in weights
    assert sum(values.size for values in weights.values()) == model.parameter_count
    weights[QKV.format("k")] = np.ones((12, 32))
    assert np.array_equal(weights[QKV.format("qkv")], np.concatenate([q, np.ones((12, 32)), v]))
    room = np.empty((12, 32), np.float32)
    weights.read(QKV.format("v"), room)
    assert np.array_equal(room, v)
    with pytest.raises(ValueError, match=r"k_proj.weight.*\(12, 32\)"):
        weights[QKV.format("k")] = q
    with pytest.raises(mxt.NotFinite, match="k_proj"):
        weights[QKV.format("k")] = np.full((12, 32), np.nan)
    for name in ("model.layers.2.mlp.up_proj.weight", QKV.format("x"), "self_attn.q_proj.weight"):
        assert name not in weights
        with pytest.raises(KeyError, match=name):
            weights[name]


def test_gradients_in_parts(model, dataset):
    trainer = mxt.Trainer(model, batch_size=3, lr=1e-2)
    trainer.step(dataset)
    gradients = trainer.gradients
    q, k, v = (gradients[QKV.format(name)] for name in "qkv")
    assert np.array_equal(np.concatenate([q, k, v]), gradients[QKV.format("qkv")]) and k.any()
    gradients[QKV.format("v")] = np.ones((12, 32))
    assert np.array_equal(gradients[QKV.format("v")], np.ones((12, 32)))
    assert not gradients[QKV.format("q")].any()
    frozen = mxt.Trainer(model, batch_size=3, frozen="*.qkv_proj.*")
    frozen.step(dataset)
    assert QKV.format("q") not in frozen.gradients and MLP.format("up") in frozen.gradients


def test_training_saving_and_texts(engine, model, dataset, tmp_path):
    trainer = mxt.Trainer(model, batch_size=3, lr=1e-2)
    losses = [stats.loss for stats in trainer.steps(dataset, 30)]
    assert np.mean(losses[-5:]) < losses[0]
    trainer.save(tmp_path)
    again = mxt.Trainer.load(engine, tmp_path)
    assert again.model.config == model.config
    assert again.step(dataset).loss == trainer.step(dataset).loss

    text = model.generate([1, 2, 3], max_tokens=6, temperature=0)
    assert text[0] == model.next_logits([1, 2, 3]).argmax() and len(text) == 6
    start = [1, 2, 3, *text[:3].tolist()]
    assert np.array_equal(model.generate(start, max_tokens=3, temperature=0), text[3:])
    decoder = mxt.Decoder(model)
    decoder.push(start)
    assert np.array_equal(decoder.logits(), model.next_logits(start))

    kept = {}
    model.save(kept)
    assert json.loads(kept["config.json"])["architectures"] == ["Qwen3ForCausalLM"]
    assert mxt.Model.load(engine, kept).config == model.config
    adapted = model.with_lora(2, layers=["attn.c_attn"])
    adapter = adapted.tensors["model.layers.0.self_attn.qkv_proj.lora_B.weight"]
    assert adapter.shape == (48, 2) and adapted.config.lora_layers == ("attn.c_attn",)


@pytest.mark.parametrize("name", ["llama-tiny", "qwen2-odd", "qwen3-tiny", "llama-stretched"])
def test_folders_of_transformers(engine, name):
    model = mxt.Model.load(engine, ORACLES / name)
    said = json.loads((ORACLES / name / "config.json").read_text(encoding="utf-8"))
    config, rope = model.config, said["rope_parameters"]
    heads, channels = said["num_attention_heads"], said["hidden_size"]
    assert (config.architecture, config.heads, config.channels) == ("llama", heads, channels)
    assert config.kv_heads == said["num_key_value_heads"]
    assert (config.head_size or channels // heads) == said.get("head_dim", channels // heads)
    assert (config.qkv_bias, config.qk_norm) == ("qwen2" in name, "qwen3" in name)
    assert config.tied_head == said["tie_word_embeddings"]
    assert config.rope_theta == rope["rope_theta"]
    if config.rope_scaling is None:
        assert rope["rope_type"] == "default"
    else:
        assert (config.rope_scaling, config.rope_factor) == (rope["rope_type"], rope["factor"])
        assert config.rope_original_context == rope["original_max_position_embeddings"]

    # Every tensor of the file is there by its name.
    weights, _ = safetensors(ORACLES / name / "model.safetensors")
    assert "model.layers.0.self_attn.q_proj.weight" in weights
    for tensor, values in weights.items():
        if tensor in model.tensors:
            assert np.array_equal(model.tensors[tensor], values), tensor
        else:
            assert tensor == "lm_head.weight" and config.tied_head

    expected, _ = safetensors(ORACLES / name / "expected.safetensors")
    tokens = expected["tokens"]
    batch, length = len(tokens), tokens.shape[1] - 1
    trainer = mxt.Trainer(model, batch_size=batch, sequence_length=length, recipe="fp32")
    rows = tokens[:, :-1], tokens[:, 1:]
    assert abs(trainer.forward(*rows).loss - expected["losses"].mean()) < 1e-5
    trainer.forward_backward(*rows)
    gradients = trainer.gradients
    for tensor, values in expected.items():
        if tensor.startswith("grad."):
            found = gradients[tensor[len("grad.") :]]
            assert np.abs(found - values).max() < 1e-4 * np.abs(values).max() + 1e-7, tensor
