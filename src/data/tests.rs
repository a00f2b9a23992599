use std::collections::HashSet;

use proptest::prelude::*;

use super::*;

/// Files as in-memory sources; token i of file f is f * 100,000 + i, so a window tells its place.
fn dataset(lengths: &[u64]) -> Dataset {
    let file = |(f, &n): (usize, &u64)| {
        let tokens: Vec<_> = (0..n as u32).map(|i| f as u32 * 100_000 + i).collect();
        TokenFile::from_memory(Box::new(tokens)).unwrap()
    };
    Dataset::of(lengths.iter().enumerate().map(file).collect::<Vec<_>>())
}

/// Without weights.
fn plain(tokens: &mut [u32]) -> Window<'_> {
    Window { tokens, weights: &mut [], documents: &mut [] }
}

fn window(data: &Dataset, seed: u64, number: u64, t: usize) -> Vec<u32> {
    let mut out = vec![0; t + 1];
    data.training_window(seed, number, usize::MAX, plain(&mut out)).unwrap();
    out
}

proptest! {
    /// The brute-force model: in every epoch, each long enough file contributes consecutive windows
    /// that start T apart from one phase, and each is visited exactly once.
    #[test]
    fn an_epoch_is_a_tiling_of_every_file(
        lengths in prop::collection::vec(1u64..200, 1..6),
        t in 1usize..40,
        seed: u64,
        epoch in 0u64..3,
    ) {
        let data = dataset(&lengths);
        let total: u64 = lengths
            .iter()
            .map(|&n| if n > t as u64 { ((n - t as u64) / t as u64).max(1) } else { 0 })
            .sum();
        if total == 0 {
            prop_assert!(data.windows(t).is_err());
            return Ok(());
        }
        prop_assert_eq!(data.windows(t).unwrap(), total);
        let mut starts = vec![Vec::new(); lengths.len()];
        for number in epoch * total..(epoch + 1) * total {
            let w = window(&data, seed, number, t);
            prop_assert!(w.windows(2).all(|pair| pair[0] + 1 == pair[1]));
            let (file, start) = (w[0] as usize / 100_000, u64::from(w[0] % 100_000));
            prop_assert!(start + (t as u64) < lengths[file]);
            starts[file].push(start);
        }
        for (file, starts) in starts.iter_mut().enumerate() {
            starts.sort_unstable();
            prop_assert_eq!(starts.len() as u64, windows_of(lengths[file], t as u64));
            prop_assert!(starts.windows(2).all(|pair| pair[1] - pair[0] == t as u64));
        }
    }

    #[test]
    fn evaluation_windows_are_distinct_and_in_order(
        lengths in prop::collection::vec(1u64..200, 1..6),
        t in 1usize..40,
        part in 0.0f64..1.0,
    ) {
        let data = dataset(&lengths);
        let Ok(windows) = data.windows(t) else { return Ok(()) };
        let evaluated = data.eval_windows(t).unwrap();
        prop_assert_eq!((evaluated.total(), evaluated.are_short), (windows, false));
        let count = 1 + ((windows - 1) as f64 * part) as u64;
        let mut out = vec![0; t + 1];
        let mut last = None;
        for index in 0..count {
            prop_assert_eq!(evaluated.length(index, count).unwrap(), t);
            evaluated.read(index, count, usize::MAX, plain(&mut out)).unwrap();
            prop_assert!(out.windows(2).all(|pair| pair[0] + 1 == pair[1]));
            prop_assert!(last < Some(out[0]));
            last = Some(out[0]);
        }
    }
}

#[test]
fn every_token_is_reached_over_the_epochs() {
    for (n, t) in [(5, 4), (7, 4), (11, 4), (12, 4), (13, 4), (100, 7), (33, 32), (63, 32), (2, 1)]
    {
        let data = dataset(&[n]);
        let per_epoch = data.windows(t).unwrap();
        let mut seen = HashSet::new();
        for number in 0..per_epoch * 400 {
            seen.extend(window(&data, 1, number, t));
        }
        assert_eq!(seen.len() as u64, n, "{n} tokens, T = {t}");
    }
}

#[test]
fn epochs_and_seeds_differ_and_samples_do_not_depend_on_history() {
    let data = dataset(&[500, 300]);
    let epoch = data.windows(16).unwrap();
    let order = |seed, epoch_index: u64| {
        (epoch_index * epoch..(epoch_index + 1) * epoch)
            .map(|number| window(&data, seed, number, 16)[0])
            .collect::<Vec<_>>()
    };
    assert_ne!(order(1, 0), order(1, 1));
    assert_ne!(order(1, 0), order(2, 0));
    assert_eq!(order(1, 1), order(1, 1));
    let last = window(&data, 1, u64::MAX, 16);
    assert_eq!(last, window(&data.clone(), 1, u64::MAX, 16));
}

#[test]
fn a_short_dataset_says_how_many_tokens_are_missing() {
    let data = dataset(&[3, 16, 9]);
    let message = data.windows(16).unwrap_err().to_string();
    assert!(message.starts_with("sequence_length: "), "{message}");
    assert!(message.contains("17 tokens") && message.contains("has 16 (28 in all)"), "{message}");
    assert!(data.windows(0).is_err() && data.windows(usize::MAX).is_err());
    assert!(data.training_window(0, 0, 1, plain(&mut [])).is_err());
    assert_eq!(data.windows(15).unwrap(), 1);
}

#[test]
fn a_token_outside_the_vocabulary_is_named() {
    let mut tokens = vec![7; 64];
    tokens[40] = 300;
    let data = Dataset::from_tokens(tokens).unwrap();
    assert_eq!(data.max_token().unwrap(), 300);
    let mut out = [0; 64];
    let error = data.eval_windows(63).unwrap().read(0, 1, 256, plain(&mut out)).unwrap_err();
    assert!(matches!(
        &error,
        Error::TokenRange { source_name, offset: 40, token: 300, vocab_size: 256 }
            if source_name == "<memory>"
    ));
    assert!(data.training_window(0, 0, 256, plain(&mut out)).is_err());
    data.training_window(0, 0, 301, plain(&mut out)).unwrap();
}

#[test]
fn evaluation_asks_for_no_more_than_there_is() {
    let data = dataset(&[100]);
    let mut out = [0; 11];
    let evaluated = data.eval_windows(10).unwrap();
    let windows = evaluated.total();
    for (index, count) in [(0, 0), (windows, windows), (0, windows + 1)] {
        let error = evaluated.read(index, count, usize::MAX, plain(&mut out)).unwrap_err();
        assert!(matches!(error, Error::InvalidArgument { .. }), "{error}");
    }
}

/// The length that is read first has a table of its windows, others have none.
#[test]
fn windows_are_the_same_with_a_table_and_without() {
    let lengths = [5, 1, 64, 2, 2, 100, 17, 1, 33, 8, 3];
    for t in 1..40 {
        let (with, without) = (dataset(&lengths), dataset(&lengths));
        assert!(without.ends(99).is_some() && without.ends(t).is_none());
        let windows = without.windows(t as usize).unwrap();
        let places = |data: &Dataset| (0..windows).map(|w| data.locate(w, t)).collect::<Vec<_>>();
        assert_eq!(places(&with), places(&without), "{t}");
        assert!(with.ends(t).is_some() && with.windows(t as usize).unwrap() == windows);
    }
}
