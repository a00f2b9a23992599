//! Options and results of a trainer, and how they become the crate's.

use std::ffi::{CStr, c_char};
use std::str::FromStr;

use super::arguments;
use super::guard;
use super::status::{Failure, mxt_status};
use super::structs::{self, Options, versioned};
use crate::{
    Error, EvalStats, Optimizer, Plan, Recompute, Schedule, ScheduleKind, Sharpness, Spared,
    StepStats, Trainer, TrainerOptions,
};

/// The curve of the learning rate after the warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub enum mxt_schedule {
    /// lr for ever.
    Constant = 0,
    /// Half a cosine from lr down to min_lr at total_steps.
    Cosine = 1,
    /// A straight line from lr down to min_lr at total_steps.
    Linear = 2,
    /// lr, then a straight line down to min_lr over the last decay_steps.
    Trapezoid = 3,
}

/// What a trainer is made from. Fill it with mxt_trainer_options_init.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct mxt_trainer_options {
    /// Set by mxt_trainer_options_init.
    pub struct_size: usize,
    /// Sequences that go through the model at once. Default 8.
    pub batch_size: usize,
    /// Tokens of one sequence. 0 (default) takes the model's context length.
    pub sequence_length: usize,
    /// Batches whose gradients are averaged into one optimizer step, those of all ranks of a group
    /// together. 0 (default) takes as many as there are lanes, which without a group is 1.
    pub accumulation: usize,
    /// Number formats of the linear layers: "fp32", "bf16", "fp8", "mxfp4-rht-sr", "nvidia-nvfp4" or
    /// another name of docs/recipes.md (mxt_build_info lists them), which may be followed by switches
    /// such as ",g=128". NULL (default) is "mxfp4-rht-sr". Borrowed for the call.
    pub recipe: *const c_char,
    /// Decay of the first moment. Default 0.9.
    pub beta1: f32,
    /// Decay of the second moment. Default 0.95.
    pub beta2: f32,
    /// Added to the square root of the second moment; above 0. Default 1e-8.
    pub epsilon: f32,
    /// Decoupled weight decay of tensors of two or more dimensions. Default 0.1.
    pub weight_decay: f32,
    /// Largest global gradient norm; longer gradients are scaled down to it. 0 turns it off.
    /// Default 1.
    pub clip: f32,
    /// One of mxt_schedule. Default MXT_SCHEDULE_CONSTANT.
    pub schedule: i32,
    /// Peak learning rate. Default 3e-4.
    pub lr: f32,
    /// Learning rate at the end of the curve. Default 0.
    pub min_lr: f32,
    /// Steps over which the rate rises linearly to lr. Default 0.
    pub warmup_steps: u64,
    /// Step at which the curve ends, counted from the trainer's first step or from where
    /// mxt_trainer_set_schedule set the schedule; later steps keep min_lr. Must be above
    /// warmup_steps, except for MXT_SCHEDULE_CONSTANT. Default 0.
    pub total_steps: u64,
    /// Length in steps of the descent of MXT_SCHEDULE_TRAPEZOID. Default 0.
    pub decay_steps: u64,
    /// What is computed again in the backward pass to save memory: "nothing" (the default, and what
    /// NULL is), "pointwise" (outputs of norms and GELU: a third less for activations, little time)
    /// or "block" (all but the inputs of blocks: a step takes up to a third longer). Results do not
    /// depend on it. Borrowed for the call.
    pub recompute: *const c_char,
    /// What moves the weights: "adamw" (the default, and what NULL is) or "stable-adamw" (AdamW
    /// whose rate falls for a tensor whose gradients are larger than its second moment has seen
    /// coming; it is made for a clip of 0, and helps most with a beta2 of 0.98 and above), or, only
    /// with a clip of 0 and best with a beta2 of 0.999, "stable-spam" (gradients are normalized tensor by tensor, their outliers
    /// clipped, moments start again every 1,000 steps: ",reset=1000"; with ",s=cosine"
    /// beta1 and the decay of norms fall to half over total_steps, as the authors advise for language
    /// models), "stable-spam-ref" (the same as
    /// its authors' code counts) or "gradstab" (lengths of gradients alone); or "muon": the weights of
    /// blocks' linear layers, each a matrix, move along their orthogonalized momentum (Keller Jordan,
    /// "Muon: An optimizer for hidden layers in neural networks", 2024), and all else by AdamW. lr is
    /// AdamW's rate, with beta1, beta2 and epsilon; matrices take lr times ",ratio=66.67" (the
    /// reference's 0.02 over 3e-4), and weight decay times that; their momentum decays by
    /// ",momentum=0.95", and is all that is kept of them. clip acts on all gradients, as ever (the
    /// reference does not clip). Behind the name, with a comma, what its moments are kept in:
    /// "moments=f32" (8 bytes a parameter, the default), "moments=bf16" (4) or "moments=int8" (2.25,
    /// of the matrices of blocks; embeddings then have bf16): "adamw,moments=int8" ("muon" has half
    /// of these bytes of matrices), or for comparison "moments=fp8" (3 of the matrices of blocks, 8 of
    /// all else, as FP8-LM, arXiv 2310.18313, keeps them: E4M3 and fp16 with one scale a tensor, which
    /// round more than "int8" does; "muon" has 1 of matrices); and what weights are kept as: "master=split" takes 2 bytes less
    /// on a GPU than "master=f32", the default, and is not for recipes that need weights in f32;
    /// and gradients: "gradients=bf16" takes 2 bytes less there for the matrices of blocks, rounds
    /// them once, and wants an accumulation of 1. "adamw,ramping=500", only with a clip of 0,
    /// updates weights less often that oscillate in the 4 bits of the forward pass ("tetrajet" and
    /// its like; Q-Ramping, arXiv 2502.20853), which 30 steps find before every 500, and undo: such
    /// a step takes as long; it takes 24 bytes a weight of blocks' linear layers and 12 a parameter
    /// more, and no mxt_trainer_step_tokens. Borrowed for the call.
    pub optimizer: *const c_char,
    /// How many tokens of each sequence the blocks between the first and the last see in training,
    /// drawn anew for each block and step (random-LTD, arXiv 2211.11586): "start=128,steps=60%"
    /// begins with 128 and comes to all of them after 60 % of total_steps, "start=128,steps=5000"
    /// after 5,000 steps of the schedule. start is a multiple of 16. On the way they grow by a
    /// sixteenth of a sequence at a time, or with ",by=N" by N, a multiple of 16, too. The last
    /// third of the steps, or more, should see all tokens, as evaluations do. Needs 3 layers. NULL
    /// (default) drops nothing. Borrowed for the call.
    pub token_drop: *const c_char,
    /// Parts of a step that ranks of a group share, each of as many batches in a row, whose gradients
    /// are then added in one fixed order: with the same lanes, losses, weights and files are the same
    /// bits on any number of ranks that divides them by a power of two, and a run that is saved goes
    /// on on any of these. 0 (default) takes as many as there are ranks. A rank with 2^k lanes keeps k
    /// more copies of the gradients.
    pub lanes: usize,
    /// The tensors that training leaves as they are, by patterns of their names with commas between
    /// them: "transformer.wte.*,*.ln_*". '*' stands for any text, '?' for one character, `[ab]` for
    /// one of some. They have no gradient and no state of the optimizer; a frozen matrix spares a
    /// third of its products. A pattern that fits no name is an error. NULL (default) freezes
    /// nothing. Borrowed for the call.
    pub frozen: *const c_char,
    /// 1 keeps documents apart that end with the token `document_end`. Default 0.
    pub has_document_end: i32,
    /// The token that ends a document, as 50256 does in GPT-2's vocabulary, with has_document_end: of
    /// all windows and batches in which the host does not say which token is of which document,
    /// attention looks at no document but a token's own, and positions are counted from where it
    /// begins, so that packed documents are as if each were alone. Losses are of all targets as ever,
    /// for weights say what counts. Saved with the run. Not with token_drop, nor a recipe with
    /// "haste". Default 0.
    pub document_end: u32,
}
versioned!(
    mxt_trainer_options,
    last = decay_steps: u64,
    then recompute: *const c_char,
    then optimizer: *const c_char,
    then token_drop: *const c_char,
    then lanes: usize,
    then frozen: *const c_char,
    then document_end: u32
);

