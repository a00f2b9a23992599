//! Moments as they are stored, in parts that threads share, by the arithmetic of
//! `optim/moments.rs`.

use super::isa::{Isa, simd_fn};
use crate::backend::{OptimizerStep, Place};
use crate::formats::{Draw, Purpose};
use crate::optim::moments::{
    E4m3, Element, F16, First, Float, GROUP, Second, decode_group, encode_group, inverse,
    is_stochastic, tensor_scale,
};

/// The numbers of one moment of a parameter, or of a part of it that begins at a group.
pub(super) enum Stored<'a> {
    F32(&'a mut [f32]),
    /// And how they are rounded.
    Bf16(&'a mut [u16], Rounding),
    /// Codes and scales.
    Int8(&'a mut [u8], &'a mut [f32]),
    /// Floats that have one scale.
    E4m3(&'a mut [u8], Scale),
    F16(&'a mut [u16], Scale),
}

/// The scale of a whole parameter.
#[derive(Clone, Copy)]
pub(super) struct Scale {
    /// Of what is loaded.
    loaded: f32,
    /// Of what will be stored.
    stored: f32,
}

impl Scale {
    /// Makes what is kept that of numbers up to `largest`.
    fn change<F: Float>(kept: &mut [f32], largest: f32) -> Self {
        let loaded = kept[0];
        kept[0] = tensor_scale::<F>(loaded, largest);
        Self { loaded, stored: kept[0] }
    }
}

/// How numbers become bf16.
#[derive(Clone, Copy)]
pub(super) enum Rounding {
    /// To nearest, of two to the even one.
    ToNearest,
    /// With the bits of a draw, whose rows are 8 elements each, from element `first` on.
    Stochastic { draw: Draw, first: usize },
}

/// What becomes of moments that were computed.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Then {
    Store,
    Forget,
}

/// Elements whose moments are decoded at once, where they are not stored in f32.
pub(super) const PIECE: usize = 1024;

/// Which of the two moments it is, which codes and drawn bits depend on.
#[derive(Clone, Copy)]
#[repr(u32)]
pub(super) enum Moment {
    First = 0,
    Second = 1,
}

impl<'a> Stored<'a> {
    /// The numbers of a parameter in the buffer of a state. Where all have one scale, it becomes
    /// that of the numbers up to `largest` that will be stored; with 0 it stays.
    pub(super) fn of(state: &'a mut [u8], place: &Place, rounding: Rounding, largest: f32) -> Self {
        let (elements, rest) = state[place.start..].split_at_mut(place.bytes());
        let scales = &mut rest[place.scales - place.start - place.bytes()..];
        let scales = bytemuck::cast_slice_mut(&mut scales[..4 * place.groups()]);
        match place.element {
            Element::F32 => Self::F32(bytemuck::cast_slice_mut(elements)),
            Element::Bf16 => Self::Bf16(bytemuck::cast_slice_mut(elements), rounding),
            Element::Int8 => Self::Int8(elements, scales),
            Element::E4m3 => Self::E4m3(elements, Scale::change::<E4m3>(scales, largest)),
            Element::F16 => {
                let scale = Scale::change::<F16>(scales, largest);
                Self::F16(bytemuck::cast_slice_mut(elements), scale)
            }
        }
    }

    /// The first `count` and the others; a multiple of [`GROUP`].
    pub(super) fn split_at(self, count: usize) -> [Self; 2] {
        match self {
            Self::F32(values) => {
                let (left, right) = values.split_at_mut(count);
                [Self::F32(left), Self::F32(right)]
            }
            Self::Bf16(values, rounding) => {
                let (left, right) = values.split_at_mut(count);
                [Self::Bf16(left, rounding), Self::Bf16(right, rounding.further(count))]
            }
            Self::Int8(codes, scales) => {
                let (left, right) = codes.split_at_mut(count);
                let (of_left, of_right) = scales.split_at_mut(count / GROUP);
                [Self::Int8(left, of_left), Self::Int8(right, of_right)]
            }
            Self::E4m3(codes, scale) => {
                let (left, right) = codes.split_at_mut(count);
                [Self::E4m3(left, scale), Self::E4m3(right, scale)]
            }
            Self::F16(codes, scale) => {
                let (left, right) = codes.split_at_mut(count);
                [Self::F16(left, scale), Self::F16(right, scale)]
            }
        }
    }

    /// As many of them in f32 as `to` has room for, from element `first` on, where a group begins.
    #[inline]
    pub(super) fn load(&self, isa: Isa, moment: Moment, first: usize, to: &mut [f32]) {
        let all = first..first + to.len();
        match self {
            Self::F32(values) => to.copy_from_slice(&values[all]),
            Self::Bf16(values, _) => load_bf16(isa, &values[all], to),
            Self::Int8(codes, scales) => {
                let (codes, scales) = (&codes[all], &scales[first / GROUP..]);
                match moment {
                    Moment::First => load_first(isa, codes, scales, to),
                    Moment::Second => load_second(isa, codes, scales, to),
                }
            }
            Self::E4m3(codes, scale) => load_e4m3(isa, &codes[all], scale.loaded, to),
            Self::F16(codes, scale) => load_f16(isa, &codes[all], scale.loaded, to),
        }
    }

    /// Stores numbers from element `first` on, where a group begins.
    #[inline]
    pub(super) fn store(&mut self, isa: Isa, moment: Moment, first: usize, from: &[f32]) {
        let all = first..first + from.len();
        match self {
            Self::F32(values) => values[all].copy_from_slice(from),
            Self::Bf16(values, Rounding::ToNearest) => store_bf16(isa, &mut values[all], from),
            Self::Bf16(values, Rounding::Stochastic { draw, first: of_all }) => {
                store_drawn(&mut values[all], from, draw, moment as u32, *of_all + first);
            }
            Self::Int8(codes, scales) => {
                let (codes, scales) = (&mut codes[all], &mut scales[first / GROUP..]);
                match moment {
                    Moment::First => store_first(isa, codes, scales, from),
                    Moment::Second => store_second(isa, codes, scales, from),
                }
            }
            Self::E4m3(codes, scale) => {
                store_e4m3(isa, &mut codes[all], inverse(scale.stored), from);
            }
            Self::F16(codes, scale) => {
                store_f16(isa, &mut codes[all], inverse(scale.stored), from);
            }
        }
    }
}

impl Rounding {
    /// Of a moment of the parameter `index` that decays by `beta`.
    pub(super) fn of(step: &OptimizerStep, beta: f32, index: usize) -> Self {
        if !is_stochastic(beta) {
            return Self::ToNearest;
        }
        let draw = Draw::of(step.seed, Purpose::Moments, step.t as u32, index as u32);
        Self::Stochastic { draw, first: 0 }
    }

    fn further(self, count: usize) -> Self {
        match self {
            Self::ToNearest => self,
            Self::Stochastic { draw, first } => Self::Stochastic { draw, first: first + count },
        }
    }
}

simd_fn! {
    fn load_bf16(from: &[u16], to: &mut [f32]) {
        for (to, from) in to.iter_mut().zip(from) {
            *to = f32::from_bits(u32::from(*from) << 16);
        }
    }
}

simd_fn! {
    fn store_bf16(to: &mut [u16], from: &[f32]) {
        for (to, from) in to.iter_mut().zip(from) {
            let bits = from.to_bits();
            *to = ((bits + 0x7fff + (bits >> 16 & 1)) >> 16) as u16;
        }
    }
}

/// Rounds away from 0 where what is lost, in 2^-16 of a last place, and 16 random bits are together
/// a last place.
fn store_drawn(to: &mut [u16], from: &[f32], draw: &Draw, which: u32, first: usize) {
    for (row, (to, from)) in (first / 8..).zip(to.chunks_mut(8).zip(from.chunks(8))) {
        let words = draw.bits(row as u32, which);
        for (j, (to, from)) in to.iter_mut().zip(from).enumerate() {
            let drawn = words[j / 2] >> (16 * (j % 2)) & 0xffff;
            *to = ((from.to_bits() + drawn) >> 16) as u16;
        }
    }
}

/// Loops over groups, for each instruction set and each moment.
macro_rules! coded {
    ($load:ident $store:ident $code:ty) => {
        simd_fn! {
            fn $load(codes: &[u8], scales: &[f32], to: &mut [f32]) {
                for ((codes, scale), to) in codes.chunks(GROUP).zip(scales).zip(to.chunks_mut(GROUP)) {
                    decode_group::<$code>(codes, *scale, to);
                }
            }
        }

        simd_fn! {
            fn $store(codes: &mut [u8], scales: &mut [f32], from: &[f32]) {
                let groups = codes.chunks_mut(GROUP).zip(scales).zip(from.chunks(GROUP));
                for ((codes, scale), from) in groups {
                    *scale = encode_group::<$code>(from, codes);
                }
            }
        }
    };
}
coded!(load_first store_first First);
coded!(load_second store_second Second);

/// Loops over floats, for each instruction set.
macro_rules! floats {
    ($load:ident $store:ident $float:ident $bits:ty) => {
        simd_fn! {
            fn $load(codes: &[$bits], scale: f32, to: &mut [f32]) {
                for (to, code) in to.iter_mut().zip(codes) {
                    *to = $float::decode(*code, scale);
                }
            }
        }

        simd_fn! {
            fn $store(codes: &mut [$bits], inverse: f32, from: &[f32]) {
                for (code, from) in codes.iter_mut().zip(from) {
                    *code = $float::encode(*from, inverse);
                }
            }
        }
    };
}
floats!(load_e4m3 store_e4m3 E4m3 u8);
floats!(load_f16 store_f16 F16 u16);
