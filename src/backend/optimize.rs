//! The end of a step: a reduction of all gradients to a few sums, then the update.
//!
//! Between the two is the seam at which clipping decides, and at which ranks exchange what they
//! have.

use super::{Memory, Slot};
use crate::Result;
use crate::optim::{Largest, Optimizer, OptimizerStep, StepSums};

/// All parameters of a model with what training keeps for them.
pub struct Trained<'a, B: Memory> {
    /// Where each lies in all of the buffers.
    pub slots: &'a [Slot],
    /// The parameters.
    pub weights: &'a mut B::Weights,
    /// What the optimizer keeps of each element, in the order that it names its states in.
    pub states: &'a mut [B::F32],
    /// Gradients.
    pub gradients: &'a mut B::F32,
}

/// Optimizers.
pub trait Optimize: Memory {
    /// What a reduction leaves for the update that follows it: sums, tables of parameters.
    type Reduction: Send;

    /// What steps of an optimizer over these parameters need; an error where the host lacks memory
    /// for it.
    fn reduction(
        &self,
        arena: &mut Self::Arena,
        slots: &[Slot],
        optimizer: &Optimizer,
    ) -> Result<Self::Reduction>;
    /// Takes the sum of the first `rows` losses as that of the step, or with `accumulate` adds it.
    fn add_losses(
        &self,
        reduction: &mut Self::Reduction,
        losses: &Self::F32,
        rows: usize,
        accumulate: bool,
    );
    /// Sums up what the gradients are, for the update that comes next, and finds the rate of each
    /// parameter where it is not the step's. `workspace` is that of the
    /// step's operations, which count clamped scales in it.
    fn reduce(
        &self,
        workspace: &mut Self::Workspace,
        reduction: &mut Self::Reduction,
        trained: &mut Trained<'_, Self>,
        step: &OptimizerStep,
    );
    /// Clips, and makes one update of every parameter and its states after [`Optimize::reduce`],
    /// unless loss or norm is not finite or the norm above `step`'s limit: then nothing changes.
    /// Waits for the device.
    fn update(
        &self,
        reduction: &mut Self::Reduction,
        trained: &mut Trained<'_, Self>,
        step: &OptimizerStep,
    ) -> Result<StepSums>;
    /// Computes the update of [`Optimize::update`], which found `sums`, for every parameter without
    /// storing it, and calls `largest` with what it would leave of each, in their order. Waits for
    /// the device.
    fn try_update(
        &self,
        reduction: &mut Self::Reduction,
        trained: &mut Trained<'_, Self>,
        step: &OptimizerStep,
        sums: &StepSums,
        largest: &mut (dyn FnMut(Largest) + Send),
    ) -> Result<()>;
    /// The sum of the first `rows` losses, of an evaluation. Waits for the device.
    fn sum_losses(
        &self,
        reduction: &mut Self::Reduction,
        losses: &Self::F32,
        rows: usize,
    ) -> Result<f64>;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::{Cpu, Isa};
    use crate::backend::cuda::Cuda;
    use crate::backend::{
        Backend, BackwardWorkspace, Device, Sequences, WorkspaceShape, reference,
    };
    use crate::optim::OptimizerKind;
    use crate::recipe::Forward;
    use crate::{Engine, EngineOptions, Error};

    const LENGTHS: [usize; 3] = [40_003, 7, 4096];

