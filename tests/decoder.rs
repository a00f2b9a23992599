//! Decoding with what is kept of a text gives the logits of the whole computation, to the bit.

use mxfp4train::{
    Activation, Architecture, Dataset, Decoder, DecoderOptions, DecoderWeights, Draft, Engine,
    EngineOptions, Error, GenerateOptions, Model, ModelConfig, Schedule, StoredWeights, Trainer,
    TrainerOptions,
};

fn engine(threads: usize) -> Engine {
    Engine::new(EngineOptions { threads, seed: 7, ..EngineOptions::default() }).unwrap()
}

/// A context of more than one pass of rows, of which nothing is a multiple; an MLP whose sums take
/// more than one pass; few heads of few channels; and Llama's blocks, with heads that share keys and
/// values, and with norms of heads.
fn configs() -> [ModelConfig; 4] {
    let odd = ModelConfig {
        vocab_size: 97,
        context_length: 150,
        layers: 2,
        heads: 3,
        channels: 51,
        mlp_channels: 601,
        activation: Activation::Gelu,
        tied_head: false,
        scale_attention_by_layer: true,
        ..ModelConfig::default()
    };
    let plain = ModelConfig {
        vocab_size: 64,
        context_length: 65,
        layers: 3,
        heads: 2,
        channels: 32,
        ..ModelConfig::default()
    };
    let llama = ModelConfig {
        architecture: Architecture::Llama,
        vocab_size: 83,
        context_length: 140,
        layers: 2,
        heads: 6,
        kv_heads: 2,
        channels: 60,
        mlp_channels: 71,
        qkv_bias: true,
        ..ModelConfig::default()
    };
    let qwen3 = ModelConfig {
        kv_heads: 1,
        head_size: 18,
        qkv_bias: false,
        qk_norm: true,
        tied_head: false,
        ..llama.clone()
    };
    [odd, plain, llama, qwen3]
}

fn of_room(model: &Model, room: usize, weights: DecoderWeights) -> Decoder {
    Decoder::new(model, DecoderOptions { room, weights, ..Default::default() }).unwrap()
}

fn tokens(len: usize, vocab_size: usize) -> Vec<u32> {
    (0..len).map(|i| ((i * i * 31 + i * 7 + 3) % vocab_size) as u32).collect()
}

fn whole(model: &Model, tokens: &[u32]) -> Vec<f32> {
    let mut logits = vec![f32::NAN; model.config().vocab_size];
    model.next_logits(tokens, &mut logits).unwrap();
    logits
}

fn of(decoder: &mut Decoder, vocab_size: usize) -> Vec<f32> {
    let mut logits = vec![f32::NAN; vocab_size];
    decoder.logits(0, &mut logits).unwrap();
    logits
}

#[test]
fn logits_are_those_of_the_whole_text_however_it_came() {
    for config in configs() {
        let (vocab, context) = (config.vocab_size, config.context_length);
        let text = tokens(context, vocab);
        let model = Model::new(&engine(1), &config).unwrap();
        let expected: Vec<_> = (1..=context).map(|len| whole(&model, &text[..len])).collect();
        for threads in [1, 2, 3] {
            let model = Model::new(&engine(threads), &config).unwrap();
            for splits in [&[1][..], &[1, 2, 3, 29], &[49, 1], &[128, 5, 17], &[context]] {
                let mut decoder = of_room(&model, context, DecoderWeights::F32);
                let mut splits = splits.iter().cycle();
                while decoder.tokens(0).len() < context {
                    let start = decoder.tokens(0).len();
                    let end = context.min(start + splits.next().unwrap());
                    decoder.push(0, &text[start..end]).unwrap();
                    // Asking twice changes nothing, and not asking neither.
                    for _ in 0..end % 3 {
                        assert!(of(&mut decoder, vocab) == expected[end - 1], "{threads}, {end}");
                    }
                }
                assert!(of(&mut decoder, vocab) == expected[context - 1]);
                assert_eq!(decoder.tokens(0), text);
            }
        }
    }
}

