//! Rotary positions and the norms of heads: `rotary.cu`.

use super::super::quantize::Launch;
use super::super::rotary::{OfHeads, Places, Rotations};
use super::{Emulator, Held, SCHEDULES};
use crate::backend::conformance::{f64s, random, rounded};
use crate::backend::{AttentionShape, NormKind, Precision, Sequences, reference};

const EPSILON: f32 = 1e-6;

/// Rows, H, kv heads and channels of a head, by which threads take 8 pairs, or every 32nd.
const SIZES: [(usize, usize, usize, usize); 8] = [
    (1, 1, 1, 2),
    (5, 3, 1, 6),
    (9, 4, 2, 20),
    (20, 3, 3, 64),
    (11, 17, 4, 32),
    (3, 5, 1, 80),
    (18, 8, 2, 128),
    (4, 2, 1, 256),
];

fn frequencies(head_size: usize) -> Vec<f32> {
    let of = |pair: usize| 1e4f32.powf(-(2.0 * pair as f32) / head_size as f32);
    (0..head_size / 2).map(of).collect()
}

/// Of whole sequences, of documents, and of rows behind others.
#[test]
fn tables_are_of_positions() {
    let Some(emulator) = Emulator::new("rotary") else { return };
    let (rows, length) = (14, 7);
    let starts = [0, 0, 0, 3, 3, 5, 6, 0, 1, 1, 1, 1, 1, 1u32];
    let behind = |of_each| Places::Behind { starts: starts.as_ptr() as u64, of_each };
    let whole = |starts| Places::Whole { length, starts };
    type Position<'a> = &'a dyn Fn(usize) -> usize;
    let cases: [(Places, Position<'_>); 4] = [
        (whole(0), &|row| row % length),
        (whole(starts.as_ptr() as u64), &|row| row % length - starts[row] as usize),
        (behind(false), &|row| starts[0] as usize + row),
        (behind(true), &|row| starts[row] as usize),
    ];
    for (case, (places, position)) in cases.into_iter().enumerate() {
        for head_size in [2, 20, 64, 256] {
            let (f, mut table) = (frequencies(head_size), vec![f32::NAN; rows * head_size]);
            let of_rows = Rotations::new(table.as_mut_ptr() as u64, &f, places);
            let launch = Launch { grid: [rows, 1, 1], block: 128, shared: 0 };
            emulator.launch(SCHEDULES[case % 3], "find_rotations", launch, of_rows);
            let positions: Vec<_> = (0..rows).map(position).collect();
            for (ours, exact) in table.iter().zip(reference::rotations(&positions, &f)) {
                assert!((f64::from(*ours) - exact).abs() < 1e-7, "{case}, {head_size}");
            }
        }
    }
}

#[test]
fn heads_are_normalized_and_turned_as_defined() {
    let Some(emulator) = Emulator::new("rotary") else { return };
    let cases = SIZES
        .into_iter()
        .flat_map(|size| [Precision::F32, Precision::Bf16].map(|precision| (size, precision)));
    for (case, ((rows, heads, kv_heads, d), precision)) in cases.enumerate() {
        let schedule = SCHEDULES[case % SCHEDULES.len()];
        let what = format!("{rows} rows, {heads} and {kv_heads} heads of {d} in {precision:?}");
        let sequences = Sequences { batch: 1, length: rows };
        let (head_size, score_factor) = (d, 1.0);
        let shape =
            AttentionShape { sequences, heads, kv_heads, head_size, score_factor, precision };
        let (wide, bound) =
            (shape.qkv_channels(), if precision == Precision::F32 { 2e-6 } else { 4e-3 });
        let near = |part: &str, ours: &[f32], exact: &[f64], bound: f64| {
            let size = exact.iter().fold(1.0f64, |size, v| size.max(v.abs()));
            for (i, (ours, exact)) in ours.iter().zip(exact).enumerate() {
                let off = (f64::from(*ours) - exact).abs();
                assert!(off <= bound * size, "{part} of {what}: {i}: {ours}, not {exact}");
            }
        };
        let [qkv, dqkv] = [4, 5].map(|seed| rounded(&random(rows * wide, seed), precision));
        let w = [6, 7].map(|seed| rounded(&random(d, seed), precision));
        let positions: Vec<_> = (0..rows).map(|row| row * 7).collect();
        let table: Vec<f32> =
            reference::rotations(&positions, &frequencies(d)).iter().map(|v| *v as f32).collect();
        let mut held_table = Held::new(&table, Precision::F32);
        let [mut held_qkv, mut of_q, mut of_k] =
            [&qkv, &w[0], &w[1]].map(|values| Held::new(values, precision));
        let run = |name: &str, [grid, block]: [usize; 2], of_heads: OfHeads| {
            let name = name.replace('T', Held::name(precision));
            let launch = Launch { grid: [grid, 1, 1], block, shared: 0 };
            emulator.launch(schedule, &name, launch, of_heads);
        };

        // In place.
        for (name, sign) in [("rotate<T,false>", 1.0), ("rotate<T,true>", -1.0)] {
            let (mut ours, mut amax) = (Held::new(&qkv, precision), 0u32);
            let of_heads = OfHeads::new(ours.address(), held_table.address(), shape);
            let of_heads = OfHeads { amax: &raw mut amax as u64, ..of_heads };
            run(name, [rows, 128], of_heads);
            let exact = reference::rotate(&f64s(&qkv), &f64s(&table), sign, shape);
            near(name, &ours.values(), &exact, bound);
            assert_eq!(amax, ours.amax(), "{what}: amax");
            run(name, [rows, 128], OfHeads { amax: 0, ..of_heads });
        }

        // By head: its norm, or v.
        let turned = heads + kv_heads;
        let weight = |head: usize| match head % (turned + kv_heads) {
            head if head < heads => Some(0),
            head if head < turned => Some(1),
            _ => None,
        };
        let [of_x, of_table, of_w] =
            [f64s(&qkv), f64s(&table), f64s(&w.concat())].map(|values| values);
        let normed: Vec<f64> = of_x
            .chunks(d)
            .enumerate()
            .flat_map(|(head, x)| match weight(head) {
                Some(number) => {
                    let w = &of_w[number * d..][..d];
                    reference::norm_forward(NormKind::Rms, x, w, w, EPSILON.into()).0
                }
                None => x.to_vec(),
            })
            .collect();
        let mut out = Held::new(&vec![f32::NAN; rows * wide], precision);
        let of_heads = OfHeads {
            x: held_qkv.address(),
            q: of_q.address(),
            k: of_k.address(),
            epsilon: EPSILON,
            ..OfHeads::new(out.address(), held_table.address(), shape)
        };
        run("norm_heads<T>", [rows, 128], of_heads);
        let exact = reference::rotate(&normed, &of_table, 1.0, shape);
        near("norms", &out.values(), &exact, bound);

        let (parts, mut amax) = (2, 0u32);
        let mut partial = vec![f32::NAN; parts * 2 * d];
        let mut ours = Held::new(&dqkv, precision);
        let of_heads = OfHeads {
            to: ours.address(),
            amax: &raw mut amax as u64,
            partial: partial.as_mut_ptr() as u64,
            ..of_heads
        };
        run("norm_heads_backward<T>", [parts, 256], of_heads);
        let back = reference::rotate(&f64s(&dqkv), &of_table, -1.0, shape);
        let (mut exact, mut exact_dw) = (Vec::new(), vec![0.0; 2 * d]);
        for (head, (dy, x)) in back.chunks(d).zip(of_x.chunks(d)).enumerate() {
            let Some(number) = weight(head) else {
                exact.extend(dy);
                continue;
            };
            let w = &of_w[number * d..][..d];
            let (dx, dw, _) = reference::norm_backward(NormKind::Rms, dy, x, w, EPSILON.into());
            exact.extend(dx);
            exact_dw[number * d..].iter_mut().zip(dw).for_each(|(to, dw)| *to += dw);
        }
        near("gradients", &ours.values(), &exact, bound);
        assert_eq!(amax, ours.amax(), "{what}: amax of gradients");
        let dw: Vec<f32> = (0..2 * d).map(|i| partial[i] + partial[2 * d + i]).collect();
        near("those of weights", &dw, &exact_dw, 1e-5);
    }
}
