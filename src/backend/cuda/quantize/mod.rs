//! What an operand of an MXFP4 product becomes.

pub(super) mod carrier;
