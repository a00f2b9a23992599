//! The tests that every backend passes: each operation against its scalar twin in
//! [`super::reference`], at sizes that nothing divides and at sizes that tiles divide.
//!
//! A test is one function, generic over [`Harness`] and named in `suite!`, which runs it on every
//! instruction set of this processor and on its GPU, as the chip that it is and as an older one.
//! Outputs begin as NaN. What lies behind a batch in its buffers must be neither read nor
//! written, so inputs end in NaN there and outputs in a mark; a mark lies between gradients, too.
//!
//! How far a result may be off is asked of the backend ([`Harness::bound`]): each rounds in places
//! of its own.

mod attend;
mod decode;
mod embed;
mod follow;
mod head;
mod linear;
mod lora;
mod memory;
mod merge;
mod muon;
mod norm;
mod optimize;
mod rotary;
mod select;

pub(in crate::backend) use linear::linear_layers_follow_their_recipes;
pub(in crate::backend) use optimize::{FORMS, Update, loaded, some_values, step, stored};

use super::cpu::Cpu;
use super::cuda::Cuda;
use super::*;
use crate::formats::{Draw, LINEARS, LinearRecipe, MAX_HASHES, Purpose, Random, uniform};
use crate::optim::{
    self, Largest, Master, Moments, Normalization, Optimizer, OptimizerKind, OptimizerStep,
    ParamKind, StepSums,
};
use crate::recipe::Recipe;

/// What the suite asks of a backend besides its operations.
pub(in crate::backend) trait Harness: Backend + Decode {
    /// The most rows of a layer, and tokens of a sequence, that tests take: enough for every case
    /// of its kernels but long reductions.
    const LONGEST: usize;

    /// The backend in every way in which this machine can run it; none, after a line that says why,
    /// where it cannot.
    fn all() -> Vec<Self>;
    /// Which of them this is.
    fn name(&self) -> String;
    /// The precision of tensors that are asked for in one.
    fn held(precision: Precision) -> Precision;
    /// The largest relative error of a result, as Frobenius norms.
    fn bound(&self, of: Of, precision: Precision) -> f64;
    /// Overwrites the start of a tensor.
    fn write_tensor(&self, to: &mut Self::Tensor, values: &[f32]);
    /// All values of a tensor.
    fn read_tensor(&self, from: &Self::Tensor) -> Vec<f32>;
}

/// What a bound is of.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(in crate::backend) enum Of {
    /// Activations, and their gradients, but for those below.
    Activation,
    /// The sum of two embeddings.
    Embedding,
    /// The sum of two activations.
    Sum,
    /// Gradients of embeddings.
    EmbeddingGradient,
    /// Means and deviations of a norm.
    Statistic,
    /// The gradient of a norm's input.
    NormInputGradient,
    /// Gradients of a norm's weights, of biases, and of a linear layer's weights in f32 and bf16.
    ParameterGradient,
    /// The gradient of a linear layer's weights in MXFP4.
    Mxfp4Wgrad(LinearShape),
    /// The same in FP8.
    Fp8Wgrad(LinearShape),
    /// Attention's result, with scores that have a factor.
    Attention(f32),
    /// The logarithms of its sums.
    LogSum(f32),
    /// Its gradient.
    AttentionGradient(f32),
    /// Losses and gradients of the head, besides what rounding the logits makes of them.
    Head,
    /// Logits, of rounded operands.
    Logits,
    /// The global norm of the gradient.
    GradientNorm,
}

/// Runs the whole suite on each backend: `backend::conformance::cpu::attention` and so on.
macro_rules! suite {
    ($($family:ident: $($test:ident)+;)+) => {
        suite!(cpu Cpu $($($family $test)+)+);
        suite!(cuda Cuda $($($family $test)+)+);
    };
    ($wing:ident $backend:ident $($family:ident $test:ident)+) => {
        mod $wing {
            use super::{$backend, Harness as _};

            $(#[test]
            fn $test() {
                let all = $backend::all();
                if !all.is_empty() {
                    super::$family::$test(&all);
                }
            })+
        }
    };
}

