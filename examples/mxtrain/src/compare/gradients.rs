//! `mxtrain compare gradients`: what a recipe does to the gradient of a trained model: its bias and
//! its variance, for every linear layer.
//!
//! Draws are optimizer steps on the same tokens with a learning rate of 0: the step number alone
//! changes, and with it the random bits. The weights stay, which is checked.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::ExitCode;

use mxfp4train::formats::{Rounding, Signs};
use mxfp4train::{
    Architecture, Engine, Model, ModelConfig, Recipe, Schedule, ScheduleKind, Trainer,
    TrainerOptions,
};
use serde::{Deserialize, Serialize};

use super::RECIPES;
use super::cli::GradientsArgs;
use super::moments::{Moments, Statistics};
use super::record::{self, DataRecord, Origin, Record};
use crate::cli::{DataArgs, ExampleArgs, TokenArgs, TokenType};
use crate::console;
use crate::failure::{Failure, Outcome};
use crate::machine;
use crate::prepared::{Meta, TRAIN_FILE};
use crate::tokens_file::read_window;
use crate::train::Data;

/// Statistics of gradients at some checkpoints.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Gradients {
    pub(crate) data: DataRecord,
    pub(crate) seed: u64,
    /// Draws of recipes that are random.
    pub(crate) draws: usize,
    /// Sequences of the batch that weight gradients are of.
    pub(crate) batch_size: usize,
    pub(crate) sequence_length: usize,
    /// Recipe of the gradient that others are compared with.
    pub(crate) reference: String,
    pub(crate) checkpoints: Vec<CheckpointGradients>,
}

/// Statistics at one checkpoint.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct CheckpointGradients {
    /// Last part of the folder's name.
    pub(crate) name: String,
    pub(crate) layers: usize,
    pub(crate) channels: usize,
    /// Loss of the batch with the reference recipe, in nats a token.
    pub(crate) loss: f32,
    pub(crate) recipes: Vec<RecipeGradients>,
}

/// Statistics of one recipe.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct RecipeGradients {
    pub(crate) recipe: String,
    /// 2 where the recipe uses no random bits, and all draws are the same.
    pub(crate) draws: usize,
    pub(crate) tensors: Vec<TensorGradient>,
}

/// Statistics of one gradient.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct TensorGradient {
    pub(crate) quantity: Quantity,
    /// The block it belongs to; none for what all blocks have a part in.
    pub(crate) block: Option<usize>,
    #[serde(flatten)]
    pub(crate) statistics: Statistics,
}

/// What a gradient is of. Of dx, the gradient of an activation, the gradients of parameters show
/// this much: a bias that is added to an activation has the sum of its dx over all tokens as
/// gradient; the weight of a norm, the sum of dx times what was normalized; and embeddings, in a
/// batch of one sequence, dx of the positions that they stand at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Quantity {
    /// dW of query, key and value.
    Qkv,
    /// dW of the attention's output.
    AttentionOutput,
    /// dW of the MLP's first layer.
    Fc1,
    /// dW of the MLP's second layer.
    Fc2,
    /// dx of query, key and value, summed over tokens: the gradient of the first LayerNorm's bias.
    QkvInputSum,
    /// dx of the MLP's first layer, summed over tokens: the gradient of the second LayerNorm's
    /// bias.
    Fc1InputSum,
    /// dW of the two layers that SwiGLU joins.
    GateUp,
    /// dW of the layer behind SwiGLU.
    Down,
    /// The gradient of the weight of the norm before query, key and value.
    QkvNorm,
    /// The gradient of the weight of the norm before gate and up.
    GateUpNorm,
    /// dx of the whole model's input, where the errors of all blocks come together: the gradient of
    /// the position embedding in a batch of one sequence, position by position; or of the token
    /// embedding, summed by token.
    ModelInput,
}

impl Quantity {
    /// All, in the order of tables.
    pub(crate) const ALL: [Self; 11] = [
        Self::Qkv,
        Self::AttentionOutput,
        Self::Fc1,
        Self::Fc2,
        Self::GateUp,
        Self::Down,
        Self::QkvInputSum,
        Self::Fc1InputSum,
        Self::QkvNorm,
        Self::GateUpNorm,
        Self::ModelInput,
    ];

