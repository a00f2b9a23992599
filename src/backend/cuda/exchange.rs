//! Gradients that GPUs exchange: NCCL carries slices, and a kernel adds them up in the one order that
//! all ranks have, since NCCL's own sums depend on their number.
//!
//! All of it runs on a stream beside that of the pass. An event in the pass says when a bucket is
//! made; then each rank gets its slice of it from all others, adds them up where its own lies, and
//! hands the sum to all others. The pass is queued as a whole before anything of the exchange is: what
//! waits for the whole device, as loading a kernel does, would else wait for another rank.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Cuda;
use super::device::beside::{Beside, Event};
use super::device::gpu::Gpu;
use super::device::launch;
use super::device::memory::{Arena, Piece};
use super::device::nccl::{Communicator, Id, Message, Nccl};
use crate::backend::{Bucket, Exchange, FlatGradients};
use crate::reserve::collect;
use crate::{Error, Result};

/// Slices end at multiples of this many bytes, which no vector of a kernel crosses.
const SLICE: usize = 512;
/// Threads of a block, and blocks a multiprocessor.
const THREADS: usize = 256;
const BLOCKS: usize = 4;
/// Multiprocessors that NCCL may take. NOTE: products beside it lose about as much with fewer, which
/// take longer.
const MOST_BLOCKS: i32 = 16;
/// After so much of a wait the processor is given away.
const SPIN: Duration = Duration::from_millis(2);

/// The way from this GPU to those of other ranks.
pub(super) struct Link {
    communicator: Communicator,
    beside: Beside,
    gpu: Arc<Gpu>,
    rank: usize,
    size: usize,
}

/// What a trainer exchanges.
pub(crate) struct Buckets {
    link: Arc<Link>,
    all: Vec<Bucket>,
    /// When each is made, of those that a block makes.
    made: Vec<Event>,
    /// When the pass has done all that is queued, and the exchange.
    passed: Event,
    exchanged: Event,
    /// (ranks - 1) slices of the longest bucket.
    received: Piece,
    stride: usize,
    in_flight: bool,
}

impl Cuda {
    /// What the GPU is called that other processes may use, too, and the release of NCCL; or why there
    /// is none.
    pub(crate) fn reaches(&self) -> (String, Result<String, String>) {
        (self.gpu.uuid(), Nccl::open().map(Nccl::version))
    }

    /// What rank 0 makes for all to be linked by.
    pub(crate) fn link_id(&self) -> Result<Id> {
        Nccl::open().and_then(Nccl::id).map_err(|reason| failed("starting", &reason))
    }

    /// Links it with the GPUs of all ranks of a group, all of which do this.
    pub(crate) fn link(&mut self, id: Id, place: (usize, usize), timeout: Duration) -> Result<()> {
        let (rank, size) = place;
        let of = |reason: String| failed("meeting other ranks", &reason);
        let nccl = Nccl::open().map_err(of)?;
        let communicator =
            self.gpu.scope(|| Communicator::new(nccl, id, place, MOST_BLOCKS, timeout));
        let (communicator, beside) = (communicator.map_err(of)?, Beside::new(&self.gpu)?);
        let link = Link { communicator, beside, gpu: self.gpu.clone(), rank, size };
        link.connect(of)?;
        self.link = Some(Arc::new(link));
        Ok(())
    }
}

fn failed(what: &str, reason: &str) -> Error {
    Error::Device { message: format!("{what} by NCCL: {reason}") }
}

fn no_answer(reason: &str) -> Error {
    Error::Peer { message: format!("the exchange between GPUs: {reason}") }
}

impl Link {
    /// Has every pair of ranks exchange a little, so that all connections and their memory are there
    /// before a step.
    fn connect(&self, failed: impl Fn(String) -> Error) -> Result<()> {
        let (mut arena, done) = (Arena::allocated(&self.gpu, 2 * SLICE)?, Event::new(&self.gpu)?);
        let [from, to] = [(); 2].map(|()| arena.bytes(SLICE));
        self.gpu.synchronize()?;
        let message =
            |peer| Message { peer, send: (from.address, SLICE), receive: (to.address, SLICE) };
        let queued = self.gpu.scope(|| self.exchange(message));
        queued.map_err(&failed)?;
        self.gpu.scope(|| self.beside.queue(|| done.record()));
        let ended = self.gpu.scope(|| self.wait(&done));
        if let Err(reason) = ended {
            self.abort();
            return Err(failed(reason));
        }
        Ok(())
    }

    /// Queues a message to every other rank.
    fn exchange(&self, message: impl Fn(usize) -> Message) -> Result<(), String> {
        let others = (0..self.size).filter(|rank| *rank != self.rank);
        self.communicator.exchange(others.map(message), self.beside.stream())
    }

    /// Waits for an event beside; the host does nothing else, and wants to go on at once.
    fn wait(&self, event: &Event) -> Result<(), String> {
        let started = Instant::now();
        while !event.has_come() {
            let waited = started.elapsed();
            if waited < SPIN {
                std::hint::spin_loop();
                continue;
            }
            self.communicator.check()?;
            if waited > self.communicator.timeout() {
                let seconds = waited.as_secs();
                return Err(format!("no answer from another rank in {seconds} seconds"));
            }
            std::thread::sleep(Duration::from_micros(50));
        }
        Ok(())
    }

