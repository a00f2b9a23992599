//! Products of operands in any format: each becomes bf16 numbers, f32 where its scales ask for
//! that, or bytes, which tensor cores then multiply exactly (`quantize_values.cu`,
//! `quantize_nvfp4.cu`, `int8.cu`; from what the forward pass made, `kept.rs`). What the numbers
//! are is the definition's own, bit for bit; what they are multiplied by besides, which depends on
//! the tensor, stays on the device. The result of rotated forward operands is rotated back
//! (`restore.cu`), that of weights with an estimator multiplied by it (`estimate.cu`).
//!
//! FP8 operands with a scale for each tensor become bytes instead where FP8 tensor cores take them,
//! dy for both products of a backward pass with one reading ([`both_in_fp8`]); those of int8 where
//! integer tensor cores do ([`multiply_integers`]).
//! The formats that have kernels of their own (`has_own_kernels`) do not come here.

use std::cell::OnceCell;
use std::ffi::c_void;

use super::carrier::Carrier;
use super::kept::{Keeping, Way};
use super::random::{Draw, Transform};
use super::{MAX_DEPTH, Source, fp8, int8, power_rule};
use crate::backend::Precision;
use crate::backend::cuda::device::capture::Redraw;
use crate::backend::cuda::device::gemm::{Operand as Factor, Product, Type};
use crate::backend::cuda::device::launch;
use crate::backend::cuda::device::memory::{Arena, Param, Piece, Tensor};
use crate::backend::cuda::{Cuda, Workspace, kernel};
use crate::backend::{LinearShape, Numbers, Part, WorkspaceShape};
use crate::formats::{
    self, Block, Element, Format, Gemm, GemmId, LinearRecipe, Nvfp4Scale, Operand, OperandId,
    OperandSource, Outer, PowerRule, Random, Restoration, Rounding, Scale,
};

/// Elements of a vector, and vectors, that a thread block takes, and its threads.
const CHUNK: usize = 256;
const VECTORS: usize = 32;
const THREADS: usize = 256;

/// Results that a thread scales at once.
const SCALED: usize = 8;

/// Whether the operands of a GEMM are made by the kernels of their formats, which know f32, bf16,
/// MXFP4 of OCP in a backward pass and E4M3 in the forward pass, and x as E4M3 leaves it; and where
/// `carrier` is FP8, MXFP4 of other rules in all passes, also of what that made in the forward
/// pass.
fn has_own_kernels(recipe: &LinearRecipe, gemm: &Gemm, of: Of, carrier: Carrier) -> bool {
    let from_q = gemm.b().source() == OperandSource::Forward;
    // NOTE: what a forward pass rotates is turned back behind products of numbers alone.
    if carrier == Carrier::Fp8
        && is_in_powers(gemm)
        && recipe.forward().transform().is_none()
        && of.restoration(recipe).is_none()
        && (!from_q || power_rule(of.forward(recipe)).is_some())
    {
        return true;
    }
    let fourth = if of == Of::Forward { Format::E4M3 } else { Format::MXFP4 };
    let from_tensor = gemm.b().source() == OperandSource::HighPrecision;
    let from_fp8 = of == Of::Wgrad && recipe.forward().is_in(Format::E4M3);
    [Format::F32, Format::BF16, fourth].into_iter().any(|format| gemm.is_in(format))
        && !gemm.is_corrected()
        && of.restoration(recipe).is_none()
        && (from_tensor || from_fp8)
}

/// Whether both operands are blocks along the reduction whose scales are powers of two of their
/// largest magnitudes: what FP8 numbers hold.
pub(crate) fn is_in_powers(gemm: &Gemm) -> bool {
    [gemm.a(), gemm.b()].into_iter().all(|operand| power_rule(operand).is_some())
}

/// What multiplies MXFP4 in a layer of this shape.
pub(crate) fn carrier_of_mxfp4(capability: (i32, i32), shape: LinearShape) -> Carrier {
    let carrier = Carrier::of(Format::MXFP4, capability, shape);
    let fits = shape.inputs.max(shape.outputs) <= MAX_DEPTH;
    if carrier == Carrier::Fp8 && !fits { Carrier::Bf16 } else { carrier }
}

/// Which GEMM of a linear layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Of {
    Forward,
    Dgrad,
    Wgrad,
}

impl Of {
    pub(crate) const ALL: [Self; 3] = [Self::Forward, Self::Dgrad, Self::Wgrad];

    /// Its recipe, if its operands are made here and not as what [`carrier_of_mxfp4`] multiplies.
    pub(crate) fn gemm(self, recipe: &LinearRecipe, carrier: Carrier) -> Option<&Gemm> {
        let gemm = self.of(recipe);
        (!has_own_kernels(recipe, gemm, self, carrier)).then_some(gemm)
    }

    fn of(self, recipe: &LinearRecipe) -> &Gemm {
        match self {
            Self::Forward => recipe.forward(),
            Self::Dgrad => recipe.dgrad(),
            Self::Wgrad => recipe.wgrad(),
        }
    }

    /// What multiplies it in a layer of this shape.
    pub(crate) fn numbers(
        self,
        recipe: &LinearRecipe,
        capability: (i32, i32),
        shape: LinearShape,
    ) -> Numbers {
        let carrier = carrier_of_mxfp4(capability, shape);
        let Some(gemm) = self.gemm(recipe, carrier) else {
            return match self.of(recipe).element() {
                Element::F32 => Numbers::F32,
                Element::E4m3 => Carrier::of(Format::E4M3, capability, shape).numbers(),
                Element::E2m1 => carrier.numbers(),
                _ => Numbers::Bf16,
            };
        };
        if takes_int8(capability, gemm, (self, shape)) {
            return Numbers::Int8;
        }
        match takes_fp8(capability, gemm, shape) {
            Some(_) if self.restoration(recipe).is_none() => Numbers::Fp8,
            _ if is_wide(gemm) => Numbers::F32,
            _ => Numbers::Bf16,
        }
    }

    /// What the forward pass made of operand B.
    pub(crate) fn forward(self, recipe: &LinearRecipe) -> &Operand {
        match self {
            Self::Forward | Self::Dgrad => recipe.forward().b(),
            Self::Wgrad => recipe.forward().a(),
        }
    }

    /// What its result goes through.
    fn restoration(self, recipe: &LinearRecipe) -> Option<Restoration> {
        match self {
            Self::Forward => None,
            Self::Dgrad | Self::Wgrad => Restoration::of(recipe, self.id()),
        }
    }

