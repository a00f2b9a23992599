//! Rotary positions, and the norms of heads.

use super::*;

/// B, T, H, kv heads and channels of a head.
const SIZES: [(usize, usize, usize, usize, usize); 8] = [
    (1, 1, 1, 1, 2),
    (2, 5, 3, 1, 6),
    (1, 33, 4, 2, 20),
    (2, 40, 3, 3, 64),
    (1, 21, 16, 4, 64),
    (3, 7, 5, 1, 80),
    (1, 50, 8, 2, 128),
    (1, 9, 2, 1, 256),
];

const EPSILON: f32 = 1e-6;

fn shape_of(
    (batch, length, heads, kv_heads, head_size): (usize, usize, usize, usize, usize),
    precision: Precision,
) -> AttentionShape {
    let (sequences, score_factor) = (Sequences { batch, length }, 1.0);
    AttentionShape { sequences, heads, kv_heads, head_size, score_factor, precision }
}

fn frequencies(head_size: usize) -> Vec<f32> {
    let of = |pair: usize| 1e4f32.powf(-(2.0 * pair as f32) / head_size as f32);
    (0..head_size / 2).map(of).collect()
}

/// Numbers of length 1, as f32 has them.
fn some_table(rows: usize, head_size: usize) -> Vec<f32> {
    let positions: Vec<_> = (0..rows).map(|row| row * 7 % 5000).collect();
    reference::rotations(&positions, &frequencies(head_size)).iter().map(|v| *v as f32).collect()
}

/// Far out as near, in documents, and behind others.
pub(super) fn tables_are_of_positions<B: Harness>(backends: &[B]) {
    for size @ (batch, length, .., d) in SIZES.into_iter().chain([(1, 4000, 1, 1, 64)]) {
        let shape = shape_of(size, Precision::F32);
        let (rows, f) = (batch * length, frequencies(d));
        for lengths in [None, Some(&[3, 1, 20, 7][..])] {
            let bounds = lengths.map(|lengths| packed(shape.sequences, lengths));
            let start = |row: usize| bounds.as_ref().map_or(0, |[starts, _]| starts[row] as usize);
            let positions: Vec<_> = (0..rows).map(|row| row % length - start(row)).collect();
            let exact = reference::rotations(&positions, &f);
            each(backends, |b| {
                let documents = bounds.as_ref().map(|bounds| documents(b, bounds));
                let mut table = poison(b, rows * d, Precision::F32);
                b.rotations(&mut table, &f, documents.as_ref(), shape);
                let ours = read(b, &table);
                for (i, (ours, exact)) in ours.iter().zip(&exact).enumerate() {
                    let error = (f64::from(*ours) - exact).abs();
                    assert!(error < 3e-7, "{}: {size:?}, {i}: off by {error:e}", b.name());
                }
            });
        }
        for starts in [vec![9], (0..length).map(|row| row * 31 % 1000).collect()] {
            let sequences = Sequences { batch: 1, length };
            let shape = AttentionShape { sequences, ..shape };
            let start = |row: usize| match starts.len() {
                1 => starts[0] + row,
                _ => starts[row],
            };
            let positions: Vec<_> = (0..length).map(start).collect();
            let exact = reference::rotations(&positions, &f);
            each(backends, |b| {
                let mut tokens = cut(b, |arena| b.rows(arena, length).unwrap());
                b.write_rows(&mut tokens, &vec![0; length], &starts);
                let mut table = poison(b, length * d, Precision::F32);
                b.rotations_behind(&mut table, &f, (&tokens, &starts), shape);
                for (ours, exact) in read(b, &table).iter().zip(&exact) {
                    assert!((f64::from(*ours) - exact).abs() < 3e-7, "{}: {size:?}", b.name());
                }
            });
        }
    }
}

pub(super) fn pairs_turn_and_turn_back<B: Harness>(backends: &[B]) {
    for size in SIZES {
        for precision in precisions::<B>() {
            let shape = shape_of(size, precision);
            let rows = shape.sequences.rows();
            let qkv = rounded(&random(rows * shape.qkv_channels(), 3), precision);
            let table = some_table(rows, shape.head_size);
            for (turn, sign) in [(Turn::Forward, 1.0), (Turn::Back, -1.0)] {
                let exact = reference::rotate(&f64s(&qkv), &f64s(&table), sign, shape);
                each(backends, |b| {
                    let table = input(b, &table, Precision::F32);
                    let mut ours = output(b, &qkv, precision);
                    b.rotate(&mut ours, &table, turn, shape);
                    let ours = read(b, &ours);
                    close(b, &format!("{size:?}"), &ours, &exact, Of::Activation, precision);
                    let first = (shape.heads + shape.kv_heads) * shape.head_size;
                    let rows =
                        ours.chunks(shape.qkv_channels()).zip(qkv.chunks(shape.qkv_channels()));
                    for (ours, qkv) in rows {
                        assert_eq!(bits(&ours[first..]), bits(&qkv[first..]), "v stays");
                    }
                });
            }
        }
    }
}

