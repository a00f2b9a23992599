//! Positions that blocks keep, and their rows: `select.cu`.

use super::super::quantize::Launch;
use super::super::select::{Drawing, Rows};
use super::{Emulator, Held, SCHEDULES};
use crate::backend::conformance::{random as values, rounded};
use crate::backend::{Precision, SelectShape, Sequences, reference};
use crate::formats::{Random, kept_positions};

/// As the kernels have it.
const DROPPED: u32 = u32::MAX;

const RANDOM: Random = Random { seed: 1 << 40 | 3, step: 5, micro_step: 9, layer: 2, linear: 0 };

/// Of two blocks, the number of each position among the kept ones, as the kernel makes it.
fn numbers(emulator: &Emulator, schedule: (u32, u32), shape: SelectShape) -> [Vec<u32>; 2] {
    let (rows, batch) = (shape.sequences.rows(), shape.sequences.batch);
    // With something between them.
    let stride = rows + 3;
    let mut numbers = vec![77u32; 2 * stride];
    let to = [numbers.as_mut_ptr() as u64, stride as u64];
    let launch = Launch { grid: [batch, 2, 1], block: 256, shared: 0 };
    let arguments = Drawing::new(to, shape, RANDOM).arguments();
    emulator.launch(schedule, "select_positions", launch, arguments);
    let between = numbers.chunks(stride).flat_map(|of_block| &of_block[rows..]);
    assert!(between.into_iter().all(|number| *number == 77));
    [0, stride].map(|start| numbers[start..][..rows].to_vec())
}

/// What they are by the definition.
fn expected(layer: u32, SelectShape { sequences, kept, .. }: SelectShape) -> Vec<u32> {
    let random = Random { layer, ..RANDOM };
    let of_sequence = |sequence| {
        let mut numbers = vec![DROPPED; sequences.length];
        let positions = kept_positions(&random, sequence, sequences.length, kept);
        positions.iter().zip(0..).for_each(|(position, number)| {
            numbers[*position as usize] = number;
        });
        numbers
    };
    (0..sequences.batch as u32).flat_map(of_sequence).collect()
}

/// Sizes below and above what threads take at once, which nothing divides; none and all dropped but
/// one.
#[test]
fn selections_and_rows_are_those_of_the_definition() {
    let Some(emulator) = Emulator::new("select") else { return };
    for ([batch, length, kept, channels], schedule) in
        [[2, 37, 16, 40], [1, 2050, 1000, 3], [3, 5, 1, 8], [1, 1025, 1024, 11], [2, 9, 9, 24]]
            .into_iter()
            .zip(SCHEDULES.into_iter().cycle())
    {
        let sequences = Sequences { batch, length };
        let shape = SelectShape { sequences, kept, channels };
        let [first, second] = numbers(&emulator, schedule, shape);
        assert!(first == expected(RANDOM.layer, shape), "{shape:?}");
        assert!(second == expected(RANDOM.layer + 1, shape), "{shape:?}");
        for precision in [Precision::F32, Precision::Bf16] {
            check_rows(&emulator, schedule, &first, shape, precision);
        }
    }
}

fn check_rows(
    emulator: &Emulator,
    schedule: (u32, u32),
    numbers: &[u32],
    shape: SelectShape,
    precision: Precision,
) {
    let SelectShape { sequences, kept, channels } = shape;
    let (all, few) = (sequences.rows() * channels, sequences.batch * kept * channels);
    let of = |len, seed| rounded(&values(len, seed), precision);
    let [base, x, y] = [of(all, 1), of(few, 2), of(few, 3)];
    let kept_rows: Vec<usize> =
        (0..sequences.rows()).filter(|row| numbers[*row] != DROPPED).collect();
    let run = |kernel: &str, out: &[f32], [base, x, y]: [&[f32]; 3]| {
        let [mut out, mut base, mut x, mut y] =
            [out, base, x, y].map(|values| Held::new(values, precision));
        let mut amax = 0u32;
        let rows = Rows {
            out: out.address(),
            amax: &raw mut amax as u64,
            numbers: numbers.as_ptr() as u64,
            base: base.address(),
            x: x.address(),
            y: y.address(),
            rows: sequences.rows() as u32,
            length: sequences.length as u32,
            kept: kept as u32,
            channels: channels as u32,
        };
        let launch = Launch { grid: rows.grid(), block: 256, shared: 0 };
        let kernel = format!("{kernel}<{}>", Held::name(precision));
        emulator.launch(schedule, &kernel, launch, rows);
        (out.values(), amax)
    };
    let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
    let check = |what: &str, ours: &[f32], exact: &[f32]| {
        assert!(bits(ours) == bits(exact), "{what}: {shape:?} in {precision:?}");
    };

    let exact = reference::rows(&base, &kept_rows, channels);
    let (ours, amax) = run("gather_rows", &vec![f32::NAN; few], [&[], &base, &[]]);
    check("gathered", &ours, &exact);
    let largest = exact.iter().fold(0.0f32, |largest, v| largest.max(v.abs()));
    assert_eq!(amax, largest.to_bits(), "{shape:?} in {precision:?}");

    let mut exact = base.clone();
    reference::set_rows(&mut exact, &kept_rows, &x, channels);
    check("scattered", &run("scatter_rows", &base, [&[], &x, &[]]).0, &exact);

    let sums: Vec<f32> = x.iter().zip(&y).map(|(x, y)| x + y).collect();
    reference::set_rows(&mut exact, &kept_rows, &rounded(&sums, precision), channels);
    let (ours, _) = run("scatter_sum", &vec![f32::NAN; all], [&base, &x, &y]);
    check("summed", &ours, &exact);
}
