//! Tensor files: safetensors with a CRC-32 of every tensor, written in one pass, read in pieces.
//!
//! The checksums stand in the file's own metadata (`mxfp4train.crc32`, a JSON object of tensor name
//! to hexadecimal), where other readers ignore them; files without them are read unchecked.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, Metadata, SafeTensorError, TensorInfo};
use serde::{Deserialize, Serialize};

use super::StoredTensor;
use super::files::{NewFiles, OpenFile};
use super::{MAX_JSON, Scratch, TensorRead, found, room_for_json};
use crate::formats::{decode_e2m1, decode_e8m0};
use crate::optim::moments::{E4m3, Float};
use crate::reserve::{Spare, reserve, zeros};
use crate::{Error, Result};

/// Metadata key of the checksums.
const CRC32: &str = "mxfp4train.crc32";

/// Bytes of the header's length, which comes first.
const PREFIX: usize = 8;

/// What `trainer.json` knows of the files beside it. The header holds the checksum of each tensor,
/// so its own checksum stands for the whole file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Fingerprint {
    bytes: u64,
    header_crc32: String,
}

/// A tensor to write: tensor `index` of `source`, under another name.
pub(super) struct Named<'a> {
    pub(super) name: String,
    pub(super) source: &'a dyn TensorRead,
    pub(super) index: usize,
}

impl Named<'_> {
    fn shape(&self) -> &[usize] {
        &self.source.tensors()[self.index].shape
    }

    fn dtype(&self) -> Dtype {
        self.source.dtype(self.index)
    }

    /// Its size in the file.
    fn bytes(&self) -> usize {
        self.shape().iter().product::<usize>() * self.dtype().bitsize() / 8
    }
}

/// Writes the new file `name`; `extra` joins the metadata. There is at least one tensor.
///
/// # Errors
/// [`Error::NotFinite`] for a NaN or infinite element: what cannot be loaded must not replace a
/// checkpoint that can. [`Error::Io`].
pub(super) fn write(
    files: &mut NewFiles<'_>,
    name: &str,
    tensors: &[Named],
    extra: &[(&str, String)],
) -> Result<Fingerprint> {
    let path = &files.path(name);
    let mut sums = zeros("the sums of a tensor file", tensors.len())?;
    let mut encoder = Encoder::new()?;
    if files.are_in_order() {
        for (tensor, sum) in tensors.iter().zip(&mut sums) {
            *sum = encoder.encode(path, tensor, |_| Ok(()))?;
        }
    }
    let first = header(path, tensors, &sums, extra)?;
    let bytes = first.len() as u64 + tensors.iter().map(|t| t.bytes() as u64).sum::<u64>();
    let mut file = files.create(name, bytes)?;
    file.write(&first)?;
    for (tensor, sum) in tensors.iter().zip(&mut sums) {
        *sum = encoder.encode(path, tensor, |bytes| file.write(bytes))?;
    }
    // The checksums have a fixed width, so the header with the true ones fits over the first one.
    let header = header(path, tensors, &sums, extra)?;
    debug_assert_eq!(header.len(), first.len());
    if header != first {
        file.write_over(&header)?;
    }
    file.close()?;
    Ok(Fingerprint { bytes, header_crc32: hex(crc32fast::hash(&header)) })
}

/// Makes the bytes of tensors, in memory that the next one takes over.
struct Encoder {
    values: Vec<f32>,
    bytes: Vec<u8>,
    scratch: Scratch,
}

impl Encoder {
    fn new() -> Result<Self> {
        let mut bytes = Vec::new();
        reserve(&mut bytes, "a piece of a tensor", PIECE)?;
        Ok(Self { values: Vec::new(), bytes, scratch: Scratch::default() })
    }

