//! What another program has computed, and how far we are off.

use std::collections::HashMap;
use std::fs;
use std::path::PathBuf;

use safetensors::{Dtype, SafeTensors};

/// Tensors of a file as f64.
pub(crate) fn read(path: PathBuf) -> HashMap<String, Vec<f64>> {
    let bytes = fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let values = |view: &safetensors::tensor::TensorView<'_>| -> Vec<f64> {
        let words = view.data().as_chunks::<4>().0.iter();
        match view.dtype() {
            Dtype::F32 => words.map(|w| f64::from(f32::from_le_bytes(*w))).collect(),
            Dtype::I32 => words.map(|w| f64::from(i32::from_le_bytes(*w))).collect(),
            other => panic!("dtype {other:?}"),
        }
    };
    tensors.iter().map(|(name, view)| (name.to_owned(), values(&view))).collect()
}

/// |ours - exact| / |exact|, Frobenius; infinite where ours has a NaN.
pub(crate) fn relative_error(ours: &[f32], exact: &[f64]) -> f64 {
    assert_eq!(ours.len(), exact.len());
    let off: f64 = ours.iter().zip(exact).map(|(a, b)| (f64::from(*a) - b).powi(2)).sum();
    let error = (off / exact.iter().map(|b| b * b).sum::<f64>().max(1e-300)).sqrt();
    if error.is_nan() { f64::INFINITY } else { error }
}
