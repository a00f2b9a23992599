//! A run of several processes that share every step. Rank 0 starts the others, or a launcher has
//! started all.
//!
//! Rank 0 does all that a run does. The others make the same trainer from the same command line, and
//! then follow: before a call that all have to make together, rank 0 says which ([`Team`]). What they
//! cannot do, they tell rank 0 and nobody else. They end when rank 0 ends, however that is, since
//! their connections to it do.

mod launchers;
mod mesh;
mod restart;
mod stream;

use std::env;
use std::ffi::OsString;
use std::fs::{self, DirBuilder};
use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::ops::{Deref, DerefMut};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use mxfp4train::{Dataset, Error, EvalStats, Group, Snapshot, StepStats, Trainer};

use crate::console;
use crate::failure::{Failure, Outcome};
use crate::signals::{self, Signals};
pub(crate) use launchers::Launched;
use mesh::Mesh;
pub(crate) use restart::restart;
use stream::{Address, Listener, Stream};

/// In the environment of a process that rank 0 has started: its rank, how many there are, and the
/// folder in which they meet.
const PLACE: &str = "MXTRAIN_RANK";
/// How long ranks look for each other.
const MEETING: Duration = Duration::from_secs(120);
/// How long a process may take to end that has nothing to do any more.
const ENDING: Duration = Duration::from_secs(10);
/// Most ranks of a machine.
pub(crate) const MAX_RANKS: usize = 64;

/// What a connection is for, as its first byte says: blocks of collectives, or which call is next.
const FOR_BLOCKS: u8 = b'b';
const FOR_CALLS: u8 = b'c';
/// The first bytes of every connection, so that whoever else knocks is not taken for a rank.
const MAGIC: [u8; 4] = *b"mxr1";

/// A call that all ranks make.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Call {
    Step,
    Eval,
    Save,
    Snapshot,
}

impl Call {
    const ALL: [(Self, u8); 4] =
        [(Self::Step, b's'), (Self::Eval, b'e'), (Self::Save, b'w'), (Self::Snapshot, b'p')];

    fn byte(self) -> u8 {
        Self::ALL.iter().find(|(call, _)| *call == self).expect("all are listed").1
    }
}

/// A process that follows another one.
pub(crate) struct Follower {
    rank: usize,
    seed: u64,
    calls: Stream,
}

/// The processes that this one has started.
pub(crate) struct Leader {
    children: Vec<Child>,
    /// By rank, from 1 on.
    calls: Vec<Stream>,
}

/// Where a process of a run stands.
#[derive(Clone)]
pub(crate) struct Place {
    rank: usize,
    size: usize,
    /// Where rank 0 listens.
    address: Address,
    /// The folder of that, of processes that rank 0 has started.
    folder: Option<PathBuf>,
    patience: Duration,
}

impl Place {
    /// Of this process, if another one of this program has started it.
    ///
    /// # Errors
    /// Where the variable that says so is somebody else's.
    pub(crate) fn of_this() -> Outcome<Option<Self>> {
        let Some(text) = env::var_os(PLACE) else { return Ok(None) };
        let mut parts = text.as_bytes().splitn(3, |byte| *byte == b' ');
        let mut number = || str::from_utf8(parts.next()?).ok()?.parse::<usize>().ok();
        if let (Some(rank), Some(size)) = (number(), number())
            && (1..size).contains(&rank)
            && size <= MAX_RANKS
            && let Some(folder) = parts.next()
        {
            let folder = PathBuf::from(<std::ffi::OsStr as OsStrExt>::from_bytes(folder));
            return Ok(Some(Self::local(rank, size, folder)));
        }
        Err(Failure::usage(format!(
            "{PLACE}: is set by mxtrain for the processes that it starts, expected \"RANK SIZE \
             FOLDER\", got {}; unset it",
            console::plain(&text.to_string_lossy())
        )))
    }

    fn local(rank: usize, size: usize, folder: PathBuf) -> Self {
        let address = stream::local(&folder, 0);
        Self { rank, size, address, folder: Some(folder), patience: MEETING }
    }

    /// Of a process that a launcher has started, whose rank 0 listens at HOST:PORT.
    pub(crate) fn launched(by: Launched, rendezvous: &str) -> Self {
        let (address, patience) = (Address::Network(rendezvous.to_owned()), mesh::PATIENCE);
        Self { rank: by.rank, size: by.size, address, folder: None, patience }
    }

    pub(crate) fn rank(&self) -> usize {
        self.rank
    }

