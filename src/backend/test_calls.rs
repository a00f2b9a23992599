//! Operations called with one argument an operand, on parameters that lie alone: what tests of single
//! operations are written with.

#![allow(clippy::too_many_arguments, reason = "one argument an operand is the point")]

use super::cpu::Cpu;
use super::cuda::Cuda;
use super::*;
use crate::mx::Random;

/// The slot of a parameter that lies alone in its buffer.
pub(crate) fn alone(len: usize) -> Slot {
    Slot { index: 0, start: 0, len, decays: true }
}

/// All operations of a model like GPT-2, in its backward pass too.
pub(crate) fn workspace_shape(
    sequences: Sequences,
    channels: usize,
    heads: usize,
    vocab_size: usize,
    precision: Precision,
    recipes: &'static [LinearRecipe],
) -> WorkspaceShape<'static> {
    let (rows, c, head_size) = (sequences.rows(), channels, channels / heads);
    let linears = [[c, 3 * c], [c, c], [c, 4 * c], [4 * c, c]]
        .map(|[inputs, outputs]| LinearShape { rows, inputs, outputs });
    WorkspaceShape {
        linears: Vec::leak(linears.to_vec()),
        norm: NormShape { rows, channels, epsilon: 0.0 },
        attention: AttentionShape {
            sequences,
            heads,
            kv_heads: heads,
            head_size,
            score_factor: 1.0,
            precision,
        },
        head: HeadShape { rows, channels, vocab_size, precision },
        recipes,
        backward: true,
    }
}