impl Options for mxt_trainer_options {
    fn defaults() -> Self {
        Self::new(&TrainerOptions::default(), Texts::default())
    }
}

impl mxt_trainer_options {
    /// The C form of `options`, with these texts.
    pub(super) fn new(options: &TrainerOptions, texts: Texts<'_>) -> Self {
        let pointer = |text: Option<&CStr>| text.map_or(std::ptr::null(), CStr::as_ptr);
        let TrainerOptions { batch_size, sequence_length, accumulation, lanes, recompute, .. } =
            *options;
        let Optimizer { beta1, beta2, epsilon, weight_decay, clip, .. } = options.optimizer;
        let Schedule { kind, lr, min_lr, warmup_steps, total_steps, decay_steps } =
            options.schedule;
        let schedule = match kind {
            ScheduleKind::Constant => mxt_schedule::Constant,
            ScheduleKind::Cosine => mxt_schedule::Cosine,
            ScheduleKind::Linear => mxt_schedule::Linear,
            ScheduleKind::Trapezoid => mxt_schedule::Trapezoid,
        };
        Self {
            struct_size: size_of::<Self>(),
            batch_size,
            sequence_length,
            accumulation,
            recipe: pointer(texts.recipe),
            beta1,
            beta2,
            epsilon,
            weight_decay,
            clip,
            schedule: schedule as i32,
            lr,
            min_lr,
            warmup_steps,
            total_steps,
            decay_steps,
            recompute: match recompute {
                Recompute::Nothing => c"nothing",
                Recompute::Pointwise => c"pointwise",
                Recompute::Block => c"block",
            }
            .as_ptr(),
            optimizer: pointer(texts.optimizer),
            token_drop: pointer(texts.token_drop),
            lanes,
            frozen: pointer(texts.frozen),
            has_document_end: i32::from(options.document_end.is_some()),
            document_end: options.document_end.unwrap_or(0),
        }
    }

