//! A few rows behind those whose keys and values are kept: `decode.cu`, and `attend_behind.cu` for
//! attention. Weights in f32 and bf16 are read where they lie; those in MXFP4 are made once.
//!
//! What a row's numbers are summed in does not depend on how many come with it, so a text has the same
//! bits however it comes. It is another order than that of cuBLASLt's products in training.

use std::ops::Range;

use super::attend::Heads;
use super::device::launch;
use super::device::memory::{Arena, F32, Param, Piece, Tensor};
use super::embed::Tokens;
use super::rotary::Places;
use super::{Cuda, Workspace, kernel, rotary, swiglu};
use crate::backend::{
    Activation, AttentionShape, Decode, DecoderWeights, EmbeddingShape, Epilogue, HeadShape,
    LinearForward, LinearShape, Memory, OfSequence, Precision,
};
use crate::formats::BLOCK;
use crate::optim::Master;
use crate::{Error, Result};

/// `WARPS` of the kernels of products.
const WARPS: usize = 8;
/// Threads of a block of theirs.
const THREADS: usize = 32 * WARPS;
/// Rows from which on a block takes several times eight of them.
const SEVERAL: usize = 9;
/// Rows from which on they may be many, beside W in bf16 and in MXFP4, and blocks of those. NOTE: on
/// an H200 100 rows with W in bf16 of (8192, 2048) took 26 us in place of 32, and of (6144, 2048),
/// which is 96 blocks, 27 as well; in MXFP4, which is decoded first, 35 in place of 33 and 32 of 26,
/// and 192 rows 45 of 50 and 42 of 42.
const MANY: [usize; 2] = [65, 192];
const ENOUGH_BLOCKS: usize = 96;
/// `STAGES` of the kernel of many rows.
const STAGES: usize = 4;
/// Inputs of a chunk in MXFP4, of which lines are whole, and of a chunk in bf16.
const CHUNK: usize = 64;
const CHUNK_OF_BF16: usize = 32;
/// `TILE` of the kernel that keeps rows.
const TILE: usize = 64;
/// Inputs of a stage of many rows.
const INPUTS_OF_STAGE: usize = 64;

/// A weight as products of few rows read it.
pub(crate) enum Packed {
    /// Where and as it lies.
    Plain,
    /// Codes (outputs, inputs / 2) and scales (outputs, inputs / 32), inputs in whole chunks.
    Mxfp4 {
        /// Two in a byte.
        codes: Piece,
        /// A byte each.
        scales: Piece,
    },
}

/// `FewRows` of the kernels.
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub(super) struct FewRows {
    pub(super) y: u64,
    pub(super) activated: u64,
    pub(super) x: u64,
    pub(super) w: u64,
    pub(super) scales: u64,
    pub(super) bias: u64,
    pub(super) rows: u32,
    pub(super) inputs: u32,
    pub(super) outputs: u32,
    pub(super) form: u32,
}

/// `PackMxfp4` of the kernels.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct PackMxfp4 {
    pub(super) codes: u64,
    pub(super) scales: u64,
    pub(super) w: u64,
    pub(super) inputs: u32,
    pub(super) outputs: u32,
}

/// `Behind` of the kernels.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct Behind {
    pub(super) out: u64,
    pub(super) qkv: u64,
    pub(super) kept: u64,
    pub(super) start: u64,
    pub(super) rows: u32,
    pub(super) positions: u32,
    pub(super) keeps: u32,
    pub(super) heads: Heads,
}

/// What a product of few rows is launched as.
pub(super) struct Few {
    /// Of the template.
    pub(super) kernel: &'static str,
    pub(super) grid: [usize; 3],
    /// Threads of a block.
    pub(super) block: usize,
    /// Bytes of shared memory.
    pub(super) shared: usize,
    /// What is done first, of many rows.
    pub(super) lay_out: Option<LayOut>,
}

/// What makes the left operand of a product of many rows, launched in blocks of [`THREADS`].
#[derive(Clone, Copy)]
pub(super) struct LayOut {
    /// Of the template.
    pub(super) kernel: &'static str,
    /// Whether it is x, in bf16; else W, in MXFP4.
    pub(super) of_x: bool,
    /// Rows or outputs.
    pub(super) lines: usize,
    chunks: usize,
    chunk: usize,
}

