//! The boundary that every entry point goes through: cancellation, NULL, poisoned and forked
//! handles, memory that is short, the floating-point mode, panics, errors.
//!
//! NOTE: the panic hook. A library writes nothing to stderr, but the standard hook does before a
//! panic can be caught. The first call therefore puts a hook in front that stays silent for
//! panics that a guard of this thread (or of a worker thread of ours) is going to catch, keeps
//! their place for the message, and hands all others to the hook before it. In the shared and the
//! static library the Rust runtime is our own, so no host sees the hook; a Rust host that uses
//! the crate and not the C functions never installs it.

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::ffi::c_char;
use std::panic::{AssertUnwindSafe, catch_unwind, set_hook, take_hook};
use std::sync::{Arc, Mutex, Once, PoisonError};

use super::handle::{Handle, State, keep};
use super::message::{Message, Slot, kept, set_text, text_of};
use super::status::mxt_status_code::{
    MXT_ERROR_DEVICE, MXT_ERROR_OUT_OF_MEMORY, MXT_ERROR_PANIC, MXT_ERROR_POISONED, MXT_OK,
};
use super::status::{Failure, mxt_status};
use super::{cancel, float_mode};
use crate::reserve::is_short;
use crate::thread::is_ours;

/// Runs a method of `handle`.
///
/// A panic poisons the handle and whatever shares its data.
///
/// # Safety
/// `handle` is NULL or a live handle of the C API.
pub(super) unsafe fn method<H: Handle>(
    function: &str,
    handle: *const H,
    body: impl FnOnce(&H) -> Result<(), Failure>,
) -> mxt_status {
    let _held = cancel::hold();
    // SAFETY: as promised by the caller.
    let Some(handle) = (unsafe { keep(handle) }) else {
        return fail(function, None, Failure::null(H::NAME));
    };
    let status = match shortage() {
        Some(shortage) => fail(function, Some(handle.state()), shortage),
        None => method_of(function, &*handle, body),
    };
    release_behind(status, function, handle);
    status
}

/// [`method`], for a handle that the caller keeps alive.
pub(super) fn method_of<H: Handle>(
    function: &str,
    handle: &H,
    body: impl FnOnce(&H) -> Result<(), Failure>,
) -> mxt_status {
    let state = handle.state();
    if let Some(refusal) = state.refusal() {
        return fail(function, Some(state), refusal);
    }
    match catch(function, || body(handle)) {
        Ok(Ok(())) => MXT_OK as mxt_status,
        Ok(Err(failure)) => {
            // What a failed GPU holds is not known any more.
            if failure.status == MXT_ERROR_DEVICE {
                state.access().poison();
            }
            fail(function, Some(state), failure)
        }
        // A callback has forked, and this is the child, which has no threads to go on with.
        Err(_) if state.is_forked() => fail(function, Some(state), Failure::forked()),
        Err(panic) => {
            state.access().poison();
            fail(function, Some(state), panic)
        }
    }
}

/// Makes a handle from nothing.
pub(super) fn maker(function: &str, body: impl FnOnce() -> Result<(), Failure>) -> mxt_status {
    let _held = cancel::hold();
    match shortage() {
        Some(shortage) => fail(function, None, shortage),
        None => self::function(function, body),
    }
}

/// Why nothing that allocates may begin, if so. What gives memory back or says why something
/// failed, and functions that read or fill a few numbers, work even so.
fn shortage() -> Option<Failure> {
    is_short().then(|| Failure::new(MXT_ERROR_OUT_OF_MEMORY, SHORTAGE))
}

const SHORTAGE: &str = "the system gives no memory, and what the library keeps for that case is in \
     use; free handles that were made since, or other memory";

/// Runs a function that has no handle and makes none.
pub(super) fn function(function: &str, body: impl FnOnce() -> Result<(), Failure>) -> mxt_status {
    let _held = cancel::hold();
    match catch(function, body).and_then(|result| result) {
        Ok(()) => MXT_OK as mxt_status,
        Err(failure) => fail(function, None, failure),
    }
}

/// Makes a handle from `parent`. The message of a failure is on the parent too, which a panic does
/// not poison: making a child changes nothing of it.
///
/// # Safety
/// `parent` is NULL or a live handle of the C API.
pub(super) unsafe fn child<H: Handle>(
    function: &str,
    parent: *const H,
    body: impl FnOnce(&H) -> Result<(), Failure>,
) -> mxt_status {
    let _held = cancel::hold();
    // SAFETY: as promised by the caller.
    let Some(parent) = (unsafe { keep(parent) }) else {
        return fail(function, None, Failure::null(H::NAME));
    };
    let state = parent.state();
    let result = match state.refusal().or_else(shortage) {
        Some(refusal) => Err(refusal),
        None => catch(function, || body(&parent)).and_then(|result| result),
    };
    let status = match result {
        Ok(()) => MXT_OK as mxt_status,
        Err(failure) => fail(function, Some(state), failure),
    };
    release_behind(status, function, parent);
    status
}