    /// Its signs. Those of a forward pass are not drawn.
    fn id(self) -> GemmId {
        match self {
            Self::Forward | Self::Dgrad => GemmId::Dgrad,
            Self::Wgrad => GemmId::Wgrad,
        }
    }
}

// ---- Memory -------------------------------------------------------------------------------------

/// Where words lie in [`Room::words`]: the amax of A, of B and of what the forward pass made, then
/// scales of A and B, that of what the forward pass made, and both factors of the product.
const AMAXES: [u64; 3] = [0, 4, 8];
const SCALES: [u64; 2] = [12, 16];
const KEPT_SCALE: u64 = 20;
const FACTORS: u64 = 24;
/// Scales of FP8 operands, which cuBLASLt takes at multiples of 16 bytes alone.
const FP8_SCALES: [u64; 2] = [32, 48];
const WORD_BYTES: usize = 64;

/// Scratch memory besides the operands' own.
pub(crate) struct Room {
    /// What the forward pass dequantized, f32, or its bf16 numbers.
    kept: Piece,
    /// Results before scales of vectors, or before they are restored, f32.
    result: Piece,
    words: Piece,
    /// For A, B and what the forward pass made: bits of the amaxes of vectors, then their scales.
    vectors: [Piece; 3],
    /// Of A and B: what their slopes are made from.
    sums: [Piece; 2],
    /// Quantiles of vectors.
    bounds: Piece,
}

/// How much memory recipes need.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Size {
    /// Bytes of A and B.
    pub(crate) operands: [usize; 2],
    kept: usize,
    result: usize,
    words: usize,
    vectors: [usize; 3],
    sums: [usize; 2],
    bounds: usize,
}

impl Size {
    pub(crate) fn new(shape: &WorkspaceShape<'_>, capability: (i32, i32)) -> Self {
        let mut size = Self::default();
        for (layer, recipe) in
            shape.linears.iter().flat_map(|layer| shape.recipes.iter().map(move |r| (layer, r)))
        {
            for of in Of::ALL {
                if of == Of::Forward || shape.backward {
                    size.add(*layer, recipe, of, capability);
                }
            }
        }
        size
    }

    fn add(&mut self, layer: LinearShape, recipe: &LinearRecipe, of: Of, capability: (i32, i32)) {
        let carrier = carrier_of_mxfp4(capability, layer);
        let Some(gemm) = of.gemm(recipe, carrier) else { return };
        let LinearShape { rows, inputs, outputs } = layer;
        let restoration = of.restoration(recipe);
        let columns = restoration.map_or(inputs, |restored| restored.depth(inputs));
        let [m, n, k] = match of {
            Of::Forward => [rows, outputs, inputs],
            Of::Dgrad => [rows, columns, outputs],
            Of::Wgrad => [outputs, columns, rows],
        };
        let raise = |most: &mut usize, to: usize| *most = (*most).max(to);
        let depth = k.next_multiple_of(gemm.group());
        let in_integers = takes_int8(capability, gemm, (of, layer));
        let (of_a, bytes) = match is_wide(gemm) {
            _ if in_integers => (int8::padded(m), 1),
            true => (m, 4),
            false => (m, 2),
        };
        for (most, vectors) in self.operands.iter_mut().zip([of_a, n]) {
            raise(most, vectors * depth * bytes);
        }
        raise(&mut self.words, WORD_BYTES);
        if gemm.is_corrected() {
            for (most, vectors) in self.sums.iter_mut().zip([m, n]) {
                raise(most, 16 * pairs_of_sums(vectors, depth));
            }
        }
        for ((most, operand), vectors) in
            self.vectors.iter_mut().zip([gemm.a(), gemm.b()]).zip([m, n])
        {
            raise(most, vector_bytes(operand.format(), vectors));
        }
        if gemm.a().outliers().or_else(|| of.forward(recipe).outliers()).is_some() {
            raise(&mut self.bounds, 8 * rows);
        }
        if gemm.b().source() == OperandSource::Forward {
            let bytes = match Way::of(of.forward(recipe), gemm.b()) {
                None => 4,
                Some(Way::FromNumbers) => 2,
                Some(Way::InRegisters) => 0,
            };
            raise(&mut self.kept, n * k * bytes);
            // The vectors of its own product are the columns of this one's.
            raise(&mut self.vectors[2], vector_bytes(of.forward(recipe).format(), k));
        }
        if in_integers {
            raise(&mut self.result, int8::padded(int8::most_rows_at_once(m, n)) * n * 4);
        } else if restoration.is_some() || needs_result(gemm, of == Of::Wgrad) {
            raise(&mut self.result, m * n * 4);
        }
    }

    pub(crate) fn cut(self, arena: &mut Arena) -> Room {
        Room {
            kept: arena.bytes(self.kept),
            result: arena.bytes(self.result),
            words: arena.bytes(self.words),
            vectors: self.vectors.map(|bytes| arena.bytes(bytes)),
            sums: self.sums.map(|bytes| arena.bytes(bytes)),
            bounds: arena.bytes(self.bounds),
        }
    }
}

/// Whether bf16 does not hold the numbers.
fn is_wide(gemm: &Gemm) -> bool {
    // Sums of numbers and outliers, too.
    matches!(gemm.a().format().scale(), Scale::TwoLevels(_, Outer::Elements))
        || gemm.a().outliers().is_some()
}

/// Whether the product is not the result yet: f32 operands make f32 alone, and scales of vectors
/// come behind.
fn needs_result(gemm: &Gemm, in_f32: bool) -> bool {
    let scaled = |operand: &Operand| formats::has_vector_scales(operand.format());
    scaled(gemm.a()) || scaled(gemm.b()) || is_wide(gemm) && !in_f32
}

/// Sums of products and of squares that are left of an operand: a pair from each warp.
fn pairs_of_sums(vectors: usize, depth: usize) -> usize {
    vectors.div_ceil(VECTORS) * depth.div_ceil(CHUNK) * (THREADS / 32)
}

/// Words for the amaxes and the scales of vectors.
fn vector_bytes(format: Format, vectors: usize) -> usize {
    if format.block() == Block::Vector { 8 * vectors } else { 0 }
}

// ---- Operands -----------------------------------------------------------------------------------

