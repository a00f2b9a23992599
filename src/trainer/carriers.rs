//! What multiplies the GEMMs of a run on its device, so that nobody takes an emulation's speed for a
//! format's.

use std::fmt;

use crate::backend::{Linear, LinearShape, Numbers, on_device};
use crate::formats::{Element, Format};
use crate::gpt::ModelConfig;
use crate::run::TrainerOptions;
use crate::{Engine, Result};

/// What multiplies one of the GEMMs of linear layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Carried {
    /// "forward", "dgrad" or "wgrad".
    pub gemm: &'static str,
    /// Of its two operands.
    pub formats: [Format; 2],
    /// What they are multiplied as.
    pub numbers: Numbers,
}

impl Carried {
    /// Whether a format of 4 or 8 bits is multiplied as bf16 or f32 numbers: exact, and not faster
    /// than bf16.
    pub fn is_emulated(&self) -> bool {
        let is_narrow = |format: &Format| {
            matches!(
                format.element(),
                Element::E4m3 | Element::E5m2 | Element::Int8 | Element::E2m1
            )
        };
        matches!(self.numbers, Numbers::F32 | Numbers::Bf16) && self.formats.iter().any(is_narrow)
    }
}

/// Such as "dgrad of FP8 E5M2 and FP8 E4M3 as FP8".
impl fmt::Display for Carried {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { gemm, formats: [a, b], numbers } = self;
        write!(f, "{gemm} of {a}")?;
        if a.to_string() != b.to_string() {
            write!(f, " and {b}")?;
        }
        write!(f, " as {}", numbers.name())
    }
}

/// What will multiply the GEMMs of all linear layers of a model, each kind once: forward, dgrad and
/// wgrad. Layers that a recipe keeps in bf16 are kinds of their own; steps that it keeps in bf16 are
/// left out. Of a recipe that rounds W by its slow mean it is what multiplies once it does.
///
/// # Errors
/// [`crate::Error::InvalidArgument`] for options that make no trainer.
pub fn carriers(
    engine: &Engine,
    config: &ModelConfig,
    options: &TrainerOptions,
) -> Result<Vec<Carried>> {
    config.validate()?;
    let options = options.resolved(config, engine.size())?;
    let rows = options.batch_size * options.sequence_length;
    let shapes = config.linears().map(|[inputs, outputs]| LinearShape { rows, inputs, outputs });
    let mut all = Vec::new();
    for layer in 0..config.layers {
        let linears = options.recipe.for_layer(layer, config.layers, 0, 0);
        let by_mean = options.recipe.ema().is_some();
        let linears = linears.map(|linear| if by_mean { linear.by_mean() } else { linear });
        for (shape, linear) in shapes.into_iter().zip(&linears) {
            let numbers = on_device!(engine.backend(), backend => backend.numbers(shape, linear));
            let gemms = ["forward", "dgrad", "wgrad"].into_iter().zip(linear.gemms());
            for ((gemm, operands), numbers) in gemms.zip(numbers) {
                let formats = [operands.a().format(), operands.b().format()];
                let carried = Carried { gemm, formats, numbers };
                if !all.contains(&carried) {
                    all.push(carried);
                }
            }
        }
    }
    all.sort_by_key(|carried| {
        ["forward", "dgrad", "wgrad"].iter().position(|g| *g == carried.gemm)
    });
    Ok(all)
}

/// What of it is emulated, in words; None where nothing is.
pub fn emulation(carriers: &[Carried]) -> Option<String> {
    let emulated = carriers.iter().filter(|carried| carried.is_emulated());
    let emulated: Vec<_> = emulated.map(|carried| carried.to_string()).collect();
    (!emulated.is_empty())
        .then(|| format!("{}: exact, and not faster than bf16", emulated.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::EngineOptions;

    #[test]
    fn emulations_are_told_from_what_they_emulate() {
        let engine = Engine::new(EngineOptions { threads: 1, ..Default::default() }).unwrap();
        let config = ModelConfig { layers: 8, channels: 32, heads: 1, ..ModelConfig::default() };
        let words = |recipe: &str| {
            let recipe = recipe.parse().unwrap();
            let options = TrainerOptions { recipe, ..TrainerOptions::default() };
            emulation(&carriers(&engine, &config, &options).unwrap())
        };
        assert_eq!([words("fp32"), words("bf16"), words("bf16,mantissa=3")], [None, None, None]);
        let all = "forward of NVFP4 as bf16, dgrad of NVFP4 as bf16, wgrad of NVFP4 as bf16";
        let expected = format!("{all}: exact, and not faster than bf16");
        // A layer of eight is in bf16, which is no emulation.
        assert_eq!(words("nvidia-nvfp4"), Some(expected.clone()));
        assert_eq!(words("nvfp4-nvfp4"), Some(expected));
        let fp8 = words("fp8").unwrap();
        assert!(
            fp8.starts_with("forward of FP8 E4M3 as bf16, dgrad of FP8 E5M2 and FP8 E4M3 as bf16")
        );
        assert!(words("tetrajet2,outer=f32").unwrap().contains("as f32"));
        let exact = |gemms: &str| Some(format!("{gemms}: exact, and not faster than bf16"));
        assert_eq!(words("bf16,fwd=fp8"), exact("forward of FP8 E4M3 as bf16"));
        let backward = "dgrad of FP8 E5M2 and FP8 E4M3 as bf16, wgrad of NVFP4 as bf16";
        assert_eq!(words("nvfp4,dgrad=fp8"), exact(backward));
        let rotated = words("tetrajet2,outer=f32,rht=all,wgrad=fp8").unwrap();
        assert!(
            rotated.starts_with("forward of NVFP4 as f32, dgrad of NVFP4 as f32, wgrad of FP8")
        );
        // Weights that are rounded by their means are in numbers that no packing makes.
        let by_mean = words("mxfp4-mxfp4,ema=0.998").unwrap();
        assert!(by_mean.starts_with("forward of MXFP4 as bf16"), "{by_mean}");
        // Integers on most processors, bf16 with AMX.
        assert!(words("mxfp4").is_none_or(|words| words.starts_with("dgrad of MXFP4 as bf16")));
    }
}
