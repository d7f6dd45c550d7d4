//! Between the tree and the kernel: mounting, unmounting and serving.
//!
//! - [`adapter`]: translates requests, one short function each.
//! - `request`, `reply`: from the kernel's types to the tree's, and back. `wait`: the threads for requests that have to wait.
//! - [`settle`]: a thread that writes what has been left alone.
//! - [`invalidate`]: tells the kernel what it has to forget.
//! - [`options`]: what stands behind `-o`.
//! - [`mountinfo`]: the mounts of this process, as the kernel lists them.
//! - [`mount`], [`unmount`]: the checks before a mount, the mount itself, and taking it away.
//! - [`session`]: a file system that is being served, from its mount to its end.
//! - [`signals`]: what a signal does to a mount.

pub mod adapter;
pub mod invalidate;
pub mod mount;
pub mod mountinfo;
pub mod options;
mod reply;
mod request;
pub mod server;
pub mod session;
pub mod settle;
pub mod signals;
pub mod unmount;
mod wait;
