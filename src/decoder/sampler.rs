//! How the next token is chosen from logits: a race of exponential clocks.
//!
//! Token v of weight w_v = e^((logit_v - largest) / temperature) waits for -ln(u_v) / w_v, where u_v
//! is uniform in (0, 1), and the first one is chosen; that is each of them with the probability
//! w_v / sum w (the Gumbel trick, Gumbel 1954). u is drawn for (seed, number of the token in the
//! text, v) and for nothing else. So whoever has similar logits mostly chooses the same token, which
//! is what drafts are for, and tokens that are cut away change nothing for the others.

use super::options::GenerateOptions;
use crate::formats::{Draw, Purpose};
use crate::reserve::{reserve, zeros};
use crate::{Error, Result};

/// A token and its weight.
type Weighted = (u32, f64);

/// Chooses tokens from logits.
pub(super) struct Sampler<'a> {
    options: &'a GenerateOptions,
    draw: Draw,
    /// Room for all tokens.
    ranked: Vec<Weighted>,
    /// Whether the text has a token, and all that it has; not kept where nothing is changed by it.
    is_seen: Vec<bool>,
    seen: Vec<u32>,
}

impl<'a> Sampler<'a> {
    pub(super) fn new(options: &'a GenerateOptions, vocab_size: usize) -> Result<Self> {
        let (mut ranked, mut seen) = (Vec::new(), Vec::new());
        reserve(&mut ranked, "a ranking of the tokens", vocab_size)?;
        let vocab = if options.repetition_penalty == 1.0 { 0 } else { vocab_size };
        reserve(&mut seen, "the tokens of the text", vocab)?;
        Ok(Self {
            options,
            draw: Draw::of(options.seed, Purpose::Sampling, 0, 0),
            ranked,
            is_seen: zeros("the tokens of the text", vocab)?,
            seen,
        })
    }

    /// The text has this token from here on.
    pub(super) fn note(&mut self, token: u32) {
        if let Some(is_seen) = self.is_seen.get_mut(token as usize)
            && !std::mem::replace(is_seen, true)
        {
            self.seen.push(token);
        }
    }

    /// How many different tokens the text has, as far as that changes anything.
    pub(super) fn seen(&self) -> usize {
        self.seen.len()
    }

    /// The text has only the first `seen` of its different tokens.
    pub(super) fn forget(&mut self, seen: usize) {
        self.seen.drain(seen..).for_each(|token| self.is_seen[token as usize] = false);
    }

    /// Token number `index` of a text, from its logits, which penalties change.
    pub(super) fn choose(&mut self, logits: &mut [f32], index: u32) -> Result<u32> {
        let GenerateOptions { temperature, top_k, top_p, repetition_penalty, .. } = *self.options;
        if let Some(value) = logits.iter().find(|v| !v.is_finite()) {
            return Err(Error::NotFinite { what: "a logit".into(), value: *value });
        }
        for token in &self.seen {
            let logit = &mut logits[*token as usize];
            let penalized = if *logit > 0.0 {
                *logit / repetition_penalty
            } else {
                *logit * repetition_penalty
            };
            // A small penalty may make a logit infinite.
            *logit = penalized.clamp(f32::MIN, f32::MAX);
        }
        let (best, most) = largest(logits);
        if temperature == 0.0 {
            return Ok(best);
        }
        let weight = |logit: f32| {
            let below = f64::from(logit) - f64::from(most);
            (below / f64::from(temperature)).exp()
        };
        let mut race = Race::of(self.draw, index, f64::from(self.options.min_p));
        if top_k == 0 && top_p == 1.0 {
            // Who is most likely leaves most others no time.
            race.enter((best, 1.0));
            race.enter_all(logits, |logit| (most - logit) / temperature, weight);
        } else {
            let weights = logits.iter().enumerate();
            let weights = weights.map(|(token, logit)| (token as u32, weight(*logit)));
            self.ranked.clear();
            self.ranked.extend(weights);
            let kept = keep(&mut self.ranked, top_k, f64::from(top_p));
            self.ranked[..kept].iter().for_each(|one| race.enter(*one));
        }
        // The most likely one waits for a finite time.
        Ok(race.first)
    }
}

/// The largest logit, and its token; of equal ones the lower number, which is the more likely one.
fn largest(logits: &[f32]) -> (u32, f32) {
    let (lines, rest) = logits.as_chunks::<32>();
    let mut of_lanes = [f32::NEG_INFINITY; 32];
    for line in lines {
        of_lanes
            .iter_mut()
            .zip(line)
            .for_each(|(most, v)| *most = if v > most { *v } else { *most });
    }
    let all = of_lanes.iter().chain(rest);
    let most = all.fold(f32::NEG_INFINITY, |most, v| if *v > most { *v } else { most });
    (logits.iter().position(|v| *v == most).unwrap_or(0) as u32, most)
}