impl LayOut {
    fn new(LinearShape { rows, inputs, outputs }: LinearShape, in_mxfp4: bool) -> Self {
        let (kernel, lines, chunk) = match in_mxfp4 {
            true => ("lay_out<OfMxfp4>", outputs, CHUNK),
            false => ("lay_out<OfBf16>", rows, CHUNK_OF_BF16),
        };
        Self { kernel, of_x: !in_mxfp4, lines, chunks: inputs.div_ceil(chunk), chunk }
    }

    pub(super) fn grid(&self) -> [usize; 3] {
        [(self.lines.div_ceil(16) * self.chunks).div_ceil(WARPS), 1, 1]
    }

    /// What it makes.
    pub(super) fn bytes(&self) -> usize {
        self.lines.next_multiple_of(16) * self.chunks * self.chunk * 2
    }
}

impl Few {
    /// In bf16, or with weights in MXFP4, and results in f32 where these are `logits`.
    pub(super) fn on_tensor_cores(shape: LinearShape, in_mxfp4: bool, logits: bool) -> Self {
        if !logits && Self::are_many(shape, in_mxfp4) {
            return Self::of_many(shape, in_mxfp4);
        }
        let several = shape.rows >= SEVERAL;
        // Chunks that a warp asks for at once: all that it has, where registers hold them.
        let kernel = match (in_mxfp4, logits, several, shape.inputs) {
            (false, false, false, ..=1024) => "few_rows<OfBf16,bf16,1,1,4>",
            (false, false, false, ..=2048) => "few_rows<OfBf16,bf16,1,1,8>",
            (false, false, false, _) => "few_rows<OfBf16,bf16,1,1,12>",
            (false, false, true, _) => "few_rows<OfBf16,bf16,2,8,1>",
            (false, true, false, ..=1024) => "few_rows<OfBf16,float,1,1,4>",
            (false, true, false, _) => "few_rows<OfBf16,float,1,1,8>",
            (false, true, true, _) => "few_rows<OfBf16,float,2,8,1>",
            (true, false, false, ..=2048) => "few_rows<OfMxfp4,bf16,1,1,4>",
            (true, false, false, _) => "few_rows<OfMxfp4,bf16,1,1,8>",
            (true, false, true, _) => "few_rows<OfMxfp4,bf16,2,8,1>",
            (true, true, false, _) => "few_rows<OfMxfp4,float,1,1,4>",
            (true, true, true, _) => "few_rows<OfMxfp4,float,2,8,1>",
        };
        let [outputs, rows] = if several { [32, 64] } else { [16, 8] };
        Self {
            kernel,
            grid: [shape.outputs.div_ceil(outputs), shape.rows.div_ceil(rows), 1],
            block: THREADS,
            shared: WARPS * rows * (outputs + 4) * 4,
            lay_out: None,
        }
    }

    /// Outputs and rows of a block of many.
    const OF_MANY: [usize; 2] = [64, 128];

    fn are_many(LinearShape { rows, outputs, .. }: LinearShape, in_mxfp4: bool) -> bool {
        let blocks = outputs.div_ceil(Self::OF_MANY[0]) * rows.div_ceil(Self::OF_MANY[1]);
        let enough = rows >= MANY[usize::from(in_mxfp4)] && blocks >= ENOUGH_BLOCKS;
        enough && outputs.is_multiple_of(8)
    }

    /// As [`Few::on_tensor_cores`], for many rows.
    pub(super) fn of_many(shape: LinearShape, in_mxfp4: bool) -> Self {
        let [outputs, rows] = Self::OF_MANY;
        let grid = [shape.outputs.div_ceil(outputs), shape.rows.div_ceil(rows), 1];
        let stage = (outputs + rows) * INPUTS_OF_STAGE * 2;
        let shared = (STAGES * stage).max(rows * (outputs + 4) * 4);
        let kernel = match in_mxfp4 {
            true => "many_rows<false,4,2,8,2,2>",
            false => "many_rows<true,2,4,4,2,2>",
        };
        let lay_out = Some(LayOut::new(shape, in_mxfp4));
        Self { kernel, grid, block: 128, shared, lay_out }
    }

