//! The end of a step.

use super::*;
use crate::backend::{Largest, Trained, reference};

#[test]
fn optimizer_steps() {
    let Some(cuda) = gpu() else { return };
    cuda.gpu.scope(|| {
        let lengths = [40_003, 7, 4096];
        let step = AdamWStep {
            lr: 0.01,
            beta1: 0.9,
            beta2: 0.95,
            epsilon: 1e-8,
            weight_decay: 0.1,
            t: 3,
            clip: 20.0,
            loss_scale: 0.25,
            largest_gradient: f32::INFINITY,
        };
        let host: Vec<[Vec<f32>; 4]> = lengths
            .iter()
            .zip(1..)
            .map(|(n, s)| {
                let v = random(*n, 10 * s + 3).iter().map(|v| v * v).collect();
                [random(*n, 10 * s), random(*n, 10 * s + 1), random(*n, 10 * s + 2), v]
            })
            .collect();
        let mut device: Vec<_> = host
            .iter()
            .map(|[g, p, m, v]| {
                (f32_buffer(&cuda, g), param(&cuda, p), f32_buffer(&cuda, m), f32_buffer(&cuda, v))
            })
            .collect();
        let mut measuring = Arena::measuring(&cuda.gpu);
        Optimizer::new(&mut measuring, lengths.len()).unwrap();
        let mut arena = Arena::allocated(&cuda.gpu, measuring.used()).unwrap();
        let mut optimizer = Optimizer::new(&mut arena, lengths.len()).unwrap();
        let norm: f64 = host.iter().flat_map(|[g, ..]| f64s(g)).map(|g| g * g).sum::<f64>().sqrt();
        let scale = 20.0 / norm;
        assert!(scale < 1.0);

        let small = workspace_shape(Sequences { batch: 1, length: 1 }, 8, 1, 8, Precision::Bf16);
        let mut scratch = workspace(&cuda, &small);
        let losses = f32_buffer(&cuda, &[0.5, 1.5, 2.5, f32::NAN]);
        let mut all = |visit: &mut dyn FnMut(Trained<'_, Cuda>)| {
            for (i, (gradient, param, m, v)) in device.iter_mut().enumerate() {
                visit(Trained { param, m, v, gradient, decays: i != 1 });
            }
        };
        assert_eq!(cuda.sum_losses(&mut optimizer, &losses, 2).unwrap(), 2.0);
        cuda.add_losses(&mut optimizer, &losses, 2, false);
        cuda.add_losses(&mut optimizer, &losses, 3, true);
        // Above the limit nothing is done, and what would be done can be asked.
        let within = AdamWStep { largest_gradient: 19.0, ..step };
        let sums = cuda.finish_step(&mut scratch, &mut optimizer, &mut all, &within).unwrap();
        assert_eq!(sums.gradient_scale(&within), None);
        let mut tried = Vec::new();
        cuda.try_step(&mut optimizer, &mut all, &step, &sums, &mut |largest| tried.push(largest))
            .unwrap();
        let sums = cuda.finish_step(&mut scratch, &mut optimizer, &mut all, &step).unwrap();
        assert_eq!(sums.losses, 6.5);
        assert!((sums.squares.sqrt() / norm - 1.0).abs() < 1e-9);
        let mut after = Vec::new();
        for (i, ([g, p, m, v], (_, param, first, second))) in host.iter().zip(&device).enumerate() {
            let exact: Vec<f64> = (0..g.len())
                .map(|k| {
                    let before = [p[k], m[k], v[k]].map(f64::from);
                    reference::adamw(before, scale * f64::from(g[k]), i != 1, &step)[0]
                })
                .collect();
            let mut ours = vec![0.0; p.len()];
            cuda.read_param(param, &mut ours).unwrap();
            close("weights", &ours, &exact, 1e-6);
            assert_eq!(word(&cuda, param.amax.address), amax_of(&ours));
            let [mut m, mut v] = [vec![0.0; p.len()], vec![0.0; p.len()]];
            cuda.read_f32(first, &mut m).unwrap();
            cuda.read_f32(second, &mut v).unwrap();
            let most = |x: &[f32]| x.iter().fold(0.0f32, |most, x| most.max(x.abs()));
            let largest = Largest { weight: most(&ours), m: most(&m), v: most(&v) };
            assert_eq!(tried[i], largest);
            let copy = read_bytes(&cuda, param.copy.address, 2 * p.len());
            let copy = copy.as_chunks::<2>().0.iter().map(|b| half::bf16::from_le_bytes(*b));
            assert!(copy.eq(ours.iter().map(|v| half::bf16::from_f32(*v))));
            after.push(ours);
        }

        // Without a finite loss nothing moves.
        let nan = f32_buffer(&cuda, &[f32::NAN]);
        cuda.add_losses(&mut optimizer, &nan, 1, true);
        let mut all = |visit: &mut dyn FnMut(Trained<'_, Cuda>)| {
            for (i, (gradient, param, m, v)) in device.iter_mut().enumerate() {
                visit(Trained { param, m, v, gradient, decays: i != 1 });
            }
        };
        assert!(
            cuda.finish_step(&mut scratch, &mut optimizer, &mut all, &step)
                .unwrap()
                .losses
                .is_nan()
        );
        for ((_, param, ..), before) in device.iter().zip(&after) {
            let mut ours = vec![0.0; before.len()];
            cuda.read_param(param, &mut ours).unwrap();
            assert!(ours == *before);
        }
    });
}
