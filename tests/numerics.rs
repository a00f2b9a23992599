//! What the numbers of MXFP4 training promise: unbiased products, a variance that the transform
//! tames, and whole-model gradients that converge to the exact ones.

use mxfp4train::formats::{
    Draw, GemmId, Mxfp4Matrix, Operand, OperandId, Purpose, Random, Range, Rounding, Source,
    product_scale, uniform,
};
use mxfp4train::{
    Engine, EngineOptions, Model, ModelConfig, Recipe, Schedule, Trainer, TrainerOptions,
};

/// N(0, 1), with 1% of entries of N(0, `outlier`^2).
fn normal(len: usize, seed: u64, outlier: f64) -> Vec<f32> {
    let draw = Draw::of(seed, Purpose::Weights, 5, 0);
    (0..len as u32)
        .map(|i| {
            let [a, b, c, d] = draw.bits(i, 0);
            let radius = (-2.0 * (1.0 - uniform(a, b)).ln()).sqrt();
            let value = radius * (std::f64::consts::TAU * uniform(c, d)).cos();
            (if draw.bits(i, 1)[0].is_multiple_of(100) { outlier * value } else { value }) as f32
        })
        .collect()
}

/// One unbiased product of a (m, k) and b (n, k), as a backward GEMM makes it.
fn product(a: &[f32], b: &[f32], m: usize, n: usize, group: usize, seed: u64) -> Vec<f32> {
    let random = Random { seed, step: 1, micro_step: 0, layer: 0, linear: 0 };
    let mut signs = vec![0.0; group];
    random.signs(GemmId::Wgrad).fill_signs(&mut signs);
    let quantize = |data: &[f32], rows: usize, operand| {
        let source = Source { data, rows, depth: data.len() / rows, transposed: false };
        Mxfp4Matrix::quantize(source, &signs, Rounding::Unbiased, &random.rounding(operand))
    };
    let mut c = quantize(a, m, OperandId::Dy).product(&quantize(b, n, OperandId::X));
    c.iter_mut().for_each(|v| *v *= product_scale(Rounding::Unbiased, Rounding::Unbiased));
    c
}

#[test]
fn unbiased_products_average_to_the_exact_one() {
    const SEEDS: u64 = 4096;
    let (m, n, k) = (6, 5, 128);
    let (a, b) = (normal(m * k, 1, 5.0), normal(n * k, 2, 5.0));
    for group in [0, 32, 64, 128] {
        let (mut sum, mut squares) = (vec![0.0f64; m * n], vec![0.0f64; m * n]);
        for seed in 0..SEEDS {
            for (i, v) in product(&a, &b, m, n, group, seed).into_iter().enumerate() {
                sum[i] += f64::from(v);
                squares[i] += f64::from(v).powi(2);
            }
        }
        let mut worst = 0.0f64;
        for i in 0..m * n {
            let dot = |(x, y): (&f32, &f32)| f64::from(*x) * f64::from(*y);
            let (row, column) = (&a[i / n * k..][..k], &b[i % n * k..][..k]);
            let exact: f64 = row.iter().zip(column).map(dot).sum();
            let mean = sum[i] / SEEDS as f64;
            let variance = squares[i] / SEEDS as f64 - mean * mean;
            assert!(variance > 0.0, "rounding that never varies is not stochastic");
            worst = worst.max((mean - exact).abs() / (variance / SEEDS as f64).sqrt());
        }
        println!("g {group:3}: the worst mean is {worst:.2} standard errors off");
        assert!(worst <= 4.0);
    }
}

