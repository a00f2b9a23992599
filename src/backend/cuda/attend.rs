//! Causal attention: `attend_sm90.cu` for Hopper's warpgroup products, `attend_sm80.cu` for
//! everything else from Ampere on, `attend_plain.cu` in plain arithmetic for f32 and odd head
//! sizes. Tests run all of them on a Hopper chip.

use super::device::gpu::Gpu;
use super::device::launch;
use super::device::memory::{F32, Tensor};
use super::{Cuda, Workspace, kernel};
use crate::backend::{Attend, AttentionBackward, AttentionShape, Documents, Precision};

/// `Heads` of the kernels.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct Heads {
    length: u32,
    heads: u32,
    kv_heads: u32,
    per_kv_head: u32,
    head_size: u32,
    score_factor: f32,
}

impl From<AttentionShape> for Heads {
    fn from(shape: AttentionShape) -> Self {
        let [length, heads, kv_heads] =
            [shape.sequences.length, shape.heads, shape.kv_heads].map(|n| n as u32);
        let [per_kv_head, head_size] =
            [shape.heads_per_kv_head(), shape.head_size].map(|n| n as u32);
        let score_factor = shape.score_factor;
        Self { length, heads, kv_heads, per_kv_head, head_size, score_factor }
    }
}

/// `PackedHeads` of the kernels.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct PackedHeads {
    heads: Heads,
    bounds: u64,
    rows: u32,
    unused: u32,
}

impl PackedHeads {
    /// Of documents whose words lie there.
    pub(super) fn new(shape: AttentionShape, bounds: u64) -> Self {
        let rows = shape.sequences.rows() as u32;
        Self { heads: shape.into(), bounds, rows, unused: 0 }
    }
}

/// The most channels of a head that any kernel takes.
pub(super) const MAX_HEAD_SIZE: usize = 256;

/// Sizes of the tensor-core kernels for heads of up to `width` channels.
struct Flash {
    width: usize,
    forward: Kernel,
    dkdv: Kernel,
    dq: Kernel,
}

