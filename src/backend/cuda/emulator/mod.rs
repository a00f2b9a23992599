//! Kernels on the processor, for chips that are not at hand and for machines without any.
//!
//! A test asks for a kernel file. It is compiled by the machine's C++ compiler behind
//! `emulator.cpp`, which gives CUDA's words a meaning: a thread is a coroutine that runs until it
//! waits for others, `__shared__` memory is static, and the functions of `ptx.cuh` have twins
//! there, so that file is left out. Each of the file's kernels, under the name that launches use,
//! is a function in the library that comes out of that, and [`Emulator::launch`] calls it as every
//! thread of a grid, block after block, with the argument that a launch passes.
//!
//! What a kernel may rely on holds in every order in which threads can run. So tests take several
//! ([`SCHEDULES`]), with copies to shared memory arriving as late or as early as they may; a
//! deadlock, and a read beyond what a test has declared with [`Emulator::may_read`], ends it. What
//! the processor cannot show are races between threads of a warp that depend on the exact cycle,
//! and how fast it is.

mod adamw;
mod attend;
mod correct;
mod decode;
mod estimate;
mod exchange;
mod follow;
mod fp4_instruction;
mod fp8;
mod gelu;
mod head;
mod kept;
mod merge;
mod moments;
mod muon;
mod norm;
mod products;
mod quantize;
mod ramping;
mod restore;
mod rotary;
mod select;
mod spam;
mod stable_adamw;
mod swiglu;
mod values;
mod watch;

use std::ffi::c_void;
use std::path::Path;
use std::process::Command;

use super::kernels::FILES;
use super::quantize::Launch;
use crate::backend::Precision;
pub(super) use products::operand;
pub(super) use quantize::check_mxfp8;

/// A kernel file that runs on the processor.
struct Emulator {
    library: libloading::Library,
    /// Kernels, in the order of their symbols.
    names: Vec<String>,
    _folder: tempfile::TempDir,
}

/// In which order threads get their turn, and whether copies happen as late as they may.
const SCHEDULES: [(u32, u32); 3] = [(0, 1), (1, 0), (2, 1)];

/// The chip that is emulated: the one with all instructions.
const CAPABILITY: (i32, i32) = (12, 0);

impl Emulator {
    /// None, after a line that says why, where there is no compiler; in CI there is one.
    fn new(name: &str) -> Option<Self> {
        let file = FILES.iter().find(|file| file.name == name).unwrap();
        let names = (file.kernels)(CAPABILITY);
        let symbol = |(i, name): (usize, &String)| {
            format!("extern \"C\" void *const kernel_{i} = reinterpret_cast<void *>(&{name});\n")
        };
        let symbols: String = names.iter().enumerate().map(symbol).collect();
        // Unnamed: the loader would make the static memory of templates one for all libraries that
        // have them, and tests run at once.
        let kernels = ["namespace {\n", &file.texts[1..].concat(), "}\n"].concat();
        let text = [include_str!("emulator.cpp"), &kernels, &symbols].concat();
        let folder = tempfile::tempdir().unwrap();
        let [source, library] = ["kernels.cpp", "kernels.so"].map(|name| folder.path().join(name));
        std::fs::write(&source, text).unwrap();
        // No warnings: much of a file's beginning is not used by the rest.
        let mut compiler = Command::new("c++");
        compiler.args(["-std=c++17", "-O1", "-w", "-fPIC", "-shared", "-ffp-contract=off"]);
        let output = match compiler.arg("-o").arg(&library).arg(&source).output() {
            Ok(output) => output,
            Err(error) => {
                assert!(std::env::var("CI").as_deref() != Ok("true"), "c++: {error}");
                println!("skipped: c++ cannot be started: {error}");
                return None;
            }
        };
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{name}.cu does not compile for the processor:\n{errors}");
        Some(Self { library: open(&library), names, _folder: folder })
    }

    /// A function of `emulator.cpp`, of type `F`.
    fn function<F: Copy>(&self, symbol: &str) -> F {
        // SAFETY: callers give the type that the file declares.
        *unsafe { self.library.get::<F>(symbol) }.unwrap_or_else(|e| panic!("{symbol}: {e}"))
    }

