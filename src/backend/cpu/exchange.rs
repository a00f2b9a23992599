//! Ranks on processors exchange through the host alone.

use std::convert::Infallible;

use super::{Buffer, Cpu};
use crate::Result;
use crate::backend::{Exchange, FlatGradients, Reached};
use crate::comm::wire::Drawn;

impl Exchange for Cpu {
    type Buckets = Infallible;

    fn export(&self, buckets: &Infallible, _: &Reached<'_, Self>) -> Result<Vec<u8>> {
        match *buckets {}
    }

    fn map(&self, buckets: &mut Infallible, _: &Reached<'_, Self>, _: &[u8]) -> Result<()> {
        match *buckets {}
    }

    fn begin_exchange(
        &self,
        buckets: &mut Infallible,
        _: &mut FlatGradients<Self>,
        _: &[Buffer<u8>],
        _: Drawn,
    ) -> Result<()> {
        match *buckets {}
    }

    fn give_squares(&self, buckets: &mut Infallible) -> Result<()> {
        match *buckets {}
    }

    fn begin_gather(&self, buckets: &mut Infallible) {
        match *buckets {}
    }

    fn give(&self, buckets: &Infallible, _: usize) -> Result<f64> {
        match *buckets {}
    }

    fn end_exchange(&self, buckets: &mut Infallible) -> Result<()> {
        match *buckets {}
    }

    fn abort_exchange(&self, buckets: &mut Infallible) {
        match *buckets {}
    }
}
