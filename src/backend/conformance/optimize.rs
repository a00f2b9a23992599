//! The end of a step.

use super::*;
use crate::optim::moments::{
    self, Code, E4m3, F16, First, Float, GROUP, Second, inverse, is_stochastic, tensor_scale,
};
use crate::optim::spam::STATISTICS;
use crate::optim::{adamw, master, ramping};

/// Parameters in training.
pub(in crate::backend) struct Update<B: Harness> {
    params: Params<B>,
    /// First and second moments, and what ramping keeps besides.
    states: Vec<B::Bytes>,
    layouts: Vec<StateLayout>,
    statistics: B::F32,
    gradients: Gradients<B>,
    kept: optim::Gradients,
    reduction: B::Reduction,
    workspace: B::Workspace,
    parts: [Range<usize>; 3],
}

/// Weights, first and second moments, and gradients of a parameter.
pub(super) type Values = [Vec<f32>; 4];

/// Of several jobs and a rest, of less than a vector, and of whole ones. The first is a matrix of 109
/// rows and 367 columns.
pub(super) const LENGTHS: [usize; 3] = [40_003, 7, 4096];

/// What is stored in less than f32, with decay rates to nearest and stochastically.
pub(in crate::backend) const FORMS: [(Moments, f32, Master, optim::Gradients); 8] = [
    (Moments::Bf16, 0.95, Master::F32, optim::Gradients::F32),
    (Moments::Bf16, 0.999, Master::Split, optim::Gradients::Bf16),
    (Moments::Int8, 0.95, Master::Split, optim::Gradients::Bf16),
    (Moments::Int8, 0.999, Master::F32, optim::Gradients::F32),
    (Moments::Fp8, 0.95, Master::Split, optim::Gradients::Bf16),
    (Moments::Fp8, 0.999, Master::F32, optim::Gradients::F32),
    (Moments::F32, 0.95, Master::Split, optim::Gradients::F32),
    (Moments::F32, 0.95, Master::F32, optim::Gradients::Bf16),
];

/// The second parameter does not decay.
pub(in crate::backend) fn some_values() -> [Values; 3] {
    std::array::from_fn(|i| {
        let values = |seed| random(LENGTHS[i], 10 * i as u64 + seed);
        [values(1), values(2), values(3).iter().map(|v| v * v).collect(), values(4)]
    })
}

/// The third step of an optimizer, without clipping.
pub(in crate::backend) fn step(optimizer: Optimizer) -> OptimizerStep {
    OptimizerStep {
        optimizer: Optimizer { clip: 0.0, ..optimizer },
        lr: 0.01,
        t: 3,
        seed: 5,
        loss_scale: 0.25,
        largest_gradient: f32::INFINITY,
        annealing: 1.0,
    }
}

impl<B: Harness> Update<B> {
    pub(in crate::backend) fn of(b: &B, values: &[Values], optimizer: Optimizer) -> Self {
        Self::with_rows(b, values, optimizer, None)
    }

    /// With another number of rows of the first parameter, a matrix.
    pub(super) fn with_rows(
        b: &B,
        values: &[Values],
        optimizer: Optimizer,
        rows: Option<usize>,
    ) -> Self {
        let all = |which: usize| values.iter().map(|of_one| &of_one[which][..]).collect::<Vec<_>>();
        let mut params = Params::kept_as(b, &all(0), optimizer.master);
        params.slots[0].rows = rows.unwrap_or(params.slots[0].rows);
        let layouts =
            StateLayout::of_all(&params.slots, &optimizer, &(0..params.slots.len()), B::ALIGN)
                .unwrap();
        Self {
            states: (layouts.iter().enumerate())
                .map(|(number, StateLayout { places, bytes })| {
                    let mut state = cut(b, |arena| b.bytes(arena, *bytes));
                    let moments = if number < 2 { all(number + 1) } else { Vec::new() };
                    for (place, values) in places.iter().zip(moments) {
                        if place.len == 0 {
                            continue;
                        }
                        let (elements, scales) = stored(place, number == 1, values, None);
                        b.write_bytes(&mut state, place.start, &elements).unwrap();
                        b.write_bytes(&mut state, place.scales, &scales).unwrap();
                    }
                    state
                })
                .collect(),
            layouts,
            statistics: cut(b, |arena| b.f32(arena, STATISTICS * params.slots.len())),
            gradients: Gradients::kept_in(b, &all(3), optimizer.gradients),
            kept: optimizer.gradients,
            reduction: cut(b, |arena| b.reduction(arena, &params.slots, &optimizer).unwrap()),
            workspace: workspace(b, Sequences { batch: 1, length: 1 }, 8, 1, 8, Precision::Bf16),
            // Several, as where they are given to other ranks one by one.
            parts: [0..1, 1..1, 1..params.slots.len()],
            params,
        }
    }

    pub(in crate::backend) fn add_losses(&mut self, b: &B, losses: &[f32], accumulate: bool) {
        let rows = losses.len();
        b.add_losses(&mut self.reduction, (&f32_input(b, losses), None), rows, accumulate);
    }

