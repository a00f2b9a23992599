//! Matrix products by cuBLASLt, described row-major.
//!
//! cuBLASLt speaks column-major, in which a row-major C = A B is C^T = B^T A^T: its first operand
//! is our B, its second our A. The algorithm is the one that its heuristic puts first, asked for
//! once per kind of product and kept: timing candidates could choose differently in two runs, and
//! then their results would differ in the last bits.
//!
//! NOTE: measured on an H100, the best of sixteen algorithms would gain 1% of a bf16 step and
//! nothing in FP8.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::c_void;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::cublaslt::result::CublasError;
use cudarc::cublaslt::{result, sys};

use super::capture;
use super::gpu::Gpu;
use crate::backend::Precision;
use crate::{Error, Result};

/// Scratch memory that products may use, as cuBLAS advises for Hopper.
pub(crate) const WORKSPACE: usize = 32 << 20;

/// Number format of a matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Type {
    F32,
    Bf16,
    /// FP8 E4M3, as an operand, both dimensions being multiples of 16.
    E4m3,
    /// FP8 E5M2, likewise; not of both operands.
    E5m2,
    /// E4M3 with a scale for every 32 elements along the reduction, of both operands (MXFP8).
    Mxfp8,
    /// Codes, two a byte, with such scales (MXFP4), of both operands; not for cuBLASLt.
    E2m1,
    /// Integers of 8 bits, of both operands, along the reduction; rows of the result are a multiple
    /// of 32, the other dimensions of 16. Their products are [`Type::Int32`].
    Int8,
    /// Exact sums of theirs, neither multiplied by `alpha` nor with a bias.
    Int32,
}

impl From<Precision> for Type {
    fn from(precision: Precision) -> Self {
        match precision {
            Precision::F32 => Self::F32,
            Precision::Bf16 => Self::Bf16,
        }
    }
}

impl Type {
    fn code(self) -> sys::cudaDataType_t {
        match self {
            Self::F32 => sys::cudaDataType_t::CUDA_R_32F,
            Self::Bf16 => sys::cudaDataType_t::CUDA_R_16BF,
            Self::E4m3 | Self::Mxfp8 => sys::cudaDataType_t::CUDA_R_8F_E4M3,
            Self::E2m1 => sys::cudaDataType_t::CUDA_R_4F_E2M1,
            Self::E5m2 => sys::cudaDataType_t::CUDA_R_8F_E5M2,
            Self::Int8 => sys::cudaDataType_t::CUDA_R_8I,
            Self::Int32 => sys::cudaDataType_t::CUDA_R_32I,
        }
    }

    /// What a result of this format is summed in, and the format of what it is multiplied by.
    fn sums(self) -> (sys::cublasComputeType_t, Self) {
        match self {
            Self::Int32 => (sys::cublasComputeType_t::CUBLAS_COMPUTE_32I, Self::Int32),
            _ => (sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, Self::F32),
        }
    }
}

/// An operand that is stored with its vectors as rows, reduction running along them, or with the
/// reduction running down the columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Layout {
    /// (vectors, reduction).
    Rows,
    /// (reduction, vectors).
    Columns,
}

/// An operand on the device.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Operand {
    pub(crate) address: u64,
    pub(crate) layout: Layout,
    /// Elements from one stored row to the next.
    pub(crate) stride: usize,
}

impl Operand {
    /// Stored (vectors, reduction), dense.
    pub(crate) fn rows(address: u64, reduction: usize) -> Self {
        Self { address, layout: Layout::Rows, stride: reduction }
    }

    /// Stored (reduction, vectors), dense.
    pub(crate) fn columns(address: u64, vectors: usize) -> Self {
        Self { address, layout: Layout::Columns, stride: vectors }
    }
}

/// C (m, n) = alpha A (m, k) B (n, k)^T + bias, or added to what is there.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Product {
    pub(crate) m: usize,
    pub(crate) n: usize,
    pub(crate) k: usize,
    /// Formats of A and B.
    pub(crate) operands: [Type; 2],
    pub(crate) a: Operand,
    pub(crate) b: Operand,
    pub(crate) c: u64,
    pub(crate) c_stride: usize,
    pub(crate) c_type: Type,
    pub(crate) alpha: f32,
    /// On the device, instead of `alpha`: two f32, alpha and what C is multiplied by first, 1 where
    /// the product is added to it, else 0.
    pub(crate) factors: Option<u64>,
    pub(crate) accumulate: bool,
    /// (n), of C's format.
    pub(crate) bias: Option<u64>,
    /// On the device, what FP8 operands have: f32 factors of all of A and of all of B. Of MXFP8 and
    /// MXFP4 the scale bytes of the blocks, in the tiles that cuBLASLt wants, and row by row.
    pub(crate) scales: Option<[u64; 2]>,
}

/// Everything that the choice of an algorithm depends on: sizes and strides, formats, layouts of
/// the operands, whether there is something to add to and a bias, and where the factors lie.
type Kind = ([usize; 6], [Type; 3], [Layout; 2], [bool; 3]);

