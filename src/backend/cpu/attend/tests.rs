//! Grouped-query attention: query heads that share kv heads, on every instruction set against the
//! f64 twin, whose own gradients are held against finite differences.

use super::*;
use crate::backend::{Memory, reference};
use crate::formats::{Draw, Purpose, fill_normal};

fn shape(sizes: [usize; 5], precision: Precision) -> AttentionShape {
    let [batch, length, heads, kv_heads, head_size] = sizes;
    let sequences = Sequences { batch, length };
    AttentionShape { sequences, heads, kv_heads, head_size, score_factor: 0.7, precision }
}

fn normal(cpu: &Cpu, len: usize, seed: u64) -> Buffer<f32> {
    let mut values = cpu.f32(&mut cpu.arena(Some(4 * len + 64)).unwrap(), len);
    fill_normal(&mut values, 1.0, &Draw::of(seed, Purpose::Weights, 0, 0), 0);
    values
}

fn poison(cpu: &Cpu, len: usize) -> Buffer<f32> {
    let mut values = normal(cpu, len, 0);
    values.fill(f32::NAN);
    values
}

fn workspace(cpu: &Cpu, shape: AttentionShape) -> Workspace {
    let cut =
        |arena: &mut _| Workspace::of_size(arena, scratch(cpu.isa(), shape, true), cpu.threads());
    let mut arena = cpu.arena(None).unwrap();
    cut(&mut arena);
    cut(&mut cpu.arena(Some(cpu.arena_used(&arena))).unwrap())
}

/// out, lse and dqkv.
fn attention(cpu: &Cpu, shape: AttentionShape, qkv: &Buffer<f32>, seed: u64) -> [Buffer<f32>; 3] {
    let dout = normal(cpu, shape.sequences.rows() * shape.channels(), seed);
    attention_of(cpu, shape, (qkv, &dout), None)
}

/// The same of some `documents`.
fn attention_of(
    cpu: &Cpu,
    shape: AttentionShape,
    (qkv, dout): (&Buffer<f32>, &Buffer<f32>),
    documents: Option<&Buffer<u32>>,
) -> [Buffer<f32>; 3] {
    let (rows, mut memory) = (shape.sequences.rows(), workspace(cpu, shape));
    let (mut out, mut lse) = (poison(cpu, dout.len()), poison(cpu, rows * shape.heads));
    cpu.attention_forward(&mut memory, &mut out, &mut lse, qkv, documents, shape);
    let mut dqkv = poison(cpu, qkv.len());
    let (out_of, lse_of) = (&out, &lse);
    let operands =
        AttentionBackward { dqkv: &mut dqkv, dout, out: out_of, lse: lse_of, qkv, documents };
    Attend::attention_backward(cpu, &mut memory, operands, shape);
    [out, lse, dqkv]
}

/// Batch, length, heads, kv heads, head size.
const SIZES: [[usize; 5]; 6] = [
    [1, 1, 2, 1, 1],
    [2, 5, 4, 2, 8],
    [1, 97, 6, 2, 20],
    [2, 50, 3, 1, 24],
    [1, 131, 4, 2, 64],
    [1, 49, 2, 1, 100],
];

fn each(mut f: impl FnMut(Isa, AttentionShape)) {
    for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
        for sizes in SIZES {
            for precision in [Precision::F32, Precision::Bf16] {
                f(isa, shape(sizes, precision));
            }
        }
    }
}

fn f64s(x: &[f32]) -> Vec<f64> {
    x.iter().map(|v| f64::from(*v)).collect()
}

#[track_caller]
fn close(ours: &[f32], exact: &[f64], bound: f64) {
    let square = |values: &[f64]| values.iter().map(|v| v * v).sum::<f64>();
    let differences: Vec<f64> = f64s(ours).iter().zip(exact).map(|(a, b)| a - b).collect();
    let error = (square(&differences) / square(exact).max(1e-300)).sqrt();
    assert!(ours.len() == exact.len() && error <= bound, "{error:e} above {bound:e}");
}

#[test]
fn grouped_queries_are_those_of_the_twin() {
    each(|isa, shape| {
        let cpu = Cpu::with_isa(2, isa).unwrap();
        let qkv = normal(&cpu, shape.sequences.rows() * shape.qkv_channels(), 1);
        let [out, lse, dqkv] = attention(&cpu, shape, &qkv, 2);
        let dout = f64s(&normal(&cpu, out.len(), 2));
        let (exact, exact_lse) = reference::attention_forward(&f64s(&qkv), shape);
        let in_bf16 = matches!(isa, Isa::Amx | Isa::Avx512) && shape.precision == Precision::Bf16;
        // bf16 operands are off by up to 2^-9, relative, and five roundings add up.
        let bound = if in_bf16 { 6e-3 } else { 1e-6 };
        close(&out, &exact, bound);
        close(&lse, &exact_lse, bound);
        close(&dqkv, &reference::attention_backward(&dout, &f64s(&qkv), shape), 2.0 * bound);
    });
}

