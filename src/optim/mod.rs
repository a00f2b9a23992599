//! Optimizers: a file for each, with its settings, the states that it keeps, the arithmetic of its
//! update and its bounds. The numbers that states are kept in. Schedules of the learning rate.
//!
//! An optimizer is states, a reduction, an update. All three are data and scalar arithmetic here; a
//! backend runs them over flat buffers (`backend/optimize.rs`). So nothing of ours but the
//! error is imported here, and a backend knows no other formula than this one.

/// What a switch can be set to, written and read by the names of `as_str`.
macro_rules! named {
    ($of:ty, $switch:literal) => {
        impl std::fmt::Display for $of {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.as_str())
            }
        }

        impl std::str::FromStr for $of {
            type Err = crate::Error;

            fn from_str(s: &str) -> crate::Result<Self> {
                Self::ALL.into_iter().find(|one| one.as_str() == s).ok_or_else(|| {
                    let names = Self::ALL.map(Self::as_str).join(", ");
                    crate::Error::invalid($switch, format!("expected one of {names}; got {s:?}"))
                })
            }
        }
    };
}

pub(crate) use named;

pub(crate) mod adamw;
mod bounds;
mod gradients;
pub(crate) mod master;
pub(crate) mod moments;
pub(crate) mod muon;
mod normalization;
pub(crate) mod ramping;
mod schedule;
pub(crate) mod spam;
pub(crate) mod stable_adamw;
mod step;

use std::fmt;
use std::str::FromStr;

pub(crate) use bounds::Bounds;
pub use gradients::Gradients;
pub use master::Master;
pub use moments::Moments;
pub(crate) use moments::ParamKind;
pub use muon::Muon;
pub use normalization::Normalization;
pub use schedule::{Schedule, ScheduleKind};
pub use step::{Largest, OptimizerStep, StepSums, UpdateSums};

use crate::{Error, Result};

/// What weights are updated by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OptimizerKind {
    /// `adamw`: Adam with weight decay outside of the moments (Loshchilov and Hutter, arXiv
    /// 1711.05101).
    #[default]
    AdamW,
    /// `stable-adamw`: AdamW whose rate falls for a parameter whose gradients are larger than its
    /// second moments have seen coming (arXiv 2304.13013); usually without clipping.
    StableAdamW,
    /// `stable-spam`: AdamW on gradients that are normalized tensor by tensor, whose outliers are
    /// clipped, with moments that start again from time to time (arXiv 2502.17055). It takes no
    /// clipping.
    StableSpam,
    /// `stable-spam-ref`: the same as its authors' code counts steps behind such a start.
    StableSpamRef,
    /// `gradstab`: AdamW on gradients whose lengths are made stable tensor by tensor, without more.
    GradStab,
    /// `muon`: the weights of blocks' linear layers move along their orthogonalized momentum (Keller
    /// Jordan, "Muon: An optimizer for hidden layers in neural networks", 2024), all else by AdamW,
    /// whose rate the learning rate is. Its authors do not clip; here it is as with AdamW.
    Muon,
}

impl OptimizerKind {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::AdamW,
        Self::StableAdamW,
        Self::StableSpam,
        Self::StableSpamRef,
        Self::GradStab,
        Self::Muon,
    ];

    /// What the rest of the house is told of it.
    pub(crate) fn definition(self) -> &'static Definition {
        match self {
            Self::AdamW => &adamw::DEFINITION,
            Self::StableAdamW => &stable_adamw::DEFINITION,
            Self::StableSpam => &spam::STABLE,
            Self::StableSpamRef => &spam::REFERENCE,
            Self::GradStab => &spam::GRADSTAB,
            Self::Muon => &muon::DEFINITION,
        }
    }

    /// Whether gradients are normalized tensor by tensor, by [`Optimizer::normalization`].
    pub(crate) fn normalizes(self) -> bool {
        self.definition().normalizes
    }

    /// Whether matrices of blocks are moved by their orthogonalized momentum, as
    /// [`Optimizer::muon`] says.
    pub(crate) fn orthogonalizes(self) -> bool {
        self.definition().orthogonalizes
    }

    /// Its switches besides those that all have, for messages.
    fn switches(self) -> &'static str {
        match (self.normalizes(), self.orthogonalizes()) {
            (true, _) => ", gamma1, gamma2, gamma3, reset, s",
            (_, true) => ", momentum, ratio",
            _ if self == Self::AdamW => ", ramping",
            _ => "",
        }
    }
}

