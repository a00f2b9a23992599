//! The C ABI (skeleton)
