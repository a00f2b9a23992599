//! A run of several processes that share every step: this one is rank 0, which starts the others.
//!
//! Rank 0 does all that a run does. The others make the same trainer from the same command line, and
//! then follow: before a call that all have to make together, rank 0 says which ([`Team`]). What they
//! cannot do, they tell rank 0 and nobody else. They end when rank 0 ends, however that is, since
//! their connections to it do.

mod mesh;

use std::env;
use std::ffi::OsString;
use std::fs::{self, DirBuilder};
use std::io::{self, Read, Write};
use std::ops::{Deref, DerefMut};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use mxfp4train::{Dataset, Error, EvalStats, Group, StepStats, Trainer};

use crate::console;
use crate::failure::{Failure, Outcome};
use crate::signals;
use mesh::Mesh;

/// In the environment of a process that rank 0 has started: its rank, how many there are, and the
/// folder in which they meet.
const PLACE: &str = "MXTRAIN_RANK";
/// How long ranks look for each other.
const MEETING: Duration = Duration::from_secs(120);
/// How long a process may take to end that has nothing to do any more.
const ENDING: Duration = Duration::from_secs(10);
/// Most ranks of a machine.
pub(crate) const MAX_RANKS: usize = 64;

/// What the first byte of a connection says it is for.
const FOR_BLOCKS: u8 = b'b';
const FOR_CALLS: u8 = b'c';

/// A call that all ranks make.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Call {
    Step,
    Eval,
    Save,
}

impl Call {
    const ALL: [(Self, u8); 3] = [(Self::Step, b's'), (Self::Eval, b'e'), (Self::Save, b'w')];

    fn byte(self) -> u8 {
        Self::ALL.iter().find(|(call, _)| *call == self).expect("all are listed").1
    }
}

/// A process that follows another one.
pub(crate) struct Follower {
    rank: usize,
    calls: UnixStream,
}

/// The processes that this one has started.
pub(crate) struct Leader {
    children: Vec<Child>,
    /// By rank, from 1 on.
    calls: Vec<UnixStream>,
}

/// Where a process of a run stands.
pub(crate) struct Place {
    rank: usize,
    size: usize,
    folder: PathBuf,
}

impl Place {
    /// Of this process, if another one has started it.
    pub(crate) fn of_this() -> Option<Self> {
        let text = env::var_os(PLACE)?;
        let mut parts = text.as_bytes().splitn(3, |byte| *byte == b' ');
        let mut number = || str::from_utf8(parts.next()?).ok()?.parse().ok();
        let (rank, size) = (number()?, number()?);
        let folder = PathBuf::from(<std::ffi::OsStr as OsStrExt>::from_bytes(parts.next()?));
        Some(Self { rank, size, folder })
    }

    fn socket(&self, rank: usize) -> PathBuf {
        self.folder.join(rank.to_string())
    }

    /// Listens for ranks above this one.
    fn listen(&self) -> Outcome<UnixListener> {
        let path = self.socket(self.rank);
        let listener = UnixListener::bind(&path).map_err(|e| {
            let hint = match path.as_os_str().len() > 100 {
                true => "; its name is too long, set TMPDIR to a folder with a shorter one",
                false => "",
            };
            Failure::runtime(format!("cannot listen at {}: {e}{hint}", path.display()))
        })?;
        listener.set_nonblocking(true).map_err(Failure::io("listen at", &path))?;
        Ok(listener)
    }

    /// A connection to a rank below this one.
    fn connect(&self, rank: usize, purpose: u8, until: Instant) -> Outcome<UnixStream> {
        let path = self.socket(rank);
        loop {
            match UnixStream::connect(&path) {
                Ok(mut stream) => {
                    let greeting = [purpose, self.rank as u8];
                    stream.write_all(&greeting).map_err(Failure::io("write to", &path))?;
                    return Ok(stream);
                }
                // It may not yet be there.
                Err(_) if Instant::now() < until && self.folder.exists() => {
                    thread::sleep(Duration::from_millis(5));
                }
                Err(e) => return Err(Failure::io("connect to", &path)(e)),
            }
        }
    }

