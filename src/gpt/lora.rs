//! What is trained beside the linear layers of a model that stays as it is (Hu et al. 2021, "LoRA",
//! arXiv 2106.09685): y = x W^T + b + (alpha / rank) (x A^T) B^T, where A is (rank, inputs) and B is
//! (outputs, rank) and begins as 0.

use crate::reserve::zeros;
use crate::{Error, Result};

/// The adapters of a model. `Default` has rank 8 and alpha 16 beside all four linear layers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Lora {
    /// Of the products B A.
    pub rank: usize,
    /// Over the rank, the factor of these products: PEFT's `lora_alpha`.
    pub alpha: f32,
    /// Which linear layers of every block have one: what makes q, k and v, what attention's result
    /// passes through, and the two of the MLP. See [`Lora::LAYERS`].
    pub layers: [bool; 4],
}

impl Default for Lora {
    fn default() -> Self {
        Self { rank: 8, alpha: 16.0, layers: [true; 4] }
    }
}

impl Lora {
    /// The names of the linear layers of a block in Hugging Face's `gpt2`.
    pub const LAYERS: [&str; 4] = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"];

    /// Those of Llama's blocks.
    pub const LAYERS_OF_LLAMA: [&str; 4] =
        ["self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"];

    /// What the product of x, A and B is multiplied by.
    pub fn scale(&self) -> f32 {
        self.alpha / self.rank as f32
    }

    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] naming what was expected and what came.
    pub fn validate(&self) -> Result<()> {
        const MOST: usize = 1 << 14;
        let Self { rank, alpha, layers } = self;
        if *rank == 0 || *rank > MOST {
            let message = format!("expected a number from 1 to {MOST}, got {rank}");
            return Err(Error::invalid("lora rank", message));
        }
        if !(*alpha > 0.0 && alpha.is_finite() && self.scale() > 0.0) {
            let message = format!("expected a number above 0, such as twice the rank, got {alpha}");
            return Err(Error::invalid("lora alpha", message));
        }
        if layers.iter().all(|is_adapted| !is_adapted) {
            let message = format!("expected some of {}, got none", Self::LAYERS.join(", "));
            return Err(Error::invalid("lora layers", message));
        }
        Ok(())
    }

    /// Adds the product of a (rank, inputs) and b (outputs, rank) to w (outputs, inputs).
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub(crate) fn merge(&self, w: &mut [f32], a: &[f32], b: &[f32]) -> Result<()> {
        let inputs = a.len() / self.rank;
        let (mut sum, scale) = (zeros("a row of a tensor", inputs)?, self.scale());
        for (w, b) in w.chunks_exact_mut(inputs).zip(b.chunks_exact(self.rank)) {
            sum.fill(0.0f32);
            for (a, b) in a.chunks_exact(inputs).zip(b) {
                sum.iter_mut().zip(a).for_each(|(sum, a)| *sum += b * a);
            }
            w.iter_mut().zip(&sum).for_each(|(w, sum)| *w += scale * sum);
        }
        Ok(())
    }

    /// Layers by names with commas between them, of [`Lora::LAYERS`] or [`Lora::LAYERS_OF_LLAMA`]; `all`
    /// stands for all of them.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] naming what was expected and what came.
    pub fn layers_of(names: &str) -> Result<[bool; 4]> {
        if names == "all" {
            return Ok([true; 4]);
        }
        let mut layers = [false; 4];
        for name in names.split(',').map(str::trim) {
            let position = |of: [&str; 4]| of.iter().position(|layer| *layer == name);
            let number = position(Self::LAYERS).or_else(|| position(Self::LAYERS_OF_LLAMA));
            let Some(number) = number else {
                let message = format!(
                    "expected some of {}, or in Llama's blocks of {}, or all, got {name:?}",
                    Self::LAYERS.join(","),
                    Self::LAYERS_OF_LLAMA.join(",")
                );
                return Err(Error::invalid("lora layers", message));
            };
            layers[number] = true;
        }
        Ok(layers)
    }

    /// The names of the layers that have one.
    pub fn layer_names(&self) -> impl Iterator<Item = &'static str> {
        Self::LAYERS.into_iter().zip(self.layers).filter(|(_, is)| *is).map(|(name, _)| name)
    }
}
