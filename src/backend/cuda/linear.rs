//! The linear layers of a block: y = x W^T + b and its backward pass, in the formats of a recipe.

use super::device::gemm::{Operand, Product, Type};
use super::device::memory::{Arena, Param, Piece, Tensor};
use super::quantize::carrier::Carrier;
use super::quantize::random::Drawn;
use super::quantize::values::{self, Matrix, Of};
use super::quantize::{Behind, Kept, Made, Quantization, Source, Target, fp8, power_rule, sums};
use super::{Cuda, Workspace, gelu, kernel, swiglu};
use crate::backend::{
    Activation, Epilogue, Linear, LinearBackward, LinearForward, LinearShape, Numbers,
    OutputGradient,
};
use crate::formats::{
    self, Element, Format, Gemm, GemmId, LinearRecipe, OperandId, OperandSource, PowerRule, Random,
};

/// x and W of a layer as FP8 bytes down their columns, for wgrad and dgrad, and their scales.
///
/// The forward pass has just read both, so that all this costs is to write them; made again in the
/// backward pass they would be read once more, too. x takes half of what bf16 does, which the
/// backward pass then does not need.
pub(crate) struct Turned {
    x: Piece,
    w: Piece,
    scales: Piece,
}

impl Turned {
    /// Where the bytes of x and of W lie, each with its scale: at multiples of 16 bytes, as
    /// cuBLASLt wants.
    fn places(&self) -> [[u64; 2]; 2] {
        let Self { x, w, scales } = self;
        [[x.address, scales.address], [w.address, scales.address + 16]]
    }
}

impl Linear for Cuda {
    type Turned = Turned;

    fn turns(&self, shape: LinearShape, recipe: &LinearRecipe) -> bool {
        values::are_all_in_fp8(self.gpu.capability, recipe, shape)
    }

    fn turned(&self, arena: &mut Arena, shape: LinearShape) -> Turned {
        let LinearShape { rows, inputs, outputs } = shape;
        let [x, w, scales] = [rows * inputs, outputs * inputs, 32].map(|bytes| arena.bytes(bytes));
        Turned { x, w, scales }
    }

    fn linear_forward(
        &self,
        workspace: &mut Workspace,
        LinearForward { y, x, w, b, mean, epilogue, turned }: LinearForward<'_, Self>,
        shape: LinearShape,
        recipe: &LinearRecipe,
    ) {
        let LinearShape { rows, inputs, outputs } = shape;
        let carrier = values::carrier_of_mxfp4(self.gpu.capability, shape);
        match Of::Forward.gemm(recipe, carrier) {
            None => self.forward_product(workspace, y, (x, &w, b.as_ref(), turned), shape, recipe),
            Some(gemm) => {
                let precision = x.precision;
                let bias = b.as_ref().map(|b| b.as_read_in(precision));
                let to = values::Output {
                    address: y.write().address,
                    precision,
                    bias,
                    accumulate: false,
                    tensor: 0,
                    pass: Some(x),
                };
                let x = Matrix::of(x, rows, inputs, OperandId::X);
                let w = Matrix::master(&w, outputs, inputs).with_mean(mean);
                let of = (Of::Forward, recipe, gemm);
                values::multiply(self, workspace, of, [x, w], &Random::NONE, to);
            }
        }
        // NOTE: cuBLASLt could apply GELU as it stores y, and its derivative to dx. On an H200 that
        // gains 0.4 and 0.5 ms of a 63 ms step (its kernels with these epilogues are slower), and
        // its bits are not those of our kernel, which recomputing needs.
        match epilogue {
            Epilogue::None => {}
            Epilogue::Gelu { out, form } => self.gelu_forward(out, y, rows * outputs, form),
            Epilogue::SwiGlu { out } => self.swiglu_forward(out, y, rows, outputs / 2),
        }
    }

