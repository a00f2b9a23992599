//! GEMMs and the packing of their operands, for the shapes of layers 384 and 768 wide, on every format.
//!
//! `cargo bench --bench gemm`. Packing is given in GB/s of f32 read; GEMMs in GFLOP/s with operands
//! ready. Formats take turns, and every figure is a median.

use std::time::Instant;

use mxfp4train::backend::cpu::Cpu;
use mxfp4train::backend::cpu::gemm::{
    BLOCK_STEPS, Format, Matrix, Output, PANEL, PackedMut, Rotation, pack,
};
use mxfp4train::mx::{GemmId, LinearId, OperandId, Random, Rounding};

const ROUNDS: usize = 9;
const TOKENS: usize = 2048;

struct Memory {
    words: Vec<u32>,
    scales: Vec<f32>,
    sums: Vec<i32>,
}

impl Memory {
    fn new(rows: usize, depth: usize) -> Self {
        let words = rows.next_multiple_of(PANEL) * depth.next_multiple_of(256);
        let blocks = words / BLOCK_STEPS;
        Self { words: vec![0; words], scales: vec![0.0; blocks], sums: vec![0; blocks] }
    }

    fn as_mut(&mut self) -> PackedMut<'_> {
        PackedMut {
            words: &mut self.words,
            scales: &mut self.scales,
            sums: &mut self.sums,
            vector_sums: &mut [],
        }
    }
}

fn median(mut seconds: Vec<f64>) -> f64 {
    seconds.sort_by(f64::total_cmp);
    seconds[seconds.len() / 2]
}

fn time(f: impl FnOnce()) -> f64 {
    let start = Instant::now();
    f();
    start.elapsed().as_secs_f64()
}

fn values(len: usize) -> Vec<f32> {
    let mut state = 1u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        f64::from(state >> 8) / f64::from(1 << 24) - 0.5
    };
    (0..len).map(|_| (next() + next() + next()) as f32).collect()
}

fn main() {
    let threads = std::env::var("MXT_BENCH_THREADS").map_or(0, |n| n.parse().unwrap());
    let cpu = Cpu::new(threads).unwrap();
    println!("{} threads, {}", cpu.threads(), cpu.isa().name());
    let random = Random { seed: 1, step: 1, micro_step: 0, layer: 0, linear: LinearId::Fc1 };
    let mut signs = vec![0.0; 64];
    random.signs(GemmId::Dgrad).fill_signs(&mut signs);
    let rotation =
        |signs, rounding| Some(Rotation { signs, rounding, draw: random.rounding(OperandId::Dy) });
    let formats: [(&str, Format, Option<Rotation<'_>>); 6] = [
        ("f32", Format::F32, None),
        ("bf16", Format::Bf16, None),
        ("mxfp4", Format::Mxfp4, rotation(&[], Rounding::Nearest)),
        ("mxfp4-rht", Format::Mxfp4, rotation(&signs, Rounding::Nearest)),
        ("mxfp4-sr", Format::Mxfp4, rotation(&[], Rounding::Unbiased)),
        ("mxfp4-rht-sr", Format::Mxfp4, rotation(&signs, Rounding::Unbiased)),
    ];

    let (rows, depth) = (TOKENS, 1536);
    let data = values(rows * depth);
    let mut memory = Memory::new(rows, depth);
    println!("\npacking {rows} x {depth}        rows GB/s   transposed GB/s");
    for (name, format, rotation) in &formats {
        let rate = |memory: &mut Memory, matrix: Matrix<'_>| {
            let run = |_| {
                time(|| {
                    pack(&cpu, &matrix, *format, rotation.as_ref(), false, memory.as_mut());
                })
            };
            (rows * depth * 4) as f64 / median((0..ROUNDS).map(run).collect()) / 1e9
        };
        let by_rows = rate(&mut memory, Matrix::rows_by_depth(&data, rows, depth));
        let transposed = rate(&mut memory, Matrix::depth_by_rows(&data, rows, depth));
        println!("{name:18} {by_rows:18.1} {transposed:17.1}");
    }

    println!(
        "\nGEMM, operands ready          f32     bf16    mxfp4  GFLOP/s   mxfp4/f32  mxfp4/bf16"
    );
    for c in [384, 768] {
        let tokens = if c == 384 { TOKENS } else { TOKENS / 2 };
        for (what, m, n, k) in [
            ("qkv forward", tokens, 3 * c, c),
            ("fc1 forward", tokens, 4 * c, c),
            ("fc1 dgrad", tokens, c, 4 * c),
            ("proj dgrad", tokens, c, c),
            ("fc1 wgrad", 4 * c, c, tokens),
            ("proj wgrad", c, c, tokens),
        ] {
            let (a, b) = (values(m * k), values(n * k));
            let (a, b) = (Matrix::rows_by_depth(&a, m, k), Matrix::rows_by_depth(&b, n, k));
            let mut memories: Vec<(Memory, Memory)> =
                (0..3).map(|_| (Memory::new(m, k), Memory::new(n, k))).collect();
            let packed: Vec<_> = memories
                .iter_mut()
                .zip(&formats)
                .map(|((ma, mb), (_, format, rotation))| {
                    let rotation = rotation.as_ref();
                    let a = pack(&cpu, &a, *format, rotation, false, ma.as_mut());
                    (a, pack(&cpu, &b, *format, rotation, true, mb.as_mut()))
                })
                .collect();
            let mut result = vec![0.0; m * n];
            let mut seconds = [const { Vec::new() }; 3];
            for _ in 0..ROUNDS {
                for ((a, b), seconds) in packed.iter().zip(&mut seconds) {
                    let out = Output {
                        c: &mut result,
                        stride: n,
                        alpha: 1.0,
                        bias: None,
                        accumulate: false,
                    };
                    seconds.push(time(|| cpu.gemm(*a, *b, out)));
                }
            }
            let rates = seconds.map(|s| 2.0 * (m * n * k) as f64 / median(s) / 1e9);
            let [f32, bf16, mxfp4] = rates;
            println!(
                "{c:4} {what:12} {m:5}x{n:4}x{k:4} {f32:7.0}  {bf16:7.0}  {mxfp4:7.0}  {:17.2} {:11.2}",
                mxfp4 / f32,
                mxfp4 / bf16
            );
        }
    }
}