    /// Hands the bytes of a tensor of the file `path` to `put`, in pieces, and returns their sum.
    fn encode(
        &mut self,
        path: &Path,
        tensor: &Named<'_>,
        mut put: impl FnMut(&[u8]) -> Result<()>,
    ) -> Result<u32> {
        let Self { values, bytes, scratch } = self;
        let mut crc = crc32fast::Hasher::new();
        let mut put = |bytes: &[u8]| {
            crc.update(bytes);
            put(bytes)
        };
        if let Some(codes) = tensor.source.codes(tensor.index, scratch) {
            codes?.chunks(PIECE).try_for_each(put)?;
            return Ok(crc.finalize());
        }
        let count = tensor.shape().iter().product();
        reserve(values, "a tensor", count)?;
        values.resize(count, 0.0);
        tensor.source.read(tensor.index, values, scratch)?;
        check_finite(path, &tensor.name, values)?;
        for part in values.chunks(PIECE / size_of::<f32>()) {
            bytes.clear();
            encode(tensor.dtype(), part, bytes);
            put(bytes)?;
        }
        Ok(crc.finalize())
    }
}

/// The header with its length, padded to 8 bytes.
///
/// NOTE: `safetensors::serialize_to_file` is not used. It writes the metadata in the random order
/// of a `HashMap`, so that equal models would give unequal files, it gives the file to its owner
/// alone (mode 600), and it needs the checksums, so a second read of all tensors, before the first
/// byte.
fn header(
    path: &Path,
    tensors: &[Named],
    sums: &[u32],
    extra: &[(&str, String)],
) -> Result<Vec<u8>> {
    debug_assert!(!tensors.is_empty());
    let json = |e| Error::format(path, format!("cannot write its header: {e}"));
    let mut end = 0;
    let infos = tensors.iter().map(|tensor| {
        let start = end;
        end += tensor.bytes();
        let (dtype, shape) = (tensor.dtype(), tensor.shape().to_vec());
        (tensor.name.clone(), TensorInfo { dtype, shape, data_offsets: (start, end) })
    });
    let infos = Metadata::new(None, infos.collect())
        .map_err(|e| Error::format(path, format!("cannot write its header: {e}")))?;
    let sums: BTreeMap<_, _> =
        tensors.iter().zip(sums).map(|(tensor, &sum)| (&*tensor.name, hex(sum))).collect();
    let mut metadata: BTreeMap<_, _> = extra.iter().cloned().collect();
    metadata.insert("format", "pt".into());
    metadata.insert(CRC32, serde_json::to_string(&sums).map_err(json)?);

    let metadata = serde_json::to_string(&metadata).map_err(json)?;
    let infos = serde_json::to_string(&infos).map_err(json)?;
    // `infos` is an object of at least one entry, which the metadata joins as the first.
    let mut text = format!("{{\"__metadata__\":{metadata},{}", &infos[1..]).into_bytes();
    text.resize(text.len().next_multiple_of(PREFIX), b' ');
    let mut header = (text.len() as u64).to_le_bytes().to_vec();
    header.extend(text);
    Ok(header)
}

/// Bytes that are read at once: they are summed and decoded while they are in a core's cache.
const PIECE: usize = 1 << 18;

/// An open tensor file whose header is sound.
///
/// NOTE: no map. Where a file is cut short, or a disk or server fails, reading a map ends the
/// process and reading a file is an error. And what a piece's sum says is true of what is decoded,
/// whatever happens to the file meanwhile.
pub(super) struct TensorFile<'a> {
    path: PathBuf,
    file: &'a OpenFile<'a>,
    length: u64,
    header: Metadata,
    /// CRC-32 of the header and its length.
    header_sum: u32,
    /// First byte of the tensors.
    start: u64,
    sums: Option<BTreeMap<String, String>>,
    /// For the header, and for lists of what is in it.
    _spare: Spare,
}

