//! A few rows behind those whose keys and values are kept: products with packed weights, and
//! attention in pieces.

use std::ops::Range;

use super::*;
use crate::formats::{BLOCK, decode_e2m1, decode_e8m0, quantize_closest};

/// Rows, inputs and outputs: one row and few, as many as GPUs take at once and one more, and many.
const SIZES: [[usize; 3]; 7] = [
    [1, 40, 24],
    [1, 808, 130],
    [8, 64, 16],
    [9, 136, 70],
    [70, 72, 33],
    [999, 72, 768],
    [5, 37, 9],
];

/// W as `weights` have it.
fn held_in(w: &[f32], inputs: usize, weights: DecoderWeights) -> Vec<f32> {
    match weights {
        DecoderWeights::F32 => w.to_vec(),
        DecoderWeights::Bf16 => rounded(w, Precision::Bf16),
        DecoderWeights::Mxfp4 => w
            .chunks(inputs)
            .flat_map(|line| line.chunks(BLOCK))
            .flat_map(|block| {
                let (scale, codes) = quantize_closest(&std::array::from_fn(|i| {
                    block.get(i).copied().unwrap_or(0.0)
                }));
                let value = move |code| decode_e2m1(code) * decode_e8m0(scale);
                codes.map(value).into_iter().take(block.len())
            })
            .collect(),
    }
}

/// What rounding leaves where weights are as they are held: of a result in bf16, or, where activations
/// are in f32 beside weights in 4 bits, of x in 8. NOTE: of which a block's largest element, nine times
/// the others, leaves these five.
fn bound<B: Harness>(b: &B, weights: DecoderWeights, of: Of) -> f64 {
    match (weights, B::activations_in(weights, Master::F32)) {
        (DecoderWeights::Mxfp4, Precision::F32) => 2e-2,
        (_, precision) => b.bound(of, precision),
    }
}

pub(super) fn few_rows_are_those_of_a_layer<B: Harness>(backends: &[B]) {
    for (weights, [rows, inputs, outputs]) in
        DecoderWeights::ALL.into_iter().flat_map(|weights| SIZES.map(|size| (weights, size)))
    {
        let shape = LinearShape { rows, inputs, outputs };
        let precision = B::activations_in(weights, Master::F32);
        // Numbers that all precisions have.
        let x = rounded(&random(rows * inputs, 1), Precision::Bf16);
        let bias = rounded(&random(outputs, 2), Precision::Bf16);
        let w = random(outputs * inputs, 3);
        let held = f64s(&held_in(&w, inputs, weights));
        let exact = reference::linear_forward(&f64s(&x), &held, &f64s(&bias), shape);
        let logits = reference::linear_forward(&f64s(&x), &held, &vec![0.0; outputs], shape);
        each(backends, |b| {
            if b.decodes(shape, weights).is_err() {
                return;
            }
            let params = Params::of(b, &[&w, &bias]);
            let mut packed = cut(b, |arena| b.packed(arena, shape, weights));
            b.pack_weight(&mut packed, params.get(b, 0), shape);
            let sequences = Sequences { batch: 1, length: rows };
            let widest = inputs.max(outputs).next_multiple_of(BLOCK);
            let mut scratch = workspace(b, sequences, widest, 1, outputs, precision);
            let mut run = |x: &[f32], form| {
                let shape = LinearShape { rows: x.len() / inputs, ..shape };
                let x = input(b, x, precision);
                let [mut y, mut activated] =
                    [0, 1].map(|_| poison(b, shape.rows * outputs, precision));
                let epilogue = Epilogue::Gelu { out: &mut activated, form };
                let [w, b_] = [params.get(b, 0), params.get(b, 1)];
                let operands = LinearForward {
                    y: &mut y,
                    x: &x,
                    w,
                    b: Some(b_),
                    mean: None,
                    epilogue,
                    turned: None,
                };
                b.packed_forward(&mut scratch, operands, &packed, shape);
                [read(b, &y), read(b, &activated)]
            };
            let what = |of: &str| format!("{of} of {shape:?} with weights in {weights}");
            for form in [Activation::GeluTanh, Activation::Gelu] {
                let [y, activated] = run(&x, form);
                within(b, &what("y"), &y, &exact, bound(b, weights, Of::Activation));
                let gelu: Vec<_> =
                    y.iter().map(|v| reference::gelu_of(form, f64::from(*v))).collect();
                let of_gelu = b.bound(Of::Activation, precision);
                within(b, &what("gelu"), &activated, &gelu, of_gelu);
                for row in [0, rows / 2, rows - 1] {
                    let [alone, _] = run(&x[row * inputs..][..inputs], form);
                    let among = &y[row * outputs..][..outputs];
                    assert_eq!(bits(&alone), bits(among), "{}: {}", b.name(), what("a row alone"));
                }
            }
            let of_layer = shape;
            let shape = HeadShape { rows, channels: inputs, vocab_size: outputs, precision };
            let mut packed = cut(b, |arena| b.packed_head(arena, of_layer, weights));
            b.pack_weight(&mut packed, params.get(b, 0), of_layer);
            let x = input(b, &x, precision);
            let mut run = |of: Range<usize>| {
                let mut ours = f32_poison(b, of.len() * outputs);
                let head = (params.get(b, 0), &packed);
                b.packed_logits(&mut scratch, &mut ours, (&x, of.clone()), head, shape);
                let ours = read_f32(b, &ours, of.len() * outputs);
                let exact = &logits[of.start * outputs..of.end * outputs];
                within(b, &what("logits"), &ours, exact, bound(b, weights, Of::Logits));
                ours
            };
            let all = run(0..rows);
            for of in [0..1, rows - 1..rows, rows / 2..rows] {
                let among = &all[of.start * outputs..of.end * outputs];
                assert_eq!(bits(&run(of)), bits(among), "{}: {}", b.name(), what("logits alone"));
            }
        });
    }
}

