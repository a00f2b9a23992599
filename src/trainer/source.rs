//! What saving reads a trainer from, wherever that is.

use crate::Result;
use crate::backend::Slot;

/// Where what a trainer has is read from, as it lies in memory.
pub(super) trait Source {
    /// The master weights of a parameter.
    fn weights(&self, slot: Slot, out: &mut [f32]) -> Result<()>;
    /// State number `state` of the optimizer, from byte `at` of its buffer on.
    fn state(&self, state: usize, at: usize, out: &mut [u8]) -> Result<()>;
    /// What normalizing gradients keeps, from number `at` on.
    fn statistics(&self, at: usize, out: &mut [f32]) -> Result<()>;
    /// What the recipe keeps of weights, buffer number `number`, from number `at` on.
    fn followed(&self, number: usize, at: usize, out: &mut [f32]) -> Result<()>;
}
