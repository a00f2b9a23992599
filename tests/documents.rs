//! Documents that are packed into the sequences of a batch: each is as if it were alone, to the bit on
//! the CPU, and within what sums may differ by on a GPU.

#[path = "common/engines.rs"]
mod engines;

use engines::{engines, is_gpu};
use mxfp4train::{
    Architecture, Batch, Dataset, Engine, Error, HostLoss, IGNORED, LogitRows, Model, ModelConfig,
    Result, Trainer, TrainerOptions,
};

const VOCAB: usize = 61;
/// Blocks of queries are crossed by documents of the CPU's, and tiles of the GPU's.
const T: usize = 200;
/// What ends a document below.
const END: u32 = 60;

fn model(engine: &Engine) -> Model {
    let config = ModelConfig {
        vocab_size: VOCAB,
        context_length: T,
        layers: 3,
        heads: 2,
        channels: 64,
        ..ModelConfig::default()
    };
    let model = Model::new(engine, &config).unwrap();
    // Positions count for as much as tokens do.
    let wpe: Vec<f32> = (0..T * 64).map(|i| ((i * 37 % 101) as f32 - 50.0) / 60.0).collect();
    model.write_tensor("transformer.wpe.weight", &wpe).unwrap();
    model
}

fn options(recipe: &str, batch_size: usize, sequence_length: usize) -> TrainerOptions {
    TrainerOptions {
        batch_size,
        sequence_length,
        recipe: recipe.parse().unwrap(),
        ..TrainerOptions::default()
    }
}

/// Lengths of the documents of each sequence, which are together what each has.
const PACKED: [&[usize]; 3] = [&[1, 49, 16, 97, 37], &[200], &[3, 1, 1, 130, 65]];

/// Tokens, targets and document numbers of those: a document's last token ends it, and it has no
/// target.
fn packed() -> [Vec<u32>; 3] {
    let (mut tokens, mut targets, mut documents) = (Vec::new(), Vec::new(), Vec::new());
    for (sequence, lengths) in PACKED.iter().enumerate() {
        for (number, length) in lengths.iter().enumerate() {
            let first = tokens.len() as u32;
            tokens.extend((0..*length as u32 - 1).map(|i| (i * i + first * (i + 7)) % 59));
            tokens.push(END);
            targets.extend_from_slice(&tokens[first as usize + 1..]);
            targets.push(IGNORED);
            // Any numbers do, if they change.
            let number = (sequence * 100 + 7 * (number % 2)) as u32;
            documents.resize(tokens.len(), number);
        }
    }
    [tokens, targets, documents]
}

/// Where each document begins among all positions, and its length.
fn places() -> Vec<(usize, usize)> {
    let lengths = PACKED.iter().copied().flatten();
    let mut next = 0;
    lengths
        .map(|length| {
            next += length;
            (next - length, *length)
        })
        .collect()
}

/// Logits of all positions of a batch, by way of a loss that is none.
fn logits(trainer: &mut Trainer, tokens: &[u32], documents: Option<&[u32]>) -> Vec<f32> {
    let mut all = Vec::new();
    let mut keep = |rows: LogitRows<'_>| -> Result<()> {
        all.extend_from_slice(rows.logits);
        rows.losses.fill(0.0);
        Ok(())
    };
    let loss: &mut HostLoss<'_> = &mut keep;
    let batch =
        Batch { tokens, documents, divisor: Some(1.0), loss: Some(loss), ..Batch::default() };
    trainer.forward(batch, None).unwrap();
    all
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// Whether numbers are equal, to the bit on the CPU.
fn assert_same(engine: &Engine, what: &str, ours: &[f32], alone: &[f32]) {
    if !is_gpu(engine) {
        assert!(bits(ours) == bits(alone), "{what}: other bits");
    }
    for (ours, alone) in ours.iter().zip(alone) {
        assert!((ours - alone).abs() <= 0.02 * (1.0 + alone.abs()), "{what}: {ours} for {alone}");
    }
}

/// The same with Llama's blocks, where positions turn heads and are counted from a document's begin.
fn llama(engine: &Engine) -> Model {
    let config = ModelConfig {
        architecture: Architecture::Llama,
        heads: 4,
        kv_heads: 2,
        qk_norm: true,
        ..model(engine).config().clone()
    };
    Model::new(engine, &config).unwrap()
}

