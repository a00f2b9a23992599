//! The library's engine, as the options of the command line ask for it.

use std::sync::{Arc, Mutex};

use mxfp4train::{Engine, EngineOptions, Group, LogLevel};

use crate::cli::MachineArgs;
use crate::console;
use crate::failure::Outcome;

/// Starts an engine. Its warnings go to standard error; the second value is what it says of itself
/// when it starts, such as its device and kernels.
pub(crate) fn open(args: &MachineArgs, seed: u64) -> Outcome<(Engine, String)> {
    open_as(args.device.clone(), args.threads, seed, None)
}

/// The same on a device, as one of a group.
pub(crate) fn open_as(
    device: String,
    threads: usize,
    seed: u64,
    group: Option<Group>,
) -> Outcome<(Engine, String)> {
    let lines = Arc::new(Mutex::new(Vec::new()));
    let sink = Arc::clone(&lines);
    let log = move |level, line: &str| match level {
        LogLevel::Warning => console::note(&format!("mxtrain: warning: {line}")),
        LogLevel::Info => {
            if let Ok(mut lines) = sink.lock() {
                lines.push(line.to_owned());
            }
        }
        LogLevel::Debug => {}
    };
    let engine = Engine::new(EngineOptions {
        device,
        threads,
        seed,
        log: Some(Box::new(log)),
        group,
        ..EngineOptions::default()
    })?;
    let about = lines.lock().map(|lines| lines.join("; ")).unwrap_or_default();
    Ok((engine, about))
}
