//! Groups of ranks: processes, or threads of one, that train one model together.
//!
//! All that ranks say to each other goes through two collectives over bytes, which the host gives
//! ([`Collectives`]): MPI, sockets, shared memory. Every rank makes the same calls in the same order;
//! what one of them cannot do it says in the next vote (`news.rs`), so that no other waits for it.
//! Nothing here knows what is trained.
//!
//! NOTE: a collective that fails ends the group, since nobody knows what the others have got of it.
//! Whatever is asked of the group then returns the first reason again, at once.

mod news;
mod share;
mod transport;
mod tree;
pub(crate) mod wire;

use std::fmt;
use std::io;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use bytemuck::{Pod, Zeroable};

use crate::reserve::{collect, reserve, zeros};
use crate::{Error, Result};
pub(crate) use news::{Call, Data};
pub(crate) use share::{Share, owned};
pub use transport::Transport;
pub(crate) use tree::{Joins, sum_parts};
pub use wire::Wire;

use news::News;

/// Two collectives over bytes, of which a group makes all that ranks exchange. Every rank calls them
/// in the same order with the same lengths. They return when this rank's part is done, on the thread
/// of the call that needs them, one at a time.
///
/// An error, whatever it is, ends the group: ranks that still wait have to get one, too, from what
/// carries the bytes (a closed connection, a deadline of its own) or by [`Collectives::abort`].
pub trait Collectives: Send {
    /// Block r of `send` goes to rank r, and block r of `receive` came from it. Both have as many
    /// blocks as there are ranks, all of one length.
    ///
    /// # Errors
    /// Where another rank is gone or does not answer.
    fn all_to_all(&mut self, send: &[u8], receive: &mut [u8]) -> io::Result<()>;

    /// `mine` of all ranks, one behind the other in their order, this one's included.
    ///
    /// # Errors
    /// As [`Collectives::all_to_all`].
    fn all_gather(&mut self, mine: &[u8], all: &mut [u8]) -> io::Result<()>;

    /// This rank gives up: calls in which other ranks wait should fail. Called once at most, and
    /// nothing else afterwards.
    fn abort(&mut self) {}
}

/// What an engine is made with to be one of several ranks ([`crate::EngineOptions::group`]).
///
/// Calls that say so are collective: all ranks make them, in the same order, with the same options.
pub struct Group {
    rank: usize,
    size: usize,
    collectives: Box<dyn Collectives>,
    transport: Transport,
    timeout: Duration,
    shards_states: bool,
    wire: Wire,
}

impl Group {
    /// Longest wait for another rank where gradients go from GPU to GPU, if no other is given.
    pub const TIMEOUT: Duration = Duration::from_secs(600);

    /// Rank `rank`, from 0 on, of `size`.
    pub fn new(rank: usize, size: usize, collectives: Box<dyn Collectives>) -> Self {
        let (transport, timeout, wire) = (Transport::Auto, Self::TIMEOUT, Wire::F32);
        Self { rank, size, collectives, transport, timeout, shards_states: false, wire }
    }

    /// With another way for gradients, the same on all ranks.
    #[must_use]
    pub fn with_transport(self, transport: Transport) -> Self {
        Self { transport, ..self }
    }

    /// With another limit of waiting for a rank where gradients go from GPU to GPU, which cannot tell a
    /// rank that is gone from one that is slow. Collectives have limits of their own.
    #[must_use]
    pub fn with_timeout(self, timeout: Duration) -> Self {
        // Ten years, which can be added to any moment.
        const LONGEST: Duration = Duration::from_secs(10 * 366 * 24 * 3600);
        Self { timeout: timeout.min(LONGEST), ..self }
    }

    /// With the optimizer's states of each tensor on one rank alone, which updates it and gives it to all
    /// others (ZeRO-1), the same on all ranks. It changes no bit. For `adamw` and `muon` without
    /// `ramping`; what a rank kept is lost with it. Where gradients go from GPU to GPU a rank gets the
    /// sums of those alone whose states it keeps ([`crate::Trainer::read_gradient`]).
    /// [`crate::Trainer::snapshot`] is collective then, and rank 0 has what it copies.
    #[must_use]
    pub fn with_sharded_states(self, shards_states: bool) -> Self {
        Self { shards_states, ..self }
    }

    /// With gradients that are sent as something else than f32, the same on all ranks: for links that are
    /// slower than what computes gradients. It changes losses a little, and makes their bits those of so
    /// many ranks. GPUs of one host do not reach each other's memory for it ([`Transport::Peer`]), so that
    /// it makes nothing faster that NVLink carries.
    #[must_use]
    pub fn with_wire(self, wire: Wire) -> Self {
        Self { wire, ..self }
    }

