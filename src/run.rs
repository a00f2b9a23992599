//! A run as data: the options that it was made with, and its place. What a checkpoint holds of a
//! trainer besides tensors.

use crate::backend::Precision;
use crate::comm::Share;
use crate::formats::{GemmId, LinearRecipe, Restoration};
use crate::gpt::{Frozen, ModelConfig, Recompute, TokenDrop};
use crate::optim::{Gradients, Master, Optimizer, Schedule};
use crate::recipe::Recipe;
use crate::{Error, Result};

/// What a [`crate::Trainer`] is made from.
#[derive(Clone, Debug, PartialEq)]
pub struct TrainerOptions {
    /// B: sequences of one micro-step.
    pub batch_size: usize,
    /// T: tokens of one sequence; 0 takes the model's context length.
    pub sequence_length: usize,
    /// Micro-steps whose gradients are averaged into one optimizer step, those of all ranks of a
    /// group together; 0 takes as many as there are lanes, which is one a rank.
    pub accumulation: usize,
    /// Lanes: the parts of a step that ranks of a group share, each of as many micro-steps in a row,
    /// whose gradients are then added in one fixed order. Runs with the same lanes have the same bits
    /// on any number of ranks that divides them by a power of two. 0 takes as many as there are
    /// ranks, 1 without a group. A rank with 2^k lanes keeps k more copies of the gradients.
    pub lanes: usize,
    /// Number formats of the linear layers.
    pub recipe: Recipe,
    /// What is computed again in the backward pass to save memory; results do not depend on it.
    pub recompute: Recompute,
    /// What moves the weights, and clipping.
    pub optimizer: Optimizer,
    /// Learning rate.
    pub schedule: Schedule,
    /// How many tokens of a sequence the blocks between the first and the last see in training, at
    /// each step of the schedule; None lets them see all. Evaluations always do.
    pub token_drop: Option<TokenDrop>,
    /// The tensors that stay as they are; none by default.
    pub frozen: Frozen,
    /// The token that ends a document, such as the end-of-text token. Attention then looks at no other
    /// document than a token's own, and positions are counted from where it begins, so that documents
    /// that are packed into one sequence are as if each were alone. The token itself belongs to the
    /// document that it ends. Of all windows and batches, but those that come with documents; losses
    /// are of all targets as ever, for weights say what counts. None takes a sequence as one document.
    pub document_end: Option<u32>,
}

/// What is due after which steps of a run, counted from step 0; 0 is never. A loop over steps, ours
/// or a host's, asks here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cadence {
    /// Evaluations.
    pub eval_every: u64,
    /// Checkpoints.
    pub save_every: u64,
}

impl Cadence {
    /// Whether an evaluation is due after step `step`.
    pub fn evaluates(self, step: u64) -> bool {
        Self::is_due(self.eval_every, step)
    }

    /// Whether a checkpoint is due after step `step`.
    pub fn saves(self, step: u64) -> bool {
        Self::is_due(self.save_every, step)
    }

    /// Whether what happens every so many steps is due after step `step`.
    pub fn is_due(every: u64, step: u64) -> bool {
        every > 0 && step.is_multiple_of(every)
    }
}

/// What a run is besides its weights and moments: enough to go on bit for bit.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct TrainerState {
    pub(crate) options: TrainerOptions,
    /// Seed of data order, rounding and transforms.
    pub(crate) seed: u64,
    /// Optimizer steps done.
    pub(crate) step: u64,
    /// The step that the schedule counts from: 0, or where a new one was set.
    pub(crate) schedule_start: u64,
    /// Learning rate set by the host, which overrides the schedule.
    pub(crate) lr_override: Option<f32>,
}

impl TrainerState {
    /// Steps done of the schedule.
    pub(crate) fn schedule_step(&self) -> u64 {
        self.step.saturating_sub(self.schedule_start)
    }

