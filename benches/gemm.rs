//! GEMMs and the packing of their operands, for the shapes of layers 384 and 768 wide, on every
//! format.
//!
//! `cargo bench --bench gemm`. Packing is given in GB/s of f32 read; GEMMs in GFLOP/s with operands
//! ready, beside the crate `gemm` in f32 (which packs in its call) and the machine's peak: bare
//! loops of independent instructions, one a thread. Formats take turns, and every figure is a
//! median.

use std::time::Instant;

use mxfp4train::backend::cpu::gemm::{
    BLOCK_STEPS, Conversion, Matrix, Output, PANEL, PackedMut, Quantization, Role, pack,
};
use mxfp4train::backend::cpu::{Arena, Buffer, Cpu};
use mxfp4train::formats::{GemmId, Operand, OperandId, Random, Rounding};

const ROUNDS: usize = 9;
const TOKENS: usize = 2048;

/// Memory as an engine's: large pages, and buffers that begin with a cache line.
///
/// NOTE: a `Vec` of this size begins 16 bytes into one, so that every register of B is loaded from
/// two: bf16 ran at 80% of its peak for 92%.
struct Memory {
    words: Buffer<u32>,
    scales: Buffer<f32>,
    sums: Buffer<i32>,
}

impl Memory {
    fn new(rows: usize, depth: usize) -> Self {
        let words = rows.next_multiple_of(PANEL) * depth.next_multiple_of(256);
        let blocks = words / BLOCK_STEPS;
        let mut arena = Arena::mapped(words * 4 + blocks * 8 + 256).unwrap();
        Self { words: arena.alloc(words), scales: arena.alloc(blocks), sums: arena.alloc(blocks) }
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

fn values(len: usize) -> Buffer<f32> {
    let mut state = 1u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        f64::from(state >> 8) / f64::from(1 << 24) - 0.5
    };
    let mut values = Arena::mapped(len * 4 + 64).unwrap().alloc(len);
    values.fill_with(|| (next() + next() + next()) as f32);
    values
}

fn main() {
    let threads = std::env::var("MXT_BENCH_THREADS").map_or(0, |n| n.parse().unwrap());
    let cpu = Cpu::new(threads).unwrap();
    println!("{} threads, {}", cpu.threads(), cpu.isa().name());
    let random = Random { seed: 1, step: 1, micro_step: 0, layer: 0, linear: 2 };
    let mut signs = vec![0.0; 64];
    random.signs(GemmId::Dgrad).fill_signs(&mut signs);
    let mxfp4 = |signs, rounding| {
        let (range, draw) = (Operand::from(rounding).range(), random.rounding(OperandId::Dy));
        Conversion::Mxfp4(Quantization { signs, rounding, range, draw })
    };
    let conversions = [
        ("f32", Conversion::F32),
        ("bf16", Conversion::Bf16),
        ("mxfp4", mxfp4(&[], Rounding::Nearest)),
        ("mxfp4-rht", mxfp4(&signs, Rounding::Nearest)),
        ("mxfp4-sr", mxfp4(&[], Rounding::Unbiased)),
        ("mxfp4-rht-sr", mxfp4(&signs, Rounding::Unbiased)),
    ];

    let (rows, depth) = (TOKENS, 1536);
    let data = values(rows * depth);
    let mut memory = Memory::new(rows, depth);
    println!("\npacking {rows} x {depth}        rows GB/s   transposed GB/s");
    for (name, conversion) in conversions {
        let rate = |memory: &mut Memory, matrix: Matrix<'_>| {
            let run = |_| {
                time(|| {
                    pack(&cpu, &matrix, conversion, Role::A, memory.as_mut());
                })
            };
            (rows * depth * 4) as f64 / median((0..ROUNDS).map(run).collect()) / 1e9
        };
        let by_rows = rate(&mut memory, Matrix::rows_by_depth(&data, rows, depth));
        let transposed = rate(&mut memory, Matrix::depth_by_rows(&data, rows, depth));
        println!("{name:18} {by_rows:18.1} {transposed:17.1}");
    }

