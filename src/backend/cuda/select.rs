//! Positions that blocks keep, and their rows: `select.cu`.
//!
//! The device draws them itself, so that a recording draws those of every step, and the host waits
//! for nothing.

use std::ffi::c_void;
use std::ops::Range;

use super::device::capture::Redraw;
use super::device::launch;
use super::device::memory::{Arena, Piece, Tensor};
use super::quantize::random::Draw;
use super::{Cuda, kernel};
use crate::backend::{Memory, Select, SelectShape, Selected, SelectedSum, Sequences};
use crate::formats::Random;

const THREADS: usize = 256;

/// Positions of sequences that blocks keep.
pub(crate) struct Selection {
    /// (layers, stride) words: of a layer (B, T), of each position its number among the kept ones,
    /// or `DROPPED` of the kernels.
    numbers: Piece,
    stride: usize,
}

impl Selection {
    /// The address of a layer's words.
    fn of(&self, layer: usize) -> u64 {
        self.numbers.address + 4 * (layer * self.stride) as u64
    }
}

/// `Selecting` of the kernels.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct Selecting {
    numbers: u64,
    stride: u32,
    batch: u32,
    length: u32,
    kept: u32,
    draw: Draw,
}

/// A drawing for `layers` blocks, that of whose first one is `random`.
#[derive(Clone, Copy)]
pub(super) struct Drawing {
    random: Random,
    arguments: Selecting,
}

impl Drawing {
    /// Numbers of the first block go to `numbers`, of the next one `stride` words behind them.
    pub(super) fn new(
        [numbers, stride]: [u64; 2],
        SelectShape { sequences, kept, .. }: SelectShape,
        random: Random,
    ) -> Self {
        let [batch, length, kept] = [sequences.batch, sequences.length, kept].map(|n| n as u32);
        let draw = random.positions().into();
        let arguments = Selecting { numbers, stride: stride as u32, batch, length, kept, draw };
        Self { random, arguments }
    }

    #[cfg(test)]
    pub(super) fn arguments(&self) -> Selecting {
        self.arguments
    }
}

impl Redraw for Drawing {
    fn redraw(&mut self, [step, micro_step]: [u32; 2]) {
        self.random = Random { step, micro_step, ..self.random };
        self.arguments.draw = self.random.positions().into();
    }

    fn argument(&mut self) -> *mut c_void {
        std::ptr::from_mut(&mut self.arguments).cast()
    }
}

/// `Rows` of the kernels.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct Rows {
    /// (B T, C) or, of `gather_rows`, (B r, C).
    pub(super) out: u64,
    pub(super) amax: u64,
    pub(super) numbers: u64,
    pub(super) base: u64,
    pub(super) x: u64,
    pub(super) y: u64,
    pub(super) rows: u32,
    pub(super) length: u32,
    pub(super) kept: u32,
    pub(super) channels: u32,
}

impl Rows {
    /// Nothing read or written yet.
    fn new(Selected { selection, layer }: Selected<'_, Cuda>, shape: SelectShape) -> Self {
        let SelectShape { sequences, kept, channels } = shape;
        let [rows, length, kept, channels] =
            [sequences.rows(), sequences.length, kept, channels].map(|n| n as u32);
        let numbers = selection.of(layer);
        Self { out: 0, amax: 0, numbers, base: 0, x: 0, y: 0, rows, length, kept, channels }
    }

    /// A warp takes a row of all.
    pub(super) fn grid(&self) -> [usize; 3] {
        [(self.rows as usize).div_ceil(THREADS / 32), 1, 1]
    }
}

impl Select for Cuda {
    type Selection = Selection;

    fn selection(&self, arena: &mut Arena, sequences: Sequences, layers: usize) -> Selection {
        let stride = sequences.rows().next_multiple_of(Self::ALIGN);
        Selection { numbers: arena.bytes(4 * layers * stride), stride }
    }

    fn select_positions(
        &self,
        selection: &mut Selection,
        layers: Range<usize>,
        shape: SelectShape,
        random: &Random,
    ) {
        let random = Random { layer: layers.start as u32, ..*random };
        let to = [selection.of(layers.start), selection.stride as u64];
        let grid = [shape.sequences.batch, layers.len(), 1];
        let drawing = Drawing::new(to, shape, random);
        self.gpu.launch_drawn("select_positions", grid, THREADS, 0, drawing);
    }

    fn gather_rows(
        &self,
        out: &mut Tensor,
        x: &Tensor,
        selected: Selected<'_, Self>,
        shape: SelectShape,
    ) {
        let mut to = out.write();
        let (address, amax) = (to.address, to.amax());
        let rows = Rows { out: address, amax, x: x.address(), ..Rows::new(selected, shape) };
        launch!(self.gpu, kernel!(x, "gather_rows"), rows.grid(), THREADS, 0; rows);
    }

    fn scatter_rows(
        &self,
        to: &mut Tensor,
        x: &Tensor,
        selected: Selected<'_, Self>,
        shape: SelectShape,
    ) {
        // No amax is noted: rows that stay are not read.
        let out = to.write().address;
        let rows = Rows { out, x: x.address(), ..Rows::new(selected, shape) };
        launch!(self.gpu, kernel!(x, "scatter_rows"), rows.grid(), THREADS, 0; rows);
    }

    fn scatter_sum(
        &self,
        SelectedSum { out, base, x, y }: SelectedSum<'_, Self>,
        selected: Selected<'_, Self>,
        shape: SelectShape,
    ) {
        let [base, y] = [base, y].map(Tensor::address);
        let out = out.write().address;
        let rows = Rows { out, base, x: x.address(), y, ..Rows::new(selected, shape) };
        launch!(self.gpu, kernel!(x, "scatter_sum"), rows.grid(), THREADS, 0; rows);
    }
}