suite! {
    memory: buffers_begin_as_zero flat_buffers_are_read_in_pieces gradients_are_apart
        parameters_are_apart what_is_put_aside_comes_back
        master_weights_are_split_and_joined;
    embed: embedding_forward embedding_backward;
    merge: channels_are_merged_by_their_hashes;
    select: gathered_rows_are_those_of_the_definition scattered_rows_leave_the_others
        sums_are_in_the_kept_rows;
    norm: norm_forward add_norm_forward norm_backward;
    rotary: tables_are_of_positions pairs_turn_and_turn_back norms_of_heads;
    linear: linear_layers_follow_their_recipes linear_layers_with_gelu operands_turned_ahead
        nan_poisons_the_products_that_it_enters gelu swiglu layers_with_swiglu;
    lora: adapters;
    attend: attention attention_of_documents attention_of_shared_heads documents_do_not_see_each_other;
    decode: few_rows_are_those_of_a_layer few_rows_with_swiglu attention_in_pieces embedding_behind;
    head: classifier classifier_of_host a_loss_that_fails worst_losses the_worst_loss_of_five_logits
        logits;
    follow: slow_means weights_are_observed a_weight_about_a_threshold_is_reset
        intervals_are_those_of_what_moved;
    optimize: sums_of_losses weighted_losses gradients_are_scaled lanes_are_joined optimizer_steps tried_updates_are_the_updates
        rates_that_do_not_fall_give_the_bits_of_adamw moments_are_stored_to_the_byte
        scales_of_tensors_follow_the_largest weights_ramp_up_to_the_bit
        updates_are_watched;
    muon: matrices_move_along_their_orthogonalized_momentum hard_matrices_stay_within_bounds
        momentum_is_stored_to_the_byte;
}

/// Runs `test` on each of the backends.
fn each<B: Harness>(backends: &[B], test: impl Fn(&B) + Sync) {
    for backend in backends {
        backend.scope(|| test(backend));
    }
}

/// The precisions in which a backend holds tensors.
fn precisions<B: Harness>() -> impl Iterator<Item = Precision> {
    BOTH.into_iter().filter(|precision| B::held(*precision) == *precision)
}

const BOTH: [Precision; 2] = [Precision::F32, Precision::Bf16];

/// A place in a run.
pub(in crate::backend) const RANDOM: Random =
    Random { seed: 42, step: 7, micro_step: 1, layer: 3, linear: 2 };

/// Elements of a buffer behind those that an operation may touch, no multiple of anything.
const BEYOND: usize = 37;

/// What an output holds there.
const MARK: f32 = -7.0;
const MARK_OF_BYTES: u8 = 0xa5;

/// What is cut from an arena as large as it was measured.
fn cut<B: Memory, T>(b: &B, mut f: impl FnMut(&mut B::Arena) -> T) -> T {
    let mut measuring = b.arena(None).unwrap();
    f(&mut measuring);
    let bytes = b.arena_used(&measuring);
    let mut arena = b.arena(Some(bytes)).unwrap();
    let cut = f(&mut arena);
    assert_eq!(b.arena_used(&arena), bytes, "the plan is what is allocated");
    cut
}

/// A tensor of these values and nothing else.
fn dense<B: Harness>(b: &B, values: &[f32], precision: Precision) -> B::Tensor {
    let mut tensor = cut(b, |arena| b.tensor(arena, values.len(), precision));
    b.write_tensor(&mut tensor, values);
    tensor
}

/// A tensor to be read.
fn input<B: Harness>(b: &B, values: &[f32], precision: Precision) -> B::Tensor {
    dense(b, &extended(values, f32::NAN), precision)
}

/// A tensor to be written.
fn output<B: Harness>(b: &B, values: &[f32], precision: Precision) -> B::Tensor {
    dense(b, &extended(values, MARK), precision)
}

/// A tensor of NaN, to be overwritten.
fn poison<B: Harness>(b: &B, len: usize, precision: Precision) -> B::Tensor {
    output(b, &vec![f32::NAN; len], precision)
}

/// The values of an [`output`].
#[track_caller]
fn read<B: Harness>(b: &B, tensor: &B::Tensor) -> Vec<f32> {
    cut_off(b.read_tensor(tensor))
}

/// f32 values to be read.
fn f32_input<B: Harness>(b: &B, values: &[f32]) -> B::F32 {
    let values = extended(values, f32::NAN);
    let mut buffer = cut(b, |arena| b.f32(arena, values.len()));
    b.write_f32(&mut buffer, 0, &values).unwrap();
    buffer
}

/// NaN in f32, to be overwritten.
fn f32_poison<B: Harness>(b: &B, len: usize) -> B::F32 {
    let mut buffer = f32_input(b, &vec![f32::NAN; len]);
    b.write_f32(&mut buffer, len, &[MARK; BEYOND]).unwrap();
    buffer
}

