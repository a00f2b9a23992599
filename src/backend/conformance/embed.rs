//! Embeddings.

use super::*;

/// B, T, C, V.
const SIZES: [[usize; 4]; 5] =
    [[1, 1, 1, 2], [3, 7, 24, 11], [3, 7, 100, 11], [3, 17, 40, 11], [2, 100, 33, 500]];

/// Rows of wpe.
fn context(shape: EmbeddingShape) -> usize {
    shape.sequences.length + 3
}

/// Whole sequences, and documents in them.
const LENGTHS: [Option<&[usize]>; 2] = [None, Some(&[3, 1, 5, 40])];

pub(super) fn embedding_forward<B: Harness>(backends: &[B]) {
    for ([batch, length, channels, vocab], lengths) in
        SIZES.into_iter().flat_map(|size| LENGTHS.map(|lengths| (size, lengths)))
    {
        let shape = EmbeddingShape { sequences: Sequences { batch, length }, channels };
        let ids = some_tokens(shape.sequences.rows(), vocab, 1);
        let bounds = lengths.map(|lengths| packed(shape.sequences, lengths));
        let (wte, wpe) = (random(vocab * channels, 2), random(context(shape) * channels, 3));
        let numbers: Vec<_> = ids.iter().map(|id| *id as usize).collect();
        for precision in precisions::<B>() {
            let [te, pe] = [&wte, &wpe].map(|w| f64s(&rounded(w, precision)));
            let alone = reference::rows(&rounded(&wte, precision), &numbers, channels);
            let starts = bounds.as_ref().map(|[starts, _]| &starts[..]);
            let exact =
                reference::embedding_forward((&ids, starts), &te, &pe, shape.sequences, channels);
            each(backends, |b| {
                let documents = bounds.as_ref().map(|bounds| documents(b, bounds));
                let documents = documents.as_ref();
                let (ids, params) = (tokens(b, &ids), Params::of(b, &[&wte, &wpe]));
                let mut out = poison(b, exact.len(), precision);
                let [te, pe] = [0, 1].map(|number| params.get(b, number));
                b.embedding_forward(&mut out, &ids, documents, te, Some(pe), shape);
                close(b, "out", &read(b, &out), &exact, Of::Embedding, precision);
                let (mut out, te) = (poison(b, exact.len(), precision), params.get(b, 0));
                b.embedding_forward(&mut out, &ids, documents, te, None, shape);
                assert_eq!(bits(&read(b, &out)), bits(&alone), "{}: no positions", b.name());
            });
        }
    }
}

pub(super) fn embedding_backward<B: Harness>(backends: &[B]) {
    for ([batch, length, channels, vocab], lengths) in
        SIZES.into_iter().flat_map(|size| LENGTHS.map(|lengths| (size, lengths)))
    {
        let shape = EmbeddingShape { sequences: Sequences { batch, length }, channels };
        let rows = shape.sequences.rows();
        let ids = some_tokens(rows, vocab, 1);
        let bounds = lengths.map(|lengths| packed(shape.sequences, lengths));
        for precision in precisions::<B>() {
            let dout = rounded(&random(rows * channels, 4), precision);
            let mut te = vec![0.0; vocab * channels];
            let mut pe = vec![0.0; context(shape) * channels];
            for (i, d) in dout.iter().enumerate() {
                let (row, channel) = (i / channels, i % channels);
                te[ids[row] as usize * channels + channel] += f64::from(*d);
                let start = bounds.as_ref().map_or(0, |[starts, _]| starts[row] as usize);
                pe[(row % length - start) * channels + channel] += f64::from(*d);
            }
            each(backends, |b| {
                let documents = bounds.as_ref().map(|bounds| documents(b, bounds));
                let documents = documents.as_ref();
                let (ids, dout) = (tokens(b, &ids), input(b, &dout, precision));
                for accumulate in [true, false] {
                    let of_positions = if accumulate { 1.0 } else { f32::NAN };
                    let pieces = [vec![1.0; te.len()], vec![of_positions; pe.len()]];
                    let backward = |wanted| {
                        let mut flat = Gradients::of(b, &[&pieces[0], &pieces[1]]);
                        let [dwte, dwpe] = flat.wanted(b, wanted);
                        let gradients = EmbeddingGradients { dwte, dwpe, accumulate };
                        b.embedding_backward(gradients, &dout, &ids, documents, shape);
                        flat.read(b)
                    };
                    let all = backward([true; 2]);
                    for wanted in SOME_WANTED {
                        let what = format!("{}: {shape:?}", b.name());
                        let some = backward(wanted);
                        are_as_wanted(&what, wanted, [&pieces, &all, &some], [&[], &[]]);
                    }
                    let exact =
                        [plus_one(&te), if accumulate { plus_one(&pe) } else { pe.clone() }];
                    for ((what, ours), exact) in ["dwte", "dwpe"].iter().zip(all).zip(exact) {
                        close(b, what, &ours, &exact, Of::EmbeddingGradient, precision);
                    }
                }
            });
        }
    }
}
