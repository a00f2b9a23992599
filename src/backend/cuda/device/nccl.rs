//! NCCL, which carries bytes from GPU to GPU. It is opened when ranks meet, by its SONAME, so that
//! the one is used that the process has already (PyTorch's, say).
//!
//! A rank that is gone looks like one that is slow: kernels of the others wait for ever, and NCCL
//! reports nothing. So nothing here blocks. What a call has begun is asked for until a deadline, and
//! a communicator that does not get on is aborted, which ends its kernels. Aborting and destroying can
//! hang as well, which is why a thread of their own does them, that is left behind after a while.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::ptr::null_mut;
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use cudarc::driver::sys;

use crate::signals::signals_blocked;
use crate::thread::Thread;

/// What starts a communicator: made by one rank, carried to all.
pub(crate) type Id = [u8; 128];
type Handle = *mut c_void;

/// The name by which the loader finds it.
const SONAME: &str = "libnccl.so.2";
/// The oldest release that is used, 2.19, as NCCL writes it.
const OLDEST: c_int = 2_19_00;
const SUCCESS: c_int = 0;
const IN_PROGRESS: c_int = 7;
/// `ncclUint8`.
const BYTES: c_int = 1;
/// Longest wait for an abort, and for a communicator that is given back.
const PATIENCE: Duration = Duration::from_millis(if cfg!(test) { 300 } else { 10_000 });
/// The same where nothing is wrong: others may come to it later.
const SHORT: Duration = Duration::from_millis(500);

/// `ncclUniqueId`, which is passed by value.
#[derive(Clone, Copy)]
#[repr(C)]
struct UniqueId(Id);

/// `ncclConfig_t` as release 2.19 has it; newer ones read as much as `size` says.
#[repr(C)]
struct Config {
    size: usize,
    magic: u32,
    version: c_int,
    blocking: c_int,
    cluster_size: c_int,
    least_blocks: c_int,
    most_blocks: c_int,
    network: *const c_char,
    split_share: c_int,
    /// Of later releases, where 2.19 has nothing.
    traffic_class: c_int,
}

/// In the place of a number that NCCL is to choose.
const CHOOSE: c_int = c_int::MIN;

impl Config {
    fn new(most_blocks: c_int) -> Self {
        Self {
            size: size_of::<Self>(),
            magic: 0xcafe_beef,
            version: OLDEST,
            blocking: 0,
            cluster_size: CHOOSE,
            least_blocks: CHOOSE,
            most_blocks,
            network: std::ptr::null(),
            split_share: CHOOSE,
            traffic_class: CHOOSE,
        }
    }
}

/// Declares the functions that are used, and finds them all in a library.
macro_rules! functions {
    ($($name:ident: fn($($argument:ty),*) -> $result:ty = $symbol:literal;)*) => {
        /// The library. Results are numbers, since a release to come may have new ones.
        pub(crate) struct Nccl {
            $($name: unsafe extern "C" fn($($argument),*) -> $result,)*
            version: c_int,
            /// Stays open: its threads live as long as the process.
            #[cfg_attr(not(test), expect(dead_code, reason = "it is kept open"))]
            library: std::mem::ManuallyDrop<libloading::Library>,
        }

        impl Nccl {
            fn find(library: libloading::Library) -> Result<Self, String> {
                Ok(Self {
                    // SAFETY: NCCL declares the function so since the oldest release that is used.
                    $($name: *unsafe { library.get($symbol) }
                        .map_err(|error| format!("it lacks a function: {error}"))?,)*
                    version: 0,
                    library: std::mem::ManuallyDrop::new(library),
                })
            }
        }
    };
}

functions! {
    get_version: fn(*mut c_int) -> c_int = "ncclGetVersion";
    get_unique_id: fn(*mut UniqueId) -> c_int = "ncclGetUniqueId";
    error_string: fn(c_int) -> *const c_char = "ncclGetErrorString";
    last_error: fn(Handle) -> *const c_char = "ncclGetLastError";
    init: fn(*mut Handle, c_int, UniqueId, c_int, *mut Config) -> c_int = "ncclCommInitRankConfig";
    state: fn(Handle, *mut c_int) -> c_int = "ncclCommGetAsyncError";
    finalize: fn(Handle) -> c_int = "ncclCommFinalize";
    destroy: fn(Handle) -> c_int = "ncclCommDestroy";
    abort: fn(Handle) -> c_int = "ncclCommAbort";
    group_start: fn() -> c_int = "ncclGroupStart";
    group_end: fn() -> c_int = "ncclGroupEnd";
    send: fn(*const c_void, usize, c_int, c_int, Handle, sys::CUstream) -> c_int = "ncclSend";
    receive: fn(*mut c_void, usize, c_int, c_int, Handle, sys::CUstream) -> c_int = "ncclRecv";
}

