//! The language-model head.

use super::*;

/// Rows, C and V.
const SIZES: [[usize; 3]; 5] =
    [[1, 4, 1], [5, 24, 37], [130, 40, 301], [260, 64, 1000], SEVERAL_CHUNKS];

/// Of rows, on a CPU. They are the same on every instruction set and in each precision.
const SEVERAL_CHUNKS: [usize; 3] = [170, 3, 50_000];

/// x (rows, C) as tensors hold it, w (V, C), and targets.
fn operands<B: Harness>(
    [rows, channels, vocab_size]: [usize; 3],
    precision: Precision,
) -> (Vec<f32>, Vec<f32>, Vec<u32>) {
    let x = rounded(&random(rows * channels, 1), B::held(precision));
    let w = random(vocab_size * channels, 2).iter().map(|v| 0.2 * v).collect();
    (x, w, some_tokens(rows, vocab_size, 3))
}

/// Weights of rows, some of them 0 or below.
fn weights(rows: usize) -> Vec<f32> {
    let of_row = |(row, weight): (usize, &f32)| if row % 3 == 1 { 0.0 } else { *weight };
    random(rows, 4).iter().enumerate().map(of_row).collect()
}

pub(super) fn classifier<B: Harness>(backends: &[B]) {
    of_loss(backends, false);
}

/// The same loss, made by the host.
pub(super) fn classifier_of_host<B: Harness>(backends: &[B]) {
    of_loss(backends, true);
}

fn of_loss<B: Harness>(backends: &[B], is_hosts: bool) {
    let scale = 0.25;
    for size @ [rows, channels, vocab_size] in SIZES {
        let once = size == SEVERAL_CHUNKS;
        let backends = if once { &backends[..1] } else { backends };
        for precision in BOTH.into_iter().take(if once { 1 } else { 2 }) {
            let (x, w, ids) = operands::<B>(size, precision);
            let shape = HeadShape { rows, channels, vocab_size, precision };
            let [x64, w64] = [&x, &w].map(|values| f64s(&rounded(values, precision)));
            let layer = LinearShape { rows, inputs: channels, outputs: vocab_size };
            let weights = weights(rows);
            let weighted: Vec<f64> =
                weights.iter().map(|w| f64::from(*w) * f64::from(scale)).collect();
            let plain = vec![f64::from(scale); rows];
            for (scales, weights) in [(plain, None), (weighted, Some(&weights))] {
                let (losses, dx, dw) = reference::classifier(&x64, &w64, &ids, layer, &scales);
                // Twice the error that rounding logits and their gradients makes by itself.
                let off = match precision {
                    Precision::F32 => [0.0; 3],
                    Precision::Bf16 => {
                        let held = [B::held(precision), precision];
                        let rounded = classified(&x64, &w64, &ids, layer, &scales, held);
                        let pairs = rounded.iter().zip([&losses, &dx, &dw]);
                        let mut off = pairs.map(|(rounded, exact)| relative_error(rounded, exact));
                        std::array::from_fn(|_| 2.0 * off.next().unwrap_or(0.0))
                    }
                };
                each(backends, |b| {
                    let bound = |i: usize| off[i] + b.bound(Of::Head, precision);
                    let sequences = Sequences { batch: 1, length: rows };
                    let mut scratch = workspace(b, sequences, channels, 1, vocab_size, precision);
                    let (x, targets) = (input(b, &x, precision), tokens(b, &ids));
                    let params = Params::of(b, &[&w]);
                    let weights = weights.map(|weights| f32_input(b, weights));
                    for accumulate in [false, true].into_iter().take(if once { 1 } else { 2 }) {
                        let before = vec![if accumulate { 1.0 } else { f32::NAN }; dw.len()];
                        let mut flat = Gradients::of(b, &[&before]);
                        let mut our_dx = poison(b, dx.len(), precision);
                        let mut our_losses = f32_poison(b, rows);
                        let [dw_] = flat.get(b);
                        let gradient = ClassifierGradient {
                            dx: &mut our_dx,
                            dw: dw_,
                            weights: weights.as_ref(),
                            scale,
                            accumulate,
                        };
                        let (losses_, w) = (&mut our_losses, params.get(b, 0));
                        if is_hosts {
                            let gradient = Some(gradient);
                            let operands = HostClassifier { losses: losses_, gradient, x: &x, w };
                            let (thread, mut seen) = (std::thread::current().id(), 0);
                            let mut loss = |of: LogitRows<'_>| {
                                assert_eq!(std::thread::current().id(), thread);
                                assert_eq!(of.first, seen, "rows come in order");
                                seen += of.losses.len();
                                cross_entropy(of, &ids, vocab_size);
                                Ok(())
                            };
                            b.classifier_of_host(&mut scratch, operands, shape, &mut loss).unwrap();
                            assert_eq!(seen, rows);
                        } else {
                            let gradient = Some(gradient);
                            let (x, targets) = (&x, &targets);
                            let operands = Classifier { losses: losses_, gradient, x, w, targets };
                            b.classifier(&mut scratch, operands, shape);
                        }
                        let what = |what: &str| format!("{what} of {size:?} in {precision:?}");
                        let ours = read_f32(b, &our_losses, rows);
                        within(b, &what("losses"), &ours, &losses, bound(0));
                        within(b, &what("dx"), &read(b, &our_dx), &dx, bound(1));
                        let exact = if accumulate { plus_one(&dw) } else { dw.clone() };
                        within(b, &what("dw"), &flat.read(b)[0], &exact, bound(2));
                    }
                    let mut alone = f32_poison(b, rows);
                    let operands = Classifier {
                        losses: &mut alone,
                        gradient: None,
                        x: &x,
                        w: params.get(b, 0),
                        targets: &targets,
                    };
                    b.classifier(&mut scratch, operands, shape);
                    let what = "losses alone";
                    within(b, what, &read_f32(b, &alone, rows), &losses, bound(0));
                    if is_hosts {
                        let (losses_, w) = (&mut alone, params.get(b, 0));
                        let operands = HostClassifier { losses: losses_, gradient: None, x: &x, w };
                        let mut loss = |of: LogitRows<'_>| {
                            cross_entropy(of, &ids, vocab_size);
                            Ok(())
                        };
                        b.classifier_of_host(&mut scratch, operands, shape, &mut loss).unwrap();
                        let what = "the host's losses alone";
                        within(b, what, &read_f32(b, &alone, rows), &losses, bound(0));
                    }
                });
            }
        }
    }
}

