//! Documents that are packed into the sequences of a batch: each is as if it were alone, to the bit on
//! the CPU, and within what sums may differ by on a GPU.

use mxfp4train::{
    Batch, Engine, EngineOptions, HostLoss, IGNORED, LogitRows, Model, ModelConfig, Result,
    Trainer, TrainerOptions,
};

const VOCAB: usize = 61;
/// Blocks of queries are crossed by documents of the CPU's, and tiles of the GPU's.
const T: usize = 200;
/// What ends a document below.
const END: u32 = 60;

fn engines() -> Vec<Engine> {
    let of = |device: &str| EngineOptions { device: device.into(), ..EngineOptions::default() };
    let mut engines = vec![Engine::new(of("cpu")).unwrap()];
    match Engine::new(of("cuda")) {
        Ok(engine) => engines.push(engine),
        Err(error) => println!("skipped: no GPU: {error}"),
    }
    engines
}

fn is_gpu(engine: &Engine) -> bool {
    engine.device().starts_with("cuda")
}

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

#[test]
fn a_packed_document_has_the_logits_that_it_has_alone() {
    let [tokens, _, documents] = packed();
    for engine in engines() {
        for recipe in ["fp32", "bf16", "mxfp4-rht-sr"] {
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
        for recipe in ["fp32", "bf16"] {
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