/// All at once, from any token on, more than a pass takes or than it has logits for; and what comes
/// behind is as if nobody had asked.
#[test]
fn logits_of_all_tokens_are_those_after_each() {
    for config in configs() {
        let (vocab, context) = (config.vocab_size, config.context_length);
        let (text, model) = (tokens(context, vocab), Model::new(&engine(2), &config).unwrap());
        for weights in DecoderWeights::ALL {
            let mut decoder = of_room(&model, 0, weights);
            let mut expected = Vec::new();
            for token in &text {
                decoder.push(0, &[*token]).unwrap();
                expected.push(of(&mut decoder, vocab));
            }
            decoder.rewind(0, context - 1).unwrap();
            for from in [0, 1, 30, context - 34, context - 2] {
                let mut all = vec![f32::NAN; (context - 1 - from) * vocab];
                decoder.logits_from(0, from, &mut all).unwrap();
                assert!(all == expected[from..context - 1].concat(), "{weights}, {from}");
            }
            decoder.push(0, &text[context - 1..]).unwrap();
            assert!(of(&mut decoder, vocab) == expected[context - 1]);

            let mut error = |from, len: usize| {
                let mut out = vec![0.0; len];
                decoder.logits_from(0, from, &mut out).unwrap_err().to_string()
            };
            let outside = error(context, vocab);
            let last = context - 1;
            assert!(outside.contains(&format!("from 0 to {last}; got {context}")), "{outside}");
            let short = error(last - 1, vocab);
            assert!(short.contains(&format!("2 times {vocab} numbers, got {vocab}")), "{short}");
            decoder.rewind(0, 0).unwrap();
            let empty = decoder.logits_from(0, 0, &mut []).unwrap_err().to_string();
            assert!(empty.contains("at least one token, got none"), "{empty}");
        }
    }
}

/// Several texts in one pass, of any lengths, have the logits of each, and go on as each would alone,
/// past their room and to ends of their own.
#[test]
fn texts_beside_each_other_are_those_of_each() {
    for config in configs() {
        let (vocab, context) = (config.vocab_size, config.context_length);
        let model = Model::new(&engine(2), &config).unwrap();
        for weights in DecoderWeights::ALL {
            let options = |sequences| DecoderOptions { sequences, weights, ..Default::default() };
            let mut alone = Decoder::new(&model, options(1)).unwrap();
            // More than a pass has logits for.
            let mut decoder = Decoder::new(&model, options(40)).unwrap();
            let lengths: Vec<usize> = (0..40).map(|n| 1 + n * 13 % (context - 3)).collect();
            for (sequence, len) in lengths.iter().enumerate() {
                decoder.push(sequence, &tokens(*len, vocab - sequence % 5)).unwrap();
            }
            // Some have been computed, to some place.
            of(&mut decoder, vocab);
            decoder.fork(0, 7).unwrap();
            decoder.rewind(3, 0).unwrap();
            decoder.push(3, &[1]).unwrap();
            let order: Vec<usize> = (0..40).rev().filter(|n| n % 9 != 5).collect();
            for round in 0..3 {
                let mut all = vec![f32::NAN; order.len() * vocab];
                decoder.logits_of(&order, &mut all).unwrap();
                for (sequence, logits) in order.iter().zip(all.chunks(vocab)) {
                    alone.rewind(0, 0).unwrap();
                    alone.push(0, decoder.tokens(*sequence)).unwrap();
                    assert!(of(&mut alone, vocab) == logits, "{weights}, {sequence}, {round}");
                }
                let next = |n: &usize| (*n, ((n * 7 + round) % vocab) as u32);
                for (sequence, token) in order.iter().filter(|n| *n % 2 == 0).map(next) {
                    if decoder.tokens(sequence).len() < context {
                        decoder.push(sequence, &[token]).unwrap();
                    }
                }
            }

            let how = GenerateOptions {
                max_tokens: 12,
                stop_tokens: (0..4).collect(),
                repetition_penalty: 1.1,
                slide: true,
                seed: u64::MAX - 3,
                ..GenerateOptions::default()
            };
            let before: Vec<Vec<u32>> =
                order.iter().map(|sequence| decoder.tokens(*sequence).to_vec()).collect();
            let mut seen = vec![Vec::new(); order.len()];
            let mut on_token = |n: usize, token: u32| {
                seen[n].push(token);
                seen[n].len() < 3 + n
            };
            let texts = decoder.generate_each(&order, &how, &mut on_token).unwrap();
            assert_eq!(texts, seen);
            let mut ends = [0; 3];
            for (n, text) in texts.iter().enumerate() {
                alone.rewind(0, 0).unwrap();
                alone.push(0, &before[n]).unwrap();
                let how = GenerateOptions { seed: how.seed.wrapping_add(n as u64), ..how.clone() };
                let mut count = 0;
                let mut on_token = |_| {
                    count += 1;
                    count < 3 + n
                };
                let expected = alone.generate(0, &how, &mut on_token).unwrap().tokens;
                assert_eq!(*text, expected, "{weights}, {n}");
                assert_eq!(decoder.tokens(order[n]), alone.tokens(0), "{weights}, {n}");
                let stopped = how.stop_tokens.contains(text.last().unwrap());
                ends[if stopped { 0 } else { 1 + usize::from(text.len() == 12) }] += 1;
            }
            assert!(ends.iter().all(|count| *count > 0), "{ends:?}");

            let mut refused = |sequences: &[usize], len: usize, message: &str| {
                let error = decoder.logits_of(sequences, &mut vec![0.0; len]).unwrap_err();
                assert!(error.to_string().contains(message), "{error}");
            };
            refused(&[1, 2, 1], 3 * vocab, "expected different ones, got 1 twice");
            refused(&[40], vocab, "from 0 to 39, got 40");
            refused(&[1, 2], vocab, &format!("2 times {vocab} numbers, got {vocab}"));
            decoder.rewind(2, 0).unwrap();
            let empty = decoder.logits_of(&[1, 2], &mut vec![0.0; 2 * vocab]).unwrap_err();
            assert!(empty.to_string().contains("got none in 2"), "{empty}");
            decoder.logits_of(&[], &mut []).unwrap();
            let how = GenerateOptions { draft: Draft::Ngram, ..how };
            let drafting = decoder.generate_each(&[1], &how, &mut |_, _| true).unwrap_err();
            assert!(drafting.to_string().contains("draft: expected none"), "{drafting}");
        }
    }
}