/// Cross-entropy as a host may write it.
fn cross_entropy(of: LogitRows<'_>, ids: &[u32], vocab_size: usize) {
    let LogitRows { first, logits, losses } = of;
    for (row, (logits, loss)) in logits.chunks_mut(vocab_size).zip(losses).enumerate() {
        let target = ids[first + row] as usize;
        let max = logits.iter().fold(f32::MIN, |max, l| max.max(*l));
        let sum: f64 = logits.iter().map(|l| f64::from(l - max).exp()).sum();
        *loss = (f64::from(max) + sum.ln() - f64::from(logits[target])) as f32;
        logits.iter_mut().for_each(|l| *l = (f64::from(*l - max).exp() / sum) as f32);
        logits[target] -= 1.0;
    }
}

/// An error of the host's loss comes out, and no row is asked for behind it.
pub(super) fn a_loss_that_fails<B: Harness>(backends: &[B]) {
    let size @ [rows, channels, vocab_size] = [5, 24, 37];
    let (x, w, _) = operands::<B>(size, Precision::F32);
    each(backends, |b| {
        let sequences = Sequences { batch: 1, length: rows };
        let mut scratch = workspace(b, sequences, channels, 1, vocab_size, Precision::F32);
        let (x, params) = (input(b, &x, Precision::F32), Params::of(b, &[&w]));
        let mut flat = Gradients::of(b, &[&vec![0.0; w.len()]]);
        let mut dx = poison(b, rows * channels, Precision::F32);
        let mut losses = f32_poison(b, rows);
        let [dw] = flat.get(b);
        let (weights, scale, accumulate) = (None, 1.0, false);
        let gradient = ClassifierGradient { dx: &mut dx, dw, weights, scale, accumulate };
        let gradient = Some(gradient);
        let operands = HostClassifier { losses: &mut losses, gradient, x: &x, w: params.get(b, 0) };
        let shape = HeadShape { rows, channels, vocab_size, precision: Precision::F32 };
        let mut calls = 0;
        let mut loss = |_: LogitRows<'_>| {
            calls += 1;
            Err(crate::Error::Stopped)
        };
        let failed = b.classifier_of_host(&mut scratch, operands, shape, &mut loss);
        assert!(matches!(failed, Err(crate::Error::Stopped)) && calls == 1);
    });
}