/// The `len` values of an [`f32_poison`].
#[track_caller]
fn read_f32<B: Harness>(b: &B, buffer: &B::F32, len: usize) -> Vec<f32> {
    let mut values = vec![0.0; len + BEYOND];
    b.read_f32(buffer, 0, &mut values).unwrap();
    cut_off(values)
}

fn extended(values: &[f32], with: f32) -> Vec<f32> {
    [values, &[with; BEYOND]].concat()
}

#[track_caller]
fn cut_off(mut values: Vec<f32>) -> Vec<f32> {
    let beyond = values.split_off(values.len() - BEYOND);
    assert_eq!(beyond, [MARK; BEYOND], "what lies behind the batch was written");
    values
}

/// Tokens, in a buffer with room for more.
fn tokens<B: Harness>(b: &B, ids: &[u32]) -> B::Tokens {
    let mut tokens = cut(b, |arena| b.tokens(arena, ids.len() + BEYOND, true).unwrap());
    b.write_tokens(&mut tokens, ids.len(), |to| to.copy_from_slice(ids));
    tokens
}

/// Documents of these lengths, over and over through each sequence, the last of each cut off: where
/// those of each row begin, and where they end.
fn packed(sequences: Sequences, lengths: &[usize]) -> [Vec<u32>; 2] {
    let mut bounds = [Vec::new(), Vec::new()];
    let mut lengths = lengths.iter().cycle();
    for _ in 0..sequences.batch {
        let mut start = 0;
        while start < sequences.length {
            let end = sequences.length.min(start + lengths.next().unwrap());
            for (to, at) in bounds.iter_mut().zip([start, end]) {
                to.resize(to.len() + end - start, at as u32);
            }
            start = end;
        }
    }
    bounds
}

/// The same on the device.
fn documents<B: Harness>(b: &B, bounds: &[Vec<u32>; 2]) -> B::Tokens {
    let words = bounds.concat();
    let mut documents = cut(b, |arena| b.tokens(arena, words.len(), false).unwrap());
    b.write_tokens(&mut documents, words.len(), |to| to.copy_from_slice(&words));
    documents
}

/// The layers of a recipe whose layers are alike.
fn linear_recipe(name: &str) -> LinearRecipe {
    let [recipe] = linear_recipes(name)[..] else { panic!("{name} has layers that differ") };
    recipe
}

/// Those layers of a recipe that differ.
fn linear_recipes(name: &str) -> Vec<LinearRecipe> {
    let recipe: Recipe = name.parse().unwrap();
    let mut layers = (0..LINEARS).map(|number| *recipe.linear(number)).collect::<Vec<_>>();
    layers.dedup();
    layers
}

/// Scratch memory for one more sequence than there is, with layers of up to `channels` channels, in
/// recipes that take the most.
pub(in crate::backend) fn workspace<B: Harness>(
    b: &B,
    sequences: Sequences,
    channels: usize,
    heads: usize,
    vocab_size: usize,
    precision: Precision,
) -> B::Workspace {
    let names = match precision {
        Precision::F32 => vec!["fp32", "mxfp4-rht,g=256"],
        Precision::Bf16 => {
            let names = Recipe::NAMES.into_iter().filter(|name| *name != "fp32");
            names.chain(["fp8-mxfp4-rht-sr,g=256", "tetrajet2,outer=f32"]).collect()
        }
    };
    let recipes: Vec<_> = names.into_iter().flat_map(linear_recipes).collect();
    let sequences = Sequences { batch: sequences.batch + 1, ..sequences };
    let (rows, c, head_size) = (sequences.rows(), channels, channels / heads);
    let linears = [[c, 3 * c], [c, c], [c, 4 * c], [4 * c, c]]
        .map(|[inputs, outputs]| LinearShape { rows, inputs, outputs });
    let packed = DecoderWeights::ALL.map(|weights| linears.map(|layer| (layer, weights))).concat();
    let shape = WorkspaceShape {
        linears: &linears,
        norm: NormShape { rows, channels, epsilon: 0.0, kind: NormKind::Layer },
        attention: AttentionShape {
            sequences,
            heads,
            kv_heads: heads,
            head_size,
            score_factor: 1.0,
            precision,
        },
        head: HeadShape { rows, channels, vocab_size, precision },
        recipes: &recipes,
        merge: Some(MergeShape { sequences, channels: 4 * c, hashes: MAX_HASHES }),
        packed: &packed,
        adapters: &[],
        backward: true,
    };
    cut(b, |arena| b.workspace(arena, &shape))
}

