//! Error texts in fixed buffers: one for each thread, one in each handle.
//!
//! A handle's text is copied into a buffer of the asking thread before a pointer to it goes out,
//! so that no thread can pull a text away from under another.

use std::cell::UnsafeCell;
use std::ffi::c_char;
use std::fmt::{self, Write};

/// The message of the last call of this thread that failed: what was expected, what came, and the
/// fix where one is known, with the name of the function in front. Every failing call leaves its
/// message here; calls with a handle leave it on the handle too (mxt_trainer_last_error and the
/// like). Calls that succeed leave it as it is. The empty string when no call has failed yet.
///
/// Never NULL; UTF-8; cut off after 1,023 bytes. The text belongs to the calling thread and stays
/// valid until that thread's next call that fails, or its end. Any thread may call it at any time.
#[unsafe(no_mangle)]
pub extern "C" fn mxt_last_error() -> *const c_char {
    text_of(Slot::Thread)
}

/// Which of a thread's buffers. Each kind of handle has its own, so that the messages of an engine
/// and of a trainer can go into one printf.
#[derive(Clone, Copy, Debug)]
pub(super) enum Slot {
    /// The thread's last failure.
    Thread,
    Engine,
    Model,
    Dataset,
    Trainer,
    Decoder,
    Snapshot,
    Files,
}

/// Replaces the text of a slot of this thread.
pub(super) fn set_text(slot: Slot, message: &Message) {
    // SAFETY: only this thread reaches its buffers, and no reference to one outlives a statement
    // of this file: pointers that the host keeps are read by the host, between calls.
    BUFFERS.with(|buffers| unsafe { *buffers[slot as usize].get() = *message });
}

/// A copy of the text of a slot of this thread.
pub(super) fn kept(slot: Slot) -> Message {
    // SAFETY: as above.
    BUFFERS.with(|buffers| unsafe { *buffers[slot as usize].get() })
}

/// The text of a slot of this thread, valid until the slot's next [`set_text`].
pub(super) fn text_of(slot: Slot) -> *const c_char {
    BUFFERS.with(|buffers| buffers[slot as usize].get().cast::<c_char>().cast_const())
}

thread_local! {
    // Const-made and without destructor: no allocation, and valid until the thread is gone.
    static BUFFERS: [UnsafeCell<Message>; 8] = const {
        [const { UnsafeCell::new(Message::EMPTY) }; 8]
    };
}

/// UTF-8 text that ends with a zero byte.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(super) struct Message([u8; CAPACITY]);

/// Bytes of a text with its zero byte.
const CAPACITY: usize = 1024;

impl Message {
    pub(super) const EMPTY: Self = Self([0; CAPACITY]);

    /// Keeps as many whole characters of `text` as fit.
    pub(super) fn new(text: &str) -> Self {
        Self::of(format_args!("{text}"))
    }

    /// [`Message::new`] of a text that is nowhere in one piece. Allocates nothing.
    pub(super) fn of(text: fmt::Arguments<'_>) -> Self {
        struct Writer {
            message: Message,
            length: usize,
        }
        impl Write for Writer {
            fn write_str(&mut self, part: &str) -> fmt::Result {
                let kept = part.floor_char_boundary(CAPACITY - 1 - self.length);
                let room = &mut self.message.0[self.length..][..kept];
                for (to, from) in room.iter_mut().zip(part.bytes()) {
                    // A zero byte would end the text for a C reader.
                    *to = if from == 0 { b' ' } else { from };
                }
                self.length += kept;
                // What follows a piece that is cut off has no place, even if it were short enough.
                if kept == part.len() { Ok(()) } else { Err(fmt::Error) }
            }
        }
        let mut writer = Writer { message: Self::EMPTY, length: 0 };
        let _ = writer.write_fmt(text);
        writer.message
    }

    pub(super) fn as_str(&self) -> &str {
        let end = self.0.iter().position(|byte| *byte == 0).unwrap_or(CAPACITY);
        std::str::from_utf8(&self.0[..end]).unwrap_or("")
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::CStr;

    use super::*;

    #[test]
    fn long_text_is_cut_at_a_character() {
        assert_eq!(Message::EMPTY.as_str(), "");
        assert_eq!(Message::new("a\0b").as_str(), "a b");
        let long = "é".repeat(1000);
        assert_eq!(Message::new(&long).as_str(), "é".repeat(511));
        let pieces = Message::of(format_args!("{}:{long}!", 7));
        assert_eq!(pieces.as_str(), format!("7:{}", "é".repeat(510)));
    }

    #[test]
    fn slots_and_threads_are_apart() {
        set_text(Slot::Engine, &Message::new("engine"));
        set_text(Slot::Trainer, &Message::new("trainer"));
        // SAFETY: the pointers are to buffers of this thread, which end with a zero byte.
        let text = |slot| unsafe { CStr::from_ptr(text_of(slot)) }.to_str().unwrap_or("");
        assert_eq!((text(Slot::Engine), text(Slot::Trainer)), ("engine", "trainer"));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                // SAFETY: as above.
                assert!(unsafe { CStr::from_ptr(text_of(Slot::Engine)) }.is_empty());
            });
        });
    }
}