    /// What a step works on, with what is kept besides.
    fn trained(&mut self) -> (Trained<'_, B>, &mut B::Reduction, &mut B::Workspace) {
        let trained = Trained {
            parts: &self.parts,
            slots: &self.params.slots,
            weights: &mut self.params.weights,
            states: &mut self.states,
            layouts: &self.layouts,
            statistics: &mut self.statistics,
            gradients: &mut self.gradients.flat,
        };
        (trained, &mut self.reduction, &mut self.workspace)
    }

    pub(in crate::backend) fn step(&mut self, b: &B, step: &OptimizerStep) -> StepSums {
        let (mut trained, reduction, workspace) = self.trained();
        let all = trained.owned();
        b.square_gradients(reduction, &mut trained, &all);
        b.reduce(workspace, reduction, &mut trained, step);
        b.update(workspace, reduction, &mut trained, step, &mut |_| Ok(())).unwrap()
    }

    /// What the update of a step is about to do to every parameter, behind its reduction.
    fn watched(&mut self, b: &B, step: &OptimizerStep) -> Vec<UpdateSums> {
        let parameters = self.params.slots.len();
        let mut watch = cut(b, |arena| b.update_watch(arena, parameters).unwrap());
        let (mut trained, reduction, workspace) = self.trained();
        let all = trained.owned();
        b.square_gradients(reduction, &mut trained, &all);
        b.reduce(workspace, reduction, &mut trained, step);
        let mut found = Vec::new();
        let mut keep = |of_one| found.push(of_one);
        b.watch_update(&mut watch, reduction, &mut trained, step, &mut keep).unwrap();
        found
    }

    /// The update that follows a reduction.
    pub(in crate::backend) fn update(&mut self, b: &B, step: &OptimizerStep) {
        let (mut trained, reduction, workspace) = self.trained();
        b.update(workspace, reduction, &mut trained, step, &mut |_| Ok(())).unwrap();
    }

    /// What the step that `sums` were found for would leave.
    pub(super) fn tried(&mut self, b: &B, step: &OptimizerStep, sums: &StepSums) -> Vec<Largest> {
        let (mut trained, reduction, workspace) = self.trained();
        let mut tried = Vec::new();
        let mut largest = |of_one| tried.push(of_one);
        b.try_update(workspace, reduction, &mut trained, step, sums, &mut largest).unwrap();
        tried
    }

    pub(super) fn set_gradients(&mut self, b: &B, gradients: &[&[f32]]) {
        self.gradients = Gradients::kept_in(b, gradients, self.kept);
    }

    /// Where the first state of a parameter is.
    pub(super) fn place(&self, index: usize) -> Place {
        self.layouts[0].places[index]
    }

    /// All parameters, each with its weights.
    pub(in crate::backend) fn parameters(
        &self,
        b: &B,
    ) -> impl Iterator<Item = (B::Param<'_>, Vec<f32>)> {
        (0..self.params.slots.len()).map(|i| (self.params.get(b, i), self.params.read(b, i)))
    }

    /// Weights and moments of each parameter.
    pub(super) fn read(&self, b: &B) -> Vec<[Vec<f32>; 3]> {
        let moments = self.bytes(b).into_iter().enumerate().map(|(i, [m, v])| {
            let [of_m, of_v] = [0, 1].map(|state| &self.layouts[state].places[i]);
            [loaded(of_m, false, &m), loaded(of_v, true, &v)]
        });
        let weights = (0..self.params.slots.len()).map(|i| self.params.read(b, i));
        weights.zip(moments).map(|(p, [m, v])| [p, m, v]).collect()
    }

    /// First and second moments of each parameter as they are stored: elements and scales.
    pub(super) fn bytes(&self, b: &B) -> Vec<[Bytes; 2]> {
        let read = |state: &B::Bytes, at: usize, len: usize| {
            let mut bytes = vec![0; len];
            b.read_bytes(state, at, &mut bytes).unwrap();
            bytes
        };
        let of_one = |index: usize| {
            [0, 1].map(|which| {
                let (state, place) = (&self.states[which], &self.layouts[which].places[index]);
                let elements = read(state, place.start, place.bytes());
                (elements, read(state, place.scales, 4 * place.groups()))
            })
        };
        (0..self.params.slots.len()).map(of_one).collect()
    }
}

/// Elements and scales.
pub(in crate::backend) type Bytes = (Vec<u8>, Vec<u8>);

