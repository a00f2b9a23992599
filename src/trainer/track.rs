//! How far weights and what they are rounded to move, and who looks: for a recipe that resets those
//! that oscillate, and for whoever watches.

use crate::Result;
use crate::backend::{Backend, Part, Track, Values, View, Viewed};
use crate::gpt::Matrix;
use crate::reserve::collect;

/// Flat buffers (matrices), each as [`Track`] has it, and who looks.
pub(super) struct Tracked<B: Backend> {
    pub(super) flats: [B::F32; 3],
    observer: B::Observer,
}

impl<B: Backend> Tracked<B> {
    pub(super) fn new(
        backend: &B,
        arena: &mut B::Arena,
        matrices: &[Matrix],
        len: usize,
    ) -> Result<Self> {
        let flats = std::array::from_fn(|_| backend.f32(arena, len));
        let shapes = matrices.iter().map(|matrix| Ok(matrix.shape));
        let shapes = collect("the shapes of the weights of blocks", shapes)?;
        Ok(Self { flats, observer: backend.observer(arena, &shapes)? })
    }

    pub(super) fn of(&mut self, matrix: &Matrix) -> (Track<'_, B>, &mut B::Observer) {
        let [before, moved, rounded_moved] = &mut self.flats;
        (Track { before, moved, rounded_moved, slot: matrix.own }, &mut self.observer)
    }

    pub(super) fn observer(&mut self) -> &mut B::Observer {
        &mut self.observer
    }

    /// A weight as the forward pass of the step saw it.
    pub(super) fn view_before(
        &mut self,
        backend: &B,
        matrix: &Matrix,
        mean: Option<Part<'_, B>>,
        of: Viewed<'_>,
    ) {
        let (Track { before, slot, .. }, observer) = self.of(matrix);
        let kept = Values::Kept(Part { flat: before, slot });
        backend.view(observer, View::Before, kept, mean, of);
    }

    /// The weight after the step, and what moved.
    pub(super) fn observe(
        &mut self,
        backend: &B,
        weights: &B::Weights,
        matrix: &Matrix,
        mean: Option<Part<'_, B>>,
        of: Viewed<'_>,
    ) {
        let (track, observer) = self.of(matrix);
        let w = || backend.param(weights, matrix.param);
        backend.view(observer, View::After, Values::Weight(w()), mean, of);
        backend.observe(observer, track, w(), of);
    }
}
