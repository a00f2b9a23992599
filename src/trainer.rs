//! One optimizer step, readable top to bottom; evaluation; stop requests.
use std::path::Path;
use crate::model::{Model, ModelConfig};
use crate::optim::{AdamW, Schedule};
use crate::recipe::Recipe;
use crate::{Dataset, Engine, Result};

/// What a [`Trainer`] is made from.
#[derive(Clone, Debug, PartialEq)]
pub struct TrainerOptions {
    /// B: sequences of one micro-step.
    pub batch_size: usize,
    /// T: tokens of one sequence; 0 takes the model's context length.
    pub sequence_length: usize,
    /// Micro-steps whose gradients are averaged into one optimizer step.
    pub accumulation: usize,
    /// Number formats of the linear layers.
    pub recipe: Recipe,
    /// AdamW and clipping.
    pub optimizer: AdamW,
    /// Learning rate.
    pub schedule: Schedule,
}

/// What a run is besides its weights and moments: enough to go on bit for bit.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct TrainerState {
    pub(crate) options: TrainerOptions,
    /// Seed of data order, rounding and transforms.
    pub(crate) seed: u64,
    /// Optimizer steps done.
    pub(crate) step: u64,
    /// Learning rate set by the host, which overrides the schedule.
    pub(crate) lr_override: Option<f32>,
}

/// What one optimizer step did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepStats {
    /// Steps done, this one included.
    pub step: u64,
    /// Mean cross-entropy of the step's tokens before the update, in nats.
    pub loss: f32,
    /// Global norm of the gradient before clipping.
    pub grad_norm: f32,
    /// Learning rate of the step.
    pub lr: f32,
    /// Tokens trained on in this step.
    pub tokens: u64,
    /// Wall-clock duration of the step.
    pub seconds: f64,
}

/// What an evaluation found.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct EvalStats {
    /// Mean cross-entropy in nats a token.
    pub loss: f32,
    /// Tokens that were predicted.
    pub tokens: u64,
    /// Wall-clock duration.
    pub seconds: f64,
}

/// Bytes that a model and its trainer take, by purpose.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Weights.
    pub weights: u64,
    /// Gradients.
    pub gradients: u64,
    /// Moments of AdamW.
    pub optimizer: u64,
    /// What the forward pass keeps for the backward pass, and the gradients that flow back.
    pub activations: u64,
    /// Packed operands and other scratch of the kernels.
    pub workspace: u64,
}
impl Plan { /// Sum of all purposes.
    pub fn total(&self) -> u64 { todo!() } }

/// Computes what a trainer will take, before anything is allocated.
pub fn plan(_engine: &Engine, _config: &ModelConfig, _options: &TrainerOptions) -> Result<Plan> { todo!() }

/// Asks a trainer to stop at the next step boundary, from any thread or a signal handler.
#[derive(Clone)]
pub struct StopHandle;
impl StopHandle { /// Asks.
    pub fn request_stop(&self) { todo!() }
    /// Whether a stop is asked for.
    pub fn is_requested(&self) -> bool { todo!() }
    /// Takes the request back.
    pub fn clear(&self) { todo!() } }

/// Trains a model.
pub struct Trainer;
impl Trainer {
    /// A trainer at step 0 of `model`.
    pub fn new(_model: &Model, _options: TrainerOptions) -> Result<Self> { todo!() }
    /// Loads a checkpoint that [`Trainer::save`] wrote, model included.
    pub fn load(_engine: &Engine, _dir: &Path) -> Result<Self> { todo!() }
    /// Saves weights, moments and position, atomically.
    pub fn save(&mut self, _dir: &Path) -> Result<()> { todo!() }
    /// One optimizer step on the dataset's next samples.
    pub fn step(&mut self, _data: &Dataset) -> Result<StepStats> { todo!() }
    /// One optimizer step on the host's own tokens: (accumulation * B, T + 1), row-major.
    pub fn step_tokens(&mut self, _tokens: &[u32]) -> Result<StepStats> { todo!() }
    /// Mean loss over `max_batches` batches spread evenly over `data`; 0 takes all of it.
    pub fn eval(&mut self, _data: &Dataset, _max_batches: usize) -> Result<EvalStats> { todo!() }
    /// Overrides the schedule's learning rate from the next step on; `None` returns to the schedule.
    pub fn set_lr(&mut self, _lr: Option<f32>) -> Result<()> { todo!() }
    /// Steps done.
    pub fn steps_done(&self) -> u64 { todo!() }
    /// The model.
    pub fn model(&self) -> &Model { todo!() }
    /// The options it was made from.
    pub fn options(&self) -> &TrainerOptions { todo!() }
    /// Memory it takes.
    pub fn plan(&self) -> Plan { todo!() }
    /// A handle that asks it to stop.
    pub fn stop_handle(&self) -> StopHandle { todo!() }
}
impl Default for TrainerOptions {
    fn default() -> Self { Self { batch_size: 8, sequence_length: 0, accumulation: 1, recipe: Recipe::default(), optimizer: AdamW::default(), schedule: Schedule::default() } }
}