pub(super) fn worst_losses<B: Harness>(backends: &[B]) {
    for size @ [rows, channels, vocab_size] in SIZES {
        let once = size == SEVERAL_CHUNKS;
        let backends = if once { &backends[..1] } else { backends };
        for (precision, epsilon) in
            BOTH.into_iter().zip([1e-3, 0.25]).take(if once { 1 } else { 2 })
        {
            let (x, w, ids) = operands::<B>(size, precision);
            let [x64, w64] = [&x, &w].map(|values| f64s(&rounded(values, precision)));
            let layer = LinearShape { rows, inputs: channels, outputs: vocab_size };
            let zeros = vec![0.0; vocab_size];
            let logits = reference::linear_forward(&x64, &w64, &zeros, layer);
            let of = |logits: &[f64]| {
                reference::worst_losses(logits, &ids, vocab_size, f64::from(epsilon))
            };
            let exact = of(&logits);
            // Twice the error that rounding logits makes by itself.
            let held = B::held(precision);
            let rounded: Vec<f32> = logits.iter().map(|v| *v as f32).collect();
            let rounded = of(&f64s(&super::rounded(&rounded, held)));
            each(backends, |b| {
                let found = worst(b, (&x, &w, &ids), size, precision, epsilon);
                let what = |what: &str| format!("{what} of {size:?} in {precision:?}");
                for ((name, ours), (exact, rounded)) in
                    ["worst losses", "amax"].iter().zip(&found[1..]).zip(exact.iter().zip(&rounded))
                {
                    let off = 2.0 * relative_error(rounded, exact);
                    within(b, &what(name), ours, exact, off + b.bound(Of::Head, precision));
                }
                let mut losses = f32_poison(b, rows);
                let params = Params::of(b, &[&w]);
                let operands = Classifier {
                    losses: &mut losses,
                    gradient: None,
                    x: &input(b, &x, precision),
                    w: params.get(b, 0),
                    targets: &tokens(b, &ids),
                };
                let sequences = Sequences { batch: 1, length: rows };
                let mut scratch = workspace(b, sequences, channels, 1, vocab_size, precision);
                let shape = HeadShape { rows, channels, vocab_size, precision };
                b.classifier(&mut scratch, operands, shape);
                assert_eq!(read_f32(b, &losses, rows), found[0], "{}", what("losses"));
            });
        }
    }
}

/// Losses, worst losses and the largest logits, of x, w and targets.
fn worst<B: Harness>(
    b: &B,
    (x, w, ids): (&[f32], &[f32], &[u32]),
    [rows, channels, vocab_size]: [usize; 3],
    precision: Precision,
    epsilon: f32,
) -> [Vec<f32>; 3] {
    let sequences = Sequences { batch: 1, length: rows };
    let mut scratch = workspace(b, sequences, channels, 1, vocab_size, precision);
    let params = Params::of(b, &[w]);
    let [mut losses, mut worst, mut amax] = std::array::from_fn(|_| f32_poison(b, rows));
    let operands = WorstLosses {
        losses: &mut losses,
        worst: &mut worst,
        amax: &mut amax,
        x: &input(b, x, precision),
        w: params.get(b, 0),
        targets: &tokens(b, ids),
        epsilon,
    };
    b.worst_losses(&mut scratch, operands, HeadShape { rows, channels, vocab_size, precision });
    [losses, worst, amax].map(|found| read_f32(b, &found, rows))
}