/// A moment of one parameter as it is stored, by `optim/moments.rs`; bf16 with the bits of a draw
/// where there are any.
pub(in crate::backend) fn stored(
    place: &Place,
    is_second: bool,
    values: &[f32],
    draw: Option<&Draw>,
) -> Bytes {
    let encode =
        if is_second { moments::encode_group::<Second> } else { moments::encode_group::<First> };
    match place.element {
        moments::Element::F32 => (bytemuck::cast_slice(values).to_vec(), Vec::new()),
        moments::Element::Bf16 => {
            let bits = values.iter().enumerate().map(|(i, value)| match draw {
                None => half::bf16::from_f32(*value).to_bits(),
                Some(draw) => {
                    let word = draw.bits(i as u32 / 8, u32::from(is_second))[i % 8 / 2];
                    let drawn = word >> (16 * (i % 2)) & 0xffff;
                    ((value.to_bits() + drawn) >> 16) as u16
                }
            });
            (bits.flat_map(u16::to_le_bytes).collect(), Vec::new())
        }
        moments::Element::Int8 => {
            let mut codes = vec![0; values.len()];
            let groups = values.chunks(GROUP).zip(codes.chunks_mut(GROUP));
            let scales: Vec<f32> = groups.map(|(values, codes)| encode(values, codes)).collect();
            (codes, bytemuck::cast_slice(&scales).to_vec())
        }
        moments::Element::E4m3 => {
            let scale = tensor_scale::<E4m3>(0.0, amax(values));
            let codes = values.iter().map(|value| E4m3::encode(*value, inverse(scale)));
            (codes.collect(), scale.to_le_bytes().to_vec())
        }
        moments::Element::F16 => {
            let scale = tensor_scale::<F16>(0.0, amax(values));
            let codes = values.iter().map(|value| F16::encode(*value, inverse(scale)));
            (codes.flat_map(u16::to_le_bytes).collect(), scale.to_le_bytes().to_vec())
        }
    }
}

fn amax(values: &[f32]) -> f32 {
    values.iter().fold(0.0, |amax, value| value.abs().max(amax))
}

/// The numbers that are stored.
pub(in crate::backend) fn loaded(
    place: &Place,
    is_second: bool,
    (elements, scales): &Bytes,
) -> Vec<f32> {
    let decode = if is_second { Second::decode } else { First::decode };
    let scale = |i: usize| f32::from_le_bytes(scales.as_chunks().0[i]);
    match place.element {
        moments::Element::F32 => {
            elements.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
        }
        moments::Element::Bf16 => {
            let numbers = elements.as_chunks().0.iter();
            numbers.map(|b| half::bf16::from_le_bytes(*b).to_f32()).collect()
        }
        moments::Element::Int8 => {
            let codes = elements.iter().enumerate();
            codes.map(|(i, code)| decode(*code, scale(i / GROUP))).collect()
        }
        moments::Element::E4m3 => {
            elements.iter().map(|code| E4m3::decode(*code, scale(0))).collect()
        }
        moments::Element::F16 => {
            let codes = elements.as_chunks().0.iter();
            codes.map(|code| F16::decode(u16::from_le_bytes(*code), scale(0))).collect()
        }
    }
}

/// Each loss times its weight, where there are weights.
pub(super) fn weighted_losses<B: Harness>(backends: &[B]) {
    let losses: Vec<f32> = random(3000, 8);
    let weights: Vec<f32> = (0..3000).map(|i| [0.0, 1.0, -0.5, 3.0][i % 4]).collect();
    let sum = |rows: usize| -> f64 {
        let pairs = losses[..rows].iter().zip(&weights);
        pairs.map(|(l, w)| f64::from(*l) * f64::from(*w)).sum()
    };
    each(backends, |b| {
        let mut update = Update::of(b, &some_values(), Optimizer::default());
        let (losses, weights) = (f32_input(b, &losses), f32_input(b, &weights));
        let both = (&losses, Some(&weights));
        b.add_losses(&mut update.reduction, both, 2999, false);
        b.add_losses(&mut update.reduction, both, 3, true);
        let (found, _) = b.counts(&update.workspace, &update.reduction).unwrap();
        let exact = sum(2999) + sum(3);
        assert!(
            (found - exact).abs() < 1e-9 * exact.abs().max(1.0),
            "{}: {found} {exact}",
            b.name()
        );
        let of_eval = b.sum_losses(&mut update.reduction, both, 2999).unwrap();
        assert!(
            (of_eval - sum(2999)).abs() < 1e-9 * exact.abs().max(1.0),
            "{}: {of_eval}",
            b.name()
        );
        let ones = f32_input(b, &[1.0; 3000]);
        let [plain, by_ones] = [None, Some(&ones)].map(|weights| {
            b.add_losses(&mut update.reduction, (&losses, weights), 3000, false);
            b.counts(&update.workspace, &update.reduction).unwrap().0
        });
        assert_eq!(plain, by_ones);
    });
}

/// Those of some parameters alone, in what they are kept in.
pub(super) fn gradients_are_scaled<B: Harness>(backends: &[B]) {
    let values = some_values();
    for kept in crate::optim::Gradients::ALL {
        each(backends, |b| {
            let optimizer = Optimizer { gradients: kept, ..Optimizer::default() };
            let mut update = Update::of(b, &values, optimizer);
            let slots = update.params.slots.clone();
            let read = |flat: &FlatGradients<B>| -> Vec<Vec<f32>> {
                let of = |slot: &Slot| {
                    let mut values = vec![0.0; slot.len];
                    flat.read(b, *slot, &mut values).unwrap();
                    values
                };
                slots.iter().map(of).collect()
            };
            let before = read(&update.gradients.flat);
            let of = 1..slots.len() - 1;
            b.scale_gradients(&mut update.gradients.flat, &of, -0.3);
            for (i, (before, after)) in before.iter().zip(read(&update.gradients.flat)).enumerate()
            {
                let place = update.gradients.flat.places[i];
                let expected: Vec<f32> = match (of.contains(&i), place.precision) {
                    (false, _) => before.clone(),
                    (true, Precision::F32) => before.iter().map(|g| g * -0.3).collect(),
                    (true, Precision::Bf16) => {
                        let rounded = before.iter().map(|g| half::bf16::from_f32(g * -0.3));
                        rounded.map(half::bf16::to_f32).collect()
                    }
                };
                assert_eq!(after, expected, "{}: parameter {i}", b.name());
            }
        });
    }
}