impl Product {
    /// C (m, n), dense and of the operands' format, = A (m, k) B (n, k)^T.
    pub(crate) fn new(format: Type, [m, n, k]: [usize; 3], a: Operand, b: Operand, c: u64) -> Self {
        let (operands, c_type, scales) = ([format; 2], format, None);
        let (alpha, factors, accumulate, bias, c_stride) = (1.0, None, false, None, n);
        Self {
            m,
            n,
            k,
            operands,
            a,
            b,
            c,
            c_stride,
            c_type,
            alpha,
            factors,
            accumulate,
            bias,
            scales,
        }
    }

    fn kind(&self) -> Kind {
        let &Self { m, n, k, operands: [first, second], a, b, c_stride, c_type, .. } = self;
        (
            [m, n, k, a.stride, b.stride, c_stride],
            [first, second, c_type],
            [a.layout, b.layout],
            [self.accumulate, self.bias.is_some(), self.factors.is_some()],
        )
    }
}

/// cuBLASLt with the plans of all products seen so far.
pub(crate) struct Gemm {
    gpu: Arc<Gpu>,
    handle: sys::cublasLtHandle_t,
    plans: Mutex<HashMap<Kind, Plan>>,
}

// SAFETY: a handle may be used from any thread whose current context is that of the GPU, which
// `Gpu::scope` sees to, and plans are only used under the lock.
unsafe impl Send for Gemm {}
// SAFETY: as above.
unsafe impl Sync for Gemm {}

impl Gemm {
    pub(crate) fn new(gpu: &Arc<Gpu>) -> Result<Self> {
        let _alone = capture::without_captures();
        let handle = gpu.scope(result::create_handle).map_err(|error| Error::Device {
            message: format!("{}: cuBLASLt does not start ({error})", gpu.name),
        })?;
        Ok(Self { gpu: gpu.clone(), handle, plans: Mutex::default() })
    }

    /// Starts a product; `workspace` has [`WORKSPACE`] bytes.
    pub(crate) fn run(&self, gpu: &Gpu, product: &Product, workspace: u64) {
        let kind = product.kind();
        let plans = || self.plans.lock().unwrap_or_else(PoisonError::into_inner);
        // The first product of a kind may be the one that loads its kernel. NOTE: a thread that
        // captures asks for `plans` too, so nobody may hold them who waits for the end of captures.
        // In one statement with the wait, the guard would live until that is over.
        let known = plans().contains_key(&kind);
        let _alone = (!known).then(capture::without_captures);
        let mut plans = plans();
        let plan = match plans.entry(kind) {
            Entry::Occupied(plan) => Ok(plan.into_mut()),
            Entry::Vacant(place) => Plan::new(self.handle, product).map(|plan| place.insert(plan)),
        };
        let result = plan.and_then(|plan| plan.run(gpu, self.handle, product, workspace));
        if let Err(error) = result {
            gpu.fail(format!("cuBLASLt cannot compute {product:?}: {error}"));
        }
    }
}

impl Drop for Gemm {
    fn drop(&mut self) {
        self.plans.get_mut().unwrap_or_else(PoisonError::into_inner).clear();
        if self.gpu.is_stuck() {
            return;
        }
        let _alone = capture::without_captures();
        // SAFETY: ours, and nothing uses it any more. It waits for the device, so that has to be
        // current.
        let _ = self.gpu.scope(|| unsafe { result::destroy_handle(self.handle) });
    }
}

/// A description of a product, destroyed when dropped.
struct Description(sys::cublasLtMatmulDesc_t);

impl Drop for Description {
    fn drop(&mut self) {
        // SAFETY: ours; a product that runs has read it.
        let _ = unsafe { result::destroy_matmul_desc(self.0) };
    }
}

/// The layout of a matrix, likewise.
struct Matrix(sys::cublasLtMatrixLayout_t);

impl Matrix {
    /// Of `rows` by `columns`, column-major.
    fn new(
        format: Type,
        (rows, columns): (usize, usize),
        stride: usize,
    ) -> std::result::Result<Self, CublasError> {
        result::create_matrix_layout(format.code(), rows as u64, columns as u64, stride as i64)
            .map(Self)
    }
}

impl Drop for Matrix {
    fn drop(&mut self) {
        // SAFETY: as above.
        let _ = unsafe { result::destroy_matrix_layout(self.0) };
    }
}

/// Descriptors and algorithm of one kind of product.
struct Plan {
    product: Description,
    /// Of our B, our A, and C.
    layouts: [Matrix; 3],
    algorithm: sys::cublasLtMatmulAlgo_t,
}

