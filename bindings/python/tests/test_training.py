"""Whole steps, runs, checkpoints, and what a trainer tells."""

import threading

import numpy as np
import pytest
from conftest import SHAPE, Wires, tokens

import mxfp4train as mxt


def test_training_learns(make_trainer, dataset):
    trainer = make_trainer(batch_size=8)
    first = trainer.step(dataset)
    assert first.step == 1 and first.tokens == 8 * 16 and abs(first.loss - np.log(61)) < 0.3
    assert first.lr == np.float32(1e-2) and first.update_rms_tensor is None
    *_, last = trainer.steps(dataset, 99)
    assert trainer.steps_done == 100 and last.step == 100
    assert last.loss < 0.7 * first.loss
    before = trainer.evaluate(dataset, max_batches=2)
    assert before.tokens == 2 * 8 * 16 and before.perplexity == pytest.approx(np.exp(before.loss))
    assert trainer.evaluate(dataset, max_batches=2).loss == before.loss


def test_a_saved_run_goes_on_with_the_same_bits(make_trainer, dataset, weights_of, tmp_path):
    trainer = make_trainer()
    trainer.run(dataset, steps=5, save_dir=tmp_path / "run")
    loaded = mxt.Trainer.load(mxt.Engine(threads=1), tmp_path / "run")
    assert loaded.steps_done == 5 and loaded.options == trainer.options
    for _ in range(5):
        expected, found = trainer.step(dataset), loaded.step(dataset)
        assert (found.loss, found.grad_norm) == (expected.loss, expected.grad_norm)
    assert np.array_equal(weights_of(trainer), weights_of(loaded))
    smaller = mxt.Trainer.load(
        mxt.Engine(threads=1), tmp_path / "run", optimizer="adamw,moments=int8"
    )
    assert "int8" in smaller.options.optimizer
    model = mxt.Model.load(mxt.Engine(threads=1), str(tmp_path / "run"))
    model.save(tmp_path / "bf16", weights="bf16")
    again = mxt.Model.load(mxt.Engine(threads=1), tmp_path / "bf16")
    assert again.config == model.config


def test_a_run_evaluates_saves_and_calls_back(make_trainer, dataset, tmp_path):
    trainer, seen = make_trainer(), []
    result = trainer.run(
        dataset,
        steps=6,
        eval_dataset=dataset,
        eval_every=3,
        eval_batches=1,
        save_dir=tmp_path / "out",
        save_every=2,
        on_step=lambda step, evaluation: seen.append((step, evaluation)),
    )
    assert [step.step for step, _ in seen] == [1, 2, 3, 4, 5, 6]
    assert [evaluation is not None for _, evaluation in seen] == [False, False, True] * 2
    assert result.steps == 6 and result.end == "finished" and result.saved
    assert result.last_loss == seen[-1][0].loss and result.last_eval_loss == seen[-1][1].loss
    assert (tmp_path / "out" / "model.safetensors").exists()
    # What is no STOP goes on.
    stopped = trainer.run(
        dataset, steps=5, on_step=lambda step, _: mxt.STOP if step.step == 8 else False
    )
    assert stopped.steps == 2 and stopped.end == "callback"
    trainer.request_stop()
    assert trainer.run(dataset, steps=5).end == "request"
    trainer.request_stop()
    with pytest.raises(mxt.Stopped):
        trainer.evaluate(dataset)
    with pytest.raises(mxt.Stopped):
        trainer.step_unless_stopped(dataset)
    assert trainer.steps_done == 8
    trainer.clear_stop()
    assert trainer.step_unless_stopped(dataset).step == 9
    assert trainer.run(dataset, steps=1).end == "finished"


def test_a_callback_may_use_and_close_the_trainer(make_trainer, dataset):
    trainer = make_trainer()

    def on_step(step, _):
        trainer.evaluate(dataset, max_batches=1)
        trainer.set_lr(1e-3)
        if step.step == 3:
            trainer.close()

    assert trainer.run(dataset, steps=9, on_step=on_step).steps == 3
    assert trainer.closed and trainer.steps_done == 0


