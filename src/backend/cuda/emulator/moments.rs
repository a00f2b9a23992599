//! Updates with moments in less than f32: `optimize_moments.cu`.

use super::super::optimize::update_kernel;
use super::super::step::{Entry, OfMoments, Step};
use super::super::tests::random;
use super::{Emulator, SCHEDULES, aligned};
use crate::Master;
use crate::backend::conformance::{FORMS, loaded, step, stored};
use crate::backend::{OptimizerStep, Place, Slot, StateLayout};
use crate::formats::{Draw, Purpose};
use crate::optim::moments::{GROUP, is_stochastic};
use crate::optim::{Moments, Optimizer, OptimizerKind, ParamKind, adamw, master, stable_adamw};

pub(super) type UpdateKernel = unsafe extern "C" fn(
    *const Entry,
    u32,
    u64,
    u64,
    u64,
    *const f64,
    *const [f32; 2],
    *const u8,
    *mut u32,
    Step,
    OfMoments,
    *const [f32; 2],
);
type LargestKernel =
    unsafe extern "C" fn(*mut u32, *const Entry, u32, u64, *const f64, *const u8, Step, OfMoments);
pub(super) type ScalesKernel =
    unsafe extern "C" fn(*mut [f32; 2], *const u32, *const Entry, u32, u32, *const f64, Step);
type RatiosKernel = unsafe extern "C" fn(*mut f64, *const Entry, u32, u64, *const f64, Step);

/// Of two pieces and a rest that ends within a group, of less than a vector, and of whole pieces.
const LENGTHS: [usize; 3] = [9003, 7, 4096];