    /// Its name in tables.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Qkv => "dW of QKV",
            Self::AttentionOutput => "dW of attention output",
            Self::Fc1 => "dW of FC1",
            Self::Fc2 => "dW of FC2",
            Self::GateUp => "dW of gate and up",
            Self::Down => "dW of down",
            Self::QkvInputSum => "dx of QKV, summed over tokens",
            Self::Fc1InputSum => "dx of FC1, summed over tokens",
            Self::QkvNorm => "dW of the norm before QKV",
            Self::GateUpNorm => "dW of the norm before gate and up",
            Self::ModelInput => "dx of the model's input",
        }
    }

    /// The parameter of a block whose gradient it is; none where such blocks have none.
    fn parameter(self, architecture: Architecture, block: usize) -> Option<String> {
        if self == Self::ModelInput {
            return Some(model_input(architecture).into());
        }
        Some(match architecture {
            Architecture::Gpt2 => {
                let name = match self {
                    Self::Qkv => "attn.c_attn.weight",
                    Self::AttentionOutput => "attn.c_proj.weight",
                    Self::Fc1 => "mlp.c_fc.weight",
                    Self::Fc2 => "mlp.c_proj.weight",
                    Self::QkvInputSum => "ln_1.bias",
                    Self::Fc1InputSum => "ln_2.bias",
                    _ => return None,
                };
                format!("transformer.h.{block}.{name}")
            }
            Architecture::Llama => {
                let name = match self {
                    Self::Qkv => "self_attn.qkv_proj.weight",
                    Self::AttentionOutput => "self_attn.o_proj.weight",
                    Self::GateUp => "mlp.gate_up_proj.weight",
                    Self::Down => "mlp.down_proj.weight",
                    Self::QkvNorm => "input_layernorm.weight",
                    Self::GateUpNorm => "post_attention_layernorm.weight",
                    _ => return None,
                };
                format!("model.layers.{block}.{name}")
            }
        })
    }
}

/// The embedding whose gradient shows dx of the model's input.
fn model_input(architecture: Architecture) -> &'static str {
    match architecture {
        Architecture::Gpt2 => "transformer.wpe.weight",
        Architecture::Llama => "model.embed_tokens.weight",
    }
}

impl Record for Gradients {
    const KIND: &'static str = "gradients";
    const VERSION: u32 = 1;
}

/// What the draws of every recipe are compared with.
const REFERENCE: &str = "bf16";

/// Runs the command.
pub(crate) fn run(args: &GradientsArgs) -> Outcome<ExitCode> {
    if args.draws < 2 {
        return Err(Failure::usage("--draws: expected at least 2, for a variance; got fewer"));
    }
    let recipes: Vec<Recipe> = match args.recipes.as_slice() {
        [] => RECIPES[1..].iter().map(|name| name.parse()).collect::<Result<_, _>>()?,
        given => given.to_vec(),
    };
    recipes.iter().try_for_each(Recipe::check_trains)?;
    args.seed.say_if_drawn();
    let (engine, about) = machine::open(&args.machine, args.seed.number())?;
    let data = Data::open(&DataArgs {
        data: Some(args.data.clone()),
        train: None,
        val: None,
        examples: ExampleArgs::default(),
        tokens: TokenArgs { token_type: TokenType(None) },
        vocab_size: None,
        tokenizer: None,
        end_of_text: None,
    })?;
    let mut record = Gradients {
        data: DataRecord::of(&data)?,
        seed: args.seed.number(),
        draws: args.draws,
        batch_size: args.batch_size,
        sequence_length: 0,
        reference: REFERENCE.into(),
        checkpoints: Vec::new(),
    };
    for dir in &args.checkpoints {
        let mut model = Model::load(&engine, dir)?;
        if model.config().lora.is_some() {
            // What is compared are gradients of weights.
            model = model.merge_lora()?;
        }
        if model.config().architecture == Architecture::Llama && model.config().tied_head {
            // The gradient of an embedding that is the head, too, would be the sum of both.
            model = with_own_head(&engine, &model)?;
        }
        let length = args.sequence_length.unwrap_or_else(|| model.config().context_length);
        if ![0, length].contains(&record.sequence_length) {
            return Err(Failure::usage(format!(
                "--sequence-length: {} has a context of {length}, the checkpoint before it of {}; say \
                 a length that all can have",
                dir.display(),
                record.sequence_length
            )));
        }
        record.sequence_length = length;
        let probe = Probe {
            tokens: windows(&args.data, args.batch_size, length)?,
            model,
            batch_size: args.batch_size,
            length,
        };
        let name = dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
        record.checkpoints.push(probe.checkpoint(&engine, name, &recipes, args.draws)?);
    }
    record::write(&args.out, Origin::here(&about), record)?;
    console::print(&format!("{}\n", console::shown(&args.out)))?;
    Ok(ExitCode::SUCCESS)
}

