//! The parameters of a GPT: one table that weights, gradients, optimizer states and checkpoints are
//! laid out by.
//!
//! What belongs to each parameter (weights, gradients, an optimizer's states) is one flat buffer
//! with the table's ranges, so that pieces of a norm, buckets of an exchange and entries of a
//! checkpoint are ranges of the same numbers.

use super::{Architecture, Lora, ModelConfig};
use crate::Result;
use crate::backend::Slot;
use crate::optim::ParamKind;
use crate::reserve::{collect, reserve, reuse, text};

/// Name and shape of a parameter, as Hugging Face's `gpt2` or `llama` has them. A head of its own is
/// the tensor `lm_head.weight`; a head that is the token embedding is not listed twice. What LoRA adds
/// to a layer follows its bias: `lora_A.weight` (rank, inputs), `lora_B.weight` (outputs, rank).
///
/// In Llama's blocks one layer makes q, k and v, and one gate and up: their weights are a tensor
/// `self_attn.qkv_proj.weight` and one `mlp.gate_up_proj.weight`, of which `self_attn.q_proj.weight`
/// and the others that files have are rows. Where one tensor is named, these names are taken as well.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Hugging Face's name, such as `transformer.h.0.attn.c_attn.weight`.
    pub name: String,
    /// Its shape; GPT-2's linear weights are (inputs, outputs), Llama's (outputs, inputs).
    pub shape: Vec<usize>,
}

impl TensorInfo {
    /// Scalars in the tensor.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether it has no element (no parameter has none).
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// What a tensor's name has behind the block's, and the parts of that tensor that files have apart.
const MERGED: [(&str, &[&str]); 2] = [
    ("self_attn.qkv_proj", &["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
    ("mlp.gate_up_proj", &["mlp.gate_proj", "mlp.up_proj"]),
];

/// Some rows of a tensor, under the name that files have for them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TensorPart {
    pub(crate) name: String,
    pub(crate) rows: std::ops::Range<usize>,
}

impl ModelConfig {
    /// The name of the token embedding, which is the head as well unless there is a [`HEAD`].
    pub(crate) fn embedding_name(&self) -> &'static str {
        Names::of(self.architecture).wte
    }

    /// What files have in place of a tensor of this name; None where they have the tensor.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    pub(crate) fn parts_of(&self, name: &str) -> Result<Option<Vec<TensorPart>>> {
        const WHAT: &str = "the names of the tensors";
        if !self.is_llama() {
            return Ok(None);
        }
        let of = MERGED.iter().find_map(|(merged, parts)| {
            let (before, behind) = name.split_once(merged)?;
            Some((*parts, before, behind))
        });
        // What LoRA adds is one tensor in our files, too.
        let is_in_parts = |behind: &str| matches!(behind, ".weight" | ".bias");
        let Some((parts, before, behind)) = of.filter(|(.., behind)| is_in_parts(behind)) else {
            return Ok(None);
        };
        let d = self.head_width();
        let (q, kv, m) = (self.heads * d, self.kv_head_count() * d, self.mlp_width());
        let rows = if parts.len() == 3 { &[q, kv, kv][..] } else { &[m, m] };
        let mut first = 0;
        let parts = parts.iter().zip(rows).map(|(part, rows)| {
            let name = text(WHAT, format_args!("{before}{part}{behind}"))?;
            first += rows;
            Ok(TensorPart { name, rows: first - rows..first })
        });
        Ok(Some(collect(WHAT, parts)?))
    }
}

/// Name of a head of its own.
pub(crate) const HEAD: &str = "lm_head.weight";

/// Every parameter of a model: what is known of it, and its place in flat buffers, in the order of
/// Hugging Face's.
pub(crate) struct ParamTable {
    specs: Vec<ParamSpec>,
    slots: Vec<Slot>,
    /// Elements of a flat buffer.
    len: usize,
    /// Token embedding and, where `head` is None, language-model head, (V, C).
    pub(super) wte: Slot,
    /// Position embedding, (context, C), where positions are learned.
    pub(super) wpe: Option<Slot>,
    pub(super) blocks: Vec<Block>,
    /// The norm before the head.
    pub(super) ln_f: Norm,
    /// A head that is not the token embedding, (V, C). Last, so that all else has one order.
    head: Option<Slot>,
}

