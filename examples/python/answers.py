"""Teaches two models to add, one with a backward pass in bf16 and one in MXFP4, on the same batches,
and draws what came of it. Each cell (`# %%`) may be run by itself in an editor or a notebook.

    pip install matplotlib mxfp4train       # the wheel of `make wheel`
    python examples/python/answers.py [OUT.png]
"""

# %% What there is to learn: sums, of which only the answers count.
import sys

import matplotlib
import numpy as np

import mxfp4train as mxt

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

LENGTH, SUMS, STEPS = 10, 64, 300
random = np.random.default_rng(1)


def batch(count):
    """Sums as bytes, (count, LENGTH + 1), and where what follows the "=" is to be predicted."""
    numbers = random.integers(0, 50, (count, 2))
    texts = [f"{a}+{b}={a + b}\n".ljust(LENGTH + 1, "\0") for a, b in numbers]
    rows = np.frombuffer("".join(texts).encode(), np.uint8).reshape(count, -1)
    is_answer = (rows == ord("=")).cumsum(axis=1).astype(bool) & (rows != 0)
    return rows, is_answer[:, :-1] & (rows[:, 1:] != 0)


# %% Two trainers that differ in their recipes alone.
engine = mxt.Engine()
recipes = ["bf16", "mxfp4-rht-sr"]


def new_trainer(recipe):
    model = mxt.Model(engine, vocab_size=128, context_length=LENGTH, layers=2, heads=4, channels=128)
    return mxt.Trainer(
        model, recipe=recipe, batch_size=SUMS, lr=2e-3, schedule="cosine", warmup_steps=20,
        total_steps=STEPS,
    )


trainers = {recipe: new_trainer(recipe) for recipe in recipes}

# %% The same batches for both.
curves = {recipe: [] for recipe in recipes}
for step in range(STEPS):
    rows, is_answer = batch(SUMS)
    for recipe, trainer in trainers.items():
        trainer.forward_backward(rows[:, :-1], rows[:, 1:], weights=is_answer)
        curves[recipe].append(trainer.update().loss)
for recipe, losses in curves.items():
    print(f"{recipe}: loss {losses[0]:.3f} to {np.mean(losses[-20:]):.3f}")

# %% Where they are still unsure: the loss of every position of sums that neither has seen.
rows, is_answer = batch(SUMS)
by_position = {}
for recipe, trainer in trainers.items():
    losses = np.empty((SUMS, LENGTH), np.float32)
    trainer.forward(rows[:, :-1], rows[:, 1:], weights=is_answer, losses=losses)
    digits = np.where(is_answer, losses, np.nan)
    # Counted from the "=", wherever it is.
    first = is_answer.argmax(axis=1)
    by_position[recipe] = [np.nanmean(digits[np.arange(SUMS), first + i]) for i in range(3)]

# %% Pictures.
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
for recipe, losses in curves.items():
    left.plot(losses, label=recipe, linewidth=1)
left.set(xlabel="step", ylabel="loss of answers, nats a byte", yscale="log", title="Training")
left.legend()
width = 0.4
for i, (recipe, losses) in enumerate(by_position.items()):
    right.bar(np.arange(3) + (i - 0.5) * width, losses, width, label=recipe)
right.set(xticks=range(3), xlabel="byte of the answer", ylabel="loss", title="New sums")
right.legend()
figure.tight_layout()
place = sys.argv[1] if len(sys.argv) > 1 else "answers.png"
figure.savefig(place, dpi=120)
print(f"{place}: drawn")
