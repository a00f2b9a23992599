//! The head with its loss.

use super::*;
use crate::backend::reference;

#[test]
fn classifier_and_logits() {
    each_precision(|cuda, precision| {
        for (rows, c, vocab) in [(1, 8, 3), (130, 40, 301), (260, 64, 1000)] {
            let shape = LinearShape { rows, inputs: c, outputs: vocab };
            let x = rounded(&random(rows * c, 1), precision);
            let small: Vec<f32> = random(vocab * c, 2).iter().map(|v| v * 0.2).collect();
            let wte = rounded(&small, precision);
            let ids = some_tokens(rows, vocab, 3);
            let (x_d, wte_d) = (tensor(cuda, &x, precision), param(cuda, &wte));
            let targets = tokens(cuda, &ids);
            let sequences = Sequences { batch: 1, length: rows };
            let mut scratch = workspace(cuda, &workspace_shape(sequences, c, 1, vocab, precision));
            let mut losses = f32_buffer(cuda, &vec![f32::NAN; rows]);
            let mut dx = poison(cuda, rows * c, precision);
            let mut dwte = f32_buffer(cuda, &vec![1.0; vocab * c]);
            let gradient =
                ClassifierGradient { dx: &mut dx, dwte: &mut dwte, scale: 0.5, accumulate: true };
            let format = Forward::Bf16;
            let s = &mut scratch;
            cuda.classifier(
                s,
                &mut losses,
                Some(gradient),
                &x_d,
                &wte_d,
                &targets,
                rows,
                c,
                vocab,
                format,
            );
            let (exact, exact_dx, exact_dwte) =
                reference::classifier(&f64s(&x), &f64s(&wte), &ids, shape, 0.5);
            // Logits and their gradients are held in the precision: twice the error that this alone
            // makes, and in f32 that of its sums.
            let format = classifier_with_rounded_logits(&x, &wte, &ids, shape, 0.5, precision);
            let (rounded_losses, rounded_dx, rounded_dwte) = format;
            let loose = |rounded: &[f64], exact: &[f64]| {
                2.0 * relative_error(rounded, exact) + 2.0 * bound(precision).min(1e-3)
            };
            let (l, x_, w) = (
                loose(&rounded_losses, &exact),
                loose(&rounded_dx, &exact_dx),
                loose(&rounded_dwte, &exact_dwte),
            );
            println!("rounding the logits allows {l:.1e} for losses, {x_:.1e} dx, {w:.1e} dwte");
            close("losses", &f32s_of(cuda, &losses), &exact, l);
            close("dx", &values_of(cuda, &dx), &exact_dx, x_);
            close("dwte", &f32s_of(cuda, &dwte), &plus_one(exact_dwte), w);
            let mut logits = f32_buffer(cuda, &vec![f32::NAN; vocab]);
            let last = rows - 1;
            let s = &mut scratch;
            cuda.logits(s, &mut logits, &x_d, last, &wte_d, c, vocab, Forward::Bf16);
            let one = LinearShape { rows: 1, ..shape };
            let row = f64s(&x[last * c..]);
            let exact = reference::linear_forward(&row, &f64s(&wte), &vec![0.0; vocab], one);
            close("logits", &f32s_of(cuda, &logits), &exact, 1e-5);
        }
    });
}

/// The classifier in f64, but for logits and dlogits rounded to the precision.
fn classifier_with_rounded_logits(
    x: &[f32],
    wte: &[f32],
    targets: &[u32],
    shape: LinearShape,
    scale: f64,
    precision: Precision,
) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
    let round = |v: Vec<f64>| -> Vec<f64> {
        let v: Vec<f32> = v.iter().map(|v| *v as f32).collect();
        f64s(&rounded(&v, precision))
    };
    let (x, wte, zeros) = (f64s(x), f64s(wte), vec![0.0; shape.outputs]);
    let mut logits = round(reference::linear_forward(&x, &wte, &zeros, shape));
    let mut losses = Vec::new();
    for (row, target) in logits.chunks_mut(shape.outputs).zip(targets) {
        let most = row.iter().copied().fold(f64::MIN, f64::max);
        let sum: f64 = row.iter().map(|l| (l - most).exp()).sum();
        losses.push(most + sum.ln() - row[*target as usize]);
        row.iter_mut().for_each(|l| *l = scale * (*l - most).exp() / sum);
        row[*target as usize] -= scale;
    }
    let (dx, dwte, _) = reference::linear_backward(&round(logits), &x, &wte, shape);
    (losses, dx, dwte)
}
