//! Ranks of a group as threads of this process.

// Every test program uses a part of it.
#![allow(dead_code)]

use std::io;
use std::sync::{Arc, Condvar, Mutex};

use mxfp4train::{Collectives, Engine, EngineOptions, Group};

/// Where ranks meet.
struct Meeting {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// What each rank has brought.
    sent: Vec<Option<Vec<u8>>>,
    /// Ranks that have not yet taken what there is.
    left: usize,
    is_dead: bool,
}

/// One rank of several on threads.
pub(crate) struct Threads {
    rank: usize,
    meeting: Arc<Meeting>,
    /// Collectives until one fails.
    pub(crate) until_failure: usize,
}

impl Threads {
    /// Brings bytes to the others, and calls `take` with what all have brought.
    fn meet(&mut self, mine: &[u8], take: impl FnOnce(&[Option<Vec<u8>>])) -> io::Result<()> {
        let dead = || io::Error::other("another rank has given up");
        if self.until_failure == 0 {
            return Err(io::Error::other("made to fail"));
        }
        self.until_failure -= 1;
        let Meeting { state, changed } = &*self.meeting;
        let free = |state: &mut State| state.left > 0 && !state.is_dead;
        let mut state = changed.wait_while(state.lock().unwrap(), free).unwrap();
        state.sent[self.rank] = Some(mine.to_vec());
        if state.sent.iter().all(Option::is_some) {
            state.left = state.sent.len();
            changed.notify_all();
        }
        let waiting = |state: &mut State| state.left == 0 && !state.is_dead;
        let mut state = changed.wait_while(state, waiting).unwrap();
        if state.left == 0 {
            return Err(dead());
        }
        take(&state.sent);
        state.left -= 1;
        if state.left == 0 {
            state.sent.fill(None);
            changed.notify_all();
        }
        Ok(())
    }
}

impl Collectives for Threads {
    fn all_to_all(&mut self, send: &[u8], receive: &mut [u8]) -> io::Result<()> {
        let (rank, size) = (self.rank, self.meeting.state.lock().unwrap().sent.len());
        let block = send.len() / size;
        self.meet(send, |sent| {
            for (to, from) in receive.chunks_exact_mut(block.max(1)).zip(sent) {
                to.copy_from_slice(&from.as_ref().unwrap()[rank * block..][..block]);
            }
        })
    }

    fn all_gather(&mut self, mine: &[u8], all: &mut [u8]) -> io::Result<()> {
        self.meet(mine, |sent| {
            for (to, from) in all.chunks_exact_mut(mine.len().max(1)).zip(sent) {
                to.copy_from_slice(from.as_ref().unwrap());
            }
        })
    }

    fn abort(&mut self) {
        self.meeting.state.lock().unwrap().is_dead = true;
        self.meeting.changed.notify_all();
    }
}

/// What `of` makes of each rank, on a thread of its own.
pub(crate) fn on_ranks<R: Send>(size: usize, of: impl Fn(usize, Threads) -> R + Sync) -> Vec<R> {
    let state = State { sent: vec![None; size], ..State::default() };
    let meeting = Arc::new(Meeting { state: Mutex::new(state), changed: Condvar::new() });
    let one = |rank| {
        let ranks = Threads { rank, meeting: meeting.clone(), until_failure: usize::MAX };
        let result = std::thread::scope(|scope| scope.spawn(|| of(rank, ranks)).join());
        result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..size).map(|rank| scope.spawn(move || one(rank))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// The options of an engine that is a rank.
pub(crate) fn options(rank: usize, size: usize, ranks: Threads) -> EngineOptions {
    let group = (size > 1).then(|| Group::new(rank, size, Box::new(ranks)));
    EngineOptions { threads: 1, group, ..EngineOptions::default() }
}

/// The same, of which each keeps the optimizer's states of some tensors alone.
pub(crate) fn on_sharded_engines<R: Send>(size: usize, of: impl Fn(&Engine) -> R + Sync) -> Vec<R> {
    on_ranks(size, |rank, ranks| {
        let options = options(rank, size, ranks);
        let group = options.group.map(|group| group.with_sharded_states(true));
        of(&Engine::new(EngineOptions { group, ..options }).unwrap())
    })
}

/// What `of` makes of engines that are one group.
pub(crate) fn on_engines<R: Send>(size: usize, of: impl Fn(&Engine) -> R + Sync) -> Vec<R> {
    on_ranks(size, |rank, ranks| of(&Engine::new(options(rank, size, ranks)).unwrap()))
}