/// An operand of a product as it lies in memory.
#[derive(Clone, Copy)]
pub(crate) struct Matrix {
    pub(crate) source: Source,
    /// The address of the bits of the source's amax, where they are known.
    pub(crate) amax: Option<u64>,
    /// The address of what the source is multiplied by first, or 0 for 1.
    pub(crate) scale: u64,
    /// The address of the slow means of weights, or 0: f32, in the order of the source.
    pub(crate) mean: u64,
    pub(crate) vectors: usize,
    pub(crate) length: usize,
    /// Whether it is stored (length, vectors).
    pub(crate) transposed: bool,
    pub(crate) id: OperandId,
    /// The addresses of its FP8 bytes along the reduction and of their scale, where they have been
    /// made.
    pub(crate) fp8: Option<[u64; 2]>,
}

impl Matrix {
    /// Stored (vectors, length).
    pub(crate) fn rows(source: Source, vectors: usize, length: usize, id: OperandId) -> Self {
        let (amax, scale, mean, transposed, fp8) = (None, 0, 0, false, None);
        Self { source, amax, scale, mean, vectors, length, transposed, id, fp8 }
    }

    /// An activation or its gradient, (rows, columns).
    pub(crate) fn of(tensor: &Tensor, rows: usize, columns: usize, id: OperandId) -> Self {
        Self { amax: tensor.amax(), ..Self::rows(Source::of(tensor), rows, columns, id) }
    }

    /// Master weights, likewise.
    pub(crate) fn master(param: &Param<'_>, rows: usize, columns: usize) -> Self {
        let amax = Some(param.amax.address);
        Self { amax, ..Self::rows(Source::weights(param), rows, columns, OperandId::W) }
    }

    /// The same of weights with their slow mean.
    pub(crate) fn with_mean(self, mean: Option<Part<'_, Cuda>>) -> Self {
        Self { mean: mean.map_or(0, |Part { flat, slot }| flat.at(slot.start)), ..self }
    }

    /// The same with the reduction down its columns.
    pub(crate) fn turned(self) -> Self {
        let Self { vectors, length, transposed, .. } = self;
        Self { vectors: length, length: vectors, transposed: !transposed, ..self }
    }
}

impl Matrix {
    /// As FP8 bytes along the reduction, which go to the first address of `to` and their scale to
    /// the second; `word` is room for the amax where nobody has noted it. Where they are is
    /// returned.
    fn to_fp8(self, cuda: &Cuda, element: Element, word: u64, to: [u64; 2]) -> [u64; 2] {
        let Self { source, vectors, length, transposed, fp8: made, .. } = self;
        made.unwrap_or_else(|| {
            let amax = self.amax_or_find(cuda, word);
            match transposed {
                true => fp8::turn(cuda, element, to, source, amax, [length, vectors]),
                false => fp8::convert(cuda, element, to, source, amax, vectors * length),
            }
            to
        })
    }

    /// The address of its amax's bits: `word` where nobody has noted them.
    fn amax_or_find(&self, cuda: &Cuda, word: u64) -> u64 {
        let len = self.vectors * self.length;
        self.amax.unwrap_or_else(|| fp8::find_amax(cuda, word, self.source, len))
    }
}

/// Where the numbers of an operand go, and what else is written on the way.
#[derive(Clone, Copy, Default)]
pub(crate) struct To {
    pub(crate) out: u64,
    /// Whether it gets f32 numbers instead of bf16.
    pub(crate) wide: bool,
    /// Whether it gets the bytes of int8 instead.
    pub(crate) bytes: bool,
    /// Whether it gets the values that they stand for, f32, and dense where nothing is rotated.
    pub(crate) dequantized: bool,
    /// Gets what elements of each block are multiplied by, (vectors, blocks), or 0.
    pub(crate) block_scales: u64,
    /// A word for the bits of the amax, or a word for every vector; zeroed.
    pub(crate) amax: u64,
    /// The scales of vectors.
    pub(crate) vector_scales: u64,
    /// The tensor's scale, or 0.
    pub(crate) scale: u64,
    /// The other operand's scale, or 0 for 1.
    pub(crate) other: u64,
    /// Gets what the product is multiplied by, `alpha` times both scales, and `beta`; or 0.
    pub(crate) factors: u64,
    /// Quantiles of its vectors, where it has outliers; or 0.
    pub(crate) bounds: u64,
    /// Gets pairs of sums, for the slope; or 0.
    pub(crate) sums: u64,
    pub(crate) alpha: f32,
    pub(crate) beta: f32,
}

/// An operand to be made: what of, and by which rules.
#[derive(Clone, Copy)]
pub(crate) struct Quantization {
    pub(crate) matrix: Matrix,
    pub(crate) operand: Operand,
    /// None where it is made without.
    pub(crate) transform: Option<formats::Transform>,
    pub(crate) gemm: GemmId,
    pub(crate) random: Random,
    pub(crate) to: To,
}

/// `Values` of the kernels.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Arguments {
    source: u64,
    of_source: u64,
    mean: u64,
    block_scales: u64,
    out: u64,
    amax: u64,
    vector_scales: u64,
    scale: u64,
    other: u64,
    factors: u64,
    bounds: u64,
    sums: u64,
    vectors: u32,
    length: u32,
    depth: u32,
    transposed: u32,
    group: u32,
    kind: Kind,
    mantissa: u32,
    rule: Rule,
    square: u32,
    rounding: u32,
    outer: u32,
    by_vector: u32,
    wide: u32,
    dequantized: u32,
    range: f32,
    alpha: f32,
    beta: f32,
    transform: Transform,
    elements: Draw,
    of_scales: Draw,
}

#[cfg(test)]
impl Arguments {
    /// All that it draws.
    pub(super) fn drawn(&self) -> (Transform, [Draw; 2]) {
        (self.transform, [self.elements, self.of_scales])
    }
}

/// `Kind` of the kernels.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
enum Kind {
    Nearest,
    Cut,
    E4m3,
    E5m2,
    Int8,
    E2m1,
    Powers,
    TwoLevels,
}

/// `Rule` of the kernels.
#[derive(Clone, Copy)]
#[repr(u32)]
enum Rule {
    Floor,
    Ceil,
    Even,
    Quest,
    QuestFloor,
    Full,
    Headroom,
    FourOverSix,
    Amax,
}

