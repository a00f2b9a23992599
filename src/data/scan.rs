//! Finds the largest token of all files, so that one outside the vocabulary is known before the
//! first step and not when a step meets it.
//!
//! Small data are looked at on the spot, which takes some 0.1 s for [`ON_THE_SPOT`] bytes. For
//! larger ones a thread begins at the first use and goes through the files while training goes on;
//! what it has found so far is one atomic number, which every step reads.
//!
//! Where the thread meets a file that has become shorter, or whose disk fails, it ends and leaves
//! the place, which the next check reads again for the error, or begins anew if it can be read now.
//!
//! NOTE: nobody ever waits for the thread but the last owner of the dataset, who ends it. So a
//! forked child, in which the thread does not exist, cannot hang: its first step starts a thread of
//! its own, and it leaves the parent's alone.

use std::process;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::file::{Extent, TokenFile};
use crate::signals::signals_blocked;
use crate::thread::Thread;
use crate::{Error, Result};

/// Most bytes of tokens that a call looks at itself.
const ON_THE_SPOT: u64 = 256 << 20;
/// Tokens that are looked at before the thread asks whether it is still wanted: some 0.1 ms.
const PIECE: u64 = 1 << 18;
/// Bytes of the thread's stack, of which a piece of a file takes most.
const STACK: usize = 256 << 10;
/// In place of the largest token: a number that is no token at all. No vocabulary is larger.
const STRAY: u64 = 1 << 32;

/// The search for the largest token of a dataset.
#[derive(Debug)]
pub(super) struct Scan {
    progress: Arc<Progress>,
    /// Most bytes that are looked at on the spot.
    on_the_spot: u64,
    /// The process whose thread goes through the files; 0 for none.
    process: AtomicU32,
    thread: Mutex<Option<Searcher>>,
}

#[derive(Debug, Default)]
struct Progress {
    /// The largest token so far, or [`STRAY`].
    largest: AtomicU64,
    /// Whether all files have been looked at.
    is_done: AtomicBool,
    is_cancelled: AtomicBool,
    /// The number of the piece that the thread could not read, plus 1; 0 for none.
    unread: AtomicU64,
}

#[derive(Debug)]
struct Searcher {
    thread: Thread,
    process: u32,
}

impl Scan {
    pub(super) fn new() -> Self {
        Self::with_limit(ON_THE_SPOT)
    }

    fn with_limit(on_the_spot: u64) -> Self {
        Self {
            progress: Arc::default(),
            on_the_spot,
            process: AtomicU32::new(0),
            thread: Mutex::new(None),
        }
    }

    /// Says whether what is known of the files fits a vocabulary, and sees to it that all will be
    /// known: now, or in a while.
    ///
    /// # Errors
    /// [`Error::TokenRange`] for the first token that is not below `vocab_size`;
    /// [`Error::Io`].
    pub(super) fn check(&self, files: &Arc<Vec<TokenFile>>, vocab_size: usize) -> Result<()> {
        if !self.progress.is_done.load(Ordering::Acquire) {
            self.begin(files)?;
        }
        if self.progress.largest.load(Ordering::Relaxed) < STRAY.min(vocab_size as u64) {
            return Ok(());
        }
        first_outside(files, vocab_size)
    }

    /// The largest token of all files, which are looked at unless they have been.
    ///
    /// # Errors
    /// [`Error::TokenRange`] for a number that is no token, below 0 or above u32;
    /// [`Error::Io`].
    pub(super) fn largest(&self, files: &Arc<Vec<TokenFile>>) -> Result<u32> {
        if !self.progress.is_done.load(Ordering::Acquire) {
            self.progress.run(files).map_err(|(_, error)| error)?;
        }
        let largest = self.progress.largest.load(Ordering::Relaxed);
        match u32::try_from(largest) {
            Ok(largest) => Ok(largest),
            Err(_) => first_outside(files, STRAY as usize).map(|()| u32::MAX),
        }
    }