impl<'a> TensorFile<'a> {
    /// Reads the header of `file`, which messages call `path`, and checks it.
    pub(super) fn open(path: &Path, file: &'a OpenFile<'a>) -> Result<Self> {
        /// As much as tells what kind of file it is.
        const BEGINNING: usize = 1 << 10;
        let length = file.size(path)?;
        if length == 0 {
            return Err(Error::format(path, "expected a safetensors file, found an empty one"));
        }
        let mut text = vec![0; length.min(BEGINNING as u64) as usize];
        file.read_exact_at(path, &mut text, 0)?;
        found::check_fetched(path, &text)?;
        let Some(size) = text.first_chunk().map(|b| u64::from_le_bytes(*b)) else {
            let message = format!(
                "expected a safetensors file, found only {length} bytes (a truncated copy?)"
            );
            return Err(Error::format(path, message));
        };
        if size > MAX_JSON || size > length - PREFIX as u64 {
            let message = format!(
                "damaged, truncated or no safetensors file: a header of {size} bytes is announced, \
                 the file has {length}"
            );
            return Err(Error::format(path, message));
        }
        let read = text.len();
        let start = PREFIX + size as usize;
        reserve(&mut text, "the header of a tensor file", start)?;
        text.resize(start, 0);
        if let Some(rest) = text.get_mut(read..) {
            file.read_exact_at(path, rest, read as u64)?;
        }
        let spare = room_for_json(start)?;
        let header = match serde_json::from_slice::<Metadata>(&text[PREFIX..]) {
            Ok(header) => header,
            Err(e) => return Err(describe(path, &text, &e)),
        };
        let start = start as u64;
        check_length(path, &header, start, length)?;
        let sums = match header.metadata().as_ref().and_then(|m| m.get(CRC32)) {
            None => match lost_sums(&header) {
                None => None,
                Some(key) => {
                    let message = format!(
                        "damaged header: the checksums of its tensors stand under {key:?} and not \
                         under {CRC32}; restore the file from a copy"
                    );
                    return Err(Error::format(path, message));
                }
            },
            Some(text) => Some(serde_json::from_str(text).map_err(|e| {
                Error::format(path, format!("damaged header: {CRC32} is no table of sums: {e}"))
            })?),
        };
        let header_sum = crc32fast::hash(&text);
        let path = path.to_owned();
        Ok(Self { path, file, length, header, header_sum, start, sums, _spare: spare })
    }

    /// Size of the file in bytes.
    pub(super) fn bytes(&self) -> u64 {
        self.length
    }

    /// What `trainer.json` should say of this file.
    pub(super) fn fingerprint(&self) -> Fingerprint {
        Fingerprint { bytes: self.length, header_crc32: hex(self.header_sum) }
    }

    /// An entry of the metadata.
    pub(super) fn metadata(&self, key: &str) -> Option<&str> {
        self.header.metadata().as_ref()?.get(key).map(String::as_str)
    }

    /// Names of all tensors, in file order.
    pub(super) fn names(&self) -> Vec<String> {
        self.header.offset_keys()
    }

    /// The file, for messages.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// All tensors, in file order.
    pub(super) fn stored(&self) -> Vec<StoredTensor> {
        let stored = |name: String| {
            let info = self.header.info(&name)?;
            let (dtype, shape) = (info.dtype.to_string(), info.shape.clone());
            Some(StoredTensor { name, dtype, shape })
        };
        self.names().into_iter().filter_map(stored).collect()
    }

    /// The number format of a tensor.
    pub(super) fn dtype(&self, name: &str) -> Option<Dtype> {
        Some(self.header.info(name)?.dtype)
    }

    /// Whether a tensor is codes of MXFP4.
    pub(super) fn is_mxfp4(&self, name: &str) -> bool {
        self.dtype(name) == Some(Dtype::F4)
    }

    /// Whether there is a tensor of this name.
    pub(super) fn contains(&self, name: &str) -> bool {
        self.header.info(name).is_some()
    }

    /// A tensor that the model has no place for is a sign of a wrong `config.json`.
    ///
    /// # Errors
    /// [`Error::Mismatch`] for the first tensor whose name is not `known`.
    pub(super) fn check_surplus(&self, known: impl Fn(&str) -> bool) -> Result<()> {
        match self.names().into_iter().find(|name| !known(name)) {
            None => Ok(()),
            Some(name) => {
                let message = format!("holds the tensor {name}, which the model does not have");
                Err(Error::mismatch(&self.path, message))
            }
        }
    }

    /// Where tensor `name` is, which must have shape `shape` and one of the types `dtypes`, and what
    /// its checksum must be.
    fn find(
        &self,
        name: &str,
        shape: &[usize],
        dtypes: &[Dtype],
    ) -> Result<(&TensorInfo, Option<&String>)> {
        let format = |message| Error::format(&self.path, format!("tensor {name}: {message}"));
        let info = self.header.info(name).ok_or_else(|| format("missing".into()))?;
        if info.shape != shape {
            let message =
                format!("tensor {name}: expected shape {shape:?}, found {:?}", info.shape);
            return Err(Error::mismatch(&self.path, message));
        }
        let dtype = info.dtype;
        if !dtypes.contains(&dtype) {
            let or = |i: usize| {
                if i == 0 {
                    ""
                } else if i + 1 < dtypes.len() {
                    ", "
                } else {
                    " or "
                }
            };
            let expected = dtypes.iter().enumerate().map(|(i, dtype)| format!("{}{dtype}", or(i)));
            let expected: String = expected.collect();
            return Err(format(format!("expected {expected}, found {dtype}")));
        }
        let expected = match &self.sums {
            None => None,
            Some(sums) => {
                Some(sums.get(name).ok_or_else(|| format("no checksum in header".into()))?)
            }
        };
        Ok((info, expected))
    }