/// In f32 the loss is that of an evaluation, on the same windows, also where files are shorter.
#[test]
fn the_loss_of_text_is_that_of_an_evaluation() {
    let [config, ..] = configs();
    let model = Model::new(&engine(2), &config).unwrap();
    for (count, length, most) in [(2000, 150, 0), (2000, 129, 3), (40, 140, 0)] {
        let data = Dataset::from_tokens(tokens(count, 97)).unwrap();
        let options = TrainerOptions {
            recipe: "fp32".parse().unwrap(),
            batch_size: 1,
            sequence_length: length,
            ..TrainerOptions::default()
        };
        let expected = Trainer::new(&model, options).unwrap().eval(&data, most).unwrap();
        let mut losses = [0.0; 3];
        for (weights, loss) in DecoderWeights::ALL.into_iter().zip(&mut losses) {
            let mut decoder = of_room(&model, 0, weights);
            decoder.push(0, &[1, 2]).unwrap();
            let score = decoder.eval(&data, length, most as u64).unwrap();
            assert_eq!(score.tokens, expected.tokens);
            assert!(decoder.tokens(0).is_empty());
            *loss = score.loss;
        }
        assert!((losses[0] - expected.loss).abs() < 1e-5, "{losses:?} {expected:?}");
        let apart = losses.map(|loss| (loss - losses[0]).abs());
        assert!(0.0 < apart[1] && apart[1] < apart[2] && apart[2] < 0.05, "{losses:?}");
    }
    let data = Dataset::from_tokens(tokens(300, 97)).unwrap();
    let mut decoder = of_room(&model, 100, DecoderWeights::F32);
    let error = decoder.eval(&data, 101, 0).unwrap_err().to_string();
    assert!(error.contains("at most 100, for which there is room; got 101"), "{error}");
    assert!(decoder.eval(&data, 0, 0).unwrap_err().to_string().contains("sequence_length"));
}

/// Where logits are not finite behind some token, all that was seen is in the text, whoever guesses; and
/// guesses whose logits are not finite are none.
#[test]
fn a_text_keeps_what_was_seen_before_an_error() {
    let [config, ..] = configs();
    let model = Model::new(&engine(1), &config).unwrap();
    let mut wte = vec![0.0; 97 * 51];
    model.read_tensor("transformer.wte.weight", &mut wte).unwrap();
    // Of many tokens, so that the text soon has one.
    wte[20 * 51..60 * 51].iter_mut().for_each(|v| *v = v.signum() * 3e38);
    model.write_tensor("transformer.wte.weight", &wte).unwrap();
    let mut drawn = 0;
    for draft in Draft::ALL {
        let options = DecoderOptions { drafts: draft.is_of_model(), ..Default::default() };
        let mut decoder = Decoder::new(&model, options).unwrap();
        for seed in 0..20 {
            decoder.rewind(0, 0).unwrap();
            decoder.push(0, &[1, 2, 1, 2]).unwrap();
            let how = GenerateOptions { draft, draft_tokens: 4, seed, ..Default::default() };
            let mut seen = vec![1, 2, 1, 2];
            let mut on_token = |token| {
                seen.push(token);
                true
            };
            let error = decoder.generate(0, &how, &mut on_token).unwrap_err();
            assert!(matches!(error, Error::NotFinite { .. }), "{error}");
            assert_eq!(decoder.tokens(0), seen, "{draft}, {seed}");
            let last = *seen.last().unwrap();
            assert!((20..60).contains(&last), "{draft}: {seen:?}");
            drawn += seen.len();
        }
    }
    // As many for all, who write the same texts.
    assert!(drawn.is_multiple_of(4) && drawn > 4 * 20 * 5, "{drawn}");
}

