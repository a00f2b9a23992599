//! Scalar twins: operations of [`super::Backend`] in plain f64 loops, for tests. They are the
//! definition in words of one line each; nothing here is fast. What one test alone compares with
//! stands beside that test.

use super::{Activation, AttentionShape, LinearShape, NormKind, OptimizerStep, Sequences};
use crate::optim::Optimizer;

/// Row-major (rows, depth) times (cols, depth)^T.
pub(crate) fn product(a: &[f64], b: &[f64], rows: usize, cols: usize, depth: usize) -> Vec<f64> {
    let (a, b) = (&a[..rows * depth], &b[..cols * depth]);
    a.chunks(depth).flat_map(|a| b.chunks(depth).map(move |b| dot(a, b))).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// (rows, cols) to (cols, rows).
pub(crate) fn transpose(x: &[f64], rows: usize, cols: usize) -> Vec<f64> {
    let mut out = vec![0.0; x.len()];
    for i in 0..rows {
        for j in 0..cols {
            out[j * rows + i] = x[i * cols + j];
        }
    }
    out
}

pub(crate) fn linear_forward(x: &[f64], w: &[f64], b: &[f64], shape: LinearShape) -> Vec<f64> {
    let LinearShape { rows, inputs, outputs } = shape;
    let mut y = product(x, w, rows, outputs, inputs);
    for row in y.chunks_mut(outputs) {
        row.iter_mut().zip(b).for_each(|(y, b)| *y += b);
    }
    y
}

/// dx, dW, db.
pub(crate) fn linear_backward(
    dy: &[f64],
    x: &[f64],
    w: &[f64],
    shape: LinearShape,
) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
    let LinearShape { rows, inputs, outputs } = shape;
    let dx = product(dy, &transpose(w, outputs, inputs), rows, inputs, outputs);
    let dy_t = transpose(dy, rows, outputs);
    let dw = product(&dy_t, &transpose(x, rows, inputs), outputs, inputs, rows);
    let db = dy_t.chunks(rows).map(|column| column.iter().sum()).collect();
    (dx, dw, db)
}

pub(crate) fn embedding_forward(
    (tokens, starts): (&[u32], Option<&[u32]>),
    wte: &[f64],
    wpe: &[f64],
    sequences: Sequences,
    c: usize,
) -> Vec<f64> {
    let mut out = Vec::new();
    for (row, token) in tokens[..sequences.rows()].iter().enumerate() {
        let position = row % sequences.length - starts.map_or(0, |starts| starts[row] as usize);
        out.extend((0..c).map(|i| wte[*token as usize * c + i] + wpe[position * c + i]));
    }
    out
}

/// These rows of x (rows, C).
pub(crate) fn rows(x: &[f32], numbers: &[usize], c: usize) -> Vec<f32> {
    numbers.iter().flat_map(|row| &x[row * c..][..c]).copied().collect()
}

/// Overwrites these rows of `to` (rows, C) by those of x.
pub(crate) fn set_rows(to: &mut [f32], numbers: &[usize], x: &[f32], c: usize) {
    for (row, x) in numbers.iter().zip(x.chunks(c)) {
        to[row * c..][..c].copy_from_slice(x);
    }
}

/// Normalized rows, means (0 of RMSNorm), and what rows are multiplied by.
pub(crate) fn norm_forward(
    kind: NormKind,
    x: &[f64],
    w: &[f64],
    b: &[f64],
    epsilon: f64,
) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
    let c = w.len();
    let (mut out, mut means, mut rstds) = (Vec::new(), Vec::new(), Vec::new());
    let (about, by) = match kind {
        NormKind::Layer => (1.0, 1.0),
        NormKind::Rms => (0.0, 0.0),
    };
    for x in x.chunks(c) {
        let mean = about * x.iter().sum::<f64>() / c as f64;
        let variance = x.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / c as f64;
        let rstd = 1.0 / (variance + epsilon).sqrt();
        out.extend((0..c).map(|i| (x[i] - mean) * rstd * w[i] + by * b[i]));
        means.push(mean);
        rstds.push(rstd);
    }
    (out, means, rstds)
}

