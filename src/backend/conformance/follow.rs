//! What is kept of weights, against its definition, bit for bit.

use super::*;
use crate::formats::{
    Bits, Format, Nvfp4Scale, Observation, Observed, Operand, OperandId, PowerRule, Quantized,
    Rounding, Source, ema, oscillates,
};
use crate::optim::ramping::interval;

pub(super) fn slow_means<B: Harness>(backends: &[B]) {
    for (lens, decay) in [([1, 3], 0.998), ([33 * 7, 256], 0.5), ([100_003, 20], 0.9983)] {
        let [w, w_too] = [1, 2].map(|seed| random(lens[seed as usize - 1], seed));
        let [mean, mean_too] = [3, 4].map(|seed| random(lens[seed as usize - 3], seed));
        each(backends, |b| {
            let params = Params::of(b, &[&w, &w_too]);
            let mut means = Flat::of(b, &[&mean, &mean_too]);
            let slot = means.slots[0];
            b.update_mean(&mut means.buffer, slot, params.get(b, 0), decay);
            let expected: Vec<f32> = mean.iter().zip(&w).map(|(m, w)| ema(*m, *w, decay)).collect();
            let [ours, other] = means.read(b).try_into().expect("two pieces");
            assert!(bits(&ours) == bits(&expected), "{}: {} of {decay}", b.name(), ours.len());
            assert_eq!(other, mean_too);
            // What means begin as.
            b.update_mean(&mut means.buffer, slot, params.get(b, 0), 0.0);
            assert_eq!(means.read(b)[0], w);
        });
    }
}

/// What a forward pass may round W to.
fn operands() -> Vec<Operand> {
    let formats = [
        Format::mxfp4(PowerRule::Ceil, false),
        Format::mxfp4(PowerRule::QuestFloor, true),
        Format::nvfp4(Nvfp4Scale::FourOverSix, false),
        Format::nvfp4(Nvfp4Scale::Full, true),
        Format::nvfp4_within(true),
    ];
    let by_mean = [formats[0], formats[2], formats[4]];
    let by_mean =
        by_mean.map(|format| Operand::of(format).with_rounding(Rounding::ByMean).unwrap());
    formats.into_iter().map(Operand::of).chain(by_mean).collect()
}

fn quantized([outputs, inputs]: [usize; 2], data: &[f32], mean: &[f32], of: &Operand) -> Quantized {
    let source = Source { data, rows: outputs, depth: inputs, transposed: false };
    let [elements, scales] = [OperandId::W, OperandId::W.of_scales()].map(|id| RANDOM.rounding(id));
    let bits = Bits { elements, scales, transposed: false };
    match of.rounding() {
        Rounding::ByMean => Quantized::by_means(source, mean, of, &bits),
        _ => Quantized::new(source, of, &[], &bits),
    }
}

/// Three flat buffers, each with a piece before the one of the weight.
struct Tracked<B: Memory>([Flat<B>; 3]);

impl<B: Harness> Tracked<B> {
    fn new(b: &B, len: usize) -> Self {
        Self([0; 3].map(|_| Flat::of(b, &[&[MARK; 9], &vec![f32::NAN; len]])))
    }

    fn track(&mut self) -> Track<'_, B> {
        let [before, moved, rounded_moved] = &mut self.0;
        let slot = before.slots[1];
        let [before, moved, rounded_moved] =
            [before, moved, rounded_moved].map(|flat| &mut flat.buffer);
        Track { before, moved, rounded_moved, slot }
    }

    fn read(&self, b: &B) -> [Vec<f32>; 3] {
        self.0.each_ref().map(|flat| flat.read(b).pop().expect("two pieces"))
    }
}

