//! Scratch memory of operations: packed operands, and elements as an operation or each thread needs
//! them.
//!
//! An operation says what it needs, in its function `scratch`, and takes it from here. A workspace
//! knows no operation: it has room for the most that any asks for, because no two run at once.

use rayon::prelude::*;

use super::arena::{Arena, Buffer};
use super::gemm::{PackMemory, PackSize};
use super::quantize::{ValueMemory, ValueSize};

/// Scratch memory for models of one shape.
pub struct Workspace {
    /// Operand A of a product.
    pub(super) a: PackMemory,
    /// Operands B: one for each that is kept at a time.
    pub(super) b: [PackMemory; 3],
    /// Operands A and B in numbers, and what the forward pass dequantized of one.
    pub(super) values: [ValueMemory; 3],
    pub(super) elements: Buffer<f32>,
    pub(super) merge: MergeMemory,
    /// (threads, elements of a thread)
    of_threads: Buffer<f32>,
    thread_len: usize,
}

/// What an operation needs of a [`Workspace`], field by field.
#[derive(Clone, Copy, Default)]
pub(super) struct ScratchSize {
    pub(super) a: PackSize,
    pub(super) b: [PackSize; 3],
    pub(super) values: [ValueSize; 3],
    pub(super) elements: usize,
    pub(super) merge: MergeSize,
    /// Elements of each thread.
    pub(super) of_thread: usize,
}

impl ScratchSize {
    /// Room for either of two operations.
    pub(super) fn max(self, other: Self) -> Self {
        let mut b = self.b;
        b.iter_mut().zip(other.b).for_each(|(b, other)| *b = b.max(other));
        let mut values = self.values;
        values.iter_mut().zip(other.values).for_each(|(v, other)| *v = v.max(other));
        Self {
            a: self.a.max(other.a),
            b,
            values,
            elements: self.elements.max(other.elements),
            merge: self.merge.max(other.merge),
            of_thread: self.of_thread.max(other.of_thread),
        }
    }
}

impl Workspace {
    pub(super) fn of_size(arena: &mut Arena, size: ScratchSize, threads: usize) -> Self {
        Self {
            a: PackMemory::new(arena, size.a),
            b: size.b.map(|size| PackMemory::new(arena, size)),
            values: size.values.map(|ValueSize { values, scales, sums }| ValueMemory {
                values: arena.alloc(values),
                scales: arena.alloc(scales),
                sums: arena.alloc(sums),
            }),
            elements: arena.alloc(size.elements),
            merge: MergeMemory::new(arena, size.merge),
            of_threads: arena.alloc(threads * size.of_thread),
            thread_len: size.of_thread,
        }
    }

    /// The elements of each thread.
    pub(super) fn of_threads(&mut self) -> impl IndexedParallelIterator<Item = &mut [f32]> {
        self.of_threads.par_chunks_exact_mut(self.thread_len)
    }
}

/// What channels are merged in.
pub(super) struct MergeMemory {
    /// (L, T)
    pub(super) projections: Buffer<i8>,
    /// (B, C)
    pub(super) hashes: Buffer<u64>,
    /// (B, C): the channels of a sequence by hash.
    pub(super) order: Buffer<u32>,
}

/// How much of it.
#[derive(Clone, Copy, Default)]
pub(super) struct MergeSize {
    pub(super) entries: usize,
    pub(super) channels: usize,
}

impl MergeSize {
    /// Room for either.
    fn max(self, other: Self) -> Self {
        let (entries, channels) =
            (self.entries.max(other.entries), self.channels.max(other.channels));
        Self { entries, channels }
    }
}

impl MergeMemory {
    fn new(arena: &mut Arena, MergeSize { entries, channels }: MergeSize) -> Self {
        Self {
            projections: arena.alloc(entries),
            hashes: arena.alloc(channels),
            order: arena.alloc(channels),
        }
    }
}
