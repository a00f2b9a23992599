//! The largest settings of a training run that fit into an amount of memory.
//!
//! A setting is how the optimizer stores what it keeps, what the backward pass computes again, and
//! a batch size. Of the first two everything is tried; of the last the largest is found by
//! bisection, as the plan is exact, takes no memory and grows with it.

use indicatif::HumanBytes;
use mxfp4train::{
    Engine, Error, Gradients, Master, ModelConfig, Moments, Optimizer, Recompute, TrainerOptions,
    plan,
};
use serde::{Serialize, Serializer};

use crate::failure::{Failure, Outcome};
use crate::table::Table;

/// From what takes least time to what takes least memory.
const RECOMPUTES: [Recompute; 3] = [Recompute::Nothing, Recompute::Pointwise, Recompute::Block];

/// What fits, for each optimizer and each of [`RECOMPUTES`], in this order.
#[derive(Serialize)]
pub(crate) struct Fit {
    /// Bytes that there are.
    bytes: u64,
    settings: Vec<Setting>,
}

/// An optimizer, what is computed again, and the largest batch that fits.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Setting {
    /// As --optimizer names it.
    optimizer: String,
    #[serde(serialize_with = "as_text")]
    recompute: Recompute,
    /// None where not even one sequence fits.
    batch_size: Option<usize>,
    /// The plan's bytes with this batch size, or with 1 where nothing fits.
    total: u64,
}

fn as_text<S: Serializer>(value: &Recompute, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(value)
}

impl Fit {
    /// Finds what fits into `bytes`, with all of `options` but their batch size, `recompute` and what
    /// the optimizer's state is kept in.
    pub(crate) fn new(
        engine: &Engine,
        config: &ModelConfig,
        options: &TrainerOptions,
        bytes: u64,
    ) -> Outcome<Self> {
        let mut settings = Vec::new();
        for optimizer in forms(options.optimizer, engine) {
            let is_given = optimizer == options.optimizer;
            let one = TrainerOptions { batch_size: 1, optimizer, ..options.clone() };
            // A recipe may need more of an optimizer than the smallest form has.
            if !is_given && total(engine, config, &one).is_err() {
                continue;
            }
            for recompute in RECOMPUTES {
                let options = TrainerOptions { recompute, optimizer, ..options.clone() };
                let total = |batch_size| {
                    let options = TrainerOptions { batch_size, ..options.clone() };
                    total(engine, config, &options)
                };
                let batch_size = largest(|size| Ok(total(size)?.is_some_and(|t| t <= bytes)))?;
                let total = total(batch_size.unwrap_or(1))?.unwrap_or(u64::MAX);
                let optimizer = optimizer.to_string();
                settings.push(Setting { optimizer, recompute, batch_size, total });
            }
        }
        Ok(Self { bytes, settings })
    }

    /// The setting to take: the first that holds `wanted` sequences, so that no more is computed
    /// again than has to be; where none does, the one with the largest batch.
    pub(crate) fn recommended(&self, wanted: usize) -> Option<&Setting> {
        let holds = |setting: &&Setting| setting.batch_size >= Some(wanted);
        let largest = || {
            // Of equals the first, which `max_by_key` would take the last of.
            let fits = self.settings.iter().filter(|setting| setting.batch_size.is_some());
            fits.rev().max_by_key(|setting| setting.batch_size)
        };
        self.settings.iter().find(holds).or_else(largest)
    }

    /// For people who want `wanted` sequences in a batch.
    pub(crate) fn in_words(&self, wanted: usize) -> String {
        let mut table = Table::new(2, ["optimizer", "recompute", "batch size", "memory", "left"]);
        for setting in &self.settings {
            let left = match self.bytes.checked_sub(setting.total) {
                Some(left) => HumanBytes(left).to_string(),
                None => format!("-{}", HumanBytes(setting.total - self.bytes)),
            };
            table.row([
                setting.optimizer.clone(),
                setting.recompute.to_string(),
                setting.batch_size.map_or_else(|| "-".to_owned(), |size| size.to_string()),
                HumanBytes(setting.total).to_string(),
                left,
            ]);
        }
        let last = match self.recommended(wanted) {
            Some(setting) => format!("use         {}\n", setting.options()),
            None => format!("fit         {}\n", self.too_much()),
        };
        let head = format!("fit         the largest batches in {}:\n", HumanBytes(self.bytes));
        head + &table.text() + &last
    }