/// Gradients of another lane lie in a buffer of their own; losses of all ranks replace a rank's.
pub(super) fn lanes_are_joined<B: Harness>(backends: &[B]) {
    each(backends, |b| {
        let mut update = Update::of(b, &some_values(), Optimizer::default());
        let flat = &mut update.gradients.flat;
        let numbers = |bytes: &B::Bytes, len: usize| {
            let mut numbers = vec![0.0f32; len / 4];
            b.read_bytes(bytes, 0, bytemuck::cast_slice_mut(&mut numbers)).unwrap();
            numbers
        };
        let (len, own) = (flat.len(), numbers(flat.all(), flat.len()));
        let others = random(len / 4, 77);
        let mut held = cut(b, |arena| b.bytes(arena, len));
        b.write_bytes(&mut held, 0, bytemuck::cast_slice(&others)).unwrap();
        b.join_gradients(&held, flat);
        let expected: Vec<f32> = others.iter().zip(&own).map(|(a, b)| a + b).collect();
        assert_eq!(numbers(flat.all(), len), expected);
        assert_eq!(numbers(&held, len), others);

        update.add_losses(b, &[1.5, 2.0], false);
        let counts = |update: &Update<B>| b.counts(&update.workspace, &update.reduction).unwrap();
        assert_eq!(counts(&update), (3.5, 0));
        b.set_losses(&mut update.reduction, 7.25).unwrap();
        assert_eq!(counts(&update), (7.25, 0));
        let step = step(Optimizer::default());
        assert_eq!(update.step(b, &step).losses, 7.25);
    });
}

pub(super) fn sums_of_losses<B: Harness>(backends: &[B]) {
    // Their sums are exact in any order.
    let losses: Vec<f32> = (0..1500).map(|i| 0.5 * i as f32).collect();
    each(backends, |b| {
        let mut update = Update::of(b, &some_values()[1..2], Optimizer::default());
        for rows in [1usize, 3, 1500] {
            let sum = 0.25 * (rows * (rows - 1)) as f64;
            update.add_losses(b, &losses[..2], false);
            // An evaluation in between is none of the step's.
            let of_evaluation = f32_input(b, &losses[..rows]);
            let found = b.sum_losses(&mut update.reduction, (&of_evaluation, None), rows).unwrap();
            assert_eq!(found, sum, "{}: {rows} losses", b.name());
            update.add_losses(b, &losses[..rows], true);
            let sums = update.step(b, &step(Optimizer::default()));
            assert_eq!(sums.losses, sum + 0.5, "{}: {rows} losses", b.name());
        }
    });
}

/// The gradient of a tensor of which nothing is known yet, normalized (arXiv 2502.17055).
fn normalized(step: &OptimizerStep, g: &[f32]) -> Vec<f64> {
    let Normalization { gamma1, gamma2, gamma3, .. } = step.optimizer.normalization;
    let mean = |gamma: f64, x: f64| (1.0 - gamma) * x;
    let is_gradstab = step.optimizer.kind == OptimizerKind::GradStab;
    let correction = |gamma: f64| if is_gradstab { 1.0 } else { 1.0 - gamma.powi(step.t as i32) };
    let largest = f64s(g).into_iter().fold(0.0, |largest: f64, g| largest.max(g.abs()));
    let limit = match is_gradstab {
        true => f64::INFINITY,
        false => mean(gamma3, largest) / correction(gamma3),
    };
    let clipped = |g: f64| if g.abs() > limit { g / largest * limit } else { g };
    let norm = f64s(g).into_iter().map(|g| clipped(g).powi(2)).sum::<f64>().sqrt();
    let square = mean(gamma2, norm * norm) / correction(gamma2);
    let length = mean(gamma1, norm)
        / correction(gamma1)
        / (square.sqrt() + f64::from(step.optimizer.epsilon));
    f64s(g).into_iter().map(|g| clipped(g) / norm * length).collect()
}