    /// Whether there are no others.
    pub(crate) fn is_one(&self) -> bool {
        (self.rank, self.size) == (0, 1)
    }
}

impl fmt::Debug for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { rank, size, .. } = self;
        f.debug_struct("Group").field("rank", rank).field("size", size).finish_non_exhaustive()
    }
}

/// Most ranks of a group.
const MAX_RANKS: usize = 1 << 12;
/// Most bytes of what a rank says of itself.
const MAX_TEXT: u64 = 1 << 20;

/// A group that an engine belongs to.
pub(crate) struct Ranks {
    rank: usize,
    size: usize,
    /// Where each runs, for messages.
    hosts: Vec<String>,
    pub(crate) transport: Transport,
    pub(crate) timeout: Duration,
    /// Whether each has states of its own parameters alone.
    pub(crate) shards_states: bool,
    /// What gradients are sent as.
    pub(crate) wire: Wire,
    state: Mutex<State>,
}

struct State {
    collectives: Box<dyn Collectives>,
    /// Why nothing more can be asked of it.
    ended: Option<String>,
    /// Of all ranks.
    news: Vec<News>,
    counts: Vec<Counts>,
}

/// What ranks add up of a step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct Counts {
    /// In the order of the tree.
    pub(crate) losses: f64,
    /// What losses are divided by, likewise.
    pub(crate) divisor: f64,
    pub(crate) raised_blocks: u64,
}

impl Ranks {
    /// Meets the others.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a rank that is none; [`Error::Peer`].
    pub(crate) fn new(group: Group) -> Result<Self> {
        let Group { rank, size, collectives, transport, timeout, shards_states, wire } = group;
        if size == 0 || size > MAX_RANKS || rank >= size {
            let message = format!(
                "expected a rank below the number of ranks, and 1 to {MAX_RANKS} of these; got rank \
                 {rank} of {size}"
            );
            return Err(Error::invalid("group", message));
        }
        let news = (0..size).map(|_| Ok(News::zeroed()));
        let news = collect("what ranks say to each other", news)?;
        let counts = zeros("what ranks count", size)?;
        let state = State { collectives, ended: None, news, counts };
        let (hosts, state) = (Vec::new(), Mutex::new(state));
        let mut ranks = Self { rank, size, hosts, transport, timeout, shards_states, wire, state };
        let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
        ranks.hosts = ranks.gather(&host)?;
        Ok(ranks)
    }

    pub(crate) fn rank(&self) -> usize {
        self.rank
    }

    pub(crate) fn size(&self) -> usize {
        self.size
    }

    /// The host that a rank runs on.
    pub(crate) fn host(&self, rank: usize) -> &str {
        &self.hosts[rank]
    }

    /// Ranks on the host of this one.
    pub(crate) fn on_this_host(&self) -> usize {
        self.hosts.iter().filter(|host| **host == self.hosts[self.rank]).count()
    }

