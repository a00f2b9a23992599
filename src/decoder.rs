//! Sampling from a model, one token after the other.

use std::sync::Arc;

use crate::backend::cpu::Cpu;
use crate::backend::cuda::Cuda;
use crate::backend::{Backend, Device, Sequences, StepPlan, WorkspaceShape, on_device};
use crate::formats::{Draw, LinearRecipe, Purpose, uniform};
use crate::gpt::{Activations, ModelConfig, Pass, Shapes};
use crate::model::{Model, OnDevice};
use crate::optim::Master;
use crate::recipe::Recipe;
use crate::reserve::{push, reserve, zeros};
use crate::{Error, Result};

/// How the next token is chosen.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerateOptions {
    /// Tokens to generate.
    pub max_tokens: usize,
    /// Divides the logits; 0 takes the most likely token (greedy).
    pub temperature: f32,
    /// Keeps the k most likely tokens; 0 keeps all.
    pub top_k: usize,
    /// Keeps the most likely tokens whose probabilities add up to at least p; 1 keeps all.
    pub top_p: f32,
    /// Seed of the draws: the same seed and model give the same tokens.
    pub seed: u64,
    /// Tokens that end the text, such as the one that stands between documents. The one that was
    /// drawn is the last of the result, so that a text that ended differs from one cut off.
    pub stop_tokens: Vec<u32>,
}

impl Default for GenerateOptions {
    fn default() -> Self {
        Self {
            max_tokens: 256,
            temperature: 0.8,
            top_k: 0,
            top_p: 1.0,
            seed: 1337,
            stop_tokens: Vec::new(),
        }
    }
}

impl GenerateOptions {
    fn validate(&self, vocab_size: usize) -> Result<()> {
        if !(self.temperature >= 0.0 && self.temperature.is_finite()) {
            let message = format!("expected a number of at least 0, got {}", self.temperature);
            return Err(Error::invalid("temperature", message));
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            let message = format!("expected a number above 0 and up to 1, got {}", self.top_p);
            return Err(Error::invalid("top_p", message));
        }
        if let Some(token) = self.stop_tokens.iter().find(|token| **token as usize >= vocab_size) {
            let message = format!(
                "token {token} is outside the vocabulary of {vocab_size} and would never come"
            );
            return Err(Error::invalid("stop_tokens", message));
        }
        Ok(())
    }
}

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
        // What is further back than the context is never looked at.
        let prompt = &prompt[prompt.len().saturating_sub(longest)..];
        let mut tokens = Vec::new();
        reserve(&mut tokens, TOKENS, prompt.len())?;
        tokens.extend_from_slice(prompt);
        for drawn in 0..options.max_tokens {
            let context = &tokens[tokens.len().saturating_sub(longest)..];
            decoder.next_logits(self, context, &mut sampler.logits)?;
            let token = sampler.draw(drawn as u32)?;
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

/// Draws tokens from logits.
struct Sampler<'a> {
    options: &'a GenerateOptions,
    draw: Draw,
    logits: Vec<f32>,
    /// Tokens, most likely first, with their weights.
    ranked: Vec<(u32, f64)>,
}

impl<'a> Sampler<'a> {
    fn new(options: &'a GenerateOptions, vocab_size: usize) -> Result<Self> {
        let mut ranked = Vec::new();
        reserve(&mut ranked, "a ranking of the tokens", vocab_size)?;
        Ok(Self {
            options,
            draw: Draw::of(options.seed, Purpose::Sampling, 0, 0),
            logits: zeros("the logits", vocab_size)?,
            ranked,
        })
    }