/// What a step leaves of parameter `i` by the definition of its optimizer, in f64.
fn twin(step: &OptimizerStep, i: usize, [p, m, v, g]: &Values, scale: f64) -> Vec<[f64; 3]> {
    let Optimizer { kind, beta2, epsilon, .. } = step.optimizer;
    let (beta2, epsilon) = (f64::from(beta2), f64::from(epsilon));
    let correction = 1.0 - beta2.powi(step.t as i32);
    // Of squared gradients to their corrected second moments (arXiv 2304.13013, algorithm 2).
    let ratio = |(v, g): (&f32, &f32)| {
        let square = (scale * f64::from(*g)).powi(2);
        let moment = (beta2 * f64::from(*v) + (1.0 - beta2) * square) / correction;
        square / moment.max(epsilon * epsilon)
    };
    let rms = (v.iter().zip(g).map(ratio).sum::<f64>() / g.len() as f64).sqrt();
    let lr = match kind {
        OptimizerKind::StableAdamW => (f64::from(step.lr) / rms.max(1.0)) as f32,
        _ => step.lr,
    };
    let gradients = if kind.normalizes() { normalized(step, g) } else { f64s(g) };
    let step = OptimizerStep { lr, ..*step };
    let of_element = |k: usize| {
        let before = [p[k], m[k], v[k]].map(f64::from);
        reference::adamw(before, scale * gradients[k], i != 1, &step)
    };
    (0..g.len()).map(of_element).collect()
}

pub(super) fn optimizer_steps<B: Harness>(backends: &[B]) {
    let mut values = some_values();
    // Second moments that have not seen such gradients coming.
    values[2][2].iter_mut().for_each(|v| *v *= 1e-3);
    let squares = values.iter().flat_map(|[.., g]| f64s(g)).map(|g| g * g);
    let norm = squares.sum::<f64>().sqrt();
    let clips = [0.0, (0.5 * norm) as f32];
    for (kind, clip) in OptimizerKind::ALL.iter().flat_map(|kind| clips.map(|clip| (*kind, clip))) {
        if clip > 0.0 && kind.normalizes() {
            continue;
        }
        let step = step(Optimizer::new(kind));
        let step = OptimizerStep { optimizer: Optimizer { clip, ..step.optimizer }, ..step };
        let scale = if clip == 0.0 { 1.0 } else { f64::from(clip) / norm };
        each(backends, |b| {
            let mut update = Update::of(b, &values, step.optimizer);
            let before = update.read(b);
            let name = format!("{}, {kind}", b.name());
            // Without a finite loss, or with a gradient above the limit, nothing moves.
            update.add_losses(b, &[1.0, f32::NAN], false);
            assert!(update.step(b, &step).losses.is_nan(), "{name}");
            update.add_losses(b, &[1.0, 3.0], false);
            let below = OptimizerStep { largest_gradient: (0.4 * norm) as f32, ..step };
            assert_eq!(update.step(b, &below).gradient_scale(&below), None, "{name}");
            assert!(update.read(b) == before, "{name}");

            let sums = update.step(b, &step);
            assert_eq!(sums.loss_and_norm(&step).0, 1.0, "{name}");
            let bound = b.bound(Of::GradientNorm, Precision::F32);
            assert!((sums.squares.sqrt() / norm - 1.0).abs() <= bound, "{name}");
            for (i, (ours, values)) in update.read(b).iter().zip(&values).enumerate() {
                let exact = twin(&step, i, values, scale);
                // muon.rs tests what becomes of these.
                if step.optimizer.orthogonalizes(update.params.slots[i].kind) {
                    continue;
                }
                for (which, what) in ["weights", "m", "v"].iter().enumerate() {
                    let exact: Vec<f64> = exact.iter().map(|of_one| of_one[which]).collect();
                    within(b, &format!("{what} of {i} by {kind}"), &ours[which], &exact, 1e-6);
                }
            }
        });
    }
}

/// With second moments so large that no root mean square is above 1.
pub(super) fn rates_that_do_not_fall_give_the_bits_of_adamw<B: Harness>(backends: &[B]) {
    let mut values = some_values();
    values.iter_mut().flat_map(|[_, _, v, _]| v).for_each(|v| *v = 1e3 * (0.5 + *v));
    each(backends, |b| {
        let [stable, plain] = [OptimizerKind::StableAdamW, OptimizerKind::AdamW].map(|kind| {
            let optimizer = Optimizer::new(kind);
            let mut update = Update::of(b, &values, optimizer);
            update.add_losses(b, &[1.0], false);
            for t in 3..8 {
                update.step(b, &OptimizerStep { t, ..step(optimizer) });
            }
            update.read(b)
        });
        assert!(stable == plain, "{}", b.name());
    });
}