    /// Takes connections until there are `wanted` of them: purpose, rank, stream.
    fn accept(
        &self,
        listener: &UnixListener,
        wanted: usize,
        until: Instant,
        look: &mut dyn FnMut() -> Outcome,
    ) -> Outcome<Vec<(u8, usize, UnixStream)>> {
        let mut found = Vec::new();
        while found.len() < wanted {
            match listener.accept() {
                Ok((mut stream, _)) => {
                    stream.set_nonblocking(false).map_err(cannot_meet)?;
                    stream.set_read_timeout(Some(MEETING)).map_err(cannot_meet)?;
                    let mut greeting = [0; 2];
                    stream.read_exact(&mut greeting).map_err(cannot_meet)?;
                    stream.set_read_timeout(None).map_err(cannot_meet)?;
                    let [purpose, rank] = greeting;
                    found.push((purpose, usize::from(rank), stream));
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock && Instant::now() < until => {
                    look()?;
                    thread::sleep(Duration::from_millis(2));
                }
                Err(e) => return Err(cannot_meet(e)),
            }
        }
        Ok(found)
    }

    fn group(&self, peers: Vec<Option<UnixStream>>) -> Outcome<Group> {
        let mesh = Mesh::new(self.rank, peers).map_err(cannot_meet)?;
        Ok(Group::new(self.rank, self.size, Box::new(mesh)))
    }

    /// Meets the others as one that follows.
    pub(crate) fn follow(&self) -> Outcome<(Group, Follower)> {
        signals::leave_to_rank_0()?;
        let until = Instant::now() + MEETING;
        let listener = self.listen()?;
        let mut peers: Vec<Option<UnixStream>> = (0..self.size).map(|_| None).collect();
        for (rank, peer) in peers.iter_mut().enumerate().take(self.rank) {
            *peer = Some(self.connect(rank, FOR_BLOCKS, until)?);
        }
        let above = self.size - 1 - self.rank;
        let leader_is_there = &mut || match self.folder.exists() {
            true => Ok(()),
            false => Err(Failure::runtime("rank 0 is gone")),
        };
        for (_, rank, stream) in self.accept(&listener, above, until, leader_is_there)? {
            peers[rank] = Some(stream);
        }
        let calls = self.connect(0, FOR_CALLS, until)?;
        Ok((self.group(peers)?, Follower { rank: self.rank, calls }))
    }
}

fn cannot_meet(e: io::Error) -> Failure {
    Failure::runtime(format!("the ranks of the run do not find each other: {e}"))
}

impl Follower {
    /// What rank 0 says first.
    pub(crate) fn seed(&mut self) -> Outcome<u64> {
        let mut seed = [0; 8];
        self.calls.read_exact(&mut seed).map_err(cannot_meet)?;
        Ok(u64::from_le_bytes(seed))
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
        while let Ok(()) = self.calls.read_exact(&mut byte) {
            let call = Call::ALL.iter().find(|(_, of)| *of == byte[0]).map(|(call, _)| *call);
            // What fails here, rank 0 hears of in the vote of the call, and decides what to do.
            match (call, val) {
                (Some(Call::Step), _) => drop(trainer.step_unless_stopped(train)),
                (Some(Call::Eval), Some(val)) => drop(trainer.eval(val, batches)),
                // Rank 0 writes.
                (Some(Call::Save), _) => drop(trainer.save(Path::new(""))),
                _ => return,
            }
        }
    }

    /// Tells rank 0 why this process ends, unless that is what another one could not do.
    pub(crate) fn tell(&mut self, failure: &Failure) {
        let of_another = Failure::from(Error::Peer { message: String::new() });
        if !failure.message.starts_with(&of_another.message) {
            let _ = self.calls.write_all(failure.message.as_bytes());
        }
    }
}

impl Leader {
    /// Starts `size - 1` processes with this one's arguments, and meets them.
    pub(crate) fn start(size: usize, seed: u64) -> Outcome<(Group, Self)> {
        // One of the same name may be left of a process that was killed.
        let since = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default().subsec_nanos();
        let folder = env::temp_dir().join(format!("mxtrain-{}-{since:08x}", std::process::id()));
        let cannot = |e| Failure::io("make", &folder)(e);
        DirBuilder::new().mode(0o700).create(&folder).map_err(cannot)?;
        let place = Place { rank: 0, size, folder: folder.clone() };
        let met = Self::meet(&place, seed);
        // Others that still look for it end.
        let _ = fs::remove_dir_all(&folder);
        met
    }

    fn meet(place: &Place, seed: u64) -> Outcome<(Group, Self)> {
        let until = Instant::now() + MEETING;
        let listener = place.listen()?;
        let mut leader = Self { children: Vec::new(), calls: Vec::new() };
        let program = env::current_exe()
            .map_err(|e| Failure::runtime(format!("cannot find this program's file: {e}")))?;
        for rank in 1..place.size {
            let mut of_rank = OsString::from(format!("{rank} {} ", place.size));
            of_rank.push(&place.folder);
            let mut command = Command::new(&program);
            command.args(env::args_os().skip(1)).env(PLACE, of_rank);
            command.stdin(Stdio::null()).stdout(Stdio::null());
            leader.children.push(command.spawn().map_err(|e| {
                Failure::runtime(format!("cannot start the process of rank {rank}: {e}"))
            })?);
        }
        let wanted = 2 * (place.size - 1);
        let children = &mut leader.children;
        let found = place.accept(&listener, wanted, until, &mut || all_live(children))?;
        let mut peers: Vec<Option<UnixStream>> = (0..place.size).map(|_| None).collect();
        let mut calls: Vec<Option<UnixStream>> = (0..place.size).map(|_| None).collect();
        for (purpose, rank, stream) in found {
            let to = if purpose == FOR_CALLS { &mut calls } else { &mut peers };
            to[rank] = Some(stream);
        }
        for mut calls in calls.into_iter().flatten() {
            calls.write_all(&seed.to_le_bytes()).map_err(cannot_meet)?;
            leader.calls.push(calls);
        }
        Ok((place.group(peers)?, leader))
    }

    fn say(&mut self, call: Call) {
        for follower in &mut self.calls {
            // One that is gone is missed in the call itself.
            let _ = follower.write_all(&[call.byte()]);
        }
    }

    /// Says why followers have ended, but for what the failure of this process says itself.
    pub(crate) fn tell_reasons(&mut self, failure: &Failure) {
        let mut told = vec![failure.message.clone()];
        for (index, (calls, child)) in self.calls.iter_mut().zip(&mut self.children).enumerate() {
            let mut words = Vec::new();
            // Those that are alive say nothing.
            if calls.set_read_timeout(Some(Duration::from_millis(200))).is_ok() {
                let _ = calls.take(1 << 12).read_to_end(&mut words);
            }
            let mut words = String::from_utf8_lossy(&words).into_owned();
            if words.is_empty()
                && let Ok(Some(status)) = child.try_wait()
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
        if let Some(leader) = &mut self.leader {
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

    /// Rank 0 has all that there is to save, so that it can do without others that are gone.
    pub(crate) fn save(&mut self, dir: &Path) -> Result<(), Error> {
        self.say(Call::Save);
        match self.trainer.save(dir) {
            Err(Error::Peer { .. }) => self.trainer.snapshot(None)?.save(dir),
            saved => saved,
        }
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