/// Reads a constant of `handle`; `R::default()` and an error text where it is NULL.
///
/// # Safety
/// `handle` is NULL or a live handle of the C API.
pub(super) unsafe fn getter<H: Handle, R: Default>(
    function: &str,
    handle: *const H,
    body: impl FnOnce(&H) -> R,
) -> R {
    let _held = cancel::hold();
    // SAFETY: as promised by the caller.
    let Some(handle) = (unsafe { keep(handle) }) else {
        fail(function, None, Failure::null(H::NAME));
        return R::default();
    };
    let value = catch(function, || body(&handle)).unwrap_or_else(|panic| {
        fail(function, Some(handle.state()), panic);
        R::default()
    });
    release(function, handle);
    value
}

/// The text of the last failure on `handle`, in a buffer of this thread.
///
/// # Safety
/// `handle` is NULL or a live handle of the C API.
pub(super) unsafe fn last_error<H: Handle>(function: &str, handle: *const H) -> *const c_char {
    const NULL: &str = "the handle is NULL; mxt_last_error says why it could not be made";
    let _held = cancel::hold();
    // SAFETY: as promised by the caller.
    let handle = unsafe { keep(handle) };
    let message = catch(function, || match &handle {
        Some(handle) => handle.state().error(),
        None => Message::new(NULL),
    });
    release(function, handle);
    set_text(H::SLOT, &message.unwrap_or_else(|panic| Message::new(&panic.message)));
    text_of(H::SLOT)
}

/// Gives back the host's count; NULL does nothing. What it kept is dropped with the last count.
///
/// # Safety
/// `handle` is NULL or a live handle of the C API that the host does not use afterwards.
pub(super) unsafe fn free<H: Handle>(function: &str, handle: *mut H) {
    let _held = cancel::hold();
    if !handle.is_null() {
        // SAFETY: the host gives back the count that `into_raw` gave it.
        release(function, unsafe { Arc::from_raw(handle.cast_const()) });
    }
}

/// Gives back a count. No panic of a destructor gets through.
pub(super) fn release<T>(function: &str, counted: T) {
    // Nobody is left who could be told by a status, and the object is gone either way.
    if let Err(panic) = catch(function, || drop(counted)) {
        fail(function, None, panic);
    }
}

/// [`release`] behind a call that has ended so. Finalizers of the host may make calls that fail; the
/// thread's message stays that of this one if it did, too.
pub(super) fn release_behind<T>(status: mxt_status, function: &str, counted: T) {
    let told = (status != MXT_OK as mxt_status).then(|| kept(Slot::Thread));
    release(function, counted);
    if let Some(told) = told {
        set_text(Slot::Thread, &told);
    }
}

/// Leaves the message with the thread and the handle.
fn fail(function: &str, state: Option<&State>, failure: Failure) -> mxt_status {
    let message = Message::of(format_args!("{function}: {}", failure.message));
    set_text(Slot::Thread, &message);
    if let Some(state) = state {
        // The text of the panic itself says more than that there was one.
        if failure.status != MXT_ERROR_POISONED || state.error().as_str().is_empty() {
            state.set_error(&message);
        }
    }
    failure.status as mxt_status
}

/// Runs `body` in the default floating-point mode and turns a panic into a failure that says what
/// and where.
fn catch<R>(function: &str, body: impl FnOnce() -> R) -> Result<R, Failure> {
    install_hook();
    DEPTH.set(DEPTH.get() + 1);
    // Whatever a panic leaves half changed is out of reach afterwards: its handle is poisoned.
    let result = catch_unwind(AssertUnwindSafe(|| {
        float_mode::in_default(|| {
            inject_fault(function);
            body()
        })
    }));
    DEPTH.set(DEPTH.get() - 1);
    result.map_err(|payload| {
        let text = describe(&*payload).to_owned();
        // NOTE: only plain texts are dropped. A payload with a destructor may panic once more.
        if !(payload.is::<&str>() || payload.is::<String>()) {
            std::mem::forget(payload);
        }
        let place = PLACE.take().or_else(|| worker_place().take());
        let place = place.map(|place| format!(" at {place}")).unwrap_or_default();
        Failure::new(MXT_ERROR_PANIC, format!("panic{place}: {text}; this is a defect, report it"))
    })
}

/// Panics where a test asks for it: `MXT_FAULT` names the function. In debug builds only.
fn inject_fault(function: &str) {
    if cfg!(debug_assertions) && std::env::var_os("MXT_FAULT").is_some_and(|name| name == function)
    {
        panic!("injected fault");
    }
}

fn describe(payload: &(dyn Any + Send)) -> &str {
    let text = payload.downcast_ref::<&str>().copied();
    text.or_else(|| payload.downcast_ref::<String>().map(String::as_str)).unwrap_or("no text")
}