impl fmt::Display for OptimizerKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.definition().name)
    }
}

/// An optimizer and its settings.
///
/// Which one it is, and what it keeps its states in, is written as one string, such as `adamw` or
/// `adamw,moments=int8`, which is also what files store. Parsed, it has its usual settings.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Optimizer {
    /// Which one.
    pub kind: OptimizerKind,
    /// `moments=`: the numbers that its states are kept in.
    pub moments: Moments,
    /// `master=`: what the weights that it updates are kept as.
    pub master: Master,
    /// `gradients=`: what gradients are kept in between the products that make them and the update.
    pub gradients: Gradients,
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Added to the square root of the second moment; above 0.
    pub epsilon: f32,
    /// Decoupled weight decay, applied to tensors of two or more dimensions.
    pub weight_decay: f32,
    /// Largest global gradient norm; longer gradients are scaled down to it. 0 turns it off.
    pub clip: f32,
    /// Of `stable-spam`, `stable-spam-ref` and `gradstab`; others do not read it.
    pub normalization: Normalization,
    /// Of `muon`; others do not read it.
    pub muon: Muon,
    /// `ramping=`, of `adamw`: steps of a period of Q-Ramping (TetraJet, arXiv 2502.20853), in
    /// which weights that oscillate in 4 bits are updated less often; 0 turns it off.
    pub ramping: u32,
}

impl Default for Optimizer {
    fn default() -> Self {
        Self::new(OptimizerKind::default())
    }
}

impl Optimizer {
    /// One with its usual settings.
    pub fn new(kind: OptimizerKind) -> Self {
        kind.definition().defaults
    }

    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] naming the field.
    pub fn validate(&self) -> Result<()> {
        let limits = [
            ("beta1", self.beta1, 0.0, 1.0),
            ("beta2", self.beta2, 0.0, 1.0),
            // The smallest number of f32: 0 would make NaN of every weight whose gradient is 0.
            ("epsilon", self.epsilon, f32::from_bits(1), 1.0),
            ("weight_decay", self.weight_decay, 0.0, f32::MAX),
            ("clip", self.clip, 0.0, f32::MAX),
            ("momentum", self.muon.momentum, 0.0, 1.0),
            ("ratio", self.muon.ratio, 0.0, f32::MAX),
        ];
        for (what, value, low, high) in limits {
            if !(value >= low && value < high) {
                let range = match what {
                    "epsilon" => "above 0 (1e-8 is usual)".to_owned(),
                    _ => format!("from {low}"),
                };
                let end = match high == f32::MAX {
                    true => " on".to_owned(),
                    false => format!(" to below {high}"),
                };
                let message = format!("expected a number {range}{end}, got {value}");
                return Err(Error::invalid(what, message));
            }
        }
        ramping::check(self)?;
        if !self.kind.normalizes() {
            return Ok(());
        }
        if self.clip > 0.0 {
            let message = format!(
                "{} normalizes the gradient of each tensor, so that clipping all of them together \
                 changes nothing; set 0, got {}",
                self.kind, self.clip
            );
            return Err(Error::invalid("clip", message));
        }
        let Normalization { gamma1, gamma2, gamma3, .. } = self.normalization;
        for (what, gamma) in [("gamma1", gamma1), ("gamma2", gamma2), ("gamma3", gamma3)] {
            if !(0.0..1.0).contains(&gamma) {
                let message = format!("expected a number from 0 to below 1, got {gamma}");
                return Err(Error::invalid(what, message));
            }
        }
        if gamma1 * gamma1 >= gamma2 {
            let message = format!(
                "expected more than the square of gamma1, {}, or gradients have no largest length; \
                 got {gamma2}",
                (gamma1 * gamma1) as f32
            );
            return Err(Error::invalid("gamma2", message));
        }
        Ok(())
    }

    /// It with the decay rates that it has behind so many steps of a schedule, and what they were
    /// multiplied by.
    pub(crate) fn annealed(self, steps: u64, total_steps: u64) -> (Self, f64) {
        if !self.anneals() {
            return (self, 1.0);
        }
        let s = spam::annealing(steps, total_steps);
        (Self { beta1: (f64::from(self.beta1) * s) as f32, ..self }, s)
    }

    /// Whether its string names settings, besides what things are kept in, that are not those of
    /// another of its kind.
    pub(crate) fn names_other_settings(&self, other: &Self) -> bool {
        let settings = |of: &Self| {
            let Normalization { gamma1, gamma2, gamma3, reset, anneals } = of.normalization;
            let Muon { momentum, ratio } = of.muon;
            match self.kind.orthogonalizes() {
                true => [momentum, ratio, 0.0, 0.0, 0.0].map(f64::from),
                false => [gamma1, gamma2, gamma3, reset.into(), u8::from(anneals).into()],
            }
        };
        if self.ramping != 0 && self.ramping != other.ramping {
            return true;
        }
        let has_any = self.kind.normalizes() || self.kind.orthogonalizes();
        let [ours, usual, theirs] = [self, &Self::new(self.kind), other].map(settings);
        has_any && (0..ours.len()).any(|i| ours[i] != usual[i] && ours[i] != theirs[i])
    }

    /// Whether decay rates fall over a schedule, whose steps then have to be known.
    pub(crate) fn anneals(&self) -> bool {
        self.kind.normalizes() && self.normalization.anneals
    }

    /// What it keeps of the parameters: moments, then what ramping does.
    pub(crate) fn states(&self) -> &'static [State] {
        self.definition().states
    }

    /// What the rest of the house is told of it: of its kind, but where it ramps up.
    fn definition(&self) -> &'static Definition {
        if self.ramping > 0 { &ramping::DEFINITION } else { self.kind.definition() }
    }

    /// Whether parameters of a kind are moved by their orthogonalized momentum.
    pub(crate) fn orthogonalizes(&self, kind: ParamKind) -> bool {
        self.kind.orthogonalizes() && kind == ParamKind::Matrix
    }

    /// Whether parameters of a kind may be updated less often than in every step.
    pub(crate) fn ramps(&self, kind: ParamKind) -> bool {
        self.ramping > 0 && kind == ParamKind::Matrix
    }

    /// Whether it keeps the state of this number of parameters of a kind: momentum is the first.
    pub(crate) fn keeps(&self, state: usize, kind: ParamKind) -> bool {
        match state {
            0 => true,
            1 => !self.orthogonalizes(kind),
            _ => self.ramps(kind),
        }
    }
}

