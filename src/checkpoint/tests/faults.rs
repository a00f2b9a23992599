//! Makes a file operation of a save fail, or the last one before an end, or lets something happen
//! just before it. Operations are counted from 1, on this thread.

use std::cell::{Cell, RefCell};
use std::io;

thread_local! {
    static FAULTS: RefCell<Vec<Planned>> = const { RefCell::new(Vec::new()) };
    static NO_EXCHANGE: Cell<bool> = const { Cell::new(false) };
}

struct Planned {
    id: usize,
    countdown: u64,
    happen: Option<Box<dyn FnOnce() -> io::Result<()>>>,
    /// Every operation after it fails, as if there were no process any more.
    ends: bool,
}

/// Called before every operation.
pub(in crate::checkpoint) fn before_operation() -> io::Result<()> {
    FAULTS.with_borrow_mut(|faults| {
        for fault in faults {
            if fault.countdown == 0 && fault.ends {
                return Err(io::ErrorKind::Other.into());
            }
            fault.countdown = fault.countdown.saturating_sub(1);
            if fault.countdown == 0
                && let Some(happen) = fault.happen.take()
            {
                happen()?;
            }
        }
        Ok(())
    })
}

/// Whether exchange acts as on a file system that does not have it.
pub(in crate::checkpoint) fn has_no_exchange() -> bool {
    NO_EXCHANGE.get()
}

/// A fault that is planned as long as this lives.
pub(super) struct Fault(usize);

impl Fault {
    /// Whether the operation came.
    pub(super) fn end(self) -> bool {
        FAULTS.with_borrow(|faults| {
            faults.iter().any(|fault| fault.id == self.0 && fault.countdown == 0)
        })
    }
}

impl Drop for Fault {
    fn drop(&mut self) {
        FAULTS.with_borrow_mut(|faults| faults.retain(|fault| fault.id != self.0));
    }
}

/// Calls `happen` before operation number `operation`, which fails if it does.
pub(super) fn at(operation: u64, happen: impl FnOnce() -> io::Result<()> + 'static) -> Fault {
    plan(operation, Box::new(happen), false)
}

/// Neither operation number `operation` nor any after it happens.
pub(super) fn ending_at(operation: u64) -> Fault {
    plan(operation, Box::new(|| Err(io::ErrorKind::Other.into())), true)
}

fn plan(countdown: u64, happen: Box<dyn FnOnce() -> io::Result<()>>, ends: bool) -> Fault {
    FAULTS.with_borrow_mut(|faults| {
        let id = faults.iter().map(|fault| fault.id + 1).max().unwrap_or(0);
        faults.push(Planned { id, countdown, happen: Some(happen), ends });
        Fault(id)
    })
}

/// As long as it lives, there is no exchange.
pub(super) struct WithoutExchange;

pub(super) fn without_exchange() -> WithoutExchange {
    NO_EXCHANGE.set(true);
    WithoutExchange
}

impl Drop for WithoutExchange {
    fn drop(&mut self) {
        NO_EXCHANGE.set(false);
    }
}
