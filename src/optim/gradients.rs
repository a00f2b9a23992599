//! What gradients are kept in.
//!
//! A gradient in bf16 is the f32 sum of its product, rounded to nearest once, as the product leaves
//! it. Products that are added to each other would be rounded every time, so a step has one
//! micro-step then.

use super::ParamKind;
/// What gradients are kept in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Gradients {
    /// `f32`: 4 bytes a parameter.
    #[default]
    F32,
    /// `bf16`: on a GPU 2 bytes a parameter of the blocks' matrices, and 4 of all others. A processor
    /// keeps f32.
    Bf16,
}

impl Gradients {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::F32, Self::Bf16];

    fn as_str(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
        }
    }

    /// Whether a parameter's are kept in bf16, where a device can.
    pub(crate) fn are_in_bf16(self, kind: ParamKind) -> bool {
        self == Self::Bf16 && kind == ParamKind::Matrix
    }
}

named!(Gradients, "gradients");