/// Elements, and bits of mantissa where nothing else is lost.
fn kind(format: Format) -> (Kind, u32) {
    let blocks = matches!(format.block(), Block::Elements(_) | Block::Square(_));
    match (format.element(), format.scale()) {
        (Element::F32, _) => unreachable!("f32 stays as it is"),
        (Element::Bf16, _) => (Kind::Nearest, 7),
        (Element::Mantissa(bits, cut), _) => {
            (if cut { Kind::Cut } else { Kind::Nearest }, bits.into())
        }
        (Element::E4m3, _) => (Kind::E4m3, 0),
        (Element::E5m2, _) => (Kind::E5m2, 0),
        (Element::Int8, _) => (Kind::Int8, 0),
        (Element::E2m1, Scale::TwoLevels(..)) => (Kind::TwoLevels, 0),
        (Element::E2m1, _) => (if blocks { Kind::Powers } else { Kind::E2m1 }, 0),
    }
}

fn rule(scale: Scale) -> Rule {
    match scale {
        Scale::Power(PowerRule::Floor) => Rule::Floor,
        Scale::Power(PowerRule::Ceil) => Rule::Ceil,
        Scale::Power(PowerRule::Even) => Rule::Even,
        Scale::Power(PowerRule::Quest) => Rule::Quest,
        Scale::Power(PowerRule::QuestFloor) => Rule::QuestFloor,
        Scale::TwoLevels(Nvfp4Scale::Full, _) => Rule::Full,
        Scale::TwoLevels(Nvfp4Scale::Headroom, _) => Rule::Headroom,
        Scale::TwoLevels(Nvfp4Scale::FourOverSix, _) => Rule::FourOverSix,
        Scale::One | Scale::Amax => Rule::Amax,
    }
}

impl Quantization {
    /// Padded length of its vectors.
    pub(crate) fn depth(&self) -> usize {
        let group = self.transform.map_or(1, formats::Transform::group);
        self.matrix.length.next_multiple_of(group.max(self.operand.format().block().depth()))
    }

    pub(crate) fn arguments(&self) -> Arguments {
        let Self { matrix, operand, transform, gemm, random, to } = self;
        let format = operand.format();
        let (kind, mantissa) = kind(format);
        let rounding = match operand.rounding() {
            Rounding::Nearest => 0,
            Rounding::Unbiased => 1,
            Rounding::Eden => 2,
            Rounding::ByMean => 3,
        };
        let outer = match format.scale() {
            Scale::TwoLevels(_, Outer::Elements) => 1,
            Scale::TwoLevels(_, Outer::Powers) => 2,
            _ => 0,
        };
        Arguments {
            source: matrix.source.address,
            of_source: matrix.scale,
            mean: matrix.mean,
            block_scales: to.block_scales,
            out: to.out,
            amax: to.amax,
            vector_scales: to.vector_scales,
            scale: to.scale,
            other: to.other,
            factors: to.factors,
            bounds: to.bounds,
            sums: to.sums,
            vectors: matrix.vectors as u32,
            length: matrix.length as u32,
            depth: self.depth() as u32,
            transposed: u32::from(matrix.transposed),
            group: transform.map_or(0, formats::Transform::group) as u32,
            kind,
            mantissa,
            rule: rule(format.scale()),
            square: u32::from(matches!(format.block(), Block::Square(_))),
            rounding,
            outer,
            by_vector: u32::from(format.block() == Block::Vector),
            wide: u32::from(to.wide),
            dequantized: u32::from(to.dequantized),
            range: operand.range().factor(),
            alpha: to.alpha,
            beta: to.beta,
            transform: Transform::of(*transform, *gemm, random),
            elements: random.rounding(matrix.id).into(),
            of_scales: random.rounding(matrix.id.of_scales()).into(),
        }
    }

    /// Whether a kernel has to find amaxes: those of vectors, and that of a tensor where nobody
    /// has noted it or it is of what is rotated.
    pub(crate) fn finds_amax(&self) -> bool {
        let format = self.operand.format();
        match format.block() {
            Block::Vector => self.int8_form().is_none(),
            _ => formats::needs_amax(format) && self.noted().is_none(),
        }
    }

    /// The tensor's amax, where it is known.
    fn noted(&self) -> Option<u64> {
        self.matrix.amax.filter(|_| self.transform.is_none())
    }

    /// How both of its kernels are launched.
    pub(crate) fn launches(&self) -> [super::Launch; 2] {
        let Matrix { vectors, length, .. } = self.matrix;
        let grid = [vectors.div_ceil(VECTORS), self.depth().div_ceil(CHUNK), 1];
        let bits = self.operand.rounding() == Rounding::Unbiased
            && self.matrix.transposed
            && !self.has_nvfp4_kernels();
        let shared = if bits { 2 * CHUNK * VECTORS } else { 0 };
        let by_chunks = super::Launch { grid, block: THREADS, shared };
        let round = self.int8_form().map(|form| form.launch(vectors, length));
        [by_chunks, round.unwrap_or(by_chunks)]
    }

    /// How the kernels of int8 make it, if they do, which note nothing besides.
    fn int8_form(&self) -> Option<int8::Form> {
        let (matrix, to) = (&self.matrix, &self.to);
        let noted = [to.block_scales, to.sums, to.bounds].iter().any(|address| *address != 0);
        let others = to.wide || to.dequantized || noted || self.transform.is_some();
        let format = self.operand.format();
        if format.element() != Element::Int8 || others || !matrix.length.is_multiple_of(int8::EACH)
        {
            return None;
        }
        match format.block() {
            Block::Vector => {
                (!matrix.transposed && matrix.length <= int8::LONGEST).then_some(int8::Form::Rows)
            }
            _ if !matrix.vectors.is_multiple_of(int8::EACH) => None,
            _ if matrix.transposed && to.bytes => Some(int8::Form::Turned),
            _ => Some(int8::Form::Tensor),
        }
    }

    /// As a product reads it.
    fn factor(&self) -> Factor {
        match self.is_as_stored() {
            true => Factor::columns(self.to.out, self.matrix.vectors),
            false => Factor::rows(self.to.out, self.depth()),
        }
    }

    /// Whether its numbers lie in the order of a source that is stored transposed.
    pub(crate) fn is_as_stored(&self) -> bool {
        self.matrix.transposed && self.int8_form() == Some(int8::Form::Tensor)
    }

    /// Whether the kernels of NVFP4 make it, which note nothing besides.
    fn has_nvfp4_kernels(&self) -> bool {
        let To { block_scales, sums, .. } = self.to;
        let by_mean = self.operand.rounding() == Rounding::ByMean;
        self.operand.format().is_nvfp4() && !by_mean && block_scales == 0 && sums == 0
    }