#[test]
fn a_packed_document_has_the_logits_that_it_has_alone() {
    let [tokens, _, documents] = packed();
    for engine in engines() {
        let recipes =
            ["fp32", "bf16", "mxfp4-rht-sr"].map(|recipe| [model, llama].map(|m| (recipe, m)));
        for (recipe, model) in recipes.into_iter().flatten() {
            let model = model(&engine);
            let mut trainer = Trainer::new(&model, options(recipe, 3, T)).unwrap();
            let together = logits(&mut trainer, &tokens, Some(&documents));
            for (first, length) in places() {
                let mut trainer = Trainer::new(&model, options(recipe, 1, length)).unwrap();
                let alone = logits(&mut trainer, &tokens[first..][..length], None);
                let ours = &together[first * VOCAB..][..length * VOCAB];
                assert_same(&engine, &format!("{recipe}: {length} from {first}"), ours, &alone);
            }
            // Which is not so by itself.
            let mixed = logits(&mut trainer, &tokens, None);
            assert!(mixed[VOCAB..2 * VOCAB] != together[VOCAB..2 * VOCAB], "{recipe}");
            // A sequence that is one document is what it was.
            let whole = T * VOCAB..2 * T * VOCAB;
            assert_same(&engine, recipe, &together[whole.clone()], &mixed[whole]);
        }
    }
}

/// Losses and gradients: the sum of each document's own, up to how sums are rounded.
#[test]
fn gradients_are_the_sum_of_what_each_document_gives() {
    let [tokens, targets, documents] = packed();
    for engine in engines() {
        let recipes = ["fp32", "bf16"].map(|recipe| [model, llama].map(|m| (recipe, m)));
        for (recipe, model) in recipes.into_iter().flatten() {
            let model = model(&engine);
            let names: Vec<_> = model.tensors().iter().map(|t| (t.name.clone(), t.len())).collect();
            let gradients = |trainer: &Trainer| -> Vec<Vec<f32>> {
                let read = |(name, len): &(String, usize)| {
                    let mut values = vec![0.0; *len];
                    trainer.read_gradient(name, &mut values).unwrap();
                    values
                };
                names.iter().map(read).collect()
            };
            let mut trainer = Trainer::new(&model, options(recipe, 3, T)).unwrap();
            let mut losses = vec![0.0; 3 * T];
            let batch = Batch {
                tokens: &tokens,
                targets: &targets,
                documents: Some(&documents),
                divisor: Some(1.0),
                ..Batch::default()
            };
            trainer.forward_backward(batch, Some(&mut losses)).unwrap();
            let together = gradients(&trainer);
            let mut sums: Vec<Vec<f64>> = names.iter().map(|(_, len)| vec![0.0; *len]).collect();
            for (first, length) in places() {
                let mut trainer = Trainer::new(&model, options(recipe, 1, length)).unwrap();
                let mut alone = vec![0.0; length];
                let batch = Batch {
                    tokens: &tokens[first..][..length],
                    targets: &targets[first..][..length],
                    divisor: Some(1.0),
                    ..Batch::default()
                };
                trainer.forward_backward(batch, Some(&mut alone)).unwrap();
                assert_same(&engine, recipe, &losses[first..][..length], &alone);
                for (sum, of_one) in sums.iter_mut().zip(gradients(&trainer)) {
                    sum.iter_mut().zip(of_one).for_each(|(sum, g)| *sum += f64::from(g));
                }
            }
            for (((name, _), ours), exact) in names.iter().zip(&together).zip(&sums) {
                let most = exact.iter().fold(0.0f64, |most, g| most.max(g.abs()));
                let near = if recipe == "fp32" && !is_gpu(&engine) { 1e-5 } else { 0.02 };
                for (ours, exact) in ours.iter().zip(exact) {
                    let error = (f64::from(*ours) - exact).abs();
                    assert!(error <= near * most, "{recipe}: {name}: {ours} for {exact} of {most}");
                }
            }
        }
    }
}

/// Tokens of windows (rows, T + 1) with documents that end at odd places.
fn windows(seed: u32, rows: usize) -> Vec<u32> {
    let token = |i: u32| {
        if (7 * i + seed).is_multiple_of(23) { END } else { (i * i + seed * (i + 7)) % 59 }
    };
    (0..(rows * (T + 1)) as u32).map(token).collect()
}

/// Inputs, targets, and the numbers of documents that end behind END.
fn batch_of(windows: &[u32]) -> [Vec<u32>; 3] {
    let (mut inputs, mut targets, mut documents) = (Vec::new(), Vec::new(), Vec::new());
    for window in windows.chunks(T + 1) {
        inputs.extend_from_slice(&window[..T]);
        targets.extend_from_slice(&window[1..]);
        let mut number = 0;
        for token in &window[..T] {
            documents.push(number);
            number += u32::from(*token == END);
        }
    }
    [inputs, targets, documents]
}

fn with_end(recipe: &str) -> TrainerOptions {
    TrainerOptions { document_end: Some(END), ..options(recipe, 3, T) }
}