/// Without a bias, and through SwiGLU.
pub(super) fn few_rows_with_swiglu<B: Harness>(backends: &[B]) {
    let sizes = [[1, 64, 96], [3, 40, 34], [17, 128, 256], [70, 64, 80]];
    for (weights, [rows, inputs, outputs]) in
        DecoderWeights::ALL.into_iter().flat_map(|weights| sizes.map(|size| (weights, size)))
    {
        let (shape, m) = (LinearShape { rows, inputs, outputs }, outputs / 2);
        let precision = B::activations_in(weights, Master::F32);
        let x = rounded(&random(rows * inputs, 1), Precision::Bf16);
        let w = random(outputs * inputs, 3);
        let held = f64s(&held_in(&w, inputs, weights));
        let exact = reference::linear_forward(&f64s(&x), &held, &vec![0.0; outputs], shape);
        each(backends, |b| {
            if b.decodes(shape, weights).is_err() {
                return;
            }
            let what = |of: &str| format!("{of} of {shape:?} with weights in {weights}");
            let params = Params::of(b, &[&w]);
            let mut packed = cut(b, |arena| b.packed(arena, shape, weights));
            b.pack_weight(&mut packed, params.get(b, 0), shape);
            let sequences = Sequences { batch: 1, length: rows };
            let widest = inputs.max(outputs).next_multiple_of(BLOCK);
            let mut scratch = workspace(b, sequences, widest, 1, outputs, precision);
            let mut run = |x: &[f32]| {
                let shape = LinearShape { rows: x.len() / inputs, ..shape };
                let x = input(b, x, precision);
                let [mut y, mut out] =
                    [outputs, m].map(|width| poison(b, shape.rows * width, precision));
                let operands = LinearForward {
                    y: &mut y,
                    x: &x,
                    w: params.get(b, 0),
                    b: None,
                    mean: None,
                    epilogue: Epilogue::SwiGlu { out: &mut out },
                    turned: None,
                };
                b.packed_forward(&mut scratch, operands, &packed, shape);
                [read(b, &y), read(b, &out)]
            };
            let [y, out] = run(&x);
            within(b, &what("y"), &y, &exact, bound(b, weights, Of::Activation));
            let gated = reference::swiglu_forward(&f64s(&y), m);
            within(b, &what("swiglu"), &out, &gated, b.bound(Of::Activation, precision));
            for row in [0, rows - 1] {
                let [_, alone] = run(&x[row * inputs..][..inputs]);
                assert_eq!(bits(&alone), bits(&out[row * m..][..m]), "{}", what("a row alone"));
            }
        });
    }
}