/// The bytes of moments, and weights to the bit, are those of the scalar arithmetic; a trial stores
/// nothing and tells the largest; and ratios are those of what is stored.
#[test]
fn moments_are_stored_to_the_byte() {
    let Some(emulator) = Emulator::new("optimize_moments") else { return };
    let try_update: UpdateKernel = emulator.kernel("update_stored<ANY,EITHER>");
    let largest: LargestKernel = emulator.kernel("largest_moments");
    let choose: ScalesKernel = emulator.kernel("choose_scales");
    let ratios: RatiosKernel = emulator.kernel("square_stored_ratios");
    let kinds = [ParamKind::Matrix, ParamKind::Vector, ParamKind::Table];
    let slots: Vec<_> = std::iter::zip(kinds, LENGTHS)
        .enumerate()
        .map(|(index, (kind, len))| Slot { index, start: 0, len, rows: 1, kind })
        .collect();
    for (moments, beta2, master, gradients) in FORMS {
        let update: UpdateKernel = emulator.kernel(update_kernel(moments, master));
        let optimizer = Optimizer::new(OptimizerKind::StableAdamW);
        let step = step(Optimizer { moments, beta2, master, gradients, ..optimizer });
        let layouts = StateLayout::of_all(&slots, &step.optimizer, &(0..slots.len()), 128).unwrap();
        // With the second, what is loaded as 0 behind the end would become NaN.
        let rates = [[0.01, 0.02], [0.03, f32::INFINITY], [0.05, 0.06]];
        let values: [[Vec<f32>; 4]; 3] = std::array::from_fn(|i| {
            let mut all = [0, 1, 2, 3].map(|k| random(LENGTHS[i], 10 * i as u64 + k));
            all[2].iter_mut().for_each(|v| *v *= *v);
            // A group of zeros whose moments fade.
            if i != 1 {
                all[1..].iter_mut().for_each(|x| x[..GROUP].fill(0.0));
                // There decay alone moves weights: two to the middle between two copies, which are in
                // either half of a word.
                let keep = 1.0 - rates[i][0] * step.optimizer.weight_decay;
                let is_middle = |p: f32| p.to_bits() & 0xffff == 0x8000;
                let mut found = random(1 << 20, 70 + i as u64).into_iter();
                for at in [1, 4] {
                    all[0][at] = found.find(|p| is_middle(p * keep) && !is_middle(*p)).unwrap();
                }
                // Groups whose roots and quotients are too small or too large for quick ones.
                for (group, factor) in [(1, 1e-20), (2, 1e-30), (3, 1e15)] {
                    for (x, factor) in all[1..].iter_mut().zip([factor, factor * factor, factor]) {
                        x[group * GROUP..][..GROUP].iter_mut().for_each(|v| *v *= factor);
                    }
                }
            }
            // With it the scale of a tensor becomes another.
            all[3][5] = 32768.0;
            if gradients.are_in_bf16(kinds[i]) {
                all[3].iter_mut().for_each(|g| *g = half::bf16::from_f32(*g).to_f32());
            }
            all
        });
        // Runs of pieces that end within parameters, and one of all.
        for (schedule, pieces_in_turn) in SCHEDULES.into_iter().zip([2, 1, 7]) {
            let narrow = kinds.map(|kind| gradients.are_in_bf16(kind));
            let mut one = Memory::of([&layouts[0], &layouts[1]], &values, master, narrow);
            let table = one.table();
            let (sums, entries, pieces) = ([1.0, 0.0, 0.0], table.as_ptr(), 5);
            let none = std::ptr::null();
            let (mut partials, mut trial) = ([0.0; 5], [0u32; 9]);
            let (of_kernel, of_moments) = (Step::new(&step), OfMoments::new(&step));
            let run = |trial: *mut u32, before: *const [f32; 2]| {
                let update = if trial.is_null() { update } else { try_update };
                // In parts, as where they are given to other ranks one by one.
                for (first, end) in [(0, 2), (2, pieces)] {
                    emulator.run(schedule, [3, 1], 256, || {
                        // SAFETY: buffers are as long as the table and the grid say.
                        unsafe {
                            update(
                                entries,
                                3,
                                first,
                                end,
                                pieces_in_turn,
                                sums.as_ptr(),
                                rates.as_ptr(),
                                std::ptr::null(),
                                trial,
                                of_kernel,
                                of_moments,
                                before,
                            );
                        }
                    });
                }
            };
            let partial = partials.as_mut_ptr();
            emulator.run(schedule, [2, 1], 256, || {
                // SAFETY: as above.
                unsafe { ratios(partial, entries, 3, pieces, sums.as_ptr(), of_kernel) };
            });
            let before = one.clone();
            run(trial.as_mut_ptr(), none);
            assert!(one == before, "a trial stores nothing");
            let mut scales = [[f32::NAN; 2]; 3];
            let mut found = [0u32; 9];
            if moments == Moments::Fp8 {
                let (to, of_found) = (scales.as_mut_ptr(), found.as_mut_ptr());
                let below = Step::new(&OptimizerStep { largest_gradient: -1.0, ..step });
                for of_kernel in [below, of_kernel] {
                    assert!(one == before && found == [0; 9], "no step, no scales");
                    emulator.run(schedule, [3, 1], 256, || {
                        let (sums, normals) = (sums.as_ptr(), std::ptr::null());
                        // SAFETY: as above.
                        unsafe {
                            largest(
                                of_found, entries, 3, pieces, sums, normals, of_kernel, of_moments,
                            );
                        }
                    });
                    emulator.run(schedule, [1, 1], 256, || {
                        // SAFETY: as above.
                        unsafe { choose(to, of_found, entries, 0, 3, sums.as_ptr(), of_kernel) };
                    });
                }
                assert_eq!([found[1], found[2]], [trial[1], trial[2]], "{}", step.optimizer);
                assert_eq!(found.iter().filter(|bits| **bits > 0).count(), 2);
                run(std::ptr::null_mut(), scales.as_ptr());
            } else {
                run(std::ptr::null_mut(), none);
            }
            for i in 0..3 {
                let places = [&layouts[0].places[i], &layouts[1].places[i]];
                let what = format!("{}, {beta2}, parameter {i}", step.optimizer);
                let expected = Expected::of(&step, i, places, &values[i], rates[i]);
                assert!(one.bytes(i) == expected.moments, "{what}: what is stored");
                let copies = |p: &f32| half::bf16::from_f32(*p);
                assert!(one.copies(i) == expected.p.iter().map(copies).collect::<Vec<_>>());
                assert!(one.weights(i) == expected.p, "{what}: weights");
                let of_copies = |p: &f32| if one.splits { copies(p).to_f32() } else { *p };
                let largest =
                    expected.p.iter().fold(0.0f32, |most, p| most.max(of_copies(p).abs()));
                assert_eq!(f32::from_bits(one.amax[i]), largest, "{what}: the largest");
                let found = [0, 1, 2].map(|k| f32::from_bits(trial[3 * i + k]));
                assert_eq!(found, expected.largest, "{what}: a trial");
                let first = [0, 3, 4][i];
                let ours: f64 = partials[first..][..LENGTHS[i].div_ceil(4096)].iter().sum();
                assert!((ours / expected.ratios - 1.0).abs() < 1e-12, "{what}: ratios");
            }
        }
    }
}