    /// Bytes that are laid out for a layer's products of up to so many rows.
    pub(super) fn laid_out(
        shape: LinearShape,
        weights: DecoderWeights,
        precision: Precision,
    ) -> usize {
        let in_mxfp4 = weights == DecoderWeights::Mxfp4;
        match precision == Precision::Bf16 && Self::are_many(shape, in_mxfp4) {
            true => LayOut::new(shape, in_mxfp4).bytes(),
            false => 0,
        }
    }

    /// In f32.
    pub(super) fn in_f32(shape: LinearShape) -> Self {
        if !shape.inputs.is_multiple_of(4) {
            return Self::plain("few_rows_plain<float,float>", shape);
        }
        let (kernel, [outputs, rows]) = match shape.rows {
            1 => ("few_rows_f32<1,1,1,8>", [WARPS, 1]),
            2..SEVERAL => ("few_rows_f32<1,8,1,4>", [WARPS, 8]),
            _ => ("few_rows_f32<4,8,2,1>", [4 * WARPS / 2, 16]),
        };
        let grid = [shape.outputs.div_ceil(outputs), shape.rows.div_ceil(rows), 1];
        Self { kernel, grid, block: THREADS, shared: 0, lay_out: None }
    }

    /// In plain arithmetic.
    pub(super) fn plain(kernel: &'static str, shape: LinearShape) -> Self {
        let grid = [shape.outputs.div_ceil(WARPS), shape.rows.div_ceil(8), 1];
        Self { kernel, grid, block: THREADS, shared: 0, lay_out: None }
    }
}

/// What attention of few rows in bf16 is launched as; None where tensor cores do not take the heads.
pub(super) fn attention_on_tensor_cores(head_size: usize) -> Option<(&'static str, [usize; 2])> {
    // The kernel, its threads and its bytes of shared memory.
    let of = |name, width: usize, warps: usize| (name, [32 * warps, warps * 16 * (width + 2) * 4]);
    match head_size {
        size if !size.is_multiple_of(8) || size > 128 => None,
        ..=64 => Some(of("attend_behind<64,16>", 64, 16)),
        _ => Some(of("attend_behind<128,8>", 128, 8)),
    }
}

/// The grid of what keeps rows, [`TILE`] of them and of channels a block.
pub(super) fn keep_grid(rows: usize, shape: AttentionShape) -> [usize; 3] {
    [rows.div_ceil(TILE), shape.kv_heads * shape.head_size.div_ceil(TILE), 1]
}

/// Channels of keys, and of values.
fn kept_channels(shape: AttentionShape) -> usize {
    shape.kv_heads * shape.head_size
}

/// Positions that there is room for, in whole blocks of keys.
pub(super) fn whole_positions(positions: usize) -> usize {
    positions.next_multiple_of(32)
}

/// Where the positions lie that are written behind `rows` tokens.
fn starts_of(tokens: &Tokens, rows: usize) -> u64 {
    tokens.ids() + 4 * rows as u64
}

impl Cuda {
    fn few_rows(
        &self,
        workspace: &Workspace,
        (to, in_f32): (FewRows, bool),
        x: &Tensor,
        (w, packed): (&Param<'_>, &Packed),
        shape: LinearShape,
    ) {
        let few = match packed {
            Packed::Mxfp4 { .. } => Few::on_tensor_cores(shape, true, in_f32),
            Packed::Plain if x.precision == Precision::F32 => Few::in_f32(shape),
            Packed::Plain if shape.inputs.is_multiple_of(8) => {
                Few::on_tensor_cores(shape, false, in_f32)
            }
            Packed::Plain if in_f32 => Few::plain("few_rows_plain<bf16,float>", shape),
            Packed::Plain => Few::plain("few_rows_plain<bf16,bf16>", shape),
        };
        let [w, scales] = match packed {
            Packed::Plain => [w.as_read_in(x.precision), 0],
            Packed::Mxfp4 { codes, scales } => [codes.address, scales.address],
        };
        let LinearShape { rows, inputs, outputs } = shape;
        let [rows, inputs, outputs] = [rows, inputs, outputs].map(|n| n as u32);
        let mut of_all = FewRows { w, scales, rows, inputs, outputs, ..to };
        if let Some(lay_out) = few.lay_out {
            let room = &workspace.right.elements;
            let lines = lay_out.lines as u32;
            let w = if lay_out.of_x { to.x } else { w };
            let of_lines = FewRows { y: room.address, w, outputs: lines, ..of_all };
            launch!(self.gpu, lay_out.kernel, lay_out.grid(), THREADS, 0; of_lines);
            *if lay_out.of_x { &mut of_all.x } else { &mut of_all.w } = room.address;
        }
        launch!(self.gpu, few.kernel, few.grid, few.block, few.shared; of_all);
    }
}

impl Decode for Cuda {
    type Packed = Packed;

