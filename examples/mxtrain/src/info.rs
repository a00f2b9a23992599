//! `mxtrain info`: what a checkpoint, a token file or a prepared folder contains.
//!
//! A checkpoint is described from its small files and the header of its weights, so that a large
//! one takes no longer than a small one.

use std::fs;
use std::path::Path;
use std::process::ExitCode;

use indicatif::{HumanBytes, HumanCount};
use mxfp4train::{
    Architecture, Dataset, Model, ModelConfig, ModelFiles, Rope, RopeScaling, StoredTensor, Trainer,
};
use serde::{Deserialize, Deserializer, Serialize};

use crate::cli::InfoArgs;
use crate::console;
use crate::failure::{Failure, Outcome};
use crate::files;
use crate::hugging_face::known_tokenizer;
use crate::prepared::{Documents, Meta, Source};
use crate::tokenizer::Kind;
use crate::train::{adapters_in_words, is_checkpoint};

/// Runs the command.
pub(crate) fn run(args: &InfoArgs) -> Outcome<ExitCode> {
    let path = &args.path;
    let about = if Meta::is_in(path) {
        About::Data(prepared(path)?)
    } else if is_checkpoint(path) {
        About::Checkpoint(Box::new(checkpoint(path)?))
    } else if path.is_dir() {
        return Err(neither(path));
    } else {
        let files = token_files(&Dataset::open_with(path, &args.tokens.options())?)?;
        About::Data(Prepared { files, ..Prepared::default() })
    };
    if args.json {
        console::print_json(&about)?;
    } else {
        console::print(&match &about {
            About::Checkpoint(checkpoint) => checkpoint.text(args.tensors),
            About::Data(data) => data.text(),
        })?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Of a folder that is nothing of ours, though there may be token files in it.
fn neither(dir: &Path) -> Failure {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let files = entries.map(|entry| entry.path()).filter(|path| path.is_file());
    let mut ends = files.filter_map(|path| Some(path.extension()?.to_owned()));
    let end = ends.find(|end| end == "bin" || end == "npy");
    let hint = end.map(|end| dir.join("*").with_extension(end));
    let hint = hint.map_or_else(String::new, |pattern| {
        format!("; for the token files in it name {}", console::shell_word(pattern.as_os_str()))
    });
    Failure::usage(format!(
        "{}: expected a checkpoint (config.json) or a prepared folder (meta.json), found neither{hint}",
        dir.display()
    ))
}

#[derive(Serialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
enum About {
    Checkpoint(Box<Checkpoint>),
    Data(Prepared),
}

/// A checkpoint folder.
#[derive(Serialize)]
struct Checkpoint {
    config: Config,
    parameters: u64,
    /// The trainer's part; `None` for weights alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    training: Option<Training>,
    /// Why a run cannot go on from here.
    #[serde(skip_serializing_if = "Option::is_none")]
    cannot_resume: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tokenizer: Option<Kind>,
    tensors: Vec<Tensor>,
}

/// The keys of Hugging Face's `config.json` that give the shape; the last ones where they are not
/// GPT-2's.
#[derive(Serialize)]
struct Config {
    architecture: String,
    vocab_size: usize,
    n_positions: usize,
    n_layer: usize,
    n_head: usize,
    n_embd: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    n_inner: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    activation_function: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tie_word_embeddings: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    scale_attn_weights: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    scale_attn_by_inverse_layer_idx: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    num_key_value_heads: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    head_dim: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    qkv_bias: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    qk_norm: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    rope: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    lora: Option<String>,
}

impl From<&ModelConfig> for Config {
    fn from(config: &ModelConfig) -> Self {
        let gpt2 = ModelConfig::default();
        let is_llama = config.architecture == Architecture::Llama;
        Self {
            architecture: config.architecture.to_string(),
            vocab_size: config.vocab_size,
            n_positions: config.context_length,
            n_layer: config.layers,
            n_head: config.heads,
            n_embd: config.channels,
            n_inner: (config.mlp_channels != 0 || is_llama).then(|| config.mlp_width()),
            activation_function: (config.activation != gpt2.activation)
                .then(|| config.activation.to_string()),
            tie_word_embeddings: (!config.tied_head).then_some(false),
            scale_attn_weights: (!config.scale_attention).then_some(false),
            scale_attn_by_inverse_layer_idx: config.scale_attention_by_layer.then_some(true),
            num_key_value_heads: (config.kv_heads != 0).then_some(config.kv_heads),
            head_dim: (config.head_size != 0).then_some(config.head_size),
            qkv_bias: config.qkv_bias.then_some(true),
            qk_norm: config.qk_norm.then_some(true),
            rope: is_llama.then(|| rope_in_words(&config.rope)),
            lora: config.lora.as_ref().map(|lora| adapters_in_words(lora, config.architecture)),
        }
    }
}

/// Rotary positions for people.
fn rope_in_words(rope: &Rope) -> String {
    let theta = rope.theta;
    match rope.scaling {
        RopeScaling::None => format!("rotary positions of {theta}"),
        RopeScaling::Linear { factor } => {
            format!("rotary positions of {theta}, stretched {factor} times")
        }
        RopeScaling::Llama3 { factor, original_context, .. } => format!(
            "rotary positions of {theta}, stretched {factor} times from {original_context} on as in \
             Llama 3"
        ),
    }
}

impl Config {
    /// What is not GPT-2's, for people: each with a comma before it.
    fn differences(&self) -> String {
        let inner = self.n_inner.map(|width| format!("{width} channels in the MLP"));
        let form = self.activation_function.as_ref().map(|name| format!("activation {name}"));
        let head = self.tie_word_embeddings.map(|_| "a head of its own".to_owned());
        let plain = self.scale_attn_weights.map(|_| "unscaled attention".to_owned());
        let layer = self.scale_attn_by_inverse_layer_idx;
        let layer = layer.map(|_| "attention scaled by layer".to_owned());
        let kv = self.num_key_value_heads.map(|heads| format!("{heads} heads of keys and values"));
        let size = self.head_dim.map(|size| format!("heads of {size} channels"));
        let bias = self.qkv_bias.map(|_| "biases of q, k and v".to_owned());
        let norms = self.qk_norm.map(|_| "norms of q and k".to_owned());
        let rope = self.rope.clone();
        [kv, size, inner, form, bias, norms, rope, head, plain, layer, self.lora.clone()]
            .into_iter()
            .flatten()
            .map(|text| format!(", {text}"))
            .collect()
    }
}

/// The keys of `trainer.json` that a reader wants to know.
#[derive(Serialize, Deserialize)]
struct Training {
    step: u64,
    seed: u64,
    recipe: String,
    /// By name.
    #[serde(deserialize_with = "name_of_optimizer")]
    optimizer: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    token_drop: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    frozen: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    document_end: Option<u32>,
}

/// That of AdamW is not in the file.
fn name_of_optimizer<'de, D: Deserializer<'de>>(from: D) -> Result<String, D::Error> {
    #[derive(Deserialize)]
    struct Optimizer {
        kind: Option<String>,
    }
    let Optimizer { kind } = Deserialize::deserialize(from)?;
    Ok(kind.unwrap_or_else(|| "adamw".into()))
}

#[derive(Serialize)]
struct Tensor {
    name: String,
    dtype: String,
    shape: Vec<usize>,
}

/// A prepared folder, or a token file alone.
#[derive(Default, Serialize)]
struct Prepared {
    #[serde(skip_serializing_if = "Option::is_none")]
    tokenizer: Option<Kind>,
    #[serde(skip_serializing_if = "Option::is_none")]
    vocab_size: Option<usize>,
    files: Vec<TokenFile>,
    #[serde(skip_serializing_if = "Option::is_none")]
    documents: Option<Documents>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    sources: Vec<Source>,
}

#[derive(Serialize)]
struct TokenFile {
    /// As text; bytes that are not UTF-8 are replaced.
    path: String,
    format: String,
    token_type: String,
    tokens: u64,
    largest_token: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    documents: Option<u64>,
}

fn checkpoint(dir: &Path) -> Outcome<Checkpoint> {
    let ModelFiles { config, tensors } = Model::inspect(dir)?;
    let state = Trainer::read_state(dir)?;
    let cannot_resume = match &state {
        Some(_) => Trainer::inspect(dir).err().map(|error| error.to_string()),
        None => None,
    };
    let parse = |text: Vec<u8>| files::parse_json(&dir.join("trainer.json"), &text);
    Ok(Checkpoint {
        config: Config::from(&config),
        parameters: config.parameter_count(),
        training: state.map(parse).transpose()?,
        cannot_resume,
        tokenizer: known_tokenizer(dir)?,
        tensors: tensors
            .into_iter()
            .map(|StoredTensor { name, dtype, shape }| Tensor { name, dtype, shape })
            .collect(),
    })
}

fn prepared(dir: &Path) -> Outcome<Prepared> {
    let open = |meta: &Meta| Ok((meta.open_train(dir)?, meta.open_val(dir)?));
    let (meta, (train, val)) = Meta::read_with(dir, open)?;
    let mut files = token_files(&train)?;
    if let Some(val) = val {
        files.extend(token_files(&val)?);
    }
    Ok(Prepared {
        tokenizer: Some(meta.tokenizer),
        vocab_size: Some(meta.vocab_size),
        files,
        documents: meta.documents,
        sources: meta.sources,
    })
}

fn token_files(data: &Dataset) -> Outcome<Vec<TokenFile>> {
    let largest = data.max_tokens()?;
    let described = data.files().into_iter().zip(largest).map(|(file, largest_token)| TokenFile {
        path: file.path.to_string_lossy().into_owned(),
        format: file.format.to_string(),
        token_type: file.token_type.to_string(),
        tokens: file.tokens,
        largest_token,
        documents: file.documents,
    });
    Ok(described.collect())
}

impl Checkpoint {
    fn text(&self, with_tensors: bool) -> String {
        let c = &self.config;
        let mut text = format!(
            "model       {}, {} layers x {} channels x {} heads, context {}, vocabulary {}{}\n\
             parameters  {}\n",
            if c.architecture == "gpt2" { "GPT-2" } else { "Llama" },
            c.n_layer,
            c.n_embd,
            c.n_head,
            HumanCount(c.n_positions as u64),
            HumanCount(c.vocab_size as u64),
            c.differences(),
            HumanCount(self.parameters),
        );
        if let Some(training) = &self.training {
            let Training { step, seed, recipe, optimizer, token_drop, frozen, document_end } =
                training;
            let [recipe, optimizer] = [recipe, optimizer].map(|name| console::plain(name));
            let drop =
                token_drop.as_ref().map(|drop| format!(", token drop {}", console::plain(drop)));
            let drop = drop.unwrap_or_default();
            let frozen = frozen.as_ref().map(|of| format!(", frozen {}", console::plain(of)));
            let frozen = frozen.unwrap_or_default();
            let apart = document_end.map(|end| format!(", documents end with {end}"));
            let apart = apart.unwrap_or_default();
            text.push_str(&format!(
                "training    step {step}, recipe {recipe}, optimizer {optimizer}{drop}{frozen}{apart}, \
                 seed {seed}\n"
            ));
        }
        if let Some(why) = &self.cannot_resume {
            text.push_str(&format!("            cannot be resumed: {}\n", console::plain(why)));
        }
        if let Some(tokenizer) = &self.tokenizer {
            text.push_str(&format!("tokenizer   {tokenizer}\n"));
        }
        text.push_str(&format!("tensors     {}\n", self.tensors.len()));
        let width = self.tensors.iter().map(|t| t.name.len()).max().unwrap_or(0);
        let of_types = self.tensors.iter().map(|t| t.dtype.len()).max().unwrap_or(0);
        for t in self.tensors.iter().filter(|_| with_tensors) {
            let name = console::plain(&t.name);
            text.push_str(&format!("  {name:width$}  {:of_types$}  {:?}\n", t.dtype, t.shape));
        }
        text
    }
}

impl Prepared {
    fn text(&self) -> String {
        let mut text = String::new();
        if let (Some(tokenizer), Some(vocab_size)) = (&self.tokenizer, self.vocab_size) {
            let vocab_size = HumanCount(vocab_size as u64);
            text.push_str(&format!("tokenizer  {tokenizer}, vocabulary {vocab_size}\n"));
        }
        for file in &self.files {
            let documents = file.documents.map_or_else(String::new, |documents| {
                format!(" in {} documents", HumanCount(documents))
            });
            text.push_str(&format!(
                "tokens     {}: {}{documents}, {} {}, the largest is {}\n",
                console::plain(&file.path),
                HumanCount(file.tokens),
                file.format,
                file.token_type,
                HumanCount(file.largest_token.into()),
            ));
        }
        if self.vocab_size.is_none()
            && let Some(largest) = self.files.iter().map(|file| file.largest_token).max()
        {
            let tokens = self.files.iter().map(|file| file.tokens).sum();
            text.push_str(&format!(
                "total      {} tokens; a vocabulary of {} would do\n",
                HumanCount(tokens),
                HumanCount(u64::from(largest) + 1),
            ));
        }
        match self.documents {
            Some(Documents { cut: true, .. }) => {
                text.push_str("documents  one, its end for validation\n");
            }
            Some(Documents { train, val, .. }) => text.push_str(&format!(
                "documents  {} for training, {} for validation\n",
                HumanCount(train),
                HumanCount(val),
            )),
            None => {}
        }
        for source in &self.sources {
            text.push_str(&format!(
                "source     {}: {} for training, {} for validation\n",
                console::shown(&source.path),
                HumanBytes(source.train_bytes),
                HumanBytes(source.val_bytes),
            ));
        }
        text
    }
}