    /// The names of the kernels that find the amax and make the numbers.
    pub(crate) fn kernels(&self) -> [String; 2] {
        let number = match self.matrix.source.precision {
            Precision::F32 => "float",
            Precision::Bf16 => "bf16",
        };
        let rounding = match self.operand.rounding() {
            Rounding::Nearest | Rounding::ByMean => "TO_NEAREST",
            Rounding::Unbiased => "UNBIASED",
            Rounding::Eden => "EDEN",
        };
        if !self.has_nvfp4_kernels() {
            let [find, round] =
                ["find_value_amax", "round_values"].map(|name| format!("{name}<{number}>"));
            return [
                find,
                self.int8_form().map_or(round, |form| form.kernel(number, self.to.bytes)),
            ];
        }
        let transposed = self.matrix.transposed;
        [
            format!("find_nvfp4_amax<{number},{transposed}>"),
            format!("round_nvfp4<{number},{transposed},{rounding}>"),
        ]
    }

    /// All of it.
    pub(crate) fn run(mut self, cuda: &Cuda) {
        self.find(cuda);
        self.round(cuda);
    }

    /// The amaxes that it needs, or where they have been noted; first, what else vectors need.
    pub(super) fn find(&mut self, cuda: &Cuda) {
        let source = self.matrix.source;
        if let Some(outliers) = Outliers::of(self) {
            let grid = [self.matrix.vectors, 1, 1];
            launch!(cuda.gpu, kernel!(source, "find_bounds"), grid, THREADS, 0; outliers);
        } else if self.finds_amax() {
            let ([find, _], [launch, _]) = (self.kernels(), self.launches());
            self.start(cuda, (&find, launch), self.is_rotated_anew());
        } else if let Some(amax) = self.noted() {
            self.to.amax = amax;
        }
    }

    /// The numbers, once amaxes are known.
    pub(super) fn round(&self, cuda: &Cuda) {
        let ([_, round], [_, launch]) = (self.kernels(), self.launches());
        assert!(
            self.operand.rounding() != Rounding::ByMean || self.matrix.mean != 0,
            "weights have the means that they are rounded by"
        );
        self.start(cuda, (&round, launch), self.is_drawn());
    }

    /// Whether its signs or bits change with every step.
    pub(super) fn is_drawn(&self) -> bool {
        let drawn = matches!(self.operand.rounding(), Rounding::Unbiased | Rounding::Eden);
        drawn || self.is_rotated_anew()
    }

    fn is_rotated_anew(&self) -> bool {
        self.transform.is_some_and(|transform| transform.signs() == formats::Signs::Random)
    }

    /// `drawn`: what it reads changes with every step.
    fn start(&self, cuda: &Cuda, (kernel, launch): (&str, super::Launch), drawn: bool) {
        let super::Launch { grid, block, shared } = launch;
        let arguments = self.arguments();
        if drawn {
            let drawing = Drawing { arguments, of: *self };
            cuda.gpu.launch_drawn(kernel, grid, block, shared, drawing);
        } else {
            launch!(cuda.gpu, kernel, grid, block, shared; arguments);
        }
    }
}

/// `Outliers` of the kernels.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Outliers {
    source: u64,
    amax: u64,
    bounds: u64,
    vectors: u32,
    length: u32,
    ranks: [u32; 2],
}

impl Outliers {
    /// Of an operand that has some: x of a forward pass, which is stored along the reduction.
    pub(crate) fn of(made: &Quantization) -> Option<Self> {
        let Matrix { source, vectors, length, .. } = made.matrix;
        let kept = made.operand.outliers()?;
        Some(Self {
            source: source.address,
            amax: made.to.amax,
            bounds: made.to.bounds,
            vectors: vectors as u32,
            length: length as u32,
            ranks: kept.ranks(length).map(|rank| rank as u32),
        })
    }
}

/// A kernel's argument, with what it is made for.
struct Drawing {
    arguments: Arguments,
    of: Quantization,
}

impl Redraw for Drawing {
    fn redraw(&mut self, [step, micro_step]: [u32; 2]) {
        self.of.random = Random { step, micro_step, ..self.of.random };
        self.arguments = self.of.arguments();
    }

    fn argument(&mut self) -> *mut c_void {
        std::ptr::from_mut(&mut self.arguments).cast()
    }
}

// ---- Products -----------------------------------------------------------------------------------

/// Where a product goes.
#[derive(Clone, Copy)]
pub(crate) struct Output<'a> {
    pub(crate) address: u64,
    pub(crate) precision: Precision,
    /// Of the same precision.
    pub(crate) bias: Option<u64>,
    pub(crate) accumulate: bool,
    /// What a gradient is of, in the same precision.
    pub(crate) tensor: u64,
    /// A tensor of the pass, which may have zeroed words.
    pub(crate) pass: Option<&'a Tensor>,
}

/// `Scaling` of the kernels.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Scaling {
    pub(crate) out: u64,
    pub(crate) c: u64,
    pub(crate) factor: u64,
    pub(crate) of_rows: u64,
    pub(crate) of_columns: u64,
    pub(crate) bias: u64,
    pub(crate) rows: u32,
    pub(crate) columns: u32,
}

impl Scaling {
    fn run(self, cuda: &Cuda, kernel: &str) {
        let block = (self.columns as usize).div_ceil(SCALED).next_multiple_of(32).min(THREADS);
        launch!(cuda.gpu, kernel, [self.rows as usize, 1, 1], block, 0; self);
    }
}

/// `Measured` of the kernels.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Measured {
    sums: u64,
    scale: u64,
    count: u32,
    range: f32,
}

impl Measured {
    /// Of an operand that has been made.
    pub(crate) fn of(made: &Quantization) -> Self {
        Self {
            sums: made.to.sums,
            scale: made.to.scale,
            count: pairs_of_sums(made.matrix.vectors, made.depth()) as u32,
            range: made.operand.range().factor(),
        }
    }
}

/// `Correct` of the kernels.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Correct {
    pub(crate) operands: [Measured; 2],
    pub(crate) factors: u64,
}

/// `Estimate` of the kernels.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Estimate {
    pub(crate) out: u64,
    pub(crate) c: u64,
    pub(crate) tensor: u64,
    pub(crate) columns: u32,
    pub(crate) accumulate: u32,
    pub(crate) steepness: f32,
}

/// `Restore` of the kernels.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Restore {
    out: u64,
    c: u64,
    tensor: u64,
    rows: u32,
    columns: u32,
    groups: u32,
    clips: u32,
    nearest: u32,
    accumulate: u32,
    scale: f32,
}

