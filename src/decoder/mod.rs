//! Sampling from a model, one token after the other.

mod sampler;

use std::sync::Arc;

use crate::backend::cpu::Cpu;
use crate::backend::cuda::Cuda;
use crate::backend::{Backend, Device, Sequences, StepPlan, WorkspaceShape, on_device};
use crate::formats::LinearRecipe;
use crate::gpt::{Activations, ModelConfig, Pass, Shapes};
use crate::model::{Model, OnDevice};
use crate::optim::Master;
use crate::recipe::Recipe;
use crate::reserve::{push, reserve};
use crate::{Error, Result};
pub use sampler::GenerateOptions;
use sampler::Sampler;

const TOKENS: &str = "the tokens of a text";

impl Model {
    /// Samples a continuation of `prompt`. `on_token` sees each token as it is drawn, and returns
    /// whether to go on; a token of `stop_tokens` is the last. Once prompt and continuation exceed
    /// the context, the oldest tokens fall out.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for an empty prompt or an option out of range,
    /// [`Error::TokenRange`], [`Error::NotFinite`] if the model's logits are.
    pub fn generate(
        &self,
        prompt: &[u32],
        options: &GenerateOptions,
        on_token: &mut dyn FnMut(u32) -> bool,
    ) -> Result<Vec<u32>> {
        let config = self.config();
        options.validate(config.vocab_size)?;
        self.check_prompt(prompt)?;
        let total = prompt.len().saturating_add(options.max_tokens);
        let longest = total.min(config.context_length);
        let mut decoder = Decoder::new(self, longest)?;
        let mut sampler = Sampler::new(options, config.vocab_size)?;
        prompt.iter().for_each(|token| sampler.note(*token));
        // What is further back than the context is never looked at.
        let prompt = &prompt[prompt.len().saturating_sub(longest)..];
        let mut tokens = Vec::new();
        reserve(&mut tokens, TOKENS, prompt.len())?;
        tokens.extend_from_slice(prompt);
        for drawn in 0..options.max_tokens {
            let context = &tokens[tokens.len().saturating_sub(longest)..];
            decoder.next_logits(self, context, &mut sampler.logits)?;
            let token = sampler.choose(drawn as u32)?;
            sampler.note(token);
            push(&mut tokens, TOKENS, token)?;
            if !on_token(token) || options.stop_tokens.contains(&token) {
                break;
            }
        }
        tokens.drain(..prompt.len());
        Ok(tokens)
    }

    /// Writes the logits (V) of the token after `tokens`, in f32. Only the last tokens that fit the
    /// context count.
    ///
    /// # Errors
    /// As [`Model::generate`]; [`Error::InvalidArgument`] if `out` has another length.
    pub fn next_logits(&self, tokens: &[u32], out: &mut [f32]) -> Result<()> {
        let ModelConfig { vocab_size, context_length, .. } = *self.config();
        self.check_prompt(tokens)?;
        if out.len() != vocab_size {
            let message = format!("expected room for {vocab_size} numbers, got {}", out.len());
            return Err(Error::invalid("logits", message));
        }
        let context = &tokens[tokens.len().saturating_sub(context_length)..];
        Decoder::new(self, context.len())?.next_logits(self, context, out)
    }

    fn check_prompt(&self, prompt: &[u32]) -> Result<()> {
        let vocab_size = self.config().vocab_size;
        if prompt.is_empty() {
            let message = "expected at least one token to continue from, got none";
            return Err(Error::invalid("prompt", message));
        }
        match prompt.iter().position(|token| *token as usize >= vocab_size) {
            Some(offset) => Err(Error::TokenRange {
                source_name: "the prompt".into(),
                offset: offset as u64,
                token: prompt[offset].into(),
                vocab_size,
            }),
            None => Ok(()),
        }
    }
}

/// Computes logits, where the model is.
struct Decoder(Device<DecoderOn<Cpu>, DecoderOn<Cuda>>);