    fn begin(&self, files: &Arc<Vec<TokenFile>>) -> Result<()> {
        let bytes: u64 =
            files.iter().map(|f| f.info.tokens * f.info.token_type.bytes() as u64).sum();
        let run_here = || self.progress.run(files).map_err(|(_, error)| error);
        if bytes <= self.on_the_spot {
            return run_here();
        }
        let unread = self.progress.unread.load(Ordering::Acquire);
        if unread > 0
            && let Some((file, first, count)) = pieces(files).nth(unread as usize - 1)
        {
            file.extent(first, count)?;
        }
        let process = process::id();
        if self.process.load(Ordering::Relaxed) == process && unread == 0 {
            return Ok(());
        }
        // Whoever holds the lock starts the thread; in a forked child it may be held for ever.
        let Ok(mut thread) = self.thread.try_lock() else { return Ok(()) };
        let has_ended = self.progress.unread.swap(0, Ordering::Relaxed) > 0;
        if self.process.swap(process, Ordering::Relaxed) == process && !has_ended {
            return Ok(());
        }
        let (progress, its_files) = (self.progress.clone(), files.clone());
        let run = move || {
            if let Err((piece, _)) = progress.run(&its_files) {
                progress.unread.store(piece + 1, Ordering::Release);
            }
        };
        match signals_blocked(|| Thread::start(c"mxt-tokens".into(), STACK, run)) {
            Ok(started) => {
                if let Some(before) = thread.replace(Searcher { thread: started, process }) {
                    before.end();
                }
                Ok(())
            }
            // Without threads it takes a while, once; a file that cannot be read is met again.
            Err(_) => run_here().inspect_err(|_| self.process.store(0, Ordering::Relaxed)),
        }
    }
}

impl Drop for Scan {
    fn drop(&mut self) {
        self.progress.is_cancelled.store(true, Ordering::Relaxed);
        let thread = self.thread.get_mut().unwrap_or_else(PoisonError::into_inner);
        if let Some(thread) = thread.take() {
            thread.end();
        }
    }
}

impl Searcher {
    /// Waits for the end of a thread that ends. What a child has inherited is no thread of its own.
    fn end(self) {
        if self.process == process::id() {
            self.thread.join();
        }
    }
}

impl Progress {
    /// Looks at all files, piece by piece; an error comes with the number of its piece.
    fn run(&self, files: &[TokenFile]) -> Result<(), (u64, Error)> {
        for (piece, (file, first, count)) in (0..).zip(pieces(files)) {
            if self.is_cancelled.load(Ordering::Relaxed) {
                return Ok(());
            }
            let Extent { largest, has_strays } =
                file.extent(first, count).map_err(|error| (piece, error))?;
            let found = if has_strays { STRAY } else { largest.into() };
            self.largest.fetch_max(found, Ordering::Relaxed);
        }
        self.is_done.store(true, Ordering::Release);
        Ok(())
    }
}

/// All tokens in pieces: file, first token, number of tokens.
fn pieces(files: &[TokenFile]) -> impl Iterator<Item = (&TokenFile, u64, u64)> {
    files.iter().flat_map(|file| {
        let tokens = file.info.tokens;
        (0..tokens)
            .step_by(PIECE as usize)
            .map(move |first| (file, first, PIECE.min(tokens - first)))
    })
}