/// What a trial says an update would leave is what it leaves, to the bit, NaN and infinity
/// included.
pub(super) fn tried_updates_are_the_updates<B: Harness>(backends: &[B]) {
    // Extreme values at a place that no vector and no job begins with, and which of weight and
    // moments stay finite of AdamW.
    let cases: [(&str, f32, [f32; 4], [bool; 3]); 6] = [
        ("ordinary", 0.01, [1.0, 1.0, 1.0, 1.0], [true; 3]),
        ("a large weight", 0.01, [3e38, 1.0, 1.0, 1.0], [true; 3]),
        ("a large moment", 0.01, [1.0, 3e37, 1.0, 1.0], [true; 3]),
        ("a tiny second moment", 0.01, [1.0, 3e37, 0.0, 0.0], [false, true, true]),
        ("a large gradient", 0.01, [1.0, 1.0, 1.0, 1e20], [true, true, false]),
        ("a large rate", 3e38, [1.0, 1.0, 1.0, 1.0], [false, true, true]),
    ];
    for (optimizer, (what, lr, extremes, finite)) in
        optimizers().flat_map(|optimizer| cases.map(|case| (optimizer, case)))
    {
        let step = OptimizerStep { lr, ..step(optimizer) };
        let mut values = some_values();
        values[0].iter_mut().zip(extremes).for_each(|(values, extreme)| values[33_333] = extreme);
        each(backends, |b| {
            let what = format!("{}, {optimizer}, {what}", b.name());
            let mut update = Update::of(b, &values, optimizer);
            let before = update.read(b);
            update.add_losses(b, &[1.0], false);
            let below = OptimizerStep { largest_gradient: 1.0, ..step };
            let sums = update.step(b, &below);
            assert_eq!(sums.gradient_scale(&below), None, "{what}");
            let tried = update.tried(b, &step, &sums);
            assert!(update.read(b) == before, "{what}: a trial changes nothing");
            update.step(b, &step);
            assert_eq!(tried.len(), values.len(), "{what}");
            for (of_one, tried) in update.read(b).iter().zip(&tried) {
                let Largest { weight, states: [m, v] } = *tried;
                let tried = [weight, m, v];
                let amax = of_one.each_ref().map(|values| {
                    f32::from_bits(values.iter().map(|v| v.abs().to_bits()).max().unwrap_or(0))
                });
                // Moments that are stored in less are not those that were tried.
                let same = if optimizer.moments == Moments::F32 { 3 } else { 1 };
                assert_eq!(bits(&tried[..same]), bits(&amax[..same]), "{what}");
            }
            let Largest { weight, states: [m, v] } = tried[0];
            let found = [weight, m, v].map(f32::is_finite);
            assert!(optimizer != Optimizer::default() || found == finite, "{what}: {found:?}");
        });
    }
}

/// Every optimizer with its moments in everything.
fn optimizers() -> impl Iterator<Item = Optimizer> {
    let with = |kind| Moments::ALL.map(|moments| Optimizer { moments, ..Optimizer::new(kind) });
    OptimizerKind::ALL.into_iter().flat_map(with)
}

/// What is stored after 50 steps of given gradients is what the scalar arithmetic of
/// `optim/moments.rs` stores, byte by byte, and so are the weights.
pub(super) fn moments_are_stored_to_the_byte<B: Harness>(backends: &[B]) {
    let (values, lengths) = (some_values(), LENGTHS);
    let gradients = |t: u64, i: usize| {
        // A group of zeros, and one element that is much larger than its neighbours.
        let mut g = random(lengths[i], 1000 * t + i as u64);
        g[..GROUP.min(lengths[i])].fill(0.0);
        g[lengths[i] - 3] *= 1e4;
        g
    };
    let (slots, _) = slots::<B>(lengths);
    for (moments, beta2, master, kept) in FORMS {
        let of_optimizer = Optimizer { moments, beta2, master, ..Optimizer::default() };
        let optimizer = Optimizer { gradients: kept, ..of_optimizer };
        let steps = (3..53).map(|t| OptimizerStep { t, ..step(optimizer) });
        let [of_m, of_v] = [0, 1].map(|state| {
            StateLayout::new(&slots, &optimizer, state, &(0..slots.len()), B::ALIGN).unwrap()
        });
        let gradients = |t: u64, i: usize| {
            let mut g = gradients(t, i);
            if B::HAS_COPIES && kept.are_in_bf16(slots[i].kind) {
                g.iter_mut().for_each(|g| *g = half::bf16::from_f32(*g).to_f32());
            }
            g
        };
        let mut expected: Vec<(Vec<f32>, [Bytes; 2])> = Vec::new();
        for (i, [p, m, v, _]) in values.iter().enumerate() {
            let places = [&of_m.places[i], &of_v.places[i]];
            let (mut p, splits) = (p.clone(), B::HAS_COPIES && master == Master::Split);
            let split = |p: f32| if splits { master::splittable(p) } else { p };
            p.iter_mut().for_each(|p| *p = split(*p));
            let mut kept = [stored(places[0], false, m, None), stored(places[1], true, v, None)];
            for step in steps.clone() {
                let update = adamw::Update::new(&step, step.lr, i != 1, 1.0);
                let [mut m, mut v] =
                    [0, 1].map(|which| loaded(places[which], which == 1, &kept[which]));
                for (k, g) in gradients(step.t, i).into_iter().enumerate() {
                    (p[k], m[k], v[k]) = update.of(p[k], m[k], v[k], g);
                    p[k] = split(p[k]);
                }
                let draw = Draw::of(step.seed, Purpose::Moments, step.t as u32, i as u32);
                let draw = |beta| is_stochastic(beta).then_some(&draw);
                kept = [
                    stored(places[0], false, &m, draw(optimizer.beta1)),
                    stored(places[1], true, &v, draw(optimizer.beta2)),
                ];
            }
            expected.push((p, kept));
        }
        each(backends, |b| {
            let mut update = Update::of(b, &values, optimizer);
            update.add_losses(b, &[1.0], false);
            for step in steps.clone() {
                let all: Vec<_> = (0..lengths.len()).map(|i| gradients(step.t, i)).collect();
                let all: Vec<_> = all.iter().map(Vec::as_slice).collect();
                update.set_gradients(b, &all);
                update.step(b, &step);
            }
            let bytes = update.bytes(b);
            for (i, (p, kept)) in expected.iter().enumerate() {
                let what = format!("{}, {optimizer}, {beta2}, parameter {i}", b.name());
                assert!(bytes[i] == *kept, "{what}: what is stored");
                assert!(bits(&update.params.read(b, i)) == bits(p), "{what}: weights");
            }
        });
    }
}