/// A step of windows, of a batch and of documents that the host tells apart is one and the same, and
/// so are evaluations.
#[test]
fn a_token_ends_documents_as_the_host_does() {
    for engine in engines() {
        let trainer = |options| Trainer::new(&model(&engine), options).unwrap();
        for recipe in ["bf16", "mxfp4-rht-sr"] {
            let [mut by_windows, mut by_batches] = [0; 2].map(|_| trainer(with_end(recipe)));
            let [mut given, mut whole] = [0; 2].map(|_| trainer(options(recipe, 3, T)));
            for seed in 0..3 {
                let windows = windows(seed, 3);
                let [tokens, targets, documents] = batch_of(&windows);
                assert!(documents.iter().any(|number| *number > 2));
                let batch = |documents| Batch {
                    tokens: &tokens,
                    targets: &targets,
                    documents,
                    ..Batch::default()
                };
                let evaluations = [
                    by_batches.forward(batch(None), None).unwrap().loss,
                    given.forward(batch(Some(&documents)), None).unwrap().loss,
                ];
                assert_eq!(evaluations[0].to_bits(), evaluations[1].to_bits());
                assert_ne!(whole.forward(batch(None), None).unwrap().loss, evaluations[0]);
                let stats = by_windows.step_tokens(&windows).unwrap();
                assert!((stats.loss - evaluations[0]).abs() < 1e-4, "{stats:?} {evaluations:?}");
                by_batches.forward_backward(batch(None), None).unwrap();
                given.forward_backward(batch(Some(&documents)), None).unwrap();
                let others = [by_batches.update().unwrap(), given.update().unwrap()];
                for other in others {
                    let numbers = |stats: mxfp4train::StepStats| {
                        [stats.loss, stats.grad_norm].map(f32::to_bits)
                    };
                    assert_eq!(numbers(other), numbers(stats), "{recipe}, {seed}");
                }
                whole.step_tokens(&windows).unwrap();
            }
        }
    }
}

/// Windows of files and of the host, in steps and in evaluations.
#[test]
fn datasets_are_cut_into_documents() {
    for engine in engines() {
        let [packed, plain] = [true, false].map(|is_packed| {
            let fill = move |number: u64, tokens: &mut [u32], documents: &mut [u32]| {
                tokens.copy_from_slice(&windows(number as u32, 1));
                if is_packed {
                    documents.copy_from_slice(&batch_of(tokens)[2]);
                }
                Ok(())
            };
            let fill = move |number, tokens: &mut [u32], _: &mut [f32], documents: &mut [u32]| {
                assert_eq!(documents, [0; T]);
                fill(number, tokens, documents)
            };
            Dataset::from_packed_windows(7, fill).unwrap()
        });
        let as_before = |number: u64, tokens: &mut [u32], _: &mut [f32]| {
            tokens.copy_from_slice(&windows(number as u32, 1));
            Ok(())
        };
        let as_before = Dataset::from_windows(7, as_before).unwrap();
        let trainer = |options| Trainer::new(&model(&engine), options).unwrap();
        let losses = |data: &Dataset, options: TrainerOptions| {
            let mut trainer = trainer(options);
            let mut losses = vec![trainer.eval(data, 0).unwrap().loss];
            losses.extend((0..3).map(|_| trainer.step(data).unwrap().loss));
            losses.push(trainer.eval(data, 2).unwrap().loss);
            bits(&losses)
        };
        let apart = losses(&packed, options("bf16", 3, T));
        assert_eq!(apart, losses(&plain, with_end("bf16")));
        assert_eq!(apart, losses(&as_before, with_end("bf16")));
        let together = losses(&plain, options("bf16", 3, T));
        assert_eq!(together, losses(&as_before, options("bf16", 3, T)));
        assert!(apart.iter().zip(&together).all(|(a, b)| a != b), "{apart:?} {together:?}");
        // A file, and one of a short window.
        let tokens: Vec<u32> = windows(5, 9);
        for tokens in [tokens.clone(), tokens[..90].to_vec()] {
            let data = Dataset::from_tokens(tokens).unwrap();
            let loss = |options| trainer(options).eval(&data, 0).unwrap().loss;
            assert_ne!(loss(with_end("bf16")), loss(options("bf16", 3, T)));
        }
    }
}

