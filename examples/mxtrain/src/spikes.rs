//! Spikes of a run: steps whose loss, or whose gradient, is far from what it was just before.
//!
//! A loss is a spike where it is above the mean of the steps before it by more than 3.2 of their
//! standard deviations, and an update where the root mean square of its gradients over what second
//! moments have seen coming is at least 2.3 in some tensor; Wortsman et al. 2023, "Stable and
//! low-precision training for large-scale vision-language models", count so. A spike soon after
//! another is the same event.

use std::collections::VecDeque;

use indicatif::HumanCount;
use serde::{Deserialize, Serialize};

/// Steps by which it is known what is usual.
const WINDOW: usize = 200;
/// Standard deviations by which a spike is above the mean.
const DEVIATIONS: f64 = 3.2;
/// Steps after a spike in which another one is the same event.
const EVENT: u64 = 10;
/// The root mean square from which an update is a spike.
const RMS: f64 = 2.3;
/// Steps before a spike of the loss in which an update's counts as one that announced it.
const BEFORE: std::ops::RangeInclusive<u64> = 1..=8;
/// Events that a line names.
const NAMED: usize = 5;

/// What was found in the steps of a run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Spikes {
    /// Steps that were compared with those before them: all but the warm-up and the 200 behind it.
    pub(crate) steps: u64,
    /// The first step of each event in which the loss was a spike.
    pub(crate) loss: Vec<u64>,
    /// The largest norm of the gradient, over the mean of those before it.
    pub(crate) norm_over_mean: f64,
    /// Its step.
    pub(crate) norm_step: u64,
    /// Where every update was looked at.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) updates: Option<UpdateSpikes>,
}

/// What was found of a run's updates.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct UpdateSpikes {
    /// The first step of each event in which an update was a spike.
    pub(crate) rms: Vec<u64>,
    /// The largest root mean square, and what it cannot be above.
    pub(crate) rms_max: f64,
    pub(crate) ceiling: f32,
    /// Events of the loss that begin one to eight steps behind such an update.
    pub(crate) announced: u64,
}

impl Spikes {
    /// For people, without a full stop; None where there was nothing to compare.
    pub(crate) fn in_words(&self) -> Option<String> {
        let named: Vec<_> = self.loss.iter().take(NAMED).map(|step| HumanCount(*step)).collect();
        let named: Vec<_> = named.iter().map(ToString::to_string).collect();
        let more = if self.loss.len() > NAMED { " ..." } else { "" };
        let updates = self.updates.as_ref().map_or_else(String::new, |of| {
            let UpdateSpikes { rms, rms_max, ceiling, announced } = of;
            format!(
                "; {} update spikes (RMS {RMS} and above; the largest {rms_max:.2} of at most \
                 {ceiling:.2}), {announced} of the loss spikes one to eight steps behind one",
                HumanCount(rms.len() as u64)
            )
        });
        let loss = match self.loss.len() {
            0 => "no loss spikes".to_owned(),
            1 => format!("1 loss spike (step {})", named[0]),
            n => format!("{} loss spikes (steps {}{more})", HumanCount(n as u64), named.join(", ")),
        };
        (self.steps > 0).then(|| {
            format!(
                "{loss} in {} steps; largest gradient norm {:.2} times the mean before (step {}){updates}",
                HumanCount(self.steps),
                self.norm_over_mean,
                HumanCount(self.norm_step)
            )
        })
    }
}

/// Looks at the steps of a run as they come.
pub(crate) struct SpikeWatch {
    /// Steps up to this one are warm-up, in which nothing is usual.
    warm_up: u64,
    losses: Window,
    norms: Window,
    /// The last step whose loss was a spike.
    last: Option<u64>,
    /// The last steps whose update was a spike, as many as matter.
    updates: VecDeque<u64>,
    /// Whether every update was looked at so far.
    all_seen: bool,
    found: Spikes,
}

impl SpikeWatch {
    /// For a run whose warm-up ends with step `warm_up`.
    pub(crate) fn new(warm_up: u64) -> Self {
        let [losses, norms] = std::array::from_fn(|_| Window::default());
        let (updates, found) = (VecDeque::new(), Spikes::default());
        Self { warm_up, losses, norms, last: None, updates, all_seen: true, found }
    }

    /// Takes in a step; `rms` is the largest root mean square of its update, where somebody has
    /// looked, and what it cannot be above.
    pub(crate) fn step(&mut self, step: u64, loss: f64, norm: f64, rms: Option<(f64, f32)>) {
        if step <= self.warm_up {
            return;
        }
        self.all_seen &= rms.is_some();
        if !self.all_seen {
            self.found.updates = None;
        }
        if let (Some(usual), Some(usual_norm)) = (self.losses.usual(), self.norms.usual()) {
            self.found.steps += 1;
            if loss > usual.mean + DEVIATIONS * usual.deviation {
                if self.last.is_none_or(|last| step - last > EVENT) {
                    self.found.loss.push(step);
                    let announced = self.updates.iter().any(|at| BEFORE.contains(&(step - at)));
                    if let Some(of) = self.found.updates.as_mut().filter(|_| announced) {
                        of.announced += 1;
                    }
                }
                self.last = Some(step);
            }
            let over_mean = if usual_norm.mean > 0.0 { norm / usual_norm.mean } else { 0.0 };
            if over_mean > self.found.norm_over_mean {
                (self.found.norm_over_mean, self.found.norm_step) = (over_mean, step);
            }
        }
        if let Some((rms, ceiling)) = rms.filter(|_| self.all_seen) {
            self.update(step, rms, ceiling);
        }
        self.losses.add(loss);
        self.norms.add(norm);
    }

