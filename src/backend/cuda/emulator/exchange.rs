//! What lanes do with gradients: `exchange.cu`.

use super::super::tests::random;
use super::{Emulator, SCHEDULES};

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
