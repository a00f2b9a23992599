//! The end of a step: a reduction of all gradients to a few sums, then the update.
//!
//! Between the two is the seam at which clipping decides, and at which ranks exchange what they
//! have.

use std::ops::Range;

use super::{FlatGradients, Memory, Slot};
use crate::Result;
use crate::optim::moments::Element;
use crate::optim::{Largest, Optimizer, OptimizerStep, StepSums, UpdateSums};
use crate::reserve::collect;

/// Where a parameter's numbers lie in the buffer of a state; none of a parameter that it is not kept
/// of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    /// What they are stored as.
    pub(crate) element: Element,
    /// The byte of the first.
    pub(crate) start: usize,
    /// How many there are.
    pub(crate) len: usize,
    /// The byte of the first scale, where they have any.
    pub(crate) scales: usize,
}

impl Place {
    /// Bytes of its elements.
    pub(crate) fn bytes(&self) -> usize {
        self.len * self.element.size()
    }

    /// Scales of its elements.
    pub(crate) fn groups(&self) -> usize {
        self.element.scales(self.len)
    }
}

/// How the buffer of one of an optimizer's states is laid out.
pub struct StateLayout {
    pub(crate) places: Vec<Place>,
    /// Of the buffer.
    pub(crate) bytes: usize,
}

impl StateLayout {
    /// Of the state of this number that an optimizer keeps of these parameters, of those that are
    /// `owned` by their numbers. What belongs to a parameter starts at a multiple of `align` f32
    /// numbers.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    pub(crate) fn new(
        slots: &[Slot],
        optimizer: &Optimizer,
        state: usize,
        owned: &Range<usize>,
        align: usize,
    ) -> Result<Self> {
        let (align, mut next) = (align * size_of::<f32>(), 0usize);
        let places = slots.iter().map(|slot| {
            let mut element = optimizer.moments.element(slot.kind, state);
            let mut len = if optimizer.keeps(state, slot.kind) { slot.len } else { 0 };
            if !owned.contains(&slot.index) {
                // Without scales, which others would be asked for.
                (element, len) = (Element::F32, 0);
            }
            let mut place = Place { element, start: next, len, scales: 0 };
            next = (place.start + place.bytes()).next_multiple_of(align);
            place.scales = next;
            next = (next + 4 * place.groups()).next_multiple_of(align);
            Ok(place)
        });
        let places = collect("a table of the optimizer's states", places)?;
        Ok(Self { places, bytes: next })
    }

    /// Of each state that an optimizer keeps of these parameters.
    ///
    /// # Errors
    /// As [`StateLayout::new`].
    pub(crate) fn of_all(
        slots: &[Slot],
        optimizer: &Optimizer,
        owned: &Range<usize>,
        align: usize,
    ) -> Result<Vec<Self>> {
        let states = 0..optimizer.states().len();
        let layouts = states.map(|state| Self::new(slots, optimizer, state, owned, align));
        collect("the layouts of the optimizer's states", layouts)
    }
}

/// All parameters of a model with what training keeps for them.
pub struct Trained<'a, B: Memory> {
    /// Where each lies in all of the buffers.
    pub slots: &'a [Slot],
    /// The parameters.
    pub weights: &'a mut B::Weights,
    /// What the optimizer keeps of each element, in the order that it names its states in.
    pub states: &'a mut [B::Bytes],
    /// Where in each of them.
    pub layouts: &'a [StateLayout],
    /// (parameters, three): what an optimizer that normalizes gradients keeps of each, as
    /// `optim/spam.rs` has it; of others nothing.
    pub statistics: &'a mut B::F32,
    /// Gradients.
    pub gradients: &'a mut FlatGradients<B>,
    /// The parameters whose states are here, by their numbers, in a row and in parts: others stay as
    /// they are.
    pub parts: &'a [Range<usize>],
}

impl<B: Memory> Trained<'_, B> {
    /// All parts as one.
    pub(crate) fn owned(&self) -> Range<usize> {
        as_one(self.parts)
    }
}

/// Ranges in a row as one.
pub(crate) fn as_one(parts: &[Range<usize>]) -> Range<usize> {
    let (first, last) = (parts.first(), parts.last());
    first.map_or(0, |first| first.start)..last.map_or(0, |last| last.end)
}

/// Optimizers.
pub trait Optimize: Memory {
    /// What a reduction leaves for the update that follows it: sums, tables of parameters.
    type Reduction: Send;
    /// Room for what is found of an update before it is made.
    type UpdateWatch: Send;

