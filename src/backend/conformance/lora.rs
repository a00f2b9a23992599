//! Adapters of linear layers, against their f64 products.

use super::*;

/// Rows, inputs, outputs and rank: some that nothing divides, then those that tensor cores take whole.
const SIZES: [[usize; 4]; 5] =
    [[1, 8, 16, 1], [70, 40, 120, 3], [77, 96, 33, 5], [64, 128, 96, 8], [320, 144, 208, 16]];

/// Of no power of two.
const SCALE: f32 = 0.7;

pub(super) fn adapters<B: Harness>(backends: &[B]) {
    for [rows, inputs, outputs, rank] in SIZES {
        for precision in precisions::<B>() {
            let held = |len, seed| rounded(&random(len, seed), precision);
            let shape = LoraShape { rows, inputs, outputs, rank, scale: SCALE, precision };
            let (x, y, dy) =
                (held(rows * inputs, 1), held(rows * outputs, 2), held(rows * outputs, 3));
            let (dx, a, b) =
                (held(rows * inputs, 4), held(rank * inputs, 5), held(outputs * rank, 6));
            let [x64, y64, dy64, dx64, a64, b64] = [&x, &y, &dy, &dx, &a, &b].map(|v| f64s(v));
            let scale = f64::from(SCALE);
            let low = reference::product(&x64, &a64, rows, rank, inputs);
            let exact_y = plus(&y64, &reference::product(&low, &b64, rows, outputs, rank), scale);
            // scale dy B
            let turned_b = reference::transpose(&b64, outputs, rank);
            let d = reference::product(&dy64, &turned_b, rows, rank, outputs);
            let turned_a = reference::transpose(&a64, rank, inputs);
            let exact_dx =
                plus(&dx64, &reference::product(&d, &turned_a, rows, inputs, rank), scale);
            let [d, turned_x, turned_dy, turned_low] =
                [(&d, rank), (&x64, inputs), (&dy64, outputs), (&low, rank)]
                    .map(|(of, cols)| reference::transpose(of, rows, cols));
            let da = plus(
                &vec![0.0; a.len()],
                &reference::product(&d, &turned_x, rank, inputs, rows),
                scale,
            );
            let db = reference::product(&turned_dy, &turned_low, outputs, rank, rows);
            let db = plus(&vec![0.0; b.len()], &db, scale);
            each(backends, |back| {
                let mut workspace = room(back, shape);
                let params = Params::of(back, &[&a, &b]);
                let [of_x, of_dy] = [&x, &dy].map(|values| input(back, values, precision));
                let (mut of_y, mut of_dx) =
                    (output(back, &y, precision), output(back, &dx, precision));
                let mut of_low = poison(back, rows * rank, precision);
                let operands = LoraForward {
                    y: &mut of_y,
                    low: &mut of_low,
                    x: &of_x,
                    a: params.get(back, 0),
                    b: params.get(back, 1),
                };
                back.lora_forward(&mut workspace, operands, shape);
                let what = |name: &str| format!("{name} of {shape:?}");
                let of = Of::Activation;
                close(back, &what("low"), &read(back, &of_low), &low, of, precision);
                // What lies between the matrices is rounded, too.
                let bound = 2.0 * back.bound(of, precision).max(2e-6);
                within(back, &what("y"), &read(back, &of_y), &exact_y, bound);

                for wanted in [[true; 2]].into_iter().chain(SOME_WANTED) {
                    for accumulate in [false, true] {
                        let before: [&[f32]; 2] = [&vec![1.0; a.len()], &vec![1.0; b.len()]];
                        let mut gradients = Gradients::of(back, &before);
                        let [da_of, db_of] = gradients.wanted(back, wanted);
                        back.write_tensor(&mut of_dx, &dx);
                        let operands = LoraBackward {
                            dx: &mut of_dx,
                            da: da_of,
                            db: db_of,
                            dy: &of_dy,
                            x: &of_x,
                            low: &of_low,
                            a: params.get(back, 0),
                            b: params.get(back, 1),
                            accumulate,
                        };
                        back.lora_backward(&mut workspace, operands, shape);
                        within(
                            back,
                            &what("dx"),
                            &read_all(back, &of_dx, dx.len()),
                            &exact_dx,
                            bound,
                        );
                        let made = gradients.read(back);
                        for (i, exact) in [&da, &db].into_iter().enumerate() {
                            let name = what(&format!("gradient {i}, {wanted:?}, {accumulate}"));
                            match (wanted[i], accumulate) {
                                (false, _) => assert!(made[i].iter().all(|v| *v == 1.0), "{name}"),
                                (true, false) => within(back, &name, &made[i], exact, bound),
                                (true, true) => {
                                    within(back, &name, &made[i], &plus_one(exact), bound)
                                }
                            }
                        }
                    }
                }
            });
        }
    }
}

/// a + scale b
fn plus(a: &[f64], b: &[f64], scale: f64) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| a + scale * b).collect()
}

/// The first values of a tensor that was written whole.
fn read_all<B: Harness>(b: &B, tensor: &B::Tensor, len: usize) -> Vec<f32> {
    let mut values = b.read_tensor(tensor);
    values.truncate(len);
    values
}

/// Scratch memory of one adapter.
fn room<B: Harness>(b: &B, shape: LoraShape) -> B::Workspace {
    let LoraShape { rows, inputs, outputs, precision, .. } = shape;
    let sequences = Sequences { batch: 1, length: rows };
    let shape = WorkspaceShape {
        linears: &[LinearShape { rows, inputs, outputs }],
        norm: NormShape { rows, channels: 8, epsilon: 0.0, kind: NormKind::Layer },
        attention: AttentionShape {
            sequences,
            heads: 1,
            kv_heads: 1,
            head_size: 8,
            score_factor: 1.0,
            precision,
        },
        head: HeadShape { rows, channels: 8, vocab_size: 8, precision },
        recipes: &[],
        merge: None,
        packed: &[],
        adapters: &[shape],
        backward: true,
    };
    cut(b, |arena| b.workspace(arena, &shape))
}
