//! The CPU in the suite of all backends: once for every instruction set that this processor has.

use super::{Buffer, Cpu, Isa};
use crate::backend::Precision;
use crate::backend::conformance::{Harness, Of};

impl Harness for Cpu {
    // Attention goes by 48 queries, jobs of a GEMM by 128 rows.
    const LONGEST: usize = 130;

    fn all() -> Vec<Self> {
        let sets = Isa::ALL.into_iter().filter(|isa| isa.is_available());
        sets.map(|isa| Self::with_isa(2, isa).unwrap()).collect()
    }

    fn name(&self) -> String {
        self.isa().name().into()
    }

    fn held(_: Precision) -> Precision {
        Precision::F32
    }

    fn bound(&self, of: Of, precision: Precision) -> f64 {
        // bf16 operands are off by up to 2^-9, relative, and five roundings add up.
        let has_bf16 = matches!(self.isa(), Isa::Amx | Isa::Avx512);
        let attention = if precision == Precision::Bf16 && has_bf16 { 6e-3 } else { 1e-6 };
        match of {
            // A sum of two is rounded as it should be.
            Of::Sum => 0.0,
            Of::Embedding => 1e-7,
            // An error of a score is relative to the score, and the softmax sees it as it is.
            Of::Attention(factor) | Of::LogSum(factor) => attention * f64::from(factor.max(1.0)),
            Of::AttentionGradient(factor) => 2.0 * attention * f64::from(factor.max(1.0)),
            Of::Head => 2e-6,
            Of::NormInputGradient => 1e-5,
            // What f32 makes of the sums.
            Of::Activation
            | Of::EmbeddingGradient
            | Of::Statistic
            | Of::ParameterGradient
            | Of::Mxfp4Wgrad(_)
            | Of::Fp8Wgrad(_)
            | Of::Logits
            | Of::GradientNorm => 1e-6,
        }
    }

    fn write_tensor(&self, to: &mut Buffer<f32>, values: &[f32]) {
        to[..values.len()].copy_from_slice(values);
    }

    fn read_tensor(&self, from: &Buffer<f32>) -> Vec<f32> {
        from.to_vec()
    }
}
