//! Positions that blocks keep, and their rows.

use super::*;
use crate::formats::kept_positions;

/// B, T, r, C. A thread block of a GPU takes a sequence, and a thread four positions or more.
const SIZES: [[usize; 4]; 7] = [
    [1, 1, 1, 8],
    [3, 7, 2, 24],
    [2, 16, 16, 33],
    [2, 37, 36, 100],
    [3, 100, 1, 40],
    [1, 1000, 48, 72],
    [2, 1700, 1664, 8],
];

/// Blocks that room is made for, and those of them that drop tokens.
const LAYERS: usize = 5;
const DROPPING: std::ops::Range<usize> = 2..4;

/// A selection, drawn.
fn selection<B: Harness>(b: &B, shape: SelectShape) -> B::Selection {
    let mut selection = cut(b, |arena| b.selection(arena, shape.sequences, LAYERS));
    b.select_positions(&mut selection, DROPPING, shape, &RANDOM);
    selection
}

/// The kept rows of a layer, by number.
fn kept_rows(layer: usize, SelectShape { sequences, kept, .. }: SelectShape) -> Vec<usize> {
    let random = Random { layer: layer as u32, ..RANDOM };
    let of_sequence = |sequence: usize| {
        let positions = kept_positions(&random, sequence as u32, sequences.length, kept);
        positions.into_iter().map(move |p| sequence * sequences.length + p as usize)
    };
    (0..sequences.batch).flat_map(of_sequence).collect()
}

/// Runs `test` for every size, precision and block: values of all rows, then two of kept ones.
fn for_all<B: Harness>(
    backends: &[B],
    test: impl Fn(&B, Selected<'_, B>, SelectShape, [Vec<f32>; 3], Precision) + Sync,
) {
    for [batch, length, kept, channels] in SIZES {
        let sequences = Sequences { batch, length };
        let shape = SelectShape { sequences, kept, channels };
        let (all, few) = (sequences.rows() * channels, batch * kept * channels);
        for precision in precisions::<B>() {
            let values = [(all, 1), (few, 2), (few, 3)]
                .map(|(n, seed)| rounded(&random(n, seed), precision));
            each(backends, |b| {
                let selection = &selection(b, shape);
                for layer in DROPPING {
                    test(b, Selected { selection, layer }, shape, values.clone(), precision);
                }
            });
        }
    }
}

pub(super) fn gathered_rows_are_those_of_the_definition<B: Harness>(backends: &[B]) {
    for_all(backends, |b, selected, shape, [x, ..], precision| {
        let kept = kept_rows(selected.layer, shape);
        let exact = reference::rows(&x, &kept, shape.channels);
        let mut out = poison(b, exact.len(), precision);
        b.gather_rows(&mut out, &input(b, &x, precision), selected, shape);
        assert!(bits(&read(b, &out)) == bits(&exact), "{}: {shape:?} in {precision:?}", b.name());
    });
}

pub(super) fn scattered_rows_leave_the_others<B: Harness>(backends: &[B]) {
    for_all(backends, |b, selected, shape, [before, x, _], precision| {
        let kept = kept_rows(selected.layer, shape);
        let mut exact = before.clone();
        reference::set_rows(&mut exact, &kept, &x, shape.channels);
        let mut to = output(b, &before, precision);
        b.scatter_rows(&mut to, &input(b, &x, precision), selected, shape);
        assert!(bits(&read(b, &to)) == bits(&exact), "{}: {shape:?} in {precision:?}", b.name());
    });
}

pub(super) fn sums_are_in_the_kept_rows<B: Harness>(backends: &[B]) {
    for_all(backends, |b, selected, shape, [base, x, y], precision| {
        let kept = kept_rows(selected.layer, shape);
        let sums: Vec<f32> = x.iter().zip(&y).map(|(x, y)| x + y).collect();
        let mut exact = base.clone();
        reference::set_rows(&mut exact, &kept, &rounded(&sums, precision), shape.channels);
        let mut out = poison(b, base.len(), precision);
        let [base, x, y] = [&base, &x, &y].map(|values| input(b, values, precision));
        let sum = SelectedSum { out: &mut out, base: &base, x: &x, y: &y };
        b.scatter_sum(sum, selected, shape);
        assert!(bits(&read(b, &out)) == bits(&exact), "{}: {shape:?} in {precision:?}", b.name());
    });
}
