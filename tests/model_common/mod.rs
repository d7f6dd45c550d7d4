//! A model of what a mount is: the simplest file system that keeps the contract (docs/tree.md, "Writing"), random sequences of system calls, and
//! the run of both beside each other.
//!
//! The model is a local file system in memory whose files are attributes or scratch. Where the contract says nothing, it does what a
//! local file system does, and so it predicts each errno.
#![allow(dead_code)]

pub mod fixture;
pub mod model;
pub mod ops;
pub mod run;
pub mod state;
pub mod tree;

/// An errno, or what was asked for.
pub type Answer<T = ()> = Result<T, i32>;