/// A model and memory for forward passes over one sequence.
struct DecoderOn<B: Backend> {
    model: Arc<OnDevice<B>>,
    activations: Activations<B>,
    workspace: B::Workspace,
    tokens: B::Tokens,
    logits: B::F32,
    plan: StepPlan,
    /// What the weights are kept as: where they are split, it computes with their copies.
    master: Master,
    longest: usize,
}

impl Decoder {
    fn new(model: &Model, longest: usize) -> Result<Self> {
        Ok(Self(match model.on_device() {
            Device::Cpu(on) => Device::Cpu(DecoderOn::new(model, on, longest)?),
            Device::Cuda(on) => Device::Cuda(DecoderOn::new(model, on, longest)?),
        }))
    }

    /// Logits of the token after `context`.
    fn next_logits(&mut self, model: &Model, context: &[u32], out: &mut [f32]) -> Result<()> {
        on_device!(&mut self.0, on => on.next_logits(model, context, out))
    }
}

impl<B: Backend> DecoderOn<B> {
    fn new(model: &Model, on: &Arc<OnDevice<B>>, longest: usize) -> Result<Self> {
        let master = on.read()?.master;
        Self::for_master(model, on, longest, master)
    }

    fn for_master(
        model: &Model,
        on: &Arc<OnDevice<B>>,
        longest: usize,
        master: Master,
    ) -> Result<Self> {
        let (backend, config) = (&*on.backend, model.config());
        let mut measuring = backend.arena(None)?;
        Self::cut(on, &mut measuring, config, longest, master)?;
        let bytes = backend.arena_used(&measuring);
        model.engine().check_memory("generating", bytes as u64, bytes as u64)?;
        Self::cut(on, &mut backend.arena(Some(bytes))?, config, longest, master)
    }

    fn next_logits(&mut self, model: &Model, context: &[u32], out: &mut [f32]) -> Result<()> {
        let (on, config) = (Arc::clone(&self.model), model.config());
        let (OnDevice { backend, table, .. }, weights) = (&*on, on.read()?);
        if weights.master != self.master {
            *self = Self::for_master(model, &on, self.longest, weights.master)?;
        }
        let weights = &weights.all;
        let sequences = Sequences { batch: 1, length: context.len() };
        let Self { activations, workspace, tokens, logits, plan, .. } = self;
        backend.scope(|| {
            backend.write_tokens(tokens, context.len(), |to| to.copy_from_slice(context));
            let (backend, means, merge) = (&**backend, None, None);
            let mut pass = Pass {
                backend,
                config,
                table,
                weights,
                means,
                trains: false,
                merge,
                workspace,
                sequences,
                plan,
            };
            pass.forward(activations, tokens);
            pass.logits(activations, context.len() - 1, logits);
        });
        backend.read_f32(logits, 0, out)
    }

    fn cut(
        model: &Arc<OnDevice<B>>,
        arena: &mut B::Arena,
        config: &ModelConfig,
        longest: usize,
        master: Master,
    ) -> Result<Self> {
        let (recipe, linear) = match master {
            Master::F32 => (Recipe::fp32(), LinearRecipe::F32),
            Master::Split => (Recipe::bf16(), LinearRecipe::BF16),
        };
        let precision = recipe.precision();
        let (backend, sequences) = (&*model.backend, Sequences { batch: 1, length: longest });
        let shapes = Shapes { config, sequences, precision };
        let shape = WorkspaceShape {
            linears: &shapes.linears(),
            norm: shapes.norm(),
            attention: shapes.attention(0),
            head: shapes.head(),
            recipes: &[linear],
            merge: None,
            backward: false,
        };
        backend.supports(&shape)?;
        Ok(Self {
            model: model.clone(),
            activations: Activations::new(backend, arena, shapes, None)?,
            workspace: backend.workspace(arena, &shape),
            tokens: backend.tokens(arena, longest, false)?,
            logits: backend.f32(arena, config.vocab_size),
            plan: recipe.step_plan(config.layers)?,
            master,
            longest,
        })
    }
}
