//! What is kept of weights: `follow.cu`.

use super::{Emulator, SCHEDULES};
use crate::backend::conformance::random;
use crate::formats::ema;

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
