//! How much an evaluation's loss could rise if logits moved a little: Keskar et al. 2016,
//! "On Large-Batch Training for Deep Learning", with the logits as what moves.
//!
//! The largest loss within the box is known, where in the paper an optimizer looks for it: a
//! cross-entropy falls in the target's logit and rises in all others, so that it is at a corner.
//! And a mean is largest where every token's loss is.

use crate::backend::{Backend, Sequences};
use crate::gpt::WorstOf;
use crate::model::{Model, OnDevice};
use crate::reserve::zeros;
use crate::{Error, Result};

/// How sharp an evaluation's loss is in the logits, see [`crate::Trainer::set_sharpness`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sharpness {
    /// How far logits may move: a logit y by epsilon (|y| + 1).
    pub epsilon: f32,
    /// 100 (f' - f) / (1 + f) of the mean loss f of all tokens and the largest that it can be, f'.
    pub all: f32,
    /// The same of the last tokens of the windows alone.
    pub last: f32,
    /// Mean over the tokens of the largest magnitude of a logit. At equal loss, larger logits make
    /// it sharper.
    pub logit_amax: f32,
}

/// Sums over tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Sums {
    loss: f64,
    worst: f64,
    tokens: f64,
}

impl Sums {
    fn add(&mut self, losses: &[f32], worst: &[f32]) {
        let sum = |values: &[f32]| values.iter().map(|v| f64::from(*v)).sum::<f64>();
        self.loss += sum(losses);
        self.worst += sum(worst);
        self.tokens += losses.len() as f64;
    }

    fn sharpness(&self) -> f32 {
        (100.0 * (self.worst - self.loss) / (self.tokens + self.loss)) as f32
    }
}

/// Measures it, where that is asked for.
pub(super) struct Sharp<B: Backend> {
    epsilon: f32,
    /// (rows): the worst losses, and the largest logits.
    worst: B::F32,
    amax: B::F32,
    /// The same on the host, and the losses.
    found: [Vec<f32>; 3],
    all: Sums,
    last: Sums,
    logit_amax: f64,
}

impl<B: Backend> Sharp<B> {
    /// For evaluations of up to `rows` tokens at once, in memory of its own.
    pub(super) fn new(on: &OnDevice<B>, model: &Model, rows: usize, epsilon: f32) -> Result<Self> {
        const WHAT: &str = "the sharpness of an evaluation";
        if !(epsilon > 0.0 && epsilon <= 1.0) {
            let message = format!("expected a number from above 0 to 1, got {epsilon}");
            return Err(Error::invalid("sharpness", message));
        }
        let backend = &*on.backend;
        let cut = |arena: &mut B::Arena| Ok([(); 2].map(|()| backend.f32(arena, rows)));
        let [worst, amax] = on.allocate(model.engine(), WHAT, cut)?;
        let found = [zeros(WHAT, rows)?, zeros(WHAT, rows)?, zeros(WHAT, rows)?];
        let (all, last) = (Sums::default(), Sums::default());
        Ok(Self { epsilon, worst, amax, found, all, last, logit_amax: 0.0 })
    }

    /// An evaluation begins.
    pub(super) fn begin(&mut self) {
        (self.all, self.last, self.logit_amax) = (Sums::default(), Sums::default(), 0.0);
    }