macro_rules! calls {
    ($b:ty, $len:expr, $parameters:expr) => {
        #[allow(dead_code)]
        impl $b {
            pub(crate) fn embedding_forward(
                &self,
                out: &mut <Self as Memory>::Tensor,
                tokens: &<Self as Memory>::Tokens,
                wte: &<Self as Memory>::Weights,
                wpe: &<Self as Memory>::Weights,
                sequences: Sequences,
                channels: usize,
            ) {
                let shape = EmbeddingShape { sequences, channels };
                let [wte, wpe] = [wte, wpe].map(|w| self.param(w, alone($parameters(w))));
                Embed::embedding_forward(self, out, tokens, wte, wpe, shape);
            }

            pub(crate) fn embedding_backward(
                &self,
                dwte: &mut <Self as Memory>::F32,
                dwpe: &mut <Self as Memory>::F32,
                dout: &<Self as Memory>::Tensor,
                tokens: &<Self as Memory>::Tokens,
                sequences: Sequences,
                channels: usize,
                accumulate: bool,
            ) {
                let shape = EmbeddingShape { sequences, channels };
                let [dwte, dwpe] = [self.whole(dwte), self.whole(dwpe)];
                let gradients = EmbeddingGradients { dwte, dwpe, accumulate };
                Embed::embedding_backward(self, gradients, dout, tokens, shape);
            }

            /// A whole buffer as a gradient.
            pub(crate) fn whole<'a>(
                &self,
                flat: &'a mut <Self as Memory>::F32,
            ) -> <Self as Memory>::Gradient<'a> {
                let slot = alone($len(flat));
                let [gradient] = self.gradients(flat, [slot]);
                gradient
            }

            pub(crate) fn layernorm_forward(
                &self,
                out: &mut <Self as Memory>::Tensor,
                statistics: NormStatistics<&mut <Self as Memory>::F32>,
                x: &<Self as Memory>::Tensor,
                w: &<Self as Memory>::Weights,
                b: &<Self as Memory>::Weights,
                rows: usize,
                channels: usize,
                epsilon: f32,
            ) {
                let [w, b] = [w, b].map(|p| self.param(p, alone(channels)));
                let shape = NormShape { rows, channels, epsilon };
                Norm::layernorm_forward(self, out, statistics, x, NormParams { w, b }, shape);
            }

            pub(crate) fn add_layernorm_forward(
                &self,
                out: &mut <Self as Memory>::Tensor,
                sum: &mut <Self as Memory>::Tensor,
                statistics: NormStatistics<&mut <Self as Memory>::F32>,
                x: &<Self as Memory>::Tensor,
                y: &<Self as Memory>::Tensor,
                w: &<Self as Memory>::Weights,
                b: &<Self as Memory>::Weights,
                rows: usize,
                channels: usize,
                epsilon: f32,
            ) {
                let [w, b] = [w, b].map(|p| self.param(p, alone(channels)));
                let shape = NormShape { rows, channels, epsilon };
                let (sum, params) = (ResidualSum { sum, x, y }, NormParams { w, b });
                Norm::add_layernorm_forward(self, out, statistics, sum, params, shape);
            }

            pub(crate) fn layernorm_backward(
                &self,
                workspace: &mut <Self as Memory>::Workspace,
                dx: &mut <Self as Memory>::Tensor,
                dw: &mut <Self as Memory>::F32,
                db: &mut <Self as Memory>::F32,
                dy: &<Self as Memory>::Tensor,
                x: &<Self as Memory>::Tensor,
                statistics: NormStatistics<&<Self as Memory>::F32>,
                w: &<Self as Memory>::Weights,
                rows: usize,
                channels: usize,
                accumulate: bool,
            ) {
                let w = self.param(w, alone(channels));
                let [dw, db] = [self.whole(dw), self.whole(db)];
                let shape = NormShape { rows, channels, epsilon: 0.0 };
                let operands = NormBackward { dx, dw, db, dy, x, statistics, w, accumulate };
                Norm::layernorm_backward(self, workspace, operands, shape);
            }

            pub(crate) fn linear_forward(
                &self,
                workspace: &mut <Self as Memory>::Workspace,
                y: &mut <Self as Memory>::Tensor,
                x: &<Self as Memory>::Tensor,
                w: &<Self as Memory>::Weights,
                b: &<Self as Memory>::Weights,
                shape: LinearShape,
                recipe: &LinearRecipe,
            ) {
                let w = self.param(w, alone(shape.inputs * shape.outputs));
                let b = self.param(b, alone(shape.outputs));
                let operands = LinearForward { y, x, w, b, epilogue: Epilogue::None };
                Linear::linear_forward(self, workspace, operands, shape, recipe);
            }

            pub(crate) fn linear_gelu_forward(
                &self,
                workspace: &mut <Self as Memory>::Workspace,
                out: &mut <Self as Memory>::Tensor,
                y: &mut <Self as Memory>::Tensor,
                x: &<Self as Memory>::Tensor,
                w: &<Self as Memory>::Weights,
                b: &<Self as Memory>::Weights,
                shape: LinearShape,
                recipe: &LinearRecipe,
                form: Activation,
            ) {
                let w = self.param(w, alone(shape.inputs * shape.outputs));
                let b = self.param(b, alone(shape.outputs));
                let operands = LinearForward { y, x, w, b, epilogue: Epilogue::Gelu { out, form } };
                Linear::linear_forward(self, workspace, operands, shape, recipe);
            }

            pub(crate) fn linear_backward(
                &self,
                workspace: &mut <Self as Memory>::Workspace,
                dx: &mut <Self as Memory>::Tensor,
                dw: &mut <Self as Memory>::F32,
                db: &mut <Self as Memory>::F32,
                dy: &<Self as Memory>::Tensor,
                x: &<Self as Memory>::Tensor,
                w: &<Self as Memory>::Weights,
                shape: LinearShape,
                recipe: &LinearRecipe,
                random: &Random,
                accumulate: bool,
            ) {
                let (dy, w) =
                    (OutputGradient::Whole(dy), self.param(w, alone(shape.inputs * shape.outputs)));
                let [dw, db] = [self.whole(dw), self.whole(db)];
                let operands = LinearBackward { dx, dw, db, dy, x, w, accumulate };
                Linear::linear_backward(self, workspace, operands, shape, recipe, random);
            }

            pub(crate) fn linear_gelu_backward(
                &self,
                workspace: &mut <Self as Memory>::Workspace,
                dx: &mut <Self as Memory>::Tensor,
                dw: &mut <Self as Memory>::F32,
                db: &mut <Self as Memory>::F32,
                d: &mut <Self as Memory>::Tensor,
                y: &<Self as Memory>::Tensor,
                x: &<Self as Memory>::Tensor,
                w: &<Self as Memory>::Weights,
                shape: LinearShape,
                recipe: &LinearRecipe,
                random: &Random,
                accumulate: bool,
                form: Activation,
            ) {
                let dy = OutputGradient::BehindGelu { d, y, form };
                let w = self.param(w, alone(shape.inputs * shape.outputs));
                let [dw, db] = [self.whole(dw), self.whole(db)];
                let operands = LinearBackward { dx, dw, db, dy, x, w, accumulate };
                Linear::linear_backward(self, workspace, operands, shape, recipe, random);
            }

            pub(crate) fn attention_backward(
                &self,
                workspace: &mut <Self as Memory>::Workspace,
                dqkv: &mut <Self as Memory>::Tensor,
                dout: &<Self as Memory>::Tensor,
                out: &<Self as Memory>::Tensor,
                lse: &<Self as Memory>::F32,
                qkv: &<Self as Memory>::Tensor,
                shape: AttentionShape,
            ) {
                let operands = AttentionBackward { dqkv, dout, out, lse, qkv };
                Attend::attention_backward(self, workspace, operands, shape);
            }

            pub(crate) fn classifier<'a>(
                &self,
                workspace: &mut <Self as Memory>::Workspace,
                losses: &'a mut <Self as Memory>::F32,
                gradient: Option<ClassifierGradient<'a, Self>>,
                x: &'a <Self as Memory>::Tensor,
                w: &'a <Self as Memory>::Weights,
                targets: &'a <Self as Memory>::Tokens,
                rows: usize,
                channels: usize,
                vocab_size: usize,
                precision: Precision,
            ) {
                let w = self.param(w, alone(channels * vocab_size));
                let operands = Classifier { losses, gradient, x, w, targets };
                let shape = HeadShape { rows, channels, vocab_size, precision };
                Head::classifier(self, workspace, operands, shape);
            }

            pub(crate) fn logits(
                &self,
                workspace: &mut <Self as Memory>::Workspace,
                logits: &mut <Self as Memory>::F32,
                x: &<Self as Memory>::Tensor,
                row: usize,
                w: &<Self as Memory>::Weights,
                channels: usize,
                vocab_size: usize,
                precision: Precision,
            ) {
                let w = self.param(w, alone(channels * vocab_size));
                let shape = HeadShape { rows: row + 1, channels, vocab_size, precision };
                Head::logits(self, workspace, logits, x, row, w, shape);
            }

            pub(crate) fn finish_step(
                &self,
                workspace: &mut <Self as Memory>::Workspace,
                reduction: &mut <Self as Optimize>::Reduction,
                trained: &mut Trained<'_, Self>,
                step: &OptimizerStep,
            ) -> StepSums {
                self.reduce(workspace, reduction, trained, step);
                self.update(reduction, trained, step).unwrap()
            }
        }
    };
}
calls!(Cpu, |flat: &[f32]| flat.len(), |w: &[f32]| w.len());
calls!(Cuda, |flat: &super::cuda::F32| flat.len(), |w: &super::cuda::Weights| w.len());
