//! Memory of a device: an arena, buffers that are cut from it, copies to and from the host.
//!
//! All parameters of a model lie in one flat buffer, and so do their gradients and whatever an
//! optimizer keeps of each element: a [`Slot`] says where in all of them one parameter is. So a
//! step can look at everything at once, and ranks can exchange ranges that end where no tensor
//! does.

use std::ffi::c_void;
use std::sync::Arc;

use super::block::Supply;
use super::{Precision, WorkspaceShape};
use crate::Result;
use crate::formats::Draw;
use crate::optim::{Master, ParamKind};

/// A parameter's place in flat buffers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// Its number.
    pub index: usize,
    /// Its first element, a multiple of [`Memory::ALIGN`].
    pub start: usize,
    /// Elements.
    pub len: usize,
    /// Rows of a matrix or a table, its first dimension; 1 of a vector.
    pub(crate) rows: usize,
    /// What the parameter is to an optimizer.
    pub(crate) kind: ParamKind,
}

impl Slot {
    /// Its elements.
    pub fn range(self) -> std::ops::Range<usize> {
        self.start..self.start + self.len
    }

    /// The same of a parameter that training leaves as it is: nothing of it has a gradient or a state.
    pub(crate) fn untrained(self) -> Self {
        Self { len: 0, ..self }
    }

    /// Rows and columns.
    pub(crate) fn shape(self) -> [usize; 2] {
        [self.rows, self.len / self.rows]
    }

    /// Whether weight decay applies: to all that is no vector.
    pub fn decays(self) -> bool {
        self.kind != ParamKind::Vector
    }
}

/// Where the gradient of a parameter lies in the buffer of all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GradientPlace {
    /// What it is kept in.
    pub precision: Precision,
    /// The byte of its first element.
    pub start: usize,
    /// Elements.
    pub len: usize,
}

impl GradientPlace {
    /// Bytes of its elements.
    pub fn bytes(&self) -> usize {
        self.len * self.precision.size()
    }
}

/// A parameter's piece of a flat buffer, to be read.
pub struct Part<'a, B: Memory> {
    /// The buffer.
    pub flat: &'a B::F32,
    /// Where the piece is.
    pub slot: Slot,
}