    pub(crate) fn size(&self) -> usize {
        self.size
    }

    /// A connection to a rank, which may not yet be there.
    fn connect(&self, to: &Address, purpose: u8, until: Instant) -> Outcome<Stream> {
        let failure = |e| Failure::runtime(format!("cannot connect to a rank at {to}: {e}"));
        loop {
            match to.connect() {
                Ok(stream) => {
                    let mut greeting = [0; 9];
                    greeting[..4].copy_from_slice(&MAGIC);
                    greeting[4..8].copy_from_slice(&(self.rank as u32).to_le_bytes());
                    greeting[8] = purpose;
                    (&stream).write_all(&greeting).map_err(failure)?;
                    return Ok(stream);
                }
                // On a network rank 0 may begin later than others; on this machine it listens before
                // it starts them, and so do those that it tells of.
                Err(_) if self.folder.is_none() && Instant::now() < until => {
                    thread::sleep(Duration::from_millis(50));
                }
                Err(e) => return Err(failure(e)),
            }
        }
    }

    /// Takes connections until there are `wanted` of them: purpose, rank, stream.
    fn accept(
        &self,
        listener: &Listener,
        wanted: usize,
        until: Instant,
        look: &mut dyn FnMut() -> Outcome,
    ) -> Outcome<Vec<(u8, usize, Stream)>> {
        let mut found: Vec<(u8, usize, Stream)> = Vec::new();
        while found.len() < wanted {
            match listener.accept() {
                Ok(stream) => {
                    let Some((purpose, rank)) = greeted(&stream).ok().flatten() else { continue };
                    let is_known = found.iter().any(|(p, r, _)| (*p, *r) == (purpose, rank));
                    if rank >= self.size || rank <= self.rank || is_known {
                        return Err(Failure::runtime(format!(
                            "a process says that it is rank {rank}, of {} ranks of this run; is \
                             another run at {}?",
                            self.size, self.address
                        )));
                    }
                    found.push((purpose, rank, stream));
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock && Instant::now() < until => {
                    look()?;
                    thread::sleep(Duration::from_millis(2));
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    let seconds = self.patience.as_secs();
                    let (count, wanted) = (found.len(), wanted);
                    return Err(Failure::runtime(format!(
                        "expected {wanted} connections of other ranks within {seconds} s, got {count}"
                    )));
                }
                Err(e) => return Err(cannot_meet(e)),
            }
        }
        Ok(found)
    }

    fn group(&self, peers: Vec<Option<Stream>>) -> Outcome<Group> {
        let mesh = Mesh::new(self.rank, peers).map_err(cannot_meet)?;
        Ok(Group::new(self.rank, self.size, Box::new(mesh)))
    }

    /// Meets the others as one that follows: asks rank 0 for the seed and for where all listen, then
    /// connects to those below it and is connected to by those above.
    pub(crate) fn follow(&self) -> Outcome<(Group, Follower)> {
        let until = Instant::now() + self.patience;
        let calls = self.connect(&self.address, FOR_CALLS, until)?;
        // From here on the end of rank 0 is seen.
        signals::leave_to_rank_0()?;
        let own = match (calls.ends().map_err(cannot_meet)?, &self.folder) {
            (None, Some(folder)) => stream::local(folder, self.rank),
            (ends, _) => {
                let [own, _] = ends.expect("a connection without a folder is a network's");
                Address::Network(SocketAddr::new(own, 0).to_string())
            }
        };
        let listen = |e| Failure::runtime(format!("cannot listen at {own}: {e}"));
        let listener = own.listen().map_err(listen)?;
        let port = listener.port().map_err(listen)?;
        (&calls).write_all(&port.to_le_bytes()).map_err(cannot_meet)?;
        let mut seed = [0; 8];
        calls.set_read_timeout(Some(self.patience)).map_err(cannot_meet)?;
        (&calls).read_exact(&mut seed).map_err(cannot_meet)?;
        let mut peers: Vec<Option<Stream>> = (0..self.size).map(|_| None).collect();
        // Rank 0 last: when it has all of its connections, there are all others, too. They all listen
        // already, since rank 0 has heard of it.
        for rank in (1..self.rank).chain([0]) {
            let to = match (&self.folder, rank) {
                (_, 0) => self.address.clone(),
                (Some(folder), _) => stream::local(folder, rank),
                (None, _) => Address::Network(read_text(&calls).map_err(cannot_meet)?),
            };
            peers[rank] = Some(self.connect(&to, FOR_BLOCKS, until)?);
        }
        calls.set_read_timeout(None).map_err(cannot_meet)?;
        let above = self.size - 1 - self.rank;
        let rank_0_is_there = &mut || match calls.is_closed() {
            true => Err(Failure::runtime("rank 0 is gone")),
            false => Ok(()),
        };
        for (_, rank, stream) in self.accept(&listener, above, until, rank_0_is_there)? {
            peers[rank] = Some(stream);
        }
        let seed = u64::from_le_bytes(seed);
        Ok((self.group(peers)?, Follower { rank: self.rank, seed, calls }))
    }

    /// Meets the others as rank 0.
    fn lead(
        &self,
        listener: &Listener,
        seed: u64,
        look: &mut dyn FnMut() -> Outcome,
    ) -> Outcome<(Group, Vec<Stream>)> {
        let until = Instant::now() + self.patience;
        let mut calls: Vec<Option<(Stream, u16)>> = (0..self.size).map(|_| None).collect();
        let mut peers: Vec<Option<Stream>> = (0..self.size).map(|_| None).collect();
        for (purpose, rank, stream) in self.accept(listener, self.size - 1, until, look)? {
            if purpose != FOR_CALLS {
                return Err(Failure::runtime(format!(
                    "rank {rank} begins otherwise than expected"
                )));
            }
            let mut port = [0; 2];
            stream.set_read_timeout(Some(MEETING)).map_err(cannot_meet)?;
            (&stream).read_exact(&mut port).map_err(cannot_meet)?;
            stream.set_read_timeout(None).map_err(cannot_meet)?;
            calls[rank] = Some((stream, u16::from_le_bytes(port)));
        }
        let mut addresses = Vec::new();
        for (stream, port) in calls.iter().flatten() {
            let ends = stream.ends().map_err(cannot_meet)?;
            addresses.extend(ends.map(|[_, other]| SocketAddr::new(other, *port).to_string()));
        }
        for (below, (stream, _)) in calls.iter().flatten().enumerate() {
            let mut stream = stream;
            stream.write_all(&seed.to_le_bytes()).map_err(cannot_meet)?;
            for address in addresses.iter().take(below) {
                write_text(stream, address).map_err(cannot_meet)?;
            }
        }
        for (_, rank, stream) in self.accept(listener, self.size - 1, until, look)? {
            peers[rank] = Some(stream);
        }
        let calls = calls.into_iter().flatten().map(|(stream, _)| stream).collect();
        Ok((self.group(peers)?, calls))
    }
}

/// What a new connection is for, and whose; None of one that is not a rank's.
fn greeted(stream: &Stream) -> io::Result<Option<(u8, usize)>> {
    let (mut stream, mut greeting) = (stream, [0; 9]);
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    stream.read_exact(&mut greeting)?;
    stream.set_read_timeout(None)?;
    let [a, b, c, d, purpose] = *greeting.last_chunk().expect("five bytes of nine");
    let is_known = greeting[..4] == MAGIC && matches!(purpose, FOR_BLOCKS | FOR_CALLS);
    Ok(is_known.then(|| (purpose, u32::from_le_bytes([a, b, c, d]) as usize)))
}

fn write_text(mut stream: &Stream, text: &str) -> io::Result<()> {
    stream.write_all(&[text.len() as u8])?;
    stream.write_all(text.as_bytes())
}

fn read_text(mut stream: &Stream) -> io::Result<String> {
    let mut len = [0];
    stream.read_exact(&mut len)?;
    let mut text = vec![0; usize::from(len[0])];
    stream.read_exact(&mut text)?;
    String::from_utf8(text).map_err(|_| io::ErrorKind::InvalidData.into())
}

fn cannot_meet(e: io::Error) -> Failure {
    Failure::runtime(format!("the ranks of the run do not find each other: {e}"))
}

impl Follower {
    /// Rank 0's, which may have drawn it.
    pub(crate) fn seed(&self) -> u64 {
        self.seed
    }

