//! Gradients that GPUs exchange. Each rank adds up a slice of every bucket, in the one order that all
//! ranks have, since NCCL's own sums depend on their number, and hands the sum to all others. GPUs of
//! one host that reach each other's memory do that in one kernel, which reads and writes the memory of
//! all; others by NCCL, which carries slices before and behind.
//!
//! All of it runs on a stream beside that of the pass, where an event says when a bucket is made. The
//! pass is queued as a whole before anything of the exchange is: what waits for the whole device, as
//! loading a kernel does, would else wait for another rank.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Cuda;
use super::device::beside::{Beside, Event};
use super::device::gpu::Gpu;
use super::device::launch;
use super::device::memory::{Arena, Piece};
use super::device::nccl::{Communicator, Id, Message, Nccl};
use super::device::peers::{Exported, MOST_PEERS, Mapped, Peers, Told};
use crate::backend::{Bucket, Exchange, FlatGradients};
use crate::reserve::{collect, zeros};
use crate::{Error, Result};

/// Slices end at multiples of this many bytes, which no vector of a kernel crosses.
const SLICE: usize = 512;
/// Threads of a block, and blocks a multiprocessor.
const THREADS: usize = 256;
const BLOCKS: usize = 4;
/// Multiprocessors that an exchange takes beside a pass. NOTE: on two H200, 345M took 75.85 ms a step
/// with 8, 75.00 with 16 and 75.63 with 32; copies by the engines and a sum behind them, 75.03.
const MOST_BLOCKS: i32 = 16;
/// Threads of each of them, which are to have enough on its way.
const MANY_THREADS: usize = 512;
/// How often a wait looks whether another rank has given up.
const LOOK: Duration = Duration::from_millis(5);
/// After so much of a wait the processor is given away.
const SPIN: Duration = Duration::from_millis(2);

/// The way from this GPU to those of other ranks.
pub(super) struct Link {
    way: Way,
    beside: Beside,
    gpu: Arc<Gpu>,
    rank: usize,
    size: usize,
    /// Longest wait for another rank.
    timeout: Duration,
}

/// How GPUs reach each other.
enum Way {
    Peers(Peers),
    Nccl(Communicator),
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
    /// (ranks - 1) slices of the longest bucket, where NCCL brings them.
    received: Piece,
    stride: usize,
    /// The gradients of all ranks, where these are reached.
    mapped: Vec<Mapped>,
    /// This rank's own, which others reach.
    exported: Option<Piece>,
    /// What others have told.
    words: Vec<u32>,
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
        Nccl::open().and_then(Nccl::id).map_err(|reason| failed("starting NCCL", &reason))
    }

    /// Links it with the GPUs of all ranks of a group by NCCL, all of which do this.
    pub(crate) fn link_by_nccl(
        &mut self,
        id: Id,
        place: (usize, usize),
        timeout: Duration,
    ) -> Result<()> {
        let (rank, size) = place;
        let of = |reason: String| failed("meeting other ranks by NCCL", &reason);
        let nccl = Nccl::open().map_err(of)?;
        let communicator =
            self.gpu.scope(|| Communicator::new(nccl, id, place, MOST_BLOCKS, timeout));
        let (way, beside) = (Way::Nccl(communicator.map_err(of)?), Beside::new(&self.gpu)?);
        let link = Link { way, beside, gpu: self.gpu.clone(), rank, size, timeout };
        link.connect(of)?;
        self.link = Some(Arc::new(link));
        Ok(())
    }

    /// The words in which the ranks of a host tell each other how far they are, and what others map them
    /// by; or why they cannot.
    pub(crate) fn words(&self, size: usize) -> Result<(Words, Exported), String> {
        let words = Peers::words(&self.gpu, size).map_err(|error| error.to_string())?;
        let exported = Exported::new(&self.gpu, &words)?;
        Ok((Words(words), exported))
    }

    /// Links it with the GPUs of all ranks of a group by their memory, from what all have exported; or why
    /// it cannot be.
    pub(crate) fn link_by_memory(
        &mut self,
        Words(own): Words,
        all: &[Exported],
        rank: usize,
        timeout: Duration,
    ) -> Result<(), String> {
        if all.len() > MOST_PEERS {
            return Err(format!("they are more than {MOST_PEERS}"));
        }
        let beside = Beside::new(&self.gpu).map_err(|error| error.to_string())?;
        let mapped = mapped(&self.gpu, &own, all, rank)?;
        let way = Way::Peers(Peers::new(&self.gpu, rank, own, mapped));
        let link = Link { way, beside, gpu: self.gpu.clone(), rank, size: all.len(), timeout };
        self.link = Some(Arc::new(link));
        Ok(())
    }

    /// Takes back that it is linked.
    pub(crate) fn unlink(&mut self) {
        self.link = None;
    }
}

/// See [`Cuda::words`].
pub(crate) struct Words(Piece);