/// `first_code` of kernels/moments.cuh corrects a quotient once, which gives the code of the exact one
/// where a chip's reciprocals are up to two last places off. Looked at are all n near those where the
/// code changes, and some of all others.
#[test]
fn codes_of_first_moments_need_no_exact_quotient() {
    let whole = |v: f32| (v + 12_582_912.0).to_bits() & 0xff;
    let code = |n: f32| whole(127.0 * (2.0 * n / (1.0 + n.abs())));
    let ours = |n: f32, off: i32| {
        let divisor = 1.0 + n.abs();
        let reciprocal = f32::from_bits((1.0 / divisor).to_bits().wrapping_add_signed(off));
        let half = n * reciprocal;
        whole(254.0 * reciprocal.mul_add((-divisor).mul_add(half, n), half))
    };
    let last = 1.0f32.to_bits() + 2;
    let changes = (0..127).map(|k| {
        let [mut low, mut high] = [0, last];
        while high - low > 1 {
            let middle = (low + high) / 2;
            if code(f32::from_bits(middle)) > k { high = middle } else { low = middle }
        }
        high
    });
    let near = changes.flat_map(|bits| bits - 2000..(bits + 2000).min(last + 1));
    for bits in near.chain((0..=last).step_by(1009)) {
        for off in -2..=2 {
            let n = f32::from_bits(bits);
            assert_eq!(ours(n, off), code(n), "{n:e}, {off}");
            assert_eq!(ours(-n, off), code(-n), "{n:e}, {off}");
        }
    }
}

/// What kernels work on.
#[derive(Clone, PartialEq)]
pub(super) struct Memory {
    /// Master values, or low halves where these are split.
    params: Vec<Vec<u128>>,
    splits: bool,
    gradients: Vec<Vec<u128>>,
    /// Whether these are in bf16.
    narrow: [bool; 3],
    copies: Vec<Vec<u128>>,
    pub(super) amax: Vec<u32>,
    /// First and second moments of all parameters.
    states: [Vec<u128>; 2],
    /// Where in each of them.
    places: [Vec<Place>; 2],
}

impl Memory {
    pub(super) fn of(
        layouts: [&StateLayout; 2],
        values: &[[Vec<f32>; 4]; 3],
        master: Master,
        narrow: [bool; 3],
    ) -> Self {
        let all = |which: usize| {
            values.iter().map(|all| aligned(bytemuck::cast_slice(&all[which]))).collect()
        };
        let states = [1, 2].map(|which| {
            let layout = layouts[which - 1];
            let mut bytes = vec![0u8; layout.bytes];
            for (place, all) in layout.places.iter().zip(values).filter(|(p, _)| p.len > 0) {
                let (elements, scales) = stored(place, which == 2, &all[which], None);
                bytes[place.start..][..elements.len()].copy_from_slice(&elements);
                bytes[place.scales..][..scales.len()].copy_from_slice(&scales);
            }
            aligned(&bytes)
        });
        let halves = |which: usize| {
            values.iter().map(move |[p, ..]| {
                let halves: Vec<u16> = p.iter().map(|p| master::split(*p)[which]).collect();
                aligned(bytemuck::cast_slice(&halves))
            })
        };
        let splits = master == Master::Split;
        let params = if splits { halves(1).collect() } else { all(0) };
        let (amax, places) = (vec![0; values.len()], layouts.map(|layout| layout.places.clone()));
        let copies = halves(0).collect();
        let gradients = std::iter::zip(values, narrow).map(|([.., g], narrow)| {
            let half = |g: &f32| half::bf16::from_f32(*g).to_bits();
            let halves: Vec<u16> = g.iter().map(half).collect();
            aligned(if narrow { bytemuck::cast_slice(&halves) } else { bytemuck::cast_slice(g) })
        });
        let gradients = gradients.collect();
        Self { params, splits, gradients, narrow, copies, amax, states, places }
    }