def test_steps_on_tokens_of_the_host(make_trainer, weights_of):
    data = tokens(2 * 3 * 17)
    trainers = [make_trainer(accumulation=2) for _ in range(4)]
    rows = data.reshape(6, 17)
    given = [
        rows.astype(np.uint32),
        rows.astype(np.int64),
        rows.tolist(),
        np.asfortranarray(rows.astype(np.uint16)),
    ]
    losses = {trainer.step_tokens(form).loss for trainer, form in zip(trainers, given)}
    assert len(losses) == 1
    assert all(np.array_equal(weights_of(trainers[0]), weights_of(it)) for it in trainers[1:])
    for wrong in (rows.T, rows[:3], rows.reshape(-1)):
        with pytest.raises(ValueError, match=r"expected the shape \(6, 17\)"):
            trainers[0].step_tokens(wrong)
    with pytest.raises(TypeError, match="expected whole numbers"):
        trainers[0].step_tokens(rows / 2)
    with pytest.raises(ValueError, match=r"expected tokens from 0 to 4294967295, got -1"):
        trainers[0].step_tokens(rows - 1)
    with pytest.raises(mxt.TokenRange) as caught:
        trainers[0].step_tokens(rows + 3)
    assert caught.value.status == -11 and isinstance(caught.value, ValueError)


def test_options_and_schedules(make_trainer, dataset):
    trainer = make_trainer(schedule="cosine", total_steps=10, warmup_steps=2, recipe="bf16")
    assert (trainer.options.schedule, trainer.options.recipe) == ("cosine", "bf16")
    assert trainer.options.token_drop is None and trainer.options.sequence_length == 16
    assert trainer.step(dataset).lr == np.float32(0.5e-2)
    trainer.set_lr(0.5)
    assert trainer.step(dataset).lr == 0.5
    trainer.use_schedule()
    trainer.set_schedule(schedule="linear", lr=0.25, total_steps=4)
    assert trainer.schedule_start == 2 and trainer.step(dataset).lr == 0.25


def test_what_can_be_watched(make_trainer, dataset):
    trainer = make_trainer(recipe="tetrajet")
    trainer.watch_updates(2)
    trainer.watch_weights(2)
    trainer.set_sharpness(1e-3)
    with pytest.raises(mxt.InvalidArgument):
        trainer.weight_metrics()
    first, second = trainer.steps(dataset, 2)
    assert np.isnan(first.update_rms_max) and second.update_rms_max > 0
    name = list(trainer.model.tensors)[second.update_rms_tensor]
    assert trainer.tensor_update(name).rms == second.update_rms_max
    assert trainer.weight_metrics().tensors == 8
    assert trainer.weight_metrics("transformer.h.0.attn.c_attn.weight").tensors == 1
    assert trainer.evaluate(dataset, max_batches=1).sharpness > 0


def test_plans(engine):
    shape, trainer = {"layers": 2, "channels": 64, "heads": 2}, {"batch_size": 2, "recipe": "bf16"}
    plan = engine.plan(shape, trainer)
    assert plan.total == sum(plan) - plan.total and plan.weights > 0
    limited = mxt.Engine(threads=1, memory_limit=1 << 20)
    with pytest.raises(mxt.OutOfMemory) as caught:
        mxt.Trainer(mxt.Model(limited, **shape), **trainer)
    assert isinstance(caught.value, MemoryError)


def test_snapshots_are_saved_while_training_goes_on(make_trainer, dataset, weights_of, tmp_path):
    trainer = make_trainer()
    trainer.step(dataset)
    expected = weights_of(trainer)
    snapshot = trainer.snapshot()
    saving = threading.Thread(target=snapshot.save, args=(tmp_path / "one",))
    saving.start()
    trainer.step(dataset)
    saving.join()
    loaded = mxt.Trainer.load(mxt.Engine(threads=1), tmp_path / "one")
    assert loaded.steps_done == 1 and np.array_equal(weights_of(loaded), expected)
    snapshot.renew(trainer)
    trainer.close()
    snapshot.save(tmp_path / "two")
    assert mxt.Trainer.load(mxt.Engine(threads=1), tmp_path / "two").steps_done == 2
    with pytest.raises(TypeError, match=r"trainer\.snapshot"):
        mxt.Snapshot()