    /// A kernel, as a function of type `F`.
    fn kernel<F: Copy>(&self, name: &str) -> F {
        let index = self.names.iter().position(|known| known == name);
        let index = index.unwrap_or_else(|| panic!("no kernel is named {name}"));
        // SAFETY: the symbol is a pointer to the kernel, of whose type callers say what the file
        // declares.
        unsafe { *self.function::<*const F>(&format!("kernel_{index}")) }
    }

    /// Declares what copies may read.
    fn may_read(&self, from: &[u128], bytes: usize) {
        let may_read: unsafe extern "C" fn(*const u128, usize) = self.function("may_read");
        // SAFETY: only notes the address.
        unsafe { may_read(from.as_ptr(), bytes) };
    }

    /// Launches a kernel that has one argument. Its buffers and the grid are what the kernel's
    /// comment asks for.
    fn launch<A: Copy>(&self, schedule: (u32, u32), name: &str, launch: Launch, argument: A) {
        let kernel: unsafe extern "C" fn(A) = self.kernel(name);
        let [x, y, _] = launch.grid;
        // SAFETY: as above.
        self.run(schedule, [x, y], launch.block, || unsafe { kernel(argument) });
    }

    /// Calls `f` as every thread of a grid.
    fn run<F: Fn()>(&self, (order, late): (u32, u32), grid: [usize; 2], block: usize, f: F) {
        extern "C" fn call<F: Fn()>(f: *const c_void) {
            // SAFETY: `run` hands on its own.
            unsafe { (*f.cast::<F>())() }
        }
        type RunGrid = unsafe extern "C" fn(
            u32,
            u32,
            u32,
            u32,
            u32,
            extern "C" fn(*const c_void),
            *const c_void,
            extern "C" fn(
                &mut [[f32; 4]; 32],
                &[[u32; 4]; 32],
                &[[u32; 2]; 32],
                &[u32; 32],
                &[u32; 32],
            ),
        );
        let run: RunGrid = self.function("run_grid");
        let [x, y] = grid.map(|n| n as u32);
        let (context, multiply) = (std::ptr::from_ref(&f).cast(), fp4_instruction::multiply);
        // SAFETY: `f` lives until the call returns, and the types are those of `emulator.cpp`.
        unsafe { run(order, late, x, y, block as u32, call::<F>, context, multiply) };
    }
}

fn open(library: &Path) -> libloading::Library {
    // SAFETY: made from the kernels a moment ago; nothing in it runs on being loaded.
    unsafe { libloading::Library::new(library) }.unwrap()
}

/// Bytes that start at a multiple of 16, as those of the kernels do.
fn aligned(bytes: &[u8]) -> Vec<u128> {
    let mut out = vec![0u128; bytes.len().div_ceil(16)];
    bytemuck::cast_slice_mut::<_, u8>(&mut out)[..bytes.len()].copy_from_slice(bytes);
    out
}

/// Values as kernels hold them, aligned as tensors are.
struct Held {
    words: Vec<u128>,
    len: usize,
    precision: Precision,
}

impl Held {
    fn new(values: &[f32], precision: Precision) -> Self {
        let bytes: Vec<u8> = match precision {
            Precision::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            Precision::Bf16 => {
                values.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect()
            }
        };
        Self { words: aligned(&bytes), len: values.len(), precision }
    }

    fn address(&mut self) -> u64 {
        self.words.as_mut_ptr() as u64
    }

    fn amax(&self) -> u32 {
        self.values().iter().fold(0, |largest, v| largest.max(v.to_bits() & 0x7fff_ffff))
    }

    fn values(&self) -> Vec<f32> {
        match self.precision {
            Precision::F32 => bytemuck::cast_slice(&self.words)[..self.len].to_vec(),
            Precision::Bf16 => {
                let halves: &[u16] = bytemuck::cast_slice(&self.words);
                halves[..self.len].iter().map(|v| half::bf16::from_bits(*v).to_f32()).collect()
            }
        }
    }

    /// The kernels' type.
    fn name(precision: Precision) -> &'static str {
        match precision {
            Precision::F32 => "float",
            Precision::Bf16 => "bf16",
        }
    }
}