/// dx, dw, db, which RMSNorm has no use for.
pub(crate) fn norm_backward(
    kind: NormKind,
    dy: &[f64],
    x: &[f64],
    w: &[f64],
    epsilon: f64,
) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
    let c = w.len();
    let (_, means, rstds) = norm_forward(kind, x, w, w, epsilon);
    let (mut dx, mut dw, mut db) = (Vec::new(), vec![0.0; c], vec![0.0; c]);
    for (row, (dy, x)) in dy.chunks(c).zip(x.chunks(c)).enumerate() {
        let n: Vec<f64> = x.iter().map(|v| (v - means[row]) * rstds[row]).collect();
        let g: Vec<f64> = (0..c).map(|i| dy[i] * w[i]).collect();
        let mean_g = match kind {
            NormKind::Layer => g.iter().sum::<f64>() / c as f64,
            NormKind::Rms => 0.0,
        };
        let mean_gn = (0..c).map(|i| g[i] * n[i]).sum::<f64>() / c as f64;
        dx.extend((0..c).map(|i| rstds[row] * (g[i] - mean_g - n[i] * mean_gn)));
        for i in 0..c {
            dw[i] += dy[i] * n[i];
            db[i] += dy[i];
        }
    }
    (dx, dw, db)
}

fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

/// silu(gate) up of y = [gate | up] (rows, 2 M).
pub(crate) fn swiglu_forward(y: &[f64], m: usize) -> Vec<f64> {
    let row = |y: &[f64]| (0..m).map(|i| silu(y[i]) * y[m + i]).collect::<Vec<_>>();
    y.chunks(2 * m).flat_map(row).collect()
}

/// The gradient of y, of d (rows, M).
pub(crate) fn swiglu_backward(y: &[f64], d: &[f64], m: usize) -> Vec<f64> {
    let mut dy = Vec::new();
    for (y, d) in y.chunks(2 * m).zip(d.chunks(m)) {
        let s = |x: f64| 1.0 / (1.0 + (-x).exp());
        let slope = |x: f64| s(x) + x * s(x) * (1.0 - s(x));
        dy.extend((0..m).map(|i| d[i] * y[m + i] * slope(y[i])));
        dy.extend((0..m).map(|i| d[i] * silu(y[i])));
    }
    dy
}

/// What rows at these positions are turned by: cosines, then sines.
pub(crate) fn rotations(positions: &[usize], frequencies: &[f32]) -> Vec<f64> {
    let mut table = Vec::new();
    for position in positions {
        let angles = frequencies.iter().map(|f| f64::from(*position as f32 * f));
        table.extend(angles.clone().map(f64::cos));
        table.extend(angles.map(f64::sin));
    }
    table
}

/// q and k of qkv, turned as complex numbers are by numbers of length 1; with a sign of -1 back.
pub(crate) fn rotate(qkv: &[f64], table: &[f64], sign: f64, shape: AttentionShape) -> Vec<f64> {
    let (d, wide) = (shape.head_size, shape.qkv_channels());
    let mut out = qkv.to_vec();
    for (row, table) in out.chunks_mut(wide).zip(table.chunks(d)) {
        for head in row.chunks_mut(d).take(shape.heads + shape.kv_heads) {
            for i in 0..d / 2 {
                let (re, im, cos, sin) =
                    (head[i], head[i + d / 2], table[i], sign * table[i + d / 2]);
                (head[i], head[i + d / 2]) = (re * cos - im * sin, re * sin + im * cos);
            }
        }
    }
    out
}

fn gelu(x: f64) -> f64 {
    0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh())
}

fn gelu_derivative(x: f64) -> f64 {
    let a = (2.0 / std::f64::consts::PI).sqrt();
    let t = (a * (x + 0.044715 * x.powi(3))).tanh();
    0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * a * (1.0 + 3.0 * 0.044715 * x * x)
}

/// GELU in one of its forms.
pub(crate) fn gelu_of(form: Activation, x: f64) -> f64 {
    match form {
        Activation::GeluTanh => gelu(x),
        Activation::Gelu => x * normal_below(x),
    }
}

pub(crate) fn gelu_derivative_of(form: Activation, x: f64) -> f64 {
    let density = (-x * x / 2.0).exp() / (2.0 * std::f64::consts::PI).sqrt();
    match form {
        Activation::GeluTanh => gelu_derivative(x),
        Activation::Gelu if density == 0.0 => normal_below(x),
        Activation::Gelu => normal_below(x) + x * density,
    }
}

