//! Gradients that GPUs exchange. Each rank adds up a slice of every bucket, in the one order that all
//! ranks have, since NCCL's own sums depend on their number, and hands the sum to all others. GPUs of
//! one host that reach each other's memory do that in one kernel, which reads and writes the memory of
//! all; others by NCCL, which carries slices before and behind.
//!
//! Where ranks own parameters, a rank adds up what it owns of every bucket, and keeps the sum to itself.
//! Of sums of squares, from which the norm comes, all ranks get all; and of weights what others have
//! updated: a part of them is on its way while the next one is updated.
//!
//! All of it runs on a stream beside that of the pass, where an event says when a bucket is made. The
//! pass is queued as a whole before anything of the exchange is: what waits for the whole device, as
//! loading a kernel does, would else wait for another rank.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::Cuda;
use super::device::beside::{Beside, Event};
use super::device::gpu::Gpu;
use super::device::launch;
use super::device::memory::{Arena, Piece};
use super::device::nccl::{Communicator, Id, Message, Nccl};
use super::device::peers::{Exported, MOST_PEERS, Mapped, Peers, Told};
use super::quantize::random;
use super::step::PIECE;
use crate::backend::{Bucket, Exchange, FlatGradients, Reached, Slot};
use crate::comm::Wire;
use crate::comm::wire::{Drawn, Sent};
use crate::reserve::{collect, reserve, zeros};
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
/// Bytes that a rank receives at once, of all others, where ranks own parameters: a bucket may then be
/// one rank's as a whole. And of a message at least.
const OWNED: usize = 128 << 20;
const SHORTEST: usize = 1 << 20;
/// Whose memory a sum is written to, as kernels/exchange.cu has it.
const ALL_PEERS: u32 = u32::MAX;
/// How often a wait looks whether another rank has given up.
const LOOK: Duration = Duration::from_millis(5);
/// Longest wait of what is given back for what is on its way to it.
const LATE: Duration = Duration::from_secs(60);
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
    /// When what no pass reads of the weights has come from the others, where that is still on its way.
    settled: Event,
    unsettled: AtomicBool,
    /// Whether it has not come, and will not.
    is_torn: AtomicBool,
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
    /// When the pass, or a part of the update, has done all that is queued, and the exchange.
    passed: Event,
    exchanged: Event,
    /// (ranks - 1) slices of the longest bucket, where NCCL brings them.
    received: Piece,
    stride: usize,
    /// What gradients are sent as; where that is not f32, `received` has a message of every rank, and
    /// `packed` one to each.
    wire: Wire,
    packed: Piece,
    /// What each rank owns; nothing where all update all.
    owned: Vec<Owned>,
    /// This rank's memory that others reach, as [`Kind`] counts it.
    own: Vec<Piece>,
    /// The same of all ranks, by kind and rank, where these are reached.
    mapped: Vec<Vec<Mapped>>,
    /// Bytes of a master value.
    master: usize,
    /// What others have told.
    words: Vec<u32>,
    /// Whether there was an update, and whether there is one.
    has_updated: bool,
    gathers: bool,
    in_flight: bool,
}

/// What ranks reach of each other; all but gradients where they own parameters.
#[derive(Clone, Copy)]
enum Kind {
    Gradients = 0,
    /// Sums of the squares of gradients, one a piece.
    Squares = 1,
    /// Largest magnitudes of weights.
    Amaxes = 2,
    /// Weights in bf16.
    Copies = 3,
    /// Their master values, or what copies lack of them.
    Masters = 4,
}

/// What a rank owns.
struct Owned {
    /// Bytes of the buffer of gradients.
    gradients: Range<usize>,
    /// The parameters, by their numbers, and their pieces.
    parameters: Range<usize>,
    pieces: Range<usize>,
    /// Elements of the buffers of weights, and these in parts.
    elements: Range<usize>,
    parts: Vec<Range<usize>>,
}