    /// Tokens of a sequence that blocks between the first and the last keep in the next step; None
    /// for all.
    pub(crate) fn kept(&self) -> Option<usize> {
        let TrainerOptions { token_drop, sequence_length, schedule, .. } = &self.options;
        let drop = (*token_drop)?;
        let kept = drop.kept(self.schedule_step(), *sequence_length, schedule.total_steps);
        Some(kept).filter(|kept| kept < sequence_length)
    }
}

impl TrainerOptions {
    /// Checks every option against the model and fills in what 0 stands for.
    pub(crate) fn resolved(&self, config: &ModelConfig, ranks: usize) -> Result<Self> {
        let mut options = self.clone();
        if options.lanes == 0 {
            options.lanes = ranks;
        }
        if options.accumulation == 0 {
            options.accumulation = options.lanes;
        }
        if options.sequence_length == 0 {
            options.sequence_length = config.context_length;
        }
        if options.sequence_length > config.context_length {
            let message = format!(
                "{} is longer than the model's context of {}",
                options.sequence_length, config.context_length
            );
            return Err(Error::invalid("sequence_length", message));
        }
        // Micro-steps have 14 bits in the counter of the random numbers.
        let limits = [
            ("batch_size", options.batch_size, 1 << 20),
            ("accumulation", options.accumulation, 1 << 14),
        ];
        for (what, value, limit) in limits {
            if value == 0 || value > limit {
                let message = format!("expected a number from 1 to {limit}, got {value}");
                return Err(Error::invalid(what, message));
            }
        }
        let (lanes, accumulation) = (options.lanes, options.accumulation);
        if !accumulation.is_multiple_of(lanes) {
            let message = format!(
                "expected a multiple of {lanes}, the lanes that share a step, so that each has as \
                 many micro-steps; got {accumulation} (0 takes {lanes})"
            );
            return Err(Error::invalid("accumulation", message));
        }
        Share::check(lanes, ranks)?;
        // Sizes below are computed in 64 bits. A row takes less than 256 bytes a channel and layer.
        let rows = options.batch_size as u128 * options.sequence_length as u128;
        let channels = config.channels.max(config.mlp_width().div_ceil(4)) as u128;
        let most = rows * channels * (config.layers as u128 + 1) * 256;
        if most >= 1 << 62 {
            return Err(Error::OutOfMemory {
                what: "the activations",
                needed: most.min(u128::from(u64::MAX)) as u64,
                limit: "which no machine has; use a smaller batch_size or sequence_length".into(),
            });
        }
        options.optimizer.validate()?;
        options.schedule.validate()?;
        options.check_master()?;
        options.check_gradients()?;
        if options.optimizer.ramping > 0 {
            let why = "ramping updates those less often whose codes oscillate";
            options.recipe.check_codes(config.layers, why)?;
        }
        options.check_frozen(config)?;
        options.check_documents(config)?;
        if options.recipe.excepts_steps() && options.schedule.total_steps == 0 {
            let message = "bf16-last-steps is a part of a schedule's steps, whose number \
                           (total_steps) is not set; set it, or bf16-last-steps=0";
            return Err(Error::invalid("recipe", message));
        }
        if options.recipe.reset().is_some() && options.schedule.total_steps == 0 {
            let message = "reset starts at a part of a schedule's steps, whose number (total_steps) \
                           is not set";
            return Err(Error::invalid("recipe", message));
        }
        if options.optimizer.anneals() && options.schedule.total_steps == 0 {
            let message = "s=cosine falls over a schedule's steps, whose number (total_steps) is not \
                           set; set it, or s=1";
            return Err(Error::invalid("optimizer", message));
        }
        if let Some(drop) = options.token_drop {
            let total_steps = options.schedule.total_steps;
            drop.check(config.layers, options.sequence_length, total_steps)?;
        }
        Ok(options)
    }
}

