//! Attention in plain arithmetic, of whole sequences and of documents: `attend_plain.cu`. The kernels on
//! tensor cores leave out and mask the same keys; those a GPU has to run.

use half::bf16;

use super::super::attend::{Heads, PackedHeads};
use super::{Emulator, SCHEDULES, aligned};
use crate::backend::conformance::{f64s, random, rounded};
use crate::backend::{AttentionShape, Precision, Sequences, reference};

type Forward<S> = unsafe extern "C" fn(*mut u128, *mut f32, *mut u32, *const u128, S);
type Delta = unsafe extern "C" fn(*mut f32, *const u128, *const u128, u32, Heads);
type Backward<S> =
    unsafe extern "C" fn(*mut u128, *mut u32, *const u128, *const f32, *const f32, *const u128, S);

/// Numbers as they lie in memory.
fn placed(values: &[f32], precision: Precision) -> Vec<u128> {
    match precision {
        Precision::F32 => aligned(bytemuck::cast_slice(values)),
        Precision::Bf16 => {
            let halves: Vec<_> = values.iter().map(|v| bf16::from_f32(*v).to_bits()).collect();
            aligned(bytemuck::cast_slice(&halves))
        }
    }
}

fn read(memory: &[u128], len: usize, precision: Precision) -> Vec<f32> {
    match precision {
        Precision::F32 => bytemuck::cast_slice::<_, f32>(memory)[..len].to_vec(),
        Precision::Bf16 => {
            let halves = &bytemuck::cast_slice::<_, u16>(memory)[..len];
            halves.iter().map(|bits| bf16::from_bits(*bits).to_f32()).collect()
        }
    }
}

/// Of one sequence, out, lse and dqkv by the kernels whose sequences are as `heads` says.
fn attention<S: Copy>(
    (emulator, schedule): (&Emulator, (u32, u32)),
    (qkv, dout): (&[f32], &[f32]),
    shape: AttentionShape,
    (heads, packed): (S, &str),
) -> [Vec<f32>; 3] {
    let (rows, precision) = (shape.sequences.rows(), shape.precision);
    let number = if precision == Precision::F32 { "float" } else { "bf16" };
    let poison = |values: &[f32]| placed(&vec![f32::NAN; values.len()], precision);
    let [mut out, mut dqkv] = [dout, qkv].map(poison);
    let [from, gradient] = [qkv, dout].map(|values| placed(values, precision));
    let (mut lse, mut delta) =
        (vec![f32::NAN; rows * shape.heads], vec![f32::NAN; rows * shape.heads]);
    let grid = |heads| [rows.div_ceil(4), heads];
    let none = std::ptr::null_mut();
    let forward: Forward<S> = emulator.kernel(&format!("attention_forward<{number}{packed}>"));
    let (to, sums) = (out.as_mut_ptr(), lse.as_mut_ptr());
    // SAFETY: the buffers are those that the kernel's comment asks for.
    emulator.run(schedule, grid(shape.heads), 128, || unsafe {
        forward(to, sums, none, from.as_ptr(), heads);
    });
    let of_out: Delta = emulator.kernel(&format!("attention_delta<{number}>"));
    let means = delta.as_mut_ptr();
    // SAFETY: the same.
    emulator.run(schedule, [rows.div_ceil(4), 1], 128, || unsafe {
        of_out(means, gradient.as_ptr(), out.as_ptr(), rows as u32, Heads::from(shape));
    });
    for (name, of) in [("attention_dkdv", shape.kv_heads), ("attention_dq", shape.heads)] {
        let backward: Backward<S> = emulator.kernel(&format!("{name}<{number}{packed}>"));
        let (to, gradient, from) = (dqkv.as_mut_ptr(), gradient.as_ptr(), from.as_ptr());
        // SAFETY: the same.
        emulator.run(schedule, grid(of), 128, || unsafe {
            backward(to, none, gradient, lse.as_ptr(), delta.as_ptr(), from, heads);
        });
    }
    let [out, dqkv] = [(&out, dout), (&dqkv, qkv)].map(|(all, of)| read(all, of.len(), precision));
    [out, lse, dqkv]
}

/// Documents have the bits that they have alone, and those are near the definition.
#[test]
fn documents_are_as_if_each_were_alone() {
    let Some(emulator) = Emulator::new("attend_plain") else { return };
    let cases: [(usize, usize, usize, Precision, &[usize]); 6] = [
        (2, 2, 20, Precision::F32, &[5, 1, 1, 40, 33, 17]),
        (1, 1, 64, Precision::Bf16, &[70, 3, 64]),
        (1, 1, 33, Precision::F32, &[97]),
        (3, 3, 8, Precision::Bf16, &[1, 1, 31, 32, 1]),
        (4, 2, 16, Precision::F32, &[50, 7, 20]),
        (3, 1, 10, Precision::Bf16, &[33, 40]),
    ];
    for (case, (heads, kv_heads, head_size, precision, lengths)) in cases.into_iter().enumerate() {
        let (c, wide) = (heads * head_size, (heads + 2 * kv_heads) * head_size);
        let shape = |length| AttentionShape {
            sequences: Sequences { batch: 1, length },
            heads,
            kv_heads,
            head_size,
            score_factor: 0.75,
            precision,
        };
        let rows = lengths.iter().sum();
        let [qkv, dout] = [wide, c].map(|width| rounded(&random(rows * width, 5), precision));
        let mut bounds = [Vec::new(), Vec::new()];
        for length in lengths {
            let start = bounds[0].len();
            for (to, at) in bounds.iter_mut().zip([start, start + length]) {
                to.resize(start + length, at as u32);
            }
        }
        let words = bounds.concat();
        let packed = PackedHeads::new(shape(rows), words.as_ptr() as u64);
        let of = (&emulator, SCHEDULES[case % SCHEDULES.len()]);
        let ours = attention(of, (&qkv, &dout), shape(rows), (packed, ",PackedHeads"));
        let mut first = 0;
        for length in lengths {
            let part =
                |values: &[f32], width: usize| values[first * width..][..length * width].to_vec();
            let (qkv, dout) = (part(&qkv, wide), part(&dout, c));
            let alone =
                attention(of, (&qkv, &dout), shape(*length), (Heads::from(shape(*length)), ""));
            assert_eq!(part(&ours[0], c), alone[0], "{case}: out from {first}");
            assert_eq!(part(&ours[2], wide), alone[2], "{case}: dqkv from {first}");
            for head in 0..heads {
                let lse = &ours[1][head * rows + first..][..*length];
                assert_eq!(lse, &alone[1][head * length..][..*length], "{case}: lse from {first}");
            }
            first += length;
        }
        let starts = Some(&bounds[0][..]);
        let (out, lse) = reference::attention_forward_of(&f64s(&qkv), starts, shape(rows));
        let dqkv = reference::attention_backward_of(&f64s(&dout), &f64s(&qkv), starts, shape(rows));
        for (ours, exact) in ours.iter().zip([out, lse, dqkv]) {
            let most = exact.iter().fold(0.0f64, |most, v| most.max(v.abs()));
            let bound = if precision == Precision::F32 { 1e-5 } else { 2e-2 };
            for (ours, exact) in ours.iter().zip(exact) {
                assert!((f64::from(*ours) - exact).abs() <= bound * most, "{case}: {ours} {exact}");
            }
        }
    }
}
