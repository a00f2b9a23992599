//! What a text is to be: how tokens are chosen, and who guesses them.

use super::DecoderWeights;
use crate::optim::named;
use crate::{Error, Result};

/// Most tokens of a draft.
pub(super) const MOST: usize = 15;

/// Who guesses the next tokens, for the model to check several at once. The text is the same whoever
/// does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Draft {
    /// Nobody: a token takes a pass of its own.
    #[default]
    None,
    /// The text: what followed its last three, two or one tokens where they stood before. Costs
    /// nothing, and gains where a text repeats itself, as code does.
    Ngram,
    /// The model with its weights in MXFP4, a copy that takes 4.25 bits a weight more. On a GPU beside
    /// weights in bf16 alone.
    Mxfp4,
    /// The same, which the text guesses for.
    Mxfp4Ngram,
}

impl Draft {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::None, Self::Ngram, Self::Mxfp4, Self::Mxfp4Ngram];

    /// Its name: `none`, `ngram`, `mxfp4` or `mxfp4-ngram`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Ngram => "ngram",
            Self::Mxfp4 => "mxfp4",
            Self::Mxfp4Ngram => "mxfp4-ngram",
        }
    }

    /// An error where the model itself has the weights that it would guess with.
    pub(super) fn check(self, weights: DecoderWeights) -> Result<()> {
        if self.is_of_model() && weights == DecoderWeights::Mxfp4 {
            let message = format!(
                "{self} guesses with weights in MXFP4, which the model itself has here; use none or \
                 ngram, or weights f32 or bf16"
            );
            return Err(Error::invalid("draft", message));
        }
        Ok(())
    }

    /// Whether the model guesses, with weights in MXFP4 beside the others.
    pub fn is_of_model(self) -> bool {
        matches!(self, Self::Mxfp4 | Self::Mxfp4Ngram)
    }
}

named!(Draft, "draft");

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
    /// Keeps the tokens that are at least this part as likely as the most likely one; 0 keeps all.
    pub min_p: f32,
    /// Divides the logits above 0 of tokens that the text has, prompt included, and multiplies those
    /// below (Keskar et al., arXiv 1909.05858): above 1 the text repeats itself less. 1 changes
    /// nothing.
    pub repetition_penalty: f32,
    /// Seed of the draws: the same seed and model give the same tokens. Draws repeat after 2^32
    /// tokens.
    pub seed: u64,
    /// Tokens that end the text, such as the one that stands between documents. The one that was
    /// drawn is the last of the result, so that a text that ended differs from one cut off.
    pub stop_tokens: Vec<u32>,
    /// What [`crate::Model::generate`] computes logits in.
    pub weights: DecoderWeights,
    /// Who guesses tokens, for several to be checked at once. The text is the same whoever does.
    pub draft: Draft,
    /// Tokens that are guessed at a time, up to 15; 0 is as many as gain most.
    pub draft_tokens: usize,
    /// Whether, once the text exceeds the context, a quarter of the context falls out of it at once,
    /// so that all is computed again only then; else a token falls out for each that comes, and every
    /// one of them takes the whole computation.
    pub slide: bool,
}

impl Default for GenerateOptions {
    fn default() -> Self {
        Self {
            max_tokens: 256,
            temperature: 0.8,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            seed: 1337,
            stop_tokens: Vec::new(),
            weights: DecoderWeights::default(),
            draft: Draft::default(),
            draft_tokens: 0,
            slide: false,
        }
    }
}

impl GenerateOptions {
    pub(super) fn validate(&self, vocab_size: usize) -> Result<()> {
        let number = |what, value: f32, is_allowed, range| {
            if is_allowed {
                return Ok(());
            }
            Err(Error::invalid(what, format!("expected a number {range}, got {value}")))
        };
        let Self { temperature, top_p, min_p, repetition_penalty: penalty, .. } = *self;
        let is_finite = temperature >= 0.0 && temperature.is_finite();
        number("temperature", temperature, is_finite, "from 0 on that is finite")?;
        number("top_p", top_p, top_p > 0.0 && top_p <= 1.0, "above 0 and up to 1")?;
        number("min_p", min_p, (0.0..=1.0).contains(&min_p), "from 0 to 1")?;
        let divides = penalty >= f32::MIN_POSITIVE && penalty.is_finite();
        let range = "above 0 that is finite and not tiny (1 changes nothing)";
        number("repetition_penalty", penalty, divides, range)?;
        if self.draft_tokens > MOST {
            let message = format!(
                "expected from 1 to {}, or 0 for as many as gain most; got {}",
                MOST, self.draft_tokens
            );
            return Err(Error::invalid("draft_tokens", message));
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
