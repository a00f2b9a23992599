//! Attention.

use super::*;

/// B, T, H and channels of a head, and the factor of the scores.
const SIZES: [(usize, usize, usize, usize, f32); 21] = [
    (1, 1, 1, 1, 1.0),
    (3, 1, 5, 8, 1.0),
    (2, 5, 3, 8, 1.0),
    (2, 7, 3, 16, 1.0),
    (1, 48, 1, 16, 1.0),
    (1, 65, 2, 20, 1.0),
    (2, 97, 2, 20, 1.0),
    (2, 130, 3, 64, 1.0),
    (1, 50, 1, 100, 1.0),
    (1, 300, 2, 128, 1.0),
    (1, 257, 2, 96, 1.0),
    (2, 128, 1, 48, 1.0),
    (1, 33, 1, 160, 1.0),
    (1, 1000, 1, 64, 1.0),
    (2, 450, 1, 128, 1.0),
    // Without the root of the head size, and divided by a layer's number.
    (1, 70, 2, 4, 2.0),
    (1, 150, 2, 16, 4.0),
    (1, 70, 2, 20, 0.5),
    (2, 51, 1, 24, 1.0 / 3.0),
    (1, 200, 1, 64, 1.0 / 3.0),
    (2, 140, 1, 128, 0.25),
];

/// B, T, H, kv heads and channels of a head.
const SHARED: [(usize, usize, usize, usize, usize); 9] = [
    (2, 7, 4, 2, 16),
    (1, 65, 3, 1, 20),
    (2, 130, 4, 2, 64),
    (1, 200, 8, 2, 64),
    (2, 97, 4, 1, 128),
    (1, 300, 6, 2, 128),
    (1, 257, 4, 2, 96),
    (1, 33, 4, 1, 160),
    (2, 150, 9, 3, 64),
];

pub(super) fn attention<B: Harness>(backends: &[B]) {
    attention_of::<B>(backends, None, SIZES.map(|(b, t, h, d, f)| (b, t, [h; 2], d, f)));
}

/// Heads of q that share those of k and v, whose gradients are sums over them.
pub(super) fn attention_of_shared_heads<B: Harness>(backends: &[B]) {
    for lengths in [None, Some(&[5, 1, 1, 16, 40, 2, 90, 33][..])] {
        attention_of::<B>(
            backends,
            lengths,
            SHARED.map(|(b, t, h, kv, d)| (b, t, [h, kv], d, 1.0)),
        );
    }
}

/// Documents that end within tiles of queries and of keys, and between them.
pub(super) fn attention_of_documents<B: Harness>(backends: &[B]) {
    for lengths in [&[5, 1, 1, 16, 40, 2, 90, 33, 7, 150, 64][..], &[64, 128, 192, 1]] {
        let sizes = SIZES.map(|(b, t, h, d, f)| (b, t, [h; 2], d, f));
        attention_of::<B>(backends, Some(lengths), sizes);
    }
}

