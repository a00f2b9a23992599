//! The C ABI and nothing else: handles, status codes, option structs, and the boundary that no
//! panic crosses. `include/mxfp4train.h` is made from the doc comments of this folder.
//!
//! Every entry point goes through `guard`: it holds off cancellation of the thread, finds the
//! handle, sets the floating-point mode, catches panics, and turns an error into a status code with
//! a message. What an entry point does itself is to check its arguments, call the crate, and write
//! its outputs, last and only on success. The exceptions are `mxt_trainer_request_stop`, which a
//! signal handler may call and which is therefore one atomic store, and functions that return a
//! constant.
//!
//! | file | what |
//! | --- | --- |
//! | `status` | the status codes, their texts, and the mapping from [`crate::Error`] |
//! | `message` | error texts in fixed buffers, one a thread and one a handle |
//! | `guard` | the boundary: panics, NULL, poisoned and busy handles |
//! | `cancel` | no cancellation of threads inside calls |
//! | `float_mode` | the floating-point mode inside calls and inside the host's callbacks |
//! | `handle` | what every handle has: reference count, lock, poison flag, error text |
//! | `structs` | option and result structs that grow: `struct_size` |
//! | `arguments` | strings and arrays from the host |
//! | `buffers` | arrays that may lie on a GPU |
//! | `user_data` | the host's pointer for callbacks, and giving it back |
//! | `version`, `engine`, `group`, `model`, `generate`, `decoder`, `dataset`, `trainer` (with `trainer_structs`), `batch`, `snapshot`, `files` (with `file_callbacks`), `watch`, `run` | the functions |

// The names are C names.
#![allow(non_camel_case_types)]
// What a caller has to guarantee is said once, at the head of the header, and at each function in
// the words of C: which pointers may be NULL, who owns what, which thread may call.
#![allow(clippy::missing_safety_doc)]

mod arguments;
mod batch;
mod buffers;
mod cancel;
mod dataset;
mod decoder;
mod engine;
mod file_callbacks;
mod files;
mod float_mode;
mod generate;
mod group;
mod guard;
mod handle;
mod message;
mod model;
mod run;
mod snapshot;
mod status;
mod structs;
mod trainer;
mod trainer_structs;
mod user_data;
mod version;
mod watch;

pub use batch::*;
pub use dataset::*;
pub use decoder::*;
pub use engine::*;
pub use file_callbacks::*;
pub use files::*;
pub use generate::*;
pub use group::*;
pub use message::*;
pub use model::*;
pub use run::*;
pub use snapshot::*;
pub use status::*;
pub use trainer::*;
pub use trainer_structs::*;
pub use version::*;
pub use watch::*;

// The header promises that handles may move between threads and that const calls may share them.
const _: () = {
    const fn shareable<T: Send + Sync>() {}
    shareable::<mxt_engine>();
    shareable::<mxt_model>();
    shareable::<mxt_dataset>();
    shareable::<mxt_trainer>();
    shareable::<mxt_decoder>();
    shareable::<mxt_snapshot>();
    shareable::<mxt_files>();
};