impl Nccl {
    /// The one of this process, or why there is none.
    pub(crate) fn open() -> Result<&'static Self, String> {
        static OPENED: OnceLock<Result<Nccl, String>> = OnceLock::new();
        let opened = OPENED.get_or_init(|| {
            // SAFETY: the loader looks where the system's administrator or the user lets it.
            let library = unsafe { libloading::Library::new(SONAME) };
            let library = library.map_err(|error| format!("{SONAME} is not found: {error}"))?;
            Self::of(library)
        });
        opened.as_ref().map_err(Clone::clone)
    }

    fn of(library: libloading::Library) -> Result<Self, String> {
        let mut nccl = Self::find(library)?;
        // SAFETY: writes a number.
        let result = unsafe { (nccl.get_version)(&mut nccl.version) };
        if result != SUCCESS || nccl.version < OLDEST {
            let (major, minor) = (OLDEST / 10_000, OLDEST / 100 % 100);
            let found = nccl.version();
            return Err(format!("expected NCCL {major}.{minor} or newer, found {found}"));
        }
        Ok(nccl)
    }

    /// Such as "2.28.9".
    pub(crate) fn version(&self) -> String {
        let version = self.version;
        format!("{}.{}.{}", version / 10_000, version / 100 % 100, version % 100)
    }

    /// What one rank makes for all of a communicator. This process answers them until they are
    /// connected.
    pub(crate) fn id(&self) -> Result<Id, String> {
        let mut id = UniqueId([0; 128]);
        // SAFETY: writes 128 bytes. Threads that it starts are NCCL's.
        match signals_blocked(|| unsafe { (self.get_unique_id)(&mut id) }) {
            SUCCESS => Ok(id.0),
            result => Err(self.text(result, null_mut())),
        }
    }

    /// What NCCL says of a result, and what went wrong last.
    fn text(&self, result: c_int, handle: Handle) -> String {
        let text = |from: *const c_char| {
            // SAFETY: text that ends with a zero, and stays, where there is any.
            let text = (!from.is_null()).then(|| unsafe { CStr::from_ptr(from) }.to_string_lossy());
            text.unwrap_or_default().trim().to_owned()
        };
        // SAFETY: any number has a text; NCCL allows null for a communicator.
        let [result, last] = unsafe { [(self.error_string)(result), (self.last_error)(handle)] };
        let (result, last) = (text(result), text(last));
        if last.is_empty() { result } else { format!("{result}: {last}") }
    }

    /// The state of what was begun on a communicator.
    fn state(&self, handle: Handle) -> c_int {
        let mut state = SUCCESS;
        // SAFETY: `handle` is a communicator; writes a number.
        match unsafe { (self.state)(handle, &mut state) } {
            SUCCESS => state,
            result => result,
        }
    }

    /// Waits for what a call has begun.
    fn settle(&self, handle: Handle, mut result: c_int, until: Instant) -> Result<(), String> {
        while result == IN_PROGRESS {
            if Instant::now() > until {
                return Err("no answer in time".to_owned());
            }
            std::thread::sleep(Duration::from_micros(20));
            result = self.state(handle);
        }
        if result == SUCCESS { Ok(()) } else { Err(self.text(result, handle)) }
    }
}

/// What goes to another rank and comes from it, as an address on the device and a number of bytes.
pub(crate) struct Message {
    pub(crate) peer: usize,
    pub(crate) send: (u64, usize),
    pub(crate) receive: (u64, usize),
}

/// What ranks exchange bytes by. None once it is aborted.
pub(crate) struct Communicator {
    nccl: &'static Nccl,
    open: Mutex<Option<Open>>,
    /// Longest wait for another rank.
    timeout: Duration,
}

/// A communicator that NCCL knows.
struct Open(Handle);

// SAFETY: any thread may ask NCCL, one at a time.
unsafe impl Send for Open {}

