//! LayerNorm and RMSNorm.

use super::*;

/// Rows and C. From 4,097 channels on a row does not fit the registers of a block of a GPU.
const SIZES: [[usize; 2]; 9] =
    [[1, 8], [21, 1], [21, 24], [21, 100], [7, 33], [300, 384], [65, 768], [9, 1600], [5, 4104]];

const EPSILON: f32 = 1e-5;

/// x, y (rows, C), w and b (C) as a precision holds them.
fn operands([rows, channels]: [usize; 2], precision: Precision) -> [Vec<f32>; 4] {
    [(rows * channels, 1), (rows * channels, 2), (channels, 3), (channels, 4)]
        .map(|(len, seed)| rounded(&random(len, seed), precision))
}

fn poisoned_statistics<B: Harness>(b: &B, rows: usize) -> NormStatistics<B::F32> {
    NormStatistics { mean: f32_poison(b, rows), rstd: f32_poison(b, rows) }
}

const KINDS: [NormKind; 2] = [NormKind::Layer, NormKind::Rms];

/// The bias of LayerNorm, the second of these.
fn bias_of<'a, B: Harness>(b: &B, all: &'a Params<B>, kind: NormKind) -> Option<B::Param<'a>> {
    (kind == NormKind::Layer).then(|| all.get(b, 1))
}

pub(super) fn norm_forward<B: Harness>(backends: &[B]) {
    for (size @ [rows, channels], kind) in SIZES.into_iter().flat_map(|s| KINDS.map(|k| (s, k))) {
        let shape = NormShape { rows, channels, epsilon: EPSILON, kind };
        for precision in precisions::<B>() {
            let [x, _, w, bias] = operands(size, precision);
            let (exact, mean, rstd) =
                reference::norm_forward(kind, &f64s(&x), &f64s(&w), &f64s(&bias), EPSILON.into());
            each(backends, |b| {
                let (x, all) = (input(b, &x, precision), Params::of(b, &[&w, &bias]));
                let params = NormParams { w: all.get(b, 0), b: bias_of(b, &all, kind) };
                let (mut out, mut statistics) =
                    (poison(b, rows * channels, precision), poisoned_statistics(b, rows));
                b.norm_forward(&mut out, statistics.as_mut(), &x, params, shape);
                close(b, "out", &read(b, &out), &exact, Of::Activation, precision);
                if kind == NormKind::Layer {
                    let ours = read_f32(b, &statistics.mean, rows);
                    close(b, "mean", &ours, &mean, Of::Statistic, precision);
                }
                let ours = read_f32(b, &statistics.rstd, rows);
                close(b, "rstd", &ours, &rstd, Of::Statistic, precision);
            });
        }
    }
}

pub(super) fn add_norm_forward<B: Harness>(backends: &[B]) {
    for (size @ [rows, channels], kind) in SIZES.into_iter().flat_map(|s| KINDS.map(|k| (s, k))) {
        let shape = NormShape { rows, channels, epsilon: EPSILON, kind };
        for precision in precisions::<B>() {
            let [x, y, w, bias] = operands(size, precision);
            let sums: Vec<f32> = x.iter().zip(&y).map(|(x, y)| x + y).collect();
            each(backends, |b| {
                let all = Params::of(b, &[&w, &bias]);
                let params = NormParams { w: all.get(b, 0), b: bias_of(b, &all, kind) };
                let [x, y] = [&x, &y].map(|values| input(b, values, precision));
                let [mut out, mut sum] = [(); 2].map(|()| poison(b, rows * channels, precision));
                let mut statistics = poisoned_statistics(b, rows);
                let residual = ResidualSum { sum: &mut sum, x: &x, y: &y };
                b.add_norm_forward(&mut out, statistics.as_mut(), residual, params, shape);
                let sum = read(b, &sum);
                close(b, "sum", &sum, &f64s(&sums), Of::Sum, precision);
                // What is normalized is the sum as it is held.
                let [sum, w, bias] = [&sum, &w, &bias].map(|values| f64s(values));
                let (exact, mean, rstd) =
                    reference::norm_forward(kind, &sum, &w, &bias, EPSILON.into());
                close(b, "out", &read(b, &out), &exact, Of::Activation, precision);
                if kind == NormKind::Layer {
                    let ours = read_f32(b, &statistics.mean, rows);
                    close(b, "mean", &ours, &mean, Of::Statistic, precision);
                }
                let ours = read_f32(b, &statistics.rstd, rows);
                close(b, "rstd", &ours, &rstd, Of::Statistic, precision);
            });
        }
    }
}

pub(super) fn norm_backward<B: Harness>(backends: &[B]) {
    for (size @ [rows, channels], kind) in SIZES.into_iter().flat_map(|s| KINDS.map(|k| (s, k))) {
        let shape = NormShape { rows, channels, epsilon: EPSILON, kind };
        let sequences = Sequences { batch: 1, length: rows };
        for precision in precisions::<B>() {
            let [x, dy, w, _] = operands(size, precision);
            let [x64, dy64, w64] = [&x, &dy, &w].map(|values| f64s(values));
            let (_, mean, rstd) = reference::norm_forward(kind, &x64, &w64, &w64, EPSILON.into());
            let (exact_dx, dw, db) =
                reference::norm_backward(kind, &dy64, &x64, &w64, EPSILON.into());
            let exact_dx = plus_one(&exact_dx);
            each(backends, |b| {
                let mut scratch = workspace(b, sequences, channels, 1, 8, precision);
                let (x, dy) = (input(b, &x, precision), input(b, &dy, precision));
                let params = Params::of(b, &[&w]);
                // What RMSNorm does not read.
                let unread = vec![f64::NAN; rows];
                let mean = if kind == NormKind::Layer { &mean } else { &unread };
                let [mean, rstd] = [mean, &rstd].map(|values| {
                    f32_input(b, &values.iter().map(|v| *v as f32).collect::<Vec<_>>())
                });
                let has_bias = kind == NormKind::Layer;
                for accumulate in [true, false] {
                    let before = vec![if accumulate { 1.0 } else { f32::NAN }; channels];
                    let mut backward = |wanted: [bool; 2]| {
                        let mut dx = output(b, &vec![1.0; rows * channels], precision);
                        let mut flat = Gradients::of(b, &[&before, &before]);
                        let [dw, db] = flat.wanted(b, [wanted[0], wanted[1] && has_bias]);
                        let operands = NormBackward {
                            dx: &mut dx,
                            dw,
                            db,
                            dy: &dy,
                            x: &x,
                            statistics: NormStatistics { mean: &mean, rstd: &rstd },
                            w: params.get(b, 0),
                            accumulate,
                        };
                        b.norm_backward(&mut scratch, operands, shape);
                        (read(b, &dx), flat.read(b))
                    };
                    let (our_dx, ours) = backward([true; 2]);
                    for wanted in SOME_WANTED.into_iter().filter(|_| has_bias) {
                        let (dx, some) = backward(wanted);
                        let before = [before.clone(), before.clone()];
                        let what = format!("{}: {size:?}", b.name());
                        are_as_wanted(&what, wanted, [&before, &ours, &some], [&our_dx, &dx]);
                    }
                    close(b, "dx", &our_dx, &exact_dx, Of::NormInputGradient, precision);
                    let gradients = ["dw", "db"].iter().zip(ours).zip([&dw, &db]);
                    for ((what, ours), exact) in gradients.take(1 + usize::from(has_bias)) {
                        let exact = if accumulate { plus_one(exact) } else { exact.clone() };
                        close(b, what, &ours, &exact, Of::ParameterGradient, precision);
                    }
                }
            });
        }
    }
}