/// The same model, whose head is a copy of the token embedding.
fn with_own_head(engine: &Engine, model: &Model) -> Outcome<Model> {
    let apart = Model::new(engine, &ModelConfig { tied_head: false, ..model.config().clone() })?;
    let embedding = model_input(Architecture::Llama);
    for tensor in model.tensors() {
        let mut values = vec![0.0; tensor.len()];
        model.read_tensor(&tensor.name, &mut values)?;
        apart.write_tensor(&tensor.name, &values)?;
        if tensor.name == embedding {
            apart.write_tensor("lm_head.weight", &values)?;
        }
    }
    Ok(apart)
}

/// Sequences of training text, spread evenly: (count, length + 1).
fn windows(dir: &Path, count: usize, length: usize) -> Outcome<Vec<u32>> {
    let file = dir.join(TRAIN_FILE);
    let read = |meta: &Meta| windows_of(&file, meta.train_tokens, count, length);
    Ok(Meta::read_with(dir, read)?.1)
}

fn windows_of(file: &Path, tokens: u64, count: usize, length: usize) -> Outcome<Vec<u32>> {
    let room = tokens.checked_sub(length as u64 + 1).ok_or_else(|| {
        Failure::usage(format!(
            "{}: expected at least {} tokens, got {tokens}; use a shorter --sequence-length",
            file.display(),
            length + 1
        ))
    })?;
    let mut all = Vec::with_capacity(count * (length + 1));
    for i in 0..count as u64 {
        all.extend(read_window(file, i * (room / count as u64), length + 1)?);
    }
    Ok(all)
}

/// A model and the text that its gradients are measured on.
struct Probe {
    model: Model,
    tokens: Vec<u32>,
    batch_size: usize,
    length: usize,
}

impl Probe {
    fn checkpoint(
        &self,
        engine: &Engine,
        name: String,
        recipes: &[Recipe],
        draws: usize,
    ) -> Outcome<CheckpointGradients> {
        let &ModelConfig { layers, channels, .. } = self.model.config();
        let shown = console::plain(&name);
        console::print(&format!("{shown}: {layers} layers x {channels}, {}\n", engine.device()))?;
        let before = self.weights()?;
        let (loss, reference) = {
            let [mut batch, mut single] = self.trainers(&REFERENCE.parse()?)?;
            let loss = batch.step_tokens(&self.tokens)?.loss;
            single.step_tokens(&self.tokens[..=self.length])?;
            (loss, self.gradients(&batch, &single)?)
        };
        let mut all = Vec::new();
        for recipe in recipes {
            let [mut batch, mut single] = self.trainers(recipe)?;
            let draws = if is_random(recipe) { draws } else { 2 };
            let mut moments: Vec<_> = reference.iter().map(|r| Moments::new(r.clone())).collect();
            for _ in 0..draws {
                batch.step_tokens(&self.tokens)?;
                single.step_tokens(&self.tokens[..=self.length])?;
                let drawn = self.gradients(&batch, &single)?;
                moments.iter_mut().zip(drawn).for_each(|(moments, draw)| moments.push(&draw));
            }
            let tensors = self.tensors().into_iter().zip(&moments);
            let tensors = tensors.map(|((quantity, block), moments)| TensorGradient {
                quantity,
                block: (quantity != Quantity::ModelInput).then_some(block),
                statistics: moments.statistics(),
            });
            let gradients =
                RecipeGradients { recipe: recipe.to_string(), draws, tensors: tensors.collect() };
            console::print(&format!("  {}\n", gradients.summary()))?;
            all.push(gradients);
        }
        if self.weights()? != before {
            return Err(Failure::runtime(format!(
                "{name}: the weights moved at a learning rate of 0; the statistics would be of \
                 several models"
            )));
        }
        Ok(CheckpointGradients { name, layers, channels, loss, recipes: all })
    }

    /// Trainers of the whole batch and of its first sequence, which leave the weights alone.
    fn trainers(&self, recipe: &Recipe) -> Outcome<[Trainer; 2]> {
        let trainer = |batch_size| {
            let options = TrainerOptions {
                batch_size,
                sequence_length: self.length,
                recipe: recipe.clone(),
                schedule: Schedule { kind: ScheduleKind::Constant, ..Schedule::default() },
                ..TrainerOptions::default()
            };
            let mut trainer = Trainer::new(&self.model, options)?;
            trainer.set_lr(Some(0.0))?;
            Ok::<_, mxfp4train::Error>(trainer)
        };
        Ok([trainer(self.batch_size)?, trainer(1)?])
    }