    // NOTE: a pass costs some hundred launches, whatever its rows.
    const ROWS: usize = 1024;

    fn activations_in(weights: DecoderWeights, master: Master) -> Precision {
        match (weights, master) {
            (DecoderWeights::F32, Master::F32) => Precision::F32,
            _ => Precision::Bf16,
        }
    }

    fn decodes(&self, shape: LinearShape, weights: DecoderWeights) -> Result<()> {
        let inputs = shape.inputs;
        if weights == DecoderWeights::Mxfp4 && !inputs.is_multiple_of(8) {
            return Err(Error::Unsupported {
                what: format!("weights in MXFP4 of layers of {inputs} channels on a GPU"),
                remedy: "use channels that are a multiple of 8, weights in bf16, or device cpu"
                    .into(),
            });
        }
        Ok(())
    }

    fn packed(
        &self,
        arena: &mut Arena,
        LinearShape { inputs, outputs, .. }: LinearShape,
        weights: DecoderWeights,
    ) -> Packed {
        if weights != DecoderWeights::Mxfp4 {
            return Packed::Plain;
        }
        let elements = outputs * inputs.next_multiple_of(CHUNK);
        Packed::Mxfp4 { codes: arena.bytes(elements / 2), scales: arena.bytes(elements / BLOCK) }
    }

    fn packed_head(
        &self,
        arena: &mut Arena,
        shape: LinearShape,
        weights: DecoderWeights,
    ) -> Packed {
        self.packed(arena, shape, weights)
    }

    fn pack_weight(
        &self,
        packed: &mut Packed,
        w: Param<'_>,
        LinearShape { inputs, outputs, .. }: LinearShape,
    ) {
        let Packed::Mxfp4 { codes, scales } = packed else { return };
        let (source, precision) = w.source();
        let blocks = outputs * inputs.next_multiple_of(CHUNK) / BLOCK;
        let of_all = PackMxfp4 {
            codes: codes.address,
            scales: scales.address,
            w: source,
            inputs: inputs as u32,
            outputs: outputs as u32,
        };
        let name = match precision {
            Precision::F32 => "pack_mxfp4<float>",
            Precision::Bf16 => "pack_mxfp4<bf16>",
        };
        launch!(self.gpu, name, [blocks.div_ceil(128), 1, 1], 128, 0; of_all);
    }

    fn packed_forward(
        &self,
        workspace: &mut Workspace,
        LinearForward { y, x, w, b, mut epilogue, .. }: LinearForward<'_, Self>,
        packed: &Packed,
        shape: LinearShape,
    ) {
        let bias = b.map_or(0, |b| b.as_read_in(x.precision));
        let (activated, form) = match &mut epilogue {
            Epilogue::None | Epilogue::SwiGlu { .. } => (0, 0),
            Epilogue::Gelu { out, form: Activation::GeluTanh } => (out.write().address, 1),
            Epilogue::Gelu { out, form: Activation::Gelu } => (out.write().address, 2),
        };
        let to = FewRows {
            y: y.write().address,
            activated,
            x: x.address(),
            bias,
            form,
            ..FewRows::default()
        };
        self.few_rows(workspace, (to, false), x, (&w, packed), shape);
        // NOTE: gate and up of a channel are far apart in y, so that no block has both.
        if let Epilogue::SwiGlu { out } = epilogue {
            swiglu::forward(self, out, y, shape.rows, shape.outputs / 2);
        }
    }