    /// An error unless what was read of tensor `name` is what was written.
    fn check_sum(
        &self,
        name: &str,
        crc: crc32fast::Hasher,
        expected: Option<&String>,
    ) -> Result<()> {
        let found = hex(crc.finalize());
        match expected {
            Some(expected) if *expected != found => {
                let message = format!(
                    "tensor {name}: damaged: expected CRC-32 {expected}, found {found}; restore the \
                     file from a copy"
                );
                Err(Error::format(&self.path, message))
            }
            _ => Ok(()),
        }
    }

    /// Reads tensor `name`, which must have shape `shape` and be of codes of 8 bits, as it is.
    ///
    /// # Errors
    /// As [`TensorFile::read`].
    pub(super) fn read_codes(&self, name: &str, shape: &[usize], out: &mut Vec<u8>) -> Result<()> {
        let (info, expected) = self.find(name, shape, &[Dtype::I8, Dtype::U8])?;
        let count = shape.iter().product();
        reserve(out, "a tensor", count)?;
        out.resize(count, 0);
        let mut crc = crc32fast::Hasher::new();
        let mut at = self.start + info.data_offsets.0 as u64;
        for bytes in out.chunks_mut(PIECE) {
            self.file.read_exact_at(&self.path, bytes, at)?;
            at += bytes.len() as u64;
            if expected.is_some() {
                crc.update(bytes);
            }
        }
        self.check_sum(name, crc, expected)
    }

    /// Reads tensor `name`, which must have shape `shape` and one of the types `dtypes`, into `out`
    /// as f32.
    ///
    /// # Errors
    /// [`Error::Format`] for a missing or damaged tensor or one of another type, [`Error::Mismatch`]
    /// for another shape, [`Error::NotFinite`] for an element that is NaN, infinite or beyond f32;
    /// [`Error::Io`].
    pub(super) fn read(
        &self,
        name: &str,
        shape: &[usize],
        dtypes: &[Dtype],
        out: &mut Vec<f32>,
    ) -> Result<()> {
        let (info, expected) = self.find(name, shape, dtypes)?;
        let (dtype, count) = (info.dtype, shape.iter().product());
        reserve(out, "a tensor", count)?;
        out.resize(count, 0.0);
        let mut buffer = Vec::new();
        let mut crc = crc32fast::Hasher::new();
        let mut is_finite = true;
        let mut at = self.start + info.data_offsets.0 as u64;
        for values in out.chunks_mut(PIECE * 8 / dtype.bitsize()) {
            let is_as_stored = dtype == Dtype::F32 && cfg!(target_endian = "little");
            if !is_as_stored {
                // Tensors end at whole bytes, of two codes each where these have 4 bits.
                let len = values.len() * dtype.bitsize() / 8;
                reserve(&mut buffer, "a piece of a tensor", len)?;
                buffer.resize(len, 0);
            }
            let bytes =
                if is_as_stored { bytemuck::cast_slice_mut(values) } else { &mut buffer[..] };
            self.file.read_exact_at(&self.path, bytes, at)?;
            at += bytes.len() as u64;
            if expected.is_some() {
                crc.update(bytes);
            }
            if !is_as_stored {
                decode(dtype, &buffer, values);
            }
            // All of them: a loop without a way out runs on vectors.
            is_finite &= values.iter().fold(true, |all, v| all & v.is_finite());
        }
        self.check_sum(name, crc, expected)?;
        if is_finite { Ok(()) } else { check_finite(&self.path, name, out) }
    }

