//! What the kernels of the end of a step are told: where parameters lie, and the factors of a step.

use bytemuck::{Pod, Zeroable};

use super::quantize::random::Draw;
use crate::formats::{self, Purpose};
use crate::optim::moments::is_stochastic;
use crate::optim::{Optimizer, OptimizerStep, adamw};

/// Elements of a piece of work, as in the kernels.
pub(super) const PIECE: usize = 4096;
/// Of a block.
pub(super) const THREADS: usize = 256;

/// Where a parameter and what belongs to it lies: `Entry` of the kernels.
#[derive(Clone, Copy, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Entry {
    pub(super) param: u64,
    pub(super) low: u64,
    pub(super) copy: u64,
    pub(super) m: u64,
    pub(super) v: u64,
    pub(super) m_scales: u64,
    pub(super) v_scales: u64,
    pub(super) gradient: u64,
    pub(super) len: u64,
    pub(super) first_piece: u64,
    pub(super) decays: u16,
    pub(super) narrow: u16,
    pub(super) element: [u16; 2],
    pub(super) amax: u64,
    pub(super) interval: u64,
    pub(super) count: u64,
    pub(super) sum: u64,
}

/// `Step` of the kernels.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct Step {
    lr: f32,
    beta1: f32,
    beta2: f32,
    epsilon: f32,
    weight_decay: f32,
    size: f32,
    root: f32,
    clip: f32,
    loss_scale: f32,
    largest_gradient: f32,
}

impl Step {
    pub(super) fn new(step: &OptimizerStep) -> Self {
        let OptimizerStep { optimizer, lr, loss_scale, largest_gradient, .. } = *step;
        let Optimizer { beta1, beta2, epsilon, weight_decay, clip, .. } = optimizer;
        let (size, root) = (adamw::size(step, lr), adamw::root(step));
        Self {
            lr,
            beta1,
            beta2,
            epsilon,
            weight_decay,
            size,
            root,
            clip,
            loss_scale,
            largest_gradient,
        }
    }
}

/// `Moments` of the kernels.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct OfMoments {
    kept: [f32; 2],
    drawn: [u32; 2],
    draw: Draw,
}

impl OfMoments {
    pub(super) fn new(step: &OptimizerStep) -> Self {
        Self::with_betas(step, [step.optimizer.beta1, step.optimizer.beta2])
    }

    /// Of the momentum that Muon has of a matrix in place of a first moment.
    pub(super) fn of_momentum(step: &OptimizerStep) -> Self {
        Self::with_betas(step, [step.optimizer.muon.momentum, step.optimizer.beta2])
    }

    fn with_betas(step: &OptimizerStep, betas: [f32; 2]) -> Self {
        Self {
            kept: if step.starts_again() { [0.0; 2] } else { betas },
            drawn: betas.map(|beta| u32::from(is_stochastic(beta))),
            draw: formats::Draw::of(step.seed, Purpose::Moments, step.t as u32, 0).into(),
        }
    }
}