/// A device's memory.
pub trait Memory: Send + Sync + Sized + 'static {
    /// Memory that buffers are cut from; see [`Memory::arena`].
    type Arena;
    /// Activations and their gradients, in the backend's compute precision.
    type Tensor: Send;
    /// f32 on the device: statistics, losses.
    type F32: Send + Sync;
    /// Bytes that stand for numbers of several types: gradients, what an optimizer keeps.
    type Bytes: Send + Sync;
    /// All parameters of a model: f32 master values, and whatever copy the kernels read.
    type Weights: Send + Sync;
    /// One of them, to be read.
    type Param<'a>: Send + Sync;
    /// The gradient of a parameter, to be written.
    type Gradient<'a>: Send;
    /// Token numbers, and others of 32 bits that come with them.
    type Tokens: Send + Sync;
    /// Scratch memory of the kernels.
    type Workspace: Send;

    /// What slots start at multiples of, in elements.
    const ALIGN: usize;
    /// Whether there are bf16 copies of weights beside their master values, so that these can be
    /// split, and whether gradients can be in bf16.
    const HAS_COPIES: bool;

    /// Where its large memory of the host comes from, and how much is in use.
    fn supply(&self) -> &Arc<Supply>;
    /// An arena of `bytes` bytes, or for `None` one that only measures: it hands out buffers that
    /// must not be used and counts their bytes.
    fn arena(&self, bytes: Option<usize>) -> Result<Self::Arena>;
    /// Bytes that an arena has handed out.
    fn arena_used(&self, arena: &Self::Arena) -> usize;
    /// A zeroed activation buffer of `len` elements.
    fn tensor(&self, arena: &mut Self::Arena, len: usize, precision: Precision) -> Self::Tensor;
    /// A zeroed f32 buffer of `len` elements.
    fn f32(&self, arena: &mut Self::Arena, len: usize) -> Self::F32;
    /// A zeroed buffer of `len` bytes.
    fn bytes(&self, arena: &mut Self::Arena, len: usize) -> Self::Bytes;
    /// `count` zeroed parameters of `len` elements in all, between slots included, whose master
    /// weights are kept as `master`.
    fn weights(
        &self,
        arena: &mut Self::Arena,
        len: usize,
        count: usize,
        master: Master,
    ) -> Self::Weights;
    /// Keeps all parameters, `len` elements in all, as `master` from here on, which is not what they
    /// are kept as: their numbers stay, but for what [`Master::Split`] cannot hold. Waits for the
    /// device. Never called where there are no copies.
    fn keep_weights_as(
        &self,
        weights: &mut Self::Weights,
        len: usize,
        slots: &[Slot],
        master: Master,
    ) -> Result<()>;
    /// A buffer of `len` tokens, whose embeddings get gradients or never will; an error where the
    /// host lacks memory for it.
    fn tokens(
        &self,
        arena: &mut Self::Arena,
        len: usize,
        have_gradients: bool,
    ) -> Result<Self::Tokens>;
    /// Scratch memory for models of a shape.
    fn workspace(&self, arena: &mut Self::Arena, shape: &WorkspaceShape<'_>) -> Self::Workspace;

    /// The parameter of a slot.
    fn param<'a>(&self, weights: &'a Self::Weights, slot: Slot) -> Self::Param<'a>;
    /// The gradients at several places, no two of them the same, of a buffer.
    fn gradients<'a, const N: usize>(
        &self,
        all: &'a mut Self::Bytes,
        places: [GradientPlace; N],
    ) -> [Self::Gradient<'a>; N];

    /// Lets `fill` write the first `len` tokens of a buffer that is at least as long.
    fn write_tokens(&self, to: &mut Self::Tokens, len: usize, fill: impl FnOnce(&mut [u32]));
    /// Copies f32 values to the device, from element `at` of the buffer on.
    fn write_f32(&self, to: &mut Self::F32, at: usize, from: &[f32]) -> Result<()>;
    /// Copies f32 values to the host, from element `at` of the buffer on, after all that was asked
    /// for before.
    fn read_f32(&self, from: &Self::F32, at: usize, to: &mut [f32]) -> Result<()>;
    /// Copies activations to the host as f32 values, from element `at` of the tensor on, after all that
    /// was asked for before.
    fn read_activations(&self, from: &Self::Tensor, at: usize, to: &mut [f32]) -> Result<()>;
    /// Copies bytes to the device, from byte `at` of the buffer on.
    fn write_bytes(&self, to: &mut Self::Bytes, at: usize, from: &[u8]) -> Result<()>;
    /// Copies bytes to the host, from byte `at` of the buffer on, after all that was asked for
    /// before.
    fn read_bytes(&self, from: &Self::Bytes, at: usize, to: &mut [u8]) -> Result<()>;
    /// Overwrites a parameter with as many values.
    fn write_param(&self, to: &mut Self::Weights, slot: Slot, from: &[f32]) -> Result<()>;
    /// Overwrites a parameter with normal values of a standard deviation, `formats::fill_normal`'s
    /// from row 0 on, bit for bit.
    fn draw_param(&self, to: &mut Self::Weights, slot: Slot, std: f32, draw: &Draw) -> Result<()>;
    /// Copies the master values of a parameter to the host.
    fn read_param(&self, from: &Self::Weights, slot: Slot, to: &mut [f32]) -> Result<()>;
    /// Copies the halves of a parameter whose master values are split to the host: the copies, and what
    /// they lack. Never called where there are no copies.
    fn read_halves(
        &self,
        _from: &Self::Weights,
        _slot: Slot,
        _copies: &mut [u16],
        _lows: &mut [u16],
    ) -> Result<()> {
        unreachable!("a device without copies of weights splits none")
    }
    /// Holds memory of the host in place, for copies at full speed, as long as the result lives; None
    /// where that is of no use, or refused.
    ///
    /// # Safety
    /// So many bytes are there, and stay there as long.
    unsafe fn pin(&self, _memory: *mut c_void, _bytes: usize) -> Option<Box<dyn Send + Sync>> {
        None
    }
    /// Copies the master values of a parameter, in f32, to where it lies in a buffer that is laid
    /// out as they are.
    fn put_aside(&self, from: &Self::Weights, slot: Slot, to: &mut Self::F32);
    /// Copies them back, to master values in f32; copies that kernels read follow.
    fn put_back(&self, from: &Self::F32, slot: Slot, to: &mut Self::Weights);
    /// Copies the first `len` bytes of a buffer to another.
    fn copy_bytes(&self, from: &Self::Bytes, len: usize, to: &mut Self::Bytes);
    /// Sets every element to 0.
    fn zero_tensor(&self, buffer: &mut Self::Tensor);
    /// Sets every element to 0.
    fn zero_gradient(&self, gradient: Self::Gradient<'_>);
}