/// The parameters of a transformer block.
#[derive(Clone, Copy)]
pub(super) struct Block {
    /// Before attention.
    pub(super) ln_1: Norm,
    /// C -> all heads of q, k and v.
    pub(super) qkv: Linear,
    /// RMSNorm (D) of every head of q, and of k, where there are such.
    pub(super) of_heads: Option<[Slot; 2]>,
    /// All heads -> C.
    pub(super) projection: Linear,
    /// Before the MLP.
    pub(super) ln_2: Norm,
    /// C -> M, or gate and up, 2 M.
    pub(super) fc1: Linear,
    /// M -> C.
    pub(super) fc2: Linear,
}

/// LayerNorm: (C) each; RMSNorm has no b.
#[derive(Clone, Copy)]
pub(super) struct Norm {
    pub(super) w: Slot,
    pub(super) b: Option<Slot>,
}

/// A linear layer: w (outputs, inputs), b (outputs), where it has one.
#[derive(Clone, Copy)]
pub(super) struct Linear {
    pub(super) w: Slot,
    pub(super) b: Option<Slot>,
    /// Which one of its block, in [`ModelConfig::linears`] and in the counter of random bits.
    pub(super) number: u32,
    /// What is trained beside it, where it is adapted.
    pub(super) adapter: Option<Adapter>,
}

/// What LoRA adds to a linear layer, a (rank, inputs) and b (outputs, rank).
#[derive(Clone, Copy)]
pub(super) struct Adapter {
    pub(super) a: Slot,
    pub(super) b: Slot,
}

/// The weight of a block's linear layer: where it lies among all parameters, and where in buffers
/// that have nothing else.
#[derive(Clone, Copy)]
pub(crate) struct Matrix {
    pub(crate) param: Slot,
    pub(crate) own: Slot,
    /// Outputs and inputs.
    pub(crate) shape: [usize; 2],
}