impl Communicator {
    /// Meets the others, in whatever context is current. `most_blocks` is how many multiprocessors
    /// it may take.
    pub(crate) fn new(
        nccl: &'static Nccl,
        id: Id,
        (rank, size): (usize, usize),
        most_blocks: c_int,
        timeout: Duration,
    ) -> Result<Self, String> {
        let (mut handle, mut config) = (null_mut(), Config::new(most_blocks));
        let until = Instant::now() + timeout;
        // SAFETY: writes a handle; the config is read within the call. Threads are NCCL's.
        let result = signals_blocked(|| unsafe {
            (nccl.init)(&mut handle, size as c_int, UniqueId(id), rank as c_int, &mut config)
        });
        if handle.is_null() {
            return Err(nccl.text(result, null_mut()));
        }
        let made = Self { nccl, open: Mutex::new(Some(Open(handle))), timeout };
        if let Err(reason) = nccl.settle(handle, result, until) {
            made.abort();
            return Err(reason);
        }
        Ok(made)
    }

    /// Queues messages to others, of which every rank queues its own, all at once.
    pub(crate) fn exchange(
        &self,
        messages: impl Iterator<Item = Message>,
        stream: sys::CUstream,
    ) -> Result<(), String> {
        let open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(Open(handle)) = *open else { return Err("it was aborted".to_owned()) };
        let until = Instant::now() + self.timeout;
        // SAFETY: the buffers are those of the caller, who keeps them until the stream has done it.
        let result = signals_blocked(|| unsafe {
            let mut result = (self.nccl.group_start)();
            for Message { peer, send, receive } in messages {
                let peer = peer as c_int;
                let mut call = |queued: c_int| {
                    if result == SUCCESS && queued != IN_PROGRESS {
                        result = queued;
                    }
                };
                let (from, bytes) = send;
                if bytes > 0 {
                    let from = from as *const c_void;
                    call((self.nccl.send)(from, bytes, BYTES, peer, handle, stream));
                }
                let (to, bytes) = receive;
                if bytes > 0 {
                    let to = to as *mut c_void;
                    call((self.nccl.receive)(to, bytes, BYTES, peer, handle, stream));
                }
            }
            // Whatever went wrong: a group that was begun has to be ended.
            let ended = (self.nccl.group_end)();
            if result == SUCCESS { ended } else { result }
        });
        self.nccl.settle(handle, result, until)
    }

    /// An error if something went wrong since; not if a rank is gone.
    pub(crate) fn check(&self) -> Result<(), String> {
        match &*self.open.lock().unwrap_or_else(PoisonError::into_inner) {
            None => Err("it was aborted".to_owned()),
            Some(Open(handle)) => match self.nccl.state(*handle) {
                SUCCESS | IN_PROGRESS => Ok(()),
                result => Err(self.nccl.text(result, *handle)),
            },
        }
    }

    /// Ends what waits for others. Whether it has ended: NCCL may hang in this, too, and is left to it
    /// then.
    pub(crate) fn abort(&self) -> bool {
        let open = self.open.lock().unwrap_or_else(PoisonError::into_inner).take();
        let nccl = self.nccl;
        let abort = move |Open(handle): Open| {
            // SAFETY: nobody else has it any more.
            let _ = unsafe { (nccl.abort)(handle) };
        };
        open.is_none_or(|open| within(PATIENCE, move || abort(open)))
    }
}

impl Drop for Communicator {
    fn drop(&mut self) {
        let open = self.open.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        let (Some(open), nccl) = (open, self.nccl) else { return };
        // What was sent may still be on its way, so that it is not aborted; others may be given back
        // later, for which nobody waits.
        within(SHORT, move || {
            let Open(handle) = { open };
            // SAFETY: nobody else has it any more.
            let result = unsafe { (nccl.finalize)(handle) };
            let settled = nccl.settle(handle, result, Instant::now() + PATIENCE);
            // SAFETY: as above.
            let _ = unsafe {
                match settled {
                    Ok(()) => (nccl.destroy)(handle),
                    Err(_) => (nccl.abort)(handle),
                }
            };
        });
    }
}