/// To the bit: whatever the threads, and in the forward pass what heads compute that each have a
/// copy of the kv head.
#[test]
fn grouped_queries_have_one_result() {
    each(|isa, shape| {
        let [one, three] = [1, 3].map(|threads| Cpu::with_isa(threads, isa).unwrap());
        let qkv = normal(&one, shape.sequences.rows() * shape.qkv_channels(), 3);
        let [ours, theirs] = [&one, &three].map(|cpu| attention(cpu, shape, &qkv, 4));
        for (a, b) in ours.iter().zip(&theirs) {
            assert_eq!(a[..], b[..]);
        }
        let copied = AttentionShape { kv_heads: shape.heads, ..shape };
        let mut copies = normal(&one, shape.sequences.rows() * copied.qkv_channels(), 0);
        let rows = qkv.chunks(shape.qkv_channels());
        for (to, from) in copies.chunks_mut(copied.qkv_channels()).zip(rows) {
            for head in 0..shape.heads {
                for (to_at, from_at) in copied.starts(head).into_iter().zip(shape.starts(head)) {
                    let from = &from[from_at..][..shape.head_size];
                    to[to_at..][..shape.head_size].copy_from_slice(from);
                }
            }
        }
        let theirs = attention(&one, copied, &copies, 4);
        assert_eq!([&ours[0][..], &ours[1][..]], [&theirs[0][..], &theirs[1][..]]);
    });
}

/// Where documents of these lengths, one sequence after the other, begin and end.
fn documents(cpu: &Cpu, shape: AttentionShape, lengths: &[usize]) -> Buffer<u32> {
    let Sequences { length: t, .. } = shape.sequences;
    let (mut starts, mut ends) = (Vec::new(), Vec::new());
    for length in lengths {
        let start = starts.len() % t;
        starts.resize(starts.len() + length, start as u32);
        ends.resize(starts.len(), (start + length) as u32);
    }
    let words = [starts, ends].concat();
    let mut arena = cpu.arena(Some(4 * words.len() + 64)).unwrap();
    let mut bounds = cpu.tokens(&mut arena, words.len(), false).unwrap();
    bounds.copy_from_slice(&words);
    bounds
}

/// To the bit, both passes, on every instruction set: numbers of other documents are nowhere in it,
/// be they NaN.
#[test]
fn a_document_is_as_if_it_were_alone() {
    each(|isa, shape| {
        let cpu = Cpu::with_isa(2, isa).unwrap();
        let (Sequences { batch, length: t }, mut lengths) = (shape.sequences, Vec::new());
        for sequence in 0..batch {
            let mut left = t;
            while left > 0 {
                let next = [1, 17, 48, 3, 70][(lengths.len() + sequence) % 5].min(left);
                lengths.push(next);
                left -= next;
            }
        }
        let rows = shape.sequences.rows();
        let mut qkv = normal(&cpu, rows * shape.qkv_channels(), 7);
        let dout = normal(&cpu, rows * shape.channels(), 8);
        let bounds = documents(&cpu, shape, &lengths);
        let taken = |from: &Buffer<f32>, first: usize, len: usize| {
            let mut part = normal(&cpu, len, 0);
            part.copy_from_slice(&from[first..][..len]);
            part
        };
        let mut first = 0;
        for length in lengths {
            let (wide, narrow) = (shape.qkv_channels(), shape.channels());
            let of = AttentionShape { sequences: Sequences { batch: 1, length }, ..shape };
            let alone = [
                taken(&qkv, first * wide, length * wide),
                taken(&dout, first * narrow, length * narrow),
            ];
            let alone = attention_of(&cpu, of, (&alone[0], &alone[1]), None);
            let others = taken(&qkv, 0, qkv.len());
            qkv.fill(f32::NAN);
            let of_document = first * wide..(first + length) * wide;
            qkv[of_document.clone()].copy_from_slice(&others[of_document.clone()]);
            let ours = attention_of(&cpu, shape, (&qkv, &dout), Some(&bounds));
            qkv.copy_from_slice(&others);
            assert_eq!(ours[0][first * narrow..][..length * narrow], alone[0][..], "{isa:?}");
            assert_eq!(ours[2][of_document], alone[2][..], "{isa:?}");
            for head in 0..shape.heads {
                let at = (first / t * shape.heads + head) * t + first % t;
                assert_eq!(ours[1][at..][..length], alone[1][head * length..][..length]);
            }
            first += length;
        }
    });
}

#[test]
fn the_twin_has_the_gradients_of_finite_differences() {
    for sizes in [[2, 3, 4, 2, 3], [1, 5, 3, 1, 2], [1, 4, 2, 2, 3]] {
        let (shape, cpu) = (shape(sizes, Precision::F32), Cpu::with_isa(1, Isa::Portable).unwrap());
        let rows = shape.sequences.rows();
        let mut qkv = f64s(&normal(&cpu, rows * shape.qkv_channels(), 5));
        let dout = f64s(&normal(&cpu, rows * shape.channels(), 6));
        let dqkv = reference::attention_backward(&dout, &qkv, shape);
        let h = 1e-5;
        for i in 0..qkv.len() {
            let mut loss = |by: f64| {
                qkv[i] += by;
                let (out, _) = reference::attention_forward(&qkv, shape);
                qkv[i] -= by;
                out.iter().zip(&dout).map(|(out, dout)| out * dout).sum::<f64>()
            };
            let slope = (loss(h) - loss(-h)) / (2.0 * h);
            assert!((slope - dqkv[i]).abs() < 1e-8, "{i}: {slope} and {}", dqkv[i]);
        }
    }
}
