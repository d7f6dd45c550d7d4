//! tokenfs mounts a [SoftHSM v2](https://www.softhsm.org/) token store as a tree of files: a token is a directory,
//! an object is a directory, an attribute is a file.
//!
//! The layers, each of which knows only those above it in this list:
//!
//! - [`error`], [`diagnostics`]: the one error type and its errno; the latest refusals and warnings.
//! - [`pkcs11`]: the names, kinds and symbols of PKCS #11, as tables.
//! - [`store`]: what is on disk. Formats, locks, both backends behind the trait [`store::Token`]. Knows nothing of
//!   the mounted tree.
//! - [`tree`]: what a user sees. Names, texts, inodes, modes, `.tokenfs`. Knows nothing of FUSE.
//! - [`fuse`]: the adapter between the tree and the kernel, and the invalidation of the kernel's caches.
//! - [`config`], [`cli`]: `softhsm2.conf` and the command line.
//!
//! `docs/` has the contracts: `tree.md` for what a mount shows, `store-format.md` for what is on disk, and
//! `architecture.md` for how the code is laid out and which locks it takes in which order.
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::panic))]

pub mod cli;
pub mod config;
pub mod diagnostics;
pub mod error;
pub mod fuse;
pub mod pkcs11;
pub mod store;
pub mod tree;