#[test]
fn what_was_taken_out_leaves_no_trace() {
    let [config, ..] = configs();
    let model = Model::new(&engine(2), &config).unwrap();
    let mut decoder = of_room(&model, 140, DecoderWeights::F32);
    let (first, second) = (tokens(140, 97), tokens(140, 83));
    for (keep, behind) in [(139, 1), (100, 40), (17, 3), (5, 130), (0, 11), (11, 0)] {
        decoder.rewind(0, 0).unwrap();
        decoder.push(0, &first).unwrap();
        of(&mut decoder, 97);
        decoder.rewind(0, keep).unwrap();
        decoder.push(0, &second[..behind]).unwrap();
        let text = [&first[..keep], &second[..behind]].concat();
        assert_eq!(decoder.tokens(0), text);
        assert!(of(&mut decoder, 97) == whole(&model, &text), "{keep}, {behind}");
    }
}

#[test]
fn a_decoder_follows_its_model() {
    let [_, config, ..] = configs();
    let text = tokens(20, 64);
    for weights in DecoderWeights::ALL {
        let model = Model::new(&engine(2), &config).unwrap();
        let mut decoder = of_room(&model, 20, weights);
        let fresh = |len| {
            let mut decoder = of_room(&model, 20, weights);
            decoder.push(0, &text[..len]).unwrap();
            of(&mut decoder, 64)
        };
        decoder.push(0, &text[..10]).unwrap();
        let before = of(&mut decoder, 64);
        let data = Dataset::from_tokens(tokens(2000, 61)).unwrap();
        let options = TrainerOptions {
            schedule: Schedule { lr: 0.1, ..Schedule::default() },
            ..TrainerOptions::default()
        };
        Trainer::new(&model, options).unwrap().step(&data).unwrap();
        let after = of(&mut decoder, 64);
        assert!(after != before && after == fresh(10), "{weights}");
        assert!(weights != DecoderWeights::F32 || after == whole(&model, &text[..10]));
        decoder.push(0, &text[10..15]).unwrap();
        model.write_tensor("transformer.ln_f.bias", &[0.5; 32]).unwrap();
        assert!(of(&mut decoder, 64) == fresh(15), "{weights}");
    }
}

/// In less they are the same however the text came, and those of f32 but for rounding.
#[test]
fn logits_in_less_are_near_and_do_not_depend_on_how_the_text_came() {
    let bounds = [(DecoderWeights::Bf16, 1e-4..0.02), (DecoderWeights::Mxfp4, 0.02..0.3)];
    for (config, (weights, bound)) in
        configs().into_iter().flat_map(|c| bounds.clone().map(|b| (c.clone(), b)))
    {
        let (vocab, context) = (config.vocab_size, config.context_length);
        let text = tokens(context, vocab);
        let decode = |threads, weights, at_once: usize| {
            let model = Model::new(&engine(threads), &config).unwrap();
            let mut decoder = of_room(&model, context, weights);
            for part in text[..context - 1].chunks(at_once) {
                decoder.push(0, part).unwrap();
                of(&mut decoder, vocab);
            }
            decoder.rewind(0, context / 2).unwrap();
            decoder.push(0, &text[context / 2..]).unwrap();
            of(&mut decoder, vocab)
        };
        let in_f32 = decode(1, DecoderWeights::F32, context);
        let in_less = decode(1, weights, context);
        for (threads, at_once) in [(1, 1), (2, 7), (3, 50)] {
            assert!(decode(threads, weights, at_once) == in_less, "{weights}, {threads}");
        }
        let square = |v: &[f32]| v.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>();
        let apart: Vec<f32> = std::iter::zip(&in_f32, &in_less).map(|(a, b)| a - b).collect();
        let error = (square(&apart) / square(&in_f32)).sqrt();
        assert!(bound.contains(&error), "{weights}: {error}");
    }
}