    /// Whether nothing more can be asked of it.
    pub(crate) fn has_ended(&self) -> bool {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).ended.is_some()
    }

    /// Tells the others that this rank gives up, for a reason that no vote has carried to them.
    pub(crate) fn end(&self, reason: &str) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).end(reason.to_owned());
    }

    /// Tells the others where an error between votes is this rank's alone, for whom they would wait.
    pub(crate) fn end_if_alone<R>(&self, result: Result<R>) -> Result<R> {
        result.inspect_err(|error| {
            if matches!(error, Error::Device { .. } | Error::OutOfMemory { .. } | Error::Poisoned) {
                self.end(&error.to_string());
            }
        })
    }

    /// Ends the group if what holds it is left by a panic.
    pub(crate) fn until_panic(&self) -> UntilPanic<'_> {
        UntilPanic(self)
    }

    fn with<R>(
        &self,
        call: impl FnOnce(&mut dyn Collectives, &mut [News], &mut [Counts]) -> io::Result<R>,
    ) -> Result<R> {
        // A lock that is poisoned is of a collective that panicked.
        let mut state = self.state.lock().unwrap_or_else(|poisoned| {
            let mut state = poisoned.into_inner();
            state.end("a collective panicked".to_owned());
            state
        });
        if let Some(ended) = &state.ended {
            return Err(peer(format!("the group has ended: {ended}")));
        }
        let State { collectives, news, counts, .. } = &mut *state;
        call(&mut **collectives, news, counts).map_err(|error| {
            let reason = format!("rank {} got no answer: {error}", self.rank);
            state.end(reason.clone());
            peer(reason)
        })
    }

    /// Block r of `send` goes to rank r, and block r of `receive` came from it.
    ///
    /// # Errors
    /// [`Error::Peer`].
    pub(crate) fn all_to_all(&self, send: &[u8], receive: &mut [u8]) -> Result<()> {
        debug_assert!(send.len() == receive.len() && send.len().is_multiple_of(self.size));
        let block = send.len() / self.size;
        self.with(|collectives, _, _| {
            collectives.all_to_all(send, receive)?;
            let own = self.rank * block..(self.rank + 1) * block;
            if send[own.clone()] == receive[own] { Ok(()) } else { Err(mixed_up("all_to_all")) }
        })
    }

    /// `mine` of all ranks, in their order.
    ///
    /// # Errors
    /// [`Error::Peer`].
    pub(crate) fn all_gather(&self, mine: &[u8], all: &mut [u8]) -> Result<()> {
        debug_assert_eq!(mine.len() * self.size, all.len());
        self.with(|collectives, _, _| {
            collectives.all_gather(mine, all)?;
            let own = &all[self.rank * mine.len()..][..mine.len()];
            if own == mine { Ok(()) } else { Err(mixed_up("all_gather")) }
        })
    }

    /// `mine` of all ranks, of whom none has more than `longest`, in as many calls as `room` asks for:
    /// `take` gets parts of what each has, with their places in it. Behind the end of the shorter ones
    /// are zeros.
    ///
    /// # Errors
    /// [`Error::Peer`].
    pub(crate) fn all_gather_in_parts(
        &self,
        mine: &[u8],
        longest: usize,
        room: &mut [u8],
        take: &mut dyn FnMut(usize, usize, &[u8]),
    ) -> Result<()> {
        let most = room.len() / (self.size + 1);
        let (sent, room) = room.split_at_mut(most);
        for at in (0..longest).step_by(most) {
            let sent = &mut sent[..most.min(longest - at)];
            let own = mine.get(at..).unwrap_or_default();
            let (to, rest) = sent.split_at_mut(own.len().min(sent.len()));
            to.copy_from_slice(&own[..to.len()]);
            rest.fill(0);
            let room = &mut room[..sent.len() * self.size];
            self.all_gather(sent, room)?;
            for (rank, from) in room.chunks_exact(sent.len()).enumerate() {
                take(rank, at, from);
            }
        }
        Ok(())
    }

    /// A text of each rank, in their order.
    ///
    /// # Errors
    /// [`Error::Peer`].
    pub(crate) fn gather(&self, mine: &str) -> Result<Vec<String>> {
        const WHAT: &str = "what ranks say of themselves";
        let mut lens: Vec<u8> = zeros(WHAT, 8 * self.size)?;
        self.all_gather(&(mine.len() as u64).to_le_bytes(), &mut lens)?;
        let lens: Vec<u64> =
            lens.as_chunks().0.iter().map(|len| u64::from_le_bytes(*len)).collect();
        let longest = lens.iter().copied().max().unwrap_or(0);
        if longest > MAX_TEXT {
            let reason = format!(
                "a rank says that it has {longest} bytes to tell: is it of another version, or do \
                 the callbacks mix up the order of calls?"
            );
            self.end(&reason);
            return Err(peer(reason));
        }
        let longest = longest as usize;
        let (mut padded, mut all) = (Vec::new(), zeros(WHAT, longest * self.size)?);
        reserve(&mut padded, WHAT, longest)?;
        padded.extend_from_slice(mine.as_bytes());
        padded.resize(longest, 0);
        self.all_gather(&padded, &mut all)?;
        let texts = lens.iter().enumerate().map(|(rank, len)| {
            let text = &all[rank * longest..][..*len as usize];
            String::from_utf8_lossy(text).into_owned()
        });
        Ok(texts.collect())
    }

    /// Compares what all ranks must have alike, a name and a value each; every rank gets the same
    /// answer.
    ///
    /// # Errors
    /// [`Error::RanksDiffer`] names the first field that differs; [`Error::Peer`].
    pub(crate) fn compare(&self, mine: &[(&str, String)]) -> Result<()> {
        let lines: Vec<_> = mine.iter().map(|(name, value)| format!("{name}\t{value}")).collect();
        let all = self.gather(&lines.join("\n"))?;
        let of = |rank: usize| all[rank].split('\n').map(|line| line.split_once('\t'));
        let differs = (1..self.size).find_map(|rank| {
            let first = of(0).chain(std::iter::repeat(None));
            let other = of(rank).chain(std::iter::repeat(None));
            let lines = of(0).count().max(of(rank).count());
            let pairs = first.zip(other).take(lines);
            pairs.into_iter().find(|(first, other)| first != other).map(|pair| (rank, pair))
        });
        let Some((rank, (first, other))) = differs else { return Ok(()) };
        let name = first.or(other).map_or("what it says of itself", |(name, _)| name);
        let value = |of: Option<(&str, &str)>| of.map_or("nothing", |(_, value)| value).to_owned();
        let (first, other) = (value(first), value(other));
        let hosts = format!("0 ({}) and {rank} ({})", self.hosts[0], self.hosts[rank]);
        Err(Error::RanksDiffer {
            message: format!(
                "{name} must be the same on all ranks; ranks {hosts} have {first} and {other}"
            ),
        })
    }

    /// The vote of a call. Where one rank fails, it fails on all of them, before any has changed
    /// anything; the rank itself has its own error to return.
    ///
    /// # Errors
    /// [`Error::Stopped`] where a rank was; [`Error::RanksDiffer`] where ranks make
    /// different calls, or are at different steps; [`Error::Peer`] with what went wrong elsewhere.
    pub(crate) fn agree(&self, call: Call, mine: Result<(), &Error>) -> Result<()> {
        let sent = News::new(call, mine);
        let found = self.with(|collectives, news, _| {
            collectives.all_gather(bytemuck::bytes_of(&sent), bytemuck::cast_slice_mut(news))?;
            // What this rank alone may see ends the group: others would wait for it.
            let own = bytemuck::bytes_of(&news[self.rank]);
            if own != bytemuck::bytes_of(&sent) || !news.iter().all(News::is_news) {
                return Err(mixed_up("all_gather"));
            }
            Ok(news::judge(call, news, &self.hosts))
        });
        found?
    }

    /// Adds up what all ranks have counted, behind the vote of a step.
    ///
    /// # Errors
    /// [`Error::Peer`].
    pub(crate) fn sum(&self, mine: Counts) -> Result<Counts> {
        self.with(|collectives, _, counts| {
            collectives.all_gather(bytemuck::bytes_of(&mine), bytemuck::cast_slice_mut(counts))?;
            if bytemuck::bytes_of(&counts[self.rank]) != bytemuck::bytes_of(&mine) {
                return Err(mixed_up("all_gather"));
            }
            let losses = tree::sum_of(0, counts.len(), &|rank| counts[rank].losses);
            let divisor = tree::sum_of(0, counts.len(), &|rank| counts[rank].divisor);
            let raised_blocks = counts.iter().map(|of| of.raised_blocks).sum();
            Ok(Counts { losses, divisor, raised_blocks })
        })
    }

    /// Votes that a call fails before it has done anything, where there are others.
    pub(crate) fn refuse(ranks: Option<&Self>, call: Call, error: Error) -> Error {
        if let Some(ranks) = ranks {
            // What others say about it is less than the error itself.
            let _ = ranks.agree(call, Err(&error));
        }
        error
    }
}

