//! The gradients of a step that lanes and ranks share: which micro-steps are made here, and how what
//! comes of them becomes the same sum on every rank.
//!
//! A lane adds its micro-steps up where gradients lie, in the products themselves. A rank joins its
//! lanes to a part of one tree of sums (`comm/tree.rs`); then each rank gets a slice of all parts, adds
//! them in the order of the tree, and hands the sum to all others. So every rank has the same
//! gradients, bit for bit, of which it makes the same update.
//!
//! NOTE: through the host's memory, with the device waiting, and every rank keeps all states of the
//! optimizer. Slower than it could be on GPUs, and correct with every optimizer.

use crate::backend::{Backend, FlatGradients};
use crate::comm::{Joins, Ranks, Share, sum_parts};
use crate::reserve::zeros;
use crate::{Error, Result};

/// Slices are of whole pieces, so that none ends within a vector of any kernel.
const PIECE: usize = 4096;
/// Elements that are exchanged at once.
const BUCKET: usize = 1 << 22;

/// What a step needs besides gradients where it has lanes.
pub(super) struct Exchange<B: Backend> {
    pub(super) share: Share,
    /// Sums of lanes, with their losses, until others are added to them.
    kept: Vec<B::Bytes>,
    losses: Vec<f64>,
    in_use: usize,
    /// In which this rank waited for others, in a step.
    pub(super) seconds: f64,
    /// On the host: what goes to others and comes back, and what comes from them.
    send: Vec<f32>,
    receive: Vec<f32>,
}

impl<B: Backend> Exchange<B> {
    pub(super) fn new(
        backend: &B,
        arena: &mut B::Arena,
        gradients: &FlatGradients<B>,
        share: Share,
        ranks: Option<&Ranks>,
    ) -> Result<Self> {
        const WHAT: &str = "gradients that ranks exchange";
        let most = Joins::most_kept(share.lanes);
        let kept = (0..most).map(|_| backend.bytes(arena, gradients.len())).collect();
        let elements = gradients.len() / size_of::<f32>();
        let bucket = ranks.map_or(0, |ranks| bucket(elements, ranks.size()));
        Ok(Self {
            share,
            kept,
            losses: zeros(WHAT, most)?,
            in_use: 0,
            seconds: 0.0,
            send: zeros(WHAT, bucket)?,
            receive: zeros(WHAT, bucket)?,
        })
    }

    /// Whether a step is the sum of several.
    pub(super) fn has_lanes(&self) -> bool {
        !self.kept.is_empty()
    }

    /// Takes what a lane has added up, and adds it to what was kept, as far as the tree is known.
    pub(super) fn join(
        &mut self,
        backend: &B,
        reduction: &mut B::Reduction,
        gradients: &mut FlatGradients<B>,
        lane: usize,
        mut losses: f64,
    ) -> Result<()> {
        if lane == 0 {
            self.in_use = 0;
        }
        let Joins { joined, is_kept } = Joins::of(lane, self.share.lanes);
        for _ in 0..joined {
            self.in_use -= 1;
            backend.scope(|| backend.join_gradients(&self.kept[self.in_use], gradients));
            losses += self.losses[self.in_use];
        }
        if is_kept {
            let len = gradients.len();
            backend.scope(|| {
                backend.copy_bytes(gradients.all(), len, &mut self.kept[self.in_use]);
            });
            self.losses[self.in_use] = losses;
            self.in_use += 1;
            return Ok(());
        }
        backend.set_losses(reduction, losses)
    }

    /// Makes the gradients of this rank the sum of all ranks' gradients.
    pub(super) fn sum(
        &mut self,
        backend: &B,
        gradients: &mut FlatGradients<B>,
        ranks: &Ranks,
    ) -> Result<()> {
        let (size, elements) = (ranks.size(), gradients.len() / size_of::<f32>());
        let Self { send, receive, .. } = self;
        let (mut start, most) = (0, send.len());
        while start < elements {
            let here = most.min(elements - start);
            let slice = here.div_ceil(size).next_multiple_of(PIECE);
            let (send, receive) = (&mut send[..slice * size], &mut receive[..slice * size]);
            let at = start * size_of::<f32>();
            backend.read_bytes(gradients.all(), at, bytemuck::cast_slice_mut(&mut send[..here]))?;
            send[here..].fill(0.0);
            ranks.all_to_all(bytemuck::cast_slice(send), bytemuck::cast_slice_mut(receive))?;
            sum_parts(receive, size);
            let sum = bytemuck::cast_slice(&receive[..slice]);
            ranks.all_gather(sum, bytemuck::cast_slice_mut(send))?;
            backend.write_bytes(gradients.all_mut(), at, bytemuck::cast_slice(&send[..here]))?;
            start += here;
        }
        Ok(())
    }
}

/// Elements of a bucket: of so many ranks whole pieces each, and no more than there are in all.
fn bucket(elements: usize, ranks: usize) -> usize {
    let most = BUCKET.min(elements);
    most.div_ceil(ranks).next_multiple_of(PIECE) * ranks
}

/// Whether an error behind a vote is that of one rank alone, for whom the others would wait.
pub(super) fn fails_alone(error: &Error) -> bool {
    matches!(error, Error::Device { .. } | Error::OutOfMemory { .. } | Error::Poisoned)
}