/// Which one it is, and what its states are kept in.
impl fmt::Display for Optimizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kind, moments, master, gradients, normalization, muon, ramping, .. } = self;
        kind.fmt(f)?;
        if *moments != Moments::default() {
            write!(f, ",moments={moments}")?;
        }
        if *master != Master::default() {
            write!(f, ",master={master}")?;
        }
        if *gradients != Gradients::default() {
            write!(f, ",gradients={gradients}")?;
        }
        if kind.normalizes() {
            normalization.switches(&Self::new(*kind).normalization, f)?;
        }
        if kind.orthogonalizes() {
            muon.switches(f)?;
        }
        if *ramping > 0 {
            write!(f, ",ramping={ramping}")?;
        }
        Ok(())
    }
}

impl FromStr for Optimizer {
    type Err = Error;

    /// One with its usual settings.
    fn from_str(s: &str) -> Result<Self> {
        let invalid = |message| Err(Error::invalid("optimizer", message));
        let mut parts = s.split(',').map(str::trim);
        let name = parts.next().unwrap_or_default();
        let Some(kind) = OptimizerKind::ALL.into_iter().find(|kind| kind.definition().name == name)
        else {
            let names = OptimizerKind::ALL.map(|kind| kind.definition().name).join(", ");
            return invalid(format!("expected one of {names}; got {name:?}"));
        };
        let mut optimizer = Self::new(kind);
        for (i, part) in parts.enumerate() {
            let (switch, value) = part.split_once('=').unwrap_or((part, ""));
            let switch = switch.trim();
            let is_switch = |part: &str| part.split('=').next().map(str::trim) == Some(switch);
            if s.split(',').skip(1).take(i).any(is_switch) {
                return invalid(format!("{switch} is given twice; say it once"));
            }
            match switch {
                "moments" => optimizer.moments = value.trim().parse()?,
                "master" => optimizer.master = value.trim().parse()?,
                "gradients" => optimizer.gradients = value.trim().parse()?,
                "gamma3" if kind == OptimizerKind::GradStab => {
                    let message = "gradstab clips no elements, of whose largest this would be the \
                                   decay; leave it out, or use stable-spam";
                    return Err(Error::invalid("gamma3", message));
                }
                "ramping" => ramping::set(&mut optimizer, value)?,
                switch if kind.normalizes() && optimizer.normalization.set(switch, value)? => {}
                switch if kind.orthogonalizes() && optimizer.muon.set(switch, value)? => {}
                other => {
                    let more = kind.switches();
                    return invalid(format!(
                        "unknown switch {other:?}; {name} has moments, master, gradients{more}"
                    ));
                }
            }
        }
        Ok(optimizer)
    }
}

