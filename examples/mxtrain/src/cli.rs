//! The command line: every option with its help.

use std::ffi::OsString;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use bytesize::ByteSize;
use clap::builder::{NonEmptyStringValueParser, OsStringValueParser, TypedValueParser};
use clap::{Args, Parser, Subcommand};
use mxfp4train::{
    Activation, Architecture, DatasetOptions, DecoderWeights, Draft, Frozen, Group, Lora,
    ModelConfig, Optimizer, Recipe, Recompute, ScheduleKind, StoredWeights, TokenDrop, Transport,
    Wire,
};

use crate::compare::CompareArgs;
use crate::console;
use crate::export::ExportFormat;
use crate::prepare::Format;
use crate::ranks::MAX_RANKS;
use crate::tokenizer::Named;

/// Trains GPT-2 and Llama models on text files, with the backward pass in MXFP4.
#[derive(Debug, Parser)]
#[command(
    name = "mxtrain",
    version,
    max_term_width = 100,
    subcommand_required = true,
    arg_required_else_help = true,
    disable_help_subcommand = true,
    args_override_self = true,
    after_help = "\
Example:
  mxtrain prepare notes/*.txt --out data
  mxtrain train --data data --out model --steps 2000
  mxtrain generate --checkpoint model --prompt 'Once upon'

Exit codes: 0 success, 1 failed while running, 2 wrong option or file, 3 trained and saved, but an
evaluation, a sample, a model of --save-at, a record of compare, an event for TensorBoard or lines
of the log or output were lost, 101 ended by a mistake in mxtrain, 130 stopped by Ctrl-C or another
signal (SIGTERM, SIGHUP, SIGUSR1, SIGUSR2, SIGXCPU, SIGALRM, SIGVTALRM, SIGPROF). Whatever ends a
run of train, it has saved what it had done, unless it was killed (SIGKILL, SIGQUIT and signals not
named here) or says otherwise."
)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Turn text into token files
    Prepare(PrepareArgs),
    /// Train a model, or go on with a run
    Train(Box<TrainArgs>),
    /// Teach a model answers to prompts: train with --examples, from --init-from
    Finetune(Box<TrainArgs>),
    /// Measure a checkpoint's loss on token files
    Eval(Box<EvalArgs>),
    /// Continue a text
    Generate(GenerateArgs),
    /// Write a checkpoint's model for other programs: transformers, llama.cpp
    Export(ExportArgs),
    /// Show what a checkpoint, token files or a prepared folder contain
    Info(InfoArgs),
    /// Show the memory that a training run would take, without taking it
    Plan(Box<PlanArgs>),
    /// Show what recipes are made of
    Recipes(RecipesArgs),
    /// Find out what recipes cost: runs side by side, statistics of gradients, tables and plots
    #[command(subcommand_required = true, arg_required_else_help = true)]
    Compare(CompareArgs),
}

#[derive(Debug, Args)]
#[command(after_help = "\
Inputs:
  .txt .text .md         one document, or several with <|endoftext|> between them
  .json .jsonl .ndjson   a document in a field of each object, one a line or in one array
  .parquet               a document in each row of a column of strings
  .gz .zst               any of the first two, compressed
  a folder               all such files below it, in the order of their paths; the rest is counted
  -                      standard input: text, or JSON lines if the first line is one
A file that is named is read whatever its name; without one of these ends it is text. Text is UTF-8;
with bytes, what is not passes as it is.

Documents:
  With gpt2, token 50256 stands between documents, and a <|endoftext|> in a text is that token.
  With bytes nothing stands between files, and <|endoftext|> stays as its 13 bytes. Both tokenizers
  take it for the end of a document; with --no-special it is text like any other.
  With a tokenizer.json, a document begins with what the tokenizer puts before a text (a token
  such as <s>, if it has one), and the token that ends a text stands between documents, and for
  its mark in a text: the eos_token of the files beside tokenizer.json, else one of a usual name
  (<|endoftext|>, </s>, <|end_of_text|>, <eos>), or that of --end-of-text. All other special
  tokens are text like any other. The tokenizer's files are put beside the tokens, from where
  training takes them to the model.

Validation:
  A document is kept for validation if it brings that part nearer to --val-fraction, so the same
  inputs always give the same documents, from all over the inputs. Of two or more documents at least
  one is for validation and one for training. A single one is cut at the beginning of a line.

Examples:
  mxtrain prepare notes/ --out data
  mxtrain prepare corpus/*.jsonl.zst --text-field content --tokenizer gpt2 --out data
  mxtrain prepare train.parquet test.parquet --val-last --tokenizer gpt2 --out data
  mxtrain prepare corpus/ --tokenizer SmolLM2-135M/ --out data
  xz -dc dump.jsonl.xz | mxtrain prepare - --tokenizer gpt2 --out data")]
pub(crate) struct PrepareArgs {
    /// Text files, JSON lines, Parquet files, folders of them, or - for standard input
    #[arg(required = true, value_name = "INPUT")]
    pub(crate) inputs: Vec<PathBuf>,

    /// Folder for train.bin, val.bin and meta.json
    #[arg(long, value_name = "DIR")]
    pub(crate) out: PathBuf,

    /// How text becomes tokens: bytes (vocabulary 256), gpt2 (GPT-2's byte-pair encoding, 50,257),
    /// or the path of a tokenizer.json, Hugging Face's, or of a model's folder that has one
    #[arg(long, value_name = "NAME|PATH", default_value = "bytes", value_parser = tokenizer())]
    pub(crate) tokenizer: Named,

    /// The token of a tokenizer.json that ends a text, by its name [default: what the files beside
    /// it say]
    #[arg(long, value_name = "TOKEN", allow_hyphen_values = true)]
    pub(crate) end_of_text: Option<String>,

    /// Part of the text that is kept for validation, in whole documents (0 to below 1)
    #[arg(long, value_name = "FRACTION", default_value_t = 0.05, value_parser = fraction)]
    pub(crate) val_fraction: f64,

    /// Keep the whole last INPUT for validation, and nothing of the others
    #[arg(long, conflicts_with = "val_fraction")]
    pub(crate) val_last: bool,

    /// Field of a JSON object, or column of a Parquet file, that holds the document
    #[arg(long, value_name = "NAME", default_value = "text")]
    pub(crate) text_field: String,

    /// What all inputs hold, text, json or parquet, whatever their names say
    #[arg(long, value_name = "FORMAT", hide_possible_values = true)]
    pub(crate) format: Option<Format>,

    /// Take <|endoftext|> for text like any other
    #[arg(long)]
    pub(crate) no_special: bool,

    /// Threads that encode; 0 takes one for each core
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = threads)]
    pub(crate) threads: usize,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Every option may also stand in the file of --config under the same name, without the dashes:
  data = \"data\"
  steps = 2000
  lr = 1e-3
The command line wins over the file.")]
pub(crate) struct TrainArgs {
    /// TOML file with options; the command line wins over it
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,

    #[command(flatten)]
    pub(crate) data: DataArgs,

    #[command(flatten)]
    pub(crate) start: StartArgs,

    #[command(flatten)]
    pub(crate) model: ModelArgs,

    #[command(flatten)]
    pub(crate) variant: VariantArgs,

    #[command(flatten)]
    pub(crate) lora: LoraArgs,

    #[command(flatten)]
    pub(crate) batch: BatchArgs,

    /// Keep documents apart: attention looks at no document but a token's own, and positions are
    /// counted from where it begins. Documents end with the token that ends a text to the data's
    /// tokenizer; of --examples each is one, and several are packed into a sequence, which holds
    /// all that the model sees unless --sequence-length is given
    #[arg(long, help_heading = "Step", num_args = 0..=1, require_equals = true,
          default_value_t = false, default_missing_value = "true", hide_default_value = true,
          hide_possible_values = true, action = clap::ArgAction::Set, value_name = "BOOL")]
    pub(crate) document_mask: bool,

    #[command(flatten)]
    pub(crate) recipe: RecipeArgs,

    #[command(flatten)]
    pub(crate) optimizer: OptimizerArgs,

    #[command(flatten)]
    pub(crate) report: ReportArgs,

    #[command(flatten)]
    pub(crate) seed: SeedArgs,

    #[command(flatten)]
    pub(crate) machine: MachineArgs,

    #[command(flatten)]
    pub(crate) ranks: RanksArgs,
}

/// What shares every step.
#[derive(Debug, Args)]
#[command(next_help_heading = "Ranks")]
pub(crate) struct RanksArgs {
    /// GPUs that share every step, from cuda:0 on, with a process each
    #[arg(long, value_name = "N", group = "several", conflicts_with_all = ["ranks", "device"],
          value_parser = ranks)]
    pub(crate) gpus: Option<usize>,

    /// Processes that share every step on the --device, with a part of the cores each
    #[arg(long, value_name = "N", group = "several", value_parser = ranks)]
    pub(crate) ranks: Option<usize>,

    /// How often a run that loses one of its processes begins again from its last checkpoint
    #[arg(long, value_name = "N", default_value_t = 0, conflicts_with = "group")]
    pub(crate) restarts: u32,

    /// Be one rank of those that torchrun, mpirun or srun has started, on one machine or several, as
    /// the environment says; with --device cuda each takes the GPU of its rank on its machine
    #[arg(long, value_name = "HOW", group = "several", value_parser = ["env"],
          conflicts_with_all = ["gpus", "ranks"])]
    pub(crate) group: Option<String>,

    /// How gradients get from GPU to GPU: peer, where these are of one machine and reach each other's
    /// memory; nccl; host, through its memory; or auto, the first of these that can be. No bit depends on
    /// it where gradients are sent as f32
    #[arg(long, value_name = "HOW", requires = "several", default_value_t = Transport::default())]
    pub(crate) transport: Transport,

    /// Keep the optimizer's states of each tensor on one rank alone, which updates it and gives it to all:
    /// the same bits, in a part of the memory. For adamw and muon; a run that loses a process can then only
    /// go on from its last checkpoint
    #[arg(long, requires = "several")]
    pub(crate) shard_states: bool,

    /// What gradients are sent as, for links that are slower than what computes gradients: f32, bf16, fp8
    /// or mxfp4, of which the mean is the gradient. All but f32 change losses a little, make their bits
    /// those of so many ranks, and pass over --transport peer
    #[arg(long, value_name = "FORMAT", requires = "several", default_value_t = Wire::default())]
    pub(crate) gradient_wire: Wire,

    /// Where rank 0 of --group env listens, on a free port of a network that is trusted; the same on all
    /// ranks
    #[arg(long, value_name = "HOST:PORT", requires = "group", value_parser = rendezvous)]
    pub(crate) rendezvous: Option<String>,
}

impl RanksArgs {
    /// What a resumed run has to be given again to be the same to the bit.
    pub(crate) fn again(&self) -> String {
        if self.gradient_wire == Wire::F32 {
            return String::new();
        }
        let several = match (self.gpus, self.ranks, &self.rendezvous) {
            (Some(gpus), ..) => format!("--gpus {gpus}"),
            (_, Some(ranks), _) => format!("--ranks {ranks}"),
            (.., Some(place)) => format!("--group env --rendezvous {place}"),
            _ => "--group env".to_owned(),
        };
        let shards = if self.shard_states { " --shard-states" } else { "" };
        format!(" {several} --gradient-wire {}{shards}", self.gradient_wire)
    }

    /// A group as these want it.
    pub(crate) fn with(&self, group: Group) -> Group {
        let group = group.with_transport(self.transport).with_wire(self.gradient_wire);
        group.with_sharded_states(self.shard_states)
    }

    /// How many this process is to start, itself included.
    pub(crate) fn size(&self) -> usize {
        self.gpus.or(self.ranks).unwrap_or(1)
    }
}

/// Where training tokens come from.
#[derive(Debug, Args)]
#[command(next_help_heading = "Data")]
pub(crate) struct DataArgs {
    /// Folder made by `mxtrain prepare`
    #[arg(long, value_name = "DIR")]
    pub(crate) data: Option<PathBuf>,

    /// Token files to train on instead of --data, as a glob pattern: raw, llm.c .bin, NumPy .npy or
    /// Megatron .bin with .idx
    #[arg(long, value_name = "GLOB")]
    pub(crate) train: Option<OsString>,

    /// Token files for validation, with --train
    #[arg(long, value_name = "GLOB")]
    pub(crate) val: Option<OsString>,

    #[command(flatten)]
    pub(crate) examples: ExampleArgs,

    #[command(flatten)]
    pub(crate) tokens: TokenArgs,

    /// Number of different tokens [default: what the data or its tokenizer says]
    #[arg(long, value_name = "N")]
    pub(crate) vocab_size: Option<usize>,

    /// Tokenizer that made the files of --train, needed only to print samples; or of --examples:
    /// bytes, gpt2, or the path of a tokenizer.json or of a folder that has one [default: that of
    /// the checkpoint]
    #[arg(long, value_name = "NAME|PATH", value_parser = tokenizer())]
    pub(crate) tokenizer: Option<Named>,

    /// The token of the tokenizer.json of --tokenizer that ends a text, by its name [default: what
    /// the files beside it say]
    #[arg(long, value_name = "TOKEN", requires = "tokenizer", allow_hyphen_values = true)]
    pub(crate) end_of_text: Option<String>,
}

/// Prompts and answers to learn from.
#[derive(Clone, Debug, Default, Args)]
pub(crate) struct ExampleArgs {
    /// Examples to learn from instead of --data: JSON lines, each an object with a prompt and an answer,
    /// of which the answer is learned, and where it ends
    #[arg(long, value_name = "FILE")]
    pub(crate) examples: Option<PathBuf>,

    /// Examples for validation, with --examples
    #[arg(long, value_name = "FILE")]
    pub(crate) val_examples: Option<PathBuf>,

    /// Field of an example that holds the prompt
    #[arg(long, value_name = "NAME", default_value = "prompt")]
    pub(crate) prompt_field: String,

    /// Field of an example that holds the answer
    #[arg(long, value_name = "NAME", default_value = "answer")]
    pub(crate) answer_field: String,

    /// What stands between a prompt and its answer, and is to end prompts of `mxtrain generate`
    /// [default: a line break]
    #[arg(long, value_name = "TEXT", default_value = "\n", hide_default_value = true)]
    pub(crate) between: String,
}

/// How token files are read.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct TokenArgs {
    /// What a token is in files without a header: u16, u32, i64, u8 or i32; auto finds out
    #[arg(long, value_name = "TYPE", default_value_t = TokenType(None))]
    pub(crate) token_type: TokenType,
}

impl TokenArgs {
    /// The library's options.
    pub(crate) fn options(&self) -> DatasetOptions {
        DatasetOptions { token_type: self.token_type.0 }
    }
}

/// A type of tokens, or `auto`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct TokenType(pub(crate) Option<mxfp4train::TokenType>);

impl fmt::Display for TokenType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(token_type) => token_type.fmt(f),
            None => f.write_str("auto"),
        }
    }
}

impl FromStr for TokenType {
    type Err = mxfp4train::Error;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == "auto" { Ok(Self(None)) } else { text.parse().map(|t| Self(Some(t))) }
    }
}

/// Where a run starts and where it is saved.
#[derive(Debug, Args)]
#[command(next_help_heading = "Checkpoints")]
pub(crate) struct StartArgs {
    /// Folder for the checkpoint [default: checkpoint, or the folder of --resume]
    #[arg(long, value_name = "DIR")]
    pub(crate) out: Option<PathBuf>,

    /// Replace a checkpoint that is already in --out
    #[arg(long)]
    pub(crate) overwrite: bool,

    /// Start from the weights in a checkpoint folder, this program's or Hugging Face's: gpt2, llama,
    /// mistral, qwen2 or qwen3
    #[arg(long, value_name = "DIR")]
    pub(crate) init_from: Option<PathBuf>,

    /// Go on with the run saved in a checkpoint folder, with the options that it was started with,
    /// but for how many processes there are, what they keep and what they send (--gradient-wire),
    /// --weights-every, --save-in-background, --tensorboard, --save-fallback, and --log unless it is a
    /// file in that folder: where else to write is not for a checkpoint to say
    #[arg(long, value_name = "DIR")]
    pub(crate) resume: Option<PathBuf>,

    /// With --resume: a new learning-rate schedule from this step to --steps, whose warm-up and
    /// curve begin now; --lr, --min-lr, --schedule, --warmup and --decay-steps may be given anew,
    /// the rates and the curve stay otherwise
    #[arg(long)]
    pub(crate) new_schedule: bool,

    /// Save every N steps; 0 saves only at the end [default: a tenth of --steps]
    #[arg(long, value_name = "N")]
    pub(crate) save_every: Option<u64>,

    /// Train on while a checkpoint is written, of a copy that takes as much memory of the host as the
    /// files of one; one that is due while another is still written is left out, and the last one is
    /// waited for
    #[arg(long)]
    pub(crate) save_in_background: bool,

    /// Folder for checkpoints while neither --out nor its parent folder can be written
    #[arg(long, value_name = "DIR")]
    pub(crate) save_fallback: Option<PathBuf>,
}

/// The shape of a new model.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Model")]
pub(crate) struct ModelArgs {
    /// Sizes to begin with, of --arch llama 60M, 125M, 350M or 1B, or of gpt2 124M, 355M, 774M or 1.5B,
    /// as they are called with a usual vocabulary; what else is given counts more
    #[arg(long, value_name = "NAME")]
    pub(crate) preset: Option<Preset>,

    /// Take the shape that a config.json of Hugging Face describes, for a model of random weights
    #[arg(long, value_name = "FILE", conflicts_with = "preset")]
    pub(crate) shape: Option<PathBuf>,

    /// Transformer blocks [default: 4]
    #[arg(long, value_name = "N")]
    pub(crate) layers: Option<usize>,

    /// Attention heads of a block; must divide --channels unless --head-size is given [default: 4]
    #[arg(long, value_name = "N")]
    pub(crate) heads: Option<usize>,

    /// Width of the model [default: 128]
    #[arg(long, value_name = "N")]
    pub(crate) channels: Option<usize>,

    /// Longest sequence that the model can see, in tokens [default: 256]
    #[arg(long, value_name = "TOKENS")]
    pub(crate) context: Option<usize>,
}

/// What a new model's blocks are made of.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Model")]
pub(crate) struct VariantArgs {
    /// Blocks: gpt2 or llama, which Mistral, Qwen2, Qwen3 and SmolLM are, too [default: gpt2, or that
    /// of --preset or --shape]
    #[arg(long, value_name = "NAME")]
    pub(crate) arch: Option<Architecture>,

    /// Width of the MLP in a block [default: 4 x --channels; of llama 8/3 x --channels, rounded up to a
    /// multiple of 256]
    #[arg(long, value_name = "N")]
    pub(crate) mlp_channels: Option<usize>,

    /// Of gpt2: gelu_new (its tanh form) or gelu (the exact one)
    #[arg(long, value_name = "NAME", default_value_t)]
    pub(crate) activation: Activation,

    /// Of llama: heads of keys and values, which divide --heads [default: --heads]
    #[arg(long, value_name = "N")]
    pub(crate) kv_heads: Option<usize>,

    /// Of llama: channels of a head [default: --channels over --heads]
    #[arg(long, value_name = "N")]
    pub(crate) head_size: Option<usize>,

    /// Of llama: a bias where queries, keys and values are made, as in Qwen2
    #[arg(long)]
    pub(crate) qkv_bias: bool,

    /// Of llama: norms of every head of queries and keys, as in Qwen3
    #[arg(long)]
    pub(crate) qk_norm: bool,

    /// Of llama: what positions turn by [default: 10000]
    #[arg(long, value_name = "X")]
    pub(crate) rope_theta: Option<f32>,

    /// Give the head weights of its own
    #[arg(long)]
    pub(crate) untied_head: bool,
}

/// Sizes with a name.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Preset {
    /// As it is called.
    pub(crate) name: &'static str,
    pub(crate) architecture: Architecture,
    /// Layers, channels, heads, kv heads, context.
    sizes: [usize; 5],
    tied_head: bool,
}

impl Preset {
    const fn gpt2(name: &'static str, [layers, channels, heads]: [usize; 3]) -> Self {
        let (architecture, sizes) = (Architecture::Gpt2, [layers, channels, heads, 0, 1024]);
        Self { name, architecture, sizes, tied_head: true }
    }

    const fn llama(name: &'static str, sizes: [usize; 5], tied_head: bool) -> Self {
        Self { name, architecture: Architecture::Llama, sizes, tied_head }
    }

    const ALL: [Self; 8] = [
        Self::llama("60M", [14, 512, 8, 4, 1024], true),
        Self::llama("125M", [16, 768, 12, 4, 1024], true),
        Self::llama("350M", [24, 1024, 16, 4, 2048], false),
        // TinyLlama's.
        Self::llama("1B", [22, 2048, 32, 4, 2048], false),
        Self::gpt2("124M", [12, 768, 12]),
        Self::gpt2("355M", [24, 1024, 16]),
        Self::gpt2("774M", [36, 1280, 20]),
        Self::gpt2("1.5B", [48, 1600, 25]),
    ];

    /// Its shape, with whatever vocabulary.
    pub(crate) fn config(&self) -> ModelConfig {
        let [layers, channels, heads, kv_heads, context_length] = self.sizes;
        let (architecture, tied_head) = (self.architecture, self.tied_head);
        ModelConfig {
            architecture,
            layers,
            channels,
            heads,
            kv_heads,
            context_length,
            tied_head,
            ..ModelConfig::default()
        }
    }
}

impl FromStr for Preset {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let is = |preset: &&Self| preset.name.eq_ignore_ascii_case(name);
        Self::ALL.iter().find(is).copied().ok_or_else(|| {
            let names = Self::ALL.map(|preset| preset.name).join(", ");
            format!("expected one of {names}")
        })
    }
}

/// What is trained beside the weights.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Adapters")]
pub(crate) struct LoraArgs {
    /// Train adapters of this rank beside the linear layers (LoRA), and leave the weights of
    /// --init-from as they are. `mxtrain export` adds them to the weights, or writes them alone for
    /// PEFT
    #[arg(long, value_name = "RANK")]
    pub(crate) lora: Option<usize>,

    /// Over the rank, the factor of what adapters add [default: twice --lora]
    #[arg(long, value_name = "X")]
    pub(crate) lora_alpha: Option<f32>,

    /// Layers of every block that have one: all, or some of attn.c_attn, attn.c_proj, mlp.c_fc and
    /// mlp.c_proj with commas between them; of llama self_attn.qkv_proj, self_attn.o_proj,
    /// mlp.gate_up_proj and mlp.down_proj
    #[arg(long, value_name = "NAMES", default_value = "all",
          value_parser = Lora::layers_of)]
    pub(crate) lora_layers: [bool; 4],
}

impl LoraArgs {
    /// The library's, where there are to be any.
    pub(crate) fn wanted(&self) -> Option<Lora> {
        let rank = self.lora?;
        let alpha = self.lora_alpha.unwrap_or(2.0 * rank as f32);
        Some(Lora { rank, alpha, layers: self.lora_layers })
    }
}

/// What one optimizer step computes.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Step")]
pub(crate) struct BatchArgs {
    /// Sequences computed at once
    #[arg(long, value_name = "N", default_value_t = 8)]
    pub(crate) batch_size: usize,

    /// Tokens of a training sequence [default: --context]
    #[arg(long, value_name = "TOKENS")]
    pub(crate) sequence_length: Option<usize>,

    /// Batches whose gradients are averaged into one step, those of all ranks together [default: one
    /// a lane]
    #[arg(long, value_name = "N")]
    pub(crate) accumulation: Option<usize>,

    /// Parts of a step that ranks share and add up in one order: runs with the same lanes are the same,
    /// bit for bit, on any number of ranks that divides them by a power of two, and go on on any other
    /// [default: the number of ranks]
    #[arg(long, value_name = "N")]
    pub(crate) lanes: Option<usize>,

    /// What the backward pass computes again to save memory: nothing, pointwise or block
    #[arg(long, value_name = "WHAT", default_value_t = Recompute::default())]
    pub(crate) recompute: Recompute,

    /// Let the blocks between the first and the last see a random part of each sequence, which grows
    /// to all of it: start=128,steps=60% begins with 128 tokens and ends after 60 percent of --steps
    /// (or steps=N after N), by a sixteenth of the sequence at a time (or ,by=N)
    #[arg(long, value_name = "START,STEPS")]
    pub(crate) token_drop: Option<TokenDrop>,

    /// Leave tensors as they are, by patterns of their names with commas between them, where * is any
    /// text: 'transformer.w*,*.ln_?.*'. `mxtrain info --tensors` lists names
    #[arg(long, value_name = "PATTERNS", default_value_t = Frozen::default(), hide_default_value = true)]
    pub(crate) freeze: Frozen,
}

/// The number formats of one run.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Step")]
pub(crate) struct RecipeArgs {
    /// Number formats: fp32, bf16, fp8, mxfp4-rht-sr, nvidia-nvfp4 or another name that `mxtrain
    /// recipes` shows, with switches such as mxfp4-rht-sr,g=128 or mxfp4-rht,range=3/4
    #[arg(long, value_name = "NAME", default_value_t = Recipe::default())]
    pub(crate) recipe: Recipe,
}

/// What moves the weights, and its learning rate.
#[derive(Debug, Args)]
#[command(next_help_heading = "Optimizer")]
pub(crate) struct OptimizerArgs {
    /// Steps after which the run ends, those of a resumed run included
    #[arg(long, value_name = "N", default_value_t = 2000)]
    pub(crate) steps: u64,

    /// Highest learning rate [default: 1e-3; 5e-5 with --init-from]
    #[arg(long, value_name = "RATE")]
    pub(crate) lr: Option<f32>,

    /// Learning rate at the end, at most --lr [default: a tenth of --lr]
    #[arg(long, value_name = "RATE")]
    pub(crate) min_lr: Option<f32>,

    /// Steps over which the learning rate rises [default: 2 percent of --steps, or 5 with
    /// --init-from]
    #[arg(long, value_name = "STEPS")]
    pub(crate) warmup: Option<u64>,

    /// Curve of the learning rate after the warm-up: constant, cosine, linear or trapezoid
    #[arg(long, value_name = "NAME", default_value_t = ScheduleKind::Cosine)]
    pub(crate) schedule: ScheduleKind,

    /// Length of the descent of the trapezoid schedule [default: 20 percent of --steps]
    #[arg(long, value_name = "STEPS")]
    pub(crate) decay_steps: Option<u64>,

    /// What moves the weights: adamw; stable-adamw, whose rate falls for a tensor whose gradients
    /// are larger than its second moment has seen coming; stable-spam or gradstab, which make the
    /// lengths of gradients stable tensor by tensor; muon, which moves the matrices of blocks along
    /// their orthogonalized momentum, at 66.67 times --lr (",ratio=33" for another number), and all
    /// else by AdamW; with ",moments=bf16" or ",moments=int8" behind it, moments take 4 or 2.25 bytes
    /// a parameter in place of 8 (for comparison ",moments=fp8", FP8-LM's 3); with ",master=split"
    /// weights, and with ",gradients=bf16" gradients, take 2 less on a GPU; "adamw,ramping=500"
    /// updates weights less often that oscillate in 4 bits, as 30 steps aside find before every
    /// 500; docs/optimizers.md has their other switches
    #[arg(long, value_name = "NAME", default_value_t)]
    pub(crate) optimizer: Optimizer,

    /// Weight decay, for tensors of two or more dimensions
    #[arg(long, value_name = "X", default_value_t = 0.1)]
    pub(crate) weight_decay: f32,

    /// Decay of the first moment
    #[arg(long, value_name = "X", default_value_t = 0.9)]
    pub(crate) beta1: f32,

    /// Decay of the second moment [default: 0.95, or 0.999 of optimizers that normalize gradients]
    #[arg(long, value_name = "X")]
    pub(crate) beta2: Option<f32>,

    /// Largest norm of the gradient; longer ones are scaled down; 0 turns it off [default: 1; 0
    /// with stable-adamw and with ramping]
    #[arg(long, value_name = "NORM")]
    pub(crate) clip: Option<f32>,
}

/// What a run measures and prints on its way.
#[derive(Debug, Args)]
#[command(next_help_heading = "Reports")]
pub(crate) struct ReportArgs {
    #[command(flatten)]
    pub(crate) measure: MeasureArgs,

    #[command(flatten)]
    pub(crate) sharpness: SharpnessArgs,

    /// Print a sample of the model's text every N steps; 0 never
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) sample_every: u64,

    /// Beginning of the samples
    #[arg(
        long,
        allow_hyphen_values = true,
        value_name = "TEXT",
        default_value = "",
        hide_default_value = true
    )]
    pub(crate) sample_prompt: String,

    /// Write a JSON object for every step and every measurement to a file, one a line; a resumed
    /// run goes on at the end of the file
    #[arg(long, value_name = "FILE")]
    pub(crate) log: Option<PathBuf>,

    /// Write the same numbers into a folder for TensorBoard, as scalars over steps: train/loss,
    /// train/lr, train/grad_norm, train/tokens_per_second, validation/loss and others; a resumed
    /// run that names the folder again goes on with its curves, and a new one takes their place
    #[arg(long, value_name = "DIR")]
    pub(crate) tensorboard: Option<PathBuf>,

    /// Add to --log and --tensorboard every N steps how weights, and what the forward pass rounds
    /// them to, changed in these steps; for recipes whose forward pass holds W in blocks of MXFP4
    /// or NVFP4; 0 never. A resumed run has to name it again, as it has to name --log
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) weights_every: u64,

    /// Add to --log and --tensorboard every N steps what the update did: the norm of each tensor's
    /// gradient, and of all that have one name in the blocks; and the root mean square of gradients
    /// over what second moments have seen coming (update RMS), with the tensor where it is largest,
    /// which spikes of the loss follow; in --tensorboard without single tensors. With 1 the last line of the run counts those, too; 0 never.
    /// A resumed run has to name it again
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) updates_every: u64,
}

/// When a run measures its validation loss.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Reports")]
pub(crate) struct MeasureArgs {
    /// Measure the validation loss every N steps; 0 only at the end [default: a tenth of --steps]
    #[arg(long, value_name = "N")]
    pub(crate) eval_every: Option<u64>,

    /// Batches of one measurement; 0 takes all validation data
    #[arg(long, value_name = "N", default_value_t = 20)]
    pub(crate) eval_batches: usize,
}

/// What evaluations say besides the loss.
#[derive(Clone, Copy, Debug, Args)]
#[command(next_help_heading = "Reports")]
pub(crate) struct SharpnessArgs {
    /// Measure with the loss f how sharp it is in the logits: 100 (f' - f) / (1 + f), where f' is
    /// the largest loss that there is when each logit y moves by up to EPSILON (|y| + 1), 1e-3
    /// unless another is named; over all tokens and over the last ones of the sequences
    #[arg(long, value_name = "EPSILON", num_args = 0..=1, default_missing_value = "1e-3")]
    pub(crate) sharpness: Option<f32>,
}

/// The machine to run on.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Machine")]
pub(crate) struct MachineArgs {
    /// Worker threads; 0 takes one for each core
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) threads: usize,

    /// Device: cpu, cuda, cuda:1 for the second GPU, or auto for a GPU where there is one
    #[arg(long, value_name = "NAME", default_value = "auto")]
    pub(crate) device: String,
}

/// Where random numbers begin.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Machine")]
pub(crate) struct SeedArgs {
    /// Seed of everything random: same seed, same losses, on any number of threads. `random` draws
    /// one, and says it
    #[arg(long, value_name = "N", default_value = SeedArgs::DEFAULT)]
    seed: Seed,
}

/// A number, or one of the system's.
#[derive(Clone, Copy, Debug)]
enum Seed {
    Given(u64),
    Drawn(u64),
}

impl SeedArgs {
    const DEFAULT: &str = "1337";

    pub(crate) fn number(&self) -> u64 {
        let (Seed::Given(number) | Seed::Drawn(number)) = self.seed;
        number
    }

    /// Says the number, if nobody knows it yet.
    pub(crate) fn say_if_drawn(&self) {
        if let Seed::Drawn(number) = self.seed {
            console::note(&format!("mxtrain: seed {number}"));
        }
    }

    /// What is said of it before a run.
    pub(crate) fn in_words(&self) -> String {
        let number = self.number().to_string();
        if number == Self::DEFAULT { String::new() } else { format!("; seed {number}") }
    }
}

impl FromStr for Seed {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            // NOTE: of 63 bits, which is what a number in TOML has.
            "random" => Ok(Self::Drawn(rand::random::<u64>() >> 1)),
            _ => match text.parse() {
                Ok(number) => Ok(Self::Given(number)),
                Err(e) => Err(format!("{e}; expected a number or `random`")),
            },
        }
    }
}

#[derive(Debug, Args)]
#[command(after_help = "\
Operands are in a number format, with what makes its scales: MXFP4's rule of the power of two (floor,
ceil, even, quest, quest-floor), NVFP4's room for rounding its scales (17/16), its choice of two (4/6)
or its scales of 128 elements. 16x16 and 32x32: a scale for a square. 3/4: of the format's range.
Rounding is to nearest, stochastic (SR) or MS-EDEN's (EDEN). H64: a random Hadamard transform of groups
of 64. q: made from what the forward pass made of x or W, not from these.

Examples:
  mxtrain recipes
  mxtrain recipes tetrajet mxfp4-rht-sr,g=128,wgrad=bf16")]
pub(crate) struct RecipesArgs {
    /// Recipes with their switches; without one all names
    #[arg(value_name = "RECIPE")]
    pub(crate) recipes: Vec<Recipe>,
}

#[derive(Debug, Args)]
pub(crate) struct EvalArgs {
    /// Checkpoint folder, this program's or Hugging Face's: gpt2, llama,
    /// mistral, qwen2 or qwen3
    #[arg(long, value_name = "DIR")]
    pub(crate) checkpoint: PathBuf,

    /// Prepared folder, of which val.bin is read, or token files as a glob pattern
    #[arg(long, value_name = "DIR|GLOB")]
    pub(crate) data: OsString,

    #[command(flatten)]
    pub(crate) tokens: TokenArgs,

    /// Batches to measure, spread evenly over the data; 0 takes all of it
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) batches: usize,

    /// Sequences computed at once [default: the checkpoint's, else 8]
    #[arg(long, value_name = "N")]
    pub(crate) batch_size: Option<usize>,

    /// Tokens of a sequence [default: the checkpoint's, else its context]
    #[arg(long, value_name = "TOKENS")]
    pub(crate) sequence_length: Option<usize>,

    /// Number formats, as in `mxtrain train` [default: the checkpoint's, else bf16]; with haste=L,
    /// such as bf16,haste=16, also what merging channels costs and would spare
    #[arg(long, value_name = "NAME")]
    pub(crate) recipe: Option<Recipe>,

    /// The loss of what `mxtrain generate --weights` writes text with: f32, bf16 or mxfp4
    #[arg(long, value_name = "NAME", conflicts_with_all = ["recipe", "sharpness"])]
    pub(crate) weights: Option<DecoderWeights>,

    #[command(flatten)]
    pub(crate) sharpness: SharpnessArgs,

    /// Print a JSON object
    #[arg(long)]
    pub(crate) json: bool,

    #[command(flatten)]
    pub(crate) machine: MachineArgs,
}

#[derive(Debug, Args)]
pub(crate) struct GenerateArgs {
    /// Checkpoint folder, this program's or Hugging Face's: gpt2, llama,
    /// mistral, qwen2 or qwen3
    #[arg(long, value_name = "DIR")]
    pub(crate) checkpoint: PathBuf,

    /// Text to continue; it is printed too. It begins with what a tokenizer.json puts before a
    /// text, and special tokens in it are tokens
    #[arg(
        long,
        allow_hyphen_values = true,
        value_name = "TEXT",
        default_value = "",
        hide_default_value = true
    )]
    pub(crate) prompt: String,

    /// Continue every line of standard input, as it comes
    #[arg(long, conflicts_with = "prompt")]
    pub(crate) lines: bool,

    /// Most tokens to generate; a text that ends before is shorter
    #[arg(long, value_name = "N", default_value_t = 256)]
    pub(crate) tokens: usize,

    /// Tokenizer: bytes, gpt2, or the path of a tokenizer.json or of a folder that has one
    /// [default: the one that the checkpoint was trained with, or that lies beside it]
    #[arg(long, value_name = "NAME|PATH", value_parser = tokenizer())]
    pub(crate) tokenizer: Option<Named>,

    /// End the text before this one; may be given several times
    #[arg(
        long,
        value_name = "TEXT",
        allow_hyphen_values = true,
        value_parser = NonEmptyStringValueParser::new(),
    )]
    pub(crate) stop: Vec<String>,

    /// Go on behind the token that ends a text (GPT-2's <|endoftext|>, or what the checkpoint
    /// names)
    #[arg(long)]
    pub(crate) ignore_eos: bool,

    /// Texts to generate, with seeds --seed, --seed + 1 and so on. Eight at a time are written at
    /// once, and printed when all of them are whole; with --draft one by one
    #[arg(
        long,
        value_name = "N",
        default_value_t = 1,
        value_parser = clap::value_parser!(u64).range(1..),
    )]
    pub(crate) samples: u64,

    #[command(flatten)]
    pub(crate) sampling: SamplingArgs,

    #[command(flatten)]
    pub(crate) seed: SeedArgs,

    #[command(flatten)]
    pub(crate) machine: MachineArgs,
}

/// How the next token is chosen.
#[derive(Debug, Args)]
#[command(next_help_heading = "Sampling")]
pub(crate) struct SamplingArgs {
    /// Divides the logits: below 1 safer, above 1 wilder
    #[arg(long, value_name = "X", default_value_t = 0.8)]
    pub(crate) temperature: f32,

    /// Choose among the N most likely tokens; 0 among all
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) top_k: usize,

    /// Choose among the most likely tokens that together have this probability; 1 among all
    #[arg(long, value_name = "P", default_value_t = 1.0)]
    pub(crate) top_p: f32,

    /// Choose among tokens at least P times as likely as the most likely one; 0 among all
    #[arg(long, value_name = "P", default_value_t = 0.0)]
    pub(crate) min_p: f32,

    /// Make tokens that the text already has less likely: divides their logits where these are
    /// above 0 and multiplies them below; 1 changes nothing
    #[arg(long, value_name = "X", default_value_t = 1.0)]
    pub(crate) repetition_penalty: f32,

    /// Numbers that it is computed in: f32, bf16 or mxfp4. On a processor each takes less memory
    /// beside the model and less time a token than the one before, and is less exact; mxfp4 takes
    /// longer to begin, and for long prompts. A GPU wants bf16 or mxfp4: in f32 it is slow, and for
    /// long prompts very slow
    #[arg(long, value_name = "NAME", default_value_t)]
    pub(crate) weights: DecoderWeights,

    /// Who guesses tokens for the model to check several in one pass: none; ngram, the text itself,
    /// which repeats itself as code does; mxfp4, the model with its weights in MXFP4; or
    /// mxfp4-ngram, which is mxfp4 that the text guesses for. The text is the same whoever does. On a
    /// GPU mxfp4 wants --weights bf16
    #[arg(long, value_name = "NAME", default_value_t)]
    pub(crate) draft: Draft,

    /// Tokens to guess at a time, up to 15; 0 for as many as gain most
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) draft_tokens: usize,

    /// Where the text exceeds the context, forget a quarter of it at once, which takes far less time
    /// than a token for each that comes
    #[arg(long)]
    pub(crate) slide: bool,

    /// Always take the most likely token
    #[arg(long, conflicts_with_all = ["temperature", "top_k", "top_p", "min_p"])]
    pub(crate) greedy: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "\
What reads it:
  safetensors, f32 f16 bf16  transformers and what else reads its folders; mxtrain
  safetensors, mxfp4         mxtrain, as f32 numbers: generate --weights mxfp4 makes the same codes of
                             them, and writes the texts of CHECKPOINT
  gguf                       llama.cpp and programs made with it
  peft                       PEFT, beside the model that adapters were trained for: these alone, in f32
In MXFP4 are linear layers and a head of its own, in GGUF every head. The embedding is not: it is f32
in safetensors, bf16 in GGUF. Adapters of train --lora are added to the weights, but for peft. The
optimizer's state stays behind: nothing resumes an export.

Examples:
  mxtrain export model model-bf16
  mxtrain export model model.gguf --weights f16
  mxtrain export model tuned --lora adapters
  mxtrain export model model-mxfp4.gguf --weights mxfp4")]
pub(crate) struct ExportArgs {
    /// Checkpoint folder, this program's or Hugging Face's
    pub(crate) checkpoint: PathBuf,

    /// What to write: a folder, or a file of GGUF
    pub(crate) out: PathBuf,

    /// safetensors, gguf or peft [default: gguf where OUT ends in .gguf, else safetensors]
    #[arg(long, value_name = "NAME", hide_possible_values = true)]
    pub(crate) format: Option<ExportFormat>,

    /// Folder of adapters, PEFT's or one of --format peft, that are added to the weights of CHECKPOINT
    #[arg(long, value_name = "DIR")]
    pub(crate) lora: Option<PathBuf>,

    /// Numbers of the weights: f32, f16, bf16 or mxfp4
    #[arg(long, value_name = "NAME", default_value_t = StoredWeights::Bf16)]
    pub(crate) weights: StoredWeights,

    /// Tokenizer: bytes, gpt2, or the path of a tokenizer.json or of a folder that has one
    /// [default: the one that the checkpoint was trained with, or that lies beside it]
    #[arg(long, value_name = "NAME|PATH", value_parser = tokenizer())]
    pub(crate) tokenizer: Option<Named>,

    /// Replace a model, or a GGUF file, that is already there
    #[arg(long)]
    pub(crate) overwrite: bool,
}

#[derive(Debug, Args)]
pub(crate) struct InfoArgs {
    /// Checkpoint folder, folder made by `mxtrain prepare`, or token files as a glob pattern
    #[arg(value_name = "PATH|GLOB")]
    pub(crate) path: PathBuf,

    #[command(flatten)]
    pub(crate) tokens: TokenArgs,

    /// List a checkpoint's tensors
    #[arg(long)]
    pub(crate) tensors: bool,

    /// Print a JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct PlanArgs {
    /// TOML file with the options of `mxtrain train`; the command line wins over it
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,

    /// Number of different tokens [default: what --data says, else 256]
    #[arg(long, value_name = "N")]
    pub(crate) vocab_size: Option<usize>,

    /// Folder made by `mxtrain prepare`, read for its vocabulary
    #[arg(long, value_name = "DIR")]
    pub(crate) data: Option<PathBuf>,

    /// Also find the largest batches that fit into SIZE, such as 80GiB, 500MB or a number of bytes,
    /// for each --recompute and for smaller forms of --optimizer, and say which to take: what
    /// computes least again of those that hold --batch-size
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub(crate) fit: Option<u64>,

    /// Print a JSON object, in bytes
    #[arg(long)]
    pub(crate) json: bool,

    /// Plan a run of so many processes, as by `mxtrain train --ranks` or --gpus: what that one takes which
    /// takes most, but for what nccl takes to carry gradients
    #[arg(long, value_name = "N", value_parser = ranks)]
    pub(crate) ranks: Option<usize>,

    /// With --ranks: the optimizer's states of each tensor on one rank alone
    #[arg(long, requires = "ranks")]
    pub(crate) shard_states: bool,

    /// What moves the weights, and what it keeps its moments in: adamw, stable-adamw,
    /// adamw,moments=int8 and so on, as in `mxtrain train`
    #[arg(long, value_name = "NAME", default_value_t)]
    pub(crate) optimizer: Optimizer,

    #[command(flatten)]
    pub(crate) model: ModelArgs,

    #[command(flatten)]
    pub(crate) variant: VariantArgs,

    #[command(flatten)]
    pub(crate) lora: LoraArgs,

    #[command(flatten)]
    pub(crate) batch: BatchArgs,

    #[command(flatten)]
    pub(crate) recipe: RecipeArgs,

    #[command(flatten)]
    pub(crate) seed: SeedArgs,

    #[command(flatten)]
    pub(crate) machine: MachineArgs,
}

/// A name or a path.
fn tokenizer() -> impl TypedValueParser<Value = Named> {
    OsStringValueParser::new().map(Named::from)
}

fn fraction(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if (0.0..1.0).contains(&value) => Ok(value),
        _ => Err("expected a number from 0 to below 1".into()),
    }
}

/// Bytes, with a unit or without.
fn size(text: &str) -> Result<u64, String> {
    let wrong = |_| "expected a size such as 80GiB, 500MB or a number of bytes".to_owned();
    Ok(text.parse::<ByteSize>().map_err(wrong)?.as_u64())
}

fn rendezvous(text: &str) -> Result<String, String> {
    match text.rsplit_once(':') {
        Some((host, port)) if !host.is_empty() && port.parse::<u16>().is_ok_and(|p| p > 0) => {
            Ok(text.to_owned())
        }
        _ => Err("expected HOST:PORT, such as node1:29400".to_owned()),
    }
}

fn ranks(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(ranks) if (1..=MAX_RANKS).contains(&ranks) => Ok(ranks),
        _ => Err(format!("expected a number from 1 to {MAX_RANKS}")),
    }
}

fn threads(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(value @ 0..=1024) => Ok(value),
        _ => Err("expected a number from 0 to 1024".into()),
    }
}
