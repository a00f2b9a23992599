//! The linear layers of a block: y = x W^T + b and its backward pass, in the formats of a recipe.

use super::device::gemm::{Operand, Product, Type};
use super::device::memory::{F32, Param, Tensor};
use super::quantize::carrier::{Carrier, Format};
use super::quantize::random::Drawn;
use super::quantize::{BehindGelu, Quantization, Source, Target, fp8, sums};
use super::{Cuda, Workspace, gelu};
use crate::backend::{Activation, LinearShape};
use crate::mx::{self, GemmId, OperandId, Random, Rounding};
use crate::recipe::{Backward, Forward, LinearRecipe};

/// y (rows, outputs) = x (rows, inputs) W (outputs, inputs)^T + b, and with `gelu` that form of it
/// of y.
pub(super) fn forward(
    cuda: &Cuda,
    workspace: &Workspace,
    y: &mut Tensor,
    gelu: Option<(&mut Tensor, Activation)>,
    x: &Tensor,
    w: &Param,
    b: &Param,
    shape: LinearShape,
    format: Forward,
) {
    let LinearShape { rows, inputs, outputs } = shape;
    let precision = x.precision;
    let (mut operands, mut scales) = ([precision.into(); 2], None);
    let (x, w) = if format == Forward::Fp8 {
        let (master, amax) = (Source::master(w), w.amax.address);
        let weights = workspace.right.elements.address;
        let carrier = Carrier::of(Format::Fp8, cuda.gpu.capability, shape);
        if carrier == Carrier::Fp8 {
            let x_amax = fp8::amax_of(cuda, &workspace.x_amax, x);
            let kept = workspace.kept.address;
            let factors = [&workspace.left, &workspace.right].map(|room| room.scales.address);
            fp8::convert(cuda, kept, factors[0], Source::of(x), x_amax, rows * inputs);
            fp8::convert(cuda, weights, factors[1], master, amax, outputs * inputs);
            (operands, scales) = (carrier.types(Format::Fp8), Some(factors));
            (kept, weights)
        } else {
            let kept_amax = workspace.kept_amax.address;
            fp8::round(cuda, weights, kept_amax, master, amax, outputs * inputs);
            (fp8::keep(cuda, workspace, x, rows * inputs).0, weights)
        }
    } else {
        (x.address(), w.as_read_in(precision))
    };
    let [left, right] = [x, w].map(|address| Operand::rows(address, inputs));
    let sizes = [rows, outputs, inputs];
    let product = Product {
        operands,
        bias: Some(b.as_read_in(precision)),
        scales,
        ..Product::new(precision.into(), sizes, left, right, y.write().address)
    };
    cuda.product(workspace, &product);
    // NOTE: cuBLASLt could apply GELU as it stores y, and its derivative to dx. On an H200 that
    // gains 0.4 and 0.5 ms of a 63 ms step (its kernels with these epilogues are slower), and its
    // bits are not those of our kernel, which recomputing needs.
    if let Some((out, form)) = gelu {
        gelu::forward(cuda, out, y, rows * outputs, form);
    }
}

/// The gradient dy (rows, outputs) of a layer's result.
pub(super) enum Gradient<'a> {
    Whole(&'a Tensor),
    /// d gelu'(pre), where d is the gradient of gelu(pre).
    BehindGelu {
        d: &'a mut Tensor,
        pre: &'a Tensor,
        form: Activation,
    },
}