/// Slots of these lengths, in flat buffers of the length that comes with them.
fn slots<B: Memory>(lengths: impl IntoIterator<Item = usize>) -> (Vec<Slot>, usize) {
    let (mut slots, mut end) = (Vec::new(), 0usize);
    for (index, len) in lengths.into_iter().enumerate() {
        // There is always something between two of them.
        let kind = [ParamKind::Matrix, ParamKind::Vector, ParamKind::Table][index % 3];
        let rows = if kind == ParamKind::Matrix { divisor(len) } else { 1 };
        slots.push(Slot { index, start: end, len, rows, kind });
        end = (end + len + 1).next_multiple_of(B::ALIGN);
    }
    (slots, end)
}

/// The largest divisor of a number that is not above its root.
fn divisor(n: usize) -> usize {
    (1..=n.isqrt()).rev().find(|divisor| n.is_multiple_of(*divisor)).unwrap_or(1)
}

/// Parameters side by side.
struct Params<B: Memory> {
    weights: B::Weights,
    slots: Vec<Slot>,
}

impl<B: Harness> Params<B> {
    fn of(b: &B, values: &[&[f32]]) -> Self {
        Self::kept_as(b, values, Master::F32)
    }

    fn kept_as(b: &B, values: &[&[f32]], master: Master) -> Self {
        let (slots, len) = slots::<B>(values.iter().map(|values| values.len()));
        let mut weights = cut(b, |arena| b.weights(arena, len, slots.len(), Master::F32));
        if master == Master::Split && B::HAS_COPIES {
            b.keep_weights_as(&mut weights, len, &slots, master).unwrap();
        }
        for (slot, values) in slots.iter().zip(values) {
            b.write_param(&mut weights, *slot, values).unwrap();
        }
        Self { weights, slots }
    }

    fn get(&self, b: &B, index: usize) -> B::Param<'_> {
        b.param(&self.weights, self.slots[index])
    }

    fn read(&self, b: &B, index: usize) -> Vec<f32> {
        let mut values = vec![0.0; self.slots[index].len];
        b.read_param(&self.weights, self.slots[index], &mut values).unwrap();
        values
    }
}

/// A flat buffer of pieces, with marks between them.
struct Flat<B: Memory> {
    buffer: B::F32,
    slots: Vec<Slot>,
    len: usize,
}

impl<B: Harness> Flat<B> {
    fn of(b: &B, pieces: &[&[f32]]) -> Self {
        let (slots, len) = slots::<B>(pieces.iter().map(|piece| piece.len()));
        let mut values = vec![MARK; len];
        for (slot, piece) in slots.iter().zip(pieces) {
            values[slot.range()].copy_from_slice(piece);
        }
        let mut buffer = cut(b, |arena| b.f32(arena, len));
        b.write_f32(&mut buffer, 0, &values).unwrap();
        Self { buffer, slots, len }
    }

    /// All pieces.
    #[track_caller]
    fn read(&self, b: &B) -> Vec<Vec<f32>> {
        self.read_from(b, &self.buffer)
    }

    /// All pieces of a buffer that is laid out like this one.
    #[track_caller]
    fn read_from(&self, b: &B, buffer: &B::F32) -> Vec<Vec<f32>> {
        let mut values = vec![0.0; self.len];
        b.read_f32(buffer, 0, &mut values).unwrap();
        let pieces = self.slots.iter().map(|slot| values[slot.range()].to_vec()).collect();
        self.slots.iter().for_each(|slot| values[slot.range()].fill(MARK));
        assert!(values.iter().all(|v| *v == MARK), "what lies between the pieces was written");
        pieces
    }
}

/// Gradients, with marks between them.
struct Gradients<B: Memory> {
    flat: FlatGradients<B>,
    slots: Vec<Slot>,
    bytes: usize,
}

impl<B: Harness> Gradients<B> {
    fn of(b: &B, pieces: &[&[f32]]) -> Self {
        Self::kept_in(b, pieces, optim::Gradients::F32)
    }

    fn kept_in(b: &B, pieces: &[&[f32]], kept: optim::Gradients) -> Self {
        let (slots, _) = slots::<B>(pieces.iter().map(|piece| piece.len()));
        let mut flat = cut(b, |arena| FlatGradients::new(b, arena, &slots, kept).unwrap());
        // Of the last one no end is known but its own.
        let bytes = flat.places.last().map_or(0, |place| place.start + place.bytes());
        b.write_bytes(&mut flat.bytes, 0, &vec![MARK_OF_BYTES; bytes]).unwrap();
        for (slot, piece) in slots.iter().zip(pieces) {
            flat.write(b, *slot, piece).unwrap();
        }
        Self { flat, slots, bytes }
    }

