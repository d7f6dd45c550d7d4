//! The adapter between the tree and the kernel.
//!
//! [`adapter`] translates requests, one short function each; [`invalidate`] tells the kernel what it has to forget.

pub mod adapter;
pub mod invalidate;
