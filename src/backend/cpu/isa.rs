//! Instruction sets, chosen once when an engine starts.
//!
//! Element-wise loops are written once in plain Rust and compiled for each set by `simd_fn!`; the
//! compiler turns their arrays of 16 lanes into registers. They never fuse a multiplication with an
//! addition, so their results are the same on every set. GEMM inner loops are written per set.

use std::ffi::OsStr;

use crate::{Error, Result};

/// An instruction set that kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    /// AVX-512 as below, and AMX tiles of bf16.
    Amx,
    /// AVX-512 F, BW, VL, DQ, VNNI and BF16.
    Avx512,
    /// AVX2 and FMA.
    Avx2,
    /// What every target has.
    Portable,
}

impl Isa {
    /// All sets, best first.
    pub const ALL: [Self; 4] = [Self::Amx, Self::Avx512, Self::Avx2, Self::Portable];

    /// The best set that this processor has.
    pub fn best() -> Self {
        *Self::ALL.iter().find(|isa| isa.is_available()).expect("Portable is always available")
    }

    /// The set that the environment variable `MXT_CPU_ISA` names, else the best one. For tests and
    /// comparisons.
    pub fn from_environment() -> Result<Self> {
        match std::env::var_os("MXT_CPU_ISA") {
            None => Ok(Self::best()),
            Some(name) => Self::named(&name),
        }
    }

    /// The set of this name, if this processor has it.
    fn named(name: &OsStr) -> Result<Self> {
        let isa = Self::ALL.into_iter().find(|isa| isa.name() == name).ok_or_else(|| {
            let message = format!("expected amx, avx512, avx2 or portable, got {name:?}");
            Error::invalid("MXT_CPU_ISA", message)
        })?;
        if isa.is_available() {
            return Ok(isa);
        }
        Err(Error::Unsupported {
            what: format!("MXT_CPU_ISA={}", isa.name()),
            remedy: format!("this processor has {}", Self::best().name()),
        })
    }

    /// Its name: `amx`, `avx512`, `avx2` or `portable`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Amx => "amx",
            Self::Avx512 => "avx512",
            Self::Avx2 => "avx2",
            Self::Portable => "portable",
        }
    }

    /// Whether this processor has it, and the system lets this process use it.
    pub fn is_available(self) -> bool {
        match self {
            Self::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Self::Amx => Self::Avx512.is_available() && amx::is_available(),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => {
                Self::Avx2.is_available()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vnni")
                    && is_x86_feature_detected!("avx512bf16")
            }
            #[cfg(not(target_arch = "x86_64"))]
            _ => false,
        }
    }
}

/// AMX, which the standard library does not detect yet.
#[cfg(target_arch = "x86_64")]
mod amx {
    use std::arch::x86_64::__cpuid_count;
    use std::sync::OnceLock;

    /// CPUID, leaf 7, register EDX.
    const AMX_BF16: u32 = 1 << 22;
    const AMX_TILE: u32 = 1 << 24;

    /// Tiles of 16 x 16 words, and bf16 products of them.
    pub(super) fn is_available() -> bool {
        static AVAILABLE: OnceLock<bool> = OnceLock::new();
        *AVAILABLE.get_or_init(|| {
            let features = __cpuid_count(7, 0).edx;
            features & AMX_TILE != 0 && features & AMX_BF16 != 0 && tiles_fit() && permitted()
        })
    }

    /// Whether the palette that the kernels configure has their tiles: 8 of 16 rows of 64 bytes.
    fn tiles_fit() -> bool {
        let palette = __cpuid_count(0x1d, 1);
        let (bytes, tiles) = (palette.ebx & 0xffff, palette.ebx >> 16);
        bytes >= 64 && tiles >= 8 && palette.ecx & 0xffff >= 16
    }

    /// Asks Linux for the tile registers, once for the whole process. It refuses where one of the
    /// host's threads handles signals on a stack too small for them.
    #[cfg(target_os = "linux")]
    fn permitted() -> bool {
        const ARCH_REQ_XCOMP_PERM: libc::c_ulong = 0x1023;
        const XFEATURE_XTILEDATA: libc::c_ulong = 18;
        // SAFETY: this request takes two numbers and touches no memory of ours.
        unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
    }

    #[cfg(not(target_os = "linux"))]
    fn permitted() -> bool {
        false
    }
}

/// A function that is compiled for every instruction set; its first argument picks. `items` are
/// what the bodies share.
macro_rules! isa_fn {
    (
        $(#[$meta:meta])*
        $vis:vis fn $name:ident($($arg:ident: $ty:ty),*) $(-> $ret:ty)?;
        $avx512_features:tt => $avx512:block
        avx2 => $avx2:block
        portable => $portable:block
        $($item:item)*
    ) => {
        $(#[$meta])*
        $vis fn $name(isa: $crate::backend::cpu::isa::Isa, $($arg: $ty),*) $(-> $ret)? {
            $($item)*

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = $avx512_features)]
            fn avx512($($arg: $ty),*) $(-> $ret)? $avx512

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            fn avx2($($arg: $ty),*) $(-> $ret)? $avx2

            match isa {
                #[cfg(target_arch = "x86_64")]
                $crate::backend::cpu::isa::Isa::Amx | $crate::backend::cpu::isa::Isa::Avx512 => {
                    // SAFETY: an engine only holds a set that `is_available` confirmed.
                    unsafe { avx512($($arg),*) }
                }
                #[cfg(target_arch = "x86_64")]
                // SAFETY: as above.
                $crate::backend::cpu::isa::Isa::Avx2 => unsafe { avx2($($arg),*) },
                _ => $portable,
            }
        }
    };
}
pub(super) use isa_fn;

/// Compiles one loop for every instruction set; the first argument of the result picks.
macro_rules! simd_fn {
    (
        $(#[$meta:meta])*
        $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block
    ) => {
        $crate::backend::cpu::isa::isa_fn! {
            $(#[$meta])*
            $vis fn $name($($arg: $ty),*) $(-> $ret)?;
            "avx512f,avx512bw,avx512vl,avx512dq" => { body($($arg),*) }
            avx2 => { body($($arg),*) }
            portable => { body($($arg),*) }

            #[inline(always)]
            fn body($($arg: $ty),*) $(-> $ret)? $body
        }
    };
}
pub(super) use simd_fn;

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStrExt;

    use super::*;

    #[test]
    fn a_name_that_no_set_has_is_an_error() {
        assert_eq!(Isa::named(OsStr::new("portable")).unwrap(), Isa::Portable);
        for (name, shown) in
            [(&b"avx9"[..], "\"avx9\""), (b"", "\"\""), (b"avx\xff", "\"avx\\xFF\"")]
        {
            let error = Isa::named(OsStr::from_bytes(name)).unwrap_err();
            assert!(matches!(error, Error::InvalidArgument { what: "MXT_CPU_ISA", .. }), "{error}");
            assert!(error.to_string().ends_with(&format!("got {shown}")), "{error}");
        }
    }
}
