//! The backward pass of linear layers, everything included: transform, rounding, packing, both
//! GEMMs and the bias gradient. Formats take turns; figures are medians.
//!
//! `cargo bench --bench linear`

use std::time::Instant;

use mxfp4train::Recipe;
use mxfp4train::backend::cpu::{Buffer, Cpu};
use mxfp4train::backend::{
    AttentionShape, HeadShape, Linear, LinearBackward, LinearShape, Memory, NormKind, NormShape,
    OutputGradient, Precision, Sequences, WorkspaceShape,
};
use mxfp4train::formats::Random;

const ROUNDS: usize = 15;
const RECIPES: [&str; 3] = ["fp32", "bf16", "mxfp4-rht-sr"];

fn buffer(cpu: &Cpu, len: usize) -> Buffer<f32> {
    let mut arena = cpu.arena(Some((len * 4).next_multiple_of(64))).unwrap();
    let mut buffer = cpu.f32(&mut arena, len);
    let mut state = 1u32;
    for v in buffer.iter_mut() {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        *v = (state >> 8) as f32 / (1 << 23) as f32 - 1.0;
    }
    buffer
}

fn main() {
    let threads = std::env::var("MXT_BENCH_THREADS").map_or(0, |n| n.parse().unwrap());
    let cpu = Cpu::new(threads).unwrap();
    println!("{} threads, {}", cpu.threads(), cpu.isa().name());
    println!("backward pass            fp32 ms  bf16 ms  mxfp4-rht-sr ms   over bf16  over fp32");
    let random = Random { seed: 1, step: 1, micro_step: 0, layer: 0, linear: 2 };
    let recipes = RECIPES.map(|recipe| *recipe.parse::<Recipe>().unwrap().linear(0));
    for (c, rows) in [(384, 2048), (768, 1024), (768, 2048)] {
        let layers =
            [("qkv", c, 3 * c), ("projection", c, c), ("fc1", c, 4 * c), ("fc2", 4 * c, c)];
        let linears = layers.map(|(_, inputs, outputs)| LinearShape { rows, inputs, outputs });
        let sequences = Sequences { batch: 1, length: 1 };
        let precision = Precision::F32;
        let workspace_shape = WorkspaceShape {
            linears: &linears,
            norm: NormShape { rows: 1, channels: 1, epsilon: 0.0, kind: NormKind::Layer },
            attention: AttentionShape {
                sequences,
                heads: 1,
                kv_heads: 1,
                head_size: 1,
                score_factor: 1.0,
                precision,
            },
            head: HeadShape { rows: 1, channels: 1, vocab_size: 1, precision },
            recipes: &recipes,
            merge: None,
            packed: &[],
            adapters: &[],
            backward: true,
        };
        let mut measuring = cpu.arena(None).unwrap();
        cpu.workspace(&mut measuring, &workspace_shape);
        let mut arena = cpu.arena(Some(cpu.arena_used(&measuring))).unwrap();
        let mut workspace = cpu.workspace(&mut arena, &workspace_shape);
        let mut totals = [0.0; 3];
        for ((name, inputs, outputs), shape) in layers.into_iter().zip(linears) {
            let (dy, x) = (buffer(&cpu, rows * outputs), buffer(&cpu, rows * inputs));
            let (w, mut dx) = (buffer(&cpu, outputs * inputs), buffer(&cpu, rows * inputs));
            let (mut dw, mut db) = (buffer(&cpu, outputs * inputs), buffer(&cpu, outputs));
            let mut seconds = [const { Vec::new() }; 3];
            for round in 0..=ROUNDS {
                for (recipe, seconds) in recipes.iter().zip(&mut seconds) {
                    let start = Instant::now();
                    let operands = LinearBackward {
                        dx: &mut dx,
                        dw: Some(&mut dw[..]),
                        db: Some(&mut db[..]),
                        dy: OutputGradient::Whole(&dy),
                        x: &x,
                        turned: None,
                        w: &w[..],
                        mean: None,
                        accumulate: false,
                    };
                    cpu.linear_backward(&mut workspace, operands, shape, recipe, &random);
                    if round > 0 {
                        seconds.push(start.elapsed().as_secs_f64());
                    }
                }
            }
            let medians = seconds.map(|mut s| {
                s.sort_by(f64::total_cmp);
                s[ROUNDS / 2]
            });
            totals.iter_mut().zip(medians).for_each(|(total, s)| *total += s);
            print(&format!("{c} x {rows} {name}"), medians);
        }
        print(&format!("{c} x {rows} all four"), totals);
    }
}

fn print(what: &str, seconds: [f64; 3]) {
    let [f32, bf16, mxfp4] = seconds.map(|s| s * 1e3);
    let (over_bf16, over_f32) = (bf16 / mxfp4, f32 / mxfp4);
    println!("{what:22} {f32:9.2} {bf16:8.2} {mxfp4:16.2} {over_bf16:11.2} {over_f32:10.2}");
}