    /// Whether tensor `name` of this file and `other_name` of `other` have one shape and, as f32,
    /// the same bits. A tensor of a type that is not read is the same as no other.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::OutOfMemory`].
    pub(super) fn holds_same(
        &self,
        name: &str,
        other: &TensorFile<'_>,
        other_name: &str,
    ) -> Result<bool> {
        /// In the longest type that is read, a piece.
        const ELEMENTS: usize = PIECE / size_of::<f64>();
        let (Some(a), Some(b)) = (self.header.info(name), other.header.info(other_name)) else {
            return Ok(false);
        };
        if a.shape != b.shape || ![a, b].iter().all(|info| FLOATS.contains(&info.dtype)) {
            return Ok(false);
        }
        let mut bytes = [const { Vec::new() }; 2];
        let mut values = [const { Vec::new() }; 2];
        let count: usize = a.shape.iter().product();
        for first in (0..count).step_by(ELEMENTS) {
            let elements = ELEMENTS.min(count - first);
            for (bytes, (file, info)) in bytes.iter_mut().zip([(self, a), (other, b)]) {
                let bits = info.dtype.bitsize();
                let len = (elements * bits).div_ceil(8);
                reserve(bytes, "a piece of a tensor", len)?;
                bytes.resize(len, 0);
                let at = info.data_offsets.0 + first * bits / 8;
                file.file.read_exact_at(&file.path, bytes, file.start + at as u64)?;
            }
            if a.dtype == b.dtype {
                if bytes[0] != bytes[1] {
                    return Ok(false);
                }
                continue;
            }
            for (values, (bytes, info)) in values.iter_mut().zip(bytes.iter().zip([a, b])) {
                reserve(values, "a piece of a tensor", elements)?;
                values.resize(elements, 0.0);
                if !decode(info.dtype, bytes, values) {
                    return Ok(false);
                }
            }
            let [a, b] = &values;
            if a.iter().zip(b).any(|(a, b): (&f32, &f32)| a.to_bits() != b.to_bits()) {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

/// The types of numbers that weights may be stored in; the first is ours.
pub(super) const FLOATS: [Dtype; 4] = [Dtype::F32, Dtype::F16, Dtype::BF16, Dtype::F64];

/// Appends numbers, each of which `dtype` can hold, as files have them: f32, floats of 8 or 16 bits,
/// or whole numbers of 8. Of F4 and F8_E8M0 a number is the bits of an element.
fn encode(dtype: Dtype, values: &[f32], bytes: &mut Vec<u8>) {
    match dtype {
        Dtype::F4 => {
            bytes.extend(values.as_chunks().0.iter().map(|[a, b]| *a as u8 | (*b as u8) << 4))
        }
        Dtype::F8_E8M0 => bytes.extend(values.iter().map(|v| *v as u8)),
        Dtype::I8 | Dtype::U8 => bytes.extend(values.iter().map(|v| *v as i32 as u8)),
        Dtype::BF16 => {
            bytes.extend(values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()));
        }
        Dtype::F16 => bytes.extend(values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes())),
        Dtype::F8_E4M3 => bytes.extend(values.iter().map(|v| E4m3::encode(*v, 1.0))),
        _ => bytes.extend_from_slice(bytemuck::cast_slice(values)),
    }
}

/// Stores the numbers of a tensor as f32; false for a type that is not read. Numbers beyond f32
/// become infinite.
pub(crate) fn decode(dtype: Dtype, bytes: &[u8], out: &mut [f32]) -> bool {
    fn each<const N: usize>(bytes: &[u8], out: &mut [f32], number: impl Fn([u8; N]) -> f32) {
        out.iter_mut().zip(bytes.as_chunks().0).for_each(|(out, &bytes)| *out = number(bytes));
    }
    match dtype {
        Dtype::F32 => each(bytes, out, f32::from_le_bytes),
        Dtype::F64 => each(bytes, out, |b| f64::from_le_bytes(b) as f32),
        Dtype::F16 => each(bytes, out, |b| f16::from_le_bytes(b).to_f32()),
        Dtype::BF16 => each(bytes, out, |b| bf16::from_le_bytes(b).to_f32()),
        // A byte is two.
        Dtype::F4 => out.as_chunks_mut().0.iter_mut().zip(bytes).for_each(|(out, byte)| {
            *out = [decode_e2m1(*byte), decode_e2m1(byte >> 4)];
        }),
        Dtype::F8_E8M0 => each(bytes, out, |[b]: [u8; 1]| decode_e8m0(b)),
        Dtype::I8 => each(bytes, out, |[b]: [u8; 1]| f32::from(b as i8)),
        Dtype::U8 => each(bytes, out, |[b]: [u8; 1]| f32::from(b)),
        // Two of its bytes are no number.
        Dtype::F8_E4M3 => each(bytes, out, |[b]: [u8; 1]| match b & 0x7f {
            0x7f => f32::NAN,
            _ => E4m3::decode(b, 1.0),
        }),
        _ => return false,
    }
    true
}

/// [`Error::NotFinite`] for the first element that is NaN or infinite.
pub(super) fn check_finite(path: &Path, name: &str, values: &[f32]) -> Result<()> {
    // First all at once, in a loop without an exit.
    let largest = values.iter().fold(0, |most, v| (v.to_bits() & 0x7fff_ffff).max(most));
    if largest < f32::INFINITY.to_bits() {
        return Ok(());
    }
    match values.iter().position(|v| !v.is_finite()) {
        None => Ok(()),
        Some(i) => Err(Error::NotFinite {
            what: format!("{}: element {i} of tensor {name}", path.display()),
            value: values[i],
        }),
    }
}

/// Where a file without checksums has some: under a name that damage made of ours.
fn lost_sums(header: &Metadata) -> Option<&str> {
    let is_sums = |text: &str| {
        serde_json::from_str::<BTreeMap<String, String>>(text).is_ok_and(|sums| {
            sums.iter().any(|(name, sum)| header.info(name).is_some() && sum.len() == hex(0).len())
        })
    };
    let (key, _) = header.metadata().as_ref()?.iter().find(|(_, text)| is_sums(text))?;
    Some(key)
}

/// What is wrong with a header that cannot be read, in words that name numbers and tensors.
fn describe(path: &Path, text: &[u8], error: &serde_json::Error) -> Error {
    let message = match SafeTensors::read_metadata(text) {
        Err(SafeTensorError::InvalidOffset(name)) => {
            format!("damaged header: the offsets of tensor {name} leave a gap or overlap")
        }
        read => {
            let entry = text.get(PREFIX..).and_then(bad_entry);
            let error = || read.err().map_or_else(|| error.to_string(), |e| e.to_string());
            format!("damaged header: {}", entry.unwrap_or_else(error))
        }
    };
    Error::format(path, message)
}

/// The first entry of a header that describes no tensor, and why.
fn bad_entry(header: &[u8]) -> Option<String> {
    let entries: BTreeMap<String, serde_json::Value> = serde_json::from_slice(header).ok()?;
    entries.into_iter().filter(|(name, _)| name != "__metadata__").find_map(|(name, entry)| {
        let info: TensorInfo = match serde_json::from_value(entry) {
            Ok(info) => info,
            Err(error) => return Some(format!("tensor {name}: {error}")),
        };
        let (from, to) = info.data_offsets;
        let bits = info.shape.iter().try_fold(info.dtype.bitsize(), |n, &m| n.checked_mul(m));
        let found = to.checked_sub(from).and_then(|bytes| bytes.checked_mul(8));
        (bits.is_none() || bits != found).then(|| {
            let TensorInfo { dtype, shape, .. } = info;
            format!("tensor {name}: {dtype} of shape {shape:?} do not fill bytes {from} to {to}")
        })
    })
}

/// An error for a file that is shorter or longer than its header says: names the first tensor that
/// is cut.
fn check_length(path: &Path, header: &Metadata, start: u64, found: u64) -> Result<()> {
    let end = |bytes: usize| start.saturating_add(bytes as u64);
    let expected = end(header.data_len());
    if found == expected {
        return Ok(());
    }
    if found > expected {
        return Err(Error::format(path, format!("expected {expected} bytes, found {found}")));
    }
    let names = header.offset_keys();
    let is_cut =
        |name: &&String| header.info(name).is_some_and(|info| end(info.data_offsets.1) > found);
    let first = names.iter().find(is_cut).map_or("", |name| name.as_str());
    let message = format!(
        "truncated: expected {expected} bytes, found {found}; tensor {first} is the first that is \
         cut"
    );
    Err(Error::format(path, message))
}

fn hex(sum: u32) -> String {
    format!("{sum:08x}")
}
