//! Initial weights, drawn from the seed: the same on every backend and any number of threads.

use super::params::{Init, ParamSpec};
use crate::Result;
use crate::backend::Backend;
use crate::mx::{Draw, Purpose};
use crate::reserve::zeros;

/// Gives parameter number `index` its initial values.
pub(crate) fn initialize<B: Backend>(
    backend: &B,
    param: &mut B::Param,
    spec: &ParamSpec,
    seed: u64,
    index: usize,
) -> Result<()> {
    let constant = match spec.init {
        Init::Zeros => 0.0,
        Init::Ones => 1.0,
        Init::Normal { std } => {
            let draw = Draw::of(seed, Purpose::Weights, index as u32, 0);
            return backend.draw_param(param, std, &draw);
        }
    };
    let mut values = zeros("a tensor", spec.len())?;
    values.fill(constant);
    backend.write_param(param, &values)
}
