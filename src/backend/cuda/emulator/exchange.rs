//! What lanes and ranks do with gradients: `exchange.cu`.

use super::super::quantize::random::Draw;
use super::super::tests::random;
use super::{Emulator, SCHEDULES};
use crate::comm::wire::{self, Drawn, Sent};
use crate::comm::{self, Wire};

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

type PackKernel = unsafe extern "C" fn(*mut u8, *const f32, u64, u32, u64, u32, Draw);
type SumWireKernel = unsafe extern "C" fn(*mut f32, *const u8, u64, u32, u32, u64, u64, u32);
type UnpackKernel = unsafe extern "C" fn(*mut f32, *const u8, u64, u64);

/// Numbers of many binades, zeros, a block of them, and what is not finite in a group of its own.
fn gradients(count: usize, seed: u64) -> Vec<f32> {
    let mut numbers = random(count, seed);
    for (i, number) in numbers.iter_mut().enumerate() {
        *number *= [1.0, 1e-3, 0.0, 3e-7, 1e-38, 17.0, -1e-41][i * 7 / 5 % 7];
    }
    numbers[96..128].fill(0.0);
    numbers[130] = [f32::NAN, f32::INFINITY, 3e38][seed as usize % 3];
    numbers
}

/// Bits, but that one NaN is as good as another.
fn bits(numbers: &[f32]) -> Vec<u32> {
    let same = |number: &f32| if number.is_nan() { f32::NAN.to_bits() } else { number.to_bits() };
    numbers.iter().map(same).collect()
}

/// Messages to the byte and their sums to the bit are those of the host, of any number of ranks.
#[test]
fn messages_and_their_sums_are_those_of_the_host() {
    let Some(emulator) = Emulator::new("exchange") else { return };
    let drawn = Drawn { seed: 5, step: 3 };
    for (wire, name) in [(Wire::Bf16, "BF16"), (Wire::Fp8, "FP8"), (Wire::Mxfp4, "MXFP4")] {
        let pack: PackKernel = emulator.kernel(&format!("pack_wire<{name}>"));
        let sum: SumWireKernel = emulator.kernel(&format!("sum_wire<{name}>"));
        let unpack: UnpackKernel = emulator.kernel(&format!("unpack_wire<{name}>"));
        let (rotates, signs) = (wire.rotates(), drawn.signs());
        for (count, ranks, mine) in [(192, 2, 1), (64 * 37, 3, 0), (4096, 5, 3)] {
            let (bytes, first) = (wire.bytes(count), 128 * 9);
            let (stride, eights) = (bytes.next_multiple_of(16) + 32, count as u64 / 8);
            let schedule = SCHEDULES[ranks % 3];
            let parts: Vec<_> = (0..ranks as u64).map(|rank| gradients(count, rank)).collect();
            let mut messages = vec![0xaa_u8; ranks * stride];
            let mut expected = Vec::new();
            for (rank, part) in parts.iter().enumerate() {
                let message = &mut messages[rank * stride..][..stride];
                let draw = drawn.rounding(rank, Sent::Own);
                let (to, from) = (message.as_mut_ptr(), part.as_ptr());
                let (row, of_kernel) = ((first / 8) as u32, Draw::from(draw));
                emulator.run(schedule, [3, 1], 64, || {
                    // SAFETY: buffers are as long as the kernel is told.
                    unsafe { pack(to, from, eights, row, signs, u32::from(rotates), of_kernel) };
                });
                let (mut rotated, mut ours) = (part.clone(), vec![0xaa_u8; stride]);
                if rotates {
                    wire::rotate_all(&mut rotated, signs);
                }
                wire::pack(wire, &rotated, first, &draw, &mut ours[..bytes]);
                assert!(message == ours, "{wire}: rank {rank} of {ranks}");
                if rank != mine {
                    wire::unpack(wire, &ours[..bytes], &mut rotated);
                }
                expected.extend(rotated);
            }
            comm::sum_parts(&mut expected, ranks);
            expected.truncate(count);
            let mut back = expected.clone();
            if rotates {
                wire::rotate_back(&mut back, signs);
            }
            for (last, expected) in [(0, &expected), (1, &back)] {
                let mut own = parts[mine].clone();
                let (to, from) = (own.as_mut_ptr(), messages.as_ptr());
                let (stride, mine, ranks) = (stride as u64, mine as u32, ranks as u32);
                emulator.run(schedule, [2, 1], 32, || {
                    // SAFETY: as above.
                    unsafe { sum(to, from, stride, mine, ranks, eights, signs, last) };
                });
                assert!(bits(&own) == bits(expected), "{wire}: the sum of {ranks}, {last}");
            }
            let mut numbers = vec![f32::NAN; count];
            let (to, from) = (numbers.as_mut_ptr(), messages.as_ptr());
            emulator.run(schedule, [2, 1], 64, || {
                // SAFETY: as above.
                unsafe { unpack(to, from, eights, signs) };
            });
            let mut expected = vec![f32::NAN; count];
            wire::unpack(wire, &messages[..bytes], &mut expected);
            if rotates {
                wire::rotate_back(&mut expected, signs);
            }
            assert!(bits(&numbers) == bits(&expected), "{wire}: {count} numbers");
        }
    }
}