def test_ranks_train_as_one(make_trainer, dataset, weights_of):
    alone = make_trainer(accumulation=2, lanes=2)
    losses = [alone.step(dataset).loss for _ in range(3)]
    rows = tokens(2 * 3 * 17).reshape(6, 17)
    losses.append(alone.step_tokens(rows).loss)
    wires, found, failed = Wires(), [None, None], [None, None]

    def rank(number):
        engine = mxt.Engine(threads=1, group=wires.group(number))
        assert (engine.rank, engine.ranks) == (number, 2)
        trainer = make_trainer(engine, accumulation=2, lanes=2)
        mine = [trainer.step(dataset).loss for _ in range(3)]
        # What is refused on one rank, the other does not wait for.
        try:
            trainer.step_tokens(rows[3 * number :][:3] if number == 0 else rows)
        except (mxt.MxtError, ValueError) as error:
            failed[number] = error
        mine.append(trainer.step_tokens(rows[3 * number :][:3]).loss)
        found[number] = mine, weights_of(trainer)

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert isinstance(failed[0], mxt.PeerError) and "expected the shape (3, 17)" in str(failed[1])
    for mine, weights in found:
        assert mine == losses and np.array_equal(weights, weights_of(alone))


def test_what_a_function_of_a_group_raises_is_raised(make_trainer):
    def break_off(*_):
        raise ConnectionError("gone")

    group = mxt.Group(0, 2, break_off, break_off)
    with pytest.raises(ConnectionError, match="gone"):
        mxt.Engine(threads=1, group=group)


def test_shapes(engine):
    config = mxt.Model(engine, **SHAPE, activation="gelu", tied_head=False).config
    assert (config.activation, config.tied_head, config.architecture) == ("gelu", False, "gpt2")
    assert config.mlp_channels == 0 and config.vocab_size == 61


def test_adapters_train_beside_weights_that_stay(engine, dataset, tmp_path):
    base = mxt.Model(engine, **SHAPE)
    adapted = base.with_lora(4, layers=["attn.c_attn", "mlp.c_fc"])
    assert (adapted.config.lora_rank, adapted.config.lora_alpha) == (4, 8)
    assert adapted.config.lora_layers == ("attn.c_attn", "mlp.c_fc")
    assert base.config.lora_rank == 0 and base.config.lora_layers == ()
    trainer = mxt.Trainer(adapted, batch_size=3, lr=1e-2)
    *_, last = trainer.steps(dataset, 5)
    assert last.step == 5
    for name, values in base.tensors.items():
        assert np.array_equal(adapted.tensors[name], values), name
    b = "transformer.h.1.attn.c_attn.lora_B.weight"
    assert adapted.tensors[b].any()
    gradients = dict(trainer.gradients)
    assert len(gradients) == 8 and all(".lora_" in name for name in gradients)
    adapted.save_lora(tmp_path / "adapter")
    again = base.load_lora(tmp_path / "adapter")
    assert np.array_equal(again.tensors[b], adapted.tensors[b])
    kept = {"config.json": b"another's"}
    adapted.save_lora(kept)
    assert kept.pop("config.json") == b"another's"
    assert sorted(kept) == ["adapter_config.json", "adapter_model.safetensors"]
    for name, content in kept.items():
        assert content == (tmp_path / "adapter" / name).read_bytes(), name
    assert np.array_equal(base.load_lora(kept).tensors[b], adapted.tensors[b])
    a = adapted.tensors[b.replace("lora_B", "lora_A")]
    weight = "transformer.h.1.attn.c_attn.weight"
    merged = base.tensors[weight] + 2 * (adapted.tensors[b] @ a).T
    assert np.allclose(again.merge_lora().tensors[weight], merged, atol=1e-6)
    with pytest.raises(ValueError, match="c_attn"):
        base.with_lora(4, layers=["c_attn"])
    with pytest.raises(ValueError, match="alpha"):
        base.with_lora(4, alpha=0)
    with pytest.raises(ValueError, match="none"):
        base.with_lora(4, layers=[])
    with pytest.raises(mxt.InvalidArgument, match="rank"):
        base.with_lora(0)
    whole = engine.plan(model=SHAPE, trainer={"batch_size": 2})
    lora = engine.plan(model={**SHAPE, "lora_rank": 2}, trainer={"batch_size": 2})
    assert lora.gradients < whole.gradients / 3


def test_frozen_tensors_stay(make_trainer, dataset):
    trainer = make_trainer(frozen="transformer.h.*")
    before = dict(trainer.model.tensors.items())
    trainer.step(dataset)
    stayed = [np.array_equal(values, before[name]) for name, values in trainer.model.tensors.items()]
    expected = [name.startswith("transformer.h.") for name in before]
    assert stayed == expected and trainer.options.frozen == "transformer.h.*"
    assert not any(name.startswith("transformer.h.") for name in dict(trainer.gradients))
    with pytest.raises(mxt.InvalidArgument, match="no.such"):
        make_trainer(frozen="no.such")
