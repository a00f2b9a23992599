//! Initial weights, drawn from the seed where they live: `fill_normal` rounds every operation once,
//! so that a GPU's kernel makes the same bits, and 1.3 billion weights cost nothing to speak of.

use super::params::{Init, ParamSpec, ParamTable};
use crate::Result;
use crate::backend::Memory;
use crate::formats::{Draw, Purpose};
use crate::reserve::zeros;

/// Gives every parameter its initial values.
pub(crate) fn initialize<B: Memory>(
    backend: &B,
    weights: &mut B::Weights,
    table: &ParamTable,
    seed: u64,
) -> Result<()> {
    initialize_all(backend, weights, (table, |_| true), seed)
}

/// The same of the adapters alone.
pub(crate) fn initialize_adapters<B: Memory>(
    backend: &B,
    weights: &mut B::Weights,
    table: &ParamTable,
    seed: u64,
) -> Result<()> {
    initialize_all(backend, weights, (table, |spec| spec.is_adapter), seed)
}

fn initialize_all<B: Memory>(
    backend: &B,
    weights: &mut B::Weights,
    (table, is_meant): (&ParamTable, impl Fn(&ParamSpec) -> bool),
    seed: u64,
) -> Result<()> {
    let all = table.slots().iter().zip(table.specs());
    for (slot, spec) in all.filter(|(_, spec)| is_meant(spec)) {
        let constant = match spec.init {
            Init::Zeros => 0.0,
            Init::Ones => 1.0,
            Init::Normal { std } => {
                let draw = Draw::of(seed, Purpose::Weights, spec.draw, 0);
                backend.draw_param(weights, *slot, std, &draw)?;
                continue;
            }
        };
        let mut values = zeros("a tensor", slot.len)?;
        values.fill(constant);
        backend.write_param(weights, *slot, &values)?;
    }
    Ok(())
}