impl Restore {
    /// Threads of a block, each of which takes a group.
    pub(crate) const THREADS: usize = 256;

    /// Of a gradient (rows, columns), from the product at `c`.
    pub(crate) fn new(
        restoration: Restoration,
        out: Output<'_>,
        c: u64,
        [rows, columns]: [usize; 2],
    ) -> Self {
        let clips = restoration.clips();
        Self {
            out: out.address,
            c,
            tensor: out.tensor,
            rows: rows as u32,
            columns: columns as u32,
            groups: (restoration.depth(columns) / formats::BLOCK) as u32,
            clips: u32::from(clips.is_some()),
            nearest: u32::from(clips == Some(PowerRule::Quest)),
            accumulate: u32::from(out.accumulate),
            scale: formats::group_scale(formats::BLOCK),
        }
    }

    /// Thread blocks.
    pub(crate) fn grid(&self) -> usize {
        (self.rows as usize * self.groups as usize).div_ceil(Self::THREADS)
    }
}

/// FP8 operands with a scale for each tensor, where the chip's tensor cores take them as such.
fn fp8_types(cuda: &Cuda, gemm: &Gemm, [a, b]: [Matrix; 2]) -> Option<[Type; 2]> {
    let shape = LinearShape { rows: a.vectors, inputs: a.length, outputs: b.vectors };
    takes_fp8(cuda.gpu.capability, gemm, shape)
}

/// The same of a layer, whichever of its three sizes the reduction is.
fn takes_fp8(capability: (i32, i32), gemm: &Gemm, shape: LinearShape) -> Option<[Type; 2]> {
    let carrier = Carrier::of(Format::E4M3, capability, shape);
    if carrier != Carrier::Fp8 || gemm.b().source() == OperandSource::Forward {
        return None;
    }
    let of = |operand: &Operand| match operand.format().element() {
        Element::E4m3 => Some(Type::E4m3),
        Element::E5m2 => Some(Type::E5m2),
        _ => None,
    };
    Some([of(gemm.a())?, of(gemm.b())?])
}

/// Whether all products of a layer are in FP8 as its tensor cores take it, and x and W in E4M3, of
/// which both forms have one scale.
pub(crate) fn are_all_in_fp8(
    capability: (i32, i32),
    recipe: &LinearRecipe,
    shape: LinearShape,
) -> bool {
    let carrier = carrier_of_mxfp4(capability, shape);
    let takes = |of: Of| {
        of.restoration(recipe).is_none()
            && of
                .gemm(recipe, carrier)
                .and_then(|gemm| takes_fp8(capability, gemm, shape))
                .is_some_and(|[_, second]| second == Type::E4m3)
    };
    recipe.forward().is_in(Format::E4M3)
        && Carrier::of(Format::E4M3, capability, shape) == Carrier::Fp8
        && takes(Of::Dgrad)
        && takes(Of::Wgrad)
}

/// Whether integer tensor cores take rows of int8 times a tensor of it, in a layer of this shape,
/// whichever of `inputs` and `outputs` the reduction is.
fn takes_int8(capability: (i32, i32), gemm: &Gemm, (of, shape): (Of, LinearShape)) -> bool {
    let formats = [gemm.a(), gemm.b()].map(Operand::format);
    of != Of::Wgrad
        && formats == [Format::INT8_VECTORS, Format::INT8_TENSOR]
        && Carrier::of(Format::INT8_VECTORS, capability, shape) == Carrier::Int8
        && shape.inputs.max(shape.outputs) <= int8::LONGEST
        && gemm.b().source() == OperandSource::HighPrecision
        && !gemm.is_corrected()
        && gemm.transform().is_none()
}

/// dy (rows, outputs) as FP8 bytes for both products of a backward pass, where FP8 tensor cores
/// take both and its element is the same, made with one reading: as A of dgrad and as A of wgrad,
/// and the number of the parts of its column sums, which lie in the workspace's partials.
pub(crate) fn both_in_fp8(
    cuda: &Cuda,
    workspace: &Workspace,
    recipe: &LinearRecipe,
    dy: Matrix,
    inputs: usize,
) -> Option<([Matrix; 2], usize)> {
    if [Of::Dgrad, Of::Wgrad].into_iter().any(|of| of.restoration(recipe).is_some()) {
        return None;
    }
    let [dgrad, wgrad] = [recipe.dgrad(), recipe.wgrad()];
    let [rows, outputs] = [dy.vectors, dy.length];
    let other = |vectors, length| Matrix { vectors, length, fp8: None, ..dy };
    let [first, _] = fp8_types(cuda, dgrad, [dy, other(inputs, outputs)])?;
    let [second, _] = fp8_types(cuda, wgrad, [dy.turned(), other(inputs, rows)])?;
    if first != second {
        return None;
    }
    let (room, words) = (workspace.left.elements.address, workspace.values.words.address);
    // Of both, as they come from one amax. The room is as large as bf16 numbers need.
    let scale = words + FP8_SCALES[0];
    let by_columns = room + (rows * outputs) as u64;
    let to = [room, by_columns, scale, workspace.partials.address];
    let amax = dy.amax_or_find(cuda, words + AMAXES[0]);
    let element = dgrad.a().format().element();
    let parts = fp8::convert_both(cuda, element, to, dy.source, amax, [rows, outputs]);
    let made = |matrix, address| Matrix { fp8: Some([address, scale]), ..matrix };
    Some(([made(dy, room), made(dy.turned(), by_columns)], parts))
}