/// The most moments that any optimizer keeps: the first of its states, whose magnitudes are known.
pub(crate) const MAX_STATES: usize = 2;

/// A number that an optimizer keeps of each element of the parameters, in a flat buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct State {
    /// Prefix of its tensors' names in checkpoints.
    pub(crate) name: &'static str,
    /// What one of its elements is called in messages.
    pub(crate) what: &'static str,
    /// Whether it may be below 0; a file where one is even so is damaged.
    pub(crate) is_signed: bool,
}

impl State {
    /// The name in checkpoints of what belongs to a weight.
    pub(crate) fn tensor(&self, weight: &str) -> String {
        format!("{}.{weight}", self.name)
    }
}

/// What an optimizer is.
pub(crate) struct Definition {
    /// As strings have it.
    name: &'static str,
    defaults: Optimizer,
    /// Moments, at most [`MAX_STATES`], then what ramping keeps.
    states: &'static [State],
    /// [`OptimizerKind::normalizes`].
    normalizes: bool,
    /// [`OptimizerKind::orthogonalizes`].
    orthogonalizes: bool,
    /// [`Bounds::largest_gradient`].
    largest_gradient: fn(&Bounds, &OptimizerStep) -> f32,
    /// [`Bounds::after`].
    after: fn(&Bounds, &OptimizerStep, f32) -> Bounds,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_survive_a_round_trip_and_what_is_unknown_is_named() {
        for (kind, moments) in
            OptimizerKind::ALL.into_iter().flat_map(|kind| Moments::ALL.map(|m| (kind, m)))
        {
            let master = Master::ALL[moments as usize % 2];
            let gradients = Gradients::ALL[usize::from(moments == Moments::Int8)];
            let optimizer = Optimizer { moments, master, gradients, ..Optimizer::new(kind) };
            assert_eq!(optimizer.to_string().parse::<Optimizer>().unwrap(), optimizer);
            optimizer.validate().unwrap();
            assert!(optimizer.states().len() <= MAX_STATES);
        }
        assert_eq!(Optimizer::default().to_string(), "adamw");
        let given = "gradstab,moments=int8,gamma1=0.5,reset=100,s=cosine";
        assert_eq!(given.parse::<Optimizer>().unwrap().to_string(), given);
        let given = "stable-adamw,moments=fp8,master=split,gradients=bf16";
        assert_eq!(given.parse::<Optimizer>().unwrap().to_string(), given);
        let given = "muon,moments=bf16,momentum=0.9,ratio=33.5";
        assert_eq!(given.parse::<Optimizer>().unwrap().to_string(), given);
        let ramping: Optimizer = " adamw, ramping = 500".parse().unwrap();
        assert_eq!((ramping.to_string().as_str(), ramping.clip), ("adamw,ramping=500", 0.0));
        let without: Optimizer = "adamw,ramping=0".parse().unwrap();
        assert_eq!(without, Optimizer::default());
        let usual: Optimizer = "muon,ratio=66.67,momentum=0.95".parse().unwrap();
        assert_eq!(usual.to_string(), "muon");
        let usual: Optimizer = "stable-spam,reset=1000,gamma3=0.999".parse().unwrap();
        assert_eq!(usual.to_string(), "stable-spam");
        let spaced: Optimizer = " stable-adamw , moments = int8".parse().unwrap();
        assert_eq!(spaced.to_string(), "stable-adamw,moments=int8");
        for (text, part) in [
            (
                "",
                "expected one of adamw, stable-adamw, stable-spam, stable-spam-ref, gradstab, muon; got",
            ),
            ("adam", "muon; got \"adam\""),
            ("muon,reset=5", "\"reset\"; muon has moments, master, gradients, momentum, ratio"),
            ("adamw,ratio=5", "unknown switch \"ratio\"; adamw has moments, master, gradients"),
            ("muon,momentum=x", "momentum: expected a number, got \"x\""),
            ("adamw,reset=5", "unknown switch \"reset\"; adamw has moments, master, gradients"),
            (
                "stable-spam,rest=5",
                "\"rest\"; stable-spam has moments, master, gradients, gamma1, gamma2, gamma3, reset, s",
            ),
            ("stable-spam,reset=-1", "reset: expected a whole number"),
            ("stable-spam,gamma1=x", "gamma1: expected a number"),
            ("stable-spam,s=0.5", "s: expected one of 1, cosine, got \"0.5\""),
            ("adamw,s=cosine", "unknown switch \"s\"; adamw has"),
            ("adamw,moments=int4", "moments: expected one of f32, bf16, int8, fp8; got \"int4\""),
            ("adamw,moments", "moments: expected one of f32, bf16, int8, fp8; got \"\""),
            ("adamw,master=bf16", "master: expected one of f32, split; got \"bf16\""),
            ("adamw,gradients=int8", "gradients: expected one of f32, bf16; got \"int8\""),
            ("adamw, fast", "unknown switch \"fast\"; adamw has moments, master, gradients"),
            (
                "stable-adamw,clip=1",
                "unknown switch \"clip\"; stable-adamw has moments, master, gradients",
            ),
            ("adamw,", "unknown switch \"\""),
            ("adamw,moments=int8, moments=int8", "moments is given twice; say it once"),
            ("adamw,ramping=x", "ramping: expected a whole number of steps, got \"x\""),
            ("adamw,ramping=-5", "ramping: expected a whole number of steps"),
            (
                "muon,ramping=5",
                "ramping: it makes updates of adamw less frequent; use adamw, got muon",
            ),
            ("adamw,reset=5", "adamw has moments, master, gradients, ramping"),
            ("gradstab,gamma3=0.5", "gamma3: gradstab clips no elements"),
        ] {
            let error = text.parse::<Optimizer>().unwrap_err().to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    #[test]
    fn what_makes_nan_is_refused_by_name() {
        let refused = |optimizer: Optimizer| match optimizer.validate() {
            Err(Error::InvalidArgument { what, .. }) => what,
            other => panic!("{optimizer:?}: {other:?}"),
        };
        let good = Optimizer::default();
        // 1e-46 is 0 in f32, and 1 - 1e-9 is 1.
        let too_small = "1e-46".parse().unwrap();
        for epsilon in [0.0, -0.0, too_small, -1e-8, 1.0, f32::NAN, f32::INFINITY] {
            assert_eq!(refused(Optimizer { epsilon, ..good }), "epsilon");
        }
        for beta in [1.0, "0.999999999".parse().unwrap(), -0.1, f32::NAN] {
            assert_eq!(refused(Optimizer { beta1: beta, ..good }), "beta1");
            assert_eq!(refused(Optimizer { beta2: beta, ..good }), "beta2");
        }
        for bad in [-0.1, f32::NAN, f32::INFINITY] {
            assert_eq!(refused(Optimizer { weight_decay: bad, ..good }), "weight_decay");
            assert_eq!(refused(Optimizer { clip: bad, ..good }), "clip");
        }
        let spam = Optimizer::new(OptimizerKind::StableSpam);
        assert_eq!(refused(Optimizer { clip: 1.0, ..spam }), "clip");
        for (switch, what) in [
            ("gamma1=0.95", "gamma2"),
            ("gamma2=0.4", "gamma2"),
            ("gamma3=1", "gamma3"),
            ("gamma1=nan", "gamma1"),
        ] {
            assert_eq!(refused(format!("stable-spam,{switch}").parse().unwrap()), what);
        }
        for (switch, what) in [
            ("momentum=1", "momentum"),
            ("momentum=-0.1", "momentum"),
            ("ratio=-1", "ratio"),
            ("ratio=inf", "ratio"),
            ("ratio=nan", "ratio"),
        ] {
            assert_eq!(refused(format!("muon,{switch}").parse().unwrap()), what);
        }
        let message = Optimizer { clip: -1.0, ..good }.validate().unwrap_err().to_string();
        assert_eq!(message, "clip: expected a number from 0 on, got -1");
        let message = Optimizer { epsilon: 0.0, ..good }.validate().unwrap_err().to_string();
        assert_eq!(message, "epsilon: expected a number above 0 (1e-8 is usual) to below 1, got 0");
    }
}