    /// Three parameters on a device, the second of which does not decay, and all that trains them.
    struct Bench<'b, B: Backend> {
        backend: &'b B,
        slots: Vec<Slot>,
        weights: B::Weights,
        states: Vec<B::F32>,
        gradients: B::F32,
        losses: B::F32,
        workspace: B::Workspace,
        reduction: B::Reduction,
    }

    /// Of each parameter: weights, first and second moments.
    type Values = Vec<[Vec<f32>; 3]>;

    impl<'b, B: Backend> Bench<'b, B> {
        fn new(backend: &'b B, optimizer: &Optimizer) -> Self {
            let mut measuring = backend.arena(None).unwrap();
            Self::cut(backend, &mut measuring, optimizer);
            let bytes = backend.arena_used(&measuring);
            Self::cut(backend, &mut backend.arena(Some(bytes)).unwrap(), optimizer)
        }

        fn cut(backend: &'b B, arena: &mut B::Arena, optimizer: &Optimizer) -> Self {
            let (mut slots, mut len) = (Vec::new(), 0);
            for (index, n) in LENGTHS.into_iter().enumerate() {
                slots.push(Slot { index, start: len, len: n, decays: index != 1 });
                len = (len + n).next_multiple_of(B::ALIGN);
            }
            let shape = WorkspaceShape {
                sequences: Sequences { batch: 1, length: 1 },
                channels: 8,
                mlp_channels: 32,
                heads: 1,
                vocab_size: 8,
                forward: Forward::F32,
                backward: Some(BackwardWorkspace { f32: true, mxfp4_group: None }),
            };
            Self {
                backend,
                weights: backend.weights(arena, len, slots.len()),
                states: optimizer.states().iter().map(|_| backend.f32(arena, len)).collect(),
                gradients: backend.f32(arena, len),
                losses: backend.f32(arena, 1),
                workspace: backend.workspace(arena, &shape),
                reduction: backend.reduction(arena, &slots, optimizer).unwrap(),
                slots,
            }
        }

        fn write(&mut self, values: &Values) {
            for (slot, [p, m, v]) in self.slots.iter().zip(values) {
                self.backend.write_param(&mut self.weights, *slot, p).unwrap();
                for (state, values) in self.states.iter_mut().zip([m, v]) {
                    self.backend.write_f32(state, slot.start, values).unwrap();
                }
            }
        }

        fn read(&self) -> Values {
            let read = |slot: &Slot| {
                let mut all = [0, 1, 2].map(|_| vec![0.0; slot.len]);
                self.backend.read_param(&self.weights, *slot, &mut all[0]).unwrap();
                for (state, values) in self.states.iter().zip(&mut all[1..]) {
                    self.backend.read_f32(state, slot.start, values).unwrap();
                }
                all
            };
            self.slots.iter().map(read).collect()
        }

        /// One step with these gradients; what would be left of each parameter, if `tried` before.
        fn step(
            &mut self,
            step: &OptimizerStep,
            loss: f32,
            gradients: &[Vec<f32>],
            tried: bool,
        ) -> (StepSums, Vec<Largest>) {
            let Self { backend, slots, weights, states, workspace, reduction, .. } = self;
            for (slot, values) in slots.iter().zip(gradients) {
                backend.write_f32(&mut self.gradients, slot.start, values).unwrap();
            }
            backend.write_f32(&mut self.losses, 0, &[loss]).unwrap();
            let (losses, gradients) = (&mut self.losses, &mut self.gradients);
            backend.scope(move || {
                backend.add_losses(reduction, losses, 1, false);
                let mut all = Trained { slots, weights, states, gradients };
                let mut largest = Vec::new();
                if tried {
                    let within = OptimizerStep { largest_gradient: 0.0, ..*step };
                    backend.reduce(workspace, reduction, &mut all, &within);
                    let sums = backend.update(reduction, &mut all, &within).unwrap();
                    assert_eq!(sums.gradient_scale(&within), None);
                    let found = &mut |of_one| largest.push(of_one);
                    backend.try_update(reduction, &mut all, step, &sums, found).unwrap();
                }
                backend.reduce(workspace, reduction, &mut all, step);
                (backend.update(reduction, &mut all, step).unwrap(), largest)
            })
        }
    }

    fn random(seed: u32, scale: f32) -> Vec<Vec<f32>> {
        let number = |i: usize| {
            let word = (i as u32).wrapping_mul(2_654_435_761).wrapping_add(seed * 40_503) >> 8;
            scale * (word as f32 / (1 << 23) as f32 - 1.0)
        };
        LENGTHS.map(|n| (0..n).map(|i| number(i + n)).collect()).into()
    }

    fn values(moment: f32) -> Values {
        let second = random(3, 1.0)
            .into_iter()
            .map(|v| v.into_iter().map(|v| moment * (0.5 + v * v)).collect());
        let all = random(1, 1.0).into_iter().zip(random(2, 0.1)).zip(second);
        all.map(|((p, m), v)| [p, m, v]).collect()
    }

    fn step_of(kind: OptimizerKind, t: u64) -> OptimizerStep {
        let (optimizer, largest_gradient) = (Optimizer::new(kind), f32::INFINITY);
        OptimizerStep { optimizer, lr: 0.01, t, loss_scale: 1.0, largest_gradient }
    }

    /// The step by the definition, in f64.
    fn twin(step: &OptimizerStep, before: &Values, gradients: &[Vec<f32>]) -> Vec<Vec<[f64; 3]>> {
        let squares = gradients.iter().flatten().map(|g| f64::from(*g).powi(2)).sum();
        let sums = StepSums { losses: 0.0, squares, raised_blocks: 0 };
        let scale = f64::from(sums.gradient_scale(step).unwrap());
        let Optimizer { kind, beta2, epsilon, .. } = step.optimizer;
        let (beta2, epsilon) = (f64::from(beta2), f64::from(epsilon));
        let correction = 1.0 - beta2.powi(step.t as i32);
        let of_one = |(i, ([p, m, v], g)): (usize, (&[Vec<f32>; 3], &Vec<f32>))| {
            let ratio = |(v, g): (&f32, &f32)| {
                let square = (scale * f64::from(*g)).powi(2);
                let u = (beta2 * f64::from(*v) + (1.0 - beta2) * square) / correction;
                square / u.max(epsilon * epsilon)
            };
            let rms = (v.iter().zip(g).map(ratio).sum::<f64>() / g.len() as f64).sqrt();
            let lr = match kind {
                OptimizerKind::AdamW => step.lr,
                OptimizerKind::StableAdamW => (f64::from(step.lr) / rms.max(1.0)) as f32,
            };
            let step = OptimizerStep { lr, ..*step };
            let of_element = |k: usize| {
                let before = [p[k], m[k], v[k]].map(f64::from);
                reference::adamw(before, scale * f64::from(g[k]), i != 1, &step)
            };
            (0..g.len()).map(of_element).collect()
        };
        before.iter().zip(gradients).enumerate().map(of_one).collect()
    }

    fn each_backend(cpu: impl Fn(&Cpu), gpu: impl Fn(&Cuda)) {
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
            cpu(&Cpu::with_isa(2, isa).unwrap());
        }
        match Engine::new(EngineOptions { device: "cuda".into(), ..EngineOptions::default() }) {
            Ok(engine) => match engine.backend() {
                Device::Cuda(cuda) => gpu(cuda),
                Device::Cpu(_) => unreachable!("asked for a GPU"),
            },
            Err(error @ Error::Unsupported { .. }) => println!("skipped on a GPU: {error}"),
            Err(error) => panic!("{error}"),
        }
    }

    fn steps_are_those_of_the_definition<B: Backend>(backend: &B) {
        let gradients = random(4, 1.0);
        for (kind, clip) in
            OptimizerKind::ALL.into_iter().flat_map(|kind| [0.0, 60.0].map(|c| (kind, c)))
        {
            let mut step = step_of(kind, 3);
            step.optimizer.clip = clip;
            let mut bench = Bench::new(backend, &step.optimizer);
            let before = values(1e-3);
            bench.write(&before);
            let (sums, largest) = bench.step(&step, 1.5, &gradients, true);
            assert_eq!(sums.losses, 1.5);
            let (after, exact) = (bench.read(), twin(&step, &before, &gradients));
            for (i, (ours, exact)) in after.iter().zip(&exact).enumerate() {
                for (which, ours) in ours.iter().enumerate() {
                    let most = ours.iter().fold(0.0f32, |most, x| most.max(x.abs()));
                    let found = [largest[i].weight, largest[i].states[0], largest[i].states[1]];
                    assert_eq!(found[which], most, "{kind}, {i}, {which}: tried");
                    for (ours, exact) in ours.iter().zip(exact) {
                        let distance = (f64::from(*ours) - exact[which]).abs();
                        assert!(distance < 1e-6, "{kind}, {i}: {ours}, expected {}", exact[which]);
                    }
                }
            }

            // Without a finite loss or norm, and above the limit, nothing moves.
            let mut beyond = gradients.clone();
            beyond[2][77] = f32::INFINITY;
            bench.step(&step, f32::NAN, &gradients, false);
            bench.step(&step, 1.5, &beyond, false);
            bench.step(&OptimizerStep { largest_gradient: 1.0, ..step }, 1.5, &gradients, false);
            assert!(bench.read() == after, "{kind}");
        }
    }

    #[test]
    fn every_optimizer_makes_the_steps_of_its_definition() {
        each_backend(steps_are_those_of_the_definition, steps_are_those_of_the_definition);
    }

    /// With second moments so large that no root mean square is above 1.
    fn stable_adamw_is_adamw_where_no_rate_falls<B: Backend>(backend: &B) {
        let [stable, plain] = [OptimizerKind::StableAdamW, OptimizerKind::AdamW].map(|kind| {
            let mut step = step_of(kind, 3);
            step.optimizer.clip = 0.0;
            let mut bench = Bench::new(backend, &step.optimizer);
            bench.write(&values(1e3));
            for t in 3..8 {
                let step = OptimizerStep { t, ..step };
                bench.step(&step, 1.0, &random(t as u32, 1.0), t == 3);
            }
            bench.read()
        });
        assert!(stable == plain);
    }

    #[test]
    fn rates_that_do_not_fall_give_the_bits_of_adamw() {
        each_backend(
            stable_adamw_is_adamw_where_no_rate_falls,
            stable_adamw_is_adamw_where_no_rate_falls,
        );
    }
}