    /// The schedule alone, in the crate's form.
    pub(super) fn schedule(&self) -> Result<Schedule, Failure> {
        const SCHEDULES: [(mxt_schedule, ScheduleKind); 4] = [
            (mxt_schedule::Constant, ScheduleKind::Constant),
            (mxt_schedule::Cosine, ScheduleKind::Cosine),
            (mxt_schedule::Linear, ScheduleKind::Linear),
            (mxt_schedule::Trapezoid, ScheduleKind::Trapezoid),
        ];
        let kind = SCHEDULES.into_iter().find(|(number, _)| *number as i32 == self.schedule);
        let Some((_, kind)) = kind else {
            let message = format!("expected one of mxt_schedule, 0 to 3; got {}", self.schedule);
            return Err(Failure::invalid("schedule", message));
        };
        Ok(Schedule {
            kind,
            lr: self.lr,
            min_lr: self.min_lr,
            warmup_steps: self.warmup_steps,
            total_steps: self.total_steps,
            decay_steps: self.decay_steps,
        })
    }

    /// The token that ends documents, where one does.
    fn document_end(&self) -> Result<Option<u32>, Failure> {
        match (self.has_document_end, self.document_end) {
            (1, end) => Ok(Some(end)),
            (0, 0) => Ok(None),
            (0, end) => {
                let message = format!(
                    "expected has_document_end of 1 beside a document_end, {end}, got 0; set it to \
                     keep documents apart, or document_end to 0"
                );
                Err(Failure::invalid("has_document_end", message))
            }
            (other, _) => {
                let message = format!("expected 0 or 1, got {other}");
                Err(Failure::invalid("has_document_end", message))
            }
        }
    }

    /// The crate's form.
    ///
    /// # Safety
    /// `recipe`, `recompute`, `optimizer`, `token_drop` and `frozen` are NULL or end with a zero byte.
    pub(super) unsafe fn parse(self) -> Result<TrainerOptions, Failure> {
        // SAFETY: as promised by the caller.
        let (recipe, recompute, optimizer, token_drop, frozen) = unsafe {
            (
                parsed("recipe", self.recipe)?.unwrap_or_default(),
                parsed("recompute", self.recompute)?.unwrap_or_default(),
                parsed("optimizer", self.optimizer)?.unwrap_or_default(),
                parsed("token_drop", self.token_drop)?,
                parsed("frozen", self.frozen)?.unwrap_or_default(),
            )
        };
        Ok(TrainerOptions {
            batch_size: self.batch_size,
            sequence_length: self.sequence_length,
            accumulation: self.accumulation,
            lanes: self.lanes,
            recipe,
            recompute,
            optimizer: Optimizer {
                beta1: self.beta1,
                beta2: self.beta2,
                epsilon: self.epsilon,
                weight_decay: self.weight_decay,
                clip: self.clip,
                ..optimizer
            },
            schedule: self.schedule()?,
            token_drop,
            frozen,
            document_end: self.document_end()?,
        })
    }
}

