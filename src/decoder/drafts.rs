//! Drafts: tokens that are guessed before the model says what comes, and checked in one pass.
//!
//! A pass over a few rows takes little more than one over a single row, which reads all weights, too.
//! So whoever guesses the next tokens cheaply lets the model choose at all of their places at once,
//! and keeps its choices up to the first that differs (speculative decoding, Leviathan et al., arXiv
//! 2211.17192). Every one of them is the model's own, by the clock of its place in the text
//! ([`super::sampler`]): the text is that which comes without drafts, whatever they are.
//!
//! A model drafts for itself with its weights in MXFP4, a cast that nobody trains (ML-SpecQD, arXiv
//! 2503.13565). Both run on the same clocks, so they mostly choose alike, and on the same keys and
//! values: a draft goes on behind the model's own and is overwritten by the check. The text itself is
//! another source, for it repeats itself, and guesses for the model or for its draft.

use std::time::Instant;

use super::Decoder;
use super::cached::By;
use super::options::{Draft, MOST};
use super::sampler::Sampler;
use crate::reserve::zeros;
use crate::{Error, Result};

impl Draft {
    /// The choices of a model for which it guesses `length` tokens, or as many as gain most for 0.
    pub(super) fn checked(self, length: usize, vocab_size: usize) -> Result<Checked> {
        let of_model = |by: Self| -> Result<Box<dyn Propose>> {
            Ok(Box::new(OfModel { checked: by.checked(0, vocab_size)? }))
        };
        match self {
            Self::None => Checked::new(Box::new(Nobody), Pace::never(), vocab_size),
            Self::Ngram => Checked::new(Box::new(Ngram), Pace::of(length), vocab_size),
            Self::Mxfp4 => Checked::new(of_model(Self::None)?, Pace::of(length), vocab_size),
            Self::Mxfp4Ngram => Checked::new(of_model(Self::Ngram)?, Pace::of(length), vocab_size),
        }
    }
}

/// Guesses.
pub(super) trait Propose {
    /// Appends up to `count` tokens to a text, the first of them number `index` of those that are
    /// drawn.
    fn propose(
        &mut self,
        texts: (&mut Decoder, usize),
        sampler: &mut Sampler<'_>,
        index: u32,
        count: usize,
    ) -> Result<()>;
}

struct Nobody;

impl Propose for Nobody {
    fn propose(
        &mut self,
        _: (&mut Decoder, usize),
        _: &mut Sampler<'_>,
        _: u32,
        _: usize,
    ) -> Result<()> {
        Ok(())
    }
}

struct Ngram;

impl Propose for Ngram {
    fn propose(
        &mut self,
        (texts, sequence): (&mut Decoder, usize),
        _: &mut Sampler<'_>,
        _: u32,
        count: usize,
    ) -> Result<()> {
        let text = texts.tokens(sequence);
        if let Some(start) = after_last_ngram(text) {
            let mut guessed = [0; MOST];
            let followed = &text[start..];
            let count = count.min(followed.len());
            guessed[..count].copy_from_slice(&followed[..count]);
            texts.push(sequence, &guessed[..count])?;
        }
        Ok(())
    }
}

/// Where what followed begins: behind the last place before the end at which the last three tokens
/// stand, else the last two, else the last one.
fn after_last_ngram(text: &[u32]) -> Option<usize> {
    (1..=3).rev().find_map(|n| {
        let start = text.len().checked_sub(n)?;
        let (last, before) = (&text[start..], &text[..text.len() - 1]);
        before.windows(n).rposition(|tokens| tokens == last).map(|at| at + n)
    })
}

/// The model in MXFP4.
struct OfModel {
    checked: Checked,
}

impl Propose for OfModel {
    fn propose(
        &mut self,
        (texts, sequence): (&mut Decoder, usize),
        sampler: &mut Sampler<'_>,
        index: u32,
        count: usize,
    ) -> Result<()> {
        let (len, seen) = (texts.tokens(sequence).len(), sampler.seen());
        let mut guessed = 0;
        while guessed < count {
            let (at, left) = (index.wrapping_add(guessed as u32), count - guessed);
            let mut emit = |_| {
                guessed += 1;
                Ok(true)
            };
            match self.checked.advance((texts, sequence), (sampler, By::Draft), at, left, &mut emit)
            {
                // Which the model need not have.
                Err(Error::NotFinite { .. }) => break,
                done => done?,
            }
            texts.push(sequence, &[self.checked.last])?;
        }
        sampler.forget(seen);
        texts.rewind(sequence, len + guessed)
    }
}

/// Choices of a model that somebody guesses.
pub(super) struct Checked {
    from: Box<dyn Propose>,
    pace: Pace,
    rows: Vec<f32>,
    /// The last one that was chosen.
    pub(super) last: u32,
    /// Tokens that were guessed.
    pub(super) drafted: u64,
    /// Those of them that were the model's choice.
    pub(super) accepted: u64,
}