impl Plan {
    fn new(
        handle: sys::cublasLtHandle_t,
        example: &Product,
    ) -> std::result::Result<Self, CublasError> {
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        let &Product { m, n, k, operands, a, b, c_stride, c_type, .. } = example;
        let (compute, factors) = c_type.sums();
        let description = Description(result::create_matmul_desc(compute, factors.code())?);
        let product = description.0;
        // Our B (n, k) row-major is k x n column-major: to be transposed. Our A likewise, the other
        // way.
        let first_transposed = b.layout == Layout::Rows;
        let second_transposed = a.layout == Layout::Columns;
        set(product, Attribute::CUBLASLT_MATMUL_DESC_TRANSA, &operation(first_transposed))?;
        set(product, Attribute::CUBLASLT_MATMUL_DESC_TRANSB, &operation(second_transposed))?;
        if example.bias.is_some() {
            let epilogue = sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS;
            set(product, Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue)?;
        }
        if example.factors.is_some() {
            let mode = sys::cublasLtPointerMode_t::CUBLASLT_POINTER_MODE_DEVICE;
            set(product, Attribute::CUBLASLT_MATMUL_DESC_POINTER_MODE, &mode)?;
        }
        if operands.contains(&Type::Mxfp8) {
            let mode = sys::cublasLtMatmulMatrixScale_t::CUBLASLT_MATMUL_MATRIX_SCALE_VEC32_UE8M0;
            set(product, Attribute::CUBLASLT_MATMUL_DESC_A_SCALE_MODE, &mode)?;
            set(product, Attribute::CUBLASLT_MATMUL_DESC_B_SCALE_MODE, &mode)?;
        }
        // NOTE: FP8 without fast accumulation, which is faster by up to a tenth and off by 5e-6 to
        // 8e-5. The heuristic refuses formats whose scales are not there yet.
        set_pointers(product, example)?;
        let oriented = |transposed, stored: (usize, usize)| {
            if transposed { (stored.1, stored.0) } else { stored }
        };
        let first = Matrix::new(operands[1], oriented(first_transposed, (n, k)), b.stride)?;
        let second = Matrix::new(operands[0], oriented(second_transposed, (k, m)), a.stride)?;
        let output = Matrix::new(c_type, (n, m), c_stride)?;

        let preference = result::create_matmul_pref()?;
        let which =
            sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
        let bytes: u64 = WORKSPACE as u64;
        // SAFETY: all descriptors were made above; the attribute is 8 bytes.
        let found = unsafe {
            result::set_matmul_pref_attribute(
                preference,
                which,
                std::ptr::from_ref(&bytes).cast(),
                size_of::<u64>(),
            )
            .and_then(|()| {
                result::get_matmul_algo_heuristic(
                    handle, product, first.0, second.0, output.0, output.0, preference,
                )
            })
        };
        // SAFETY: made above.
        let _ = unsafe { result::destroy_matmul_pref(preference) };
        let algorithm = found?.algo;
        Ok(Self { product: description, layouts: [first, second, output], algorithm })
    }

    fn run(
        &mut self,
        gpu: &Gpu,
        handle: sys::cublasLtHandle_t,
        product: &Product,
        workspace: u64,
    ) -> std::result::Result<(), CublasError> {
        set_pointers(self.product.0, product)?;
        let beta = if product.accumulate { 1.0f32 } else { 0.0 };
        // Those of integers are integers.
        let [whole_alpha, whole_beta] = [1i32, i32::from(product.accumulate)];
        let pointer = |address: u64| address as *mut c_void;
        let factors: [*const c_void; 2] = match (product.c_type, product.factors) {
            (Type::Int32, _) => {
                [&raw const whole_alpha, &raw const whole_beta].map(<*const i32>::cast)
            }
            (_, Some(address)) => [address, address + 4].map(|at| pointer(at).cast_const()),
            (_, None) => [&raw const product.alpha, &raw const beta].map(<*const f32>::cast),
        };
        let [first, second, output] = &self.layouts;
        // SAFETY: the addresses are those of buffers of the sizes that the layouts say.
        unsafe {
            result::matmul(
                handle,
                self.product.0,
                factors[0],
                factors[1],
                pointer(product.b.address),
                first.0,
                pointer(product.a.address),
                second.0,
                pointer(product.c),
                output.0,
                pointer(product.c),
                output.0,
                &self.algorithm,
                pointer(workspace),
                WORKSPACE,
                gpu.stream().cast(),
            )
        }
    }
}

/// Where bias and scales lie.
fn set_pointers(
    descriptor: sys::cublasLtMatmulDesc_t,
    product: &Product,
) -> std::result::Result<(), CublasError> {
    use sys::cublasLtMatmulDescAttributes_t as Attribute;
    if let Some(bias) = product.bias {
        set(descriptor, Attribute::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias)?;
    }
    if let Some([a, b]) = product.scales {
        set(descriptor, Attribute::CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, &b)?;
        set(descriptor, Attribute::CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, &a)?;
    }
    Ok(())
}

fn operation(transposed: bool) -> i32 {
    // cublasOperation_t: CUBLAS_OP_N and CUBLAS_OP_T.
    i32::from(transposed)
}

fn set<T>(
    product: sys::cublasLtMatmulDesc_t,
    attribute: sys::cublasLtMatmulDescAttributes_t,
    value: &T,
) -> std::result::Result<(), CublasError> {
    let value_pointer = std::ptr::from_ref(value).cast();
    // SAFETY: the descriptor is alive and the attribute has the size of `T`.
    unsafe { result::set_matmul_desc_attribute(product, attribute, value_pointer, size_of::<T>()) }
}