/// Unbiased rounding never meets the edge of the grid: results stay neighbours of 0.75 v.
#[test]
fn nothing_clips() {
    let data = normal(64 * 256, 3, 5.0);
    let draw = Draw::of(9, Purpose::Rounding, 0, 0);
    let source = Source { data: &data, rows: 64, depth: 256, transposed: false };
    let q = Mxfp4Matrix::quantize(source, &[], Rounding::Unbiased, &draw);
    for (i, (v, got)) in data.iter().zip(q.dequantize()).enumerate() {
        let scale = mxfp4train::formats::decode_e8m0(q.scale(i / 256, i % 256 / 32));
        let wanted = 0.75 * v / scale;
        assert!(wanted.abs() <= 6.0, "element {i} lies beyond the grid: {wanted}");
        let step = if wanted.abs() < 2.0 {
            0.5
        } else if wanted.abs() < 4.0 {
            1.0
        } else {
            2.0
        };
        assert!((got / scale - wanted).abs() < step + 1e-5);
    }
}

/// Codes of a block in all of the range and in 3/4 of it, which were computed in fractions, and the
/// mean square of their errors: x_i = (((37 i + 11) mod 64) - 31.5) / 16.
#[test]
fn codes_are_those_of_exact_arithmetic() {
    let x: Vec<f32> = (0..32).map(|i| (((37 * i + 11) % 64) as f32 - 31.5) / 16.0).collect();
    for (range, codes, error) in [
        (Range::Full, "f6d78f4e6c71f5e7af3f6d79f4e6c71f", 0.025_390_625),
        (Range::ThreeQuarters, "e5c68f4d6b71e4d6af2e5c69f3d5b71e", 0.018_988_715),
    ] {
        let q = quantize_nearest(&x, 1, range);
        let hex: String = (0..32).map(|k| format!("{:x}", q.code(0, k))).collect();
        assert_eq!((hex.as_str(), q.scale(0, 0)), (codes, 125), "{range:?}");
        let factor = f64::from(range.factor());
        let square = |(x, v): (&f32, f32)| (f64::from(*x) - f64::from(v) / factor).powi(2);
        let mean = x.iter().zip(q.dequantize()).map(square).sum::<f64>() / 32.0;
        assert!((mean - error).abs() < 1e-9, "{range:?}: {mean}");
    }
}

fn quantize_nearest(data: &[f32], rows: usize, range: Range) -> Mxfp4Matrix {
    let source = Source { data, rows, depth: data.len() / rows, transposed: false };
    let operand = Operand::from(Rounding::Nearest).with_range(range).unwrap();
    Mxfp4Matrix::quantize(source, &[], operand, &Draw::of(0, Purpose::Rounding, 0, 0))
}

/// On Gaussian blocks whose deviations spread over an octave, nearest rounding in 3/4 of the range
/// has half of the error of unbiased rounding, and shrinks values to 0.9906 of themselves, for
/// 0.9776 where the largest saturate; where in the octave a deviation lies hardly matters.
#[test]
fn nearest_rounding_in_part_of_the_range_hardly_shrinks() {
    const EACH: usize = 1 << 17;
    const DEVIATIONS: u32 = 16;
    // Sums of squared errors, products and squares.
    let mut sums = [[0.0f64; 3]; 3];
    for i in 0..DEVIATIONS {
        let deviation = ((f64::from(i) + 0.5) / f64::from(DEVIATIONS)).exp2() as f32;
        let mut x = normal(EACH, 77 + u64::from(i), 1.0);
        x.iter_mut().for_each(|v| *v *= deviation);
        let source = Source { data: &x, rows: 1, depth: EACH, transposed: false };
        let draw = Draw::of(1, Purpose::Rounding, i, 0);
        let quantized = [
            (quantize_nearest(&x, 1, Range::Full), 1.0),
            (quantize_nearest(&x, 1, Range::ThreeQuarters), 0.75),
            (Mxfp4Matrix::quantize(source, &[], Rounding::Unbiased, &draw), 0.75),
        ];
        for (kind, (q, factor)) in quantized.iter().enumerate() {
            let mut these = [0.0; 3];
            for (x, v) in x.iter().zip(q.dequantize()) {
                let (x, v) = (f64::from(*x), f64::from(v) / factor);
                let terms = [(x - v).powi(2), x * v, x * x];
                these.iter_mut().zip(terms).for_each(|(sum, term)| *sum += term);
            }
            let slope = these[1] / these[2];
            assert!(kind != 1 || (slope - 0.9906).abs() < 2.5e-3, "{slope} at {deviation}");
            sums[kind].iter_mut().zip(these).for_each(|(sum, term)| *sum += term);
        }
    }
    let found = sums.map(|[errors, products, squares]| [errors / squares, products / squares]);
    println!("relative error and slope: {found:.4?}");
    for (found, expected) in found.iter().zip([[0.0135, 0.9776], [0.0137, 0.9906], [0.0279, 1.0]]) {
        let close = [2e-4, 1e-3].into_iter().zip(found.iter().zip(expected));
        assert!(
            close.into_iter().all(|(bound, (found, expected))| (found - expected).abs() < bound)
        );
    }
}

