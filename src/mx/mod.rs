//! (skeleton)
/// How elements are rounded to E2M1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rounding {
    /// To the nearest grid value, ties to even (Algorithm 1).
    Nearest,
    /// Stochastically, three quarters of the value, so that nothing clips (Algorithm 2).
    Unbiased,
}
/// Philox4x32-10 (Salmon et al. 2011): 128 random bits for a (counter, key).
pub fn philox4x32_10(_counter: [u32; 4], _key: [u32; 2]) -> [u32; 4] { todo!() }
