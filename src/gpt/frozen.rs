//! Which parameters training leaves as they are.

use std::fmt;
use std::str::FromStr;

use glob::Pattern;

use super::ModelConfig;
use super::params::ParamTable;
use crate::backend::Slot;
use crate::reserve::collect;
use crate::{Error, Result};

/// The tensors that training leaves as they are, by patterns of their names: `transformer.wte.*`, or
/// several with commas between them. `*` stands for any text, `?` for one character, `[ab]` for one of
/// some. Such tensors have no gradient and no state of the optimizer; matrices of blocks among them
/// spare a third of their products.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Frozen(String);

impl Frozen {
    /// Whether it names none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Its patterns as they were given, and parsed.
    fn patterns(&self) -> impl Iterator<Item = (&str, Pattern)> {
        let all = self.0.split(',').map(str::trim).filter(|text| !text.is_empty());
        all.filter_map(|text| Some((text, Pattern::new(text).ok()?)))
    }

    /// Where training finds each parameter: those that it leaves as they are have no elements there,
    /// which beside adapters is all else.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub(crate) fn trained(&self, table: &ParamTable) -> Result<Vec<Slot>> {
        let slots = table.slots().iter().map(|slot| Ok(*slot));
        let mut slots = collect("a table of the parameters", slots)?;
        if table.is_adapted() {
            for (slot, spec) in slots.iter_mut().zip(table.specs()) {
                if !spec.is_adapter {
                    *slot = slot.untrained();
                }
            }
        }
        for (_, pattern) in self.patterns() {
            for (slot, spec) in slots.iter_mut().zip(table.specs()) {
                if pattern.matches(&spec.info()?.name) {
                    *slot = slot.untrained();
                }
            }
        }
        Ok(slots)
    }

    /// Checks the patterns against the parameters of a model.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a pattern that fits no name, and where nothing is left to train;
    /// [`Error::OutOfMemory`].
    pub(crate) fn check(&self, config: &ModelConfig, table: &ParamTable) -> Result<()> {
        for (text, pattern) in self.patterns() {
            let mut fits = false;
            for spec in table.specs() {
                fits |= pattern.matches(&spec.info()?.name);
            }
            if !fits {
                let mut example = table.specs()[0].info()?.name;
                let mut whole = None;
                for spec in table.specs() {
                    let name = spec.info()?.name;
                    let parts = config.parts_of(&name)?;
                    if parts.into_iter().flatten().any(|part| pattern.matches(&part.name)) {
                        whole = whole.or(Some(name));
                    }
                }
                let why = match whole {
                    Some(name) => {
                        example = name;
                        "what files have under such a name is a part of one tensor in training, "
                    }
                    None => "the list of tensors has the names, such as ",
                };
                let message = format!(
                    "no tensor is named like {text:?}; {why}{example:?}, and * stands for any text"
                );
                return Err(Error::invalid("frozen", message));
            }
        }
        if self.trained(table)?.iter().all(|slot| slot.len == 0) {
            let message =
                format!("expected that some tensor is trained, and {self} is all of them");
            return Err(Error::invalid("frozen", message));
        }
        Ok(())
    }
}

impl FromStr for Frozen {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        for pattern in text.split(',').map(str::trim) {
            if pattern.is_empty() && !text.is_empty() {
                let message = format!("expected patterns with commas between them, got {text:?}");
                return Err(Error::invalid("frozen", message));
            }
            if let Err(error) = Pattern::new(pattern) {
                let message = format!("{pattern:?} is no pattern of names: {error}");
                return Err(Error::invalid("frozen", message));
            }
        }
        Ok(Self(text.to_owned()))
    }
}

impl fmt::Display for Frozen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