    /// What is measured, and of which block.
    fn tensors(&self) -> Vec<(Quantity, usize)> {
        let &ModelConfig { architecture, layers, .. } = self.model.config();
        let of_blocks = Quantity::ALL.into_iter().filter(|&quantity| {
            quantity != Quantity::ModelInput && quantity.parameter(architecture, 0).is_some()
        });
        let each = (0..layers).flat_map(|block| of_blocks.clone().map(move |q| (q, block)));
        each.chain([(Quantity::ModelInput, 0)]).collect()
    }

    /// The gradients of the last step, in the order of [`Probe::tensors`].
    fn gradients(&self, batch: &Trainer, single: &Trainer) -> Outcome<Vec<Vec<f32>>> {
        let architecture = self.model.config().architecture;
        let read = |(quantity, block): (Quantity, usize)| {
            let name = quantity.parameter(architecture, block).expect("it is one of the blocks'");
            let mut values = vec![0.0; self.length_of(&name)];
            let trainer = if quantity == Quantity::ModelInput { single } else { batch };
            trainer.read_gradient(&name, &mut values)?;
            if quantity == Quantity::ModelInput {
                values = self.of_the_sequence(values);
            }
            Ok(values)
        };
        self.tensors().into_iter().map(read).collect()
    }

    /// Of the gradient of an embedding what is not 0: the rows of the first sequence.
    fn of_the_sequence(&self, mut gradient: Vec<f32>) -> Vec<f32> {
        let &ModelConfig { architecture, channels, .. } = self.model.config();
        match architecture {
            Architecture::Gpt2 => {
                gradient.truncate(self.length * channels);
                gradient
            }
            Architecture::Llama => {
                let inputs = BTreeSet::from_iter(&self.tokens[..self.length]);
                let row = |token: &u32| &gradient[*token as usize * channels..][..channels];
                inputs.into_iter().flat_map(row).copied().collect()
            }
        }
    }

    fn length_of(&self, name: &str) -> usize {
        self.model.tensors().iter().find(|t| t.name == name).map_or(0, |tensor| tensor.len())
    }

    /// A checksum of all weights.
    fn weights(&self) -> Outcome<u32> {
        let mut crc = crc32fast::Hasher::new();
        for tensor in self.model.tensors() {
            let mut values = vec![0.0; tensor.len()];
            self.model.read_tensor(&tensor.name, &mut values)?;
            values.iter().for_each(|v| crc.update(&v.to_bits().to_le_bytes()));
        }
        Ok(crc.finalize())
    }
}

impl CheckpointGradients {
    /// What there are gradients of, in the order of tables.
    pub(crate) fn quantities(&self) -> Vec<Quantity> {
        let tensors = || self.recipes.iter().flat_map(|recipe| &recipe.tensors);
        let is_there = |quantity: &Quantity| tensors().any(|t| t.quantity == *quantity);
        Quantity::ALL.into_iter().filter(is_there).collect()
    }
}

impl RecipeGradients {
    /// Mean over blocks of the statistics of a quantity; none where a gradient is zero.
    pub(crate) fn mean(&self, quantity: Quantity) -> Option<Statistics> {
        let all: Vec<_> = self.tensors.iter().filter(|t| t.quantity == quantity).collect();
        let n = all.len() as f64;
        let mean =
            |of: fn(&Statistics) -> f64| all.iter().map(|t| of(&t.statistics)).sum::<f64>() / n;
        let mean = Statistics {
            norm: mean(|s| s.norm),
            bias_squared: mean(|s| s.bias_squared),
            bias_squared_error: mean(|s| s.bias_squared_error.powi(2)).sqrt() / n.sqrt(),
            bias_squared_uncorrected: mean(|s| s.bias_squared_uncorrected),
            variance: mean(|s| s.variance),
            cosine: mean(|s| s.cosine),
            scale: mean(|s| s.scale),
        };
        mean.bias_squared.is_finite().then_some(mean)
    }

