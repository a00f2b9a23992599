//! Memory: buffers, flat buffers in pieces, parameters.

use super::*;
use crate::formats;

pub(super) fn buffers_begin_as_zero<B: Harness>(backends: &[B]) {
    each(backends, |b| {
        for precision in BOTH {
            let mut tensor = cut(b, |arena| b.tensor(arena, 999, precision));
            assert_eq!(b.read_tensor(&tensor), [0.0; 999], "{}", b.name());
            b.write_tensor(&mut tensor, &[f32::NAN; 999]);
            b.zero_tensor(&mut tensor);
            assert_eq!(b.read_tensor(&tensor), [0.0; 999], "{}", b.name());
        }
        let (slots, len) = slots::<B>([7, 333]);
        let (flat, weights) =
            cut(b, |arena| (b.f32(arena, len), b.weights(arena, len, slots.len(), Master::F32)));
        let mut values = vec![f32::NAN; len];
        b.read_f32(&flat, 0, &mut values).unwrap();
        assert!(values.iter().all(|v| *v == 0.0), "{}", b.name());
        for slot in slots {
            let mut values = vec![f32::NAN; slot.len];
            b.read_param(&weights, slot, &mut values).unwrap();
            assert!(values.iter().all(|v| *v == 0.0), "{}", b.name());
        }
    });
}

pub(super) fn flat_buffers_are_read_in_pieces<B: Harness>(backends: &[B]) {
    each(backends, |b| {
        let pieces = [random(1, 1), random(50_001, 2), random(128, 3)];
        let mut flat = Flat::of(b, &pieces.each_ref().map(|piece| &piece[..]));
        let middle = flat.slots[1];
        b.write_f32(&mut flat.buffer, middle.start + 5, &[3.0, 4.0]).unwrap();
        let mut ours = [0.0; 4];
        b.read_f32(&flat.buffer, middle.start + 4, &mut ours).unwrap();
        assert_eq!(ours, [pieces[1][4], 3.0, 4.0, pieces[1][7]], "{}", b.name());
        let mut expected = pieces.clone();
        expected[1][4 + 1..][..2].copy_from_slice(&[3.0, 4.0]);
        assert!(flat.read(b) == expected, "{}", b.name());
    });
}

/// A gradient that is cleared, whatever it is kept in, touches no other; what is kept in bf16 is
/// read as such.
pub(super) fn gradients_are_apart<B: Harness>(backends: &[B]) {
    // Those of the first and the last are of matrices.
    let pieces = [random(50_001, 1), random(128, 2), random(7, 3), random(513, 4)];
    for kept in optim::Gradients::ALL {
        each(backends, |b| {
            let pieces = pieces.each_ref().map(|piece| &piece[..]);
            let mut gradients = Gradients::kept_in(b, &pieces, kept);
            let rounds = kept == optim::Gradients::Bf16 && B::HAS_COPIES;
            let round = |v: &f32| if rounds { half::bf16::from_f32(*v).to_f32() } else { *v };
            let rounded = |piece: &[f32]| piece.iter().map(round).collect::<Vec<_>>();
            let mut expected = pieces.map(<[f32]>::to_vec);
            expected[0] = rounded(&expected[0]);
            expected[3] = rounded(&expected[3]);
            assert!(gradients.read(b) == expected, "{}: {kept}", b.name());
            for i in [0, 1] {
                let [first, second] = gradients.get(b);
                let [cleared, other] = if i == 0 { [first, second] } else { [second, first] };
                b.zero_gradient(cleared.unwrap());
                drop(other);
                expected[i].fill(0.0);
                assert!(gradients.read(b) == expected, "{}: {kept}, gradient {i}", b.name());
            }
        });
    }
}