/// Most likely first; of equals the lower number, so that no two are equal.
fn by_rank(a: &Weighted, b: &Weighted) -> std::cmp::Ordering {
    b.1.total_cmp(&a.1).then(a.0.cmp(&b.0))
}

/// Moves the `top_k` most likely tokens (0 for all), and of these the most likely whose weights are
/// at least `top_p` of theirs, to the front, and returns how many they are.
///
/// NOTE: a vocabulary of 50,257 takes two milliseconds to sort, a quarter of a token's time by 124
/// million weights in 4 bits. What is kept is mostly short, so that it is looked for in pieces that
/// grow.
fn keep(all: &mut [Weighted], top_k: usize, top_p: f64) -> usize {
    let mut kept = all.len();
    if (1..kept).contains(&top_k) {
        all.select_nth_unstable_by(top_k - 1, by_rank);
        kept = top_k;
    }
    if top_p == 1.0 {
        return kept;
    }
    // The order of a sum is to be that of the tokens, whatever the selection leaves.
    if kept < all.len() {
        all[..kept].sort_unstable_by_key(|(token, _)| *token);
    }
    let nucleus = top_p * all[..kept].iter().map(|(_, weight)| weight).sum::<f64>();
    let (mut sum, mut ranked, mut piece) = (0.0, 0, 64);
    while ranked < kept {
        let left = &mut all[ranked..kept];
        if piece < left.len() {
            left.select_nth_unstable_by(piece - 1, by_rank);
        }
        let left_len = left.len();
        let of_piece = &mut left[..piece.min(left_len)];
        of_piece.sort_unstable_by(by_rank);
        for (_, weight) in of_piece.iter() {
            sum += weight;
            ranked += 1;
            if sum >= nucleus {
                return ranked;
            }
        }
        piece *= 4;
    }
    kept
}

/// A race between tokens that are entered one by one.
struct Race {
    draw: Draw,
    index: u32,
    least: f64,
    first: u32,
    time: f64,
    /// The last call of the generator, which has the numbers of two tokens.
    pair: (u32, [u32; 4]),
}

impl Race {
    /// For token number `index` of a text, between those of at least `least`.
    fn of(draw: Draw, index: u32, least: f64) -> Self {
        let pair = (0, draw.bits(index, 0));
        Self { draw, index, least, first: 0, time: f64::INFINITY, pair }
    }

    fn enter(&mut self, (token, weight): Weighted) {
        if weight < self.least {
            return;
        }
        let u = self.uniform(token);
        // -ln(u) is at least 1 - u, so that few logarithms are taken.
        if 1.0 - u >= self.time * weight {
            return;
        }
        let time = -u.ln() / weight;
        if time < self.time || (time == self.time && token < self.first) {
            (self.first, self.time) = (token, time);
        }
    }

    /// Enters all tokens: their weights are `weight`, e to the power of minus `below`, which may be
    /// off by a millionth. Behind one that has been entered, whose weight is 1.
    ///
    /// NOTE: of 50,257 tokens some twenty get as far as to have a weight. The others are told apart by
    /// the first 32 of their random bits, in steps that a compiler makes vectors of.
    fn enter_all(
        &mut self,
        logits: &[f32],
        below: impl Fn(f32) -> f32,
        weight: impl Fn(f32) -> f64,
    ) {
        const PAIRS: usize = 16;
        // Not chosen is who has 1 - u >= time w. That is so where 2^e, which 1 - u is at least, is as
        // much: in logarithms to base 2, with a hundredth and more to spare, e >= log2(time) - below.
        let bound_of = |time: f64| time.log2() as f32 + 0.01;
        let mut bound = bound_of(self.time);
        for (number, part) in logits.chunks(2 * PAIRS).enumerate() {
            let first = (number * PAIRS) as u32;
            let [a, _, c, _] = self.draw.bits_of_groups::<PAIRS>(self.index, first);
            let mut may_win = [true; 2 * PAIRS];
            for (i, may_win) in may_win.iter_mut().enumerate().take(part.len()) {
                let high = if i % 2 == 0 { a[i / 2] } else { c[i / 2] };
                // 24 bits are exact as f32, whose exponent is then that of 1 - u or below; -127 for 0.
                let exponent = (((!high >> 8) as f32).to_bits() >> 23) as i32 - 127 - 24;
                let gap = below(part[i]) * (0.9999 * std::f32::consts::LOG2_E);
                // NOTE: logits may be further apart than f32 has numbers.
                let loses = gap < f32::INFINITY && exponent as f32 >= bound - gap;
                *may_win = !loses;
            }
            if may_win[..part.len()].iter().all(|may_win| !may_win) {
                continue;
            }
            for (i, logit) in part.iter().enumerate().filter(|(i, _)| may_win[*i]) {
                self.enter((2 * first + i as u32, weight(*logit)));
            }
            bound = bound_of(self.time);
        }
    }