impl ParamTable {
    /// All parameters, with GPT-2's initialization, in which the layers that add to the residual
    /// stream start smaller by the root of their number (Radford et al. 2019). Slots start at
    /// multiples of `align`.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    pub(crate) fn new(config: &ModelConfig, align: usize) -> Result<Self> {
        const WHAT: &str = "a table of the parameters";
        let (c, linears) = (config.channels, config.linears());
        let std = 0.02;
        let residual_std = std / (2.0 * config.layers as f32).sqrt();
        let (mut specs, mut slots, mut blocks) = (Vec::new(), Vec::new(), Vec::new());
        let lora = config.lora.as_ref();
        let adapted = lora.map_or(0, |lora| lora.layers.into_iter().filter(|is| *is).count());
        let names = Names::of(config.architecture);
        let count = 4 + (12 + 2 * adapted) * config.layers + usize::from(!config.tied_head);
        reserve(&mut specs, WHAT, count)?;
        reserve(&mut slots, WHAT, count)?;
        reserve(&mut blocks, WHAT, config.layers)?;
        // What models without adapters have is drawn as in these.
        let (mut next, mut drawn) = (0, [0, 1 << 20]);
        let mut add = |layer, name: &'static str, shape, transposed, init| {
            let is_adapter = names.lora.iter().flatten().any(|of_adapter| *of_adapter == name);
            let counter = &mut drawn[usize::from(is_adapter)];
            let draw = *counter;
            *counter += 1;
            let blocks = names.blocks;
            let spec = ParamSpec { layer, blocks, name, shape, transposed, init, is_adapter, draw };
            let (len, rows, kind) = (spec.len(), spec.rows(), spec.kind());
            let slot = Slot { index: specs.len(), start: next, len, rows, kind };
            next = (next + len).next_multiple_of(align);
            specs.push(spec);
            slots.push(slot);
            slot
        };
        let table =
            |add: &mut Add<'_>, name, rows| add(None, name, [rows, c], false, Init::Normal { std });
        let norm = |add: &mut Add<'_>, layer, [w, b]: [&'static str; 2]| Norm {
            w: add(layer, w, [c, 0], false, Init::Ones),
            b: (!b.is_empty()).then(|| add(layer, b, [c, 0], false, Init::Zeros)),
        };
        let linear = |add: &mut Add<'_>, layer, number: u32, std| {
            let [inputs, outputs] = linears[number as usize];
            let ([w, b], is_turned) = (names.linears[number as usize], names.are_turned);
            let shape = if is_turned { [inputs, outputs] } else { [outputs, inputs] };
            let w = add(Some(layer), w, shape, is_turned, Init::Normal { std });
            let has_bias = !b.is_empty() && (!config.is_llama() || config.qkv_bias);
            let b = has_bias.then(|| add(Some(layer), b, [outputs, 0], false, Init::Zeros));
            let of_layer = lora.filter(|lora| lora.layers[number as usize]);
            let adapter = of_layer.map(|Lora { rank, .. }| {
                let [a, b] = names.lora[number as usize];
                // What PEFT draws from has this deviation: even between +-1 / sqrt(inputs).
                let std = (1.0 / (3.0 * inputs as f64).sqrt()) as f32;
                Adapter {
                    a: add(Some(layer), a, [*rank, inputs], false, Init::Normal { std }),
                    b: add(Some(layer), b, [outputs, *rank], false, Init::Zeros),
                }
            });
            Linear { w, b, number, adapter }
        };
        let add = &mut add;
        let wte = table(add, names.wte, config.vocab_size);
        let wpe = names.wpe.map(|name| table(add, name, config.context_length));
        for l in 0..config.layers {
            let ln_1 = norm(add, Some(l), names.ln_1);
            let qkv = linear(add, l, 0, std);
            let of_heads = config.qk_norm.then(|| {
                let d = config.head_width();
                names.of_heads.map(|name| add(Some(l), name, [d, 0], false, Init::Ones))
            });
            let projection = linear(add, l, 1, residual_std);
            let ln_2 = norm(add, Some(l), names.ln_2);
            let (fc1, fc2) = (linear(add, l, 2, std), linear(add, l, 3, residual_std));
            blocks.push(Block { ln_1, qkv, of_heads, projection, ln_2, fc1, fc2 });
        }
        let ln_f = norm(add, None, names.ln_f);
        let head = (!config.tied_head).then(|| table(add, HEAD, config.vocab_size));
        Ok(Self { specs, slots, len: next, wte, wpe, blocks, ln_f, head })
    }

    /// What is known of each.
    pub(crate) fn specs(&self) -> &[ParamSpec] {
        &self.specs
    }

    /// Where each lies.
    pub(crate) fn slots(&self) -> &[Slot] {
        &self.slots
    }

    /// The first parameter of each block, behind which all of the block's lie.
    pub(crate) fn first_of_blocks(
        &self,
    ) -> impl DoubleEndedIterator<Item = Slot> + ExactSizeIterator {
        self.blocks.iter().map(|block| block.ln_1.w)
    }

    /// The weights of all linear layers in order, each with those of its adapter, A and B, where it
    /// has one.
    pub(crate) fn linears(&self) -> impl Iterator<Item = (Slot, Option<[Slot; 2]>)> {
        let linears = |block: &Block| [block.qkv, block.projection, block.fc1, block.fc2];
        let of_linear = |linear: Linear| (linear.w, linear.adapter.map(|Adapter { a, b }| [a, b]));
        self.blocks.iter().flat_map(linears).map(of_linear)
    }

    /// All adapters, in order.
    pub(crate) fn adapters(&self) -> impl Iterator<Item = [Slot; 2]> {
        self.linears().filter_map(|(_, adapter)| adapter)
    }

    /// All parameters but adapters, in order.
    pub(crate) fn without_adapters(&self) -> impl Iterator<Item = Slot> {
        let slots = self.slots.iter().zip(&self.specs);
        slots.filter(|(_, spec)| !spec.is_adapter).map(|(slot, _)| *slot)
    }

    /// Elements of a flat buffer that holds one for each parameter's.
    #[allow(clippy::len_without_is_empty, reason = "no model is without parameters")]
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// The weights of all linear layers in order, and the elements of a flat buffer of them alone,
    /// in which slots start at multiples of `align`.
    pub(crate) fn matrices(&self, align: usize) -> Result<(Vec<Matrix>, usize)> {
        let mut end = 0;
        let linears = |block: &Block| [block.qkv, block.projection, block.fc1, block.fc2];
        let matrices = self.blocks.iter().flat_map(linears).enumerate().map(|(index, linear)| {
            let param = linear.w;
            let own = Slot { index, start: end, ..param };
            end = own.range().end.next_multiple_of(align);
            Ok(Matrix { param, own, shape: param.shape() })
        });
        let matrices = collect("a table of the weights of blocks", matrices)?;
        Ok((matrices, end))
    }

    /// An empty vector with room for the values of any one tensor.
    pub(crate) fn room_for_a_tensor(&self) -> Result<Vec<f32>> {
        let mut room = Vec::new();
        let longest = self.slots.iter().map(|slot| slot.len).max().unwrap_or(0);
        reserve(&mut room, "a tensor", longest)?;
        Ok(room)
    }

    /// The head's weights.
    pub(super) fn head(&self) -> Slot {
        self.head.unwrap_or(self.wte)
    }

    /// Whether linear layers have adapters.
    pub(super) fn is_adapted(&self) -> bool {
        self.specs.iter().any(|spec| spec.is_adapter)
    }

    /// Whether the head is not the token embedding.
    pub(super) fn has_own_head(&self) -> bool {
        self.head.is_some()
    }
}

