//! The tools: how each takes something out of a mount and brings it back, as lines of shell.

use std::fmt;

use super::State;

/// A tool and how it is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Tool {
    Rsync,
    RsyncDelete,
    RsyncInplace,
    RsyncChecksum,
    /// Ended and killed in the middle, several times.
    RsyncInterrupted,
    /// The server of the mount killed in the middle, several times.
    RsyncServerKilled,
    Cp,
    Tar,
    Restic,
    Borg,
}

pub const TOOLS: [Tool; 10] = [
    Tool::Rsync,
    Tool::RsyncDelete,
    Tool::RsyncInplace,
    Tool::RsyncChecksum,
    Tool::RsyncInterrupted,
    Tool::RsyncServerKilled,
    Tool::Cp,
    Tool::Tar,
    Tool::Restic,
    Tool::Borg,
];

impl fmt::Display for Tool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Rsync => "rsync -a",
            Self::RsyncDelete => "rsync -a --delete",
            Self::RsyncInplace => "rsync -a --inplace",
            Self::RsyncChecksum => "rsync -a --checksum",
            Self::RsyncInterrupted => "rsync -a, interrupted",
            Self::RsyncServerKilled => "rsync -a, its mount killed",
            Self::Cp => "cp -a",
            Self::Tar => "tar | tar",
            Self::Restic => "restic",
            Self::Borg => "borg",
        })
    }
}

/// What restic and borg keep is in `$w`, and neither asks anything.
const KEPT: &str = "export RESTIC_PASSWORD=matrix RESTIC_REPOSITORY=$w/restic BORG_REPO=$w/borg BORG_BASE_DIR=$w \
    BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK=yes;";

impl Tool {
    /// Whether it removes what there is more than was backed up.
    pub fn deletes(self) -> bool {
        self == Self::RsyncDelete
    }

    /// Whether it keeps the time of the directory that it is called in: restic and borg keep what is in it.
    pub fn keeps_the_root(self) -> bool {
        !matches!(self, Self::Restic | Self::Borg)
    }

    /// Out of the mount `$from`: what is at `$what` in it, `.` for all, into the directory `$copy`, or into what is in `$w`.
    pub fn out(self) -> String {
        let rsync =
            |options| format!("mkdir -p $copy/$what; rsync {options} $from/$what/ $copy/$what/");
        match self {
            Self::RsyncDelete => rsync("-a --delete"),
            Self::RsyncInplace => rsync("-a --inplace"),
            Self::RsyncChecksum => rsync("-a --checksum"),
            Self::Rsync | Self::RsyncInterrupted | Self::RsyncServerKilled => rsync("-a"),
            Self::Cp => "mkdir -p $copy/$what; cp -a $from/$what/. $copy/$what/".into(),
            Self::Tar => "tar --format=posix -C $from -cf - $what | tar -C $copy -xpf -".into(),
            Self::Restic => format!(
                "{KEPT} cd $from; restic -q init >/dev/null; restic -q --no-cache backup $what"
            ),
            Self::Borg => format!("{KEPT} cd $from; borg init -e none; borg create ::one $what"),
        }
    }

    /// The run after one that was broken off.
    pub fn again(self, state: State) -> String {
        match (self, state) {
            // What a mount knows of the times of single attributes dies with its server.
            (Self::RsyncServerKilled, State::Changed) => Self::RsyncChecksum.back(),
            _ => self.back(),
        }
    }

    /// Back into the mount `$to`; `$in` is the directory in it that `$what` is in.
    pub fn back(self) -> String {
        let rsync = |options| format!("rsync {options} $copy/$what/ $to/$what/");
        match self {
            Self::RsyncDelete => rsync("-a --delete"),
            Self::RsyncInplace => rsync("-a --inplace"),
            Self::RsyncChecksum => rsync("-a --checksum"),
            Self::Rsync | Self::RsyncInterrupted | Self::RsyncServerKilled => rsync("-a"),
            Self::Cp => {
                "if [ $what = . ]; then cp -a $copy/. $to/; else cp -a $copy/$what $to/$in/; fi"
                    .into()
            }
            Self::Tar => "tar --format=posix -C $copy -cf - $what | tar -C $to -xpf -".into(),
            Self::Restic => format!("{KEPT} restic -q --no-cache restore latest --target $to"),
            Self::Borg => format!("{KEPT} cd $to; borg extract ::one"),
        }
    }
}