/// A quarter of the context falls out at once.
#[test]
fn sliding_forgets_a_quarter_of_the_context() {
    let [_, config, ..] = configs();
    let model = Model::new(&engine(2), &config).unwrap();
    let options = |slide| GenerateOptions {
        max_tokens: 60,
        temperature: 0.0,
        slide,
        ..GenerateOptions::default()
    };
    let prompt = tokens(30, 64);
    let slid = model.generate(&prompt, &options(true), &mut |_| true).unwrap().tokens;
    let mut text = prompt.clone();
    let mut start = 0;
    for token in &slid {
        if text.len() - start > 65 {
            // As the 66th comes, 17 of 65 fall out.
            start += 17;
        }
        let logits = whole(&model, &text[start..]);
        let best = logits.iter().fold(f32::MIN, |most, v| most.max(*v));
        assert_eq!(logits.iter().position(|v| *v == best), Some(*token as usize), "{start}");
        text.push(*token);
    }
    assert!(start == 34 && slid.len() == 60, "{start}");
    let stepwise = model.generate(&prompt, &options(false), &mut |_| true).unwrap().tokens;
    assert_eq!(stepwise[..36], slid[..36]);
}

/// Up to the end of the context and beyond, where the oldest token falls out.
#[test]
fn generated_text_is_that_of_the_whole_computation() {
    let [_, config, ..] = configs();
    let model = Model::new(&engine(2), &config).unwrap();
    let prompt = tokens(50, 64);
    let options = GenerateOptions {
        max_tokens: 40,
        temperature: 0.0,
        repetition_penalty: 1.3,
        ..GenerateOptions::default()
    };
    let generated = model.generate(&prompt, &options, &mut |_| true).unwrap().tokens;
    let mut text = prompt;
    for token in generated {
        let mut logits = whole(&model, &text);
        for (seen, logit) in logits.iter_mut().enumerate() {
            if text.contains(&(seen as u32)) {
                *logit = if *logit > 0.0 { *logit / 1.3 } else { *logit * 1.3 };
            }
        }
        let best = logits.iter().fold(f32::MIN, |most, v| most.max(*v));
        assert_eq!(logits.iter().position(|v| *v == best), Some(token as usize));
        text.push(token);
    }
    assert_eq!(text.len(), 90);
}

/// In every form the text is, greedily, that which its logits say; and forms write others.
#[test]
fn text_is_written_by_the_weights_that_are_asked_for() {
    let [config, ..] = configs();
    let model = Model::new(&engine(2), &config).unwrap();
    let mut texts = [const { Vec::new() }; 3];
    for (weights, texts) in DecoderWeights::ALL.into_iter().zip(&mut texts) {
        let options =
            GenerateOptions { max_tokens: 5, temperature: 0.0, weights, ..Default::default() };
        for start in 0..40 {
            let prompt = tokens(start + 9, 97)[start..].to_vec();
            let generated = model.generate(&prompt, &options, &mut |_| true).unwrap().tokens;
            let mut decoder = of_room(&model, 14, weights);
            decoder.push(0, &prompt).unwrap();
            for token in &generated {
                let logits = of(&mut decoder, 97);
                let best = logits.iter().fold(f32::MIN, |most, v| most.max(*v));
                assert_eq!(logits.iter().position(|v| *v == best), Some(*token as usize));
                decoder.push(0, &[*token]).unwrap();
            }
            texts.push(generated);
        }
    }
    let [in_f32, in_bf16, in_mxfp4] = texts;
    assert!(in_f32 != in_mxfp4 && in_bf16 != in_mxfp4);
}