impl Checked {
    /// Of guesses by `from`.
    pub(super) fn new(from: Box<dyn Propose>, pace: Pace, vocab_size: usize) -> Result<Self> {
        let rows = zeros("the logits", (pace.longest() + 1) * vocab_size)?;
        Ok(Self { from, pace, rows, last: 0, drafted: 0, accepted: 0 })
    }

    /// Chooses the next tokens of a text, from 1 to `most`, of which the first is number
    /// `index` of those that are drawn. `emit` sees each, and returns whether to go on. All but the
    /// last are then in the text.
    pub(super) fn advance(
        &mut self,
        (texts, sequence): (&mut Decoder, usize),
        (sampler, by): (&mut Sampler<'_>, By),
        index: u32,
        most: usize,
        emit: &mut dyn FnMut(u32) -> Result<bool>,
    ) -> Result<()> {
        let (len, vocab_size) = (texts.tokens(sequence).len(), texts.vocab_size());
        // A long prompt is not for the draft to read first; nor is what it takes, or what packing
        // weights takes, what a token does.
        let changed = texts.follow()?;
        let is_behind = changed || texts.computed(sequence, by) + 1 < len;
        let room = if is_behind { 0 } else { (texts.room() - len).min(most - 1) };
        let length = self.pace.length(room);
        let begun = Instant::now();
        let (mut drafted, mut accepted, mut kept, mut seconds) = (0, 0, 0, [0.0; 2]);
        let mut check = || {
            if length > 0 {
                self.from.propose((texts, sequence), sampler, index, length)?;
            }
            drafted = texts.tokens(sequence).len() - len;
            let proposed = Instant::now();
            let rows = &mut self.rows[..(drafted + 1) * vocab_size];
            texts.compute((sequence, by), len - 1, rows)?;
            seconds = [proposed - begun, proposed.elapsed()].map(|took| took.as_secs_f64());
            for (place, logits) in rows.chunks_exact_mut(vocab_size).enumerate() {
                let token = sampler.choose(logits, index.wrapping_add(place as u32))?;
                self.last = token;
                let agrees = place < drafted && texts.tokens(sequence)[len + place] == token;
                let goes_on = emit(token)?;
                accepted += usize::from(agrees);
                sampler.note(token);
                if !goes_on || !agrees {
                    break;
                }
                kept += 1;
            }
            Ok(())
        };
        let checked = check();
        // Whatever happened, the text has no token that nobody has seen.
        texts.rewind(sequence, len + kept)?;
        checked?;
        self.drafted += drafted as u64;
        self.accepted += accepted as u64;
        if !is_behind {
            self.pace.note([length, drafted, accepted], seconds);
        }
        Ok(())
    }
}

/// How long drafts are: as long as makes the most tokens a second, by what guessing and checking took
/// so far and by how many guesses were right.
pub(super) struct Pace {
    /// Most tokens of a draft.
    longest: usize,
    /// Of all drafts; None for what gains most.
    fixed: Option<usize>,
    /// Guesses that were right and those that were looked at, older ones counting less.
    right: f64,
    seen: f64,
    /// Seconds of guessing a token.
    guess: f64,
    /// Seconds of checking drafts, by how long they were.
    check: [Option<f64>; MOST + 1],
    /// Passes with drafts, or without any, since the other was tried.
    alike: u32,
}

/// So many passes alike, and then one of the other kind, which may have become the better one.
const ALIKE: u32 = 32;

impl Pace {
    /// No drafts.
    fn never() -> Self {
        Self { longest: 0, ..Self::of(MOST) }
    }

    /// Drafts of `length` tokens, or of as many as gain most for 0.
    pub(super) fn of(length: usize) -> Self {
        let (longest, fixed) = match length {
            0 => (MOST, None),
            length => (length, Some(length)),
        };
        // A few good guesses to begin with, soon outweighed.
        let (right, seen) = (4.0, 5.0);
        Self { longest, fixed, right, seen, guess: 0.0, check: [None; MOST + 1], alike: 0 }
    }

    fn longest(&self) -> usize {
        self.longest
    }

    /// For the next draft, for which there is room for `room` tokens.
    fn length(&mut self, room: usize) -> usize {
        let most = room.min(self.longest);
        if let Some(fixed) = self.fixed {
            return fixed.min(most);
        }
        // Nothing has been measured yet.
        if self.check[0].is_none() {
            return 0;
        }
        let best = (0..=most).max_by(|a, b| self.rate(*a).total_cmp(&self.rate(*b))).unwrap_or(0);
        self.alike += 1;
        if self.alike < ALIKE {
            return best;
        }
        self.alike = 0;
        if best == 0 { most.min(2) } else { 0 }
    }