    /// Takes in the update of a step.
    fn update(&mut self, step: u64, rms: f64, ceiling: f32) {
        let of = self.found.updates.get_or_insert_default();
        (of.rms_max, of.ceiling) = (of.rms_max.max(rms), ceiling);
        if rms < RMS {
            return;
        }
        if self.updates.back().is_none_or(|last| step - last > EVENT) {
            of.rms.push(step);
        }
        self.updates.push_back(step);
        self.updates.retain(|at| step - at <= EVENT);
    }

    /// What it has found so far.
    pub(crate) fn found(&self) -> &Spikes {
        &self.found
    }
}

/// The last values, [`WINDOW`] of them at most.
#[derive(Default)]
struct Window(VecDeque<f64>);

/// Of the values of a whole window.
struct Usual {
    mean: f64,
    deviation: f64,
}

impl Window {
    fn add(&mut self, value: f64) {
        if self.0.len() == WINDOW {
            self.0.pop_front();
        }
        self.0.push_back(value);
    }

    /// None before the window is whole.
    fn usual(&self) -> Option<Usual> {
        let first = *self.0.front().filter(|_| self.0.len() == WINDOW)?;
        // Less the first, so that equal values have that mean and no deviation, to the last bit.
        let mean = self.0.iter().map(|v| v - first).sum::<f64>() / WINDOW as f64;
        let squares = self.0.iter().map(|v| (v - first - mean).powi(2)).sum::<f64>();
        Some(Usual { mean: first + mean, deviation: (squares / WINDOW as f64).sqrt() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Losses that alternate about 2 by 0.1, which is their deviation, but where `of` has others.
    fn watch(warm_up: u64, steps: u64, of: impl Fn(u64) -> Option<f64>) -> Spikes {
        let mut watch = SpikeWatch::new(warm_up);
        for step in 1..=steps {
            let usual = if step % 2 == 0 { 2.1 } else { 1.9 };
            watch.step(step, of(step).unwrap_or(usual), 1.0, None);
        }
        watch.found().clone()
    }

    #[test]
    fn a_spike_is_above_3_2_deviations() {
        let at = |loss| watch(0, 400, |step| (step == 300).then_some(loss)).loss;
        assert_eq!(at(2.0 + 3.19 * 0.1), [0u64; 0]);
        assert_eq!(at(2.0 + 3.21 * 0.1), [300]);
        assert_eq!(at(-5.0), [0u64; 0]);
        assert_eq!(watch(0, 400, |_| Some(0.1)).loss, [0u64; 0]);
    }

    #[test]
    fn spikes_within_ten_steps_are_one_event() {
        let at = |spikes: &[u64]| watch(0, 400, |step| spikes.contains(&step).then_some(9.0)).loss;
        assert_eq!(at(&[250, 251, 260]), [250]);
        assert_eq!(at(&[250, 260, 270]), [250]);
        // The first one makes the deviation larger, but not as much.
        assert_eq!(at(&[250, 261]), [250, 261]);
    }

    #[test]
    fn nothing_is_compared_before_a_window_behind_the_warm_up() {
        let at = |step| watch(50, 400, |at| (at == step).then_some(9.0));
        assert_eq!(at(250).loss, [0u64; 0]);
        assert_eq!(at(251).loss, [251]);
        assert_eq!(at(0).steps, 150);
        assert_eq!(watch(50, 250, |_| None).in_words(), None);
        // A high loss of the warm-up makes no deviation large.
        assert_eq!(
            watch(50, 400, |at| match at {
                30 => Some(99.0),
                300 => Some(2.4),
                _ => None,
            })
            .loss,
            [300]
        );
    }

    #[test]
    fn updates_announce_spikes_of_the_loss() {
        let watch = |unseen: u64| {
            let mut watch = SpikeWatch::new(10);
            for step in 1..=600 {
                let loss = if [300, 320, 400].contains(&step) { 9.0 } else { (step % 2) as f64 };
                let rms = match step {
                    5 => 4.0,
                    // Eight steps before one, nine before the next, and with the last.
                    292 | 311 | 400 => 2.3,
                    293 => 3.0,
                    _ => 1.0,
                };
                watch.step(step, loss, 1.0, (step != unseen).then_some((rms, 4.47)));
            }
            watch.found().clone()
        };
        let found = watch(0);
        assert_eq!(found.loss, [300, 320, 400]);
        let updates =
            UpdateSpikes { rms: vec![292, 311, 400], rms_max: 3.0, ceiling: 4.47, announced: 1 };
        assert_eq!(found.updates, Some(updates));
        let expected = "; 3 update spikes (RMS 2.3 and above; the largest 3.00 of at most 4.47), 1 \
                        of the loss spikes one to eight steps behind one";
        assert!(found.in_words().unwrap().ends_with(expected), "{:?}", found.in_words());
        // In the warm-up nobody has to look.
        assert!(watch(7).updates.is_some() && watch(500).updates.is_none());
    }

    #[test]
    fn the_largest_norm_is_known_with_its_step() {
        let mut watch = SpikeWatch::new(0);
        (1..=300).for_each(|step| {
            watch.step(step, 1.0, if step == 270 { 5.0 } else { 2.0 }, None);
        });
        let found = watch.found();
        assert_eq!((found.norm_over_mean, found.norm_step), (2.5, 270));
        let expected = "no loss spikes in 100 steps; largest gradient norm 2.50 times the mean \
                        before (step 270)";
        assert_eq!(found.in_words().unwrap(), expected);
        let many = Spikes { loss: (1..=7).map(|n| n * 1000).collect(), ..found.clone() };
        let expected = "7 loss spikes (steps 1,000, 2,000, 3,000, 4,000, 5,000 ...) in 100 steps; ";
        assert!(many.in_words().unwrap().starts_with(expected), "{:?}", many.in_words());
    }
}