/// The probability that a normal number is less than x: 1/2 + density (x + x^3 / 3 + x^5 / (3 5) +
/// ..).
fn normal_below(x: f64) -> f64 {
    if x.abs() > 9.0 {
        return if x > 0.0 { 1.0 } else { 0.0 };
    }
    let (mut sum, mut term) = (x, x);
    for k in 1..400 {
        term *= x * x / f64::from(2 * k + 1);
        sum += term;
    }
    0.5 + sum * (-x * x / 2.0).exp() / (2.0 * std::f64::consts::PI).sqrt()
}

/// out (B, T, C) and lse (B, H, T) from qkv (B, T, qkv channels).
pub(crate) fn attention_forward(qkv: &[f64], shape: AttentionShape) -> (Vec<f64>, Vec<f64>) {
    attention_forward_of(qkv, None, shape)
}

/// The same where of each row (B T) it is known at which position its document begins.
pub(crate) fn attention_forward_of(
    qkv: &[f64],
    starts: Option<&[u32]>,
    shape: AttentionShape,
) -> (Vec<f64>, Vec<f64>) {
    let mut out = vec![0.0; shape.sequences.rows() * shape.channels()];
    let mut lse = vec![0.0; shape.sequences.rows() * shape.heads];
    each_query(qkv, starts, shape, |query, keys, p, log_sum| {
        lse[query.lse] = log_sum;
        for ([_, v], p) in keys.iter().zip(p) {
            for i in 0..shape.head_size {
                out[query.out + i] += p * qkv[v + i];
            }
        }
    });
    (out, lse)
}

/// dqkv (B, T, qkv channels).
pub(crate) fn attention_backward(dout: &[f64], qkv: &[f64], shape: AttentionShape) -> Vec<f64> {
    attention_backward_of(dout, qkv, None, shape)
}

/// The same where of each row (B T) it is known at which position its document begins.
pub(crate) fn attention_backward_of(
    dout: &[f64],
    qkv: &[f64],
    starts: Option<&[u32]>,
    shape: AttentionShape,
) -> Vec<f64> {
    let d = shape.head_size;
    let mut dqkv = vec![0.0; qkv.len()];
    let scale = f64::from(shape.score_factor) / (d as f64).sqrt();
    each_query(qkv, starts, shape, |query, keys, p, _| {
        let dp: Vec<f64> =
            keys.iter().map(|[_, v]| dot(&dout[query.out..][..d], &qkv[*v..][..d])).collect();
        let mean: f64 = p.iter().zip(&dp).map(|(p, dp)| p * dp).sum();
        for (n, [k, v]) in keys.iter().enumerate() {
            let ds = p[n] * (dp[n] - mean) * scale;
            for i in 0..d {
                dqkv[query.q + i] += ds * qkv[k + i];
                dqkv[k + i] += ds * qkv[query.q + i];
                dqkv[v + i] += p[n] * dout[query.out + i];
            }
        }
    });
    dqkv
}

/// Where a query's values start: q in qkv, its row in out, its place in lse.
struct Query {
    q: usize,
    out: usize,
    lse: usize,
}

/// Calls `f(query, where k and v of the visible rows start, probabilities, log sum exp)`.
fn each_query(
    qkv: &[f64],
    starts: Option<&[u32]>,
    shape: AttentionShape,
    mut f: impl FnMut(Query, &[[usize; 2]], &[f64], f64),
) {
    let (t, d) = (shape.sequences.length, shape.head_size);
    for b in 0..shape.sequences.batch {
        for h in 0..shape.heads {
            for i in 0..t {
                let first = starts.map_or(0, |starts| starts[b * t + i] as usize);
                let [q, k, v] = shape.starts(h);
                let row = |row: usize| (b * t + row) * shape.qkv_channels();
                let keys: Vec<[usize; 2]> = (first..=i).map(|j| [row(j) + k, row(j) + v]).collect();
                let score = |[k, _]: &[usize; 2]| {
                    let dot = dot(&qkv[row(i) + q..][..d], &qkv[*k..][..d]);
                    dot * f64::from(shape.score_factor) / (d as f64).sqrt()
                };
                let scores: Vec<f64> = keys.iter().map(score).collect();
                let max = scores.iter().copied().fold(f64::MIN, f64::max);
                let sum: f64 = scores.iter().map(|s| (s - max).exp()).sum();
                let log_sum = max + sum.ln();
                let p: Vec<f64> = scores.iter().map(|s| (s - log_sum).exp()).collect();
                let query = Query {
                    q: row(i) + q,
                    out: (b * t + i) * shape.channels() + h * d,
                    lse: (b * shape.heads + h) * t + i,
                };
                f(query, &keys, &p, log_sum);
            }
        }
    }
}