/// Does it on a thread of its own; whether it has ended within a time.
fn within(most: Duration, does: impl FnOnce() + Send + 'static) -> bool {
    let ended = Arc::new((Mutex::new(false), Condvar::new()));
    let told = ended.clone();
    let main = move || {
        does();
        *told.0.lock().unwrap_or_else(PoisonError::into_inner) = true;
        told.1.notify_all();
    };
    let started = signals_blocked(|| Thread::start(c"mxt-nccl".into(), 1 << 20, main));
    let Ok(thread) = started else { return false };
    thread.detach();
    let (ended, changed) = &*ended;
    let ended = ended.lock().unwrap_or_else(PoisonError::into_inner);
    let ended = changed.wait_timeout_while(ended, most, |ended| !*ended);
    *ended.unwrap_or_else(PoisonError::into_inner).0
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    /// The stand-in, made with macros; None, after a line that says why, where there is no compiler.
    fn fake(macros: &[&str]) -> Option<Result<&'static Nccl, String>> {
        let folder = tempfile::tempdir().unwrap();
        let [source, library] = ["fake.c", "fake.so"].map(|name| folder.path().join(name));
        std::fs::write(&source, include_str!("fake_nccl.c")).unwrap();
        let mut compiler = Command::new("cc");
        compiler.args(["-std=gnu99", "-Wall", "-Werror", "-fPIC", "-shared"]).args(macros);
        let output = match compiler.arg("-o").arg(&library).arg(&source).output() {
            Ok(output) => output,
            Err(error) => {
                assert!(std::env::var("CI").as_deref() != Ok("true"), "cc: {error}");
                println!("skipped: cc cannot be started: {error}");
                return None;
            }
        };
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        // SAFETY: made a moment ago; nothing in it runs on being loaded.
        let library = unsafe { libloading::Library::new(&library) }.unwrap();
        Some(Nccl::of(library).map(|nccl| &*Box::leak(Box::new(nccl))))
    }

    impl Nccl {
        /// One of its counters.
        fn count(&self, name: &str) -> c_int {
            // SAFETY: the stand-in has an int of this name, or a larger number that is small.
            unsafe { **self.library.get::<*const c_int>(name).unwrap() }
        }
    }

    const SHORTLY: Duration = Duration::from_millis(40);

    fn meet(nccl: &'static Nccl, timeout: Duration) -> Result<Communicator, String> {
        Communicator::new(nccl, nccl.id().unwrap(), (1, 3), 16, timeout)
    }

    fn messages(peers: [usize; 2]) -> impl Iterator<Item = Message> {
        peers.into_iter().zip([(64, 32), (0, 8)]).map(|(peer, (sent, received))| Message {
            peer,
            send: (4096, sent),
            receive: (8192, received),
        })
    }

    #[test]
    fn what_is_sent_arrives_and_all_is_given_back() {
        let Some(nccl) = fake(&[]) else { return };
        let nccl = nccl.unwrap();
        assert_eq!(nccl.version(), "2.28.9");
        let met = meet(nccl, Duration::from_secs(20)).unwrap();
        met.exchange(messages([0, 2]), null_mut()).unwrap();
        assert_eq!(["groups", "sent", "received"].map(|name| nccl.count(name)), [1, 64, 40]);
        // A refusal within a group ends the group, so that the next is none within it.
        let refused = met.exchange(messages([0, 9]), null_mut()).unwrap_err();
        assert_eq!(refused, "some error: the last words");
        met.exchange(messages([0, 2]), null_mut()).unwrap();
        met.check().unwrap();
        drop(met);
        let given_back = ["finalized", "destroyed", "aborted"].map(|name| nccl.count(name));
        assert_eq!(given_back, [1, 1, 0]);
    }

    #[test]
    fn what_does_not_get_on_is_aborted() {
        let Some(silent) = fake(&["-DASKED=1000000000"]) else { return };
        let silent = silent.unwrap();
        let started = Instant::now();
        assert_eq!(meet(silent, SHORTLY).err(), Some("no answer in time".to_owned()));
        assert!(started.elapsed() >= SHORTLY && silent.count("aborted") == 1);

        let broken = fake(&["-DSTATE=6"]).unwrap().unwrap();
        let reason = meet(broken, Duration::from_secs(20)).err();
        assert_eq!(reason, Some("remote process exited: the last words".to_owned()));
        assert_eq!(broken.count("aborted"), 1);
    }

    /// Not even by an abort that never ends.
    #[test]
    fn nobody_waits_for_ever() {
        let Some(hanging) = fake(&["-DHANGS"]) else { return };
        let hanging = hanging.unwrap();
        let met = meet(hanging, Duration::from_secs(20)).unwrap();
        let started = Instant::now();
        assert!(!met.abort());
        assert!(started.elapsed() >= PATIENCE && hanging.count("aborted") == 1);
        // What was aborted is nobody's any more.
        assert!(met.abort());
        let aborted = Err("it was aborted".to_owned());
        assert_eq!(met.exchange(messages([0, 2]), null_mut()), aborted);
        assert_eq!(met.check(), aborted);
    }

    #[test]
    fn a_library_that_does_not_do_is_said_to() {
        for (macros, expected) in [
            ("-DVERSION=21805", "expected NCCL 2.19 or newer, found 2.18.5"),
            ("-DLACKS_ABORT", "it lacks a function"),
        ] {
            let Some(found) = fake(&[macros]) else { return };
            let reason = found.err().unwrap();
            assert!(reason.contains(expected), "{reason}");
        }
    }
}