    /// What would fit in place of `options`, which do not; in a few words.
    fn instead_of(&self, options: &TrainerOptions) -> String {
        let optimizer = options.optimizer.to_string();
        let is_same = |setting: &Setting| setting.optimizer == optimizer;
        let as_asked =
            |setting: &Setting| is_same(setting) && setting.recompute == options.recompute;
        // Of equals the first, which `max_by_key` would take the last of.
        let best = |of: &dyn Fn(&Setting) -> bool| {
            let fits = self.settings.iter().filter(|s| s.batch_size.is_some() && of(s));
            fits.rev().max_by_key(|setting| setting.batch_size)
        };
        let mut said: Vec<(usize, String)> = Vec::new();
        for setting in [best(&as_asked), best(&is_same), best(&|_| true)].into_iter().flatten() {
            let size = setting.batch_size.unwrap_or_default();
            if said.last().is_some_and(|(before, _)| *before >= size) {
                continue;
            }
            let mut with = Vec::new();
            if setting.recompute != options.recompute {
                with.push(format!("--recompute {}", setting.recompute));
            }
            if !is_same(setting) {
                with.push(format!("--optimizer {}", setting.optimizer));
            }
            let fits = if said.is_empty() { "batch size " } else { "" };
            let verb = if said.is_empty() { " fits" } else { "" };
            let with =
                if with.is_empty() { String::new() } else { format!(" with {}", with.join(" ")) };
            said.push((size, format!("{fits}{size}{verb}{with}")));
        }
        let said: Vec<_> = said.into_iter().map(|(_, words)| words).collect();
        match said.split_last() {
            None => self.too_much(),
            Some((last, [])) => last.clone(),
            Some((last, others)) => format!("{}, or {last}", others.join(", ")),
        }
    }

    /// By how much the smallest setting is too large, where nothing fits.
    fn too_much(&self) -> String {
        let Some(smallest) = self.settings.iter().min_by_key(|setting| setting.total) else {
            return "there is nothing to try".into();
        };
        let optimizer = match self.settings.iter().all(|s| s.optimizer == smallest.optimizer) {
            true => String::new(),
            false => format!(" --optimizer {}", smallest.optimizer),
        };
        format!(
            "no batch size fits: 1 with --recompute {}{optimizer} takes {} too much",
            smallest.recompute,
            HumanBytes(smallest.total.saturating_sub(self.bytes))
        )
    }
}

impl Setting {
    /// The options of `mxtrain train` that make it.
    fn options(&self) -> String {
        let size = self.batch_size.unwrap_or(1);
        let mut options = format!("--batch-size {size} --recompute {}", self.recompute);
        if self.optimizer != Optimizer::default().to_string() {
            options.push_str(&format!(" --optimizer {}", self.optimizer));
        }
        options
    }
}

/// The failure of a trainer that could not be made; where it is too large, with what would fit.
pub(crate) fn failure(
    error: Error,
    engine: &Engine,
    config: &ModelConfig,
    options: &TrainerOptions,
) -> Failure {
    let is_too_large = matches!(error, Error::OutOfMemory { .. });
    let mut failure = Failure::from(error);
    let Some(room) = engine.memory_room().filter(|_| is_too_large) else { return failure };
    // What a machine has not free at the moment it may still give, a GPU will not.
    let bytes = if engine.device() == "cpu" { room.limit } else { room.available };
    let as_asked = total(engine, config, options);
    if !matches!(as_asked, Ok(Some(total)) if total <= bytes)
        && let Ok(fit) = Fit::new(engine, config, options, bytes)
    {
        failure.message.push_str(&format!("; {}", fit.instead_of(options)));
    }
    failure
}

/// What an optimizer's state can be kept in, from what is asked for to what takes least memory.
fn forms(given: Optimizer, engine: &Engine) -> Vec<Optimizer> {
    let mut forms = vec![given];
    // It follows weights and gradients in f32.
    if given.ramping > 0 {
        return forms;
    }
    if given.moments != Moments::Int8 {
        forms.push(Optimizer { moments: Moments::Int8, ..given });
    }
    // A processor keeps weights and gradients in f32.
    if engine.device() == "cpu" {
        return forms;
    }
    let split = Optimizer { moments: Moments::Int8, master: Master::Split, ..given };
    if given.master != Master::Split {
        forms.push(split);
    }
    if given.gradients != Gradients::Bf16 {
        forms.push(Optimizer { gradients: Gradients::Bf16, ..split });
    }
    forms
}

/// The plan's bytes; None for more than any machine has, or a batch that is larger than any may be.
fn total(engine: &Engine, config: &ModelConfig, options: &TrainerOptions) -> Outcome<Option<u64>> {
    match plan(engine, config, options) {
        Ok(plan) => Ok(Some(plan.total())),
        Err(Error::OutOfMemory { .. }) => Ok(None),
        Err(Error::InvalidArgument { what: "batch_size", .. }) if options.batch_size > 0 => {
            Ok(None)
        }
        Err(error) => Err(error.into()),
    }
}

