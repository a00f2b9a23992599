//! Texts scored by a model alone: against the logits of every prefix, against a trainer's loss, and
//! against themselves in other company.

#[path = "common/engines.rs"]
#[allow(dead_code, reason = "not all tests need all of it")]
mod engines;

use engines::engines;
use mxfp4train::{
    Dataset, DecoderWeights, Engine, EngineOptions, Error, Model, ModelConfig, Trainer,
    TrainerOptions,
};

fn config() -> ModelConfig {
    ModelConfig {
        vocab_size: 61,
        context_length: 24,
        layers: 2,
        heads: 2,
        channels: 36,
        ..ModelConfig::default()
    }
}

/// A model whose weights are large enough for logits that differ.
fn model(engine: &Engine) -> Model {
    let model = Model::new(engine, &config()).unwrap();
    let infos: Vec<_> = model
        .tensors()
        .iter()
        .map(|info| (info.name.clone(), info.shape.iter().product::<usize>()))
        .collect();
    for (name, len) in infos {
        let mut values = vec![0.0; len];
        model.read_tensor(&name, &mut values).unwrap();
        values.iter_mut().for_each(|value| *value *= 4.0);
        model.write_tensor(&name, &values).unwrap();
    }
    model
}

fn text(length: usize, seed: usize) -> Vec<u32> {
    (0..length).map(|i| ((i * i + 7 * seed * i + seed) % 61) as u32).collect()
}

fn scored(model: &Model, texts: &[Vec<u32>]) -> (Vec<f32>, Vec<f32>) {
    let (tokens, lengths) = (texts.concat(), texts.iter().map(Vec::len).collect::<Vec<_>>());
    let mut found = vec![f32::NAN; tokens.len()];
    let mut hidden = vec![f32::NAN; tokens.len() * 36];
    let into = Some(&mut hidden[..]);
    model.score(DecoderWeights::F32, &tokens, &lengths, &mut found, into).unwrap();
    (found, hidden)
}

/// What the logits of every prefix say of the next token; and the head makes these logits of the hidden
/// states.
#[test]
fn scores_are_those_of_every_prefix() {
    for engine in engines() {
        let model = model(&engine);
        let texts = [text(24, 1), text(1, 2), text(0, 3), text(9, 4), text(2, 5)];
        let (found, hidden) = scored(&model, &texts);
        let mut head = vec![0.0; 61 * 36];
        model.read_tensor("transformer.wte.weight", &mut head).unwrap();
        let mut at = 0;
        for text in &texts {
            for end in 1..=text.len() {
                let mut logits = vec![0.0; 61];
                model.next_logits(&text[..end], &mut logits).unwrap();
                let hidden = &hidden[36 * (at + end - 1)..][..36];
                for (logit, row) in logits.iter().zip(head.chunks_exact(36)) {
                    let ours: f32 = hidden.iter().zip(row).map(|(a, b)| a * b).sum();
                    assert!((ours - logit).abs() < 1e-4 * (1.0 + logit.abs()), "{ours} {logit}");
                }
                let Some(next) = text.get(end) else { break };
                let sum: f64 = logits.iter().map(|logit| f64::from(*logit).exp()).sum();
                let exact = f64::from(logits[*next as usize]) - sum.ln();
                let ours = f64::from(found[at + end]);
                assert!((ours - exact).abs() < 1e-4 * (1.0 + exact.abs()), "{ours} {exact}");
                assert!(ours < -0.1, "{ours}");
            }
            if !text.is_empty() {
                assert_eq!(found[at], 0.0);
            }
            at += text.len();
        }
        assert_eq!(at, found.len());
    }
}

/// On a processor to the bit, of more texts than are computed at once.
#[test]
fn company_changes_nothing() {
    let engine = Engine::new(EngineOptions::default()).unwrap();
    let model = model(&engine);
    let texts: Vec<_> = (0..600).map(|i| text(i * 5 % 25, i)).collect();
    let (found, hidden) = scored(&model, &texts);
    let mut at = 0;
    for (i, text) in texts.iter().enumerate() {
        if i % 29 == 0 {
            let (alone, hidden_alone) = scored(&model, std::slice::from_ref(text));
            assert_eq!(alone, found[at..][..text.len()], "{i}");
            assert!(hidden_alone == hidden[36 * at..][..36 * text.len()], "{i}");
        }
        at += text.len();
    }
}

/// The loss of an evaluation of a window is the negative mean over it.
#[test]
fn the_mean_is_the_loss_of_an_evaluation() {
    let engine = Engine::new(EngineOptions::default()).unwrap();
    let model = model(&engine);
    let options = TrainerOptions {
        batch_size: 1,
        sequence_length: 23,
        recipe: "fp32".parse().unwrap(),
        ..TrainerOptions::default()
    };
    let mut trainer = Trainer::new(&model, options).unwrap();
    let windows: Vec<_> = (0..4).map(|i| text(24, 9 + i)).collect();
    let (found, _) = scored(&model, &windows);
    for (window, found) in windows.into_iter().zip(found.chunks_exact(24)) {
        let loss = trainer.eval(&Dataset::from_tokens(window).unwrap(), 0).unwrap();
        assert_eq!(loss.tokens, 23);
        let mean = -found.iter().map(|x| f64::from(*x)).sum::<f64>() / 23.0;
        assert!((mean - f64::from(loss.loss)).abs() < 1e-6, "{mean} {}", loss.loss);
    }
}

#[test]
fn what_cannot_be_scored_is_named() {
    let engine = Engine::new(EngineOptions::default()).unwrap();
    let model = Model::new(&engine, &config()).unwrap();
    let score = |weights, tokens: &[u32], lengths: &[usize], room: [usize; 2]| {
        let (mut found, mut hidden) = (vec![7.0; room[0]], vec![7.0; room[1]]);
        let result = model.score(weights, tokens, lengths, &mut found, Some(&mut hidden));
        assert!(found.iter().chain(&hidden).all(|x| *x == 7.0));
        result.unwrap_err()
    };
    let f32 = DecoderWeights::F32;
    for (error, expected) in [
        (
            score(f32, &[1, 2, 3], &[2], [3, 108]),
            "lengths of texts that add up to the 3 tokens, got 2",
        ),
        (score(f32, &[1], &[usize::MAX, 2], [1, 36]), "got more than there can be"),
        (
            score(f32, &[0; 27], &[2, 25], [27, 27 * 36]),
            "at most 24 tokens, the model's context; text 1",
        ),
        (
            score(f32, &[1, 2], &[2], [3, 72]),
            "log_probabilities: expected room for 2 numbers, got 3",
        ),
        (score(f32, &[1, 2], &[2], [2, 71]), "hidden: expected room for 72 numbers, got 71"),
        (score(DecoderWeights::Mxfp4, &[1, 2], &[2], [2, 72]), "expected f32 or bf16"),
    ] {
        assert!(matches!(error, Error::InvalidArgument { .. }), "{error}");
        assert!(error.to_string().contains(expected), "{error}");
    }
    let error = score(f32, &[1, 61], &[2], [2, 72]);
    assert!(matches!(error, Error::TokenRange { token: 61, offset: 1, .. }), "{error}");
    model.score(f32, &[], &[], &mut [], None).unwrap();
    model.score(f32, &[], &[0, 0], &mut [], Some(&mut [])).unwrap();
}