    let peaks = peak::measure(cpu.threads());
    let [f32, bf16, bytes] = peaks;
    println!("\npeak                             {f32:7.0}  {bf16:7.0}  {bytes:7.0}  GFLOP/s");
    println!(
        "GEMM, operands ready                 f32     bf16    mxfp4  share of peak, %   mxfp4/f32  \
         /bf16  f32/gemm crate"
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
            let (a_values, b_values) = (values(m * k), values(n * k));
            let (a, b) = (&a_values, &b_values);
            let (a, b) = (Matrix::rows_by_depth(a, m, k), Matrix::rows_by_depth(b, n, k));
            let mut memories: Vec<(Memory, Memory)> =
                (0..3).map(|_| (Memory::new(m, k), Memory::new(n, k))).collect();
            let packed: Vec<_> = memories
                .iter_mut()
                .zip(conversions)
                .map(|((ma, mb), (_, conversion))| {
                    let a = pack(&cpu, &a, conversion, Role::A, ma.as_mut());
                    (a, pack(&cpu, &b, conversion, Role::B, mb.as_mut()))
                })
                .collect();
            let mut result = values(m * n);
            let mut seconds = [const { Vec::new() }; 4];
            for _ in 0..ROUNDS {
                let peer = || peer(&mut result, &a_values, &b_values, m, n, k, cpu.threads());
                seconds[3].push(time(peer));
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
            let [f32, bf16, mxfp4, peer] = rates;
            let shares = [f32 / peaks[0], bf16 / peaks[1], mxfp4 / peaks[2]].map(|s| 100.0 * s);
            println!(
                "{c:4} {what:12} {m:5}x{n:4}x{k:4} {f32:7.0}  {bf16:7.0}  {mxfp4:7.0}  \
                 {:7.0} {:4.0} {:4.0} {:12.2} {:6.2} {:11.2}",
                shares[0],
                shares[1],
                shares[2],
                mxfp4 / f32,
                mxfp4 / bf16,
                f32 / peer
            );
        }
    }
}

/// c (m, n) = a (m, k) b (n, k)^T by the crate `gemm`'s part for f32, which wants the longer stride
/// in columns: c^T (n, m) = b a^T.
fn peer(c: &mut [f32], a: &[f32], b: &[f32], m: usize, n: usize, k: usize, threads: usize) {
    assert!(c.len() == m * n && a.len() == m * k && b.len() == n * k);
    let parallelism = gemm_common::Parallelism::Rayon(threads);
    // SAFETY: the strides stay within the slices whose lengths were just checked.
    unsafe {
        gemm_f32::gemm::f32::get_gemm_fn()(
            n,
            m,
            k,
            c.as_mut_ptr(),
            n as isize,
            1,
            false,
            b.as_ptr(),
            1,
            k as isize,
            a.as_ptr(),
            k as isize,
            1,
            0.0,
            1.0,
            false,
            false,
            false,
            parallelism,
        );
    }
}

/// What the machine can do: GFLOP/s of f32 multiply-adds, bf16 and integer dot products.
mod peak {
    use std::time::Instant;

    const LOOPS: usize = 2_000_000;

    /// NaN where the processor has no AVX-512 with these instructions.
    pub(super) fn measure(threads: usize) -> [f64; 3] {
        #[cfg(target_arch = "x86_64")]
        if mxfp4train::backend::cpu::Isa::Avx512.is_available() {
            // Two operations a lane: 16 f32, 32 bf16 or 64 bytes a register.
            return [(x86::f32 as fn(usize), 16.0), (x86::bf16, 32.0), (x86::bytes, 64.0)].map(
                |(run, lanes)| {
                    let best = (0..5).map(|_| seconds(run, threads)).fold(f64::MAX, f64::min);
                    2.0 * lanes * (x86::CHAINS * LOOPS * threads) as f64 / best / 1e9
                },
            );
        }
        let _ = (threads, seconds);
        [f64::NAN; 3]
    }

    fn seconds(run: fn(usize), threads: usize) -> f64 {
        let start = Instant::now();
        std::thread::scope(|scope| {
            for _ in 0..threads {
                scope.spawn(move || run(LOOPS));
            }
        });
        start.elapsed().as_secs_f64()
    }

    #[cfg(target_arch = "x86_64")]
    mod x86 {
        use std::arch::x86_64::*;
        use std::hint::black_box;

        pub(super) const CHAINS: usize = 16;

        macro_rules! chains {
            ($name:ident, $features:literal, $zero:expr, $operand:expr, $step:expr) => {
                pub(super) fn $name(loops: usize) {
                    #[target_feature(enable = $features)]
                    fn run(loops: usize) {
                        let (mut sums, x) = ([$zero; CHAINS], black_box($operand));
                        for _ in 0..loops {
                            for sum in &mut sums {
                                *sum = $step(*sum, x, x);
                            }
                        }
                        black_box(sums);
                    }
                    // SAFETY: `measure` checked the instruction set.
                    unsafe { run(loops) }
                }
            };
        }

        chains!(f32, "avx512f", _mm512_setzero_ps(), _mm512_set1_ps(1e-3), |sum, a, b| {
            _mm512_fmadd_ps(a, b, sum)
        });
        chains!(
            bf16,
            "avx512f,avx512bf16",
            _mm512_setzero_ps(),
            _mm512_cvtne2ps_pbh(_mm512_set1_ps(1e-3), _mm512_set1_ps(1e-3)),
            |sum, a, b| _mm512_dpbf16_ps(sum, a, b)
        );
        chains!(
            bytes,
            "avx512f,avx512vnni",
            _mm512_setzero_si512(),
            _mm512_set1_epi8(1),
            |sum, a, b| _mm512_dpbusd_epi32(sum, a, b)
        );
    }
}