/// Losses, and dx and dwte of `scale` times their sum; shape is rows, channels, vocabulary.
pub(crate) fn classifier(
    x: &[f64],
    wte: &[f64],
    targets: &[u32],
    shape: LinearShape,
    scales: &[f64],
) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
    let zeros = vec![0.0; shape.outputs];
    let mut logits = linear_forward(x, wte, &zeros, shape);
    let mut losses = Vec::new();
    for ((logits, target), scale) in logits.chunks_mut(shape.outputs).zip(targets).zip(scales) {
        let max = logits.iter().copied().fold(f64::MIN, f64::max);
        let sum: f64 = logits.iter().map(|l| (l - max).exp()).sum();
        losses.push(max + sum.ln() - logits[*target as usize]);
        for l in logits.iter_mut() {
            *l = scale * (*l - max).exp() / sum;
        }
        logits[*target as usize] -= scale;
    }
    let (dx, dwte, _) = linear_backward(&logits, x, wte, shape);
    (losses, dx, dwte)
}

/// Of rows of `vocab_size` logits the losses where each logit y has moved by `epsilon` (|y| + 1),
/// the target's down and others up, and the largest |y|.
pub(crate) fn worst_losses(
    logits: &[f64],
    targets: &[u32],
    vocab_size: usize,
    epsilon: f64,
) -> [Vec<f64>; 2] {
    let of_row = |(logits, target): (&[f64], &u32)| {
        let target = *target as usize;
        let moved = logits.iter().enumerate().map(|(j, y)| {
            let by = epsilon * (y.abs() + 1.0);
            if j == target { y - by } else { y + by }
        });
        let moved: Vec<f64> = moved.collect();
        let max = moved.iter().copied().fold(f64::MIN, f64::max);
        let sum: f64 = moved.iter().map(|l| (l - max).exp()).sum();
        let amax = logits.iter().fold(0.0f64, |amax, y| amax.max(y.abs()));
        (max + sum.ln() - moved[target], amax)
    };
    let (worst, amax) = logits.chunks(vocab_size).zip(targets).map(of_row).unzip();
    [worst, amax]
}

/// A weight and its moments after an update with the gradient `g`, clipped already.
pub(crate) fn adamw([p, m, v]: [f64; 3], g: f64, decays: bool, step: &OptimizerStep) -> [f64; 3] {
    let Optimizer { beta1, beta2, epsilon, weight_decay, .. } = step.optimizer;
    let [lr, beta1, beta2, epsilon, weight_decay] =
        [step.lr, beta1, beta2, epsilon, weight_decay].map(f64::from);
    let t = step.t as f64;
    let m = beta1 * m + (1.0 - beta1) * g;
    let v = beta2 * v + (1.0 - beta2) * g * g;
    let (mean, root) = (m / (1.0 - beta1.powf(t)), (v / (1.0 - beta2.powf(t))).sqrt());
    let kept = if decays { p * (1.0 - lr * weight_decay) } else { p };
    [kept - lr * mean / (root + epsilon), m, v]
}

/// The orthogonalized u (rows, cols) of Muon: five steps of its quintic, with operands and results
/// rounded by `round`.
pub(crate) fn orthogonalized(
    u: &[f64],
    [rows, cols]: [usize; 2],
    round: impl Fn(f64) -> f64,
) -> Vec<f64> {
    if rows > cols {
        let turned = orthogonalized(&transpose(u, rows, cols), [cols, rows], round);
        return transpose(&turned, cols, rows);
    }
    let all = |x: Vec<f64>| x.into_iter().map(&round).collect::<Vec<_>>();
    let sum = |a: f64, x: &[f64], b: f64, y: &[f64]| {
        all(x.iter().zip(y).map(|(x, y)| a * x + b * y).collect())
    };
    let u = all(u.to_vec());
    let norm = dot(&u, &u).sqrt() + 1e-7;
    let mut x = all(u.iter().map(|u| u / norm).collect());
    for _ in 0..5 {
        let a = all(product(&x, &x, rows, rows, cols));
        let square = all(product(&a, &transpose(&a, rows, rows), rows, rows, rows));
        let b = sum(-4.7750, &a, 2.0315, &square);
        let moved = all(product(&b, &transpose(&x, rows, cols), rows, cols, rows));
        x = sum(3.4445, &x, 1.0, &moved);
    }
    x
}