    /// For the pass over a batch.
    pub(super) fn worst_of(&mut self) -> WorstOf<'_, B> {
        WorstOf { losses: &mut self.worst, amax: &mut self.amax, epsilon: self.epsilon }
    }

    /// Takes in a batch whose pass is done. Waits for the device.
    pub(super) fn add(&mut self, backend: &B, losses: &B::F32, sequences: Sequences) -> Result<()> {
        let rows = sequences.rows();
        for (buffer, found) in [losses, &self.worst, &self.amax].into_iter().zip(&mut self.found) {
            backend.read_f32(buffer, 0, &mut found[..rows])?;
        }
        let [losses, worst, amax] = self.found.each_ref().map(|found| &found[..rows]);
        self.all.add(losses, worst);
        for last in (sequences.length - 1..rows).step_by(sequences.length) {
            self.last.add(&losses[last..=last], &worst[last..=last]);
        }
        self.logit_amax += amax.iter().map(|v| f64::from(*v)).sum::<f64>();
        Ok(())
    }

    /// Of the whole evaluation.
    pub(super) fn found(&self) -> Sharpness {
        Sharpness {
            epsilon: self.epsilon,
            all: self.all.sharpness(),
            last: self.last.sharpness(),
            logit_amax: (self.logit_amax / self.all.tokens) as f32,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::reference;
    use crate::{Dataset, Engine, EngineOptions, ModelConfig, Trainer, TrainerOptions};

    /// Of two tokens: their means count, not the mean of two sharpnesses.
    #[test]
    fn means_come_before_the_ratio() {
        let mut sums = Sums::default();
        sums.add(&[1.0], &[1.5]);
        sums.add(&[3.0], &[3.25]);
        assert_eq!(sums, Sums { loss: 4.0, worst: 4.75, tokens: 2.0 });
        assert_eq!(sums.sharpness(), 100.0 * (2.375 - 2.0) / 3.0);
    }

    /// Three windows in batches of two, against the logits that the model gives for every prefix.
    #[test]
    fn an_evaluation_says_what_the_logits_have() {
        let engine = Engine::new(EngineOptions { threads: 2, ..Default::default() }).unwrap();
        let config = ModelConfig {
            vocab_size: 37,
            context_length: 9,
            layers: 1,
            heads: 2,
            channels: 24,
            ..ModelConfig::default()
        };
        let model = Model::new(&engine, &config).unwrap();
        let wte: Vec<f32> = (0..37 * 24).map(|i| ((i * 61 % 97) as f32 - 48.0) / 60.0).collect();
        model.write_tensor("transformer.wte.weight", &wte).unwrap();
        let tokens: Vec<u32> = (0..4 * 9).map(|i| i * i % 37).collect();
        let (mut logits, mut targets) = (Vec::new(), Vec::new());
        for i in 0..27 {
            let mut of_one = vec![0.0; 37];
            model.next_logits(&tokens[i / 9 * 9..=i], &mut of_one).unwrap();
            logits.extend(of_one.into_iter().map(f64::from));
            targets.push(tokens[i + 1]);
        }
        let data = Dataset::from_tokens(tokens).unwrap();
        let options = TrainerOptions {
            batch_size: 2,
            recipe: "fp32".parse().unwrap(),
            ..TrainerOptions::default()
        };
        let mut trainer = Trainer::new(&model, options).unwrap();
        let plain = trainer.eval(&data, 0).unwrap();
        assert_eq!((plain.tokens, plain.sharpness), (27, None));
        for epsilon in [1e-3, 0.5] {
            trainer.set_sharpness(Some(epsilon)).unwrap();
            let stats = trainer.eval(&data, 0).unwrap();
            assert_eq!(stats.loss.to_bits(), plain.loss.to_bits());
            let found = stats.sharpness.unwrap();
            assert_eq!(
                (Some(found), found.epsilon),
                (trainer.eval(&data, 0).unwrap().sharpness, epsilon)
            );
            let [losses, _] = reference::worst_losses(&logits, &targets, 37, 0.0);
            let [worst, amax] = reference::worst_losses(&logits, &targets, 37, epsilon.into());
            let mean = |values: &[f64], from, every| {
                let picked: Vec<_> = values.iter().skip(from).step_by(every).collect();
                picked.iter().copied().sum::<f64>() / picked.len() as f64
            };
            let sharpness = |from, every| {
                let [loss, worst] = [&losses, &worst].map(|values| mean(values, from, every));
                100.0 * (worst - loss) / (1.0 + loss)
            };
            for (ours, exact) in [
                (found.all, sharpness(0, 1)),
                (found.last, sharpness(8, 9)),
                (found.logit_amax, mean(&amax, 0, 1)),
            ] {
                assert!((f64::from(ours) / exact - 1.0).abs() < 1e-4, "{epsilon}: {ours} {exact}");
            }
        }
        trainer.set_sharpness(None).unwrap();
        assert_eq!(trainer.eval(&data, 0).unwrap().sharpness, None);
        for epsilon in [0.0, -1.0, 1.5, f32::NAN] {
            let error = trainer.set_sharpness(Some(epsilon)).unwrap_err().to_string();
            assert!(error.contains("from above 0 to 1"), "{error}");
        }
    }
}
