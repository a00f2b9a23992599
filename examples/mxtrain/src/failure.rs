//! How a command fails: one line for the user and an exit code.
//!
//! Exit code 2 means "you asked for something that cannot be": a wrong option, a missing or damaged
//! file. Exit code 1 means that a sound request failed while it ran: a full disk, a loss that is
//! NaN.

use std::fmt::Display;
use std::io;
use std::path::Path;

/// The result of a command and of everything below it.
pub(crate) type Outcome<T = ()> = Result<T, Failure>;

/// Why a command failed.
#[derive(Debug)]
pub(crate) struct Failure {
    /// The process's exit code: 1 or 2.
    pub(crate) code: u8,
    /// One line, without the program's name. A newline in it is one of a name, and shown as an
    /// escape.
    pub(crate) message: String,
}

impl Failure {
    /// A wrong option or file: exit code 2.
    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Self { code: 2, message: message.into() }
    }

    /// A failure of a sound request: exit code 1.
    pub(crate) fn runtime(message: impl Into<String>) -> Self {
        Self { code: 1, message: message.into() }
    }

    /// A failed file operation, for `map_err`: "cannot open notes.txt: ...".
    pub(crate) fn io<'a>(action: &'a str, path: &'a Path) -> impl FnOnce(io::Error) -> Self + 'a {
        move |error| Self {
            code: io_code(error.kind()),
            message: format!("cannot {action} {}: {error}", path.display()),
        }
    }

    /// Puts the place where it happened before the message.
    pub(crate) fn within(mut self, place: impl Display) -> Self {
        self.message = format!("{place}: {}", self.message);
        self
    }
}

impl From<mxfp4train::Error> for Failure {
    fn from(error: mxfp4train::Error) -> Self {
        use mxfp4train::Error as E;
        let code = match &error {
            E::NotFinite { .. } | E::Peer { .. } | E::Poisoned => 1,
            E::Io { source, .. } => io_code(source.kind()),
            _ => 2,
        };
        let message = match error {
            E::InvalidArgument { what, message } => format!("{}: {message}", option_name(what)),
            error => error.to_string(),
        };
        Self { code, message }
    }
}

/// The user's mistakes have code 2, the machine's troubles code 1.
fn io_code(kind: io::ErrorKind) -> u8 {
    use io::ErrorKind as K;
    match kind {
        K::NotFound
        | K::PermissionDenied
        | K::AlreadyExists
        | K::NotADirectory
        | K::IsADirectory
        | K::InvalidInput
        | K::InvalidData
        | K::ReadOnlyFilesystem => 2,
        _ => 1,
    }
}

/// The command line's name of a library option, so that an error names what the user typed.
fn option_name(what: &str) -> String {
    let option = match what {
        "context_length" => "context",
        "warmup_steps" => "warmup",
        "total_steps" => "steps",
        "max_tokens" => "tokens",
        "frozen" => "freeze",
        "lora rank" => "lora",
        "lora alpha" => "lora-alpha",
        "lora layers" => "lora-layers",
        "document_end" | "documents" => "document-mask",
        "accumulation" | "batch_size" | "beta1" | "beta2" | "channels" | "clip" | "decay_steps"
        | "device" | "draft" | "draft_tokens" | "gradient_wire" | "heads" | "lanes" | "layers"
        | "lr" | "min_lr" | "min_p" | "mlp_channels" | "prompt" | "recipe"
        | "repetition_penalty" | "schedule" | "sequence_length" | "shard_states" | "sharpness"
        | "temperature" | "threads" | "token_drop" | "token_type" | "top_k" | "top_p"
        | "vocab_size" | "weight_decay" | "weights" => what,
        other => return other.to_owned(),
    };
    format!("--{}", option.replace('_', "-"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn library_errors_keep_their_words_under_the_option_that_the_user_knows() {
        let wrong = mxfp4train::ModelConfig { heads: 5, ..Default::default() }.validate();
        let failure = Failure::from(wrong.unwrap_err());
        assert_eq!(failure.message, "--heads: 5 heads do not divide 768 channels");
        let wrong = mxfp4train::ModelConfig { mlp_channels: usize::MAX, ..Default::default() };
        let message = Failure::from(wrong.validate().unwrap_err()).message;
        assert!(message.starts_with("--mlp-channels: expected"), "{message}");
        assert_eq!(failure.code, 2);
    }

    #[test]
    fn a_full_disk_is_not_the_users_mistake() {
        let fail = |kind| Failure::io("write", Path::new("x"))(io::Error::from(kind)).code;
        assert_eq!(fail(io::ErrorKind::StorageFull), 1);
        assert_eq!(fail(io::ErrorKind::NotFound), 2);
    }
}