#[cfg(test)]
mod tests {
    use super::super::Precision;
    use super::*;

    /// Numbers that have no pattern.
    fn numbers(n: usize, seed: u64) -> Vec<f64> {
        (0..n as u64).map(|i| ((i * 7919 + seed * 104_729) % 2003) as f64 / 1000.0 - 1.0).collect()
    }

    /// Whether `gradient` is the slope of the sum of f(x) weight at x.
    fn is_slope(
        what: &str,
        f: impl Fn(&[f64]) -> Vec<f64>,
        x: &[f64],
        weight: &[f64],
        gradient: &[f64],
    ) {
        let value = |x: &[f64]| f(x).iter().zip(weight).map(|(y, w)| y * w).sum::<f64>();
        for i in 0..x.len() {
            let (h, mut moved) = (1e-5, x.to_vec());
            moved[i] = x[i] + h;
            let above = value(&moved);
            moved[i] = x[i] - h;
            let slope = (above - value(&moved)) / (2.0 * h);
            let error = (slope - gradient[i]).abs();
            assert!(error < 1e-7 * (1.0 + slope.abs()), "{what}, {i}: {} for {slope}", gradient[i]);
        }
    }

    #[test]
    fn gradients_of_norms_are_slopes() {
        for kind in [NormKind::Layer, NormKind::Rms] {
            let [x, w, b, dy] =
                [(15, 1), (5, 2), (5, 3), (15, 4)].map(|(n, seed)| numbers(n, seed));
            let (dx, dw, db) = norm_backward(kind, &dy, &x, &w, 1e-5);
            is_slope("dx", |x| norm_forward(kind, x, &w, &b, 1e-5).0, &x, &dy, &dx);
            is_slope("dw", |w| norm_forward(kind, &x, w, &b, 1e-5).0, &w, &dy, &dw);
            if kind == NormKind::Layer {
                is_slope("db", |b| norm_forward(kind, &x, &w, b, 1e-5).0, &b, &dy, &db);
            }
        }
    }

    #[test]
    fn gradients_of_swiglu_are_slopes() {
        let (y, d) = (numbers(24, 5), numbers(12, 6));
        let dy = swiglu_backward(&y, &d, 4);
        is_slope("dy", |y| swiglu_forward(y, 4), &y, &d, &dy);
    }

    #[test]
    fn gradients_of_turned_heads_that_share_keys_are_slopes() {
        let (sequences, precision) = (Sequences { batch: 2, length: 3 }, Precision::F32);
        let (heads, kv_heads, head_size, score_factor) = (4, 2, 4, 1.0);
        let shape =
            AttentionShape { sequences, heads, kv_heads, head_size, score_factor, precision };
        let (qkv, dout) = (numbers(6 * shape.qkv_channels(), 7), numbers(6 * 16, 8));
        let table = rotations(&[0, 1, 2, 0, 1, 2], &[1.0, 0.3]);
        let f = |qkv: &[f64]| attention_forward(&rotate(qkv, &table, 1.0, shape), shape).0;
        let turned = rotate(&qkv, &table, 1.0, shape);
        let dqkv = rotate(&attention_backward(&dout, &turned, shape), &table, -1.0, shape);
        is_slope("dqkv", f, &qkv, &dout, &dqkv);
        // How far two positions are apart counts, not where they are.
        let later = rotations(&[5, 6, 7, 100, 101, 102], &[1.0, 0.3]);
        let moved = attention_forward(&rotate(&qkv, &later, 1.0, shape), shape).0;
        assert!(f(&qkv).iter().zip(&moved).all(|(a, b)| (a - b).abs() < 1e-6));
    }
}