    fn linear_backward(
        &self,
        workspace: &mut Workspace,
        operands: LinearBackward<'_, Self>,
        shape: LinearShape,
        recipe: &LinearRecipe,
        random: &Random,
    ) {
        let LinearBackward { dx, dw, db, dy, x, turned, w, mean, accumulate } = operands;
        let LinearShape { rows, inputs, outputs } = shape;
        let carrier = values::carrier_of_mxfp4(self.gpu.capability, shape);
        let by_values =
            [Of::Dgrad, Of::Wgrad].map(|of| Some((of, recipe, of.gemm(recipe, carrier)?)));
        let in_mxfp4 = |gemm: &&Gemm| values::is_in_powers(gemm);
        let [dgrad, wgrad] = recipe.backward().map(|gemm| Some(gemm).filter(in_mxfp4));
        let for_dgrad = dgrad.filter(|_| by_values[0].is_none());
        let for_wgrad = wgrad.filter(|_| by_values[1].is_none());
        // Where dy is quantized for both products at once, and as what.
        let both = for_dgrad.filter(|gemm| carrier != Carrier::Bf16 && gemm.group() <= 64);
        let both = both.zip(for_wgrad).filter(|(first, second)| first.a() == second.a());
        let both = both.map(|(gemm, _)| gemm).filter(|_| dw.is_some());
        let fuses = carrier == Carrier::Fp8 && both.is_some_and(|gemm| Behind::takes(gemm.a()));
        // Where the kernels that quantize make it, what it is made of.
        let (dy, pre) = match dy {
            OutputGradient::Whole(dy) => (dy, None),
            // They know the tanh form alone.
            OutputGradient::BehindGelu { d, y, form: Activation::GeluTanh } if fuses => {
                (&*d, Some((Made::Gelu, y)))
            }
            OutputGradient::BehindGelu { d, y, form } => {
                self.gelu_backward(d, y, rows * outputs, form);
                (&*d, None)
            }
            OutputGradient::BehindSwiGlu { d, y } if fuses => (d, Some((Made::SwiGlu, &*y))),
            OutputGradient::BehindSwiGlu { d, y } => {
                self.swiglu_backward(y, d, rows, outputs / 2);
                (&*y, None)
            }
        };
        let precision = dy.precision;
        let [left, right] = [
            Operand::rows(dy.address(), outputs),
            Operand::columns(w.as_read_in(precision), inputs),
        ];
        let (sizes, to) = ([rows, inputs, outputs], dx.write().address);
        let dgrad = Product::new(precision.into(), sizes, left, right, to);
        let is_mxfp4 = for_dgrad.is_some() || for_wgrad.is_some();
        let amax = match pre {
            None if carrier == Carrier::Fp8 && is_mxfp4 => {
                fp8::amax_of(self, &workspace.dy_amax, dy, rows * outputs)
            }
            _ => 0,
        };
        let [dy_rows, dy_columns, other] = workspace.targets(carrier);
        let partials = workspace.partials.address;
        // No form of it yet.
        let of_dy = |operand: &formats::Operand| Quantization {
            source: Source::of(dy),
            rows,
            cols: outputs,
            by_rows: None,
            by_columns: None,
            sums: partials,
            amax,
            clamped: workspace.clamped.address,
            kept: Kept::AsStored,
            rounding: operand.rounding(),
            rule: power_rule(operand).unwrap_or(PowerRule::Floor),
            range: operand.range(),
            drawn: Drawn {
                random: *random,
                gemms: [GemmId::Dgrad, GemmId::Wgrad],
                operand: OperandId::Dy,
                transform: operand.transform(),
            },
        };
        let quantized_both = both.map(|gemm| {
            let both = Quantization {
                by_rows: Some(dy_rows),
                by_columns: Some(dy_columns),
                ..of_dy(gemm.a())
            };
            // NOTE: on an H100, (16384, 4096) take 119 us; the forms by themselves take 74 and 77.
            match pre {
                None => both.run(self),
                Some((made, pre)) => {
                    let attempt = dy.zeroed_words(Behind::WORDS).unwrap_or_else(|| {
                        self.clear(workspace.attempt.address, 4 * Behind::WORDS as usize);
                        workspace.attempt.address
                    });
                    Behind { made, both, pre: pre.address(), attempt }.run(self)
                }
            }
        });

        let whole_dy = Matrix::of(dy, rows, outputs, OperandId::Dy);
        let both_in_fp8 = by_values[0]
            .and(by_values[1])
            .filter(|_| dw.is_some())
            .and_then(|_| values::both_in_fp8(self, workspace, recipe, whole_dy, inputs));
        let (forms_of_dy, parts) = match both_in_fp8 {
            Some((forms, parts)) => (forms, Some(parts)),
            None => ([whole_dy, whole_dy.turned()], None),
        };
        match (for_dgrad, by_values[0]) {
            (None, None) => self.product(workspace, &dgrad),
            (None, Some(of)) => {
                let w = Matrix::master(&w, outputs, inputs).with_mean(mean).turned();
                let w = Matrix { fp8: turned.map(|turned| turned.places()[1]), ..w };
                let to = values::Output {
                    address: to,
                    precision,
                    bias: None,
                    accumulate: false,
                    tensor: x.address(),
                    pass: Some(dy),
                };
                values::multiply(self, workspace, of, [forms_of_dy[0], w], random, to);
            }
            (Some(gemm), _) => {
                let dy = of_dy(gemm.a());
                if quantized_both.is_none() {
                    Quantization { by_rows: Some(dy_rows), ..dy }.run(self);
                }
                let of_w = Quantization {
                    source: Source::weights(&w),
                    rows: outputs,
                    cols: inputs,
                    by_columns: Some(other),
                    sums: 0,
                    amax: w.amax.address,
                    kept: kept_by(Of::Dgrad, recipe, gemm),
                    drawn: dy.drawn.of_other(GemmId::Dgrad, OperandId::W),
                    ..of_dy(gemm.b())
                };
                of_w.run(self);
                let [depth, _] = dy.depths();
                let operands = [dy_rows, other];
                self.product(workspace, &quantized(dgrad, operands, depth, gemm.alpha()));
            }
        }

        let Some(dw) = dw else {
            if let Some(mut db) = db {
                let shape = (rows, outputs);
                sums::bias_gradient(self, workspace, &mut db, dy, shape, accumulate);
            }
            return;
        };
        // What the forward pass kept of x, or x itself.
        let kept_of_x = kept_by(Of::Wgrad, recipe, recipe.wgrad());
        let in_fp8 = kept_of_x == Kept::AsE4m3 && by_values[1].is_none();
        let mut kept = Source::of(x);
        let mut x_amax = 0;
        if carrier == Carrier::Fp8 && for_wgrad.is_some() {
            x_amax = fp8::amax_of(self, &workspace.x_amax, x, rows * inputs);
        } else if in_fp8 {
            (kept.address, x_amax) = fp8::keep(self, workspace, x, rows * inputs);
        }
        let [left, right] =
            [Operand::columns(dy.address(), outputs), Operand::columns(kept.address, inputs)];
        let sizes = [outputs, inputs, rows];
        let wgrad = Product {
            c_type: dw.place.precision.into(),
            accumulate,
            ..Product::new(precision.into(), sizes, left, right, dw.address())
        };
        match for_wgrad {
            None => {
                match by_values[1] {
                    None => self.product(workspace, &wgrad),
                    Some(of) => {
                        let to = values::Output {
                            address: dw.address(),
                            precision: dw.place.precision,
                            bias: None,
                            accumulate,
                            tensor: w.whole().unwrap_or(0),
                            pass: Some(dy),
                        };
                        let x = Matrix::of(x, rows, inputs, OperandId::X).turned();
                        let x = Matrix { fp8: turned.map(|turned| turned.places()[0]), ..x };
                        values::multiply(self, workspace, of, [forms_of_dy[1], x], random, to);
                    }
                }
                let Some(mut db) = db else { return };
                let shape = (rows, outputs);
                match parts {
                    None => sums::bias_gradient(self, workspace, &mut db, dy, shape, accumulate),
                    Some(parts) => {
                        let db = &mut db;
                        sums::add_partials(self, db, partials, parts, outputs, accumulate);
                    }
                }
            }
            Some(gemm) => {
                let dy = of_dy(gemm.a());
                let parts = quantized_both.unwrap_or_else(|| {
                    Quantization { by_columns: Some(dy_columns), ..dy }.run(self)
                });
                let of_x = Quantization {
                    source: kept,
                    cols: inputs,
                    by_columns: Some(other),
                    sums: 0,
                    amax: x_amax,
                    kept: kept_of_x,
                    drawn: dy.drawn.of_other(GemmId::Wgrad, OperandId::X),
                    ..of_dy(gemm.b())
                };
                of_x.run(self);
                let [_, depth] = dy.depths();
                let operands = [dy_columns, other];
                self.product(workspace, &quantized(wgrad, operands, depth, gemm.alpha()));
                let Some(mut db) = db else { return };
                sums::add_partials(self, &mut db, partials, parts, outputs, accumulate);
            }
        }
    }