/// Weights through four steps, two of them at once: sums, counts, what moved, and the reset.
pub(super) fn weights_are_observed<B: Harness>(backends: &[B]) {
    for shape @ [outputs, inputs] in [[3, 5], [33, 70], [65, 320]] {
        let len = outputs * inputs;
        let steps: Vec<Vec<f32>> = (0..4)
            .scan(random(len, 1), |w, step| {
                let far = random(len, 10 + step);
                w.iter_mut().zip(&far).for_each(|(w, far)| *w += 0.02 * far);
                Some(w.clone())
            })
            .collect();
        let means: Vec<Vec<f32>> = (0..4)
            .map(|step| {
                let far = random(len, 20 + step);
                steps[0].iter().zip(far).map(|(w, far)| w + 0.1 * far).collect()
            })
            .collect();
        for operand in operands() {
            each(backends, |b| {
                let what = format!("{}: {operand} of {shape:?}", b.name());
                let mut observer = cut(b, |arena| b.observer(arena, &[[1, 2], shape]).unwrap());
                let mut tracked = Tracked::new(b, len);
                let mut params = Params::of(b, &[&[1.0; 3], &steps[0]]);
                b.begin_track(tracked.track(), params.get(b, 1));
                let of = Viewed { number: 1, shape, operand: &operand };
                let mut moved = [vec![0.0; len], vec![0.0; len]];
                let mut rounded = Vec::new();
                for step in 1..4 {
                    let [before, after] = [step - 1, step].map(|i| Flat::of(b, &[&means[i]]));
                    let part = |flat| Part { flat, slot: before.slots[0] };
                    let track = tracked.track();
                    let kept = Values::Kept(Part { flat: track.before, slot: track.slot });
                    b.view(&mut observer, View::Before, kept, Some(part(&before.buffer)), of);
                    let slot = params.slots[1];
                    b.write_param(&mut params.weights, slot, &steps[step]).unwrap();
                    let w = Values::Weight(params.get(b, 1));
                    b.view(&mut observer, View::After, w, Some(part(&after.buffer)), of);
                    b.observe(&mut observer, tracked.track(), params.get(b, 1), of);
                    let mut found = [Observation::default(); 2];
                    b.observations(&mut observer, &mut found).unwrap();

                    let exact =
                        [step - 1, step].map(|i| quantized(shape, &steps[i], &means[i], &operand));
                    let dequantized = exact.each_ref().map(|q| q.dequantized(inputs));
                    let mut sums = Observation::default();
                    let [of_weights, of_rounded] = &mut moved;
                    for i in 0..len {
                        let unit = |q: &Quantized| {
                            let blocks = q.block_scales.len() / outputs;
                            q.block_scales[i / inputs * blocks + i % inputs / (q.depth / blocks)]
                        };
                        let seen = Observed {
                            weights: [steps[step - 1][i], steps[step][i]],
                            rounded: dequantized.each_ref().map(|q| q[i]),
                            block_scales: exact.each_ref().map(unit),
                        };
                        seen.add_to(&mut sums, [&mut of_weights[i], &mut of_rounded[i]]);
                    }
                    same(&found[1], &sums, &what);
                    assert!(step == 1 || sums.flipped > 0 || len < 100, "{what}: {sums:?}");
                    let [kept, of_weights, of_rounded] = tracked.read(b);
                    assert!(bits(&kept) == bits(&steps[step]), "{what}: kept");
                    assert!(bits(&of_weights) == bits(&moved[0]), "{what}: moved");
                    assert!(bits(&of_rounded) == bits(&moved[1]), "{what}: numbers moved");
                    let [_, last] = dequantized;
                    rounded = last;
                }
                let threshold = 3.0;
                let slot = params.slots[1];
                b.reset(&observer, tracked.track(), (&mut params.weights, slot), of, threshold);
                let oscillated = |i: usize| oscillates(moved[0][i], moved[1][i], threshold);
                let expected: Vec<f32> = (0..len)
                    .map(|i| if oscillated(i) { rounded[i] } else { steps[3][i] })
                    .collect();
                assert!(bits(&params.read(b, 1)) == bits(&expected), "{what}: reset");
                assert_eq!(params.read(b, 0), [1.0; 3]);
                let count = (0..len).filter(|i| oscillated(*i)).count();
                assert!(len < 100 || (count > 0 && count < len), "{what}: {count}");
            });
        }
    }
}

