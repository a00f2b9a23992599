//! Arrays of numbers that lie in the host program's memory or in that of the engine's GPU.
//!
//! The driver knows which of the two a pointer is. Arrays on a GPU are brought to the host and
//! back: what is asked of their contents (tokens in range, weights finite) is checked there, and
//! the calls that take them wait for results anyway.

use bytemuck::Pod;

use super::arguments::{self, check};
use super::status::Failure;
use crate::Engine;
use crate::reserve::zeros;

/// Calls `body` with a copy of an array; NULL is allowed where `count` is 0.
///
/// # Safety
/// `data` is NULL or points to `count` elements, of the host's memory or of the engine's GPU's,
/// that may be read.
pub(super) unsafe fn read<T: Pod + Default, R>(
    engine: &Engine,
    what: &'static str,
    data: *const T,
    count: usize,
    body: impl FnOnce(&[T]) -> Result<R, Failure>,
) -> Result<R, Failure> {
    if !on_gpu(engine, what, data, count)? {
        // SAFETY: as promised by the caller, and it is the host's memory.
        return body(&unsafe { arguments::copied(what, data, count) }?);
    }
    let mut here = zeros(what, count)?;
    // SAFETY: `count` elements lie there, in one allocation of the GPU.
    unsafe { engine.copy_from_gpu(bytemuck::cast_slice_mut(&mut here), data.cast()) }?;
    body(&here)
}

/// Calls `body` with a function that copies a part of an array, from some element on, which lies in
/// the array; NULL is allowed where `count` is 0. Nothing is allocated for an array of the host's
/// memory.
///
/// # Safety
/// As for [`read`].
pub(super) unsafe fn read_in_parts<T: Pod + Default, R>(
    engine: &Engine,
    what: &'static str,
    data: *const T,
    count: usize,
    body: impl FnOnce(&dyn Fn(usize, &mut [T])) -> Result<R, Failure>,
) -> Result<R, Failure> {
    if on_gpu(engine, what, data, count)? {
        // SAFETY: as promised by the caller.
        return unsafe {
            read(engine, what, data, count, |here| {
                body(&|from, to| to.copy_from_slice(&here[from..][..to.len()]))
            })
        };
    }
    body(&|from, to: &mut [T]| {
        assert!(from <= count && to.len() <= count - from, "parts lie in the array");
        for (i, to) in to.iter_mut().enumerate() {
            // SAFETY: in the array, as asserted, which is the host's memory and was checked.
            *to = unsafe { data.add(from + i).read_volatile() };
        }
    })
}

/// Calls `body` with an array to fill; NULL is allowed where `count` is 0. An error leaves an array
/// on a GPU as it was.
///
/// # Safety
/// `data` is NULL or points to `count` elements, of the host's memory or of the engine's GPU's,
/// that nothing else reads or writes during the call.
pub(super) unsafe fn fill<T: Pod + Default, R>(
    engine: &Engine,
    what: &'static str,
    data: *mut T,
    count: usize,
    body: impl FnOnce(&mut [T]) -> Result<R, Failure>,
) -> Result<R, Failure> {
    if !on_gpu(engine, what, data, count)? {
        // SAFETY: as promised by the caller, and it is the host's memory.
        return body(unsafe { arguments::slice_mut(what, data, count) }?);
    }
    let mut here = zeros(what, count)?;
    let result = body(&mut here)?;
    // SAFETY: `count` elements lie there, in one allocation of the GPU.
    unsafe { engine.copy_to_gpu(data.cast(), bytemuck::cast_slice(&here)) }?;
    Ok(result)
}