thread_local! {
    /// Guards on this thread's stack.
    static DEPTH: Cell<usize> = const { Cell::new(0) };
    /// Where this thread's last panic came from.
    static PLACE: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Where the last panic of a worker thread came from. With several engines it may be another's,
/// which is good enough for the text of a defect.
fn worker_place() -> std::sync::MutexGuard<'static, Option<String>> {
    static WORKER_PLACE: Mutex<Option<String>> = Mutex::new(None);
    WORKER_PLACE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn install_hook() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let previous = take_hook();
        set_hook(Box::new(move |info| {
            let place = info.location().map(ToString::to_string);
            // `try_with`: a panic may come while the thread's variables are being destroyed.
            if DEPTH.try_with(|depth| depth.get() > 0).unwrap_or(false) {
                let _ = PLACE.try_with(|cell| cell.replace(place));
            } else if is_ours() {
                *worker_place() = place;
            } else {
                previous(info);
            }
        }));
    });
}

#[cfg(test)]
mod tests {
    use std::ffi::CStr;
    use std::ptr::null;

    use super::super::message::mxt_last_error;
    use super::super::status::mxt_status_code::MXT_ERROR_NULL;
    use super::*;

    struct Thing(State);

    impl Handle for Thing {
        const SLOT: Slot = Slot::Engine;
        const NAME: &'static str = "thing";

        fn state(&self) -> &State {
            &self.0
        }
    }

    fn thread_error() -> String {
        // SAFETY: the pointer is to a buffer of this thread that ends with a zero byte.
        unsafe { CStr::from_ptr(mxt_last_error()) }.to_string_lossy().into_owned()
    }

    fn error_of(thing: *const Thing) -> String {
        // SAFETY: as above; the handle lives.
        unsafe { CStr::from_ptr(last_error("f", thing)) }.to_string_lossy().into_owned()
    }

    #[test]
    fn a_panic_poisons_and_says_where() {
        let thing = Thing(State::new()).into_raw();
        // SAFETY: the handle is freed last.
        unsafe {
            let status = method("f", thing, |_| -> Result<(), Failure> { panic!("ouch {}", 1) });
            assert_eq!(status, MXT_ERROR_PANIC as mxt_status);
            let text = error_of(thing);
            assert!(text.starts_with("f: panic at src/capi/guard.rs:"), "{text}");
            assert!(text.contains("ouch 1"), "{text}");
            assert_eq!(thread_error(), text);

            assert_eq!(method("g", thing, |_| Ok(())), MXT_ERROR_POISONED as mxt_status);
            assert_eq!(error_of(thing), text, "the first cause stays on the handle");
            assert!(thread_error().starts_with("g: a panic in an earlier call"));
            free("f", thing);
        }
    }

    #[test]
    fn a_panic_of_a_worker_arrives_with_its_place() {
        let thing = Thing(State::new()).into_raw();
        // SAFETY: the handle is freed last.
        unsafe {
            let status = method("f", thing, |_| {
                let worker = std::thread::spawn(|| {
                    crate::thread::mark_as_ours();
                    panic!("in a worker")
                });
                let Err(payload) = worker.join();
                std::panic::resume_unwind(payload)
            });
            assert_eq!(status, MXT_ERROR_PANIC as mxt_status);
            let text = error_of(thing);
            assert!(text.contains("guard.rs") && text.contains("in a worker"), "{text}");
            free("f", thing);
        }
    }

    /// Else the hook before ours would print where a host's output goes.
    #[test]
    fn every_thread_of_ours_is_known_as_one() {
        install_hook();
        let known = Arc::new(Mutex::new(false));
        let seen = known.clone();
        let thread = crate::thread::Thread::start(c"mxt-test".into(), 256 << 10, move || {
            *seen.lock().unwrap() = is_ours();
        });
        thread.unwrap().join();
        assert!(*known.lock().unwrap());
        assert!(!std::thread::spawn(is_ours).join().unwrap());
        // Nor is a worker of a host that uses rayon itself.
        assert!(!rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap().install(is_ours));
    }

    #[test]
    fn null_is_an_error_and_free_of_it_is_not() {
        // SAFETY: NULL is what the test is about.
        unsafe {
            assert_eq!(method("f", null::<Thing>(), |_| Ok(())), MXT_ERROR_NULL as mxt_status);
            assert_eq!(thread_error(), "f: thing is NULL; pass a valid pointer");
            assert_eq!(getter("f", null::<Thing>(), |_| 7), 0);
            assert!(error_of(null()).contains("NULL"));
            free("f", std::ptr::null_mut::<Thing>());
        }
    }

    #[test]
    fn a_handle_freed_inside_its_own_call_outlives_the_call() {
        let thing = Thing(State::new()).into_raw();
        // SAFETY: freed once, and not used by the "host" afterwards.
        unsafe {
            let status = method("f", thing, |inside| {
                free("f", thing);
                inside.state().set_error(&Message::new("still here"));
                Ok(())
            });
            assert_eq!(status, MXT_OK as mxt_status);
        }
    }
}
