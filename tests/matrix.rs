//! The matrix: every tool takes a store, a token or an object out of a mount and brings it back, from either backend into either
//! backend, where nothing is, where only this is missing, and over what has changed since.
//!
//! After each: the store holds what was backed up, `rsync -a` has nothing to move, before and after a remount, nothing was complained
//! of, and a real SoftHSM logs in and signs. A full run takes all pairs of backends for each tool, a plain one takes one of them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod matrix_common;
mod mount_common;
mod support;
mod write_common;

use matrix_common::{Tool, run};

/// A test for each tool.
macro_rules! tools {
    ($($name:ident: $tool:ident),* $(,)?) => {
        $(
            #[test]
            fn $name() {
                run(Tool::$tool);
            }
        )*

        /// So that no tool is left out.
        const TESTED: &[Tool] = &[$(Tool::$tool),*];
    };
}

tools! {
    rsync: Rsync,
    rsync_delete: RsyncDelete,
    rsync_inplace: RsyncInplace,
    rsync_checksum: RsyncChecksum,
    rsync_interrupted: RsyncInterrupted,
    rsync_its_mount_killed: RsyncServerKilled,
    cp: Cp,
    tar: Tar,
    restic: Restic,
    borg: Borg,
}

#[test]
fn every_tool_has_its_cells() {
    assert_eq!(TESTED, matrix_common::TOOLS);
}