    /// (k + 1/2) / 2^52 of 52 random bits k, which is neither 0 nor 1.
    fn uniform(&mut self, token: u32) -> f64 {
        if self.pair.0 != token / 2 {
            self.pair = (token / 2, self.draw.bits(self.index, token / 2));
        }
        let [a, b, c, d] = self.pair.1;
        let [high, low] = if token.is_multiple_of(2) { [a, b] } else { [c, d] };
        let bits = (u64::from(high) << 32 | u64::from(low)) >> 12;
        (bits as f64 + 0.5) / (1u64 << 52) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(options: &GenerateOptions, logits: &[f32], draws: u32) -> Vec<u32> {
        let mut sampler = Sampler::new(options, logits.len()).unwrap();
        let mut counts = vec![0; logits.len()];
        for i in 0..draws {
            counts[sampler.choose(&mut logits.to_vec(), i).unwrap() as usize] += 1;
        }
        counts
    }

    /// Logits that a generator gives, some of them alike.
    fn logits(len: usize, seed: u64) -> Vec<f32> {
        let draw = Draw::of(seed, Purpose::Host, 0, 0);
        (0..len as u32).map(|i| (draw.bits(i, 0)[0] % 1000) as f32 / 80.0 - 6.0).collect()
    }

    #[test]
    fn draws_follow_the_softmax() {
        let options = GenerateOptions { temperature: 2.0, ..GenerateOptions::default() };
        let logits = [0.0f32, 2.0, 4.0, -1.0, 2.0];
        let counts = counts(&options, &logits, 20_000);
        let weights: Vec<f64> = logits.iter().map(|l| (f64::from(*l) / 2.0).exp()).collect();
        let total: f64 = weights.iter().sum();
        let chi_square: f64 = std::iter::zip(&counts, &weights)
            .map(|(count, weight)| {
                let expected = 20_000.0 * weight / total;
                (f64::from(*count) - expected).powi(2) / expected
            })
            .sum();
        // 18.5 is passed by one in a thousand.
        assert!(chi_square < 18.5, "{chi_square}, {counts:?}");
    }

    /// The race that skips nothing, among tokens that a whole sort keeps.
    #[test]
    fn what_is_spared_changes_nothing() {
        for (seed, top_k, top_p, min_p, temperature) in [
            (1, 0, 1.0f32, 0.0f32, 1.5f32),
            (2, 0, 0.9, 0.0, 1.5),
            (3, 300, 1.0, 0.0, 1.5),
            (4, 700, 0.99, 0.001, 1.5),
            (5, 0, 1.0, 0.05, 1.5),
            (6, 1, 0.5, 1.0, 1.5),
            (7, 5000, 0.999, 0.0, 1.5),
            (8, 0, 1.0, 0.0, 0.2),
            (9, 0, 1.0, 0.0, 1e-3),
            (10, 0, 1.0, 0.0, 1e-40),
            (11, 0, 1.0, 0.0, 1e3),
            (12, 0, 1.0, 0.0, f32::MAX),
        ] {
            let options = GenerateOptions {
                temperature,
                top_k,
                top_p,
                min_p,
                seed,
                ..GenerateOptions::default()
            };
            let mut sampler = Sampler::new(&options, 1001).unwrap();
            for index in 0..40 {
                let mut logits = logits(1001, 1000 * seed + u64::from(index));
                if index % 8 == 7 {
                    (logits[500], logits[700]) = (f32::MIN, f32::MAX);
                }
                let most = logits.iter().fold(f32::MIN, |most, v| most.max(*v));
                let weight = |logit: &f32| {
                    ((f64::from(*logit) - f64::from(most)) / f64::from(temperature)).exp()
                };
                let mut all: Vec<_> =
                    (0u32..).zip(&logits).map(|(token, logit)| (token, weight(logit))).collect();
                all.sort_by(|a, b| b.1.total_cmp(&a.1));
                if top_k > 0 {
                    all.truncate(top_k);
                }
                let total: f64 = all.iter().map(|one| one.1).sum();
                let mut sum = 0.0;
                let kept = all.iter().take_while(|(_, weight)| {
                    let is_kept = sum < f64::from(top_p) * total;
                    sum += weight;
                    is_kept
                });
                let times = kept.filter(|one| one.1 >= f64::from(min_p)).map(|(token, weight)| {
                    let words = Draw::of(seed, Purpose::Sampling, 0, 0).bits(index, token / 2);
                    let [high, low] = [0, 1].map(|i| words[2 * (*token % 2) as usize + i]);
                    let bits = u64::from(high) << 20 | u64::from(low) >> 12;
                    (-((bits as f64 + 0.5) * 2f64.powi(-52)).ln() / weight, *token)
                });
                let first = times.min_by(|a, b| a.partial_cmp(b).unwrap()).unwrap();
                let chosen = sampler.choose(&mut logits.clone(), index).unwrap();
                assert_eq!(chosen, first.1, "{options:?}, {index}");
            }
        }
    }

    /// Logits that are further apart than f32 has numbers, at a temperature that brings them together.
    #[test]
    fn the_least_likely_token_is_chosen_as_well() {
        let options = GenerateOptions { temperature: f32::MAX, ..GenerateOptions::default() };
        let counts = counts(&options, &[f32::MAX, f32::MIN, f32::MAX], 4000);
        // One in 15.8 by e^-2.
        assert!((150..360).contains(&counts[1]), "{counts:?}");
    }

    /// Two distributions on the same clocks agree as often as the rule says that they do: the sum
    /// over i of 1 / sum_j max(p_j / p_i, q_j / q_i).
    #[test]
    fn similar_logits_mostly_choose_the_same_token() {
        let options = GenerateOptions { temperature: 1.0, ..GenerateOptions::default() };
        let [p, q] = [[0.5f32, 0.3, 0.2], [0.3, 0.6, 0.1]];
        let mut sampler = Sampler::new(&options, 3).unwrap();
        let mut choose =
            |of: &[f32; 3], index| sampler.choose(&mut of.map(f32::ln), index).unwrap();
        let alike = (0..40_000).filter(|i| choose(&p, *i) == choose(&q, *i)).count();
        // 0.69412, and three standard deviations.
        assert!((alike as f64 / 40_000.0 - 0.69412).abs() < 0.007, "{alike}");
    }

    #[test]
    fn greedy_and_cuts_leave_the_tail_out() {
        let logits = [1.0f32, 3.0, 2.0, 3.0];
        let base = GenerateOptions { temperature: 1.0, ..GenerateOptions::default() };
        let greedy = GenerateOptions { temperature: 0.0, ..base.clone() };
        assert_eq!(counts(&greedy, &logits, 10), [0, 10, 0, 0]);
        let top_k = GenerateOptions { top_k: 2, ..base.clone() };
        let seen = counts(&top_k, &logits, 200);
        assert!(seen[0] == 0 && seen[2] == 0 && seen[1] > 0 && seen[3] > 0);
        // The two likeliest have 0.40 each: 0.5 needs both, 0.35 only the first.
        let top_p = |top_p| GenerateOptions { top_p, ..base.clone() };
        let seen = counts(&top_p(0.5), &logits, 200);
        assert!(seen[0] == 0 && seen[2] == 0 && seen[1] > 0 && seen[3] > 0);
        assert_eq!(counts(&top_p(0.35), &logits, 10), [0, 10, 0, 0]);
        // The third is 0.37 times as likely as the first, the last 0.14 times.
        let seen = counts(&GenerateOptions { min_p: 0.3, ..base.clone() }, &logits, 200);
        assert!(seen[0] == 0 && seen[1] > 0 && seen[2] > 0 && seen[3] > 0);
        let seen = counts(&GenerateOptions { min_p: 1.0, ..base }, &logits, 200);
        assert!(seen[0] == 0 && seen[1] > 0 && seen[2] == 0 && seen[3] > 0);
    }

    #[test]
    fn what_the_text_has_is_penalized_once() {
        let options = GenerateOptions {
            temperature: 0.0,
            repetition_penalty: 1.5,
            ..GenerateOptions::default()
        };
        let mut sampler = Sampler::new(&options, 4).unwrap();
        let mut choose = |noted: &[u32], mut logits: [f32; 4]| {
            noted.iter().for_each(|token| sampler.note(*token));
            (sampler.choose(&mut logits, 0).unwrap(), logits.to_vec())
        };
        assert_eq!(choose(&[], [3.0, 2.5, 1.0, -1.0]).0, 0);
        assert_eq!(choose(&[0, 0, 3], [3.0, 2.5, 1.0, -1.0]), (1, vec![2.0, 2.5, 1.0, -1.5]));
        assert_eq!(choose(&[1], [-3.0, -2.0, -2.5, -2.25]), (2, vec![-4.5, -3.0, -2.5, -3.375]));
        // Where it would not be finite, it is the largest number that is.
        assert_eq!(choose(&[], [-3e38, -3e38, -3e38, -3e38]).0, 2);
    }

    #[test]
    fn a_broken_model_is_an_error() {
        let options = GenerateOptions::default();
        let mut sampler = Sampler::new(&options, 2).unwrap();
        let chosen = sampler.choose(&mut [0.0, f32::NAN], 0);
        assert!(matches!(chosen, Err(Error::NotFinite { .. })));
    }
}
