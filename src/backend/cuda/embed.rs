//! Token and position embeddings, and tokens on the device.
//!
//! The gradient of wte adds the rows of all places where a token stands. Atomic additions would
//! make the sum depend on the order in which blocks run, so the host sorts the places by token, and
//! each run of equal tokens is summed in order. The sort happens while the GPU still works on the
//! backward pass before it.

use std::sync::{Mutex, PoisonError};

use super::device::launch;
use super::device::memory::{Arena, Param, Piece, Tensor, Upload};
use super::{Cuda, kernel};
use crate::Result;
use crate::backend::{Documents, Embed, EmbeddingGradients, EmbeddingShape};

/// Token numbers on the device.
pub(crate) struct Tokens {
    ids: Piece,
    /// What was written last, which the runs are sorted from.
    upload: Mutex<Upload>,
    /// Of tokens whose embeddings get gradients.
    runs: Option<Mutex<TokenRuns>>,
}

/// Where equal tokens stand, for the gradient.
struct TokenRuns {
    /// Row numbers sorted by token, then where the run of each distinct token starts in them, then
    /// the number of runs: (rows + rows + 1).
    words: Piece,
    upload: Upload,
    /// Token in the upper half, row in the lower.
    keys: Vec<u64>,
}

impl Tokens {
    pub(super) fn new(arena: &mut Arena, len: usize, have_gradients: bool) -> Result<Self> {
        let (ids, upload) = (arena.bytes(len * 4), arena.upload(len));
        let runs = have_gradients.then(|| TokenRuns::new(arena, len)).transpose()?;
        Ok(Self { ids, upload: Mutex::new(upload), runs: runs.map(Mutex::new) })
    }

    /// The address of the token numbers.
    pub(super) fn ids(&self) -> u64 {
        self.ids.address
    }

    pub(super) fn write(&mut self, len: usize, fill: impl FnOnce(&mut [u32])) {
        let upload = self.upload.get_mut().unwrap_or_else(PoisonError::into_inner);
        upload.send(self.ids.address, len, fill);
    }

    /// Sorts the first `rows` tokens and uploads their runs; addresses of order, starts and count.
    fn upload_runs(&self, rows: usize) -> [u64; 3] {
        let runs = self.runs.as_ref().expect("made for tokens with gradients");
        let mut runs = runs.lock().unwrap_or_else(PoisonError::into_inner);
        // Where pinned memory was refused, which is noted, nothing was sent.
        let upload = self.upload.lock().unwrap_or_else(PoisonError::into_inner);
        let tokens = upload.sent();
        runs.upload(&tokens[..rows.min(tokens.len())])
    }
}

impl TokenRuns {
    fn new(arena: &mut Arena, len: usize) -> Result<Self> {
        let words = 2 * len + 1;
        Ok(Self {
            words: arena.bytes(words * 4),
            upload: arena.upload(words),
            keys: arena.on_host("the sorted tokens of a batch", len)?,
        })
    }

    fn upload(&mut self, tokens: &[u32]) -> [u64; 3] {
        let Self { words, upload, keys } = self;
        let rows = tokens.len();
        keys.clear();
        keys.extend((0u64..).zip(tokens).map(|(row, token)| u64::from(*token) << 32 | row));
        keys.sort_unstable();
        upload.send(words.address, 2 * rows + 1, |words| {
            let (order, rest) = words.split_at_mut(rows);
            let (starts, count) = rest.split_at_mut(rows);
            let mut runs = 0;
            let mut last = None;
            for (i, key) in keys.iter().enumerate() {
                order[i] = *key as u32;
                if last != Some(key >> 32) {
                    last = Some(key >> 32);
                    starts[runs] = i as u32;
                    runs += 1;
                }
            }
            starts[runs..].fill(0);
            count[0] = runs as u32;
        });
        [0, 4, 8].map(|of_rows| words.address + of_rows * rows as u64)
    }
}

impl Embed for Cuda {
    fn embedding_forward(
        &self,
        out: &mut Tensor,
        tokens: &Tokens,
        documents: Option<Documents<'_, Self>>,
        wte: Param<'_>,
        wpe: Option<Param<'_>>,
        EmbeddingShape { sequences, channels }: EmbeddingShape,
    ) {
        // Every pass begins here.
        out.begin_pass(&self.gpu);
        let rows = sequences.rows();
        let wte = wte.as_read_in(out.precision);
        let wpe = wpe.map_or(0, |wpe| wpe.as_read_in(out.precision));
        launch!(self.gpu, kernel!(out, "embedding_forward"), [rows, 1, 1], 128, 0;
            out.write().address, tokens.ids(), wte, wpe, documents.map_or(0, Tokens::ids),
            sequences.length as u32, channels as u32);
    }

    fn embedding_backward(
        &self,
        gradients: EmbeddingGradients<'_, Self>,
        dout: &Tensor,
        tokens: &Tokens,
        documents: Option<Documents<'_, Self>>,
        EmbeddingShape { sequences, channels }: EmbeddingShape,
    ) {
        let EmbeddingGradients { dwte, dwpe, accumulate } = gradients;
        let rows = sequences.rows();
        if let Some(dwte) = dwte {
            let [order, starts, count] = tokens.upload_runs(rows);
            let most = rows.min(dwte.place.len / channels);
            launch!(self.gpu, kernel!(dout, "embedding_backward_tokens"), [most, 1, 1], 256, 8192;
                dwte.in_f32(), dout.address(), tokens.ids(), order, starts, count,
                rows as u32, channels as u32);
        }
        let Some(dwpe) = dwpe else { return };
        if !accumulate {
            self.clear(dwpe.address(), dwpe.place.bytes());
        }
        let grid = [(sequences.length * channels).div_ceil(256), 1, 1];
        if let Some(documents) = documents {
            let ends = documents.ids() + (rows * size_of::<u32>()) as u64;
            launch!(self.gpu, kernel!(dout, "embedding_backward_documents"), grid, 256, 0;
                dwpe.in_f32(), dout.address(), ends,
                sequences.batch as u32, sequences.length as u32, channels as u32);
            return;
        }
        launch!(self.gpu, kernel!(dout, "embedding_backward_positions"), grid, 256, 0;
            dwpe.in_f32(), dout.address(),
            sequences.batch as u32, sequences.length as u32, channels as u32);
    }
}