/// What a text stands for; None for NULL.
///
/// # Safety
/// `text` is NULL or ends with a zero byte.
unsafe fn parsed<T: FromStr<Err = Error>>(
    what: &str,
    text: *const c_char,
) -> Result<Option<T>, Failure> {
    if text.is_null() {
        return Ok(None);
    }
    // SAFETY: as promised by the caller.
    Ok(Some(unsafe { arguments::text(what, text) }?.parse()?))
}

/// Texts of options, which the C form borrows.
#[derive(Clone, Copy, Default)]
pub(super) struct Texts<'a> {
    pub(super) recipe: Option<&'a CStr>,
    pub(super) optimizer: Option<&'a CStr>,
    pub(super) token_drop: Option<&'a CStr>,
    pub(super) frozen: Option<&'a CStr>,
}

/// What one optimizer step did. Set struct_size to sizeof(mxt_step_stats) before the call that
/// fills it.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct mxt_step_stats {
    /// sizeof(mxt_step_stats), set by the caller.
    pub struct_size: usize,
    /// Steps done since step 0, this one included.
    pub step: u64,
    /// Tokens trained on in this step.
    pub tokens: u64,
    /// Wall-clock duration of the step in seconds.
    pub seconds: f64,
    /// Mean cross-entropy of the step's tokens before the update, in nats a token.
    pub loss: f32,
    /// Global norm of the gradient before clipping.
    pub grad_norm: f32,
    /// Learning rate of the step.
    pub lr: f32,
    /// tokens / seconds.
    pub tokens_per_second: f32,
    /// Blocks of 32 numbers of the step's MXFP4 operands whose scale was raised, because it lay too
    /// far below the largest of its tensor for the format that the GPU multiplies in. Their
    /// rounding is coarser than their own scale would allow; with stochastic rounding it has no
    /// bias still. 0 on CPUs.
    pub raised_blocks: u64,
    /// Where mxt_trainer_watch_updates watches this step, the largest rms of a tensor (see
    /// mxt_tensor_update), else NaN.
    pub update_rms_max: f32,
    /// The index of that tensor for mxt_model_tensor_info, of equals the first; UINT32_MAX where
    /// update_rms_max is NaN.
    pub update_rms_tensor: u32,
    /// Of `seconds`, those in which this rank waited for others, and exchanged gradients with them. 0
    /// without a group.
    pub exchange_seconds: f64,
}
versioned!(
    mxt_step_stats,
    last = tokens_per_second: f32,
    then raised_blocks: u64,
    then update_rms_tensor: u32,
    then exchange_seconds: f64
);

impl mxt_step_stats {
    /// Of the step that `trainer` has just done.
    pub(super) fn new(stats: StepStats, trainer: &Trainer) -> Self {
        let found = trainer.update_metrics().filter(|found| found.step == stats.step);
        let largest = found.and_then(|found| {
            let (name, rms) = found.largest()?;
            let number = found.tensors.iter().position(|(of, _)| of == name)?;
            Some((rms, number as u32))
        });
        let (update_rms_max, update_rms_tensor) = largest.unwrap_or((f32::NAN, u32::MAX));
        Self {
            struct_size: size_of::<Self>(),
            step: stats.step,
            tokens: stats.tokens,
            seconds: stats.seconds,
            loss: stats.loss,
            grad_norm: stats.grad_norm,
            lr: stats.lr,
            tokens_per_second: (stats.tokens as f64 / stats.seconds.max(1e-9)) as f32,
            raised_blocks: stats.raised_blocks,
            update_rms_max,
            update_rms_tensor,
            exchange_seconds: stats.exchange_seconds,
        }
    }
}

