//! Embeddings, and weights that are drawn.

use super::*;
use crate::backend::reference;

#[test]
fn embedding() {
    each_precision(|cuda, precision| {
        for (batch, length, c, vocab) in [(1, 1, 1, 2), (3, 17, 40, 11), (2, 100, 33, 500)] {
            let sequences = Sequences { batch, length };
            let rows = sequences.rows();
            let ids = some_tokens(rows, vocab, 1);
            let device_ids = tokens(cuda, &ids);
            let (wte, wpe) = (random(vocab * c, 2), random((length + 3) * c, 3));
            let (wte_d, wpe_d) = (param(cuda, &wte), param(cuda, &wpe));
            let (wte, wpe) = (rounded(&wte, precision), rounded(&wpe, precision));
            let mut out = poison(cuda, rows * c, precision);
            cuda.embedding_forward(&mut out, &device_ids, &wte_d, &wpe_d, sequences, c);
            let exact = reference::embedding_forward(&ids, &f64s(&wte), &f64s(&wpe), sequences, c);
            close("embedding", &values_of(cuda, &out), &exact, bound(precision));

            let dout = rounded(&random(rows * c, 4), precision);
            let dout_d = tensor(cuda, &dout, precision);
            let (mut dwte, mut dwpe) = (vec![1.0f64; vocab * c], vec![1.0f64; (length + 3) * c]);
            for (row, id) in ids.iter().enumerate() {
                for i in 0..c {
                    dwte[*id as usize * c + i] += f64::from(dout[row * c + i]);
                    dwpe[row % length * c + i] += f64::from(dout[row * c + i]);
                }
            }
            let mut dwte_d = f32_buffer(cuda, &vec![1.0; dwte.len()]);
            let mut dwpe_d = f32_buffer(cuda, &vec![1.0; dwpe.len()]);
            cuda.embedding_backward(
                &mut dwte_d,
                &mut dwpe_d,
                &dout_d,
                &device_ids,
                sequences,
                c,
                true,
            );
            close("dwte", &f32s_of(cuda, &dwte_d), &dwte, 2e-6);
            close("dwpe", &f32s_of(cuda, &dwpe_d), &dwpe, 2e-6);
            let mut dwpe_d = f32_buffer(cuda, &vec![f32::NAN; dwpe.len()]);
            let (te, pe) = (&mut dwte_d, &mut dwpe_d);
            cuda.embedding_backward(te, pe, &dout_d, &device_ids, sequences, c, false);
            dwpe.iter_mut().for_each(|v| *v -= 1.0);
            close("dwpe alone", &f32s_of(cuda, &dwpe_d), &dwpe, 2e-6);
        }
    });
}

#[test]
fn normal_values_are_those_of_the_definition() {
    let Some(cuda) = gpu() else { return };
    for (len, index) in [(1, 0), (511, 1), (513, 2), (1_000_003, 3)] {
        let draw = Draw::of(99, Purpose::Weights, index, 0);
        let mut param = param(&cuda, &vec![f32::NAN; len]);
        cuda.draw_param(&mut param, 0.02, &draw).unwrap();
        let mut exact = vec![0.0; len];
        crate::mx::fill_normal(&mut exact, 0.02, &draw, 0);
        assert_eq!(f32s_of(&cuda, &param.master), exact, "{len}");
        let amax = exact.iter().fold(0.0f32, |amax, v| amax.max(v.abs()));
        assert_eq!(read_bytes(&cuda, param.amax.address, 4), amax.to_le_bytes());
        let copy: Vec<u8> =
            exact.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect();
        assert_eq!(read_bytes(&cuda, param.copy.address, 2 * len), copy);
    }
}