impl State {
    fn end(&mut self, reason: String) {
        if self.ended.is_none() {
            self.ended = Some(reason);
            self.collectives.abort();
        }
    }
}

/// What this rank alone may see, so that it ends the group.
fn mixed_up(which: &str) -> io::Error {
    io::Error::other(format!(
        "{which} brought what no rank has sent: does a callback mix up ranks, or the order of calls, or \
         is a library of another version?"
    ))
}

fn peer(message: String) -> Error {
    Error::Peer { message }
}

/// See [`Ranks::until_panic`].
pub(crate) struct UntilPanic<'a>(&'a Ranks);

impl Drop for UntilPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.end("a call panicked");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All ranks say the same as this one.
    struct Echo;

    impl Collectives for Echo {
        fn all_to_all(&mut self, send: &[u8], receive: &mut [u8]) -> io::Result<()> {
            receive.copy_from_slice(send);
            Ok(())
        }

        fn all_gather(&mut self, mine: &[u8], all: &mut [u8]) -> io::Result<()> {
            all.chunks_exact_mut(mine.len().max(1)).for_each(|one| one.copy_from_slice(mine));
            Ok(())
        }
    }

    #[test]
    fn what_is_gathered_in_parts_is_whole() {
        let ranks = Ranks::new(Group::new(1, 3, Box::new(Echo))).unwrap();
        for (len, room) in [(0, 6), (1, 4), (10, 6), (10, 30), (11, 13), (64, 9), (7, 100)] {
            let mine: Vec<u8> = (1..=len).collect();
            for longest in [mine.len(), mine.len() + 1, mine.len() + 9] {
                let mut all = vec![vec![255; longest]; 3];
                let mut take = |rank: usize, at: usize, part: &[u8]| {
                    all[rank][at..][..part.len()].copy_from_slice(part);
                };
                let room = &mut vec![7; room];
                ranks.all_gather_in_parts(&mine, longest, room, &mut take).unwrap();
                let expected = [&mine[..], &vec![0; longest - mine.len()]].concat();
                assert!(all.iter().all(|one| *one == expected), "{len}, {longest}");
            }
        }
    }
}
