//! What windows of a length read of files: a file shorter than a window is never read.

/// How many files and tokens the windows of a training run reach.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Coverage {
    /// T: tokens of a sequence. A window has one more.
    pub sequence_length: u64,
    /// Windows of an epoch; 0 where no file is long enough for one.
    pub windows: u64,
    /// Files of the dataset.
    pub files: u64,
    /// Those shorter than a window, which are never read.
    pub short_files: u64,
    /// Tokens of all files.
    pub tokens: u64,
    /// Tokens of the files that are never read.
    pub short_tokens: u64,
    /// Tokens of the shortest file. Sequences of one less read every file.
    pub shortest: u64,
    /// Tokens of the longest file.
    pub longest: u64,
}

impl Coverage {
    /// From the number of tokens of each file.
    pub(super) fn of(lengths: impl Iterator<Item = u64>, sequence_length: usize) -> Self {
        let t = sequence_length as u64;
        let mut sum = Self { sequence_length: t, shortest: u64::MAX, ..Self::default() };
        for tokens in lengths {
            let is_short = tokens <= t || t == 0;
            sum.windows += if is_short { 0 } else { super::windows_of(tokens, t) };
            sum.files += 1;
            sum.short_files += u64::from(is_short);
            sum.tokens += tokens;
            sum.short_tokens += if is_short { tokens } else { 0 };
            sum.shortest = sum.shortest.min(tokens);
            sum.longest = sum.longest.max(tokens);
        }
        sum
    }

    /// What a user should know of files that are never read, and what to do about it: `None` where
    /// all are read. `option` is the name of the sequence length for the user.
    pub fn warning(&self, option: &str) -> Option<String> {
        if self.short_files == 0 {
            return None;
        }
        let &Self { sequence_length, files, short_files, tokens, short_tokens, shortest, .. } =
            self;
        let percent = match (100.0 * short_tokens as f64 / tokens.max(1) as f64).round() as u64 {
            0 => "less than 1%".to_owned(),
            n => format!("{n}%"),
        };
        // A length far below the one wanted is no help.
        let remedy = match shortest.saturating_sub(1) {
            length if length >= 1 && 4 * length >= sequence_length => {
                format!("use {option} {length} or join them")
            }
            _ => "join them".to_owned(),
        };
        Some(format!(
            "{} of {} files {} shorter than a window of {} tokens and will never be read: {} of {} \
             tokens ({percent}); {remedy}",
            grouped(short_files),
            grouped(files),
            if short_files == 1 { "is" } else { "are" },
            grouped(sequence_length + 1),
            grouped(short_tokens),
            grouped(tokens),
        ))
    }
}

/// A number with commas between thousands.
fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let first = digits.len() % 3;
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && i % 3 == first {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(lengths: &[u64], t: usize) -> Coverage {
        Coverage::of(lengths.iter().copied(), t)
    }

    #[test]
    fn files_that_are_never_read_are_counted_and_the_remedy_is_named() {
        let mut lengths = vec![450; 10];
        lengths.push(1200);
        let coverage = of(&lengths, 512);
        assert_eq!((coverage.windows, coverage.shortest, coverage.longest), (1, 450, 1200));
        assert_eq!(
            coverage.warning("--sequence-length").unwrap(),
            "10 of 11 files are shorter than a window of 513 tokens and will never be read: 4,500 of \
             5,700 tokens (79%); use --sequence-length 449 or join them"
        );
        assert_eq!(of(&lengths, 449).warning("x"), None);
        assert_eq!(of(&lengths, 449).windows, 10 + 1);

        let warning = of(&[2, 1_000_000], 512).warning("x").unwrap();
        assert!(warning.starts_with("1 of 2 files is shorter"), "{warning}");
        assert!(warning.ends_with("2 of 1,000,002 tokens (less than 1%); join them"), "{warning}");
    }

    #[test]
    fn thousands_are_grouped() {
        for (n, text) in [(0, "0"), (999, "999"), (1000, "1,000"), (1234567, "1,234,567")] {
            assert_eq!(grouped(n), text);
        }
    }
}