/// The product of a layer whose operands are made here: A B^T, both read along the reduction.
pub(crate) fn multiply(
    cuda: &Cuda,
    workspace: &Workspace,
    (of, recipe, gemm): (Of, &LinearRecipe, &Gemm),
    [a, mut b]: [Matrix; 2],
    random: &Random,
    out: Output<'_>,
) {
    let room = &workspace.values;
    let inputs = b.vectors;
    let word = |at: u64| room.words.address + at;
    let restoration = of.restoration(recipe);
    if restoration.is_none()
        && let Some(types) = fp8_types(cuda, gemm, [a, b])
    {
        let to = |i: usize| {
            let room = [&workspace.left, &workspace.right][i].elements.address;
            (word(AMAXES[i]), [room, word(FP8_SCALES[i])])
        };
        let make = |i: usize, matrix: Matrix, operand: &Operand| {
            let (amax, to) = to(i);
            matrix.to_fp8(cuda, operand.format().element(), amax, to)
        };
        let made = [make(0, a, gemm.a()), make(1, b, gemm.b())];
        let [left, right] = made.map(|[address, _]| Factor::rows(address, a.length));
        let sizes = [a.vectors, b.vectors, a.length];
        let product = Product {
            operands: types,
            c_type: out.precision.into(),
            accumulate: out.accumulate,
            bias: out.bias,
            scales: Some(made.map(|[_, scale]| scale)),
            ..Product::new(out.precision.into(), sizes, left, right, out.address)
        };
        return cuda.product(workspace, &product);
    }
    let make = |matrix: Matrix, operand: &Operand, transform, to| Quantization {
        matrix,
        operand: *operand,
        transform,
        gemm: of.id(),
        random: *random,
        to,
    };
    // NOTE: a word that is cleared by itself holds up the kernel behind it, which could else be
    // launched while the one before it ends.
    let found = OnceCell::new();
    let zeroed = || {
        *found.get_or_init(|| {
            let words = out.pass.and_then(|pass| pass.zeroed_words(AMAXES.len() as u64));
            words.unwrap_or_else(|| {
                cuda.clear(word(AMAXES[0]), 4 * AMAXES.len());
                word(AMAXES[0])
            })
        })
    };
    // With zeroed words for the amaxes that are to be found.
    let prepared = |mut made: Quantization, place: usize| {
        let bytes = 4 * made.matrix.vectors;
        let by_vector = made.operand.format().block() == Block::Vector;
        let amax = match (by_vector, made.finds_amax()) {
            (true, _) => room.vectors[place].address,
            (false, true) => zeroed() + AMAXES[place],
            (false, false) => 0,
        };
        made.to.amax = amax;
        if made.operand.outliers().is_some() {
            made.to.bounds = room.bounds.address;
        }
        if formats::has_vector_scales(made.operand.format()) {
            made.to.vector_scales = amax + bytes as u64;
        }
        if by_vector && made.finds_amax() {
            cuda.clear(amax, bytes);
        }
        made
    };
    let from_q = gemm.b().source() == OperandSource::Forward;
    let way = Way::of(of.forward(recipe), gemm.b()).filter(|_| from_q);
    let whole_b = b;
    if way.is_some() {
        // That of its numbers is another.
        b.amax = None;
    } else if from_q {
        let to = To { out: room.kept.address, dequantized: true, ..To::default() };
        let rotated = recipe.forward().transform();
        let kept = prepared(make(b.turned(), of.forward(recipe), rotated, to), 2);
        kept.run(cuda);
        let source = Source { address: room.kept.address, precision: Precision::F32 };
        // What is rotated is kept with its padding.
        let vectors = if rotated.is_some() { kept.depth() } else { b.vectors };
        b = Matrix { source, amax: None, vectors, ..b };
    }
    let accumulate = out.accumulate && restoration.is_none();
    let [left, right] = [&workspace.left, &workspace.right].map(|room| room.elements.address);
    let transform = gemm.transform();
    let wide = is_wide(gemm);
    let shape = LinearShape { rows: a.vectors, inputs: a.length, outputs: b.vectors };
    let bytes = takes_int8(cuda.gpu.capability, gemm, (of, shape));
    let [scaled_a, scaled_b] =
        [gemm.a(), gemm.b()].map(|operand| formats::needs_amax(operand.format()));
    let corrected = gemm.is_corrected();
    let factors = if scaled_a || scaled_b || corrected { word(FACTORS) } else { 0 };
    let sums = room.sums.each_ref().map(|sums| if corrected { sums.address } else { 0 });
    let scale_of_a = if scaled_a { word(SCALES[0]) } else { 0 };
    let to_a = To { out: left, wide, bytes, scale: scale_of_a, sums: sums[0], ..To::default() };
    let to_b = To {
        out: right,
        wide,
        bytes,
        scale: if scaled_b && corrected { word(SCALES[1]) } else { 0 },
        other: scale_of_a,
        factors,
        sums: sums[1],
        alpha: gemm.alpha(),
        beta: if accumulate { 1.0 } else { 0.0 },
        ..To::default()
    };
    let made_a = prepared(make(a, gemm.a(), transform, to_a), 0);
    let made_b = prepared(make(b, gemm.b(), transform, to_b), 1);
    made_a.run(cuda);
    if let Some(way) = way {
        let (out, scale) = (room.kept.address, word(KEPT_SCALE));
        let to = To { out, scale, ..To::default() };
        let forward = prepared(make(whole_b.turned(), of.forward(recipe), None, to), 2);
        Keeping { forward, backward: made_b }.run(cuda, way);
    } else {
        made_b.run(cuda);
    }
    if bytes {
        return multiply_integers(cuda, workspace, [&made_a, &made_b], out);
    }
    if corrected {
        let operands = [&made_a, &made_b].map(Measured::of);
        let correct = Correct { operands, factors };
        launch!(cuda.gpu, "correct_factors", [1, 1, 1], THREADS, 0; correct);
    }

    let depth = made_a.depth();
    let (m, n) = (a.vectors, b.vectors);
    let operands = [&made_a, &made_b].map(Quantization::factor);
    let format = if wide { Type::F32 } else { Type::Bf16 };
    let product = Product {
        c_type: out.precision.into(),
        accumulate,
        bias: out.bias,
        alpha: gemm.alpha(),
        factors: (factors != 0).then_some(factors),
        ..Product::new(format, [m, n, depth], operands[0], operands[1], out.address)
    };
    if restoration.is_none() && !needs_result(gemm, out.precision == Precision::F32) {
        return cuda.product(workspace, &product);
    }
    let c = room.result.address;
    cuda.product(workspace, &Product { c, c_type: Type::F32, bias: None, ..product });
    if let Some(steepness) = restoration.and_then(|restoration| restoration.estimator()) {
        let estimate = Estimate {
            out: out.address,
            c,
            tensor: out.tensor,
            columns: inputs as u32,
            accumulate: u32::from(out.accumulate),
            steepness: steepness.into(),
        };
        launch!(cuda.gpu, "estimate", [m, 1, 1], THREADS, 0; estimate);
        return;
    }
    if let Some(restoration) = restoration {
        let restore = Restore::new(restoration, out, c, [m, inputs]);
        let (grid, block) = ([restore.grid(), 1, 1], Restore::THREADS);
        launch!(cuda.gpu, kernel!(out, "restore"), grid, block, 0; restore);
        return;
    }
    let scaling = Scaling {
        out: out.address,
        c,
        factor: 0,
        of_rows: made_a.to.vector_scales,
        of_columns: made_b.to.vector_scales,
        bias: out.bias.unwrap_or(0),
        rows: m as u32,
        columns: n as u32,
    };
    scaling.run(cuda, kernel!(out, "scale_result", false));
}