/// The largest number from 1 on of which `fits` is true, which it is for all up to there.
fn largest(fits: impl Fn(usize) -> Outcome<bool>) -> Outcome<Option<usize>> {
    let (mut fitting, mut too_large) = (0, 1);
    while fits(too_large)? {
        (fitting, too_large) = (too_large, too_large * 2);
    }
    while too_large - fitting > 1 {
        let middle = fitting + (too_large - fitting) / 2;
        match fits(middle)? {
            true => fitting = middle,
            false => too_large = middle,
        }
    }
    Ok((fitting > 0).then_some(fitting))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_is_found() {
        for most in 0..70 {
            let expected = (most > 0).then_some(most);
            assert_eq!(largest(|size| Ok(size <= most)).unwrap(), expected);
        }
        assert!(
            largest(|size| if size < 5 { Ok(true) } else { Err(Failure::usage("x")) }).is_err()
        );
    }

    /// For `sizes` of [`RECOMPUTES`]; each is as large as a memory of 100 bytes.
    fn fit(sizes: [Option<usize>; 3]) -> Fit {
        let setting = |(recompute, batch_size): (_, Option<usize>)| Setting {
            optimizer: "adamw".into(),
            recompute,
            batch_size,
            total: if batch_size.is_some() { 100 } else { 1124 },
        };
        Fit { bytes: 100, settings: RECOMPUTES.into_iter().zip(sizes).map(setting).collect() }
    }

    #[test]
    fn no_more_is_computed_again_than_has_to_be() {
        let fit = fit([Some(7), Some(11), Some(20)]);
        let options = |wanted| fit.recommended(wanted).unwrap().options();
        assert_eq!(options(1), "--batch-size 7 --recompute nothing");
        assert_eq!(options(8), "--batch-size 11 --recompute pointwise");
        assert_eq!(options(12), "--batch-size 20 --recompute block");
        assert_eq!(options(21), "--batch-size 20 --recompute block");
        let other = Setting { optimizer: "stable-adamw".into(), ..fit.settings[0].clone() };
        let expected = "--batch-size 7 --recompute nothing --optimizer stable-adamw";
        assert_eq!(other.options(), expected);
    }

    #[test]
    fn of_settings_with_the_same_batch_the_fastest_is_taken() {
        let fit = fit([None, Some(3), Some(3)]);
        assert_eq!(fit.recommended(4).unwrap().recompute, Recompute::Pointwise);
        assert!(super::tests::fit([None; 3]).recommended(1).is_none());
    }

    #[test]
    fn what_ramps_up_has_no_smaller_form() {
        let engine = Engine::new(mxfp4train::EngineOptions::default()).unwrap();
        let [plain, ramping] = ["adamw", "adamw,ramping=9"].map(|name| name.parse().unwrap());
        assert_eq!(forms(ramping, &engine), [ramping]);
        assert!(forms(plain, &engine).len() > 1);
    }

    #[test]
    fn smaller_forms_of_an_optimizer_are_said() {
        let mut both = fit([Some(3), Some(4), Some(6)]);
        let smaller = fit([Some(5), Some(7), Some(9)]).settings.into_iter();
        both.settings
            .extend(smaller.map(|s| Setting { optimizer: "adamw,moments=int8".into(), ..s }));
        assert_eq!(
            both.instead_of(&TrainerOptions::default()),
            "batch size 3 fits, 6 with --recompute block, or 9 with --recompute block --optimizer \
             adamw,moments=int8"
        );
        // No more is computed again, or rounded, than has to be.
        assert_eq!(both.recommended(6).unwrap().options(), "--batch-size 6 --recompute block");
        let other = both.recommended(7).unwrap().options();
        assert_eq!(other, "--batch-size 7 --recompute pointwise --optimizer adamw,moments=int8");
    }

    #[test]
    fn what_would_fit_is_said() {
        let options = TrainerOptions::default();
        let words = |sizes| fit(sizes).instead_of(&options);
        assert_eq!(
            words([Some(12), Some(15), Some(20)]),
            "batch size 12 fits, or 20 with --recompute block"
        );
        assert_eq!(words([Some(3), Some(3), Some(3)]), "batch size 3 fits");
        assert_eq!(words([None, Some(1), Some(1)]), "batch size 1 fits with --recompute pointwise");
        assert_eq!(
            words([None; 3]),
            "no batch size fits: 1 with --recompute nothing takes 1.00 KiB too much"
        );
        let lines = fit([None, None, Some(2)]).in_words(8);
        let expected = "\
fit         the largest batches in 100 B:
optimizer  recompute  batch size    memory       left
adamw      nothing             -  1.10 KiB  -1.00 KiB
adamw      pointwise           -  1.10 KiB  -1.00 KiB
adamw      block               2     100 B        0 B
use         --batch-size 2 --recompute block
";
        assert_eq!(lines, expected);
    }
}