    fn packed_logits(
        &self,
        workspace: &mut Workspace,
        logits: &mut F32,
        (x, rows): (&Tensor, Range<usize>),
        (head, packed): (Param<'_>, &Packed),
        HeadShape { channels, vocab_size, .. }: HeadShape,
    ) {
        let shape = LinearShape { rows: rows.len(), inputs: channels, outputs: vocab_size };
        let from = x.at(rows.start * channels);
        let to = FewRows { y: logits.address(), x: from, ..FewRows::default() };
        self.few_rows(workspace, (to, true), x, (&head, packed), shape);
    }

    fn rows(&self, arena: &mut Arena, rows: usize) -> Result<Tokens> {
        // Behind them is where they stand.
        self.tokens(arena, 2 * rows, false)
    }

    fn write_rows(&self, to: &mut Tokens, tokens: &[u32], starts: &[usize]) {
        to.write(tokens.len() + starts.len(), |words| {
            let (ids, of_starts) = words.split_at_mut(tokens.len());
            ids.copy_from_slice(tokens);
            of_starts.iter_mut().zip(starts).for_each(|(word, start)| *word = *start as u32);
        });
    }

    fn embedding_behind(
        &self,
        out: &mut Tensor,
        (tokens, starts): (&Tokens, &[usize]),
        wte: Param<'_>,
        wpe: Option<Param<'_>>,
        EmbeddingShape { sequences, channels }: EmbeddingShape,
    ) {
        // Every pass begins here.
        out.begin_pass(&self.gpu);
        let rows = sequences.rows();
        let wte = wte.as_read_in(out.precision);
        let wpe = wpe.map_or(0, |wpe| wpe.as_read_in(out.precision));
        launch!(self.gpu, kernel!(out, "embed_rows"), [rows, 1, 1], 128, 0;
            out.write().address, tokens.ids(), starts_of(tokens, rows), wte, wpe, channels as u32,
            u32::from(starts.len() > 1));
    }

    fn rotations_behind(
        &self,
        table: &mut Tensor,
        frequencies: &[f32],
        (tokens, starts): (&Tokens, &[usize]),
        AttentionShape { sequences, .. }: AttentionShape,
    ) {
        let rows = sequences.rows();
        let places = Places::Behind { starts: starts_of(tokens, rows), of_each: starts.len() > 1 };
        rotary::find(self, table, frequencies, rows, places);
    }

    fn kept(&self, arena: &mut Arena, positions: usize, shape: AttentionShape) -> Tensor {
        arena.tensor(2 * whole_positions(positions) * kept_channels(shape), shape.precision)
    }

    fn copy_kept(&self, from: &Tensor, to: &mut Tensor) {
        self.copy(from.address(), from.bytes(), to.write().address);
    }

    fn attention_behind(
        &self,
        _workspace: &mut Workspace,
        out: &mut Tensor,
        qkv: &Tensor,
        kept: &mut Tensor,
        (tokens, OfSequence { all, first, start }): (&Tokens, OfSequence),
        shape: AttentionShape,
    ) {
        let rows = shape.sequences.length;
        assert!(shape.sequences.batch == 1, "rows are of one sequence");
        // As it was made, for so many positions.
        let positions = kept.len / (2 * kept_channels(shape));
        assert!(start + rows <= positions, "there is room for rows");
        let on_tensor_cores = Some(qkv.precision)
            .filter(|precision| *precision == Precision::Bf16)
            .and_then(|_| attention_on_tensor_cores(shape.head_size));
        // Rows of one block alone are kept by the block itself.
        let keeps = on_tensor_cores.is_some() && rows <= 16;
        let of_all = Behind {
            out: out.write().at(first * shape.channels()),
            qkv: qkv.at(first * shape.qkv_channels()),
            kept: kept.write().address,
            // A piece with rows before it is one row, and has a place of its own.
            start: starts_of(tokens, all + first),
            rows: rows as u32,
            positions: positions as u32,
            keeps: u32::from(keeps),
            heads: Heads::from(shape),
        };
        if !keeps {
            let grid = keep_grid(rows, shape);
            launch!(self.gpu, kernel!(qkv, "keep_rows"), grid, 256, 0; of_all);
        }
        match on_tensor_cores {
            Some((name, [threads, shared])) => {
                let grid = [rows.div_ceil(16), shape.heads, 1];
                launch!(self.gpu, name, grid, threads, shared; of_all);
            }
            None => {
                let grid = [rows, shape.heads, 1];
                launch!(self.gpu, kernel!(qkv, "attend_behind_plain"), grid, 128, 0; of_all);
            }
        }
    }
}
