"""A model in training: whole steps, steps in parts, runs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any, Callable

import numpy as np

from . import _arrays as arrays
from . import _callbacks as callbacks
from . import _files as files
from ._callbacks import step_stats
from ._calls import (
    Handle,
    ask,
    call,
    choice,
    make,
    number,
    options,
    path,
    sized,
    text,
    tuple_of,
    whole,
)
from ._dataset import Dataset
from ._engine import Engine
from ._errors import MxtError
from ._interrupt import CLEAR_STOP, REQUEST_STOP, Interrupts
from ._library import ffi, lib, text_of
from ._model import Model
from ._snapshot import Snapshot
from ._stats import EvalStats, RunResult, StepStats, TensorUpdate, TrainerOptions, WeightMetrics
from ._tensors import Tensors

IGNORED: int = lib.MXT_IGNORED
"""In place of a target: the position is no part of the loss. Any number below 0 says the same."""

# In the order of C's numbers, from 0.
SCHEDULES = ("constant", "cosine", "linear", "trapezoid")
RUN_ENDS = ("finished", "callback", "request")

Loss = Callable[[np.ndarray, int], Any]
OnStep = Callable[[StepStats, "EvalStats | None"], Any]


def options_struct(
    keep: list[Any],
    *,
    batch_size: int | None = None,
    sequence_length: int | None = None,
    accumulation: int | None = None,
    recipe: str | None = None,
    beta1: float | None = None,
    beta2: float | None = None,
    epsilon: float | None = None,
    weight_decay: float | None = None,
    clip: float | None = None,
    schedule: str | None = None,
    lr: float | None = None,
    min_lr: float | None = None,
    warmup_steps: int | None = None,
    total_steps: int | None = None,
    decay_steps: int | None = None,
    recompute: str | None = None,
    optimizer: str | None = None,
    token_drop: str | None = None,
    lanes: int | None = None,
    frozen: str | None = None,
    document_end: int | None = None,
) -> Any:
    given = {
        "batch_size": batch_size,
        "sequence_length": sequence_length,
        "accumulation": accumulation,
        "recipe": text("recipe", recipe),
        "beta1": beta1,
        "beta2": beta2,
        "epsilon": epsilon,
        "weight_decay": weight_decay,
        "clip": clip,
        "schedule": choice("schedule", SCHEDULES, schedule),
        "lr": lr,
        "min_lr": min_lr,
        "warmup_steps": warmup_steps,
        "total_steps": total_steps,
        "decay_steps": decay_steps,
        "recompute": text("recompute", recompute),
        "optimizer": text("optimizer", optimizer),
        "token_drop": text("token_drop", token_drop),
        "lanes": lanes,
        "frozen": text("frozen", frozen),
        "has_document_end": None if document_end is None else 1,
        "document_end": document_end,
    }
    return options("mxt_trainer_options", given, keep)


class Trainer(Handle):
    """A trainer at step 0 that changes the weights of `model`. Its memory is allocated here.

    `batch_size` (8) sequences of `sequence_length` (the model's context) go through the model at
    once; the gradients of `accumulation` batches make a step. `recipe` says which number formats
    linear layers use: "mxfp4-rht-sr" (default), "fp32", "bf16" and others that `build_info` lists.
    `optimizer` is "adamw" (default), "stable-adamw", "muon" and others that the C header explains,
    with switches such as ",moments=int8"; `beta1` (0.9), `beta2` (0.95), `epsilon` (1e-8),
    `weight_decay` (0.1) and `clip` (1; 0 is none) are its numbers.

    `schedule` is "constant" (default), "cosine", "linear" or "trapezoid": `lr` (3e-4) is its peak,
    reached over `warmup_steps`, `min_lr` (0) its end at `total_steps`, and `decay_steps` the
    descent of the trapezoid. `recompute` says what the backward pass computes again to save memory:
    "nothing" (default), "pointwise" or "block". `token_drop`, such as "start=128,steps=60%", is how
    many tokens the blocks in the middle see in training. `lanes` are the parts of a step that ranks
    of a group share. `frozen` are the tensors that stay as they are, by patterns of their names with
    commas between them: "transformer.w*,*.ln_?.*". `document_end` is the token that ends a document,
    such as 50256 of GPT-2: attention then looks at no document but a token's own, and positions are
    counted from where it begins, in all batches and windows that come without `documents`.

    Options that are None have the library's defaults. The model stays the caller's.

    Raises InvalidArgument, which names the option, OutOfMemory, Unsupported, Busy.
    """

    _place: arrays.Place
    _ranks: int

    def __init__(
        self,
        model: Model,
        *,
        batch_size: int | None = None,
        sequence_length: int | None = None,
        accumulation: int | None = None,
        recipe: str | None = None,
        beta1: float | None = None,
        beta2: float | None = None,
        epsilon: float | None = None,
        weight_decay: float | None = None,
        clip: float | None = None,
        schedule: str | None = None,
        lr: float | None = None,
        min_lr: float | None = None,
        warmup_steps: int | None = None,
        total_steps: int | None = None,
        decay_steps: int | None = None,
        recompute: str | None = None,
        optimizer: str | None = None,
        token_drop: str | None = None,
        lanes: int | None = None,
        frozen: str | None = None,
        document_end: int | None = None,
    ) -> None:
        keep: list[Any] = []
        how = options_struct(
            keep,
            batch_size=batch_size,
            sequence_length=sequence_length,
            accumulation=accumulation,
            recipe=recipe,
            beta1=beta1,
            beta2=beta2,
            epsilon=epsilon,
            weight_decay=weight_decay,
            clip=clip,
            schedule=schedule,
            lr=lr,
            min_lr=min_lr,
            warmup_steps=warmup_steps,
            total_steps=total_steps,
            decay_steps=decay_steps,
            recompute=recompute,
            optimizer=optimizer,
            token_drop=token_drop,
            lanes=lanes,
            frozen=frozen,
            document_end=document_end,
        )
        self._set(make("trainer", lib.mxt_trainer_new, model, how), model)

    def _set(self, pointer: Any, source: Engine | Model) -> None:
        self._own(pointer)
        self._lent, self._place, self._ranks = source._lent, source._place, source._ranks
        how = self.options
        self._rows = how.batch_size, how.sequence_length
        self._step_rows = how.accumulation * how.batch_size // self._ranks, how.sequence_length + 1

    @classmethod
    def load(cls, engine: Engine, folder: files.Place, *, optimizer: str | None = None) -> Trainer:
        """Loads what `save` wrote. The next steps are the same, bit for bit, as if never stopped.

        In place of a folder there may be files without one: a `Files`, a mapping of names to bytes,
        or a `FileStore`.

        With an `optimizer`, which must be the saved one, moments are kept from here on in what it
        says, such as "adamw,moments=int8". The seed is the checkpoint's.

        Raises FileError, FormatError, Mismatch, NotFinite, Unsupported, OutOfMemory.
        """
        found = files.files_of(folder)
        mover = text("optimizer", optimizer)
        if found is not None:
            function = lib.mxt_trainer_load_from
            given = ffi.NULL if mover is None else mover
            pointer = files.load("trainer", function, engine, found, given)
        elif mover is None:
            pointer = make("trainer", lib.mxt_trainer_load, engine, files.folder_of(folder))
        else:
            where = files.folder_of(folder)
            pointer = make("trainer", lib.mxt_trainer_load_as, engine, where, mover)
        trainer = cls.__new__(cls)
        trainer._set(pointer, engine)
        return trainer

    def save(self, folder: files.Place) -> None:
        """Saves model, moments, options and position to a folder, which is made if need be.

        In place of a folder there may be files without one: a `Files`, a mapping of names to bytes,
        or a `FileStore`.

        A failure, or a kill at any instant, leaves a whole checkpoint there. Hugging Face
        transformers opens it. Raises FileError, FormatError, NotFinite, Busy.
        """
        files.save(folder, lib.mxt_trainer_save, lib.mxt_trainer_save_to, self)

    def snapshot(self) -> Snapshot:
        """A copy of what `save` would write, for another thread to save."""
        return Snapshot._of(make("snapshot", lib.mxt_trainer_snapshot, self), self)

    # Whole steps.

    def step(self, dataset: Dataset) -> StepStats:
        """One optimizer step on the next windows of a dataset.

        Whatever the error, weights and moments are as before the step: InvalidArgument (a dataset
        shorter than a sequence; batches that wait for `update`), TokenRange, FileError, NotFinite.
        """
        stats = sized("mxt_step_stats")
        call(lib.mxt_trainer_step, self, dataset, stats)
        return step_stats(stats)

    def step_unless_stopped(self, dataset: Dataset) -> StepStats:
        """`step`, given up where `request_stop` asks for it, which is seen before each batch.

        Stopped is raised then, the next step does the same from its beginning, and the request
        stands until `clear_stop`. Ctrl-C gives the step up, too, on the main thread.
        """
        stats = sized("mxt_step_stats")
        with Interrupts(self.request_stop, self.clear_stop):
            call(lib.mxt_trainer_step_unless_stopped, self, dataset, stats)
        return step_stats(stats)

    def step_tokens(self, tokens: Any) -> StepStats:
        """One optimizer step on rows of tokens: (accumulation * batch_size, sequence_length + 1).

        Position t of a row learns to predict position t + 1. A C-contiguous array of uint32 is not
        copied, other whole numbers are converted; an array of uint32 or int32 on the engine's GPU
        is taken as it is. Of the ranks of a group each brings its part of the rows.
        """
        try:
            pointer, count = arrays.tokens("tokens", tokens, self._place, self._step_rows)
        except Exception:
            if self._ranks > 1:
                # NOTE: the other ranks wait for this one: a step on no tokens fails on all of them
                # and changes nothing.
                none = ffi.new("uint32_t[1]")
                with contextlib.suppress(MxtError):
                    call(lib.mxt_trainer_step_tokens, self, none, 0, ffi.NULL)
            raise
        stats = sized("mxt_step_stats")
        call(lib.mxt_trainer_step_tokens, self, pointer, count, stats)
        return step_stats(stats)

    def steps(self, dataset: Dataset, count: int) -> Iterator[StepStats]:
        """Does `count` steps, one for every turn of a loop, and gives what each did."""
        for _ in range(count):
            yield self.step(dataset)

    def evaluate(self, dataset: Dataset, *, max_batches: int = 0) -> EvalStats:
        """The mean loss over at most `max_batches` batches spread evenly over a dataset, 0 for all.

        It changes nothing of the run. Raises Stopped after `request_stop`.
        """
        stats = sized("mxt_eval_stats")
        most = whole("max_batches", max_batches)
        with Interrupts(self.request_stop, self.clear_stop):
            call(lib.mxt_trainer_eval, self, dataset, most, stats)
        return tuple_of(EvalStats, stats)

    # A step in parts.

    def forward_backward(
        self,
        tokens: Any,
        targets: Any = None,
        weights: Any = None,
        divisor: float | None = None,
        loss: Loss | None = None,
        losses: Any = None,
        documents: Any = None,
    ) -> None:
        """Adds the gradients of a batch to those since the last `update`, which makes a step.

        All arrays are (batch_size, sequence_length). `tokens` are what the model reads,
        and `targets` what it is to predict at each position, or a number below 0 (such as -100), or
        IGNORED: in a language model the next token. They are converted as `step_tokens` does; on a
        GPU only IGNORED ignores, and -1 of int32, which is the same bits.

        - `weights` are a factor of each position's loss, or a mask: 0 for what is not to be
          learned, as a prompt or padding.
        - `divisor` is what the sum of weighted losses is divided by, together with the divisors of
          the step's other batches; not 0, and by default the sum of the weights of targets that are
          not ignored. Weights that may be below 0, as advantages are, need another one. Divisors of
          a step are together above 0, and from 1e-20 to 1e20 for a position.
        - `losses` is a float32 array that gets the loss of each position, without its weight; 0
          where the target is ignored.
        - `documents` are the number of the document that each token is of. Where it changes along a
          row another document begins: attention looks at no document but a token's own, and
          positions are counted from where it begins, so that each has the logits that it has alone.
          None takes `document_end` of the trainer or, without it, each row as one document.
        - `loss(logits, first_row)` replaces cross-entropy. It gets the logits of some positions as
          a float32 array (rows, vocab_size) and the number of the first, counted through the batch,
          row by row; all come once, in order. It overwrites each row with the gradient of its loss
          in its logits, and returns the losses, (rows). `weights` and `divisor` are in neither: the
          library multiplies, and what it makes of rows that are ignored does not count. `targets`
          may be None then. What it raises is raised here, and no batch waits any more.

          NOTE: the array is the library's memory, which is used again after the call: `kept =
          logits` would be of other rows, without an error. Keep `logits.copy()`.

        With softmax cross-entropy by hand, where targets below 0 are ignored:

            def loss(logits, first_row):
                rows = numpy.arange(len(logits))
                wanted = targets.reshape(-1)[first_row:][: len(logits)]
                wanted = numpy.where(wanted < 0, 0, wanted)  # any token will do
                logits -= logits.max(axis=1, keepdims=True)
                losses = -logits[rows, wanted]
                numpy.exp(logits, out=logits)
                total = logits.sum(axis=1, keepdims=True)
                losses += numpy.log(total[:, 0])
                logits /= total
                logits[rows, wanted] -= 1
                return losses

        Raises InvalidArgument (among others where gradients have been written or scaled since the
        last `update` or `zero_gradients`), TokenRange, NotFinite, Busy: the batches before still
        wait then. While batches wait, `step` and `run` are errors; evaluating and saving go on.
        """
        keep: list[Any] = []
        batch = self._batch(keep, tokens, targets, weights, divisor, loss, losses, documents)
        call(lib.mxt_trainer_forward_backward, self, batch)

    def forward(
        self,
        tokens: Any,
        targets: Any = None,
        weights: Any = None,
        divisor: float | None = None,
        loss: Loss | None = None,
        losses: Any = None,
        documents: Any = None,
    ) -> EvalStats:
        """The loss of a batch, which is that of `forward_backward`, without gradients.

        It is the sum of weighted losses over the divisor, and the tokens are the targets whose
        weight is not 0. It changes nothing of the run: batches wait as before. What `loss` writes
        into logits is dropped. A loss that is not finite is a result and no error.

        Raises InvalidArgument (among others where every target is ignored), TokenRange, NotFinite
        (a weight), Busy.
        """
        keep: list[Any] = []
        batch = self._batch(keep, tokens, targets, weights, divisor, loss, losses, documents)
        stats = sized("mxt_eval_stats")
        call(lib.mxt_trainer_forward, self, batch, stats)
        return tuple_of(EvalStats, stats)

    def _batch(
        self,
        keep: list[Any],
        tokens: Any,
        targets: Any,
        weights: Any,
        divisor: float | None,
        loss: Loss | None,
        losses: Any,
        documents: Any,
    ) -> Any:
        """C's struct of a batch, for which `keep` is kept."""
        if divisor is not None and number("divisor", divisor) == 0:
            # NOTE: which in C is the default.
            raise ValueError(
                "divisor: expected another number than 0, got 0; None is the sum of the weights"
            )
        given: dict[str, Any] = {"divisor": divisor}
        given["tokens"], given["count"] = arrays.tokens("tokens", tokens, self._place, self._rows)
        if targets is not None:
            given["targets"], _ = arrays.tokens(
                "targets", targets, self._place, self._rows, ignored=True
            )
        if weights is not None:
            given["weights"], _ = arrays.floats("weights", weights, self._place, self._rows)
        if documents is not None:
            given["documents"], _ = arrays.tokens("documents", documents, self._place, self._rows)
        if losses is not None:
            given["losses"], _ = arrays.room("losses", losses, self._place, self._rows)
        if loss is not None:
            given["loss"], given["user_data"] = callbacks.on_loss, callbacks.pointer_to(loss)
        return options("mxt_batch", given, keep)

    def update(self) -> StepStats:
        """One optimizer step by the gradients of all batches since the last one.

        Raises InvalidArgument (no batch waits, or all targets are ignored) and NotFinite: weights
        and moments are then as before, and no batch waits any more, but for those of a trainer with
        lanes or of ranks, where there are too few.
        """
        stats = sized("mxt_step_stats")
        call(lib.mxt_trainer_update, self, stats)
        return step_stats(stats)

    def zero_gradients(self) -> None:
        """Drops the gradients that wait for an update; there are none to read then."""
        call(lib.mxt_trainer_zero_gradients, self)

    def scale_gradients(self, factor: float, *, tensor: str | None = None) -> None:
        """Multiplies the gradients that wait for an update, or that of one tensor.

        `forward_backward` can add no batch to them then.
        """
        name = text("tensor", tensor)
        call(
            lib.mxt_trainer_scale_gradients,
            self,
            ffi.NULL if name is None else name,
            number("factor", factor),
        )

    @property
    def gradients(self) -> Tensors:
        """The gradients by name, as `Model.tensors` has the weights: of the last step, before
        clipping, or, where batches wait for an update, of their loss so far. To read them is
        InvalidArgument after `zero_gradients` or an `update` that failed, until there are others.
        Frozen tensors have none, and beside adapters nothing else has.

        What is assigned overwrites the gradient that waits, and `forward_backward` can add no batch
        to it then. Where none waits, those of all other tensors are 0, so a program may bring all
        gradients itself.
        """
        with self.model as model:
            gradients = Tensors(
                self, model, lib.mxt_trainer_read_gradient, lib.mxt_trainer_write_gradient
            )
        is_trained = ffi.new("int32_t *")
        for name in list(gradients.shapes):
            call(lib.mxt_trainer_is_trained, self, text("name", name), is_trained)
            if not is_trained[0]:
                del gradients.shapes[name]
        return gradients

    # Runs.

    def run(
        self,
        dataset: Dataset,
        *,
        steps: int,
        eval_dataset: Dataset | None = None,
        eval_every: int | None = None,
        eval_batches: int | None = None,
        save_dir: str | os.PathLike[Any] | None = None,
        save_every: int | None = None,
        save_files: files.Place | None = None,
        on_step: OnStep | None = None,
    ) -> RunResult:
        """Does `steps` steps on a dataset, with evaluations, checkpoints and a callback.

        With `eval_dataset` the run evaluates on at most `eval_batches` batches (20; 0 is all)
        whenever the number of steps done is a multiple of `eval_every`, and after the last step.
        With `save_dir`, or `save_files` in its place (see `save`), it saves likewise by
        `save_every`, and at its end, however it ends.

        `on_step(step, evaluation)` is called after each step, `evaluation` being None where none
        followed it. It may use the trainer: save, evaluate, set_lr, generate, even close it. The
        run ends when it returns STOP; what it raises ends the run in order and is raised here.

        Ctrl-C, on the main thread and where SIGINT has Python's own handler, stops the run before
        its next step or batch; the run saves, and then KeyboardInterrupt is raised.

        An evaluation or a save that fails does not end the run; where the last one of its kind
        failed, that error is raised at its end, or is the cause of what `on_step` has raised (where
        that has a cause already, a note on it says so). An error of a step ends the run, after a save. What a mapping or a store raises ends the run,
        too.
        """
        keep: list[Any] = []
        held: dict[str, Handle] = {}
        if eval_dataset is not None:
            held["eval_dataset"] = eval_dataset
        if save_files is not None:
            found = files.files_of(save_files)
            if found is None:
                raise TypeError(f"save_files: expected files without a folder, got {save_files!r}")
            held["save_files"] = found
        # NOTE: there always is a callback: Ctrl-C comes in there, too.
        given = {
            "steps": whole("steps", steps, "uint64_t"),
            "eval_every": eval_every,
            "eval_batches": eval_batches,
            "save_dir": None if save_dir is None else path("save_dir", save_dir),
            "save_every": save_every,
            "on_step": callbacks.on_step,
            "user_data": callbacks.pointer_to(on_step or (lambda _step, _evaluation: None)),
        }
        how = options("mxt_run_options", given, keep)
        result = sized("mxt_run_result")

        def run(trainer: Any, data: Any, *pointers: Any) -> int:
            for name, pointer in zip(held, pointers):
                setattr(how, name, pointer)
            status: int = lib.mxt_trainer_run(trainer, data, how, result)
            return status

        with files.run_of(held.get("save_files")), Interrupts(self.request_stop, self.clear_stop):
            call(run, self, dataset, *held.values())
        return tuple_of(RunResult, result, end=RUN_ENDS[result.end], saved=bool(result.saved))

    def request_stop(self) -> None:
        """Asks a run to stop before its next step or, within a step or evaluation, its next batch.

        One that is not started yet stops at once. Any thread and any signal handler may call it.
        """
        ask(REQUEST_STOP, self, None)

    def clear_stop(self) -> None:
        """Takes a stop request back that no run has used up."""
        ask(CLEAR_STOP, self, None)

    # What the run is, and how it changes.

    @property
    def steps_done(self) -> int:
        """Optimizer steps since step 0, those before a save and load included; 0 if closed."""
        return ask(lib.mxt_trainer_steps_done, self, 0)

    @property
    def model(self) -> Model:
        """The trainer's model, another handle on it: the next step changes what it reads."""
        return Model._of(make("model", lib.mxt_trainer_model, self), self)

    @property
    def options(self) -> TrainerOptions:
        """What the trainer was made from, or loaded with, and the schedule last set."""
        how = sized("mxt_trainer_options")
        texts: dict[str, Any] = {}

        def read(trainer: Any) -> int:
            status: int = lib.mxt_trainer_get_options(trainer, how)
            if status == lib.MXT_OK:
                # They are valid as long as the trainer, so they are copied while that is held.
                for name in ("recipe", "recompute", "optimizer", "token_drop", "frozen"):
                    value = getattr(how, name)
                    texts[name] = None if value == ffi.NULL else text_of(value)
            return status

        call(read, self)
        end = how.document_end if how.has_document_end else None
        schedule = SCHEDULES[how.schedule]
        return tuple_of(TrainerOptions, how, schedule=schedule, document_end=end, **texts)

    def set_lr(self, lr: float) -> None:
        """Takes `lr` as the learning rate from the next step on, in place of the schedule's."""
        call(lib.mxt_trainer_set_lr, self, number("lr", lr))

    def use_schedule(self) -> None:
        """Returns to the schedule's learning rate after `set_lr`."""
        call(lib.mxt_trainer_use_schedule, self)

    def set_schedule(
        self,
        *,
        schedule: str | None = None,
        lr: float | None = None,
        min_lr: float | None = None,
        warmup_steps: int | None = None,
        total_steps: int | None = None,
        decay_steps: int | None = None,
    ) -> None:
        """Takes a new schedule from the next step on, whose steps are counted from here.

        The options are `Trainer`'s, with its defaults. A rate of `set_lr` is dropped.
        """
        keep: list[Any] = []
        how = options_struct(
            keep,
            schedule=schedule,
            lr=lr,
            min_lr=min_lr,
            warmup_steps=warmup_steps,
            total_steps=total_steps,
            decay_steps=decay_steps,
        )
        call(lib.mxt_trainer_set_schedule, self, how)

    @property
    def schedule_start(self) -> int:
        """The step that the schedule counts from: 0, or where `set_schedule` set it."""
        return ask(lib.mxt_trainer_schedule_start, self, 0)

    def set_sharpness(self, epsilon: float) -> None:
        """Asks evaluations how much the loss could rise if each logit y moved by epsilon (|y| + 1).

        From above 0 to 1 (1e-3 is usual); 0 ends it.
        """
        call(lib.mxt_trainer_set_sharpness, self, number("epsilon", epsilon))

    def watch_updates(self, every: int) -> None:
        """Watches the updates of the steps that `every` divides: see `update_rms_max` of StepStats,
        and `tensor_update`. 0 ends it. Nothing of the run changes, bit for bit."""
        call(lib.mxt_trainer_watch_updates, self, whole("every", every, "uint64_t"))

    def tensor_update(self, tensor: str) -> TensorUpdate:
        """What the last update that was watched did to a tensor."""
        update = sized("mxt_tensor_update")
        call(lib.mxt_trainer_tensor_update, self, text("tensor", tensor), update)
        return tuple_of(TensorUpdate, update)

    def watch_weights(self, every: int) -> None:
        """Watches how weights of blocks change, and what they are rounded to, over windows of
        `every` steps, for `weight_metrics`. 0 ends it. Not for all recipes: "tetrajet" is one."""
        call(lib.mxt_trainer_watch_weights, self, whole("every", every, "uint64_t"))

    def weight_metrics(self, tensor: str | None = None) -> WeightMetrics:
        """What the last whole window has shown of a tensor, or of all that are watched."""
        metrics = sized("mxt_weight_metrics")
        name = ffi.NULL if tensor is None else text("tensor", tensor)
        call(lib.mxt_trainer_weight_metrics, self, name, metrics)
        return tuple_of(WeightMetrics, metrics)

    def close(self) -> None:
        """Gives the trainer up; nothing is saved. A run at work stops before its next step."""
        self.request_stop()
        super().close()

    def _description(self) -> str:
        return f", {self.steps_done} steps done"