/// What ranks have exported, in their order; this one's own as it is.
fn mapped(
    gpu: &Arc<Gpu>,
    own: &Piece,
    all: &[Exported],
    rank: usize,
) -> Result<Vec<Mapped>, String> {
    let of = |(number, exported)| match number == rank {
        true => Ok(Mapped::own(gpu, own)),
        false => Mapped::new(gpu, exported),
    };
    all.iter().enumerate().map(of).collect()
}

fn failed(what: &str, reason: &str) -> Error {
    Error::Device { message: format!("{what}: {reason}") }
}

fn no_answer(reason: &str) -> Error {
    Error::Peer { message: format!("the exchange between GPUs: {reason}") }
}

impl Link {
    /// Has every pair of ranks exchange a little by NCCL, so that all connections and their memory are
    /// there before a step.
    fn connect(&self, failed: impl Fn(String) -> Error) -> Result<()> {
        let Way::Nccl(nccl) = &self.way else { return Ok(()) };
        let (mut measuring, done) = (Arena::measuring(&self.gpu), Event::new(&self.gpu)?);
        let cut = |arena: &mut Arena| [(); 2].map(|()| arena.bytes(SLICE));
        cut(&mut measuring);
        let [from, to] = cut(&mut Arena::allocated(&self.gpu, measuring.used())?);
        self.gpu.synchronize()?;
        let message =
            |peer| Message { peer, send: (from.address, SLICE), receive: (to.address, SLICE) };
        let ended = self.gpu.scope(|| {
            nccl.exchange(self.others().map(message), self.beside.stream())?;
            self.beside.queue(|| done.record());
            self.wait(&done)
        });
        ended.map_err(|reason| {
            self.abort();
            failed(reason)
        })
    }

    fn others(&self) -> impl Iterator<Item = usize> + use<> {
        let rank = self.rank;
        (0..self.size).filter(move |other| *other != rank)
    }

    /// Waits for an event beside; the host does nothing else, and wants to go on at once.
    fn wait(&self, event: &Event) -> Result<(), String> {
        let (started, mut looked) = (Instant::now(), Instant::now());
        while !event.has_come() {
            let waited = started.elapsed();
            if waited < SPIN {
                std::hint::spin_loop();
                continue;
            }
            match &self.way {
                Way::Nccl(nccl) => nccl.check()?,
                Way::Peers(peers) if looked.elapsed() > LOOK => {
                    looked = Instant::now();
                    if peers.is_given_up() {
                        return Err("another rank has given up".to_owned());
                    }
                }
                Way::Peers(_) => {}
            }
            if waited > self.timeout {
                let seconds = waited.as_secs();
                return Err(format!("no answer from another rank in {seconds} seconds"));
            }
            std::thread::sleep(Duration::from_micros(50));
        }
        Ok(())
    }