    /// Tokens a second with drafts of `length` tokens.
    fn rate(&self, length: usize) -> f64 {
        let right = self.right / self.seen;
        // The first `length` powers, and 1: the draft's right beginning and the token behind it.
        let tokens: f64 = (0..=length as i32).map(|n| right.powi(n)).sum();
        // What was not measured takes what shorter ones took, and then is.
        let check = self.check[..=length].iter().rev().find_map(|seconds| *seconds);
        tokens / (length as f64 * self.guess + check.unwrap_or(0.0))
    }

    /// Of a draft that was to be of `length`, how many tokens it had, how many of them were right, and
    /// the seconds that guessing and checking took.
    fn note(&mut self, [length, drafted, right]: [usize; 3], [guess, check]: [f64; 2]) {
        let mean = |old: f64, new: f64| old + 0.2 * (new - old);
        if length > 0 && drafted > 0 {
            self.right = 0.97 * self.right + right as f64;
            self.seen = 0.97 * self.seen + (right + usize::from(right < drafted)) as f64;
            let guess = guess / drafted as f64;
            self.guess = if self.guess == 0.0 { guess } else { mean(self.guess, guess) };
        }
        let old = &mut self.check[drafted];
        *old = Some(old.map_or(check, |old| mean(old, check)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decoder::{DecoderOptions, DecoderWeights, GenerateOptions};
    use crate::formats::{Draw, Purpose};
    use crate::gpt::ModelConfig;
    use crate::model::Model;
    use crate::{Engine, EngineOptions};

    /// Any tokens, and not always as many as were asked for.
    struct Random(Draw, u32);

    impl Propose for Random {
        fn propose(
            &mut self,
            (texts, sequence): (&mut Decoder, usize),
            _: &mut Sampler<'_>,
            index: u32,
            count: usize,
        ) -> Result<()> {
            self.1 += 1;
            for place in 0..count as u32 {
                let [token, ends, ..] = self.0.bits(index + place, self.1);
                if ends.is_multiple_of(8) {
                    break;
                }
                texts.push(sequence, &[token % texts.vocab_size() as u32])?;
            }
            Ok(())
        }
    }

    /// A model that is sure of some tokens, and of a few only.
    fn model(threads: usize) -> Model {
        let engine = Engine::new(EngineOptions { threads, seed: 3, ..Default::default() }).unwrap();
        let config = ModelConfig {
            vocab_size: 37,
            context_length: 40,
            layers: 2,
            heads: 2,
            channels: 32,
            ..ModelConfig::default()
        };
        let model = Model::new(&engine, &config).unwrap();
        for tensor in model.tensors().to_vec() {
            let mut values = vec![0.0; tensor.shape.iter().product()];
            model.read_tensor(&tensor.name, &mut values).unwrap();
            values.iter_mut().for_each(|v| *v *= 4.0);
            model.write_tensor(&tensor.name, &values).unwrap();
        }
        model
    }

    fn options(seed: u64, n: u64) -> GenerateOptions {
        let [temperature, top_p, repetition_penalty] =
            [[0.8, 1.0, 1.0], [0.0, 1.0, 1.0], [1.0, 0.9, 1.0], [1.3, 1.0, 1.2], [0.0, 1.0, 1.3]]
                [n as usize % 5];
        GenerateOptions {
            max_tokens: 24,
            temperature,
            top_p,
            repetition_penalty,
            seed,
            top_k: [9, 0, 0][n as usize % 3],
            stop_tokens: vec![11],
            ..GenerateOptions::default()
        }
    }

    /// Whoever guesses, however much, the text is the one without guesses; past the context, too, where
    /// a callback stops it, and where guesses come from nowhere.
    #[test]
    fn the_text_is_that_without_drafts() {
        let (model, prompt) = (model(1), [3, 1, 4, 1, 5, 9, 2, 6]);
        let of = |weights, room| {
            let drafts = true;
            Decoder::new(&model, DecoderOptions { sequences: 2, room, weights, drafts }).unwrap()
        };
        let mut decoders = [
            of(DecoderWeights::F32, 0),
            of(DecoderWeights::Bf16, 0),
            of(DecoderWeights::F32, 33),
            of(DecoderWeights::Bf16, 33),
        ];
        let (mut drafted, mut accepted) = ([0; 4], [0; 4]);
        for seed in 0..1000u64 {
            let mut options = options(seed, seed / 2);
            options.slide = seed.is_multiple_of(7);
            if seed.is_multiple_of(50) {
                options.max_tokens = 60;
            }
            let stop_at = [13, u32::MAX, u32::MAX][seed as usize % 3];
            let decoder = &mut decoders[seed as usize % 4];
            let mut ran = |checked: Checked| {
                let (mut seen, mut sampler) = (0, Sampler::new(&options, 37).unwrap());
                let mut on_token = |_| {
                    seen += 1;
                    seen < stop_at
                };
                let sequence = seed as usize % 2;
                decoder.rewind(sequence, 0).unwrap();
                decoder.push(sequence, &prompt).unwrap();
                prompt.iter().for_each(|token| sampler.note(*token));
                let text = decoder.go_on(sequence, (&options, sampler, checked), &mut on_token);
                let text = text.unwrap();
                assert_eq!(seen as usize, text.tokens.len());
                let last = &text.tokens[text.tokens.len().saturating_sub(8)..];
                assert!(decoder.tokens(sequence).ends_with(last), "it is appended");
                text
            };
            let plain = ran(Draft::None.checked(0, 37).unwrap());
            assert_eq!((plain.drafted, plain.accepted), (0, 0));
            let length = seed as usize % (MOST + 1);
            for (n, draft) in Draft::ALL.into_iter().skip(1).enumerate() {
                let text = ran(draft.checked(length, 37).unwrap());
                assert_eq!(text.tokens, plain.tokens, "{options:?}, {length}");
                (drafted[n], accepted[n]) =
                    (drafted[n] + text.drafted, accepted[n] + text.accepted);
            }
            let random = Random(Draw::of(seed, Purpose::Host, 0, 0), 0);
            let text = ran(Checked::new(Box::new(random), Pace::of(length), 37).unwrap());
            assert_eq!(text.tokens, plain.tokens, "{options:?}, {length}");
            (drafted[3], accepted[3]) = (drafted[3] + text.drafted, accepted[3] + text.accepted);
        }
        // Many guesses were made; those of the model are often right to their end, those from nowhere not.
        let rates: [f64; 4] = std::array::from_fn(|n| accepted[n] as f64 / drafted[n] as f64);
        println!("{drafted:?} {accepted:?} {rates:?}");
        assert!(drafted.iter().all(|drafted| *drafted > 10_000), "{drafted:?}");
        assert!(rates[1] > 0.2 && rates[2] > 0.2 && rates[3] < 0.05, "{rates:?}");
    }

    #[test]
    fn what_followed_the_last_tokens_is_found() {
        assert_eq!(after_last_ngram(&[]), None);
        assert_eq!(after_last_ngram(&[7]), None);
        assert_eq!(after_last_ngram(&[7, 8]), None);
        assert_eq!(after_last_ngram(&[7, 7]), Some(1));
        assert_eq!(after_last_ngram(&[1, 2, 1]), Some(1));
        // The longest, and of these the last.
        assert_eq!(after_last_ngram(&[1, 2, 3, 4, 2, 3, 9, 3, 5, 1, 2, 3]), Some(3));
        assert_eq!(after_last_ngram(&[1, 2, 5, 1, 2, 6, 1, 2]), Some(5));
        assert_eq!(after_last_ngram(&[4, 4, 4, 4]), Some(3));
    }

    #[test]
    fn drafts_are_as_long_as_gains_most() {
        // A guess takes 0.3 of a pass, and a check a tenth more than a pass.
        let run = |right: f64, guess: f64, rounds: usize| {
            let (mut pace, mut chance) = (Pace::of(0), 0.5f64);
            let mut lengths = Vec::new();
            for _ in 0..rounds {
                let length = pace.length(MOST);
                let mut accepted = 0;
                while accepted < length {
                    // Evenly spread numbers.
                    chance = (chance + 0.618_033_988_75).fract();
                    if chance >= right {
                        break;
                    }
                    accepted += 1;
                }
                let check = 1.0 + 0.02 * length as f64;
                pace.note([length, length, accepted], [guess * length as f64, check]);
                lengths.push(length);
            }
            let last = &lengths[rounds / 2..];
            last.iter().sum::<usize>() as f64 / last.len() as f64
        };
        // By the formula 5 at 0.9, 2 at 0.7; nothing gains at 0.2.
        let lengths = [run(0.9, 0.3, 400), run(0.7, 0.3, 400), run(0.2, 0.3, 400)];
        println!("{lengths:?}");
        assert!((3.5..7.0).contains(&lengths[0]), "{lengths:?}");
        assert!((1.0..3.5).contains(&lengths[1]), "{lengths:?}");
        assert!(lengths[2] < 0.5, "{lengths:?}");
        // What costs nothing is as long as it may be while it is right.
        assert!(run(0.99, 0.0, 400) > 10.0);
        // A pass that took long for other reasons is not believed for ever.
        let mut pace = Pace::of(0);
        pace.note([0, 0, 0], [0.0, 50.0]);
        let late = (0..1500).map(|_| {
            let length = pace.length(MOST);
            pace.note([length, length, 0], [0.3 * length as f64, 1.0]);
            length
        });
        let late: Vec<usize> = late.skip(1000).collect();
        assert!(late.iter().sum::<usize>() < late.len() / 4, "{late:?}");
    }
}