/// Names, without documents and with them, rows that a block owns, its threads, and its bytes of
/// shared memory.
struct Kernel([&'static str; 2], usize, usize, usize);

/// The names of a kernel, of which this is all but what its sequences are.
macro_rules! names {
    ($begun:literal) => {
        [concat!($begun, ">"), concat!($begun, ",PackedHeads>")]
    };
}

/// From Ampere on.
const MMA: [Flash; 2] = [
    Flash {
        width: 64,
        forward: Kernel(names!("flash_forward<64,4,2,64"), 128, 128, 8 * 64 * 64),
        dkdv: Kernel(names!("flash_dkdv<64,4,64"), 64, 128, 64 * 4 * 64 + 8 * 64 * 64 + 16 * 64),
        dq: Kernel(names!("flash_dq<64,4,64"), 64, 128, 64 * 4 * 64 + 8 * 64 * 64),
    },
    Flash {
        width: 128,
        forward: Kernel(names!("flash_forward<128,8,1,64"), 128, 256, 8 * 64 * 128),
        dkdv: Kernel(names!("flash_dkdv<128,4,32"), 64, 128, 64 * 4 * 128 + 8 * 32 * 128 + 16 * 32),
        dq: Kernel(names!("flash_dq<128,4,32"), 64, 128, 64 * 4 * 128 + 8 * 32 * 128),
    },
];

/// On Hopper: two warpgroups, steps of 64 rows.
const WGMMA: [Flash; 2] = [
    Flash {
        width: 64,
        forward: Kernel(names!("wgmma_forward<64,2,64,2"), 128, 256, (256 + 768) * 64 + 1024),
        dkdv: Kernel(names!("wgmma_dkdv<64,2"), 128, 256, (512 + 768) * 64 + 1536 + 1024),
        dq: Kernel(names!("wgmma_dq<64,2,64"), 128, 256, (512 + 768) * 64 + 1024),
    },
    Flash {
        width: 128,
        forward: Kernel(names!("wgmma_forward<128,2,64,1"), 128, 256, (256 + 768) * 128 + 1024),
        dkdv: Kernel(names!("wgmma_dkdv<128,2"), 128, 256, (512 + 768) * 128 + 1536 + 1024),
        dq: Kernel(names!("wgmma_dq<128,2,64"), 128, 256, (512 + 768) * 128 + 1024),
    },
];

/// The tensor-core kernels for activations like `qkv`, where they take them.
fn flash(gpu: &Gpu, qkv: &Tensor, shape: AttentionShape) -> Option<&'static Flash> {
    let kernels = if gpu.capability == (9, 0) { &WGMMA } else { &MMA };
    let taken = qkv.precision == Precision::Bf16 && shape.head_size.is_multiple_of(8);
    kernels.iter().find(|flash| taken && shape.head_size <= flash.width)
}

/// One block for so many rows of each of these heads of every sequence.
fn grid(shape: AttentionShape, heads: usize, rows: usize) -> [usize; 3] {
    [shape.sequences.length.div_ceil(rows), heads, shape.sequences.batch]
}

impl Attend for Cuda {
    fn attention_forward(
        &self,
        _workspace: &mut Workspace,
        out: &mut Tensor,
        lse: &mut F32,
        qkv: &Tensor,
        documents: Option<Documents<'_, Self>>,
        shape: AttentionShape,
    ) {
        let names =
            [kernel!(qkv, "attention_forward"), kernel!(qkv, "attention_forward", "PackedHeads")];
        let plain = Kernel(names, 4, 128, 16 * shape.head_size);
        let Kernel([name, packed], rows, block, shared) =
            *flash(&self.gpu, qkv, shape).map_or(&plain, |flash| &flash.forward);
        let mut out = out.write();
        let (amax, grid) = (out.amax(), grid(shape, shape.heads, rows));
        match documents {
            None => {
                launch!(self.gpu, name, grid, block, shared;
                out.address, lse.address(), amax, qkv.address(), Heads::from(shape));
            }
            Some(documents) => {
                launch!(self.gpu, packed, grid, block, shared;
                out.address, lse.address(), amax, qkv.address(),
                PackedHeads::new(shape, documents.ids()));
            }
        }
    }

    fn attention_backward(
        &self,
        workspace: &mut Workspace,
        AttentionBackward { dqkv, dout, out, lse, qkv, documents }: AttentionBackward<'_, Self>,
        shape: AttentionShape,
    ) {
        let (heads, delta) = (Heads::from(shape), workspace.delta.address);
        let rows = shape.sequences.rows();
        launch!(self.gpu, kernel!(qkv, "attention_delta"), [rows.div_ceil(4), 1, 1], 128, 0;
            delta, dout.address(), out.address(), rows as u32, heads);
        let shared = 32 * shape.head_size;
        let plain = [
            [kernel!(qkv, "attention_dkdv"), kernel!(qkv, "attention_dkdv", "PackedHeads")],
            [kernel!(qkv, "attention_dq"), kernel!(qkv, "attention_dq", "PackedHeads")],
        ];
        let plain = plain.map(|names| Kernel(names, 4, 128, shared));
        let [dkdv, dq] = &plain;
        let kernels =
            flash(&self.gpu, qkv, shape).map_or([dkdv, dq], |flash| [&flash.dkdv, &flash.dq]);
        let mut dqkv = dqkv.write();
        let amax = dqkv.amax();
        let heads_of = [shape.kv_heads, shape.heads];
        for (Kernel([name, packed], rows, block, shared), heads_of) in
            kernels.into_iter().zip(heads_of)
        {
            let grid = grid(shape, heads_of, *rows);
            match documents {
                None => {
                    launch!(self.gpu, name, grid, *block, *shared;
                    dqkv.address, amax, dout.address(), lse.address(), delta, qkv.address(), heads);
                }
                Some(documents) => {
                    launch!(self.gpu, packed, grid, *block, *shared;
                    dqkv.address, amax, dout.address(), lse.address(), delta, qkv.address(),
                    PackedHeads::new(shape, documents.ids()));
                }
            }
        }
    }
}
