//! What goes wrong beside the training, and costs the run nothing: it is said, and counted.
//!
//! What ends a run (a failed step, a signal, a panic) saves the steps before it.

use crate::console;
use crate::failure::{Failure, Outcome};

/// Something that a run does beside its steps.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Side {
    Evaluation,
    Sample,
    Log,
    TensorBoard,
    Output,
    Save,
    Record,
}

impl Side {
    fn name(self) -> &'static str {
        match self {
            Self::Evaluation => "an evaluation failed",
            Self::Sample => "a sample failed",
            Self::Log => "a line of the log is lost",
            Self::TensorBoard => "an event for TensorBoard is lost",
            Self::Output => "a line of the output is lost",
            Self::Save => "a model could not be saved",
            Self::Record => "a record could not be written",
        }
    }
}

/// The failures of a run's side jobs.
#[derive(Default)]
pub(crate) struct Failures {
    counts: [u64; 7],
}

impl Failures {
    /// Takes note of a failure and says it: the first, the tenth, the hundredth of its kind and so
    /// on.
    pub(crate) fn note(&mut self, side: Side, failure: &Failure) {
        let count = &mut self.counts[side as usize];
        *count += 1;
        let is_round = 10u64.pow(count.ilog10()) == *count;
        if is_round {
            let times = if *count > 1 { format!(" for the {count}th time") } else { String::new() };
            console::note(&format!(
                "mxtrain: warning: {}{times}: {}; training goes on",
                side.name(),
                failure.message
            ));
        }
    }

    /// [`Failures::note`] of an outcome, which it takes the value of.
    pub(crate) fn unless<T>(&mut self, side: Side, outcome: Outcome<T>) -> Option<T> {
        outcome.inspect_err(|failure| self.note(side, failure)).ok()
    }

    /// How much was lost, in words; `None` if nothing was.
    pub(crate) fn summary(&self) -> Option<String> {
        let sides = [
            Side::Evaluation,
            Side::Sample,
            Side::Log,
            Side::TensorBoard,
            Side::Output,
            Side::Save,
            Side::Record,
        ];
        let names = [
            "evaluations failed",
            "samples failed",
            "log lines lost",
            "events for TensorBoard lost",
            "output lines lost",
            "models not saved",
            "records not written",
        ];
        let parts = sides.iter().zip(names).map(|(&side, name)| (self.counts[side as usize], name));
        let parts: Vec<_> = parts
            .filter(|(count, _)| *count > 0)
            .map(|(count, name)| format!("{count} {name}"))
            .collect();
        (!parts.is_empty()).then(|| parts.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_are_counted_by_kind() {
        let mut failures = Failures::default();
        assert_eq!(failures.summary(), None);
        for _ in 0..12 {
            failures.note(Side::Log, &Failure::runtime("full"));
        }
        assert_eq!(failures.unless(Side::Sample, Ok(3)), Some(3));
        assert_eq!(failures.unless::<()>(Side::Sample, Err(Failure::runtime("x"))), None);
        assert_eq!(failures.summary().unwrap(), "1 samples failed, 12 log lines lost");
    }
}
