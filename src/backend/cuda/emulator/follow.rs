//! What is kept of weights: `follow.cu`.

use super::super::follow::{Observed as Argument, observation};
use super::super::quantize::Launch;
use super::{Emulator, SCHEDULES};
use crate::backend::conformance::random;
use crate::formats::{Observation, Observed, ema, oscillates};
use crate::optim::ramping::interval;

type UpdateMean = unsafe extern "C" fn(*mut f32, *const f32, u64, f32);

#[test]
fn slow_means_are_those_of_the_definition() {
    let Some(emulator) = Emulator::new("follow") else { return };
    let update_mean: UpdateMean = emulator.kernel("update_mean");
    let (w, means, decay) = (random(700, 1), random(700, 2), 0.998);
    for schedule in SCHEDULES {
        let mut ours = means.clone();
        let (mean, weights) = (ours.as_mut_ptr(), w.as_ptr());
        emulator.run(schedule, [3, 1], 256, || {
            // SAFETY: as long as the last argument but one says.
            unsafe { update_mean(mean, weights, 699, decay) };
        });
        for (i, ours) in ours.iter().enumerate() {
            let expected = if i < 699 { ema(means[i], w[i], decay) } else { means[i] };
            assert_eq!(ours.to_bits(), expected.to_bits(), "{i}");
        }
    }
}

type FindIntervals = unsafe extern "C" fn(*mut f32, *const f32, *const f32, u64, f32);

#[test]
fn intervals_are_those_of_the_definition() {
    let Some(emulator) = Emulator::new("follow") else { return };
    let find_intervals: FindIntervals = emulator.kernel("find_intervals");
    let [mut moved, mut rounded] =
        [1, 2].map(|seed| random(700, seed).iter().map(|v| v.abs()).collect::<Vec<_>>());
    rounded.iter_mut().for_each(|v| *v *= 20.0);
    (moved[3], moved[4], rounded[4]) = (0.0, 0.0, 0.0);
    for schedule in SCHEDULES {
        let mut ours = vec![7.0; 700];
        let (to, of) = (ours.as_mut_ptr(), [moved.as_ptr(), rounded.as_ptr()]);
        emulator.run(schedule, [3, 1], 256, || {
            // SAFETY: as long as the last argument but one says.
            unsafe { find_intervals(to, of[0], of[1], 699, 100.0) };
        });
        for (i, ours) in ours.iter().enumerate() {
            let expected = if i < 699 { interval(moved[i], rounded[i], 100.0) } else { 7.0 };
            assert_eq!(*ours, expected, "{i}");
        }
        assert!([1.0, 6.0, 11.0, 100.0].iter().all(|n| ours.contains(n)));
    }
}

type BeginTrack = unsafe extern "C" fn(*mut f32, *mut f32, *mut f32, *const f32, u64);
type AddObservations = unsafe extern "C" fn(*mut f64, *const f64, u32);
type ResetOscillating =
    unsafe extern "C" fn(*mut f32, *const f32, *const f32, *const f32, u64, f32);

/// Elements of every kind of code, of blocks that vanish, above the grid and in the middle.
#[test]
fn what_is_seen_and_reset_is_that_of_the_definition() {
    let Some(emulator) = Emulator::new("follow") else { return };
    let begin_track: BeginTrack = emulator.kernel("begin_track");
    let add_observations: AddObservations = emulator.kernel("add_observations");
    let reset: ResetOscillating = emulator.kernel("reset_oscillating");
    let (rows, inputs, block) = (9, 70, 16);
    let (len, blocks) = (rows * inputs, 5);
    let grid_of = |v: f32| (4.0 * v).round() / 4.0;
    let [start, far] = [random(len, 1), random(len, 2)];
    let after: Vec<f32> = start.iter().zip(&far).map(|(w, far)| w + 0.05 * far).collect();
    let block_scales: [Vec<f32>; 2] = [3, 4].map(|seed| {
        let scale = |i: usize| [0.0, 0.25, 0.5, 1.0, 0.3][(i + seed) % 5];
        (0..rows * blocks).map(scale).collect()
    });
    let rounded = [&start, &after].map(|w| w.iter().map(|w| grid_of(*w)).collect::<Vec<f32>>());
    for schedule in SCHEDULES {
        let mut kept = [0; 3].map(|_| vec![f32::NAN; len]);
        let [before, moved, rounded_moved] = kept.each_mut().map(|values| values.as_mut_ptr());
        emulator.run(schedule, [3, 1], 256, || {
            // SAFETY: as long as the last argument says.
            unsafe { begin_track(before, moved, rounded_moved, start.as_ptr(), len as u64) };
        });
        assert_eq!(kept, [start.clone(), vec![0.0; len], vec![0.0; len]]);
        let mut partials = vec![f64::NAN; 9 * 2];
        let argument = Argument {
            w: after.as_ptr() as u64,
            before: before as u64,
            moved: moved as u64,
            rounded_moved: rounded_moved as u64,
            rounded: rounded.each_ref().map(|values| values.as_ptr() as u64),
            block_scales: block_scales.each_ref().map(|values| values.as_ptr() as u64),
            partials: partials.as_mut_ptr() as u64,
            len: len as u64,
            inputs: inputs as u32,
            blocks: blocks as u32,
            block,
        };
        let launch = Launch { grid: [2, 1, 1], block: 256, shared: 0 };
        emulator.launch(schedule, "observe", launch, argument);
        let mut sums = [f64::NAN; 9];
        let (to, from) = (&raw mut sums, partials.as_ptr());
        emulator.run(schedule, [1, 1], 256, || {
            // SAFETY: two thread blocks have left their sums.
            unsafe { add_observations(to.cast(), from, 2) };
        });
        let mut exact = Observation::default();
        let mut moves = [vec![0.0; len], vec![0.0; len]];
        for i in 0..len {
            let at = i / inputs * blocks + i % inputs / block as usize;
            let seen = Observed {
                weights: [start[i], after[i]],
                rounded: rounded.each_ref().map(|values| values[i]),
                block_scales: block_scales.each_ref().map(|values| values[at]),
            };
            let [of_weight, of_rounded] = &mut moves;
            seen.add_to(&mut exact, [&mut of_weight[i], &mut of_rounded[i]]);
        }
        let found = observation(sums);
        let counts = |o: &Observation| ([o.flipped, o.clipped, o.oscillating], o.amax);
        assert_eq!(counts(&found), counts(&exact));
        assert!(counts(&exact).0.iter().all(|count| *count > 0), "{exact:?}");
        for (ours, exact) in [
            (found.changes, exact.changes),
            (found.before, exact.before),
            (found.rounded_changes, exact.rounded_changes),
            (found.rounded_before, exact.rounded_before),
            (found.confidence, exact.confidence),
        ] {
            assert!((ours - exact).abs() <= 1e-12 * exact, "{ours}, not {exact}");
        }
        assert_eq!(kept, [after.clone(), moves[0].clone(), moves[1].clone()]);
        let mut weights = after.clone();
        let (w, to) = (weights.as_mut_ptr(), rounded[1].as_ptr());
        let [_, moved, rounded_moved] = kept.each_ref().map(|values| values.as_ptr());
        emulator.run(schedule, [3, 1], 256, || {
            // SAFETY: as above.
            unsafe { reset(w, to, moved, rounded_moved, len as u64, 4.0) };
        });
        for i in 0..len {
            let oscillated = oscillates(moves[0][i], moves[1][i], 4.0);
            assert_eq!(weights[i], if oscillated { rounded[1][i] } else { after[i] }, "{i}");
        }
    }
}