impl Owned {
    fn new(
        parts: &[Range<usize>],
        slots: &[Slot],
        gradients: &FlatGradients<Cuda>,
    ) -> Result<Self> {
        let elements = |part: &Range<usize>| {
            let of = &slots[part.clone()];
            let range = of.first().zip(of.last());
            range.map_or(0..0, |(first, last)| first.start..last.range().end)
        };
        let parameters = parts[0].start..parts[parts.len() - 1].end;
        let byte =
            |index: usize| slots.get(index).map_or(gradients.len(), |slot| gradients.start(*slot));
        let pieces = |slots: &[Slot]| slots.iter().map(|slot| slot.len.div_ceil(PIECE)).sum();
        let first: usize = pieces(&slots[..parameters.start]);
        let count: usize = pieces(&slots[parameters.clone()]);
        Ok(Self {
            gradients: byte(parameters.start)..byte(parameters.end),
            elements: elements(&parameters),
            parameters,
            pieces: first..first + count,
            parts: collect("what ranks own", parts.iter().map(|part| Ok(elements(part))))?,
        })
    }
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
        let of = |reason: String| failed("meeting other ranks by NCCL", &reason);
        let nccl = Nccl::open().map_err(of)?;
        let communicator =
            self.gpu.scope(|| Communicator::new(nccl, id, place, MOST_BLOCKS, timeout));
        let way = Way::Nccl(communicator.map_err(of)?);
        let link = Link::new(way, &self.gpu, place, timeout)?;
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
        let mapped = mapped(&self.gpu, &own, all, rank)?;
        let way = Way::Peers(Peers::new(&self.gpu, rank, own, mapped));
        let link = Link::new(way, &self.gpu, (rank, all.len()), timeout);
        self.link = Some(Arc::new(link.map_err(|error| error.to_string())?));
        Ok(())
    }

    /// Waits for what of the weights may still be on its way from other ranks.
    pub(super) fn settle(&self) -> Result<()> {
        let Some(link) = &self.link else { return Ok(()) };
        self.gpu.scope(|| link.settle()).map_err(|reason| no_answer(&reason))
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
    fn new(
        way: Way,
        gpu: &Arc<Gpu>,
        (rank, size): (usize, usize),
        timeout: Duration,
    ) -> Result<Self> {
        let (beside, settled) = (Beside::new(gpu)?, Event::new(gpu)?);
        let [unsettled, is_torn] = [(); 2].map(|()| AtomicBool::new(false));
        let gpu = gpu.clone();
        Ok(Self { way, beside, gpu, rank, size, timeout, settled, unsettled, is_torn })
    }

    /// See [`Cuda::settle`].
    fn settle(&self) -> Result<(), String> {
        self.settle_within(self.timeout)
    }

    fn settle_within(&self, most: Duration) -> Result<(), String> {
        if self.is_torn.load(Ordering::Relaxed) {
            return Err("weights of other ranks have not come as a whole; go on from a checkpoint"
                .to_owned());
        }
        if !self.unsettled.load(Ordering::Relaxed) {
            return Ok(());
        }
        self.wait_at_most(&self.settled, most)?;
        // Who gives up lets waits end.
        match &self.way {
            Way::Peers(peers) if peers.is_given_up() => Err("another rank has given up".to_owned()),
            _ => {
                self.unsettled.store(false, Ordering::Relaxed);
                Ok(())
            }
        }
    }

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
        self.wait_at_most(event, self.timeout)
    }

    fn wait_at_most(&self, event: &Event, most: Duration) -> Result<(), String> {
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
            if waited > most {
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
        let link = &self.link;
        // Before waits are released, by which it would come as well.
        let has_come = || link.gpu.scope(|| link.settled.has_come());
        if link.unsettled.swap(false, Ordering::Relaxed) && !has_come() {
            link.is_torn.store(true, Ordering::Relaxed);
        }
        link.abort();
        // What others have queued may still reach this rank's memory. That of a process stays as long as
        // others map it; that of a thread has to stay itself.
        let is_of_this = |(rank, of): (usize, &Mapped)| rank != self.link.rank && !of.is_opened();
        let mut mapped = self.mapped.iter().take(1).flatten().enumerate();
        if let Way::Peers(peers) = &self.link.way
            && mapped.any(is_of_this)
        {
            self.own.iter().for_each(Piece::keep_for_ever);
            peers.keep_for_ever();
        }
    }

    /// The bytes of a bucket that a rank adds up.
    fn slice(&self, bucket: &Bucket, rank: usize) -> (usize, usize) {
        if let Some(owned) = self.owned.get(rank) {
            return both(&bucket.range, &owned.gradients);
        }
        let len = slice(bucket, self.link.size);
        let start = (bucket.range.start + rank * len).min(bucket.range.end);
        (start, len.min(bucket.range.end - start))
    }

    /// Where a slice of another rank lies before it is added.
    fn received(&self, from: usize) -> u64 {
        let place = from - usize::from(from > self.link.rank);
        self.received.address + (place * self.stride) as u64
    }

    fn queue(&self, gpu: &Gpu, gradients: u64, kept: &[Piece], drawn: Drawn) -> Result<(), String> {
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
                    // NOTE: where it keeps the sum to itself, others hear that it is made by what is
                    // told of its squares.
                    if mine.1 > 0 {
                        peers
                            .others()
                            .for_each(|by| peers.hear(&link.beside, by, Told::Made, count));
                        self.add_up_in_memory(gpu, mine, bucket.behind.is_some());
                    }
                    if self.owned.is_empty() {
                        peers
                            .others()
                            .for_each(|to| peers.tell(&link.beside, to, Told::Arrived, count));
                        last = Some(count);
                    }
                }
                Way::Nccl(nccl) if self.wire != Wire::F32 => {
                    self.queue_rounded(gpu, nccl, bucket, gradients, drawn)?;
                }
                Way::Nccl(nccl) => {
                    let parts = link.others().map(|peer| Message {
                        peer,
                        send: at(self.slice(bucket, peer)),
                        receive: (self.received(peer), mine.1),
                    });
                    nccl.exchange(parts, link.beside.stream())?;
                    if mine.1 > 0 {
                        self.add_up(gpu, at(mine));
                    }
                    if !self.owned.is_empty() {
                        continue;
                    }
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
        Ok(())
    }

    /// The exchange of a bucket by messages that are rounded.
    fn queue_rounded(
        &self,
        gpu: &Gpu,
        nccl: &Communicator,
        bucket: &Bucket,
        gradients: u64,
        drawn: Drawn,
    ) -> Result<(), String> {
        let Self { link, wire, stride, .. } = self;
        let Link { rank, size, beside, .. } = &**link;
        let (mine, signs) = (self.slice(bucket, *rank), drawn.signs());
        let names = match wire {
            Wire::F32 => unreachable!("sent as it is"),
            Wire::Bf16 => ["pack_wire<BF16>", "sum_wire<BF16>", "unpack_wire<BF16>"],
            Wire::Fp8 => ["pack_wire<FP8>", "sum_wire<FP8>", "unpack_wire<FP8>"],
            Wire::Mxfp4 => ["pack_wire<MXFP4>", "sum_wire<MXFP4>", "unpack_wire<MXFP4>"],
        };
        let [pack, sum, unpack] = names;
        let at = |base: &Piece, rank: usize| base.address + (rank * stride) as u64;
        let message = |(_, bytes): (usize, usize)| wire.bytes(bytes / 4);
        // A thread takes 8 numbers.
        let eights = |(_, bytes): (usize, usize)| (bytes / 32) as u64;
        let packed = |to: usize, slice: (usize, usize), sent: Sent| {
            if slice.1 > 0 {
                let rotates = wire.rotates() && matches!(sent, Sent::Own);
                let draw = random::Draw::from(drawn.rounding(*rank, sent));
                launch!(gpu, pack, grid(gpu, slice.1 / 2), THREADS, 0;
                    at(&self.packed, to), gradients + slice.0 as u64, eights(slice),
                    (slice.0 / 32) as u32, signs, u32::from(rotates), draw);
            }
        };
        beside.queue(|| {
            link.others().for_each(|peer| packed(peer, self.slice(bucket, peer), Sent::Own));
        });
        let parts = link.others().map(|peer| Message {
            peer,
            send: (at(&self.packed, peer), message(self.slice(bucket, peer))),
            receive: (at(&self.received, peer), message(mine)),
        });
        nccl.exchange(parts, beside.stream())?;
        let is_last = !self.owned.is_empty();
        beside.queue(|| {
            if mine.1 > 0 {
                launch!(gpu, sum, grid(gpu, mine.1 / 2), THREADS, 0;
                    gradients + mine.0 as u64, self.received.address, *stride as u64, *rank as u32,
                    *size as u32, eights(mine), signs, u32::from(is_last));
            }
            if !is_last {
                packed(*rank, mine, Sent::Sum);
            }
        });
        if is_last {
            return Ok(());
        }
        let sums = link.others().map(|peer| Message {
            peer,
            send: (at(&self.packed, *rank), message(mine)),
            receive: (at(&self.received, peer), message(self.slice(bucket, peer))),
        });
        nccl.exchange(sums, beside.stream())?;
        beside.queue(|| {
            for of in 0..*size {
                let (slice, base) = (self.slice(bucket, of), [&self.received, &self.packed]);
                if slice.1 > 0 {
                    launch!(gpu, unpack, grid(gpu, slice.1 / 2), THREADS, 0;
                        gradients + slice.0 as u64, at(base[usize::from(of == *rank)], of),
                        eights(slice), signs);
                }
            }
        });
        Ok(())
    }

    /// Queues that a range of bytes of each rank goes to all others, of memory of a kind.
    fn spread(&self, kind: Kind, of: impl Fn(usize) -> Range<usize>) -> Result<(), String> {
        let (link, base) = (&*self.link, self.own[kind as usize].address);
        let at = |rank| {
            let range = of(rank);
            (base + range.start as u64, range.len())
        };
        let (from, bytes) = at(link.rank);
        match &link.way {
            Way::Peers(peers) if bytes > 0 => {
                for to in peers.others() {
                    let to = self.mapped[kind as usize][to].address + (from - base);
                    peers.copy(&link.beside, from, bytes, to);
                }
                Ok(())
            }
            Way::Peers(_) => Ok(()),
            Way::Nccl(nccl) => {
                let message = |peer| Message { peer, send: (from, bytes), receive: at(peer) };
                nccl.exchange(link.others().map(message), link.beside.stream())
            }
        }
    }

    /// What was spread has arrived everywhere once an event comes.
    fn end_spread(&self, arrived: &Event) -> Result<(), String> {
        let link = &*self.link;
        if let Way::Peers(peers) = &link.way {
            if peers.is_aborted() {
                return Err("it was aborted".to_owned());
            }
            let count = peers.next();
            peers.others().for_each(|to| peers.tell(&link.beside, to, Told::Arrived, count));
            peers.others().for_each(|by| peers.hear(&link.beside, by, Told::Arrived, count));
        }
        link.beside.queue(|| arrived.record());
        Ok(())
    }

    /// A slice becomes the sum of those of all ranks, in the memory of each of them or where ranks own
    /// some in this one's; `beside` a pass with few blocks.
    fn add_up_in_memory(&self, gpu: &Gpu, (start, len): (usize, usize), beside: bool) {
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
        for (place, mapped) in all.iter_mut().zip(&self.mapped[Kind::Gradients as usize]) {
            *place = mapped.address + start as u64;
        }
        let only = if self.owned.is_empty() { ALL_PEERS } else { self.link.rank as u32 };
        let most = if beside { MOST_BLOCKS as usize } else { 4 * gpu.multiprocessors as usize };
        let grid = [(len / 16).div_ceil(MANY_THREADS).min(most), 1, 1];
        self.link.beside.queue(|| {
            launch!(gpu, name, grid, MANY_THREADS, 0; all, (len / 16) as u64, only);
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

impl Buckets {
    /// What others reach of this rank, as [`Kind`] counts it, and bytes of a master value.
    fn reached<'a>(&self, of: &Reached<'a, Cuda>) -> (Vec<&'a Piece>, usize) {
        let ([amaxes, copies, masters], master) = of.weights.buffers();
        let all = [of.gradients.all(), &of.reduction.partials, amaxes, copies, masters];
        let count = if self.owned.is_empty() { 1 } else { all.len() };
        (all[..count].to_vec(), master)
    }
}

impl Drop for Buckets {
    fn drop(&mut self) {
        // What is on its way to this rank's weights, too, which may be given back next.
        let link = &self.link;
        let settled = || link.gpu.scope(|| link.settle_within(LATE.min(link.timeout))).is_ok();
        let is_torn = link.is_torn.load(Ordering::Relaxed);
        if self.in_flight || !(is_torn || settled()) {
            self.abort();
        }
    }
}

/// The same buckets, none longer than so many bytes.
fn cut(all: Vec<Bucket>, most: usize) -> Result<Vec<Bucket>> {
    const WHAT: &str = "gradients that ranks exchange";
    let most = (most / SLICE * SLICE).max(SHORTEST);
    let count = all.iter().map(|bucket| bucket.range.len().div_ceil(most)).sum();
    let mut parts = Vec::new();
    reserve(&mut parts, WHAT, count)?;
    for Bucket { range, behind } in all {
        let mut end = range.end;
        while end > range.start {
            let start = end.saturating_sub(most).max(range.start);
            parts.push(Bucket { range: start..end, behind });
            end = start;
        }
    }
    Ok(parts)
}

/// Where two ranges meet: a start and a length.
fn both(a: &Range<usize>, b: &Range<usize>) -> (usize, usize) {
    let (start, end) = (a.start.max(b.start), a.end.min(b.end));
    (start, end.saturating_sub(start))
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

    fn buckets(
        &self,
        arena: &mut Arena,
        all: Vec<Bucket>,
        (slots, gradients): (&[Slot], &FlatGradients<Self>),
        owned: &[Vec<Range<usize>>],
        wire: Wire,
    ) -> Result<Option<Buckets>> {
        let Some(link) = &self.link else { return Ok(None) };
        let owned = owned.iter().map(|parts| Owned::new(parts, slots, gradients));
        let owned = collect("what ranks own", owned)?;
        let all = match (&link.way, &owned[..]) {
            (Way::Nccl(_), [_, ..]) => cut(all, OWNED / (link.size - 1))?,
            _ => all,
        };
        let longest = |bucket: &Bucket| match &owned[..] {
            [] => slice(bucket, link.size),
            // Of its own, but of messages those to all others as well.
            owned => {
                let of_one = |of: &Owned| both(&bucket.range, &of.gradients).1;
                let all = owned.iter().map(of_one).max().unwrap_or(0);
                if wire == Wire::F32 { of_one(&owned[link.rank]) } else { all }
            }
        };
        let longest = all.iter().map(longest).max().unwrap_or(0);
        let (stride, messages, packed) = match wire {
            Wire::F32 => (longest, link.size - 1, 0),
            _ => (wire.bytes(longest / 4).next_multiple_of(SLICE), link.size, link.size),
        };
        let made = all.iter().map(|_| Event::new(&self.gpu));
        Ok(Some(Buckets {
            link: link.clone(),
            made: collect("events", made)?,
            all,
            passed: Event::new(&self.gpu)?,
            exchanged: Event::new(&self.gpu)?,
            received: arena.bytes(match link.way {
                Way::Peers(_) => 0,
                Way::Nccl(_) => messages * stride,
            }),
            packed: arena.bytes(packed * stride),
            stride,
            wire,
            owned,
            own: Vec::new(),
            mapped: Vec::new(),
            master: 0,
            words: zeros("what GPUs tell each other", 4 * link.size)?,
            has_updated: false,
            gathers: false,
            in_flight: false,
        }))
    }

    fn export(&self, buckets: &Buckets, of: &Reached<'_, Self>) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        if let Way::Nccl(_) = buckets.link.way {
            return Ok(bytes);
        }
        let (pieces, _) = buckets.reached(of);
        reserve(&mut bytes, "what ranks reach memory by", pieces.len() * size_of::<Exported>())?;
        for piece in pieces {
            let exported = Exported::new(&self.gpu, piece);
            let exported = exported.map_err(|reason| failed("sharing memory", &reason))?;
            bytes.extend_from_slice(bytemuck::bytes_of(&exported));
        }
        Ok(bytes)
    }

    fn map(&self, buckets: &mut Buckets, of: &Reached<'_, Self>, exported: &[u8]) -> Result<()> {
        // Before others are mapped anew, which may be where they were.
        buckets.mapped.clear();
        let (pieces, master) = buckets.reached(of);
        let own = collect("what ranks reach", pieces.iter().map(|piece| Ok(piece.again())))?;
        let all = exported.chunks_exact(size_of::<Exported>()).map(bytemuck::pod_read_unaligned);
        // By rank and kind.
        let all: Vec<Exported> = collect("what ranks reach memory by", all.map(Ok))?;
        let kinds = if all.is_empty() { 0 } else { own.len() };
        for (kind, own) in own.iter().enumerate().take(kinds) {
            let of_kind = all.iter().skip(kind).step_by(kinds).map(|exported| Ok(*exported));
            let of_kind: Vec<Exported> = collect("what ranks reach memory by", of_kind)?;
            let mapped = mapped(&self.gpu, own, &of_kind, buckets.link.rank);
            buckets.mapped.push(mapped.map_err(|reason| failed("sharing memory", &reason))?);
        }
        (buckets.own, buckets.master) = (own, master);
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
        drawn: Drawn,
    ) -> Result<()> {
        buckets.in_flight = true;
        let address = gradients.all().address;
        self.gpu
            .scope(|| {
                buckets.passed.record();
                buckets.queue(&self.gpu, address, kept, drawn)?;
                // What was rotated with the ends of parameters stays 0.
                buckets.link.beside.queue(|| {
                    for tail in gradients.tails().filter(|_| buckets.wire.rotates()) {
                        self.clear(address + tail.start as u64, tail.len());
                    }
                    buckets.exchanged.record();
                });
                Ok(())
            })
            .map_err(|reason: String| no_answer(&reason))?;
        self.gpu.check()
    }

    fn give_squares(&self, buckets: &mut Buckets) -> Result<()> {
        buckets.in_flight = true;
        let given = self.gpu.scope(|| {
            let Buckets { link, passed, exchanged, owned, .. } = &*buckets;
            passed.record();
            link.beside.wait_for(passed);
            let bytes = |of: &Owned| 8 * of.pieces.start..8 * of.pieces.end;
            buckets.spread(Kind::Squares, |rank| bytes(&owned[rank]))?;
            buckets.end_spread(exchanged)?;
            // NOTE: the host waits, since what the device did not get on with could not be released: all
            // else would be queued behind it.
            link.wait(exchanged)
        });
        given.map_err(|reason| no_answer(&reason))
    }

    fn begin_gather(&self, buckets: &mut Buckets) {
        (buckets.in_flight, buckets.gathers) = (true, true);
    }

    fn give(&self, buckets: &Buckets, part: usize) -> Result<f64> {
        let Buckets { owned, passed, exchanged, link, master, .. } = buckets;
        let of = |range: &Range<usize>, size: usize| size * range.start..size * range.end;
        // No pass reads what copies lack, so that it has time until the next exchange.
        let later = *master < size_of::<f32>();
        let given = self.gpu.scope(|| {
            passed.record();
            link.beside.wait_for(passed);
            buckets.spread(Kind::Copies, |rank| of(&owned[rank].parts[part], 2))?;
            if !later {
                buckets.spread(Kind::Masters, |rank| of(&owned[rank].parts[part], *master))?;
            }
            if part + 1 < owned[link.rank].parts.len() {
                return Ok(0.0);
            }
            buckets.spread(Kind::Amaxes, |rank| of(&owned[rank].parameters, 4))?;
            buckets.end_spread(exchanged)?;
            if later {
                buckets.spread(Kind::Masters, |rank| of(&owned[rank].elements, *master))?;
                buckets.end_spread(&link.settled)?;
                link.unsettled.store(true, Ordering::Relaxed);
            }
            // This rank's own update is no wait for others.
            link.wait(passed)?;
            let started = Instant::now();
            link.wait(exchanged)?;
            // NOTE: kernels of a trial may be loaded next, the first time, for which the driver can wait
            // for the device, and so for a rank that is gone.
            if !buckets.has_updated {
                link.settle()?;
            }
            Ok(started.elapsed().as_secs_f64())
        });
        given.map_err(|reason: String| no_answer(&reason))
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
        buckets.has_updated |= std::mem::take(&mut buckets.gathers);
        buckets.in_flight = false;
        self.gpu.check()
    }

    fn abort_exchange(&self, buckets: &mut Buckets) {
        buckets.abort();
    }
}
