//! The GPU in the suite of all backends: as the chip that it is, and as one of an older generation,
//! whose kernels its own has no part in.

use super::Cuda;
use super::device::memory::Tensor;
use super::quantize::carrier::Carrier;
use super::tests::{gpu, older_gpu, read_bytes, write_bytes};
use crate::backend::Precision;
use crate::backend::conformance::{Harness, Of};
use crate::formats::Format;

impl Harness for Cuda {
    // Attention goes by 128 queries, and starts copies several steps ahead.
    const LONGEST: usize = 1000;

    fn all() -> Vec<Self> {
        [gpu, older_gpu].into_iter().map_while(|open| open()).collect()
    }

    fn name(&self) -> String {
        self.description()
    }

    fn held(precision: Precision) -> Precision {
        precision
    }

    fn bound(&self, of: Of, precision: Precision) -> f64 {
        // What rounding a result to the precision leaves, with some room for sums.
        let (activation, attention) = match precision {
            Precision::F32 => (2e-6, 1e-5),
            Precision::Bf16 => (3e-3, 1e-2),
        };
        // An error of a score is relative to the score, and the softmax sees it as it is.
        let by_factor = |factor: f32| attention * f64::from(factor.max(1.0));
        match of {
            Of::Activation | Of::Embedding | Of::Sum => activation,
            Of::NormInputGradient => f64::max(activation, 1e-5),
            Of::EmbeddingGradient => 2e-6,
            // FP8 tensor cores align what they add at once to the largest of it, and drop what lies
            // too far below: with the suite's outliers up to 8e-6 of the result. The definition
            // allows 1e-5.
            Of::Mxfp4Wgrad(shape) => {
                let carrier = Carrier::of(Format::MXFP4, self.gpu.capability, shape);
                if carrier == Carrier::Bf16 || shape.rows <= 64 { 1e-6 } else { 1e-5 }
            }
            // Numbers of FP8 differ in size as those of MXFP4 times their scales do not: what is
            // dropped of sums, whose longest part is of 128 products, is up to 2^-13 of the
            // largest. Products by bf16 tensor cores are exact.
            Of::Fp8Wgrad(shape) => {
                let carrier = Carrier::of(Format::E4M3, self.gpu.capability, shape);
                if carrier == Carrier::Bf16 { 1e-5 } else { 3e-4 }
            }
            // In f32, whatever the precision of activations; tensor cores sum in an order of their
            // own.
            Of::Statistic | Of::ParameterGradient | Of::Logits | Of::LogSum(_) => 1e-5,
            Of::Attention(factor) => by_factor(factor),
            Of::AttentionGradient(factor) => 1.5 * by_factor(factor),
            Of::Head => 2.0 * f64::min(activation, 1e-3),
            // Squares are summed in f64.
            Of::GradientNorm => 1e-9,
        }
    }

    fn write_tensor(&self, to: &mut Tensor, values: &[f32]) {
        let bytes: Vec<u8> = match to.precision {
            Precision::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            Precision::Bf16 => {
                values.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect()
            }
        };
        write_bytes(self, to.write().address, &bytes);
    }

    fn read_tensor(&self, from: &Tensor) -> Vec<f32> {
        let bytes = read_bytes(self, from.address(), from.bytes());
        match from.precision {
            Precision::F32 => {
                bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
            }
            Precision::Bf16 => {
                let numbers = bytes.as_chunks::<2>().0.iter();
                numbers.map(|b| half::bf16::from_le_bytes(*b).to_f32()).collect()
            }
        }
    }
}