pub(super) fn attention_in_pieces<B: Harness>(backends: &[B]) {
    let sizes = [
        (2, 2, 64, 150),
        (1, 1, 128, 70),
        (2, 2, 40, 33),
        (3, 3, 72, 90),
        (2, 2, 17, 45),
        (1, 1, 160, 20),
        (1, 1, 8, 1100),
        (4, 2, 64, 75),
        (6, 2, 128, 40),
        (3, 1, 40, 50),
        (4, 1, 18, 33),
    ];
    for (heads, kv_heads, head_size, length) in sizes {
        let (c, wide) = (heads * head_size, (heads + 2 * kv_heads) * head_size);
        for held in precisions::<B>() {
            let qkv = rounded(&random(length * wide, 6), held);
            let shape = |length, precision| AttentionShape {
                sequences: Sequences { batch: 1, length },
                heads,
                kv_heads,
                head_size,
                score_factor: 0.75,
                precision,
            };
            let (exact, _) = reference::attention_forward(&f64s(&qkv), shape(length, held));
            each(backends, |b| {
                let sequences = Sequences { batch: 1, length: length + 50 };
                let mut scratch = workspace(b, sequences, c, heads, 8, held);
                let mut run = |pieces: &[usize]| {
                    let mut kept = cut(b, |arena| b.kept(arena, length, shape(1, held)));
                    let mut tokens = cut(b, |arena| b.rows(arena, length).unwrap());
                    let (mut start, mut all) = (0, Vec::new());
                    for rows in pieces.iter().cycle() {
                        let rows = (*rows).min(length - start);
                        let of_rows = input(b, &qkv[start * wide..][..rows * wide], held);
                        let mut out = poison(b, rows * c, held);
                        let shape = shape(rows, held);
                        b.write_rows(&mut tokens, &vec![0; rows], &[start]);
                        let at = (&tokens, OfSequence { all: rows, first: 0, start });
                        b.attention_behind(&mut scratch, &mut out, &of_rows, &mut kept, at, shape);
                        all.extend(read(b, &out));
                        start += rows;
                        if start == length {
                            return all;
                        }
                    }
                    unreachable!("there are pieces")
                };
                let what = format!("({length}, {heads} and {kv_heads} of {head_size}) in {held:?}");
                let whole = run(&[length]);
                let bound = b.bound(Of::Attention(1.0), held);
                within(b, &what, &whole, &exact, bound);
                for pieces in [&[1][..], &[17, 1, 3, 16], &[40, 2]] {
                    let parts = run(pieces);
                    let name = b.name();
                    assert_eq!(
                        bits(&parts),
                        bits(&whole),
                        "{name}: {what} in pieces of {pieces:?}"
                    );
                }
                // A row of each of several sequences, of which so many positions are kept.
                let starts = [length / 2, length - 1, 0, 7];
                let mut tokens = cut(b, |arena| b.rows(arena, length).unwrap());
                let mut kept: Vec<_> = starts
                    .iter()
                    .map(|start| {
                        let mut kept = cut(b, |arena| b.kept(arena, length, shape(1, held)));
                        if *start > 0 {
                            let of_rows = input(b, &qkv[..start * wide], held);
                            let mut out = poison(b, start * c, held);
                            b.write_rows(&mut tokens, &vec![0; *start], &[0]);
                            let at = (&tokens, OfSequence { all: *start, first: 0, start: 0 });
                            let shape = shape(*start, held);
                            b.attention_behind(
                                &mut scratch,
                                &mut out,
                                &of_rows,
                                &mut kept,
                                at,
                                shape,
                            );
                            read(b, &out);
                        }
                        kept
                    })
                    .collect();
                let rows: Vec<f32> =
                    starts.iter().flat_map(|at| &qkv[at * wide..][..wide]).copied().collect();
                let of_rows = input(b, &rows, held);
                let mut out = poison(b, starts.len() * c, held);
                b.write_rows(&mut tokens, &[0; 4], &starts);
                for (first, (kept, start)) in kept.iter_mut().zip(starts).enumerate() {
                    let at = (&tokens, OfSequence { all: starts.len(), first, start });
                    b.attention_behind(&mut scratch, &mut out, &of_rows, kept, at, shape(1, held));
                }
                let expected: Vec<f32> =
                    starts.iter().flat_map(|at| &whole[at * c..][..c]).copied().collect();
                assert_eq!(bits(&read(b, &out)), bits(&expected), "{}: {what} of each", b.name());
            });
        }
    }
}

pub(super) fn embedding_behind<B: Harness>(backends: &[B]) {
    let cases: [(usize, &[usize], usize); 5] =
        [(1, &[0], 8), (1, &[40], 136), (7, &[3], 30), (40, &[1], 64), (3, &[17, 0, 40], 24)];
    for (rows, starts, channels) in cases {
        for precision in precisions::<B>() {
            let tables = [100, 41].map(|n| rounded(&random(n * channels, n as u64), precision));
            let ids = some_tokens(rows, 100, 5);
            let exact: Vec<f64> = (0..rows * channels)
                .map(|i| {
                    let (row, channel) = (i / channels, i % channels);
                    let of = |table: usize, at: usize| tables[table][at * channels + channel];
                    let position = if starts.len() > 1 { starts[row] } else { starts[0] + row };
                    f64::from(of(0, ids[row] as usize)) + f64::from(of(1, position))
                })
                .collect();
            each(backends, |b| {
                let params = Params::of(b, &[&tables[0], &tables[1]]);
                let mut tokens = cut(b, |arena| b.rows(arena, rows + 3).unwrap());
                b.write_rows(&mut tokens, &ids, starts);
                let mut out = poison(b, rows * channels, precision);
                let sequences = Sequences { batch: 1, length: rows };
                let shape = EmbeddingShape { sequences, channels };
                let (wte, wpe) = (params.get(b, 0), params.get(b, 1));
                b.embedding_behind(&mut out, (&tokens, starts), wte, Some(wpe), shape);
                let what = format!("{rows} rows of {channels} from {starts:?} on");
                close(b, &what, &read(b, &out), &exact, Of::Embedding, precision);
            });
        }
    }
}