/// A decoder measures the same windows: each document from its beginning.
#[test]
fn a_decoder_keeps_documents_apart() {
    let engine = &engines()[0];
    let model = model(engine);
    let data = Dataset::from_packed_windows(3, |number, tokens, weights, documents| {
        tokens.copy_from_slice(&windows(number as u32, 1));
        documents.copy_from_slice(&batch_of(tokens)[2]);
        weights[..5].fill(0.0);
        Ok(())
    });
    let data = data.unwrap();
    let mut trainer = Trainer::new(&model, options("fp32", 3, T)).unwrap();
    let ours = mxfp4train::Decoder::new(&model, Default::default()).unwrap().eval(&data, T, 0);
    let (ours, theirs) = (ours.unwrap(), trainer.eval(&data, 0).unwrap());
    assert_eq!(ours.tokens, theirs.tokens);
    assert!((ours.loss - theirs.loss).abs() < 1e-5, "{ours:?} {theirs:?}");
}

/// A run that is saved goes on to the bit, and its file says what ends documents, if anything does.
#[test]
fn a_resumed_run_keeps_documents_apart() {
    let engine = &engines()[0];
    let data = Dataset::from_tokens(windows(1, 20)).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let mut whole = Trainer::new(&model(engine), with_end("mxfp4-rht-sr")).unwrap();
    let straight: Vec<_> = (0..4).map(|_| whole.step(&data).unwrap().loss).collect();
    let mut first = Trainer::new(&model(engine), with_end("mxfp4-rht-sr")).unwrap();
    let mut parts: Vec<_> = (0..2).map(|_| first.step(&data).unwrap().loss).collect();
    first.save(folder.path()).unwrap();
    let text = Trainer::read_state(folder.path()).unwrap().unwrap();
    assert!(String::from_utf8(text).unwrap().contains("\"document_end\": 60"));
    let mut second = Trainer::load(engine, folder.path()).unwrap();
    assert_eq!(second.options().document_end, Some(END));
    parts.extend((0..2).map(|_| second.step(&data).unwrap().loss));
    assert_eq!(bits(&straight), bits(&parts));
    Trainer::new(&model(engine), options("bf16", 3, T)).unwrap().save(folder.path()).unwrap();
    let text = Trainer::read_state(folder.path()).unwrap().unwrap();
    assert!(!String::from_utf8(text).unwrap().contains("document_end"));
}

#[test]
fn what_mixes_documents_is_refused() {
    let engine = &engines()[0];
    let model = model(engine);
    let [tokens, targets, documents] = packed();
    let dropping = TrainerOptions {
        token_drop: Some("start=16,steps=4".parse().unwrap()),
        ..options("bf16", 3, T)
    };
    for (options, words) in [
        (TrainerOptions { document_end: Some(61), ..options("bf16", 3, T) }, "below 61, got 61"),
        (TrainerOptions { document_end: Some(END), ..dropping.clone() }, "take token_drop out"),
        (with_end("bf16,haste=13"), "take haste out"),
    ] {
        let error = Trainer::new(&model, options).unwrap_err();
        let is_named =
            matches!(&error, Error::InvalidArgument { what, .. } if *what == "document_end");
        assert!(is_named && error.to_string().contains(words), "{error}");
    }
    let batch = |documents| Batch {
        tokens: &tokens,
        targets: &targets,
        documents: Some(documents),
        ..Batch::default()
    };
    let mut trainer = Trainer::new(&model, dropping).unwrap();
    let error = trainer.forward_backward(batch(&documents), None).unwrap_err().to_string();
    assert!(error.contains("take token_drop out"), "{error}");
    // Sequences that are a document each are no matter.
    trainer.forward_backward(batch(&[7; 3 * T]), None).unwrap();
    trainer.update().unwrap();
    let mut trainer = Trainer::new(&model, options("bf16,haste=13", 3, T)).unwrap();
    let error = trainer.forward(batch(&documents), None).unwrap_err().to_string();
    assert!(error.contains("take haste out"), "{error}");
    let mut trainer = Trainer::new(&model, options("bf16", 3, T)).unwrap();
    let error = trainer.forward_backward(batch(&documents[1..]), None).unwrap_err().to_string();
    assert!(error.contains("documents") && error.contains("got 599"), "{error}");
    trainer.forward_backward(batch(&documents), None).unwrap();
    trainer.update().unwrap();
}

/// With a token that ends documents their room is a part of the plan; without, nothing is.
#[test]
fn the_plan_has_room_for_documents() {
    let engine = &engines()[0];
    let config = model(engine).config().clone();
    let of = |options: &TrainerOptions| mxfp4train::plan(engine, &config, options).unwrap();
    let (with, without) = (of(&with_end("bf16")), of(&options("bf16", 3, T)));
    let rows = 3 * T as u64;
    assert_eq!(with.activations - without.activations, (8 * rows).next_multiple_of(64));
    assert_eq!(with.total() - without.total(), with.activations - without.activations);
}