/// Against what maximizing the loss by hand gives; the logits are exact in bf16.
pub(super) fn the_worst_loss_of_five_logits<B: Harness>(backends: &[B]) {
    let logits = [2.0f32, -1.0, 0.5, 3.0, -2.5];
    let loss = 1.386_871_208_09;
    for (epsilon, sharpness) in
        [(5e-4, 0.106_574_855_685), (1e-3, 0.213_243_578_480), (1e-2, 2.149_163_064_97)]
    {
        let of = |worst: f64| 100.0 * (worst - loss) / (1.0 + loss);
        let [exact, amax] = reference::worst_losses(&f64s(&logits), &[0], 5, epsilon);
        assert!((of(exact[0]) - sharpness).abs() < 1e-8, "{} {sharpness}", of(exact[0]));
        assert_eq!(amax, [3.0]);
        for precision in BOTH {
            each(backends, |b| {
                // Of x only the first channel counts, whose weights are the logits.
                let x: [f32; 8] = std::array::from_fn(|i| if i == 0 { 1.0 } else { 0.0 });
                let w: Vec<f32> = logits.iter().flat_map(|y| x.map(|x| x * y)).collect();
                let found = worst(b, (&x, &w, &[0]), [1, 8, 5], precision, epsilon as f32);
                let [ours, worst, amax] = found.map(|found| found[0]);
                assert_eq!(amax, 3.0);
                assert!((f64::from(ours) - loss).abs() < 1e-6, "{}: loss {ours}", b.name());
                let off = (of(f64::from(worst)) - sharpness).abs();
                assert!(off < 1e-4, "{}: sharpness off by {off:e}", b.name());
            });
        }
    }
}

/// Losses, dx and dw in f64, but for logits and dlogits, which are rounded to a precision each.
fn classified(
    x: &[f64],
    w: &[f64],
    ids: &[u32],
    shape: LinearShape,
    scales: &[f64],
    held: [Precision; 2],
) -> [Vec<f64>; 3] {
    let round = |values: Vec<f64>, precision| match precision {
        Precision::F32 => values,
        Precision::Bf16 => values.iter().map(|v| half::bf16::from_f64(*v).to_f64()).collect(),
    };
    let zeros = vec![0.0; shape.outputs];
    let mut logits = round(reference::linear_forward(x, w, &zeros, shape), held[0]);
    let mut losses = Vec::new();
    for ((row, target), scale) in logits.chunks_mut(shape.outputs).zip(ids).zip(scales) {
        let max = row.iter().copied().fold(f64::MIN, f64::max);
        let sum: f64 = row.iter().map(|l| (l - max).exp()).sum();
        losses.push(max + sum.ln() - row[*target as usize]);
        row.iter_mut().for_each(|l| *l = scale * (*l - max).exp() / sum);
        row[*target as usize] -= scale;
    }
    let (dx, dw, _) = reference::linear_backward(&round(logits, held[1]), x, w, shape);
    [losses, dx, dw]
}

pub(super) fn logits<B: Harness>(backends: &[B]) {
    for size @ [rows, channels, vocab_size] in SIZES {
        for precision in BOTH {
            let (x, w, _) = operands::<B>(size, precision);
            let shape = HeadShape { rows, channels, vocab_size, precision };
            for row in [rows - 1, rows / 2] {
                let one = LinearShape { rows: 1, inputs: channels, outputs: vocab_size };
                let of_row = f64s(&rounded(&x[row * channels..][..channels], precision));
                let zeros = vec![0.0; vocab_size];
                let w64 = f64s(&rounded(&w, precision));
                let exact = reference::linear_forward(&of_row, &w64, &zeros, one);
                each(backends, |b| {
                    let sequences = Sequences { batch: 1, length: rows };
                    let mut scratch = workspace(b, sequences, channels, 1, vocab_size, precision);
                    let (x, params) = (input(b, &x, precision), Params::of(b, &[&w]));
                    let mut ours = f32_poison(b, vocab_size);
                    b.logits(&mut scratch, &mut ours, &x, row, params.get(b, 0), shape);
                    let ours = read_f32(b, &ours, vocab_size);
                    close(b, "logits", &ours, &exact, Of::Logits, precision);
                });
            }
        }
    }
}
