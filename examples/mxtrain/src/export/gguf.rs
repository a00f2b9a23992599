//! GGUF files: the container that llama.cpp reads.
//!
//! By the specification of GGUF, version 3 (ggml's docs/gguf.md): magic number, version, counts; keys
//! with values; names, dimensions, types and places of tensors; then their bytes, each tensor at a
//! multiple of 32. All numbers are little-endian. Dimensions go from the one whose elements are
//! neighbours to the outermost.

use half::{bf16, f16};
use mxfp4train::StoredWeights;
use mxfp4train::formats::{BLOCK, quantize_closest};

/// How a file begins.
pub(crate) const MAGIC: &[u8; 4] = b"GGUF";
const VERSION: u32 = 3;
/// Where tensors may begin, unless a key says otherwise.
const ALIGNMENT: usize = 32;

/// The value of a key.
pub(crate) enum Value {
    U32(u32),
    F32(f32),
    Bool(bool),
    Text(String),
    Texts(Vec<String>),
    Numbers(Vec<i32>),
    Floats(Vec<f32>),
}

/// A tensor, before its numbers come.
pub(crate) struct Tensor {
    pub(crate) name: String,
    /// (rows, columns), or a length alone.
    pub(crate) shape: Vec<usize>,
    pub(crate) stored: StoredWeights,
}

impl Tensor {
    fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Bytes of its numbers.
    pub(crate) fn bytes(&self) -> usize {
        match self.stored {
            StoredWeights::F32 => 4 * self.len(),
            StoredWeights::F16 | StoredWeights::Bf16 => 2 * self.len(),
            StoredWeights::Mxfp4 => self.len() / BLOCK * (1 + BLOCK / 2),
        }
    }

    /// The number of its type in ggml.
    fn kind(&self) -> u32 {
        match self.stored {
            StoredWeights::F32 => 0,
            StoredWeights::F16 => 1,
            StoredWeights::Bf16 => 30,
            StoredWeights::Mxfp4 => 39,
        }
    }
}

/// Bytes of 0 between what has `bytes` bytes and the next tensor.
pub(crate) fn padding(bytes: usize) -> usize {
    bytes.next_multiple_of(ALIGNMENT) - bytes
}

/// All that stands before the first tensor.
pub(crate) fn header(metadata: &[(String, Value)], tensors: &[Tensor]) -> Vec<u8> {
    let mut to = MAGIC.to_vec();
    to.extend(VERSION.to_le_bytes());
    put_count(&mut to, tensors.len());
    put_count(&mut to, metadata.len());
    for (key, value) in metadata {
        put_text(&mut to, key);
        put_value(&mut to, value);
    }
    let mut place = 0;
    for tensor in tensors {
        put_text(&mut to, &tensor.name);
        to.extend((tensor.shape.len() as u32).to_le_bytes());
        tensor.shape.iter().rev().for_each(|size| put_count(&mut to, *size));
        to.extend(tensor.kind().to_le_bytes());
        put_count(&mut to, place);
        place += tensor.bytes() + padding(tensor.bytes());
    }
    to.resize(to.len() + padding(to.len()), 0);
    to
}

fn put_count(to: &mut Vec<u8>, count: usize) {
    to.extend((count as u64).to_le_bytes());
}

fn put_text(to: &mut Vec<u8>, text: &str) {
    put_count(to, text.len());
    to.extend(text.as_bytes());
}

fn put_value(to: &mut Vec<u8>, value: &Value) {
    const I32: u32 = 5;
    const F32: u32 = 6;
    const TEXT: u32 = 8;
    const ARRAY: u32 = 9;
    let mut kind = |kind: u32| to.extend(kind.to_le_bytes());
    match value {
        Value::U32(value) => {
            kind(4);
            to.extend(value.to_le_bytes());
        }
        Value::F32(value) => {
            kind(F32);
            to.extend(value.to_le_bytes());
        }
        Value::Bool(value) => {
            kind(7);
            to.push((*value).into());
        }
        Value::Text(text) => {
            kind(TEXT);
            put_text(to, text);
        }
        Value::Texts(texts) => {
            [ARRAY, TEXT].into_iter().for_each(kind);
            put_count(to, texts.len());
            texts.iter().for_each(|text| put_text(to, text));
        }
        Value::Numbers(numbers) => {
            [ARRAY, I32].into_iter().for_each(kind);
            put_count(to, numbers.len());
            to.extend(numbers.iter().flat_map(|number| number.to_le_bytes()));
        }
        Value::Floats(numbers) => {
            [ARRAY, F32].into_iter().for_each(kind);
            put_count(to, numbers.len());
            to.extend(numbers.iter().flat_map(|number| number.to_le_bytes()));
        }
    }
}