/// dx (rows, inputs) = dy W, dw (outputs, inputs) = dy^T x and db = column sums of dy, the latter
/// two added with `accumulate`.
pub(super) fn backward(
    cuda: &Cuda,
    workspace: &Workspace,
    dx: &mut Tensor,
    dw: &mut F32,
    db: &mut F32,
    gradient: Gradient<'_>,
    x: &Tensor,
    w: &Param,
    shape: LinearShape,
    recipe: &LinearRecipe,
    random: &Random,
    accumulate: bool,
) {
    let LinearShape { rows, inputs, outputs } = shape;
    let mxfp4 = |format| match format {
        Backward::Mxfp4(format) => Some(format),
        Backward::F32 | Backward::Bf16 => None,
    };
    let (for_dgrad, for_wgrad) = (mxfp4(recipe.dgrad), mxfp4(recipe.wgrad));
    let in_fp8 = recipe.forward == Forward::Fp8;
    let carrier = Carrier::of(Format::Mxfp4, cuda.gpu.capability, shape);
    // Where dy is quantized for both products at once, and with what.
    let both = for_dgrad.filter(|first| {
        let short = first.transform.is_none_or(|transform| transform.group <= 64);
        for_wgrad == Some(*first) && carrier != Carrier::Bf16 && short
    });
    let (dy, pre) = match gradient {
        Gradient::Whole(dy) => (dy, None),
        Gradient::BehindGelu { d, pre, form } => {
            let group = both.and_then(|format| format.transform).map(|transform| transform.group);
            // The kernels that quantize know the tanh form alone.
            let fused = form == Activation::GeluTanh
                && carrier == Carrier::Fp8
                && group.is_some_and(BehindGelu::takes);
            if !fused {
                gelu::backward(cuda, d, pre, rows * outputs, form);
            }
            (&*d, fused.then_some(pre))
        }
    };
    let precision = dy.precision;
    let [left, right] =
        [Operand::rows(dy.address(), outputs), Operand::columns(w.as_read_in(precision), inputs)];
    let (sizes, to) = ([rows, inputs, outputs], dx.write().address);
    let dgrad = Product::new(precision.into(), sizes, left, right, to);
    let is_mxfp4 = for_dgrad.is_some() || for_wgrad.is_some();
    let amax = match pre {
        None if carrier == Carrier::Fp8 && is_mxfp4 => fp8::amax_of(cuda, &workspace.dy_amax, dy),
        _ => 0,
    };
    let [dy_rows, dy_columns, other] = workspace.targets(carrier);
    let partials = workspace.partials.address;
    let of_dy = Quantization {
        source: Source::of(dy),
        rows,
        cols: outputs,
        by_rows: None,
        by_columns: None,
        sums: partials,
        amax,
        clamped: workspace.clamped.address,
        kept: false,
        rounding: Rounding::Nearest,
        drawn: Drawn {
            random: *random,
            gemms: [GemmId::Dgrad, GemmId::Wgrad],
            operand: OperandId::Dy,
            transform: None,
        },
    };
    let quantized_both = both.map(|format| {
        let both = Quantization {
            by_rows: Some(dy_rows),
            by_columns: Some(dy_columns),
            ..of_dy.with(format.dy, format.transform)
        };
        // NOTE: on an H100, (16384, 4096) take 119 us; the forms by themselves take 74 and 77.
        match pre {
            None => both.run(cuda),
            Some(pre) => {
                let attempt = dy.zeroed_words(BehindGelu::WORDS).unwrap_or_else(|| {
                    cuda.clear(workspace.attempt.address, 4 * BehindGelu::WORDS as usize);
                    workspace.attempt.address
                });
                BehindGelu { both, pre: pre.address(), attempt }.run(cuda)
            }
        }
    });

    match for_dgrad {
        None => cuda.product(workspace, &dgrad),
        Some(format) => {
            let of_dy = of_dy.with(format.dy, format.transform);
            if quantized_both.is_none() {
                Quantization { by_rows: Some(dy_rows), ..of_dy }.run(cuda);
            }
            let of_w = Quantization {
                source: Source::master(w),
                rows: outputs,
                cols: inputs,
                by_columns: Some(other),
                sums: 0,
                amax: w.amax.address,
                rounding: format.other,
                drawn: Drawn { gemms: [GemmId::Dgrad; 2], operand: OperandId::W, ..of_dy.drawn },
                ..of_dy
            };
            of_w.run(cuda);
            let [depth, _] = of_dy.depths();
            let alpha = mx::product_scale(format.dy, format.other);
            cuda.product(workspace, &quantized(dgrad, [dy_rows, other], depth, alpha));
        }
    }

    // What the forward pass kept of x: in an FP8 recipe its FP8 form.
    let mut kept = Source::of(x);
    let mut x_amax = 0;
    if carrier == Carrier::Fp8 && for_wgrad.is_some() {
        x_amax = fp8::amax_of(cuda, &workspace.x_amax, x);
    } else if in_fp8 {
        (kept.address, x_amax) = fp8::keep(cuda, workspace, x, rows * inputs);
    }
    let [left, right] =
        [Operand::columns(dy.address(), outputs), Operand::columns(kept.address, inputs)];
    let sizes = [outputs, inputs, rows];
    let wgrad = Product {
        c_type: Type::F32,
        accumulate,
        ..Product::new(precision.into(), sizes, left, right, dw.address())
    };
    match for_wgrad {
        None => {
            cuda.product(workspace, &wgrad);
            sums::bias_gradient(cuda, workspace, db, dy, (rows, outputs), accumulate);
        }
        Some(format) => {
            let of_dy = of_dy.with(format.dy, format.transform);
            let parts = quantized_both.unwrap_or_else(|| {
                Quantization { by_columns: Some(dy_columns), ..of_dy }.run(cuda)
            });
            let of_x = Quantization {
                source: kept,
                cols: inputs,
                by_columns: Some(other),
                sums: 0,
                amax: x_amax,
                kept: in_fp8,
                rounding: format.other,
                drawn: Drawn { gemms: [GemmId::Wgrad; 2], operand: OperandId::X, ..of_dy.drawn },
                ..of_dy
            };
            of_x.run(cuda);
            let [_, depth] = of_dy.depths();
            let alpha = mx::product_scale(format.dy, format.other);
            cuda.product(workspace, &quantized(wgrad, [dy_columns, other], depth, alpha));
            sums::add_partials(cuda, db, None, partials, parts, outputs, accumulate);
        }
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