    /// Ends what waits for others on this GPU.
    fn abort(&self) {
        let mut ends = self.gpu.scope(|| self.communicator.abort());
        if let (true, Ok(event)) = (ends, Event::new(&self.gpu)) {
            let until = Instant::now() + Duration::from_secs(10);
            self.gpu.scope(|| {
                self.beside.queue(|| event.record());
                while !event.has_come() && Instant::now() < until {
                    std::thread::sleep(Duration::from_millis(1));
                }
                ends = event.has_come();
            });
        }
        if !ends {
            self.gpu.give_up();
        }
    }
}

impl Buckets {
    /// The bytes of a bucket that a rank adds up.
    fn slice(&self, bucket: &Bucket, rank: usize) -> (usize, usize) {
        let len = slice(bucket, self.link.size);
        let start = (bucket.range.start + rank * len).min(bucket.range.end);
        (start, len.min(bucket.range.end - start))
    }

    fn queue(&self, gpu: &Gpu, gradients: u64, kept: &[Piece]) -> Result<(), String> {
        let link = &*self.link;
        let Link { rank, size, .. } = *link;
        let at = |(start, len): (usize, usize)| (gradients + start as u64, len);
        for (bucket, made) in self.all.iter().zip(&self.made) {
            link.beside.wait_for(if bucket.behind.is_some() { made } else { &self.passed });
            let all @ (start, _) = (bucket.range.start, bucket.range.len());
            for kept in kept.iter().rev() {
                let others = kept.address + start as u64;
                link.beside.queue(|| join(gpu, at(all), others));
            }
            let mine = self.slice(bucket, rank);
            let place = |peer: usize| peer - usize::from(peer > rank);
            link.exchange(|peer| Message {
                peer,
                send: at(self.slice(bucket, peer)),
                receive: (self.received.address + (place(peer) * self.stride) as u64, mine.1),
            })?;
            link.beside.queue(|| {
                let name = match size {
                    2 => "sum_parts<2>",
                    4 => "sum_parts<4>",
                    8 => "sum_parts<8>",
                    _ => "sum_parts<0>",
                };
                let ((own, len), others) = (at(mine), self.received.address);
                launch!(gpu, name, grid(gpu, len), THREADS, 0;
                    own, others, (self.stride / 16) as u64, rank as u32, size as u32,
                    (len / 16) as u64);
            });
            link.exchange(|peer| Message {
                peer,
                send: at(mine),
                receive: at(self.slice(bucket, peer)),
            })?;
        }
        link.beside.queue(|| self.exchanged.record());
        Ok(())
    }
}

impl Drop for Buckets {
    fn drop(&mut self) {
        if self.in_flight {
            self.link.abort();
        }
    }
}

/// Bytes of the slice of a rank; the last may be shorter.
fn slice(bucket: &Bucket, size: usize) -> usize {
    bucket.range.len().div_ceil(size).next_multiple_of(SLICE)
}

fn grid(gpu: &Gpu, bytes: usize) -> [usize; 3] {
    let most = BLOCKS * gpu.multiprocessors as usize;
    [(bytes / 16).div_ceil(THREADS).min(most), 1, 1]
}

/// Gradients become others and themselves.
pub(super) fn join(gpu: &Gpu, (gradients, bytes): (u64, usize), others: u64) {
    launch!(gpu, "join_gradients", grid(gpu, bytes), THREADS, 0;
        gradients, others, (bytes / 16) as u64);
}

impl Exchange for Cuda {
    type Buckets = Buckets;

    fn buckets(&self, arena: &mut Arena, all: Vec<Bucket>) -> Result<Option<Buckets>> {
        let Some(link) = &self.link else { return Ok(None) };
        let stride = all.iter().map(|bucket| slice(bucket, link.size)).max().unwrap_or(0);
        let made = all.iter().map(|_| Event::new(&self.gpu));
        Ok(Some(Buckets {
            link: link.clone(),
            made: collect("events", made)?,
            all,
            passed: Event::new(&self.gpu)?,
            exchanged: Event::new(&self.gpu)?,
            received: arena.bytes((link.size - 1) * stride),
            stride,
            in_flight: false,
        }))
    }

    fn block_is_done(&self, buckets: &Buckets, block: usize) {
        let made = buckets.all.iter().zip(&buckets.made);
        let of_block = made.filter(|(bucket, _)| bucket.behind == Some(block));
        of_block.for_each(|(_, made)| made.record());
    }

    fn begin_exchange(
        &self,
        buckets: &mut Buckets,
        gradients: &mut FlatGradients<Self>,
        kept: &[Piece],
    ) -> Result<()> {
        buckets.in_flight = true;
        self.gpu
            .scope(|| {
                buckets.passed.record();
                buckets.queue(&self.gpu, gradients.all().address, kept)
            })
            .map_err(|reason| no_answer(&reason))?;
        self.gpu.check()
    }

    fn end_exchange(&self, buckets: &mut Buckets) -> Result<()> {
        let ended = self.gpu.scope(|| buckets.link.wait(&buckets.exchanged));
        ended.map_err(|reason| no_answer(&reason))?;
        buckets.in_flight = false;
        self.gpu.check()
    }

    fn abort_exchange(&self, buckets: &mut Buckets) {
        buckets.link.abort();
        buckets.in_flight = false;
    }
}