    /// What steps of an optimizer over these parameters need; an error where the host lacks memory
    /// for it.
    fn reduction(
        &self,
        arena: &mut Self::Arena,
        slots: &[Slot],
        optimizer: &Optimizer,
    ) -> Result<Self::Reduction>;
    /// Begins a step: forgets what was counted since the last one, by evaluations and by a step that
    /// was given up.
    fn begin_step(&self, _workspace: &mut Self::Workspace) {}
    /// Takes the sum of the first `rows` losses, each times its weight where they have any, as that of
    /// the step, or with `accumulate` adds it.
    fn add_losses(
        &self,
        reduction: &mut Self::Reduction,
        losses: (&Self::F32, Option<&Self::F32>),
        rows: usize,
        accumulate: bool,
    );
    /// The losses that are added up, and the scales that were clamped since the step began. Waits for
    /// the device.
    fn counts(
        &self,
        workspace: &Self::Workspace,
        reduction: &Self::Reduction,
    ) -> Result<(f64, u64)>;
    /// Takes another sum of losses as that of the step.
    fn set_losses(&self, reduction: &mut Self::Reduction, losses: f64) -> Result<()>;
    /// Multiplies the gradients of some parameters in a row by a number.
    fn scale_gradients(&self, gradients: &mut FlatGradients<Self>, of: &Range<usize>, factor: f32);
    /// Gradients become the sum of others, which lie as they do, and themselves: all in f32.
    fn join_gradients(&self, others: &Self::Bytes, gradients: &mut FlatGradients<Self>);
    /// Begins to sum up the gradients of some parameters in a row, which this rank has the sums of, where
    /// that is not [`Optimize::reduce`]'s alone.
    fn square_gradients(
        &self,
        _reduction: &mut Self::Reduction,
        _trained: &mut Trained<'_, Self>,
        _of: &Range<usize>,
    ) {
    }
    /// Sums up what the gradients are, for the update that comes next, and finds the rate of each
    /// parameter where it is not the step's. Once behind [`Optimize::square_gradients`], or again.
    /// `workspace` is that of the step's operations, which count clamped scales in it.
    fn reduce(
        &self,
        workspace: &mut Self::Workspace,
        reduction: &mut Self::Reduction,
        trained: &mut Trained<'_, Self>,
        step: &OptimizerStep,
    );
    /// Clips, and makes one update of every parameter and its states after [`Optimize::reduce`],
    /// unless loss or norm is not finite or the norm above `step`'s limit: then nothing changes.
    /// Waits for the device. `workspace` is that of [`Optimize::reduce`]. A device that
    /// gives weights to other ranks calls `updated` with the number of each part once its update is queued.
    fn update(
        &self,
        workspace: &mut Self::Workspace,
        reduction: &mut Self::Reduction,
        trained: &mut Trained<'_, Self>,
        step: &OptimizerStep,
        updated: &mut (dyn FnMut(usize) -> Result<()> + Send),
    ) -> Result<StepSums>;
    /// Computes the update of [`Optimize::update`], which found `sums`, for every parameter without
    /// storing it, and calls `largest` with what it would leave of each, in their order. Waits for
    /// the device.
    fn try_update(
        &self,
        workspace: &mut Self::Workspace,
        reduction: &mut Self::Reduction,
        trained: &mut Trained<'_, Self>,
        step: &OptimizerStep,
        sums: &StepSums,
        largest: &mut (dyn FnMut(Largest) + Send),
    ) -> Result<()>;
    /// What [`Optimize::watch_update`] needs of so many parameters.
    fn update_watch(&self, arena: &mut Self::Arena, parameters: usize)
    -> Result<Self::UpdateWatch>;
    /// Calls `found` with what the update after [`Optimize::reduce`] is about to do to every
    /// parameter, in their order; nothing changes. Waits for the device.
    fn watch_update(
        &self,
        watch: &mut Self::UpdateWatch,
        reduction: &mut Self::Reduction,
        trained: &mut Trained<'_, Self>,
        step: &OptimizerStep,
        found: &mut (dyn FnMut(UpdateSums) + Send),
    ) -> Result<()>;
    /// The sum of the first `rows` losses, each times its weight where they have any, of an
    /// evaluation. Waits for the device.
    fn sum_losses(
        &self,
        reduction: &mut Self::Reduction,
        losses: (&Self::F32, Option<&Self::F32>),
        rows: usize,
    ) -> Result<f64>;
}