/// Appends numbers as a file has them; of MXFP4 whole blocks. Gives back the first number that
/// `stored` does not have.
pub(crate) fn encode(stored: StoredWeights, values: &[f32], to: &mut Vec<u8>) -> Result<(), f32> {
    /// By the next scale, codes stand for numbers that f32 does not have.
    const LARGEST: u8 = 252;
    fn check(v: f32, fits: bool) -> Result<(), f32> {
        if fits { Ok(()) } else { Err(v) }
    }
    match stored {
        StoredWeights::F32 => to.extend(values.iter().flat_map(|v| v.to_le_bytes())),
        StoredWeights::F16 => {
            for v in values {
                let half = f16::from_f32(*v);
                check(*v, half.is_finite())?;
                to.extend(half.to_le_bytes());
            }
        }
        StoredWeights::Bf16 => {
            for v in values {
                let half = bf16::from_f32(*v);
                check(*v, half.is_finite())?;
                to.extend(half.to_le_bytes());
            }
        }
        StoredWeights::Mxfp4 => {
            for block in values.as_chunks::<BLOCK>().0 {
                let (scale, codes) = quantize_closest(block);
                let largest = block.iter().copied().max_by(|a, b| a.abs().total_cmp(&b.abs()));
                check(largest.unwrap_or(0.0), scale <= LARGEST)?;
                to.push(scale);
                // The first half of the elements is in the low halves of the bytes.
                let (low, high) = codes.split_at(BLOCK / 2);
                to.extend(low.iter().zip(high).map(|(low, high)| low | high << 4));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// By hand, from the specification.
    #[test]
    fn a_small_file_is_these_bytes() {
        let metadata = [
            ("a".to_owned(), Value::U32(7)),
            ("bc".to_owned(), Value::Texts(vec!["x".into(), "yz".into()])),
            ("d".to_owned(), Value::Numbers(vec![-1])),
            ("e".to_owned(), Value::Bool(true)),
            ("f".to_owned(), Value::F32(1.5)),
            ("g".to_owned(), Value::Text(String::new())),
            ("h".to_owned(), Value::Floats(vec![-2.5])),
        ];
        let tensor = |name: &str, shape: &[usize], stored| Tensor {
            name: name.into(),
            shape: shape.to_vec(),
            stored,
        };
        let tensors = [
            tensor("v", &[3], StoredWeights::F32),
            tensor("w", &[2, 32], StoredWeights::Mxfp4),
            tensor("x", &[5, 3], StoredWeights::F16),
        ];
        let u32s = |n: u32| n.to_le_bytes().to_vec();
        let u64s = |n: u64| n.to_le_bytes().to_vec();
        let text = |text: &str| [u64s(text.len() as u64), text.as_bytes().to_vec()].concat();
        let mut expected = [
            [b"GGUF".to_vec(), u32s(3), u64s(3), u64s(7)].concat(),
            [text("a"), u32s(4), u32s(7)].concat(),
            [text("bc"), u32s(9), u32s(8), u64s(2), text("x"), text("yz")].concat(),
            [text("d"), u32s(9), u32s(5), u64s(1), u32s(u32::MAX)].concat(),
            [text("e"), u32s(7), vec![1]].concat(),
            [text("f"), u32s(6), 1.5f32.to_le_bytes().to_vec()].concat(),
            [text("g"), u32s(8), text("")].concat(),
            [text("h"), u32s(9), u32s(6), u64s(1), (-2.5f32).to_le_bytes().to_vec()].concat(),
            [text("v"), u32s(1), u64s(3), u32s(0), u64s(0)].concat(),
            // 12 bytes before it, and 34 of its own.
            [text("w"), u32s(2), u64s(32), u64s(2), u32s(39), u64s(32)].concat(),
            [text("x"), u32s(2), u64s(3), u64s(5), u32s(1), u64s(96)].concat(),
        ]
        .concat();
        expected.resize(expected.len().next_multiple_of(32), 0);
        assert_eq!(header(&metadata, &tensors), expected);
        assert_eq!(tensors.each_ref().map(Tensor::bytes), [12, 34, 30]);
    }

    #[test]
    fn numbers_are_encoded_as_ggml_has_them() {
        let encoded = |stored, values: &[f32]| {
            let mut bytes = Vec::new();
            encode(stored, values, &mut bytes).map(|()| bytes)
        };
        assert_eq!(encoded(StoredWeights::F32, &[1.0]).unwrap(), [0, 0, 0x80, 0x3f]);
        assert_eq!(encoded(StoredWeights::F16, &[1.0, -2.0]).unwrap(), [0, 0x3c, 0, 0xc0]);
        assert_eq!(encoded(StoredWeights::Bf16, &[1.0, -2.0]).unwrap(), [0x80, 0x3f, 0, 0xc0]);
        // The largest is 6, so the scale is 1: elements are their own values, -0.3 becomes -0.5.
        let mut block = [0.0; 32];
        (block[0], block[1], block[15]) = (6.0, -0.3, 1.5);
        (block[16], block[17], block[31]) = (-4.0, 0.5, 3.0);
        let mut expected = [0; 17];
        expected[0] = 127;
        (expected[1], expected[2], expected[16]) = (7 | 14 << 4, 9 | 1 << 4, 3 | 5 << 4);
        assert_eq!(encoded(StoredWeights::Mxfp4, &block).unwrap(), expected);
        block[3] = f32::MAX;
        assert_eq!(encoded(StoredWeights::Mxfp4, &block), Err(f32::MAX));
        assert_eq!(encoded(StoredWeights::F16, &[1.0, -1e5]), Err(-1e5));
        assert_eq!(encoded(StoredWeights::Bf16, &[f32::MAX]), Err(f32::MAX));
    }
}