impl TrainerOptions {
    /// An error where something needs master weights in f32 that are split.
    fn check_master(&self) -> Result<()> {
        let recipe = &self.recipe;
        let why = if self.optimizer.master == Master::F32 {
            return Ok(());
        } else if recipe.precision() == Precision::F32 {
            "multiplies them"
        } else if recipe.ema().is_some() || recipe.reset().is_some() {
            "follows how they move"
        } else if restores_gradients(recipe) {
            "makes their gradients with them"
        } else {
            return Ok(());
        };
        let message = format!(
            "master=split keeps no weights in f32, and the recipe {recipe} {why}; use master=f32"
        );
        Err(Error::invalid("optimizer", message))
    }

    /// An error where something moves weights that are to stay.
    fn check_frozen(&self, config: &ModelConfig) -> Result<()> {
        let message = if self.frozen.is_empty() && config.lora.is_none() {
            return Ok(());
        } else if self.optimizer.ramping > 0 {
            format!(
                "{} undoes the steps that it tries in all tensors; take ramping out",
                self.optimizer
            )
        } else if self.recipe.reset().is_some() {
            format!("the recipe {} resets weights of all blocks; take reset out", self.recipe)
        } else {
            return Ok(());
        };
        let what = if self.frozen.is_empty() { "lora" } else { "frozen" };
        Err(Error::invalid(what, message))
    }

    /// An error where documents cannot be told apart, or something mixes them.
    fn check_documents(&self, config: &ModelConfig) -> Result<()> {
        let Some(end) = self.document_end else { return Ok(()) };
        if end as usize >= config.vocab_size {
            let message = format!(
                "expected a token of the model, below {}, got {end}; set the token that ends documents \
                 in the data",
                config.vocab_size
            );
            return Err(Error::invalid("document_end", message));
        }
        match self.mixes_documents() {
            None => Ok(()),
            Some(message) => Err(Error::invalid("document_end", message)),
        }
    }

    /// What mixes documents that attention keeps apart, and what to do; None where nothing does.
    pub(crate) fn mixes_documents(&self) -> Option<String> {
        if self.token_drop.is_some() {
            let message = "blocks that drop tokens do not know whose document those are of that they \
                           keep; take token_drop out, or give no documents and no document_end";
            return Some(message.to_owned());
        }
        self.recipe.haste().map(|_| {
            format!(
                "the recipe {} merges channels by all tokens of a sequence, whatever documents they \
                 are of; take haste out, or give no documents and no document_end",
                self.recipe
            )
        })
    }

    /// An error where something needs gradients in f32 that are kept in bf16.
    fn check_gradients(&self) -> Result<()> {
        let Self { recipe, accumulation, .. } = self;
        let message = if self.optimizer.gradients == Gradients::F32 {
            return Ok(());
        } else if *accumulation > 1 {
            format!(
                "gradients=bf16 would round the sum of {accumulation} micro-steps after each of \
                 them; set accumulation to 1, or use gradients=f32"
            )
        } else if recipe.precision() == Precision::F32 {
            format!("the recipe {recipe} keeps everything in f32; use gradients=f32")
        } else if restores_gradients(recipe) {
            format!(
                "the recipe {recipe} makes gradients of products and of weights in f32; use \
                 gradients=f32"
            )
        } else {
            return Ok(());
        };
        Err(Error::invalid("optimizer", message))
    }
}

/// Whether a gradient of weights is more than a product in some layer.
fn restores_gradients(recipe: &Recipe) -> bool {
    let restores = |layer: &LinearRecipe| Restoration::of(layer, GemmId::Wgrad).is_some();
    recipe.all().iter().any(restores)
}

impl Default for TrainerOptions {
    fn default() -> Self {
        Self {
            batch_size: 8,
            sequence_length: 0,
            accumulation: 0,
            lanes: 0,
            recipe: Recipe::default(),
            recompute: Recompute::default(),
            optimizer: Optimizer::default(),
            schedule: Schedule::default(),
            token_drop: None,
            frozen: Frozen::default(),
            document_end: None,
        }
    }
}