    /// Ends what waits for others on this GPU.
    fn abort(&self) {
        let mut ends = self.gpu.scope(|| match &self.way {
            Way::Nccl(nccl) => nccl.abort(),
            Way::Peers(peers) => {
                peers.abort();
                true
            }
        });
        if let (true, Ok(event)) = (ends, Event::new(&self.gpu)) {
            let until = Instant::now() + Duration::from_secs(10);
            self.gpu.scope(|| {
                self.beside.queue(|| event.record());
                while !event.has_come() && Instant::now() < until {
                    if let Way::Peers(peers) = &self.way {
                        peers.release();
                    }
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
    fn abort(&mut self) {
        self.in_flight = false;
        self.link.abort();
        // What others have queued may still reach this rank's memory. That of a process stays as long as
        // others map it; that of a thread has to stay itself.
        let is_of_this = |(rank, of): (usize, &Mapped)| rank != self.link.rank && !of.is_opened();
        if let (Way::Peers(peers), Some(exported)) = (&self.link.way, &self.exported)
            && self.mapped.iter().enumerate().any(is_of_this)
        {
            exported.keep_for_ever();
            peers.keep_for_ever();
        }
    }

    /// The bytes of a bucket that a rank adds up.
    fn slice(&self, bucket: &Bucket, rank: usize) -> (usize, usize) {
        let len = slice(bucket, self.link.size);
        let start = (bucket.range.start + rank * len).min(bucket.range.end);
        (start, len.min(bucket.range.end - start))
    }

    /// Where a slice of another rank lies before it is added.
    fn received(&self, from: usize) -> u64 {
        let place = from - usize::from(from > self.link.rank);
        self.received.address + (place * self.stride) as u64
    }

    fn queue(&self, gpu: &Gpu, gradients: u64, kept: &[Piece]) -> Result<(), String> {
        let link = &*self.link;
        let at = |(start, len): (usize, usize)| (gradients + start as u64, len);
        let mut last = None;
        for (bucket, made) in self.all.iter().zip(&self.made) {
            link.beside.wait_for(if bucket.behind.is_some() { made } else { &self.passed });
            let all @ (start, _) = (bucket.range.start, bucket.range.len());
            for kept in kept.iter().rev() {
                let others = kept.address + start as u64;
                link.beside.queue(|| join(gpu, at(all), others));
            }
            let mine = self.slice(bucket, link.rank);
            match &link.way {
                Way::Peers(peers) => {
                    if peers.is_aborted() {
                        return Err("it was aborted".to_owned());
                    }
                    let count = peers.next();
                    peers.others().for_each(|to| peers.tell(&link.beside, to, Told::Made, count));
                    peers.others().for_each(|by| peers.hear(&link.beside, by, Told::Made, count));
                    self.add_up_everywhere(gpu, mine, bucket.behind.is_some());
                    peers
                        .others()
                        .for_each(|to| peers.tell(&link.beside, to, Told::Arrived, count));
                    last = Some(count);
                }
                Way::Nccl(nccl) => {
                    let parts = link.others().map(|peer| Message {
                        peer,
                        send: at(self.slice(bucket, peer)),
                        receive: (self.received(peer), mine.1),
                    });
                    nccl.exchange(parts, link.beside.stream())?;
                    self.add_up(gpu, at(mine));
                    let sums = link.others().map(|peer| Message {
                        peer,
                        send: at(mine),
                        receive: at(self.slice(bucket, peer)),
                    });
                    nccl.exchange(sums, link.beside.stream())?;
                }
            }
        }
        // The last sum of a rank comes behind all others of it.
        if let (Way::Peers(peers), Some(count)) = (&link.way, last) {
            peers.others().for_each(|by| peers.hear(&link.beside, by, Told::Arrived, count));
        }
        link.beside.queue(|| self.exchanged.record());
        Ok(())
    }

    /// A slice becomes the sum of those of all ranks, in the memory of each of them; `beside` a pass with
    /// few blocks.
    fn add_up_everywhere(&self, gpu: &Gpu, (start, len): (usize, usize), beside: bool) {
        let name = match self.link.size {
            2 => "sum_peers<2>",
            3 => "sum_peers<3>",
            4 => "sum_peers<4>",
            5 => "sum_peers<5>",
            6 => "sum_peers<6>",
            7 => "sum_peers<7>",
            _ => "sum_peers<8>",
        };
        let mut all = [0; MOST_PEERS];
        for (place, mapped) in all.iter_mut().zip(&self.mapped) {
            *place = mapped.address + start as u64;
        }
        let most = if beside { MOST_BLOCKS as usize } else { 4 * gpu.multiprocessors as usize };
        let grid = [(len / 16).div_ceil(MANY_THREADS).min(most), 1, 1];
        self.link.beside.queue(|| {
            launch!(gpu, name, grid, MANY_THREADS, 0; all, (len / 16) as u64);
        });
    }

    /// This rank's slice becomes the sum of it and of those received.
    fn add_up(&self, gpu: &Gpu, (own, len): (u64, usize)) {
        let Link { beside, rank, size, .. } = &*self.link;
        let name = match size {
            2 => "sum_parts<2>",
            4 => "sum_parts<4>",
            8 => "sum_parts<8>",
            _ => "sum_parts<0>",
        };
        beside.queue(|| {
            launch!(gpu, name, grid(gpu, len), THREADS, 0;
                own, self.received.address, (self.stride / 16) as u64, *rank as u32, *size as u32,
                (len / 16) as u64);
        });
    }
}

impl Drop for Buckets {
    fn drop(&mut self) {
        if self.in_flight {
            self.abort();
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
            received: arena.bytes(match link.way {
                Way::Peers(_) => 0,
                Way::Nccl(_) => (link.size - 1) * stride,
            }),
            stride,
            mapped: Vec::new(),
            exported: None,
            words: zeros("what GPUs tell each other", 4 * link.size)?,
            in_flight: false,
        }))
    }

    fn export(&self, buckets: &Buckets, gradients: &FlatGradients<Self>) -> Result<Vec<u8>> {
        if let Way::Nccl(_) = buckets.link.way {
            return Ok(Vec::new());
        }
        let exported = Exported::new(&self.gpu, gradients.all());
        let exported = exported.map_err(|reason| failed("sharing gradients", &reason))?;
        Ok(bytemuck::bytes_of(&exported).to_vec())
    }

    fn map(
        &self,
        buckets: &mut Buckets,
        gradients: &FlatGradients<Self>,
        exported: &[u8],
    ) -> Result<()> {
        let all = exported.chunks_exact(size_of::<Exported>()).map(bytemuck::pod_read_unaligned);
        let all: Vec<Exported> = collect("what ranks reach gradients by", all.map(Ok))?;
        if !all.is_empty() {
            let mapped = mapped(&self.gpu, gradients.all(), &all, buckets.link.rank);
            buckets.mapped = mapped.map_err(|reason| failed("sharing gradients", &reason))?;
            buckets.exported = Some(gradients.all().again());
        }
        Ok(())
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
        let Buckets { link, words, .. } = buckets;
        if let Way::Peers(peers) = &link.way {
            self.read(peers.own_words(), words)?;
            if Peers::says_aborted(words) {
                return Err(no_answer("another rank has given up"));
            }
        }
        buckets.in_flight = false;
        self.gpu.check()
    }

    fn abort_exchange(&self, buckets: &mut Buckets) {
        buckets.abort();
    }
}