#[test]
fn what_cannot_be_is_an_error_and_changes_nothing() {
    let [_, config, ..] = configs();
    let model = Model::new(&engine(1), &config).unwrap();
    for room in [66, usize::MAX] {
        let options = DecoderOptions { room, ..Default::default() };
        let error = Decoder::new(&model, options).unwrap_err().to_string();
        assert!(error.contains("room") && error.contains("65"), "{error}");
    }
    let none = DecoderOptions { sequences: 0, ..Default::default() };
    let error = Decoder::new(&model, none).unwrap_err().to_string();
    assert!(error.contains("sequences") && error.contains("from 1 to 65536"), "{error}");
    let mut all = Decoder::new(&model, DecoderOptions::default()).unwrap();
    assert_eq!((all.room(), all.sequences()), (65, 1));
    for error in [all.push(1, &[]), all.logits(1, &mut []), all.rewind(2, 0), all.fork(0, 1)] {
        let error = error.unwrap_err().to_string();
        assert!(error.contains("sequence") && error.contains("from 0 to 0"), "{error}");
    }
    let mut decoder = of_room(&model, 4, DecoderWeights::F32);
    let mut logits = vec![0.0; 64];
    assert!(decoder.logits(0, &mut logits).unwrap_err().to_string().contains("at least one token"));
    decoder.push(0, &[1, 2]).unwrap();
    assert!(decoder.logits(0, &mut logits[..63]).unwrap_err().to_string().contains("64 numbers"));
    let error = decoder.push(0, &[3, 4, 5]).unwrap_err().to_string();
    assert!(error.contains("at most 2") && error.contains("got 3"), "{error}");
    let error = decoder.push(0, &[3, 64]).unwrap_err();
    assert!(matches!(error, Error::TokenRange { offset: 1, token: 64, .. }), "{error}");
    assert!(decoder.rewind(0, 3).unwrap_err().to_string().contains("at most 2"));
    assert_eq!((decoder.tokens(0), decoder.room()), (&[1, 2][..], 4));
    decoder.logits(0, &mut logits).unwrap();
    assert!(logits == whole(&model, &[1, 2]));
}

/// Texts beside each other are each as if it were alone, whatever order they come in, and one that is
/// forked goes on from where the other was.
#[test]
fn texts_beside_each_other_are_as_if_alone() {
    let [config, ..] = configs();
    let model = Model::new(&engine(2), &config).unwrap();
    let texts = [83, 89, 97].map(|vocab| tokens(150, vocab));
    for weights in DecoderWeights::ALL {
        let alone = |text: &[u32]| {
            let mut decoder = of_room(&model, 150, weights);
            decoder.push(0, text).unwrap();
            of(&mut decoder, 97)
        };
        let of_number = |decoder: &mut Decoder, sequence| {
            let mut logits = vec![f32::NAN; 97];
            decoder.logits(sequence, &mut logits).unwrap();
            logits
        };
        let options = DecoderOptions { sequences: 3, weights, ..Default::default() };
        let mut decoder = Decoder::new(&model, options).unwrap();
        for (start, end) in [(0, 20), (20, 21), (21, 70)] {
            for number in [2, 0, 1] {
                decoder.push(number, &texts[number][start..end]).unwrap();
                let logits = of_number(&mut decoder, number);
                assert!(logits == alone(&texts[number][..end]), "{weights}: {number}, {end}");
            }
        }
        // With tokens that are computed and some that are not yet; onto itself nothing changes.
        decoder.push(0, &texts[0][70..80]).unwrap();
        decoder.fork(0, 2).unwrap();
        decoder.fork(0, 0).unwrap();
        decoder.rewind(0, 30).unwrap();
        decoder.push(2, &texts[1][..9]).unwrap();
        let text = [&texts[0][..80], &texts[1][..9]].concat();
        assert_eq!(decoder.tokens(2), text);
        assert!(of_number(&mut decoder, 2) == alone(&text), "{weights}: forked");
        assert!(of_number(&mut decoder, 0) == alone(&texts[0][..30]), "{weights}: forked from");
        assert!(of_number(&mut decoder, 1) == alone(&texts[1][..70]), "{weights}: beside");
    }
}

/// The codes of a file in MXFP4 are made again of what they stand for, and the rest is as it was.
#[test]
fn a_model_saved_in_mxfp4_decodes_in_mxfp4_as_the_model_does() {
    let dir = tempfile::tempdir().unwrap();
    for config in configs() {
        let model = Model::new(&engine(2), &config).unwrap();
        model.save_as(dir.path(), StoredWeights::Mxfp4).unwrap();
        let loaded = Model::load(&engine(2), dir.path()).unwrap();
        assert_eq!(loaded.config(), model.config());
        let text = tokens(40, config.vocab_size);
        let [ours, theirs] = [&model, &loaded].map(|model| {
            let mut decoder = of_room(model, 64, DecoderWeights::Mxfp4);
            decoder.push(0, &text).unwrap();
            of(&mut decoder, config.vocab_size)
        });
        assert!(ours == theirs);
        assert!(whole(&model, &text) != whole(&loaded, &text));
    }
}