    /// Token number `index` of a run, from `self.logits`.
    fn draw(&mut self, index: u32) -> Result<u32> {
        if let Some(value) = self.logits.iter().find(|v| !v.is_finite()) {
            return Err(Error::NotFinite { what: "a logit".into(), value: *value });
        }
        let by_logit = self.logits.iter().enumerate();
        // Of equal logits, the token of the lower number is the more likely one.
        let (best, max) = by_logit
            .fold((0, f32::NEG_INFINITY), |best, (i, v)| if *v > best.1 { (i, *v) } else { best });
        if self.options.temperature == 0.0 {
            return Ok(best as u32);
        }
        let temperature = f64::from(self.options.temperature);
        self.ranked.clear();
        self.ranked.extend(self.logits.iter().enumerate().map(|(token, logit)| {
            (token as u32, ((f64::from(*logit) - f64::from(max)) / temperature).exp())
        }));
        // No two are equal, so the order is that of a stable sort, which would allocate.
        self.ranked.sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        if self.options.top_k > 0 {
            self.ranked.truncate(self.options.top_k);
        }
        let total: f64 = self.ranked.iter().map(|(_, w)| w).sum();
        let nucleus = total * f64::from(self.options.top_p);
        let mut sum = 0.0;
        let keep = self.ranked.iter().position(|(_, w)| {
            sum += w;
            sum >= nucleus
        });
        self.ranked.truncate(keep.map_or(self.ranked.len(), |last| last + 1));

        let kept: f64 = self.ranked.iter().map(|(_, w)| w).sum();
        let [high, low, ..] = self.draw.bits(index, 0);
        let mut left = kept * uniform(high, low);
        let chosen = self.ranked.iter().find(|(_, w)| {
            left -= w;
            left < 0.0
        });
        // Rounding may leave a last crumb, which belongs to the last token.
        let (token, _) = chosen.or_else(|| self.ranked.last()).expect("at least one token is kept");
        Ok(*token)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(options: &GenerateOptions, logits: &[f32], draws: u32) -> Vec<u32> {
        let mut sampler = Sampler::new(options, logits.len()).unwrap();
        sampler.logits.copy_from_slice(logits);
        let mut counts = vec![0; logits.len()];
        for i in 0..draws {
            counts[sampler.draw(i).unwrap() as usize] += 1;
        }
        counts
    }

    #[test]
    fn draws_follow_the_softmax() {
        let options = GenerateOptions { temperature: 2.0, ..GenerateOptions::default() };
        let logits = [0.0f32, 2.0, 4.0, -1.0];
        let counts = counts(&options, &logits, 20_000);
        let weights: Vec<f64> = logits.iter().map(|l| (f64::from(*l) / 2.0).exp()).collect();
        let total: f64 = weights.iter().sum();
        for (count, weight) in counts.iter().zip(weights) {
            let p = weight / total;
            let sigma = (p * (1.0 - p) / 20_000.0).sqrt();
            assert!((f64::from(*count) / 20_000.0 - p).abs() < 4.0 * sigma, "{counts:?}");
        }
    }

    #[test]
    fn greedy_top_k_and_top_p_cut_the_tail() {
        let logits = [1.0f32, 3.0, 2.0, 3.0];
        let base = GenerateOptions { temperature: 1.0, ..GenerateOptions::default() };
        let greedy = GenerateOptions { temperature: 0.0, ..base.clone() };
        assert_eq!(counts(&greedy, &logits, 10), [0, 10, 0, 0]);
        let top_k = GenerateOptions { top_k: 2, ..base.clone() };
        let seen = counts(&top_k, &logits, 200);
        assert!(seen[0] == 0 && seen[2] == 0 && seen[1] > 0 && seen[3] > 0);
        // The two likeliest have 0.40 each: 0.5 needs both, 0.35 only the first.
        let top_p = |top_p| GenerateOptions { top_p, ..base.clone() };
        let seen = counts(&top_p(0.5), &logits, 200);
        assert!(seen[0] == 0 && seen[2] == 0 && seen[1] > 0 && seen[3] > 0);
        assert_eq!(counts(&top_p(0.35), &logits, 10), [0, 10, 0, 0]);
    }

    #[test]
    fn a_broken_model_is_an_error() {
        let options = GenerateOptions::default();
        let mut sampler = Sampler::new(&options, 2).unwrap();
        sampler.logits[1] = f32::NAN;
        assert!(matches!(sampler.draw(0), Err(Error::NotFinite { .. })));
    }
}