pub(super) fn norms_of_heads<B: Harness>(backends: &[B]) {
    for size in SIZES {
        for precision in precisions::<B>() {
            let shape = shape_of(size, precision);
            let (d, wide, rows) = (shape.head_size, shape.qkv_channels(), shape.sequences.rows());
            let norm = NormShape { rows, channels: d, epsilon: EPSILON, kind: NormKind::Rms };
            let [qkv, dqkv] = [4, 5].map(|seed| rounded(&random(rows * wide, seed), precision));
            let w = [6, 7].map(|seed| rounded(&random(d, seed), precision));
            let (table, [of_q, of_k]) = (some_table(rows, d), w.clone().map(|w| f64s(&w)));
            let [qkv64, dqkv64, table64] = [&qkv, &dqkv, &table].map(|values| f64s(values));
            // By head: its norm, or v.
            let turned = shape.heads + shape.kv_heads;
            let weight = |head: usize| match head % (turned + shape.kv_heads) {
                head if head < shape.heads => Some(&of_q),
                head if head < turned => Some(&of_k),
                _ => None,
            };
            let normed: Vec<f64> = qkv64
                .chunks(d)
                .enumerate()
                .flat_map(|(head, x)| match weight(head) {
                    Some(w) => reference::norm_forward(NormKind::Rms, x, w, w, EPSILON.into()).0,
                    None => x.to_vec(),
                })
                .collect();
            let exact = reference::rotate(&normed, &table64, 1.0, shape);
            let back = reference::rotate(&dqkv64, &table64, -1.0, shape);
            let mut exact_dw = [vec![0.0; d], vec![0.0; d]];
            let mut exact_back = Vec::new();
            for (head, (dy, x)) in back.chunks(d).zip(qkv64.chunks(d)).enumerate() {
                let Some(w) = weight(head) else {
                    exact_back.extend(dy);
                    continue;
                };
                let (dx, dw, _) = reference::norm_backward(NormKind::Rms, dy, x, w, EPSILON.into());
                exact_back.extend(dx);
                let to = &mut exact_dw[usize::from(std::ptr::eq(w, &of_k))];
                to.iter_mut().zip(dw).for_each(|(to, dw)| *to += dw);
            }
            each(backends, |b| {
                let what = |what: &str| format!("{what} of {size:?}");
                let mut scratch =
                    workspace(b, shape.sequences, shape.channels(), shape.heads, 8, precision);
                let params = Params::of(b, &[&w[0], &w[1]]);
                let (of_qkv, table) = (input(b, &qkv, precision), input(b, &table, Precision::F32));
                let mut out = poison(b, rows * wide, precision);
                let norms = HeadNorms { q: params.get(b, 0), k: params.get(b, 1) };
                b.head_norms_forward(&mut out, &of_qkv, &table, norms, (shape, norm));
                close(b, &what("out"), &read(b, &out), &exact, Of::Activation, precision);
                for accumulate in [true, false] {
                    let before = vec![if accumulate { 1.0 } else { f32::NAN }; d];
                    let mut backward = |wanted| {
                        let mut flat = Gradients::of(b, &[&before, &before]);
                        let [dq, dk] = flat.wanted(b, wanted);
                        let mut dqkv = output(b, &dqkv, precision);
                        let operands = HeadNormsBackward {
                            dqkv: &mut dqkv,
                            dq,
                            dk,
                            qkv: &of_qkv,
                            table: &table,
                            norms: HeadNorms { q: params.get(b, 0), k: params.get(b, 1) },
                            accumulate,
                        };
                        b.head_norms_backward(&mut scratch, operands, (shape, norm));
                        (read(b, &dqkv), flat.read(b))
                    };
                    let (ours, all) = backward([true; 2]);
                    close(b, &what("dqkv"), &ours, &exact_back, Of::NormInputGradient, precision);
                    for wanted in SOME_WANTED {
                        let (dqkv, some) = backward(wanted);
                        let before = [before.clone(), before.clone()];
                        let name = format!("{}: {size:?}", b.name());
                        are_as_wanted(&name, wanted, [&before, &all, &some], [&ours, &dqkv]);
                    }
                    for (ours, exact) in all.iter().zip(&exact_dw) {
                        let exact = if accumulate { plus_one(exact) } else { exact.clone() };
                        close(b, &what("dw"), ours, &exact, Of::ParameterGradient, precision);
                    }
                }
            });
        }
    }
}