/// # Errors
/// [`Error::TokenRange`] for the first token that is not below `vocab_size`; `Ok` where there
/// is none any more, because another process has changed the file; [`Error::Io`].
fn first_outside(files: &[TokenFile], vocab_size: usize) -> Result<()> {
    for (file, first, count) in pieces(files) {
        let Extent { largest, has_strays } = file.extent(first, count)?;
        if has_strays || largest as usize >= vocab_size {
            file.find_outside(first, count, vocab_size)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::thread;
    use std::time::{Duration, Instant};

    use super::*;

    const PIECE: usize = super::PIECE as usize;

    fn in_memory(tokens: Vec<u32>) -> TokenFile {
        TokenFile::from_memory(Box::new(tokens)).unwrap()
    }

    fn files(tokens: Vec<u32>) -> Arc<Vec<TokenFile>> {
        let some = in_memory((0..10).collect());
        Arc::new(vec![some, in_memory(tokens)])
    }

    /// A scan that looks at nothing on the spot.
    fn in_the_background() -> Scan {
        Scan::with_limit(0)
    }

    fn wait(scan: &Scan) {
        let began = Instant::now();
        while !scan.progress.is_done.load(Ordering::Acquire) {
            assert!(began.elapsed() < Duration::from_secs(60));
            thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn the_first_token_outside_is_named_wherever_it_lies() {
        for place in [0, 1, PIECE - 1, PIECE, 2 * PIECE + 5] {
            let mut tokens = vec![7; 2 * PIECE + 9];
            tokens[place..].fill(300);
            tokens[2 * PIECE + 7] = 400;
            let files = files(tokens);
            for scan in [Scan::new(), in_the_background()] {
                let _ = scan.check(&files, 300);
                wait(&scan);
                let error = scan.check(&files, 300).unwrap_err();
                assert!(
                    matches!(error, Error::TokenRange { offset, token: 300, .. } if offset == place as u64),
                    "{error}"
                );
                scan.check(&files, 401).unwrap();
                assert_eq!(scan.largest(&files).unwrap(), 400);
            }
        }
    }

    #[test]
    fn a_thread_starts_once_and_ends_with_its_owner() {
        let files = files(vec![3; 40 * PIECE]);
        let scan = in_the_background();
        for _ in 0..100 {
            scan.check(&files, 100).unwrap();
        }
        let progress = scan.progress.clone();
        assert_eq!(scan.process.load(Ordering::Relaxed), process::id());
        drop(scan);
        assert_eq!((Arc::strong_count(&progress), Arc::strong_count(&files)), (1, 1));
    }

    /// In a child, the thread of the parent does not run: the child starts its own, and leaves the
    /// parent's alone when it drops the dataset.
    #[cfg(unix)]
    #[test]
    fn a_forked_child_looks_for_itself() {
        let mut tokens = vec![3; 20 * PIECE];
        tokens[19 * PIECE] = 1000;
        let files = files(tokens);
        let scan = in_the_background();
        let _ = scan.check(&files, 100);
        // SAFETY: the child uses no lock that another thread of the parent may hold, and ends by
        // _exit.
        match unsafe { libc::fork() } {
            0 => {
                let found = loop {
                    match scan.check(&files, 100) {
                        Err(Error::TokenRange { token: 1000, .. }) => break true,
                        Ok(()) if !scan.progress.is_done.load(Ordering::Relaxed) => {}
                        _ => break false,
                    }
                    thread::sleep(Duration::from_millis(1));
                };
                let is_its_own = scan.process.load(Ordering::Relaxed) == process::id()
                    || scan.progress.is_done.load(Ordering::Relaxed);
                drop(scan);
                // SAFETY: ends the child at once.
                unsafe { libc::_exit(if found && is_its_own { 0 } else { 1 }) }
            }
            child => {
                let (mut status, mut ended) = (0, 0);
                for _ in 0..3000 {
                    // SAFETY: the child is this process's own.
                    ended = unsafe { libc::waitpid(child, &mut status, libc::WNOHANG) };
                    if ended != 0 {
                        break;
                    }
                    thread::sleep(Duration::from_millis(10));
                }
                assert_eq!((ended, status), (child, 0), "the child hangs or fails");
                wait(&scan);
                assert!(scan.check(&files, 100).is_err());
            }
        }
    }

    /// In a process of its own, whose memory is limited.
    #[test]
    fn without_a_thread_each_check_finds_what_cannot_be_read() {
        use rustix::process::{Resource, getrlimit, setrlimit};
        const ALONE: &str = "MXT_TEST_NO_THREAD";
        const NAME: &str =
            "data::scan::tests::without_a_thread_each_check_finds_what_cannot_be_read";
        if std::env::var_os(ALONE).is_none() {
            let mut alone = process::Command::new(std::env::current_exe().unwrap());
            let output =
                alone.args(["--exact", NAME, "--nocapture"]).env(ALONE, "1").output().unwrap();
            let text = String::from_utf8_lossy(&output.stdout);
            assert!(output.status.success() && text.contains("alone"), "{output:?}");
            return;
        }
        println!("alone");
        let dir = tempfile::TempDir::new().unwrap();
        let path = dir.path().join("t.bin");
        std::fs::write(&path, vec![3; 2 * PIECE]).unwrap();
        let mut buffer = vec![0; crate::data::look::WHOLE];
        let file = TokenFile::open(&path, Some(crate::TokenType::U8), &mut buffer).unwrap();
        let files = Arc::new(vec![file]);
        let scan = in_the_background();
        std::fs::File::options().write(true).open(&path).unwrap().set_len(PIECE as u64).unwrap();

        let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
        let pages: u64 = pages.split(' ').next().unwrap().parse().unwrap();
        let mut limit = getrlimit(Resource::As);
        limit.current = Some(pages * 4096 + STACK as u64 / 2);
        setrlimit(Resource::As, limit).unwrap();
        assert!(Thread::start(c"x".into(), STACK, || ()).is_err());
        for _ in 0..3 {
            let error = scan.check(&files, 100).unwrap_err();
            assert!(matches!(error, Error::Io { .. }), "{error}");
        }
        std::fs::write(&path, vec![200; 2 * PIECE]).unwrap();
        let error = scan.check(&files, 100).unwrap_err();
        assert!(matches!(error, Error::TokenRange { token: 200, .. }), "{error}");
    }

    #[test]
    fn what_the_thread_cannot_read_is_the_error_of_the_next_check() {
        let dir = tempfile::TempDir::new().unwrap();
        let path = dir.path().join("t.bin");
        let mut tokens = vec![3; 4 * PIECE];
        tokens[4 * PIECE - 1] = 200;
        std::fs::write(&path, &tokens).unwrap();
        let mut buffer = vec![0; crate::data::look::WHOLE];
        let file = TokenFile::open(&path, Some(crate::TokenType::U8), &mut buffer).unwrap();
        let files = Arc::new(vec![in_memory(vec![7]), file]);
        let scan = in_the_background();
        std::fs::File::options().write(true).open(&path).unwrap().set_len(PIECE as u64).unwrap();
        let until = |is_it: &dyn Fn(Result<()>) -> bool| {
            let began = Instant::now();
            while !is_it(scan.check(&files, 100)) {
                assert!(began.elapsed() < Duration::from_secs(60));
                thread::sleep(Duration::from_millis(1));
            }
        };
        for _ in 0..3 {
            until(&|result| matches!(result, Err(Error::Io { .. })));
        }
        assert!(matches!(scan.largest(&files), Err(Error::Io { .. })));
        assert!(!scan.progress.is_done.load(Ordering::Relaxed));
        // It goes on where the file can be read again.
        std::fs::write(&path, &tokens).unwrap();
        until(&|result| matches!(result, Err(Error::TokenRange { token: 200, .. })));
        wait(&scan);
        assert_eq!(scan.largest(&files).unwrap(), 200);
    }

    #[test]
    fn whoever_asks_for_the_largest_does_not_wait() {
        let files = files(vec![12; 10]);
        let scan = in_the_background();
        // As in a forked child, where the thread of this process number does not run.
        scan.process.store(process::id(), Ordering::Relaxed);
        scan.check(&files, 100).unwrap();
        assert!(!scan.progress.is_done.load(Ordering::Relaxed));
        assert_eq!(scan.largest(&files).unwrap(), 12);
        assert!(scan.check(&files, 12).is_err());
    }
}
