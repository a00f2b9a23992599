//! What is found of updates, as the log and TensorBoard have it: tensor by tensor, and by groups.

use std::collections::BTreeMap;

use mxfp4train::UpdateMetrics;
use serde::Serialize;

/// [`UpdateMetrics`] as it is written.
#[derive(Serialize)]
pub(super) struct OfUpdates {
    update_rms_max: f32,
    update_rms_tensor: String,
    update_rms_ceiling: f32,
    /// Norms of gradients: of what has one name in all blocks, weights and biases together, and of
    /// each block.
    grad_norms: BTreeMap<String, f32>,
    grad_norms_of_blocks: Vec<f32>,
    tensors: BTreeMap<String, OfTensor>,
}

#[derive(Serialize)]
struct OfTensor {
    grad_norm: f32,
    /// Left out where there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    rms: Option<f32>,
}

impl From<&UpdateMetrics> for OfUpdates {
    fn from(found: &UpdateMetrics) -> Self {
        let (tensor, rms) = found.largest().unwrap_or(("", f32::NAN));
        let tensors = found.tensors.iter().map(|(name, of)| {
            let rms = (!of.rms.is_nan()).then_some(of.rms);
            (name.clone(), OfTensor { grad_norm: of.grad_norm, rms })
        });
        Self {
            update_rms_max: rms,
            update_rms_tensor: tensor.to_owned(),
            update_rms_ceiling: found.ceiling,
            grad_norms: by_group(found),
            grad_norms_of_blocks: by_block(found),
            tensors: tensors.collect(),
        }
    }
}

/// The norm of all gradients that have one name in all blocks, such as `attn.c_attn`, or outside of
/// them, such as `wte`.
pub(super) fn by_group(found: &UpdateMetrics) -> BTreeMap<String, f32> {
    let mut squares = BTreeMap::new();
    for (name, of) in &found.tensors {
        let group = match in_block(name) {
            Some((_, rest)) => rest,
            None => name.strip_prefix("transformer.").unwrap_or(name),
        };
        let group = group.rsplit_once('.').map_or(group, |(layer, _)| layer);
        *squares.entry(group.to_owned()).or_insert(0.0) += f64::from(of.grad_norm).powi(2);
    }
    squares.into_iter().map(|(group, sum): (_, f64)| (group, sum.sqrt() as f32)).collect()
}

/// The norm of all gradients of each block.
fn by_block(found: &UpdateMetrics) -> Vec<f32> {
    let mut squares = Vec::new();
    for (name, of) in &found.tensors {
        let Some((block, _)) = in_block(name) else { continue };
        squares.resize(squares.len().max(block + 1), 0.0);
        squares[block] += f64::from(of.grad_norm).powi(2);
    }
    squares.into_iter().map(|sum: f64| sum.sqrt() as f32).collect()
}

/// The number of a tensor's block, and its name there.
fn in_block(name: &str) -> Option<(usize, &str)> {
    let (block, rest) = name.strip_prefix("transformer.h.")?.split_once('.')?;
    Some((block.parse().ok()?, rest))
}

#[cfg(test)]
pub(super) mod tests {
    use mxfp4train::TensorUpdate;

    use super::*;

    /// Of a model of two blocks; matrices of the first have no second moment.
    pub(crate) fn found() -> UpdateMetrics {
        let of = |name: &str, grad_norm, rms| (name.to_owned(), TensorUpdate { grad_norm, rms });
        UpdateMetrics {
            step: 3,
            ceiling: 4.5,
            tensors: vec![
                of("transformer.wte.weight", 1.0, 1.5),
                of("transformer.h.0.attn.c_attn.weight", 3.0, f32::NAN),
                of("transformer.h.0.attn.c_attn.bias", 4.0, 2.5),
                of("transformer.h.1.attn.c_attn.weight", 12.0, 0.5),
                of("transformer.h.1.ln_2.bias", 2.0, 2.5),
                of("lm_head.weight", 7.0, 1.0),
            ],
        }
    }

    #[test]
    fn groups_are_norms_of_all_that_is_in_them() {
        let groups = by_group(&found());
        let expected = [("attn.c_attn", 13.0), ("ln_2", 2.0), ("lm_head", 7.0), ("wte", 1.0)];
        assert_eq!(groups, expected.map(|(name, norm)| (name.to_owned(), norm)).into());
        assert_eq!(by_block(&found()), [5.0, 148f32.sqrt()]);
    }

    #[test]
    fn the_first_of_the_largest_is_named() {
        let text = serde_json::to_string(&OfUpdates::from(&found())).unwrap();
        let begins = "{\"update_rms_max\":2.5,\
                      \"update_rms_tensor\":\"transformer.h.0.attn.c_attn.bias\",\
                      \"update_rms_ceiling\":4.5,\"grad_norms\":{\"attn.c_attn\":13.0,";
        assert!(text.starts_with(begins), "{text}");
        assert!(
            text.contains("\"transformer.h.0.attn.c_attn.weight\":{\"grad_norm\":3.0}"),
            "{text}"
        );
    }
}
