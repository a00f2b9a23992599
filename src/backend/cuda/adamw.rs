//! The end of a step: the sum of losses, the global norm of the gradients, clipping and AdamW, for all
//! parameters at once.
//!
//! The update looks at loss and norm on the device, so that the host waits only once a step, for both
//! numbers together.

use bytemuck::{Pod, Zeroable};
use cudarc::driver::sys;

use super::gpu::launch;
use super::memory::{Arena, F32, Param, Piece, Upload};
use super::{Cuda, Workspace};
use crate::Result;
use crate::backend::{AdamWStep, StepSums, Trained, VisitTrained};

/// Elements of a piece of work, as in the kernels.
const PIECE: usize = 4096;
/// Blocks that sum squares, and with that the number of partial sums.
const PARTS: usize = 1024;
const BLOCK: usize = 256;

/// Where a parameter and what belongs to it lies: `Entry` of the kernels.
#[derive(Clone, Copy, PartialEq, Pod, Zeroable)]
#[repr(C)]
struct Entry {
    param: u64,
    copy: u64,
    m: u64,
    v: u64,
    gradient: u64,
    len: u64,
    first_piece: u64,
    decays: u64,
    most: u64,
}

/// `Step` of the kernels.
#[derive(Clone, Copy)]
#[repr(C)]
struct Step {
    lr: f32,
    beta1: f32,
    beta2: f32,
    epsilon: f32,
    weight_decay: f32,
    size: f32,
    root: f32,
    clip: f32,
    loss_scale: f32,
}

/// What the steps of a trainer need besides the moments.
pub(crate) struct Optimizer {
    /// One [`Entry`] a parameter.
    table: Piece,
    upload: Upload,
    /// What the table holds.
    entries: Vec<Entry>,
    /// What it is to hold.
    wanted: Vec<Entry>,
    /// Pieces of all parameters.
    pieces: u64,
    /// ([`PARTS`]) f64.
    partials: Piece,
    /// Four f64: losses, squares, raised blocks, and the losses of an evaluation.
    sums: Piece,
}

impl Optimizer {
    pub(super) fn new(arena: &mut Arena, parameters: usize) -> Result<Self> {
        let bytes = parameters * size_of::<Entry>();
        let what = "a table of the parameters";
        Ok(Self {
            table: arena.bytes(bytes),
            upload: arena.upload(bytes / 4),
            entries: arena.on_host(what, parameters)?,
            wanted: arena.on_host(what, parameters)?,
            pieces: 0,
            partials: arena.bytes(PARTS * 8),
            sums: arena.bytes(4 * 8),
        })
    }

    /// Uploads the table, if it changed since the last step.
    fn update_table(&mut self, parameters: &mut VisitTrained<'_, Cuda>) {
        self.wanted.clear();
        let mut pieces = 0;
        parameters(&mut |parameter| {
            let Trained { param, m, v, gradient, decays } = parameter;
            let len = param.master.len;
            self.wanted.push(Entry {
                param: param.master.address(),
                copy: param.copy.address,
                m: m.address(),
                v: v.address(),
                gradient: gradient.address(),
                len: len as u64,
                first_piece: pieces,
                decays: u64::from(decays),
                most: param.most.address,
            });
            pieces += len.div_ceil(PIECE) as u64;
        });
        self.pieces = pieces;
        if self.wanted != self.entries {
            let words: &[u32] = bytemuck::cast_slice(&self.wanted);
            self.upload.send(self.table.address, words.len(), |to| to.copy_from_slice(words));
            std::mem::swap(&mut self.entries, &mut self.wanted);
        }
    }

    fn grid(&self, cuda: &Cuda) -> [usize; 3] {
        let most = 8 * cuda.gpu.multiprocessors as usize;
        [(self.pieces as usize).min(most), 1, 1]
    }

    fn sum(&self, index: u64) -> u64 {
        self.sums.address + 8 * index
    }
}

pub(super) fn add_losses(
    cuda: &Cuda,
    optimizer: &Optimizer,
    losses: &F32,
    rows: usize,
    accumulate: bool,
) {
    launch!(cuda.gpu, "sum_losses", [1, 1, 1], 1024, 0;
        optimizer.sum(0), losses.address(), rows as u32, u32::from(accumulate));
}

pub(super) fn finish_step(
    cuda: &Cuda,
    workspace: &Workspace,
    optimizer: &mut Optimizer,
    parameters: &mut VisitTrained<'_, Cuda>,
    step: &AdamWStep,
) -> Result<StepSums> {
    optimizer.update_table(parameters);
    let (table, entries) = (optimizer.table.address, optimizer.entries.len() as u32);
    let (partials, sums) = (optimizer.partials.address, optimizer.sum(0));
    launch!(cuda.gpu, "square_gradients", [PARTS, 1, 1], BLOCK, 0;
        partials, table, entries, optimizer.pieces);
    let correction = |beta: f32| 1.0 - f64::from(beta).powf(step.t as f64);
    let factors = Step {
        lr: step.lr,
        beta1: step.beta1,
        beta2: step.beta2,
        epsilon: step.epsilon,
        weight_decay: step.weight_decay,
        size: (f64::from(step.lr) / correction(step.beta1)) as f32,
        root: (1.0 / correction(step.beta2).sqrt()) as f32,
        clip: step.clip,
        loss_scale: step.loss_scale,
    };
    launch!(cuda.gpu, "sum_squares", [1, 1, 1], BLOCK, 0;
        sums, workspace.raised.address, partials, PARTS as u32, table, entries, factors);
    launch!(cuda.gpu, "adamw", optimizer.grid(cuda), BLOCK, 0;
        table, entries, optimizer.pieces, sums, factors);
    let [losses, squares, raised] = read(cuda, sums)?;
    Ok(StepSums { losses, squares, raised_blocks: raised as u64 })
}

pub(super) fn sum_losses(
    cuda: &Cuda,
    optimizer: &Optimizer,
    losses: &F32,
    rows: usize,
) -> Result<f64> {
    launch!(cuda.gpu, "sum_losses", [1, 1, 1], 1024, 0;
        optimizer.sum(3), losses.address(), rows as u32, 0u32);
    let [sum] = read(cuda, optimizer.sum(3))?;
    Ok(sum)
}

/// Makes the bf16 copy of a parameter that was written.
pub(super) fn copy_to_bf16(cuda: &Cuda, param: &Param) {
    let len = param.master.len;
    cuda.clear(param.most.address, 4);
    launch!(cuda.gpu, "copy_to_bf16", [len.div_ceil(BLOCK), 1, 1], BLOCK, 0;
        param.copy.address, param.most.address, param.master.address(), len as u64);
}

/// Waits for the device and reads N numbers.
fn read<const N: usize>(cuda: &Cuda, from: u64) -> Result<[f64; N]> {
    let mut numbers = [0.0; N];
    // SAFETY: the sums are that long, and `numbers` outlives the wait.
    let result = unsafe {
        sys::cuMemcpyDtoHAsync_v2(numbers.as_mut_ptr().cast(), from, 8 * N, cuda.gpu.stream())
    };
    cuda.gpu.note("reading sums", result);
    cuda.gpu.synchronize()?;
    Ok(numbers)
}
