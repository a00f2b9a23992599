//! The loss of text that is there, by a decoder's weights.

use std::time::Instant;

use super::Decoder;
use super::cached::By;
use crate::data::{Dataset, Window};
use crate::reserve::zeros;
use crate::{Error, Result};

/// Rows whose logits are on the host at once.
const ROWS: usize = 128;

/// The loss of text.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Score {
    /// Mean cross-entropy in nats a token.
    pub loss: f32,
    /// Tokens that were predicted.
    pub tokens: u64,
    /// Wall-clock duration.
    pub seconds: f64,
}

impl Decoder {
    /// Mean loss over `max_windows` windows of `sequence_length` tokens spread evenly over `data`, those
    /// of [`crate::Trainer::eval`]; 0 takes all. It is what a model loses in the weights that it
    /// decodes with. The first text is empty then.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a length of 0 or of more tokens than there is room for, and where
    /// no file has two tokens; [`Error::TokenRange`], [`Error::Io`], and what the device says. A loss
    /// that is not finite is returned.
    pub fn eval(
        &mut self,
        data: &Dataset,
        sequence_length: usize,
        max_windows: u64,
    ) -> Result<Score> {
        let (begun, vocab_size) = (Instant::now(), self.vocab_size());
        if sequence_length > self.room() {
            let message = format!(
                "expected at most {}, for which there is room; got {sequence_length}",
                self.room()
            );
            return Err(Error::invalid("sequence_length", message));
        }
        data.check_tokens(vocab_size)?;
        let windows = data.eval_windows(sequence_length)?;
        let count = match max_windows {
            0 => windows.total(),
            most => most.min(windows.total()),
        };
        let what = "a window and its logits";
        let mut window = zeros(what, sequence_length + 1)?;
        let mut logits = zeros(what, ROWS.min(sequence_length) * vocab_size)?;
        let mut weights: Vec<f32> = zeros(what, sequence_length)?;
        let mut documents: Vec<u32> = zeros(what, sequence_length)?;
        let (mut sum, mut divisor, mut tokens) = (0.0, 0.0, 0);
        for index in 0..count {
            let length = windows.length(index, count)?;
            let (window, weights) = (&mut window[..=length], &mut weights[..length]);
            let documents = &mut documents[..length];
            weights.fill(1.0);
            let to = Window { tokens: &mut *window, weights: &mut *weights, documents };
            windows.read(index, count, vocab_size, to)?;
            let mut start = 0;
            for document in documents.chunk_by(|a, b| a == b) {
                let of = start..start + document.len();
                start = of.end;
                self.rewind(0, 0)?;
                let (inputs, targets) = (&window[of.clone()], &window[1..][of.clone()]);
                let targets = targets.chunks(ROWS).zip(weights[of].chunks(ROWS));
                for (inputs, (targets, weights)) in inputs.chunks(ROWS).zip(targets) {
                    let (first, logits) =
                        (self.tokens(0).len(), &mut logits[..inputs.len() * vocab_size]);
                    self.push(0, inputs)?;
                    self.compute((0, By::Own), first, logits)?;
                    let rows = logits.chunks_exact(vocab_size).zip(targets).zip(weights);
                    let losses = rows.map(|((logits, target), weight)| {
                        f64::from(*weight) * loss_of(logits, *target)
                    });
                    sum += losses.sum::<f64>();
                }
            }
            divisor += weights.iter().map(|weight| f64::from(*weight)).sum::<f64>();
            tokens += weights.iter().filter(|weight| **weight != 0.0).count() as u64;
        }
        self.rewind(0, 0)?;
        let loss = (sum / divisor) as f32;
        Ok(Score { loss, tokens, seconds: begun.elapsed().as_secs_f64() })
    }
}

/// log sum exp(logits) - logits[target].
fn loss_of(logits: &[f32], target: u32) -> f64 {
    let most = logits.iter().fold(f32::NEG_INFINITY, |most, v| most.max(*v));
    let above: f64 = logits.iter().map(|v| f64::from(*v - most).exp()).sum();
    above.ln() + f64::from(most) - f64::from(logits[target as usize])
}
