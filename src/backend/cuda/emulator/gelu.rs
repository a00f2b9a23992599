//! GELU and its derivative: `gelu.cu`.

use super::{Emulator, SCHEDULES};
use crate::backend::{Activation, reference};

/// As `gelu_of_all` is declared.
pub(super) type GeluKernel<T> = unsafe extern "C" fn(*mut T, *mut u32, *const T, u64);

/// GELU and its derivative to f32's accuracy relative to 1 or x, and no NaN that no NaN made.
#[test]
fn gelu_is_that_of_the_definition() {
    let Some(emulator) = Emulator::new("gelu") else { return };
    let mut x: Vec<f32> = (-12_000..=12_000).map(|i| i as f32 * 1e-3).collect();
    x.extend([1e-40, 1e-20, 20.0, 1e4, 1e12, 1e15, 1e18].iter().flat_map(|v| [*v, -*v]));
    x.extend([0.0, -0.0, f32::NAN]);
    let apply = |name: &str, out: &mut [f32]| {
        let kernel: GeluKernel<f32> = emulator.kernel(name);
        let (to, len, mut amax) = (out.as_mut_ptr(), x.len(), 0);
        let at_amax = &raw mut amax;
        emulator.run(SCHEDULES[0], [len.div_ceil(8 * 256), 1], 256, || {
            // SAFETY: buffers and grid are what the comment of the kernels asks for.
            unsafe { kernel(to, at_amax, x.as_ptr(), len as u64) };
        });
    };
    let bounds = [2e-7, 6e-7];
    for (form, exact) in [(Activation::GeluTanh, false), (Activation::Gelu, true)] {
        let (mut out, mut slope) = (vec![f32::NAN; x.len()], vec![1.0f32; x.len()]);
        apply(&format!("gelu_of_all<float,{exact},false>"), &mut out);
        apply(&format!("gelu_of_all<float,{exact},true>"), &mut slope);
        let mut worst = [0.0f64; 2];
        for (i, x) in x.iter().enumerate() {
            let wide = f64::from(*x);
            let pairs = [
                (out[i], reference::gelu_of(form, wide)),
                (slope[i], reference::gelu_derivative_of(form, wide)),
            ];
            for ((ours, exact), worst) in pairs.into_iter().zip(&mut worst) {
                if x.is_nan() {
                    assert!(ours.is_nan());
                    continue;
                }
                *worst = worst.max((f64::from(ours) - exact).abs() / wide.abs().max(1.0));
                assert!(ours.is_finite(), "{x}: {ours}");
            }
        }
        println!("{form}: off by {:.1e} and {:.1e}", worst[0], worst[1]);
        assert!(worst[0] < bounds[0] && worst[1] < bounds[1], "{form}: {worst:?}");
    }
}