/// A run with seed 0 is a run like any other.
#[test]
fn seed_zero_rounds_stochastically() {
    let (a, b) = (normal(64, 1, 1.0), normal(64, 2, 1.0));
    let step = |step| {
        let random = Random { seed: 0, step, micro_step: 0, layer: 0, linear: 0 };
        let source = Source { data: &a, rows: 1, depth: 64, transposed: false };
        let draw = random.rounding(OperandId::Dy);
        Mxfp4Matrix::quantize(source, &[], Rounding::Unbiased, &draw).codes
    };
    assert_ne!(step(0), step(1));
    assert_ne!(product(&a, &b, 1, 1, 64, 0), product(&a, &b, 1, 1, 64, 1));
}

/// The paper's Figure 2 in kind: the variance of the unbiased product on inputs with outliers, by
/// reduction length. With the transform it is lower and grows more slowly, the more so the heavier
/// the outliers are.
#[test]
fn the_transform_tames_the_variance() {
    const SEEDS: u64 = 64;
    const PAIRS: usize = 36;
    let lengths = [256, 512, 1024, 2048, 4096];
    // Mean over pairs of vectors of the variance over seeds.
    let variance = |k: usize, outlier: f64, group: usize| {
        let (a, b) = (normal(6 * k, 11, outlier), normal(6 * k, 12, outlier));
        let (mut sum, mut squares) = ([0.0f64; PAIRS], [0.0f64; PAIRS]);
        for seed in 0..SEEDS {
            for (i, v) in product(&a, &b, 6, 6, group, seed).into_iter().enumerate() {
                sum[i] += f64::from(v);
                squares[i] += f64::from(v).powi(2);
            }
        }
        let each = sum.iter().zip(squares).map(|(sum, squares)| {
            let mean = sum / SEEDS as f64;
            squares / SEEDS as f64 - mean * mean
        });
        each.sum::<f64>() / PAIRS as f64
    };
    // Measured growth with over without the transform: 0.71 and 0.40.
    for (outlier, bound) in [(5.0, 0.75), (25.0, 0.5)] {
        println!("1% outliers of standard deviation {outlier}");
        println!("reduction length  variance without   g = 64  ratio");
        let table = lengths.map(|k| {
            let (plain, rotated) = (variance(k, outlier, 0), variance(k, outlier, 64));
            println!("{k:16}  {plain:16.1} {rotated:8.1}  {:5.2}", plain / rotated);
            assert!(rotated < plain);
            (plain, rotated)
        });
        let growth = |f: fn(&(f64, f64)) -> f64| f(&table[4]) - f(&table[0]);
        let ratio = growth(|t| t.1) / growth(|t| t.0);
        println!("growth with the transform over growth without: {ratio:.2}");
        assert!(ratio < bound);
    }
}

