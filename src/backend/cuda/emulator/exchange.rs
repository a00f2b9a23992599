//! What lanes and ranks do with gradients: `exchange.cu`.

use super::super::tests::random;
use super::{Emulator, SCHEDULES};
use crate::comm;

type JoinKernel = unsafe extern "C" fn(*mut [f32; 4], *const [f32; 4], u64);

/// Of fewer threads than vectors, and of more.
#[test]
fn lanes_are_joined() {
    let Some(emulator) = Emulator::new("exchange") else { return };
    let join: JoinKernel = emulator.kernel("join_gradients");
    for (schedule, vectors) in SCHEDULES.into_iter().flat_map(|s| [(s, 1), (s, 700), (s, 5000)]) {
        let values = |seed| random(4 * vectors, seed).as_chunks::<4>().0.to_vec();
        let (mut gradients, others) = (values(1), values(2));
        gradients.push([7.0; 4]);
        let expected: Vec<[f32; 4]> = gradients
            .iter()
            .zip(&others)
            .map(|(own, other)| std::array::from_fn(|i| other[i] + own[i]))
            .chain([[7.0; 4]])
            .collect();
        let (to, from) = (gradients.as_mut_ptr(), others.as_ptr());
        emulator.run(schedule, [5, 1], 256, || {
            // SAFETY: buffers are as long as the kernel is told.
            unsafe { join(to, from, vectors as u64) };
        });
        assert!(gradients == expected, "{vectors}");
    }
}

type SumKernel = unsafe extern "C" fn(*mut [f32; 4], *const [f32; 4], u64, u32, u32, u64);

/// Of every rank, in the order of the host, which shows in the bits; what lies behind stays.
#[test]
fn parts_of_ranks_are_summed_in_the_order_of_the_tree() {
    let Some(emulator) = Emulator::new("exchange") else { return };
    let large = |(i, value): (usize, f32)| value * [1.0, 1e6, 1e-6][i % 3];
    for (count, vectors) in [(2, 700), (3, 40), (4, 700), (5, 33), (7, 33), (8, 300), (13, 20)] {
        let parts: Vec<f32> =
            random(4 * vectors * count, 3).into_iter().enumerate().map(large).collect();
        let mut expected = parts.clone();
        comm::sum_parts(&mut expected, count);
        let parts: Vec<&[[f32; 4]]> =
            parts.chunks(4 * vectors).map(|part| part.as_chunks().0).collect();
        let names: &[&str] = match count {
            2 => &["sum_parts<2>", "sum_parts<0>"],
            4 => &["sum_parts<4>", "sum_parts<0>"],
            8 => &["sum_parts<8>", "sum_parts<0>"],
            _ => &["sum_parts<0>"],
        };
        for (name, mine) in names.iter().flat_map(|name| (0..count).map(move |mine| (name, mine))) {
            let sum: SumKernel = emulator.kernel(name);
            let stride = vectors + 3;
            let mut own = [parts[mine], &[[7.0; 4]]].concat();
            let others: Vec<_> = (0..count)
                .filter(|rank| *rank != mine)
                .flat_map(|rank| [parts[rank], &[[f32::NAN; 4]; 3]].concat())
                .collect();
            let (to, from) = (own.as_mut_ptr(), others.as_ptr());
            emulator.run(SCHEDULES[mine % 3], [3, 1], 64, || {
                // SAFETY: buffers are as long as the kernel is told.
                unsafe { sum(to, from, stride as u64, mine as u32, count as u32, vectors as u64) };
            });
            assert_eq!(own.pop(), Some([7.0; 4]));
            assert!(own.as_flattened() == &expected[..4 * vectors], "{name}: {mine} of {count}");
        }
    }
}

type PeersKernel = unsafe extern "C" fn([*mut [f32; 4]; 8], u64, u32);

/// What lies before and behind a slice stays, and that of other ranks where one alone has the sum.
#[test]
fn a_sum_is_in_the_memory_of_all_or_of_one() {
    let Some(emulator) = Emulator::new("exchange") else { return };
    let large = |(i, value): (usize, f32)| value * [1.0, 1e6, 1e-6][i % 3];
    for (count, vectors) in
        [(2, 1), (2, 1400), (3, 700), (4, 900), (5, 33), (6, 64), (7, 33), (8, 300)]
    {
        let parts: Vec<f32> =
            random(4 * vectors * count, 4).into_iter().enumerate().map(large).collect();
        let mut expected = parts.clone();
        comm::sum_parts(&mut expected, count);
        let expected = [&[7.0; 4], &expected[..4 * vectors], &[7.0; 4]].concat();
        let before: Vec<Vec<[f32; 4]>> = parts
            .chunks(4 * vectors)
            .map(|part| [&[[7.0; 4]], part.as_chunks().0, &[[7.0; 4]]].concat())
            .collect();
        let sum: PeersKernel = emulator.kernel(&format!("sum_peers<{count}>"));
        for only in [None, Some(count - 1), Some(count / 2)] {
            let mut all = before.clone();
            let mut of = [std::ptr::null_mut(); 8];
            for (place, one) in of.iter_mut().zip(&mut all) {
                *place = one[1..].as_mut_ptr();
            }
            emulator.run(SCHEDULES[count % 3], [3, 1], 64, || {
                let only = only.map_or(u32::MAX, |rank| rank as u32);
                // SAFETY: buffers are as long as the kernel is told.
                unsafe { sum(of, vectors as u64, only) };
            });
            for (rank, (one, before)) in all.iter().zip(&before).enumerate() {
                let has_sum = only.is_none_or(|only| only == rank);
                let expected = if has_sum { &expected[..] } else { before.as_flattened() };
                assert!(one.as_flattened() == expected, "{count}: {vectors}, {only:?}, {rank}");
            }
        }
    }
}