    pub(super) fn copies(&self, index: usize) -> Vec<half::bf16> {
        let halves: &[u16] = bytemuck::cast_slice(&self.copies[index]);
        halves[..self.places[0][index].len]
            .iter()
            .map(|half| half::bf16::from_bits(*half))
            .collect()
    }

    pub(super) fn weights(&self, index: usize) -> Vec<f32> {
        let len = self.places[0][index].len;
        if !self.splits {
            return bytemuck::cast_slice(&self.params[index])[..len].to_vec();
        }
        let lows: &[u16] = bytemuck::cast_slice(&self.params[index]);
        let copies = self.copies(index).into_iter();
        copies.zip(lows).map(|(copy, low)| master::join([copy.to_bits(), *low])).collect()
    }

    pub(super) fn table(&mut self) -> Vec<Entry> {
        let address = |words: &mut Vec<u128>| words.as_mut_ptr().addr() as u64;
        let [m, v] = self.states.each_mut().map(address);
        let mut next = 0;
        (0..self.copies.len())
            .map(|i| {
                let [place, second] = [self.places[0][i], self.places[1][i]];
                let first_piece = next;
                next += place.len.div_ceil(4096) as u64;
                Entry {
                    param: if self.splits { 0 } else { address(&mut self.params[i]) },
                    low: if self.splits { address(&mut self.params[i]) } else { 0 },
                    copy: address(&mut self.copies[i]),
                    m: m + place.start as u64,
                    v: if second.len > 0 { v + second.start as u64 } else { 0 },
                    m_scales: m + place.scales as u64,
                    v_scales: v + second.scales as u64,
                    gradient: address(&mut self.gradients[i]),
                    len: place.len as u64,
                    first_piece,
                    decays: u16::from(i != 1),
                    narrow: u16::from(self.narrow[i]),
                    element: [place.element as u16, second.element as u16],
                    amax: std::ptr::from_mut(&mut self.amax[i]).addr() as u64,
                    interval: 0,
                    count: 0,
                    sum: 0,
                }
            })
            .collect()
    }

    /// Elements and scales of both moments.
    pub(super) fn bytes(&self, index: usize) -> [(Vec<u8>, Vec<u8>); 2] {
        [0, 1].map(|which| {
            let place = &self.places[which][index];
            let bytes: &[u8] = bytemuck::cast_slice(&self.states[which]);
            let scales = bytes[place.scales..][..4 * place.groups()].to_vec();
            (bytes[place.start..][..place.bytes()].to_vec(), scales)
        })
    }
}

/// What a step leaves of a parameter.
struct Expected {
    p: Vec<f32>,
    moments: [(Vec<u8>, Vec<u8>); 2],
    largest: [f32; 3],
    ratios: f64,
}

impl Expected {
    fn of(
        step: &OptimizerStep,
        index: usize,
        places: [&Place; 2],
        [p, m, v, g]: &[Vec<f32>; 4],
        [lr, size]: [f32; 2],
    ) -> Self {
        let update = adamw::Update::with_size(step, [lr, size], index != 1, 1.0);
        let ratio = stable_adamw::Ratio::new(step, 1.0);
        let again = |which: usize, x: &[f32]| {
            loaded(places[which], which == 1, &stored(places[which], which == 1, x, None))
        };
        let [mut m, mut v] = [again(0, m), again(1, v)];
        let ratios = v.iter().zip(g).map(|(v, g)| f64::from(ratio.of(*v, *g)).powi(2)).sum();
        let split = |p: f32| match step.optimizer.master {
            Master::F32 => p,
            Master::Split => master::splittable(p),
        };
        let mut p: Vec<_> = p.iter().map(|p| split(*p)).collect();
        for k in 0..p.len() {
            (p[k], m[k], v[k]) = update.of(p[k], m[k], v[k], g[k]);
        }
        let largest = [&p, &m, &v].map(|x| x.iter().fold(0.0f32, |most, x| most.max(x.abs())));
        p.iter_mut().for_each(|p| *p = split(*p));
        let draw = Draw::of(step.seed, Purpose::Moments, step.t as u32, index as u32);
        let drawn = |beta| is_stochastic(beta).then_some(&draw);
        let moments = [
            stored(places[0], false, &m, drawn(step.optimizer.beta1)),
            stored(places[1], true, &v, drawn(step.optimizer.beta2)),
        ];
        Self { p, moments, largest, ratios }
    }
}
