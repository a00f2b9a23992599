//! Connections between all ranks of a run, and the collectives that the library makes
//! everything of.
//!
//! A rank that is gone closes its connections, so that nobody waits for it; one that hangs is given up
//! after [`PATIENCE`].

use std::io::{self, Read, Write};
use std::time::Duration;

use mxfp4train::Collectives;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::stream::Stream;

/// How long ranks wait for a sign of another one.
pub(crate) const PATIENCE: Duration = Duration::from_secs(600);

/// A connection to every other rank.
pub(crate) struct Mesh {
    rank: usize,
    /// By their ranks; none to itself.
    peers: Vec<Option<Stream>>,
    patience: Duration,
}

impl Mesh {
    /// # Errors
    /// Where a connection is of no use.
    pub(crate) fn new(rank: usize, peers: Vec<Option<Stream>>) -> io::Result<Self> {
        for peer in peers.iter().flatten() {
            peer.set_nonblocking(true)?;
        }
        Ok(Self { rank, peers, patience: PATIENCE })
    }

    /// Sends a block to each of the others, and takes one from each, in whatever order they come.
    fn exchange<'a>(
        &mut self,
        block_of: impl Fn(usize) -> &'a [u8],
        receive: &mut [u8],
    ) -> io::Result<()> {
        let size = self.peers.len();
        let block = receive.len() / size;
        if block == 0 {
            return Ok(());
        }
        receive[self.rank * block..][..block].copy_from_slice(block_of(self.rank));
        let (mut sent, mut got) = (vec![0; size], vec![0; size]);
        loop {
            let mut waiting = Vec::new();
            let mut fds = Vec::new();
            for (rank, peer) in self.peers.iter().enumerate() {
                let Some(peer) = peer else { continue };
                let mut flags = PollFlags::empty();
                flags.set(PollFlags::IN, got[rank] < block);
                flags.set(PollFlags::OUT, sent[rank] < block);
                if !flags.is_empty() {
                    waiting.push((rank, peer));
                    fds.push(PollFd::new(peer, flags));
                }
            }
            if fds.is_empty() {
                return Ok(());
            }
            let patience = Timespec::try_from(self.patience).map_err(io::Error::other)?;
            match poll(&mut fds, Some(&patience)) {
                Ok(0) => {
                    let ranks: Vec<_> = waiting.iter().map(|(rank, _)| rank.to_string()).collect();
                    let (ranks, seconds) = (ranks.join(", "), self.patience.as_secs());
                    let message = format!("no sign of rank {ranks} for {seconds} s");
                    return Err(io::Error::new(io::ErrorKind::TimedOut, message));
                }
                Err(rustix::io::Errno::INTR) => continue,
                polled => drop(polled?),
            }
            for ((rank, mut peer), fd) in waiting.into_iter().zip(&fds) {
                let is_gone = |_| io::Error::other(format!("rank {rank} is gone"));
                let found = fd.revents();
                if found.contains(PollFlags::OUT) {
                    sent[rank] +=
                        progress(peer.write(&block_of(rank)[sent[rank]..])).map_err(is_gone)?;
                }
                let ended = PollFlags::IN | PollFlags::HUP | PollFlags::ERR;
                if got[rank] < block && found.intersects(ended) {
                    let to = &mut receive[rank * block..][got[rank]..block];
                    got[rank] += progress(peer.read(to)).map_err(is_gone)?;
                } else if found.intersects(PollFlags::HUP | PollFlags::ERR) {
                    return Err(is_gone(io::ErrorKind::BrokenPipe.into()));
                }
            }
        }
    }
}

/// Bytes that a read or a write has done, which is none where it would wait.
fn progress(done: io::Result<usize>) -> io::Result<usize> {
    match done {
        Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
        Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
            Ok(0)
        }
        other => other,
    }
}

impl Collectives for Mesh {
    fn all_to_all(&mut self, send: &[u8], receive: &mut [u8]) -> io::Result<()> {
        let block = send.len() / self.peers.len();
        self.exchange(|rank| &send[rank * block..][..block], receive)
    }

    fn all_gather(&mut self, mine: &[u8], all: &mut [u8]) -> io::Result<()> {
        self.exchange(|_| mine, all)
    }

    fn abort(&mut self) {
        for peer in self.peers.iter().flatten() {
            peer.shut_down();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;
    use std::thread;

    fn meshes(size: usize) -> Vec<Mesh> {
        let mut peers: Vec<Vec<Option<Stream>>> =
            (0..size).map(|_| (0..size).map(|_| None).collect()).collect();
        for a in 0..size {
            for b in a + 1..size {
                let (one, other) = UnixStream::pair().unwrap();
                (peers[a][b], peers[b][a]) = (Some(Stream::Local(one)), Some(Stream::Local(other)));
            }
        }
        peers.into_iter().enumerate().map(|(rank, all)| Mesh::new(rank, all).unwrap()).collect()
    }

    /// More than connections hold, in both directions at once.
    #[test]
    fn blocks_arrive_where_they_belong() {
        for (size, block) in [(1, 5), (2, 3_000_000), (4, 700_001), (3, 1), (3, 0)] {
            let value = |from: usize, to: usize, i: usize| (i * 7 + from * 31 + to * 5) as u8;
            thread::scope(|scope| {
                for (rank, mut mesh) in meshes(size).into_iter().enumerate() {
                    scope.spawn(move || {
                        let blocks =
                            (0..size).flat_map(|to| (0..block).map(move |i| value(rank, to, i)));
                        let send: Vec<u8> = blocks.collect();
                        let mut receive = vec![0; send.len()];
                        for _ in 0..3 {
                            mesh.all_to_all(&send, &mut receive).unwrap();
                            let expected = (0..size)
                                .flat_map(|from| (0..block).map(move |i| value(from, rank, i)));
                            assert!(receive.iter().copied().eq(expected));
                            let mine = [rank as u8 + 1; 4];
                            let mut all = vec![0; 4 * size];
                            mesh.all_gather(&mine, &mut all).unwrap();
                            assert!((0..4 * size).all(|i| all[i] == (i / 4) as u8 + 1));
                        }
                    });
                }
            });
        }
    }

    #[test]
    fn nobody_waits_for_one_that_is_gone_or_silent() {
        let [mut first, second, mut third] =
            <[Mesh; 3]>::try_from(meshes(3)).unwrap_or_else(|_| unreachable!());
        drop(second);
        let mut all = [0; 12];
        let message = first.all_gather(&[1; 4], &mut all).unwrap_err().to_string();
        assert_eq!(message, "rank 1 is gone");
        first.abort();
        assert!(third.all_gather(&[1; 4], &mut all).unwrap_err().to_string().contains("is gone"));

        let [mut first, mut second] =
            <[Mesh; 2]>::try_from(meshes(2)).unwrap_or_else(|_| unreachable!());
        (first.patience, second.patience) = (Duration::from_millis(50), Duration::from_millis(50));
        let message = first.all_gather(&[1; 4], &mut [0; 8]).unwrap_err().to_string();
        assert!(message.starts_with("no sign of rank 1 for"), "{message}");
    }
}