/// The names of an architecture's tensors, those of blocks without the block's; of pairs weight and
/// bias, which is empty where there is none.
struct Names {
    wte: &'static str,
    wpe: Option<&'static str>,
    /// Before the number of a block.
    blocks: &'static str,
    ln_1: [&'static str; 2],
    ln_2: [&'static str; 2],
    ln_f: [&'static str; 2],
    /// Norms of the heads of q and k.
    of_heads: [&'static str; 2],
    /// By number.
    linears: [[&'static str; 2]; 4],
    /// What LoRA adds to them.
    lora: [[&'static str; 2]; 4],
    /// Whether their weights are (inputs, outputs) in files.
    are_turned: bool,
}

impl Names {
    fn of(architecture: Architecture) -> &'static Self {
        match architecture {
            Architecture::Gpt2 => &Self {
                wte: "transformer.wte.weight",
                wpe: Some("transformer.wpe.weight"),
                blocks: "transformer.h",
                ln_1: ["ln_1.weight", "ln_1.bias"],
                ln_2: ["ln_2.weight", "ln_2.bias"],
                ln_f: ["transformer.ln_f.weight", "transformer.ln_f.bias"],
                of_heads: ["", ""],
                linears: [
                    ["attn.c_attn.weight", "attn.c_attn.bias"],
                    ["attn.c_proj.weight", "attn.c_proj.bias"],
                    ["mlp.c_fc.weight", "mlp.c_fc.bias"],
                    ["mlp.c_proj.weight", "mlp.c_proj.bias"],
                ],
                lora: [
                    ["attn.c_attn.lora_A.weight", "attn.c_attn.lora_B.weight"],
                    ["attn.c_proj.lora_A.weight", "attn.c_proj.lora_B.weight"],
                    ["mlp.c_fc.lora_A.weight", "mlp.c_fc.lora_B.weight"],
                    ["mlp.c_proj.lora_A.weight", "mlp.c_proj.lora_B.weight"],
                ],
                are_turned: true,
            },
            Architecture::Llama => &Self {
                wte: "model.embed_tokens.weight",
                wpe: None,
                blocks: "model.layers",
                ln_1: ["input_layernorm.weight", ""],
                ln_2: ["post_attention_layernorm.weight", ""],
                ln_f: ["model.norm.weight", ""],
                of_heads: ["self_attn.q_norm.weight", "self_attn.k_norm.weight"],
                linears: [
                    ["self_attn.qkv_proj.weight", "self_attn.qkv_proj.bias"],
                    ["self_attn.o_proj.weight", ""],
                    ["mlp.gate_up_proj.weight", ""],
                    ["mlp.down_proj.weight", ""],
                ],
                lora: [
                    ["self_attn.qkv_proj.lora_A.weight", "self_attn.qkv_proj.lora_B.weight"],
                    ["self_attn.o_proj.lora_A.weight", "self_attn.o_proj.lora_B.weight"],
                    ["mlp.gate_up_proj.lora_A.weight", "mlp.gate_up_proj.lora_B.weight"],
                    ["mlp.down_proj.lora_A.weight", "mlp.down_proj.lora_B.weight"],
                ],
                are_turned: false,
            },
        }
    }
}

/// Adds a parameter: block, name, shape, whether it is transposed, initial values.
type Add<'a> = dyn FnMut(Option<usize>, &'static str, [usize; 2], bool, Init) -> Slot + 'a;

/// What is known of a parameter before it exists.
///
/// NOTE: it owns no memory, so that a plan for thousands of blocks takes one vector.
#[derive(Clone, Debug)]
pub(crate) struct ParamSpec {
    /// The block that it is in.
    layer: Option<usize>,
    /// What stands before the block's number.
    blocks: &'static str,
    /// Hugging Face's name, or what is behind the block's.
    name: &'static str,
    /// Hugging Face's shape, with 0 behind a vector's length.
    shape: [usize; 2],
    /// A linear weight: Hugging Face has (inputs, outputs), we hold (outputs, inputs).
    pub(crate) transposed: bool,
    pub(crate) init: Init,
    /// What LoRA adds to a linear layer.
    pub(crate) is_adapter: bool,
    /// What its initial values are drawn as.
    pub(crate) draw: u32,
}

/// Initial values.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Init {
    Zeros,
    Ones,
    /// Normal with mean 0.
    Normal {
        std: f32,
    },
}

impl ParamSpec {
    /// Scalars in the parameter.
    pub(crate) fn len(&self) -> usize {
        self.shape().iter().product()
    }

    /// Hugging Face's shape.
    pub(crate) fn shape(&self) -> &[usize] {
        &self.shape[..if self.shape[1] == 0 { 1 } else { 2 }]
    }

    /// Hugging Face's name and shape.
    pub(crate) fn info(&self) -> Result<TensorInfo> {
        const WHAT: &str = "the names of the tensors";
        let name = match self.layer {
            Some(layer) => text(WHAT, format_args!("{}.{layer}.{}", self.blocks, self.name))?,
            None => text(WHAT, format_args!("{}", self.name))?,
        };
        let shape = collect(WHAT, self.shape().iter().map(|size| Ok(*size)))?;
        Ok(TensorInfo { name, shape })
    }

    /// Rows as we hold it; 1 of a vector.
    fn rows(&self) -> usize {
        match (self.shape(), self.transposed) {
            ([rows, _], false) | ([_, rows], true) => *rows,
            _ => 1,
        }
    }

    /// What it is to an optimizer.
    fn kind(&self) -> ParamKind {
        match (self.shape().len(), self.layer) {
            (..2, _) => ParamKind::Vector,
            (_, Some(_)) => ParamKind::Matrix,
            (_, None) => ParamKind::Table,
        }
    }

    /// Converts values between Hugging Face's order and ours.
    ///
    /// `rows` and `cols` are those of `from`.
    ///
    /// NOTE: by way of tiles, of which each line of the caches is read or written once and whole.
    /// Element by element, all elements of a column of 4096 shared a few lines: a run that saved 604
    /// million parameters twice took 161 s on two cores, and takes 95.
    pub(crate) fn transpose<T: Copy + Default>(from: &[T], to: &mut [T], rows: usize, cols: usize) {
        const TILE: usize = 16;
        let mut tile = [[T::default(); TILE]; TILE];
        for r in (0..rows).step_by(TILE) {
            for c in (0..cols).step_by(TILE) {
                let [tall, wide] = [rows - r, cols - c].map(|left| left.min(TILE));
                for (i, line) in tile[..tall].iter_mut().enumerate() {
                    line[..wide].copy_from_slice(&from[(r + i) * cols + c..][..wide]);
                }
                for j in 0..wide {
                    let line = &mut to[(c + j) * rows + r..][..tall];
                    line.iter_mut().zip(&tile).for_each(|(to, line)| *to = line[j]);
                }
            }
        }
    }

    /// Puts values that `read` gets in our order into Hugging Face's, by way of `scratch`.
    pub(crate) fn export<T: Copy + Default>(
        &self,
        out: &mut [T],
        scratch: &mut Vec<T>,
        read: impl FnOnce(&mut [T]) -> Result<()>,
    ) -> Result<()> {
        if !self.transposed {
            return read(out);
        }
        let ours = reuse(scratch, "a copy of a tensor", out.len())?;
        read(ours)?;
        Self::transpose(ours, out, self.shape[1], self.shape[0]);
        Ok(())
    }

    /// Values that are in Hugging Face's order in ours, in `scratch`.
    pub(crate) fn import<'s, T: Copy + Default>(
        &self,
        values: &[T],
        scratch: &'s mut Vec<T>,
    ) -> Result<&'s mut [T]> {
        let ours = reuse(scratch, "a copy of a tensor", values.len())?;
        match self.transposed {
            true => Self::transpose(values, ours, self.shape[0], self.shape[1]),
            false => ours.copy_from_slice(values),
        }
        Ok(ours)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> ModelConfig {
        ModelConfig {
            vocab_size: 7,
            context_length: 5,
            layers: 2,
            heads: 2,
            channels: 4,
            ..ModelConfig::default()
        }
    }

    fn unlike_gpt2() -> ModelConfig {
        ModelConfig { mlp_channels: 9, tied_head: false, ..config() }
    }

    fn table(config: &ModelConfig) -> ParamTable {
        ParamTable::new(config, 16).unwrap()
    }

    fn names(table: &ParamTable) -> Vec<String> {
        table.specs().iter().map(|spec| spec.info().unwrap().name).collect()
    }

    #[test]
    fn parameters_add_up_to_their_count_and_lie_apart() {
        for config in [config(), unlike_gpt2()] {
            let table = table(&config);
            let total: usize = table.specs().iter().map(ParamSpec::len).sum();
            assert_eq!(total as u64, config.parameter_count());
            let mut end = 0;
            for (index, (slot, spec)) in table.slots().iter().zip(table.specs()).enumerate() {
                assert_eq!((slot.index, slot.len), (index, spec.len()));
                assert!(slot.start >= end && slot.start < end + 16 && slot.start % 16 == 0);
                end = slot.range().end;
            }
            assert_eq!(table.len(), end.next_multiple_of(16));
        }
        assert_eq!(ModelConfig::default().parameter_count(), 124_439_808);
    }

    #[test]
    fn matrices_are_the_weights_of_linear_layers_side_by_side() {
        let table = table(&unlike_gpt2());
        let (matrices, len) = table.matrices(16).unwrap();
        let names = names(&table);
        let mut end = 0;
        for (i, Matrix { param, own, shape }) in matrices.iter().enumerate() {
            let name = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"][i % 4];
            assert_eq!(names[param.index], format!("transformer.h.{}.{name}.weight", i / 4));
            assert_eq!((own.index, own.len), (i, param.len));
            let expected = [[12, 4], [4, 4], [9, 4], [4, 9]][i % 4];
            assert_eq!(*shape, expected);
            assert_eq!([own.rows, own.len / own.rows], expected);
            assert!(own.start >= end && own.start < end + 16 && own.start % 16 == 0);
            end = own.range().end;
        }
        assert_eq!((matrices.len(), len), (8, end.next_multiple_of(16)));
    }

    #[test]
    fn a_head_of_its_own_comes_last_and_decays() {
        let [tied, untied] = [table(&config()), table(&unlike_gpt2())];
        let mut all = names(&tied);
        all.push(HEAD.into());
        assert_eq!(names(&untied), all);
        let head = untied.head();
        assert!(head.decays() && untied.specs()[head.index].shape() == [7, 4]);
        assert_eq!(tied.head(), tied.wte);
    }

    #[test]
    fn names_are_of_one_parameter_each() {
        let names = names(&table(&unlike_gpt2()));
        assert_eq!(names.len(), 2 + 2 * 12 + 2 + 1);
        let unique: std::collections::HashSet<_> = names.iter().collect();
        assert_eq!(unique.len(), names.len());
    }

    #[test]
    fn export_undoes_import() {
        let table = table(&config());
        for [rows, cols] in [[1, 1], [4, 12], [16, 33], [70, 17], [48, 32]] {
            let theirs: Vec<f32> = (0..rows * cols).map(|i| i as f32).collect();
            let mut ours = vec![-1.0; theirs.len()];
            ParamSpec::transpose(&theirs, &mut ours, rows, cols);
            for (i, v) in theirs.iter().enumerate() {
                assert_eq!(ours[i % cols * rows + i / cols], *v, "({rows}, {cols}): {i}");
            }
        }
        let spec = &table.specs()[table.blocks[0].qkv.w.index]; // (4, 12) there, (12, 4) here
        let theirs: Vec<f32> = (0..spec.len()).map(|i| i as f32).collect();
        // Longer than it has to be, as another tensor left it.
        let (mut scratch, mut again) = (vec![7.0; 60], vec![0.0; 48]);
        let ours = spec.import(&theirs, &mut scratch).unwrap().to_vec();
        assert_eq!((ours.len(), ours[4 + 2]), (48, theirs[2 * 12 + 1]));
        let read = |out: &mut [f32]| {
            out.copy_from_slice(&ours);
            Ok(())
        };
        spec.export(&mut again, &mut scratch, read).unwrap();
        assert_eq!(again, theirs);
    }
}
