//! Gradients that ranks exchange from device to device, beside the backward pass; and weights that
//! they give around, beside the update, where each updates some.

use std::ops::Range;

use super::{FlatGradients, Optimize, Slot};
use crate::Result;
use crate::comm::Wire;
use crate::comm::wire::Drawn;

/// A part of the gradients that ranks exchange at once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bucket {
    /// Bytes of the buffer of all, in f32.
    pub range: Range<usize>,
    /// The block whose backward pass writes the last of them; None where something behind all
    /// blocks does.
    pub behind: Option<usize>,
}

/// What ranks reach of each other.
pub struct Reached<'a, B: Optimize> {
    /// Gradients of all parameters.
    pub gradients: &'a FlatGradients<B>,
    /// The parameters.
    pub weights: &'a B::Weights,
    /// Sums of gradients.
    pub reduction: &'a B::Reduction,
}

/// What devices do that reach each other without the host.
pub trait Exchange: Optimize {
    /// Buckets, in the order in which they are exchanged, and what that needs.
    type Buckets: Send + Sync;

    /// None where gradients go through the host's memory; else they are sent as `wire`. With `owned`
    /// each rank gets the sums of those gradients alone whose parameters it updates: of every rank the
    /// parts of its parameters, as many on all.
    fn buckets(
        &self,
        _arena: &mut Self::Arena,
        _all: Vec<Bucket>,
        _of: (&[Slot], &FlatGradients<Self>),
        _owned: &[Vec<Range<usize>>],
        _wire: Wire,
    ) -> Result<Option<Self::Buckets>> {
        Ok(None)
    }

    /// What the other ranks reach its memory by, as many bytes on all of them.
    fn export(&self, buckets: &Self::Buckets, of: &Reached<'_, Self>) -> Result<Vec<u8>>;

    /// Reaches that of the others, by what all of them have exported, in their order.
    fn map(
        &self,
        buckets: &mut Self::Buckets,
        of: &Reached<'_, Self>,
        exported: &[u8],
    ) -> Result<()>;

    /// In a backward pass, behind that of a block.
    fn block_is_done(&self, _buckets: &Self::Buckets, _block: usize) {}

    /// Begins to make gradients the sum of those of all ranks, in the order of their tree, each
    /// bucket as soon as the backward pass that is queued has made it. Before, a rank's own become
    /// the sum of `kept`, from the last on, and themselves. Where ranks own some, those of the others
    /// stay what they are. What is sent is rounded by what was `drawn`.
    fn begin_exchange(
        &self,
        buckets: &mut Self::Buckets,
        gradients: &mut FlatGradients<Self>,
        kept: &[Self::Bytes],
        drawn: Drawn,
    ) -> Result<()>;

    /// Gives all ranks what [`Optimize::square_gradients`] has summed up here, and waits for what the
    /// others give.
    ///
    /// # Errors
    /// Where another rank does not answer in time.
    fn give_squares(&self, buckets: &mut Self::Buckets) -> Result<()>;

    /// An update begins, of which every part is given to all ranks.
    fn begin_gather(&self, buckets: &mut Self::Buckets);

    /// Gives all ranks a part of the parameters that this one owns, behind what is queued; with the
    /// last one it takes what the others give, and waits for it: so many seconds behind its own update.
    ///
    /// # Errors
    /// Where another rank does not answer in time.
    fn give(&self, buckets: &Self::Buckets, part: usize) -> Result<f64>;

    /// Waits until what was begun is done.
    ///
    /// # Errors
    /// Where another rank does not answer in time.
    fn end_exchange(&self, buckets: &mut Self::Buckets) -> Result<()>;

    /// Ends an exchange in which others are waited for in vain. Nothing is exchanged any more then.
    fn abort_exchange(&self, buckets: &mut Self::Buckets);
}