/// What is drawn is the definition's, bit for bit; what is written is read again; neither touches
/// another parameter.
pub(super) fn parameters_are_apart<B: Harness>(backends: &[B]) {
    for (len, index) in [(1, 0), (511, 1), (513, 2), (1_000_003, 3)] {
        let draw = Draw::of(99, Purpose::Weights, index, 0);
        let mut drawn = vec![0.0; len];
        formats::fill_normal(&mut drawn, 0.02, &draw, 0);
        each(backends, |b| {
            let others = [random(77, 1), random(128, 2)];
            let mut params = Params::of(b, &[&others[0], &vec![f32::NAN; len], &others[1]]);
            let slot = params.slots[1];
            b.draw_param(&mut params.weights, slot, 0.02, &draw).unwrap();
            assert!(params.read(b, 1) == drawn, "{}: {len} values", b.name());
            assert_eq!([params.read(b, 0), params.read(b, 2)], others, "{}", b.name());
        });
    }
}

/// Weights and bytes, each alone.
pub(super) fn what_is_put_aside_comes_back<B: Harness>(backends: &[B]) {
    let values = [random(4099, 1), random(7, 2), random(128, 3)];
    each(backends, |b| {
        let mut params = Params::of(b, &values.each_ref().map(Vec::as_slice));
        let (slots, len) = slots::<B>(values.iter().map(Vec::len));
        let mut aside = cut(b, |arena| b.f32(arena, len));
        for slot in &slots {
            b.put_aside(&params.weights, *slot, &mut aside);
            b.write_param(&mut params.weights, *slot, &vec![7.0; slot.len]).unwrap();
        }
        b.put_back(&aside, slots[1], &mut params.weights);
        assert!(params.read(b, 1) == values[1], "{}", b.name());
        assert_eq!(params.read(b, 0), vec![7.0; 4099], "{}", b.name());
        [0, 2].iter().for_each(|i| b.put_back(&aside, slots[*i], &mut params.weights));
        assert!((0..3).all(|i| params.read(b, i) == values[i]), "{}", b.name());

        let [mut from, mut to] = [(); 2].map(|()| cut(b, |arena| b.bytes(arena, 1003)));
        let bytes: Vec<u8> = (0..1003).map(|i| (i * i % 251) as u8).collect();
        b.write_bytes(&mut from, 0, &bytes).unwrap();
        b.copy_bytes(&from, 1001, &mut to);
        let mut found = vec![9; 1003];
        b.read_bytes(&to, 0, &mut found).unwrap();
        assert!(found == [&bytes[..1001], &[0, 0]].concat(), "{}", b.name());
    });
}

/// Splitting master weights and joining them again changes nothing but what cannot be split; and
/// what is written and read is the same in both forms.
pub(super) fn master_weights_are_split_and_joined<B: Harness>(backends: &[B]) {
    let mut values = [random(4099, 1), random(7, 2)];
    // Half of a last place of bf16, of both signs.
    (values[0][5], values[0][4098]) = (f32::from_bits(0x3f80_8000), f32::from_bits(0xbf81_8000));
    let split = values.each_ref().map(|of_one| -> Vec<f32> {
        of_one.iter().map(|p| crate::optim::master::splittable(*p)).collect()
    });
    assert!(split != values);
    each(backends, |b| {
        if !B::HAS_COPIES {
            return;
        }
        let views = values.each_ref().map(Vec::as_slice);
        let mut params = Params::of(b, &views);
        let len = slots::<B>(values.iter().map(Vec::len)).1;
        let read = |params: &Params<B>| [0, 1].map(|i| params.read(b, i));
        assert!(read(&params) == values, "{}", b.name());
        for master in [Master::Split, Master::F32, Master::Split] {
            let Params { weights, slots } = &mut params;
            b.keep_weights_as(weights, len, slots, master).unwrap();
            assert!(read(&params) == split, "{}, {master}", b.name());
        }
        for (slot, values) in params.slots.clone().into_iter().zip(&values) {
            b.write_param(&mut params.weights, slot, values).unwrap();
        }
        assert!(read(&params) == split, "{}: written", b.name());
    });
}
