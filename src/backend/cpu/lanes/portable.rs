//! Sixteen lanes in an array: the definition that the other sets are compared with.

use super::Lanes;
use crate::formats::philox4x32_10;

/// Arrays.
pub(in crate::backend::cpu) struct Portable;

impl Lanes for Portable {
    type F = [f32; 16];
    type U = [u32; 16];

    #[inline(always)]
    unsafe fn load(from: *const f32) -> [f32; 16] {
        // SAFETY: 16 values are readable, as the caller promises.
        unsafe { from.cast::<[f32; 16]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, v: [f32; 16]) {
        // SAFETY: 16 values are writable, as the caller promises.
        unsafe { to.cast::<[f32; 16]>().write_unaligned(v) }
    }
    #[inline(always)]
    unsafe fn load_u(from: *const u32) -> [u32; 16] {
        // SAFETY: as in `load`.
        unsafe { from.cast::<[u32; 16]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store_u(to: *mut u32, v: [u32; 16]) {
        // SAFETY: as in `store`.
        unsafe { to.cast::<[u32; 16]>().write_unaligned(v) }
    }
    #[inline(always)]
    unsafe fn prefetch(_: *const f32) {}
    #[inline(always)]
    unsafe fn splat(v: f32) -> [f32; 16] {
        [v; 16]
    }
    #[inline(always)]
    unsafe fn splat_u(v: u32) -> [u32; 16] {
        [v; 16]
    }
    #[inline(always)]
    unsafe fn bits(v: [f32; 16]) -> [u32; 16] {
        v.map(f32::to_bits)
    }
    #[inline(always)]
    unsafe fn from_bits(v: [u32; 16]) -> [f32; 16] {
        v.map(f32::from_bits)
    }
    #[inline(always)]
    unsafe fn add(a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        std::array::from_fn(|l| a[l] + b[l])
    }
    #[inline(always)]
    unsafe fn sub(a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        std::array::from_fn(|l| a[l] - b[l])
    }
    #[inline(always)]
    unsafe fn mul(a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        std::array::from_fn(|l| a[l] * b[l])
    }
    #[inline(always)]
    unsafe fn less(a: [f32; 16], b: [f32; 16]) -> [u32; 16] {
        std::array::from_fn(|l| if a[l] < b[l] { u32::MAX } else { 0 })
    }
    #[inline(always)]
    unsafe fn less_equal(a: [f32; 16], b: [f32; 16]) -> [u32; 16] {
        std::array::from_fn(|l| if a[l] <= b[l] { u32::MAX } else { 0 })
    }
    #[inline(always)]
    unsafe fn and(a: [u32; 16], b: [u32; 16]) -> [u32; 16] {
        std::array::from_fn(|l| a[l] & b[l])
    }
    #[inline(always)]
    unsafe fn or(a: [u32; 16], b: [u32; 16]) -> [u32; 16] {
        std::array::from_fn(|l| a[l] | b[l])
    }
    #[inline(always)]
    unsafe fn xor(a: [u32; 16], b: [u32; 16]) -> [u32; 16] {
        std::array::from_fn(|l| a[l] ^ b[l])
    }
    #[inline(always)]
    unsafe fn add_u(a: [u32; 16], b: [u32; 16]) -> [u32; 16] {
        std::array::from_fn(|l| a[l].wrapping_add(b[l]))
    }
    #[inline(always)]
    unsafe fn sub_u(a: [u32; 16], b: [u32; 16]) -> [u32; 16] {
        std::array::from_fn(|l| a[l].wrapping_sub(b[l]))
    }
    #[inline(always)]
    unsafe fn max_u(a: [u32; 16], b: [u32; 16]) -> [u32; 16] {
        std::array::from_fn(|l| a[l].max(b[l]))
    }
    #[inline(always)]
    unsafe fn equal(a: [u32; 16], b: [u32; 16]) -> [u32; 16] {
        std::array::from_fn(|l| if a[l] == b[l] { u32::MAX } else { 0 })
    }
    #[inline(always)]
    unsafe fn shift_left<const N: u32>(v: [u32; 16]) -> [u32; 16] {
        v.map(|v| v << N)
    }
    #[inline(always)]
    unsafe fn shift_right<const N: u32>(v: [u32; 16]) -> [u32; 16] {
        v.map(|v| v >> N)
    }
    #[inline(always)]
    unsafe fn multiply_wide(v: [u32; 16], m: u32) -> ([u32; 16], [u32; 16]) {
        let products = v.map(|v| u64::from(v) * u64::from(m));
        (products.map(|p| (p >> 32) as u32), products.map(|p| p as u32))
    }
    #[inline(always)]
    unsafe fn look_up(v: [u32; 16], table: &[u32; 16]) -> [u32; 16] {
        v.map(|v| table[(v & 15) as usize])
    }
    #[inline(always)]
    unsafe fn add_bytes(sum: [u32; 16], words: [u32; 16]) -> [u32; 16] {
        std::array::from_fn(|l| {
            let bytes = words[l].to_le_bytes().map(|b| i32::from(b as i8));
            sum[l].wrapping_add(bytes.iter().sum::<i32>() as u32)
        })
    }
    #[inline(always)]
    unsafe fn any(v: [u32; 16]) -> bool {
        v != [0; 16]
    }
    #[inline(always)]
    unsafe fn transpose(rows: [[f32; 16]; 16]) -> [[f32; 16]; 16] {
        std::array::from_fn(|i| std::array::from_fn(|j| rows[j][i]))
    }
    #[inline(always)]
    unsafe fn interleave(w: [[u32; 16]; 4]) -> [[u32; 16]; 4] {
        std::array::from_fn(|j| std::array::from_fn(|i| w[i % 4][i / 4 * 4 + j]))
    }
    #[inline(always)]
    unsafe fn zip(v: [u32; 16]) -> [u32; 16] {
        let half = |at: usize| v[at / 2] >> (16 * (at % 2)) & 0xffff;
        std::array::from_fn(|i| half(i) | half(16 + i) << 16)
    }
    // NOTE: lane by lane, with the definition itself. Inlined as operations on arrays, rustc 1.95
    // made wrong bits of it for plain x86-64 in the release profile, which the tests of that
    // profile show.
    #[inline(always)]
    unsafe fn philox(
        keys: &[[u32; 2]; 10],
        c0: [u32; 16],
        c1: [u32; 16],
        [c2, c3]: [u32; 2],
    ) -> [[u32; 16]; 4] {
        let mut out = [c0; 4];
        for l in 0..16 {
            let words = philox4x32_10([c0[l], c1[l], c2, c3], keys[0]);
            for w in 0..4 {
                out[w][l] = words[w];
            }
        }
        out
    }
    #[inline(always)]
    unsafe fn narrow(v: [[u32; 16]; 2]) -> [u32; 16] {
        let v = v.as_flattened();
        std::array::from_fn(|i| v[2 * i] >> 16 | v[2 * i + 1] & 0xffff_0000)
    }
}
