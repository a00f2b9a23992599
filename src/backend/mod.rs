//! (skeleton)
pub mod cpu;