    pub(crate) fn rank(&self) -> usize {
        self.rank
    }

    /// Makes the calls that rank 0 makes, until it is gone.
    pub(crate) fn follow(
        &mut self,
        trainer: &mut Trainer,
        train: &Dataset,
        (val, batches): (Option<&Dataset>, usize),
    ) {
        let mut byte = [0];
        while let Ok(()) = (&self.calls).read_exact(&mut byte) {
            let call = Call::ALL.iter().find(|(_, of)| *of == byte[0]).map(|(call, _)| *call);
            // What fails here, rank 0 hears of in the vote of the call, and decides what to do.
            match (call, val) {
                (Some(Call::Step), _) => drop(trainer.step_unless_stopped(train)),
                (Some(Call::Eval), Some(val)) => drop(trainer.eval(val, batches)),
                // Rank 0 writes.
                (Some(Call::Save), _) => drop(trainer.save(Path::new(""))),
                (Some(Call::Snapshot), _) => drop(trainer.snapshot(None)),
                _ => return,
            }
        }
    }

    /// Tells rank 0 why this process ends, unless that is what another one could not do.
    pub(crate) fn tell(&self, failure: &Failure) {
        let of_another = Failure::from(Error::Peer { message: String::new() });
        if !failure.message.starts_with(&of_another.message) {
            let _ = (&self.calls).write_all(failure.message.as_bytes());
        }
    }
}

impl Leader {
    /// Starts `size - 1` processes with this one's arguments, and meets them.
    pub(crate) fn start(size: usize, seed: u64, signals: &Signals) -> Outcome<(Group, Self)> {
        // One of the same name may be left of a process that was killed.
        let since = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default().subsec_nanos();
        let folder = env::temp_dir().join(format!("mxtrain-{}-{since:08x}", std::process::id()));
        let traces = (0..size).map(|rank| folder.join(rank.to_string())).chain([folder.clone()]);
        signals.also_remove(traces);
        DirBuilder::new().mode(0o700).create(&folder).map_err(|e| {
            let folder = folder.display();
            Failure::usage(format!(
                "cannot make {folder}, where ranks meet: {e}; set TMPDIR to a folder of this machine \
                 that can be written"
            ))
        })?;
        let place = Place::local(0, size, folder.clone());
        let met = Self::start_in(&place, &folder, seed);
        // Others that still look for it end.
        let _ = fs::remove_dir_all(&folder);
        met
    }