/// Matrices are updated when it is their turn, and all else in every step, to the bit of
/// `optim/ramping.rs`; a trial tells what a step will leave.
pub(super) fn weights_ramp_up_to_the_bit<B: Harness>(backends: &[B]) {
    let optimizer: Optimizer = "adamw,ramping=10".parse().unwrap();
    let (values, lengths) = (some_values(), LENGTHS);
    let interval_of = |i: usize, k: usize| match i {
        0 => [1.0, 6.0, 2.0, 10.0, 0.0, 3.0][k % 6],
        _ => 1.0,
    };
    let intervals: Vec<f32> = (0..lengths[0]).map(|k| interval_of(0, k)).collect();
    let steps = (3..17).map(|t| OptimizerStep { t, ..step(optimizer) });
    let gradients = |t: u64| lengths.map(|len| random(len, 1000 * t + len as u64));
    let mut expected = values.each_ref().map(|[p, m, v, _]| {
        let weight = |k| ramping::Weight { p: p[k], m: m[k], v: v[k], count: 0.0, sum: 0.0 };
        (0..p.len()).map(weight).collect::<Vec<_>>()
    });
    let mut largest = Vec::new();
    for step in steps.clone() {
        let gradients = gradients(step.t);
        for (i, weights) in expected.iter_mut().enumerate() {
            let update = ramping::Update::new(&step, i != 1);
            for (k, weight) in weights.iter_mut().enumerate() {
                *weight = update.of(*weight, interval_of(i, k), gradients[i][k]);
            }
        }
        largest.push(expected.each_ref().map(|weights| {
            let amax = |of: fn(&ramping::Weight) -> f32| {
                weights.iter().map(|weight| of(weight).abs()).fold(0.0, f32::max)
            };
            let m = amax(|weight| weight.m.abs().max(weight.sum.abs()));
            Largest { weight: amax(|weight| weight.p), states: [m, amax(|weight| weight.v)] }
        }));
    }
    let waiting = expected[0].iter().filter(|weight| weight.count > 0.0).count();
    assert!(3 * waiting > lengths[0] && 3 * waiting < 2 * lengths[0], "{waiting}");
    each(backends, |b| {
        let name = b.name();
        let mut update = Update::of(b, &values, optimizer);
        let place = update.layouts[ramping::INTERVAL].places[0];
        let numbers = bytemuck::cast_slice(&intervals);
        b.write_bytes(&mut update.states[ramping::INTERVAL], place.start, numbers).unwrap();
        update.add_losses(b, &[1.0], false);
        for (step, largest) in steps.clone().zip(&largest) {
            update.set_gradients(b, &gradients(step.t).each_ref().map(Vec::as_slice));
            let before = update.read(b);
            let below = OptimizerStep { largest_gradient: 1.0, ..step };
            let sums = update.step(b, &below);
            assert_eq!(update.tried(b, &step, &sums), largest, "{name}, step {}", step.t);
            assert!(update.read(b) == before, "{name}: a trial changes nothing");
            update.step(b, &step);
        }
        for (i, (ours, exact)) in update.read(b).iter().zip(&expected).enumerate() {
            let of = |of: fn(&ramping::Weight) -> f32| exact.iter().map(of).collect::<Vec<_>>();
            let exact = [of(|weight| weight.p), of(|weight| weight.m), of(|weight| weight.v)];
            for (which, what) in ["weights", "m", "v"].iter().enumerate() {
                assert!(bits(&ours[which]) == bits(&exact[which]), "{name}: {what} of {i}");
            }
        }
        for (state, of) in [(2, None), (3, Some(0)), (4, Some(1))] {
            let exact = expected[0].iter().enumerate().map(|(k, weight)| match of {
                None => intervals[k],
                Some(of) => [weight.count, weight.sum][of],
            });
            let StateLayout { places, .. } = &update.layouts[state];
            assert_eq!([1, 2].map(|i| places[i].len), [0; 2], "of matrices alone");
            let mut ours = vec![0.0f32; lengths[0]];
            let to = bytemuck::cast_slice_mut(&mut ours);
            b.read_bytes(&update.states[state], places[0].start, to).unwrap();
            assert!(bits(&ours) == bits(&exact.collect::<Vec<_>>()), "{name}: state {state}");
        }
    });
}