fn attention_of<B: Harness>(
    backends: &[B],
    lengths: Option<&[usize]>,
    sizes: impl IntoIterator<Item = (usize, usize, [usize; 2], usize, f32)>,
) {
    for (batch, length, [heads, kv_heads], head_size, score_factor) in sizes {
        if length > B::LONGEST {
            continue;
        }
        let sequences = Sequences { batch, length };
        let (rows, channels) = (sequences.rows(), heads * head_size);
        let wide = channels + 2 * kv_heads * head_size;
        let bounds = lengths.map(|lengths| packed(sequences, lengths));
        let starts = bounds.as_ref().map(|[starts, _]| &starts[..]);
        for held in precisions::<B>() {
            let qkv = rounded(&random(rows * wide, 1), held);
            let dout = rounded(&random(rows * channels, 2), held);
            let precision = Precision::F32;
            let shape =
                AttentionShape { sequences, heads, kv_heads, head_size, score_factor, precision };
            let (exact, exact_lse) = reference::attention_forward_of(&f64s(&qkv), starts, shape);
            let exact_dqkv =
                reference::attention_backward_of(&f64s(&dout), &f64s(&qkv), starts, shape);
            // Tensors of one precision may take products in both.
            for precision in BOTH.into_iter().filter(|precision| B::held(*precision) == held) {
                let shape = AttentionShape { precision, ..shape };
                each(backends, |b| {
                    let what = |what: &str| {
                        format!(
                            "{what} ({batch}, {length}, {heads} and {kv_heads} of {head_size}) by \
                             {score_factor}"
                        )
                    };
                    let documents = bounds.as_ref().map(|bounds| documents(b, bounds));
                    let documents = documents.as_ref();
                    let mut scratch = workspace(b, sequences, channels, heads, 8, precision);
                    let [qkv, dout] = [&qkv, &dout].map(|values| input(b, values, precision));
                    let (mut out, mut lse) =
                        (poison(b, rows * channels, precision), f32_poison(b, rows * heads));
                    b.attention_forward(&mut scratch, &mut out, &mut lse, &qkv, documents, shape);
                    let of = Of::Attention(score_factor);
                    close(b, &what("out"), &read(b, &out), &exact, of, precision);
                    let (ours, of) = (read_f32(b, &lse, rows * heads), Of::LogSum(score_factor));
                    close(b, &what("lse"), &ours, &exact_lse, of, precision);
                    let mut dqkv = poison(b, rows * wide, precision);
                    let operands = AttentionBackward {
                        dqkv: &mut dqkv,
                        dout: &dout,
                        out: &out,
                        lse: &lse,
                        qkv: &qkv,
                        documents,
                    };
                    b.attention_backward(&mut scratch, operands, shape);
                    // A single visible key makes exact zeroes of dq and dk; the rest is compared
                    // as a whole.
                    let of = Of::AttentionGradient(score_factor);
                    close(b, &what("dqkv"), &read(b, &dqkv), &exact_dqkv, of, precision);
                });
            }
        }
    }
}

/// Values and keys of other documents are no part of a result, whatever they are but what is not
/// finite: in a batch of one kind of document, changing all others changes nothing, to the bit.
pub(super) fn documents_do_not_see_each_other<B: Harness>(backends: &[B]) {
    for (batch, length, heads, head_size) in [(2, 97, 2, 20), (1, 300, 2, 64), (2, 260, 1, 128)] {
        let sequences = Sequences { batch, length };
        let (rows, channels) = (sequences.rows(), heads * head_size);
        let bounds = packed(sequences, &[30, 1, 70, 5]);
        let number = |row: usize| bounds[0][..=row].windows(2).filter(|w| w[0] != w[1]).count();
        let is_other = |row: usize| number(row).is_multiple_of(2);
        for held in precisions::<B>() {
            let precision = BOTH.into_iter().find(|of| B::held(*of) == held).unwrap();
            let (score_factor, kv_heads) = (1.0, heads);
            let shape =
                AttentionShape { sequences, heads, kv_heads, head_size, score_factor, precision };
            let [qkv, dout] = [3 * channels, channels]
                .map(|width| rounded(&random(rows * width, width as u64), held));
            let changed = |values: &[f32], width: usize| -> Vec<f32> {
                let all = values.iter().enumerate();
                all.map(|(i, v)| if is_other(i / width) { 100.0 - 9.0 * v } else { *v }).collect()
            };
            each(backends, |b| {
                let documents = documents(b, &bounds);
                let results = |qkv: &[f32], dout: &[f32]| {
                    let mut scratch = workspace(b, sequences, channels, heads, 8, precision);
                    let [qkv, dout] = [qkv, dout].map(|values| input(b, values, precision));
                    let (mut out, mut lse) =
                        (poison(b, rows * channels, precision), f32_poison(b, rows * heads));
                    let of = Some(&documents);
                    b.attention_forward(&mut scratch, &mut out, &mut lse, &qkv, of, shape);
                    let mut dqkv = poison(b, rows * 3 * channels, precision);
                    let operands = AttentionBackward {
                        dqkv: &mut dqkv,
                        dout: &dout,
                        out: &out,
                        lse: &lse,
                        qkv: &qkv,
                        documents: of,
                    };
                    b.attention_backward(&mut scratch, operands, shape);
                    [(read(b, &out), channels), (read(b, &dqkv), 3 * channels)]
                };
                let before = results(&qkv, &dout);
                let after = results(
                    &rounded(&changed(&qkv, 3 * channels), held),
                    &rounded(&changed(&dout, channels), held),
                );
                for ((before, width), (after, _)) in before.iter().zip(&after) {
                    for row in 0..rows {
                        let [before, after] =
                            [before, after].map(|of| &of[row * width..][..*width]);
                        assert_eq!(before != after, is_other(row), "{}: row {row}", b.name());
                    }
                }
            });
        }
    }
}