    fn start_in(place: &Place, folder: &Path, seed: u64) -> Outcome<(Group, Self)> {
        let listener = place.address.listen().map_err(|e| {
            let hint = match place.address.to_string().len() > 100 {
                true => "; its name is too long, set TMPDIR to a folder with a shorter one",
                false => "",
            };
            Failure::runtime(format!("cannot listen at {}: {e}{hint}", place.address))
        })?;
        let mut leader = Self { children: Vec::new(), calls: Vec::new() };
        let program = env::current_exe()
            .map_err(|e| Failure::runtime(format!("cannot find this program's file: {e}")))?;
        for rank in 1..place.size {
            let mut of_rank = OsString::from(format!("{rank} {} ", place.size));
            of_rank.push(folder);
            let mut command = Command::new(&program);
            command.args(env::args_os().skip(1)).env(PLACE, of_rank);
            command.stdin(Stdio::null()).stdout(Stdio::null());
            leader.children.push(command.spawn().map_err(|e| {
                Failure::runtime(format!("cannot start the process of rank {rank}: {e}"))
            })?);
        }
        let children = &mut leader.children;
        match place.lead(&listener, seed, &mut || all_live(children)) {
            Ok((group, calls)) => {
                leader.calls = calls;
                Ok((group, leader))
            }
            Err(failure) => {
                // Those that still come end, and the leader need not wait for them.
                drop(listener);
                Err(failure)
            }
        }
    }

    /// Meets processes that a launcher has started.
    pub(crate) fn of_launched(place: &Place, seed: u64) -> Outcome<(Group, Self)> {
        // Whatever name others know it by, it listens on all of its addresses.
        let Address::Network(name) = &place.address else { unreachable!("launched on a network") };
        let (_, port) = name.rsplit_once(':').unwrap_or(("", name));
        let all = Address::Network(format!("[::]:{port}"));
        let listener =
            all.listen().or_else(|_| Address::Network(format!("0.0.0.0:{port}")).listen());
        let listener = listener.map_err(|e| {
            Failure::usage(format!("--rendezvous: rank 0 cannot listen at port {port}: {e}"))
        })?;
        let (group, calls) = place.lead(&listener, seed, &mut || Ok(()))?;
        Ok((group, Self { children: Vec::new(), calls }))
    }

    fn say(&self, call: Call) {
        for follower in &self.calls {
            // One that is gone is missed in the call itself.
            let _ = (&mut &*follower).write_all(&[call.byte()]);
        }
    }