    fn numbers(&self, shape: LinearShape, recipe: &LinearRecipe) -> [Numbers; 3] {
        Of::ALL.map(|of| of.numbers(recipe, self.gpu.capability, shape))
    }

    fn gelu_forward(&self, out: &mut Tensor, x: &Tensor, len: usize, form: Activation) {
        let name = match form {
            Activation::GeluTanh => kernel!(out, "gelu_of_all", false, false),
            Activation::Gelu => kernel!(out, "gelu_of_all", true, false),
        };
        gelu::of_all(self, name, out, x, len);
    }

    fn gelu_backward(&self, d: &mut Tensor, x: &Tensor, len: usize, form: Activation) {
        let name = match form {
            Activation::GeluTanh => kernel!(d, "gelu_of_all", false, true),
            Activation::Gelu => kernel!(d, "gelu_of_all", true, true),
        };
        gelu::of_all(self, name, d, x, len);
    }

    fn swiglu_forward(&self, out: &mut Tensor, y: &Tensor, rows: usize, m: usize) {
        swiglu::forward(self, out, y, rows, m);
    }

    fn swiglu_backward(&self, y: &mut Tensor, d: &Tensor, rows: usize, m: usize) {
        swiglu::backward(self, y, d, rows, m);
    }
}

impl Cuda {
    /// y = x W^T + b in f32, bf16 or FP8.
    fn forward_product(
        &self,
        workspace: &Workspace,
        y: &mut Tensor,
        (x, w, b, turned): (&Tensor, &Param<'_>, Option<&Param<'_>>, Option<&mut Turned>),
        shape: LinearShape,
        recipe: &LinearRecipe,
    ) {
        let LinearShape { rows, inputs, outputs } = shape;
        let precision = x.precision;
        let (mut operands, mut scales) = ([precision.into(); 2], None);
        let mut depth = inputs;
        let (x, w) = if values::is_in_powers(recipe.forward()) {
            let [left, _, right] = workspace.targets(Carrier::Fp8);
            // Both in the format with more bits: neither is a gradient.
            let left = Target { format: right.format, ..left };
            let of_x = Quantization {
                source: Source::of(x),
                rows,
                cols: inputs,
                by_rows: Some(left),
                by_columns: None,
                sums: 0,
                amax: fp8::amax_of(self, &workspace.x_amax, x, rows * inputs),
                clamped: workspace.clamped.address,
                kept: Kept::AsStored,
                rounding: recipe.forward().a().rounding(),
                rule: power_rule(recipe.forward().a()).unwrap_or(PowerRule::Floor),
                range: recipe.forward().a().range(),
                drawn: Drawn {
                    random: Random::NONE,
                    gemms: [GemmId::Dgrad; 2],
                    operand: OperandId::X,
                    transform: None,
                },
            };
            let of_w = Quantization {
                source: Source::weights(w),
                rows: outputs,
                by_rows: Some(right),
                amax: w.amax.address,
                rule: power_rule(recipe.forward().b()).unwrap_or(PowerRule::Floor),
                range: recipe.forward().b().range(),
                ..of_x
            };
            of_x.run(self);
            of_w.run(self);
            depth = of_x.depths()[0];
            (operands, scales) = ([left.format, right.format], Some([left.scales, right.scales]));
            (left.out, right.out)
        } else if recipe.forward().is_in(Format::E4M3) {
            let (master, amax) = (Source::weights(w), w.amax.address);
            let weights = workspace.right.elements.address;
            let carrier = Carrier::of(Format::E4M3, self.gpu.capability, shape);
            if carrier == Carrier::Fp8 {
                let x_amax = fp8::amax_of(self, &workspace.x_amax, x, rows * inputs);
                let kept = workspace.kept.address;
                let e4m3 = Element::E4m3;
                let factors = if let Some([of_x, of_w]) = turned.map(|turned| turned.places()) {
                    let to = |rows, [columns, scale]: [u64; 2]| [rows, columns, scale, 0];
                    let (x, sizes) = (Source::of(x), [[rows, inputs], [outputs, inputs]]);
                    fp8::convert_both(self, e4m3, to(kept, of_x), x, x_amax, sizes[0]);
                    fp8::convert_both(self, e4m3, to(weights, of_w), master, amax, sizes[1]);
                    [of_x[1], of_w[1]]
                } else {
                    let factors =
                        [&workspace.left, &workspace.right].map(|room| room.scales.address);
                    let (of_x, of_w) = ([kept, factors[0]], [weights, factors[1]]);
                    fp8::convert(self, e4m3, of_x, Source::of(x), x_amax, rows * inputs);
                    fp8::convert(self, e4m3, of_w, master, amax, outputs * inputs);
                    factors
                };
                (operands, scales) = (carrier.types(Format::E4M3), Some(factors));
                (kept, weights)
            } else {
                let kept_amax = workspace.kept_amax.address;
                fp8::round(self, weights, kept_amax, master, amax, outputs * inputs);
                (fp8::keep(self, workspace, x, rows * inputs).0, weights)
            }
        } else {
            (x.address(), w.as_read_in(precision))
        };
        let [left, right] = [x, w].map(|address| Operand::rows(address, depth));
        let sizes = [rows, outputs, depth];
        let product = Product {
            operands,
            bias: b.map(|b| b.as_read_in(precision)),
            scales,
            alpha: recipe.forward().alpha(),
            ..Product::new(precision.into(), sizes, left, right, y.write().address)
        };
        self.product(workspace, &product);
    }
}

/// What operand B of a backward product is made from.
fn kept_by(of: Of, recipe: &LinearRecipe, gemm: &Gemm) -> Kept {
    match (gemm.b().source(), power_rule(of.forward(recipe))) {
        (OperandSource::HighPrecision, _) => Kept::AsStored,
        (OperandSource::Forward, Some(rule)) => Kept::AsMxfp4(rule, of.forward(recipe).range()),
        (OperandSource::Forward, None) => Kept::AsE4m3,
    }
}

/// `plain` with these operands, both along the reduction and so long.
fn quantized(plain: Product, [a, b]: [Target; 2], depth: usize, alpha: f32) -> Product {
    Product {
        k: depth,
        operands: [a.format, b.format],
        a: Operand::rows(a.out, depth),
        b: Operand::rows(b.out, depth),
        alpha,
        scales: (a.format != Type::Bf16).then_some([a.scales, b.scales]),
        ..plain
    }
}
