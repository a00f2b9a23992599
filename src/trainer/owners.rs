//! Which rank keeps what of the optimizer's states, where ranks shard them.

use std::ops::Range;

use crate::backend::{Slot, StateLayout};
use crate::comm::{Ranks, owned};
use crate::optim::{Optimizer, OptimizerKind};
use crate::reserve::collect;
use crate::{Error, Result};

/// Elements of a part of what a rank gives to others, at least, and most parts: one is on its way while
/// the next is updated. NOTE: on two H200, 345M took the same with 4, 8 and 16, within 1%.
const PART: usize = 4 << 20;
const MOST_PARTS: usize = 8;

/// Which rank keeps the optimizer's states of each tensor, and updates it: some tensors in a row, with
/// about as many bytes of states as others have.
pub(super) struct Owners {
    /// Of each rank, by their numbers; nothing where all ranks keep all.
    owned: Vec<Range<usize>>,
    tensors: usize,
}

impl Owners {
    /// # Errors
    /// [`Error::InvalidArgument`] for an optimizer whose update of a tensor looks at others.
    pub(super) fn new(
        slots: &[Slot],
        optimizer: &Optimizer,
        align: usize,
        ranks: Option<&Ranks>,
    ) -> Result<Self> {
        let tensors = slots.len();
        let Some(ranks) = ranks.filter(|ranks| ranks.shards_states) else {
            return Ok(Self { owned: Vec::new(), tensors });
        };
        let is_known = matches!(optimizer.kind, OptimizerKind::AdamW | OptimizerKind::Muon);
        if !is_known || optimizer.ramping > 0 {
            let message = format!(
                "expected adamw or muon, without ramping, got {optimizer}; leave it out, so that every \
                 rank keeps all states"
            );
            return Err(Error::invalid("shard_states", message));
        }
        let whole = StateLayout::of_all(slots, optimizer, &(0..tensors), align)?;
        let bytes = |tensor: usize| {
            let places = whole.iter().map(|layout| &layout.places[tensor]);
            places.map(|place| place.bytes() + 4 * place.groups()).sum::<usize>()
        };
        let owned = (0..ranks.size()).map(|rank| {
            let bytes = (0..tensors).map(bytes);
            Ok(owned(bytes, rank, ranks.size()))
        });
        Ok(Self { owned: collect("what ranks own", owned)?, tensors })
    }

    /// Of all ranks their tensors, in parts of about as many elements each that are given around one
    /// behind the other: as many on all. Nothing where all ranks keep all.
    pub(super) fn in_parts(&self, slots: &[Slot]) -> Result<Vec<Vec<Range<usize>>>> {
        let len = |tensors: &Range<usize>| -> usize {
            slots[tensors.clone()].iter().map(|slot| slot.len).sum()
        };
        let most = self.owned.iter().map(len).max().unwrap_or(0);
        let count = (most / PART).clamp(1, MOST_PARTS);
        let parts = self.owned.iter().map(|tensors| {
            let sizes = slots[tensors.clone()].iter().map(|slot| slot.len);
            let part = |number| {
                let Range { start, end } = owned(sizes.clone(), number, count);
                Ok(tensors.start + start..tensors.start + end)
            };
            collect("what ranks own", (0..count).map(part))
        });
        collect("what ranks own", parts)
    }

    pub(super) fn is_shared(&self) -> bool {
        !self.owned.is_empty()
    }

    /// The tensors of a rank.
    pub(super) fn of(&self, rank: usize) -> Range<usize> {
        self.owned.get(rank).cloned().unwrap_or(0..self.tensors)
    }

    /// Most tensors that a rank has.
    pub(super) fn most(&self) -> usize {
        self.owned.iter().map(Range::len).max().unwrap_or(self.tensors)
    }
}