    fn summary(&self) -> String {
        let part = |quantity: Quantity| {
            let what = quantity.name();
            self.mean(quantity).map_or_else(String::new, |s| {
                format!(
                    "; {what}: variance {:.2e}, squared bias {:.2e} +- {:.1e}",
                    s.variance, s.bias_squared, s.bias_squared_error
                )
            })
        };
        let shown = [Quantity::Qkv, Quantity::Fc2, Quantity::Down, Quantity::ModelInput];
        format!("{}, {} draws{}", self.recipe, self.draws, shown.map(part).concat())
    }
}

/// Whether the backward pass uses random bits that differ from step to step.
fn is_random(recipe: &Recipe) -> bool {
    recipe.linear(0).operands().iter().any(|(_, operand)| {
        operand.rounding() == Rounding::Unbiased
            || operand.transform().is_some_and(|t| t.signs() == Signs::Random)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use mxfp4train::EngineOptions;

    /// Steps at a learning rate of 0 draw new bits and leave the weights alone, weight decay
    /// included.
    #[test]
    fn draws_differ_and_weights_stay() {
        let engine = Engine::new(EngineOptions { threads: 1, ..Default::default() }).unwrap();
        let config = ModelConfig {
            vocab_size: 50,
            context_length: 32,
            layers: 1,
            heads: 2,
            channels: 32,
            ..ModelConfig::default()
        };
        let model = Model::new(&engine, &config).unwrap();
        let tokens = (0..2 * 33).map(|i| i * i % 50).collect();
        let probe = Probe { model, tokens, batch_size: 2, length: 32 };
        let before = probe.weights().unwrap();
        let [mut batch, single] = probe.trainers(&Recipe::default()).unwrap();
        assert!(batch.options().optimizer.weight_decay > 0.0);
        let mut draw = || {
            batch.step_tokens(&probe.tokens).unwrap();
            probe.gradients(&batch, &single).unwrap()[0].clone()
        };
        assert_ne!(draw(), draw());
        assert_eq!(probe.weights().unwrap(), before);
    }

    /// What the embedding's gradient shows is the model's input alone.
    #[test]
    fn a_head_of_its_own_takes_its_gradient_with_it() {
        let engine = Engine::new(EngineOptions { threads: 1, ..Default::default() }).unwrap();
        let config = ModelConfig {
            architecture: Architecture::Llama,
            vocab_size: 50,
            context_length: 32,
            layers: 1,
            heads: 2,
            kv_heads: 1,
            channels: 32,
            mlp_channels: 48,
            tied_head: true,
            ..ModelConfig::default()
        };
        let model = Model::new(&engine, &config).unwrap();
        let apart = with_own_head(&engine, &model).unwrap();
        assert!(!apart.config().tied_head);
        let tokens: Vec<u32> = (0..33).map(|i| i * i % 23).collect();
        let gradients = |model: Model| {
            let probe = Probe { model, tokens: tokens.clone(), batch_size: 1, length: 32 };
            let [_, mut single] = probe.trainers(&"fp32".parse().unwrap()).unwrap();
            let loss = single.step_tokens(&probe.tokens).unwrap().loss;
            let read = |name: &str| {
                let mut values = vec![0.0; 50 * 32];
                single.read_gradient(name, &mut values).map(|()| values)
            };
            let of_tokens = probe.gradients(&single, &single).unwrap().pop().unwrap();
            (loss, read("model.embed_tokens.weight").unwrap(), read("lm_head.weight"), of_tokens)
        };
        let (loss, both, none, _) = gradients(model);
        assert!(none.is_err());
        let (of_apart, input, head, of_tokens) = gradients(apart);
        assert_eq!(loss, of_apart);
        for ((both, input), head) in both.iter().zip(&input).zip(&head.unwrap()) {
            assert!((both - (input + head)).abs() < 1e-6, "{both} {input} {head}");
        }
        // Of the tokens that the sequence has, in their order; of the others it is 0.
        let shown: Vec<f32> = input.iter().copied().filter(|v| *v != 0.0).collect();
        assert!(shown.len() < input.len());
        assert_eq!(of_tokens, shown);
    }

    #[test]
    fn only_recipes_with_fresh_bits_are_random() {
        for (recipe, random) in [
            ("bf16", false),
            ("mxfp4", false),
            ("mxfp4-rht,signs=fixed", false),
            ("mxfp4-rht", true),
            ("mxfp4-sr", true),
            ("mxfp4-rht-sr,signs=fixed,wgrad=bf16", true),
        ] {
            assert_eq!(is_random(&recipe.parse().unwrap()), random, "{recipe}");
        }
    }
}