    /// Says why followers have ended, but for what the failure of this process says itself.
    pub(crate) fn tell_reasons(&mut self, failure: &Failure) {
        let mut told = vec![failure.message.clone()];
        for (index, calls) in self.calls.iter().enumerate() {
            let mut words = Vec::new();
            // Those that are alive say nothing.
            let _ = calls.set_read_timeout(Some(Duration::from_millis(200)));
            let read = calls.take(1 << 12).read_to_end(&mut words);
            let is_late = |e: &io::Error| {
                matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
            };
            let has_ended = !read.as_ref().is_err_and(is_late);
            let mut words = String::from_utf8_lossy(&words).into_owned();
            if words.is_empty()
                && has_ended
                && let Some(child) = self.children.get_mut(index)
                && let Some(status) = status_of(child)
                && status.code().is_none_or(|code| code > 1)
            {
                words = format!("its process has ended: {status}");
            }
            if !words.is_empty() && !told.contains(&words) {
                console::note(&format!("mxtrain: rank {}: {words}", index + 1));
                told.push(words);
            }
        }
    }
}

/// How a process has ended whose connections are closed: the system may say so a moment later.
fn status_of(child: &mut Child) -> Option<ExitStatus> {
    for _ in 0..100 {
        if let Ok(Some(status)) = child.try_wait() {
            return Some(status);
        }
        thread::sleep(Duration::from_millis(5));
    }
    None
}

/// An error where a process that was started has ended.
fn all_live(children: &mut [Child]) -> Outcome {
    for (index, child) in children.iter_mut().enumerate() {
        if let Ok(Some(status)) = child.try_wait() {
            let rank = index + 1;
            return Err(Failure::runtime(format!(
                "the process of rank {rank} has ended: {status}"
            )));
        }
    }
    Ok(())
}

impl Drop for Leader {
    fn drop(&mut self) {
        self.calls.clear();
        let until = Instant::now() + ENDING;
        for child in &mut self.children {
            while let Ok(None) = child.try_wait() {
                if Instant::now() > until {
                    let _ = child.kill();
                    let _ = child.wait();
                    break;
                }
                thread::sleep(Duration::from_millis(5));
            }
        }
    }
}

/// A trainer with the processes that train with it, where there are any: calls that all have to make
/// are said to them first.
pub(crate) struct Team {
    trainer: Trainer,
    leader: Option<Leader>,
}

impl Team {
    pub(crate) fn new(trainer: Trainer, leader: Option<Leader>) -> Self {
        Self { trainer, leader }
    }

    fn say(&mut self, call: Call) {
        if let Some(leader) = &self.leader {
            leader.say(call);
        }
    }

    pub(crate) fn step_unless_stopped(&mut self, data: &Dataset) -> Result<StepStats, Error> {
        self.say(Call::Step);
        self.trainer.step_unless_stopped(data)
    }

    pub(crate) fn eval(&mut self, data: &Dataset, batches: usize) -> Result<EvalStats, Error> {
        self.say(Call::Eval);
        self.trainer.eval(data, batches)
    }

    /// Where ranks keep all states, rank 0 has all that there is to save, so that it can do without others
    /// that are gone.
    pub(crate) fn save(&mut self, dir: &Path) -> Result<(), Error> {
        self.say(Call::Save);
        match self.trainer.save(dir) {
            Err(Error::Peer { .. }) if !self.shards_states() => {
                self.trainer.snapshot(None)?.save(dir)
            }
            saved => saved,
        }
    }

    /// All make it where each has a part.
    pub(crate) fn snapshot(&mut self, earlier: Option<Snapshot>) -> Result<Snapshot, Error> {
        if self.shards_states() {
            self.say(Call::Snapshot);
        }
        self.trainer.snapshot(earlier)
    }

    /// Whether a process is gone with states that it alone kept.
    pub(crate) fn has_lost_states(&self) -> bool {
        self.shards_states() && self.trainer.model().engine().has_lost_its_group()
    }

    fn shards_states(&self) -> bool {
        self.trainer.model().engine().shards_states()
    }

    /// Says why followers have ended.
    pub(crate) fn tell_reasons(&mut self, failure: &Failure) {
        if let Some(leader) = &mut self.leader {
            leader.tell_reasons(failure);
        }
    }
}

impl Deref for Team {
    type Target = Trainer;

    fn deref(&self) -> &Trainer {
        &self.trainer
    }
}

impl DerefMut for Team {
    fn deref_mut(&mut self) -> &mut Trainer {
        &mut self.trainer
    }
}