/// What an evaluation found. Set struct_size to sizeof(mxt_eval_stats) before the call that fills
/// it.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct mxt_eval_stats {
    /// sizeof(mxt_eval_stats), set by the caller.
    pub struct_size: usize,
    /// Tokens that were predicted.
    pub tokens: u64,
    /// Wall-clock duration in seconds.
    pub seconds: f64,
    /// Mean cross-entropy in nats a token.
    pub loss: f32,
    /// exp(loss).
    pub perplexity: f32,
    /// Where mxt_trainer_set_sharpness asks for it, else NaN as the three below: 100 (f' - f) /
    /// (1 + f) of the loss f and the largest that it can be, f', when each logit y moves by up to
    /// sharpness_epsilon (|y| + 1).
    pub sharpness: f32,
    /// The same of the last tokens of the sequences alone.
    pub sharpness_last: f32,
    /// How far logits may move.
    pub sharpness_epsilon: f32,
    /// Mean over the tokens of the largest magnitude of a logit.
    pub logit_amax: f32,
    /// Where the recipe has "haste", else NaN as the one below: the part of the operations of the
    /// linear layers' products that merging channels would spare, 0 to 1 (1 - K / C of C channels
    /// in K buckets). Nothing is faster here: products are computed at their full width.
    pub spared_products: f64,
    /// The same, less the operations that merging itself adds; below 0 where that is more.
    pub spared_all: f64,
}
versioned!(
    mxt_eval_stats,
    last = perplexity: f32,
    then logit_amax: f32,
    then spared_all: f64
);

impl From<EvalStats> for mxt_eval_stats {
    fn from(stats: EvalStats) -> Self {
        let none =
            Sharpness { epsilon: f32::NAN, all: f32::NAN, last: f32::NAN, logit_amax: f32::NAN };
        let Sharpness { epsilon, all, last, logit_amax } = stats.sharpness.unwrap_or(none);
        let spared = stats.spared.unwrap_or(Spared { products: f64::NAN, all: f64::NAN });
        Self {
            struct_size: size_of::<Self>(),
            tokens: stats.tokens,
            seconds: stats.seconds,
            loss: stats.loss,
            perplexity: stats.loss.exp(),
            sharpness: all,
            sharpness_last: last,
            sharpness_epsilon: epsilon,
            logit_amax,
            spared_products: spared.products,
            spared_all: spared.all,
        }
    }
}

/// Bytes that a model with its trainer takes, by purpose. Set struct_size to
/// sizeof(mxt_memory_plan) before the call that fills it.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct mxt_memory_plan {
    /// sizeof(mxt_memory_plan), set by the caller.
    pub struct_size: usize,
    /// Weights.
    pub weights: u64,
    /// Gradients.
    pub gradients: u64,
    /// What the optimizer keeps, such as moments.
    pub optimizer: u64,
    /// What the forward pass keeps for the backward pass, and the gradients that flow back.
    pub activations: u64,
    /// Packed operands and other scratch memory.
    pub workspace: u64,
    /// Sum of all.
    pub total: u64,
    /// Sums of lanes that are kept until others are added to them. 0 where a rank has one lane. What
    /// ranks exchange takes up to 32 MiB of the host besides, which is not in the plan.
    pub exchange: u64,
}
versioned!(mxt_memory_plan, last = total: u64, then exchange: u64);

impl From<Plan> for mxt_memory_plan {
    fn from(plan: Plan) -> Self {
        Self {
            struct_size: size_of::<Self>(),
            weights: plan.weights,
            gradients: plan.gradients,
            optimizer: plan.optimizer,
            activations: plan.activations,
            workspace: plan.workspace,
            total: plan.total(),
            exchange: plan.exchange,
        }
    }
}

/// Fills `options` with the defaults. `struct_size` is sizeof(mxt_trainer_options) as the caller's
/// compiler sees it.
///
/// Errors: MXT_ERROR_NULL, MXT_ERROR_STRUCT_SIZE.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mxt_trainer_options_init(
    options: *mut mxt_trainer_options,
    struct_size: usize,
) -> mxt_status {
    // SAFETY: the caller's struct has `struct_size` bytes.
    guard::function("mxt_trainer_options_init", || unsafe { structs::init(options, struct_size) })
}