    /// The first N.
    fn get<const N: usize>(&mut self, b: &B) -> [Option<B::Gradient<'_>>; N] {
        self.flat.of(b, std::array::from_fn(|i| self.slots[i]))
    }

    /// The first two, of which some are wanted.
    fn wanted(&mut self, b: &B, wanted: [bool; 2]) -> [Option<B::Gradient<'_>>; 2] {
        let mut all = self.get::<2>(b).into_iter();
        wanted.map(|is_wanted| all.next().flatten().filter(|_| is_wanted))
    }

    /// All of them.
    #[track_caller]
    fn read(&self, b: &B) -> Vec<Vec<f32>> {
        let mut bytes = vec![0; self.bytes];
        b.read_bytes(&self.flat.bytes, 0, &mut bytes).unwrap();
        for place in &self.flat.places {
            bytes[place.start..][..place.bytes()].fill(MARK_OF_BYTES);
        }
        let are_marks = bytes.iter().all(|byte| *byte == MARK_OF_BYTES);
        assert!(are_marks, "what lies between the gradients was written");
        let read = |slot: &Slot| {
            let mut values = vec![0.0; slot.len];
            self.flat.read(b, *slot, &mut values).unwrap();
            values
        };
        self.slots.iter().map(read).collect()
    }
}

/// Which of two gradients are wanted, but for both.
const SOME_WANTED: [[bool; 2]; 3] = [[true, false], [false, true], [false, false]];

/// Where some gradients alone are wanted, these and dx are what they were, and others are not written.
#[track_caller]
fn are_as_wanted(
    what: &str,
    wanted: [bool; 2],
    [before, all, some]: [&[Vec<f32>]; 3],
    [dx_of_all, dx_of_some]: [&[f32]; 2],
) {
    assert!(bits(dx_of_all) == bits(dx_of_some), "{what}: dx where {wanted:?} are wanted");
    for (i, is_wanted) in wanted.into_iter().enumerate() {
        let expected = if is_wanted { &all[i] } else { &before[i] };
        assert!(bits(expected) == bits(&some[i]), "{what}: {i} where {wanted:?} are wanted");
    }
}

/// Values of a normal-like distribution with some outliers.
pub(in crate::backend) fn random(len: usize, seed: u64) -> Vec<f32> {
    let draw = Draw::of(seed, Purpose::Weights, 77, 0);
    let value = |i: usize| {
        let [a, b, c, d] = draw.bits(i as u32, 0);
        let value = (uniform(a, b) + uniform(c, d) + uniform(b, c) - 1.5) * 2.0;
        (if a % 97 == 0 { 9.0 * value } else { value }) as f32
    };
    (0..len).map(value).collect()
}

fn some_tokens(len: usize, vocab: usize, seed: u64) -> Vec<u32> {
    let draw = Draw::of(seed, Purpose::Order, 78, 0);
    (0..len).map(|i| draw.bits(i as u32, 0)[0] % vocab as u32).collect()
}

/// Values as a precision holds them.
pub(in crate::backend) fn rounded(values: &[f32], precision: Precision) -> Vec<f32> {
    match precision {
        Precision::F32 => values.to_vec(),
        Precision::Bf16 => values.iter().map(|v| half::bf16::from_f32(*v).to_f32()).collect(),
    }
}

pub(in crate::backend) fn f64s(values: &[f32]) -> Vec<f64> {
    values.iter().map(|v| f64::from(*v)).collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    // One NaN is as good as another.
    values.iter().map(|v| if v.is_nan() { 0x7fc0_0000 } else { v.to_bits() }).collect()
}

/// What was added to ones.
fn plus_one(values: &[f64]) -> Vec<f64> {
    values.iter().map(|v| v + 1.0).collect()
}

/// |a - b| / |b|, Frobenius.
pub(in crate::backend) fn relative_error(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let difference: f64 = a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum();
    (difference / b.iter().map(|v| v * v).sum::<f64>().max(1e-300)).sqrt()
}

#[track_caller]
fn within<B: Harness>(b: &B, what: &str, ours: &[f32], exact: &[f64], bound: f64) {
    let error = relative_error(&f64s(ours), exact);
    assert!(error <= bound, "{}, {what}: relative error {error:e} above {bound:e}", b.name());
}

/// Compares a result with the exact one.
#[track_caller]
fn close<B: Harness>(b: &B, what: &str, ours: &[f32], exact: &[f64], of: Of, precision: Precision) {
    within(b, &format!("{what} in {precision:?}"), ours, exact, b.bound(of, precision));
}
