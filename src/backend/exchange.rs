//! Gradients that ranks exchange from device to device, beside the backward pass.

use std::ops::Range;

use super::{FlatGradients, Memory};
use crate::Result;

/// A part of the gradients that ranks exchange at once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bucket {
    /// Bytes of the buffer of all, in f32.
    pub range: Range<usize>,
    /// The block whose backward pass writes the last of them; None where something behind all
    /// blocks does.
    pub behind: Option<usize>,
}

/// What devices do that reach each other without the host.
pub trait Exchange: Memory {
    /// Buckets, in the order in which they are exchanged, and what that needs.
    type Buckets: Send + Sync;

    /// None where gradients go through the host's memory.
    fn buckets(
        &self,
        _arena: &mut Self::Arena,
        _all: Vec<Bucket>,
    ) -> Result<Option<Self::Buckets>> {
        Ok(None)
    }

    /// What the other ranks reach its gradients by, as many bytes on all of them.
    fn export(&self, buckets: &Self::Buckets, gradients: &FlatGradients<Self>) -> Result<Vec<u8>>;

    /// Reaches those of the others, by what all of them have exported, in their order.
    fn map(
        &self,
        buckets: &mut Self::Buckets,
        gradients: &FlatGradients<Self>,
        exported: &[u8],
    ) -> Result<()>;

    /// In a backward pass, behind that of a block.
    fn block_is_done(&self, _buckets: &Self::Buckets, _block: usize) {}

    /// Begins to make gradients the sum of those of all ranks, in the order of their tree, each
    /// bucket as soon as the backward pass that is queued has made it. Before, a rank's own become
    /// the sum of `kept`, from the last on, and themselves.
    fn begin_exchange(
        &self,
        buckets: &mut Self::Buckets,
        gradients: &mut FlatGradients<Self>,
        kept: &[Self::Bytes],
    ) -> Result<()>;

    /// Waits until they are the sum.
    ///
    /// # Errors
    /// Where another rank does not answer in time.
    fn end_exchange(&self, buckets: &mut Self::Buckets) -> Result<()>;

    /// Ends an exchange in which others are waited for in vain. Nothing is exchanged any more then.
    fn abort_exchange(&self, buckets: &mut Self::Buckets);
}