/// The product of operands in bytes of int8 and its scales, by pieces of rows.
fn multiply_integers(cuda: &Cuda, workspace: &Workspace, [a, b]: [&Quantization; 2], out: Output) {
    let (m, n, depth) = (a.matrix.vectors, b.matrix.vectors, a.depth());
    let c = workspace.values.result.address;
    let at_once = int8::rows_at_once(m, n);
    for first in (0..m).step_by(at_once) {
        let rows = at_once.min(m - first);
        let left = Factor::rows(a.to.out + (first * depth) as u64, depth);
        let product = Product {
            c_type: Type::Int32,
            ..Product::new(Type::Int8, [int8::padded(rows), n, depth], left, b.factor(), c)
        };
        cuda.product(workspace, &product);
        let scaling = Scaling {
            out: out.address + (first * n * out.precision.size()) as u64,
            c,
            factor: b.to.factors,
            of_rows: a.to.vector_scales + 4 * first as u64,
            of_columns: 0,
            bias: out.bias.unwrap_or(0),
            rows: rows as u32,
            columns: n as u32,
        };
        scaling.run(cuda, kernel!(out, "scale_result", true));
    }
}

/// What the forward pass makes of a weight, dequantized and dense, to `out`, and the scales of its
/// blocks to `block_scales`; `amax` is room for a word.
pub(crate) fn dequantize(
    cuda: &Cuda,
    matrix: Matrix,
    operand: &Operand,
    [out, block_scales, amax]: [u64; 3],
) {
    let to = To { out, block_scales, amax, dequantized: true, ..To::default() };
    let (operand, transform, gemm) = (*operand, None, GemmId::Dgrad);
    let made = Quantization { matrix, operand, transform, gemm, random: Random::NONE, to };
    if made.finds_amax() {
        cuda.clear(amax, 4);
    }
    made.run(cuda);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recipe::Recipe;

    /// Recipes whose kernels are their own take no memory from this file, in no layer or step.
    #[test]
    fn what_has_kernels_of_its_own_does_not_come_here() {
        let layer = LinearShape { rows: 77, inputs: 96, outputs: 33 };
        for name in Recipe::NAMES {
            let mut size = Size::default();
            for recipe in name.parse::<Recipe>().unwrap().all() {
                Of::ALL.into_iter().for_each(|of| size.add(layer, &recipe, of, (8, 0)));
            }
            let own = ["fp32", "bf16", "mxfp4", "fp8-mxfp4-rht-sr"].contains(&name)
                || ["mxfp4-rht", "mxfp4-sr", "mxfp4-rht-sr"].contains(&name);
            assert_eq!(size == Size::default(), own, "{name}");
        }
    }

    /// Backward GEMMs in MXFP4 of OCP keep their kernels behind whatever forward pass.
    #[test]
    fn gemms_by_themselves_keep_their_kernels() {
        let everywhere = [
            ("mxfp4-mxfp4-rht-sr", [true, false, false]),
            ("mxfp4-mxfp4-rht-sr,from=q", [true; 3]),
            ("fp8-mxfp4-rht-sr,from=q", [false, true, false]),
            ("int8-switchback", [true, true, false]),
            ("fp8", [false, true, true]),
            ("nvfp4", [false, true, true]),
            ("nvfp4,dgrad=bf16", [false, false, true]),
            ("mxfp4-rht-sr,fwd=fp8", [false; 3]),
            ("mxfp4-rht-sr,fwd=fp8,from=q", [false, true, false]),
            ("mxfp4-rht-sr,dgrad=fp8", [false, true, false]),
            ("mxfp4-rht-sr,wgrad=fp8", [false, false, true]),
            ("mxfp4-mxfp4,rht=all", [true, false, false]),
            ("mxfp4-mxfp4,from=q,rht=all", [true; 3]),
            ("bf16,mantissa=4", [true; 3]),
        ];
        let where_fp8_is = [
            ("mxfp4-mxfp4-rht-sr", [false; 3]),
            ("mxfp4-mxfp4-rht-sr,from=q", [false; 3]),
            ("fp8-mxfp4-rht-sr,from=q", [false, true, false]),
            ("tetrajet", [false; 3]),
            ("mxfp4-mxfp4,w=2d", [true, true, false]),
            ("tetrajet,scale=quest,sr=off", [false, true, true]),
            ("tetrajet,scale-fwd=quest", [true; 3]),
            ("tetrajet,scale-fwd=quest,from=x", [true, false, false]),
            ("mxfp4-rht-sr,scale=ceil,fwd=fp8", [false; 3]),
            ("tetrajet,fwd=fp8", [false, true, true]),
            ("tetrajet,dgrad=fp8", [false, true, false]),
            ("mxfp4-mxfp4,rht=all", [true, false, false]),
            ("tetrajet,rht=all", [true; 3]),
            ("tetrajet,rht=all,from=x", [true; 3]),
            ("fp8", [false, true, true]),
            ("nvfp4", [false, true, true]),
        ];
        for (carrier, cases) in
            [(Carrier::Bf16, &everywhere[..]), (Carrier::Fp8, &where_fp8_is[..])]
        {
            for (name, here) in cases {
                let recipe = *name.parse::<Recipe>().unwrap().linear(0);
                let found = Of::ALL.map(|of| of.gemm(&recipe, carrier).is_some());
                assert_eq!(found, *here, "{name}, {carrier:?}");
            }
        }
    }

    /// A recorded kernel gets the numbers of the step that it is launched in.
    #[test]
    fn random_numbers_are_drawn_anew() {
        let of = |step| {
            let source = Source { address: 0, precision: Precision::Bf16 };
            Quantization {
                matrix: Matrix::rows(source, 32, 64, OperandId::Dy),
                operand: *"nvfp4-eden".parse::<Recipe>().unwrap().linear(0).dgrad().a(),
                transform: Some(formats::Transform::of(128, formats::Signs::Random)),
                gemm: GemmId::Dgrad,
                random: Random { seed: 1, step, micro_step: 2, layer: 3, linear: 0 },
                to: To::default(),
            }
        };
        let mut drawing = Drawing { arguments: of(4).arguments(), of: of(4) };
        drawing.redraw([9, 2]);
        assert_eq!(drawing.arguments.drawn(), of(9).arguments().drawn());
    }
}
