//! Texts that end a generated text.
//!
//! What may be the beginning of one is held back until the next piece of text decides, so that no
//! part of a stop is ever printed, however the text is cut into tokens.

/// Looks for stops in a text that comes in pieces.
pub(crate) struct Stops {
    stops: Vec<String>,
    /// The end of the text so far, as long as it may be the beginning of a stop.
    held: String,
    found: bool,
}

impl Stops {
    /// Looks for any of `stops`, none of which is empty.
    pub(crate) fn new(stops: &[String]) -> Self {
        debug_assert!(stops.iter().all(|stop| !stop.is_empty()));
        Self { stops: stops.to_vec(), held: String::new(), found: false }
    }

    /// Whether a stop was found; nothing comes out any more.
    pub(crate) fn found(&self) -> bool {
        self.found
    }

    /// Takes a piece of text and gives what is certain to stand before any stop.
    pub(crate) fn push(&mut self, piece: &str) -> String {
        if self.found {
            return String::new();
        }
        self.held.push_str(piece);
        // Of several, the one that is complete first, as if the text came by single characters.
        let first = (self.stops.iter())
            .filter_map(|stop| self.held.find(stop).map(|at| (at + stop.len(), at)))
            .min();
        if let Some((_, at)) = first {
            self.found = true;
            self.held.truncate(at);
            return std::mem::take(&mut self.held);
        }
        let begun = self.stops.iter().filter_map(|stop| begun(stop, &self.held)).max();
        let rest = self.held.split_off(self.held.len() - begun.unwrap_or(0));
        std::mem::replace(&mut self.held, rest)
    }

    /// What was held back, at the end of the text.
    pub(crate) fn finish(self) -> String {
        self.held
    }
}

/// Length of the longest beginning of `stop` that `text` ends with.
fn begun(stop: &str, text: &str) -> Option<usize> {
    let beginnings = stop.char_indices().map(|(at, _)| at).rev();
    beginnings.into_iter().find(|&at| text.ends_with(&stop[..at]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn run<'a>(stops: &[&str], pieces: impl IntoIterator<Item = &'a str>) -> (String, bool) {
        let stops: Vec<_> = stops.iter().map(|stop| (*stop).to_owned()).collect();
        let mut looking = Stops::new(&stops);
        let mut text: String = pieces.into_iter().map(|piece| looking.push(piece)).collect();
        let found = looking.found();
        text.push_str(&looking.finish());
        (text, found)
    }

    #[test]
    fn a_stop_over_several_pieces_is_never_half_printed() {
        let mut stops = Stops::new(&["\n\nUser:".to_owned()]);
        let pieces = ["Hello", "\n", "\nUs", "ed cars\n", "\nUser", ": hi", " there"];
        let out: Vec<_> = pieces.iter().map(|piece| stops.push(piece)).collect();
        assert_eq!(out, ["Hello", "", "", "\n\nUsed cars", "", "", ""]);
        assert!(stops.found());
        assert_eq!(stops.finish(), "");
        assert_eq!(run(&["abc"], ["xa", "b"]), ("xab".into(), false));
        assert_eq!(run(&["aab"], ["a", "a", "a", "b", "c"]), ("a".into(), true));
        assert_eq!(run(&["é!"], ["né", "!"]), ("n".into(), true));
        assert_eq!(run(&["abcd", "bc"], ["abcd"]), ("a".into(), true));
        assert_eq!(run(&[], ["abc"]), ("abc".into(), false));
    }

    proptest! {
        #[test]
        fn pieces_make_no_difference(
            pieces in proptest::collection::vec("[abé]{0,4}", 0..12),
            stops in proptest::collection::vec("[abé]{1,4}", 0..3),
        ) {
            let stops: Vec<_> = stops.iter().map(String::as_str).collect();
            let whole = pieces.concat();
            let (text, found) = run(&stops, pieces.iter().map(String::as_str));
            prop_assert_eq!((text.clone(), found), run(&stops, [whole.as_str()]));
            prop_assert!(whole.starts_with(&text));
            prop_assert_eq!(found, stops.iter().any(|stop| whole.contains(stop)));
            prop_assert!(!stops.iter().any(|stop| text.contains(stop)));
            prop_assert_eq!(found, text.len() < whole.len());
        }
    }
}