/// The mean over n draws of the default recipe's gradient approaches that of recipe `bf16`, whose
/// forward pass is the same, as 1 / sqrt(n): the rounding is unbiased through all layers. What
/// `bf16` rounds in its own backward pass is small beside the last of these errors.
#[test]
fn whole_model_gradients_converge() {
    let engine = Engine::new(EngineOptions { threads: 2, ..EngineOptions::default() }).unwrap();
    let config = ModelConfig {
        vocab_size: 61,
        context_length: 24,
        layers: 2,
        heads: 2,
        channels: 32,
        ..ModelConfig::default()
    };
    let model = Model::new(&engine, &config).unwrap();
    let tokens: Vec<u32> = (0..4 * 25u32).map(|i| (i * i + 7 * i) % 61).collect();
    let trainer = |recipe| {
        let options = TrainerOptions { batch_size: 4, recipe, ..TrainerOptions::default() };
        let mut trainer = Trainer::new(&model, options).unwrap();
        trainer.set_lr(Some(0.0)).unwrap(); // weights stay; every step draws fresh bits
        trainer
    };
    let gradient = |trainer: &mut Trainer| {
        trainer.step_tokens(&tokens).unwrap();
        let mut all = Vec::new();
        for info in model.tensors() {
            let mut values = vec![0.0; info.len()];
            trainer.read_gradient(&info.name, &mut values).unwrap();
            all.extend(values.into_iter().map(f64::from));
        }
        all
    };
    let plain = gradient(&mut trainer("bf16".parse().unwrap()));
    let norm = plain.iter().map(|v| v * v).sum::<f64>().sqrt();
    let mut mxfp4 = trainer(Recipe::default());
    let mut sum = vec![0.0; plain.len()];
    let mut errors = Vec::new();
    for n in 1..=1024u32 {
        sum.iter_mut().zip(gradient(&mut mxfp4)).for_each(|(sum, g)| *sum += g);
        if n.is_power_of_two() && n.trailing_zeros() % 2 == 0 {
            let square = |(sum, plain): (&f64, &f64)| (sum / f64::from(n) - plain).powi(2);
            let error = sum.iter().zip(&plain).map(square).sum::<f64>().sqrt() / norm;
            println!("mean of {n:4} gradients: relative error {error:.5}");
            errors.push(error);
        }
    }
    // Each factor of 4 in n halves the error.
    let rate = (errors[0] / errors[5]).powf(1.0 / 5.0);
    println!("a factor of {rate:.3} for each fourfold n");
    assert!((1.85..2.15).contains(&rate), "{errors:?}");
}

/// What a run in the last part of its steps is: with the same weights, the loss and all gradients
/// of `zhou-fp4` are those of `bf16`, bit for bit, and before that they are not.
#[test]
fn the_last_steps_of_zhou_fp4_are_in_bf16() {
    const STEPS: u64 = 25;
    let engine = Engine::new(EngineOptions { threads: 2, ..EngineOptions::default() }).unwrap();
    let config = ModelConfig {
        vocab_size: 61,
        context_length: 24,
        layers: 2,
        heads: 2,
        channels: 32,
        ..ModelConfig::default()
    };
    let model = Model::new(&engine, &config).unwrap();
    let tokens: Vec<u32> = (0..4 * 25u32).map(|i| (i * i + 7 * i) % 61).collect();
    let [mut zhou, mut bf16] = ["zhou-fp4", "bf16"].map(|recipe| {
        let schedule = Schedule { total_steps: STEPS, ..Schedule::default() };
        let recipe = recipe.parse().unwrap();
        let options =
            TrainerOptions { batch_size: 4, recipe, schedule, ..TrainerOptions::default() };
        let mut trainer = Trainer::new(&model, options).unwrap();
        trainer.set_lr(Some(0.0)).unwrap(); // weights stay
        trainer
    });
    let bits = |trainer: &mut Trainer| {
        let mut all = vec![trainer.step_tokens(&tokens).unwrap().loss.to_bits()];
        for info in model.tensors() {
            let mut values = vec![0.0; info.len()];
            trainer.read_gradient(&info.name, &mut values).unwrap();
            all.extend(values.into_iter().map(f32::to_bits));
        }
        all
    };
    // 8% of 25 steps are two.
    for step in 0..STEPS {
        let [ours, theirs] = [&mut zhou, &mut bf16].map(bits);
        assert_eq!(ours == theirs, step >= STEPS - 2, "step {step}");
    }
}
