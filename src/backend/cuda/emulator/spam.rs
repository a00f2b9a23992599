//! How gradients are normalized: `optimize_spam.cu`.

use super::super::step::{Entry, Step};
use super::super::tests::random;
use super::{Emulator, SCHEDULES};
use crate::backend::conformance::step;
use crate::optim::spam::{Factors, STATISTICS};
use crate::optim::{Optimizer, OptimizerKind, adamw};

/// `Normal` of the kernels.
type Normal = [f32; 3 + STATISTICS];
type Largest = unsafe extern "C" fn(*mut u32, *const Entry, u32, u64);
type Limits = unsafe extern "C" fn(*mut Normal, *const u32, *const f32, *const Entry, Factors);
type Squares = unsafe extern "C" fn(*mut f64, *const Entry, u32, u64, *const Normal);
type Scales = unsafe extern "C" fn(*mut Normal, *const f64, *const Entry, Factors);
type Keep = unsafe extern "C" fn(*mut f32, *const Normal, u32, *const f64, Step);

/// Of more pieces than a warp, of less than a vector, and of one whole piece.
const LENGTHS: [usize; 3] = [140_003, 7, 4096];

/// Limits, scales and what is kept are those of the scalar arithmetic; and nothing is kept of a
/// step that is not done.
#[test]
fn gradients_are_normalized_as_defined() {
    let Some(emulator) = Emulator::new("optimize_spam") else { return };
    let largest: Largest = emulator.kernel("largest_of_pieces");
    let limits: Limits = emulator.kernel("find_limits");
    let squares: Squares = emulator.kernel("squares_of_clipped");
    let scales: Scales = emulator.kernel("find_scales");
    let keep: Keep = emulator.kernel("keep_statistics");
    let mut gradients = LENGTHS.map(|len| random(len, len as u64));
    gradients[0][130_001] = -50.0;
    gradients[1].fill(0.0);
    let pieces = LENGTHS.map(|len| len.div_ceil(4096) as u64);
    let all: u64 = pieces.iter().sum();
    let mut first_piece = 0;
    let table: Vec<_> = gradients
        .iter()
        .zip(pieces)
        .map(|(g, pieces)| {
            first_piece += pieces;
            Entry {
                gradient: g.as_ptr().addr() as u64,
                len: g.len() as u64,
                first_piece: first_piece - pieces,
                ..bytemuck::Zeroable::zeroed()
            }
        })
        .collect();
    for kind in [OptimizerKind::StableSpam, OptimizerKind::StableSpamRef, OptimizerKind::GradStab] {
        let step = step(Optimizer::new(kind));
        let factors = Factors::new(&step);
        for schedule in SCHEDULES {
            let kept = [[0.02, 3.0, 4.0], [0.0; 3], [0.5, 60.0, 70.0f32]];
            let mut after = kept;
            let mut bits = vec![0u32; all as usize];
            let mut partials = vec![f64::NAN; all as usize];
            let mut normals = [[f32::NAN; 6]; 3];
            let (entries, of_kernel) = (table.as_ptr(), Step::new(&step));
            let (bits, partials) = (bits.as_mut_ptr(), partials.as_mut_ptr());
            let sums = [[f64::NAN, 1.0, 0.0], [1.0, 1.0, 0.0]];
            let (of_one, of_kept) = (&raw mut normals, &raw mut after);
            let (of_one, of_kept) = (of_one.cast::<Normal>(), of_kept.cast::<f32>());
            // SAFETY: buffers are as long as the table and the grids say.
            unsafe {
                emulator.run(schedule, [3, 1], 256, || largest(bits, entries, 3, all));
                emulator.run(schedule, [3, 1], 32, || {
                    limits(of_one, bits, kept.as_ptr().cast(), entries, factors);
                });
                emulator.run(schedule, [2, 1], 256, || {
                    squares(partials, entries, 3, all, of_one);
                });
                emulator.run(schedule, [3, 1], 256, || scales(of_one, partials, entries, factors));
            }
            let [undone, done] = sums.map(|sums| {
                emulator.run(schedule, [1, 1], 256, || {
                    // SAFETY: as above.
                    unsafe { keep(of_kept, of_one, 3, sums.as_ptr(), of_kernel) };
                });
                // SAFETY: read between kernels.
                unsafe { *of_kept.cast::<[[f32; 3]; 3]>() }
            });
            assert_eq!(undone, kept, "{kind}: a step that is not done");
            for (i, g) in gradients.iter().enumerate() {
                let mut statistics = kept[i];
                let most = g.iter().fold(0.0f32, |most, g| most.max(g.abs()));
                let clipped = factors.limit(&mut statistics, most);
                let sum = g.iter().map(|g| f64::from(adamw::clip(*g, clipped)).powi(2)).sum();
                let scale = factors.scale(&mut statistics, sum);
                let expected = [clipped[0], clipped[1], scale];
                let close = |a: &[f32], b: &[f32]| {
                    a.iter().zip(b).all(|(a, b)| a == b || (a / b - 1.0).abs() < 1e-6)
                };
                assert!(
                    close(&normals[i], &expected),
                    "{kind}, {i}: {:?} {expected:?}",
                    normals[i]
                );
                assert!(close(&done[i], &statistics), "{kind}, {i}: {:?} {statistics:?}", done[i]);
            }
        }
    }
}