/// A tensor's scale follows its largest, stays where all have become 0, and with it stay the codes
/// where nothing is done.
pub(super) fn scales_of_tensors_follow_the_largest<B: Harness>(backends: &[B]) {
    let (values, lengths) = (some_values(), LENGTHS);
    for text in ["adamw", "stable-adamw", "muon,momentum=0"] {
        let optimizer: Optimizer = format!("{text},moments=fp8").parse().unwrap();
        let step = step(Optimizer { beta1: 0.0, beta2: 0.0, ..optimizer });
        each(backends, |b| {
            let what = format!("{}, {optimizer}", b.name());
            let mut update = Update::of(b, &values, step.optimizer);
            update.add_losses(b, &[1.0], false);
            let scales = |update: &Update<B>| {
                let [m, v] = &update.bytes(b)[0];
                [&m.1, &v.1]
                    .map(|scale| scale.as_chunks().0.first().map(|s| f32::from_le_bytes(*s)))
            };
            let all = |first: f32| -> Vec<Vec<f32>> { lengths.map(|len| vec![first; len]).into() };
            let mut of_last = None;
            for (g, expected) in
                [(1.0, 2f32.powi(-8)), (1e-4, 2f32.powi(-22)), (0.0, 2f32.powi(-22))]
            {
                let gradients = all(g);
                let gradients: Vec<_> = gradients.iter().map(Vec::as_slice).collect();
                update.set_gradients(b, &gradients);
                let before = update.bytes(b);
                let below = OptimizerStep { largest_gradient: -1.0, ..step };
                update.step(b, &below);
                assert!(update.bytes(b) == before, "{what}: no step");
                update.step(b, &step);
                let [of_m, of_v] = scales(&update);
                assert_eq!(of_m, Some(expected), "{what}, {g}");
                assert!(of_v.is_none() == (optimizer.kind == OptimizerKind::Muon), "{what}");
                let [_, m, v] = &update.read(b)[0];
                assert!(m.iter().all(|m| (m - g).abs() <= 0.07 * g), "{what}, {g}: {}", m[0]);
                assert!(v.iter().all(|v| (v - g * g).abs() <= 1e-3 * g * g), "{what}: {}", v[0]);
                assert!(g > 0.0 || (of_m, of_v) == of_last.unwrap(), "{what}: nothing is stored");
                of_last = Some((of_m, of_v));
            }
        });
    }
}

/// What is watched of an update is what its definition says, and changes nothing of it.
pub(super) fn updates_are_watched<B: Harness>(backends: &[B]) {
    let mut values = some_values();
    values[2][2].iter_mut().for_each(|v| *v *= 1e-3);
    let narrow = |of: Optimizer| Optimizer { gradients: optim::Gradients::Bf16, ..of };
    let restarting = "stable-spam,reset=3,moments=int8".parse().unwrap();
    let all = optimizers().flat_map(|optimizer| [optimizer, narrow(optimizer)]);
    for (optimizer, clip) in all.chain([restarting]).flat_map(|o| [(o, 0.0), (o, 20.0)]) {
        if clip > 0.0 && optimizer.kind.normalizes() {
            continue;
        }
        let step = step(optimizer);
        let step = OptimizerStep { optimizer: Optimizer { clip, ..step.optimizer }, ..step };
        each(backends, |b| {
            let what = format!("{}, {}, clip {clip}", b.name(), step.optimizer);
            let [mut update, mut other] = [0; 2].map(|_| Update::of(b, &values, step.optimizer));
            update.add_losses(b, &[1.0], false);
            other.add_losses(b, &[1.0], false);
            let moments = update.read(b).into_iter().map(|[.., v]| v);
            let of_all: Vec<_> = moments.zip(update.gradients.read(b)).collect();
            let squares: Vec<f64> =
                of_all.iter().map(|(_, g)| f64s(g).iter().map(|g| g * g).sum()).collect();
            let norm = squares.iter().sum::<f64>().sqrt();
            let scale = if clip > 0.0 { f64::from(clip) / norm } else { 1.0 };
            assert!(scale <= 1.0);
            let found = update.watched(b, &step);
            assert_eq!(found.len(), values.len(), "{what}");
            for (i, ((v, g), UpdateSums { squares: ours, ratios })) in
                of_all.iter().zip(found).enumerate()
            {
                assert!((ours / squares[i] - 1.0).abs() < 1e-6, "{what}, {i}: {ours} {squares:?}");
                let Optimizer { beta2, epsilon, kind, .. } = step.optimizer;
                let (beta2, epsilon) = (f64::from(beta2), f64::from(epsilon));
                let kept = if step.starts_again() { 0.0 } else { beta2 };
                let correction = 1.0 - beta2.powi(step.age() as i32);
                let gradients = if kind.normalizes() { normalized(&step, g) } else { f64s(g) };
                let ratio = |(v, g): (&f32, f64)| {
                    let square = (scale * g).powi(2);
                    let moment = (kept * f64::from(*v) + (1.0 - beta2) * square) / correction;
                    square / moment.max(epsilon * epsilon)
                };
                let exact: f64 = v.iter().zip(gradients).map(ratio).sum();
                let has_second = !step.optimizer.orthogonalizes(update.params.slots[i].kind);
                let exact = if has_second { exact } else { 0.0 };
                assert!((ratios - exact).abs() <= 1e-5 * exact, "{what}, {i}: {ratios} {exact}");
            }
            update.update(b, &step);
            other.step(b, &step);
            assert!(update.read(b) == other.read(b), "{what}: the update");
        });
    }
}