/// Bit for bit, with what rests and what moved beyond all measure; nothing else is written.
pub(super) fn intervals_are_those_of_what_moved<B: Harness>(backends: &[B]) {
    let [mut moved, mut rounded] = [1, 2].map(|seed| random(50_003, seed));
    moved.iter_mut().for_each(|v| *v = v.abs());
    rounded.iter_mut().for_each(|v| *v = 20.0 * v.abs());
    moved[..3].fill(0.0);
    rounded[..2].fill(0.0);
    (moved[7], rounded[7]) = (f32::INFINITY, f32::INFINITY);
    let period = 100.0;
    let expected: Vec<f32> =
        std::iter::zip(&moved, &rounded).map(|(m, q)| interval(*m, *q, period)).collect();
    let longest = expected.iter().filter(|n| **n == period).count();
    assert!(expected[0] == 1.0 && expected[2] == period && longest < 25_000, "{longest}");
    assert!(expected.contains(&6.0) && expected.contains(&11.0));
    each(backends, |b| {
        let mut tracked = Tracked::new(b, moved.len());
        let start = tracked.track().slot.start;
        b.write_f32(&mut tracked.0[1].buffer, start, &moved).unwrap();
        b.write_f32(&mut tracked.0[2].buffer, start, &rounded).unwrap();
        let mut to = cut(b, |arena| b.bytes(arena, 4 * moved.len() + 8));
        b.find_intervals(&mut to, 4, tracked.track(), period);
        let mut found = vec![0.0f32; moved.len() + 2];
        b.read_bytes(&to, 0, bytemuck::cast_slice_mut(&mut found)).unwrap();
        assert!(found == [&[0.0], &expected[..], &[0.0]].concat(), "{}", b.name());
    });
}

#[track_caller]
fn same(ours: &Observation, exact: &Observation, what: &str) {
    let counts = |o: &Observation| ([o.flipped, o.clipped, o.oscillating], o.amax.to_bits());
    assert_eq!(counts(ours), counts(exact), "{what}");
    let sums =
        |o: &Observation| [o.changes, o.before, o.rounded_changes, o.rounded_before, o.confidence];
    for (ours, exact) in sums(ours).into_iter().zip(sums(exact)) {
        assert!((ours - exact).abs() <= 1e-12 * exact, "{what}: {ours}, not {exact}");
    }
}

/// Five values about a threshold, of a block whose scale is 1/2: one that oscillates is reset, and
/// its copies follow.
pub(super) fn a_weight_about_a_threshold_is_reset<B: Harness>(backends: &[B]) {
    let operand = Operand::of(Format::mxfp4(PowerRule::Ceil, false));
    each(backends, |b| {
        let weights = |x: f32| (0..32).map(|i| [x, 2.9, 0.1][i.min(2)]).collect::<Vec<f32>>();
        let mut observer = cut(b, |arena| b.observer(arena, &[[1, 32]]).unwrap());
        let mut tracked = Tracked::new(b, 32);
        let mut params = Params::of(b, &[&weights(0.374)]);
        b.begin_track(tracked.track(), params.get(b, 0));
        let (of, slot) = (Viewed { number: 0, shape: [1, 32], operand: &operand }, params.slots[0]);
        for x in [0.376, 0.374, 0.3755, 0.3745] {
            let Track { before, slot: kept, .. } = tracked.track();
            let before = Values::Kept(Part { flat: before, slot: kept });
            b.view(&mut observer, View::Before, before, None, of);
            b.write_param(&mut params.weights, slot, &weights(x)).unwrap();
            b.view(&mut observer, View::After, Values::Weight(params.get(b, 0)), None, of);
            b.observe(&mut observer, tracked.track(), params.get(b, 0), of);
        }
        let mut found = [Observation::default()];
        b.observations(&mut observer, &mut found).unwrap();
        assert_eq!((found[0].flipped, found[0].oscillating), (1, 1), "{}", b.name());
        let [_, moved, rounded_moved] = tracked.read(b);
        assert!((moved[0] - 0.0065).abs() < 1e-6 && rounded_moved[0] == 1.0, "{moved:?}");
        assert!((rounded_moved[0] / moved[0] - 153.8).abs() < 0.1);
        b.reset(&observer, tracked.track(), (&mut params.weights, slot), of, 154.0);
        assert_eq!(params.read(b, 0), weights(0.3745));
        b.reset(&observer, tracked.track(), (&mut params.weights, slot), of, 8.0);
        assert_eq!(params.read(b, 0), weights(0.25));
    });
}