/// Whether an array lies in a GPU's memory, all of it.
fn on_gpu<T>(
    engine: &Engine,
    what: &'static str,
    data: *const T,
    count: usize,
) -> Result<bool, Failure> {
    if count == 0 {
        return Ok(false);
    }
    check(what, data, count)?;
    let Some(room) = engine.room_on_gpu(data.cast()) else { return Ok(false) };
    let bytes = count * size_of::<T>();
    if bytes > room {
        let message =
            format!("expected {bytes} bytes on the GPU, got an allocation with {room} left");
        return Err(Failure::invalid(what, message));
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use std::ffi::c_void;
    use std::ptr::null_mut;

    use cudarc::driver::{result, sys};

    use super::super::status::mxt_status_code::{
        MXT_ERROR_INVALID_ARGUMENT, MXT_ERROR_TOKEN_RANGE,
    };
    use super::super::*;
    use crate::{CudaStream, EngineOptions, Error};

    /// Of a program that uses the GPU itself: its context, its stream, and 4 KiB of its memory.
    struct Host {
        device: sys::CUdevice,
        context: sys::CUcontext,
        stream: sys::CUstream,
        memory: sys::CUdeviceptr,
    }

    const BYTES: usize = 4096;

    impl Host {
        /// None, after a line that says so, where there is no GPU.
        fn new() -> Option<Self> {
            let options = EngineOptions { device: "cuda".into(), ..EngineOptions::default() };
            match crate::Engine::new(options) {
                Err(error @ Error::Unsupported { .. }) => {
                    println!("skipped: {error}");
                    return None;
                }
                made => drop(made.unwrap()),
            }
            let device = result::device::get(0).unwrap();
            // SAFETY: an ordinary program of the driver API.
            unsafe {
                let context = result::primary_ctx::retain(device).unwrap();
                result::ctx::set_current(context).unwrap();
                let kind = result::stream::StreamKind::NonBlocking;
                let stream = result::stream::create(kind).unwrap();
                let memory = result::malloc_sync(BYTES).unwrap();
                Some(Self { device, context, stream, memory })
            }
        }

        /// NOTE: in the order of the stream. `cuMemcpyHtoD` may return before what it copies has
        /// arrived, and a stream that does not wait for others then finds what was there before.
        fn write<T>(&self, offset: u64, values: &[T]) {
            // SAFETY: not more than `BYTES` bytes; the wait ends the copy.
            unsafe {
                result::memcpy_htod_async(self.memory + offset, values, self.stream).unwrap();
                result::stream::synchronize(self.stream).unwrap();
            }
        }

        fn floats(&self, count: usize) -> Vec<f32> {
            let mut floats = vec![0.0; count];
            // SAFETY: not more than `BYTES` bytes; everything of the stream has run.
            unsafe {
                result::stream::synchronize(self.stream).unwrap();
                result::memcpy_dtoh_sync(&mut floats, self.memory).unwrap();
            }
            floats
        }
    }

    impl Drop for Host {
        fn drop(&mut self) {
            // SAFETY: made in `new`; the engines on it are gone.
            unsafe {
                result::free_sync(self.memory).unwrap();
                result::stream::destroy(self.stream).unwrap();
                result::primary_ctx::release(self.device).unwrap();
            }
        }
    }

    /// A program with a stream and buffers of its own trains through the C functions.
    #[test]
    fn stream_and_buffers_of_the_host() {
        let Some(host) = Host::new() else { return };
        // SAFETY: what the header asks for.
        unsafe {
            let mut options: mxt_engine_options = std::mem::zeroed();
            assert_eq!(mxt_engine_options_init(&mut options, size_of_val(&options)), 0);
            options.cuda_stream = host.stream.cast();
            let mut engine = null_mut();
            let status = mxt_engine_new(&options, &mut engine);
            assert_eq!(status, MXT_ERROR_INVALID_ARGUMENT as i32, "device cpu has no stream");
            options.device = c"cuda".as_ptr();
            assert_eq!(mxt_engine_new(&options, &mut engine), 0);

            let mut config: mxt_model_config = std::mem::zeroed();
            assert_eq!(mxt_model_config_init(&mut config, size_of_val(&config)), 0);
            (config.vocab_size, config.context_length) = (64, 16);
            (config.layers, config.heads, config.channels) = (1, 2, 32);
            let mut model = null_mut();
            assert_eq!(mxt_model_new(engine, &config, &mut model), 0);

            // A tensor to the host, to the GPU, and back from there.
            let name = c"transformer.wpe.weight".as_ptr();
            let on_gpu = host.memory as *mut c_void;
            let mut here = vec![0.0f32; 16 * 32];
            assert_eq!(mxt_model_tensor_read(model, name, here.as_mut_ptr(), here.len()), 0);
            assert_eq!(mxt_model_tensor_read(model, name, on_gpu.cast(), here.len()), 0);
            assert_eq!(host.floats(here.len()), here);
            for x in &mut here {
                *x *= 2.0;
            }
            host.write(0, &here);
            assert_eq!(mxt_model_tensor_write(model, name, on_gpu.cast(), here.len()), 0);
            let mut again = vec![0.0f32; here.len()];
            assert_eq!(mxt_model_tensor_read(model, name, again.as_mut_ptr(), here.len()), 0);
            assert_eq!(again, here);

            // Logits from tokens, both on the GPU.
            let tokens: Vec<u32> = (0..34).map(|i| i * 7 % 64).collect();
            let mut logits = vec![0.0f32; 64];
            let count = logits.len();
            assert_eq!(
                mxt_model_next_logits(model, tokens.as_ptr(), 10, logits.as_mut_ptr(), count),
                0
            );
            host.write(2048, &tokens);
            let tokens_on_gpu = on_gpu.byte_add(2048).cast::<u32>();
            assert_eq!(mxt_model_next_logits(model, tokens_on_gpu, 10, on_gpu.cast(), count), 0);
            assert_eq!(host.floats(count), logits);

            // Two trainers, one fed from the GPU: the same losses. An array that does not fit its
            // allocation, and a token out of range, are errors that change nothing.
            let mut options: mxt_trainer_options = std::mem::zeroed();
            assert_eq!(mxt_trainer_options_init(&mut options, size_of_val(&options)), 0);
            options.batch_size = 2;
            let losses = [tokens.as_ptr(), tokens_on_gpu.cast_const()].map(|tokens| {
                let (mut model, mut trainer) = (null_mut(), null_mut());
                assert_eq!(mxt_model_new(engine, &config, &mut model), 0);
                assert_eq!(mxt_trainer_new(model, &options, &mut trainer), 0);
                let mut stats: mxt_step_stats = std::mem::zeroed();
                stats.struct_size = size_of_val(&stats);
                let losses = [0; 3].map(|_| {
                    assert_eq!(mxt_trainer_step_tokens(trainer, tokens, 34, &mut stats), 0);
                    stats.loss
                });
                let end = on_gpu.byte_add(BYTES - 132).cast();
                let status = mxt_trainer_step_tokens(trainer, end, 34, &mut stats);
                assert_eq!(status, MXT_ERROR_INVALID_ARGUMENT as i32);
                host.write(0, &[64u32; 34]);
                let status = mxt_trainer_step_tokens(trainer, on_gpu.cast(), 34, &mut stats);
                assert_eq!(status, MXT_ERROR_TOKEN_RANGE as i32);
                mxt_trainer_free(trainer);
                mxt_model_free(model);
                losses
            });
            assert_eq!(losses[0], losses[1]);
            mxt_model_free(model);
            mxt_engine_free(engine);
        }
    }

    /// A stream of another context is refused.
    #[test]
    fn a_foreign_stream_is_an_error() {
        let Some(host) = Host::new() else { return };
        // SAFETY: a context and a stream of its own, destroyed after their last use.
        unsafe {
            let (mut other, mut stream) = (null_mut(), null_mut());
            let created = sys::cuCtxCreate_v4(&mut other, null_mut(), 0, host.device);
            assert_eq!(created, sys::CUresult::CUDA_SUCCESS);
            assert_eq!(sys::cuStreamCreate(&mut stream, 0), sys::CUresult::CUDA_SUCCESS);
            let error = crate::Engine::new(EngineOptions {
                device: "cuda".into(),
                cuda_stream: Some(CudaStream::from_raw(stream.cast())),
                ..EngineOptions::default()
            });
            let error = error.unwrap_err().to_string();
            assert!(error.contains("primary context of cuda:0"), "{error}");
            let _ = sys::cuStreamDestroy_v2(stream);
            let _ = sys::cuCtxDestroy_v2(other);
            result::ctx::set_current(host.context).unwrap();
        }
    }
}
