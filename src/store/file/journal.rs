//! What a journal says: both versions of a file that is rewritten in place.
//!
//! ```text
//! journal := magic:8 bytes  length of old:u64  length of new:u64  old  new  SipHash-1-3-128 of all this:16 bytes
//! ```
//!
//! Functions without state: [`super::rewrite`] does what they say.

use std::hash::Hasher;

use siphasher::sip128::{Hasher128, SipHasher13};

use super::decode::decode;
use super::encode::filled;

const MAGIC: &[u8; 8] = b"TKFJRNL1";
const HEADER: usize = 24;
const CHECKSUM: usize = 16;

/// What a power failure writes or does not: nobody has smaller sectors.
const SECTOR: usize = 512;

/// Both versions of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Journal {
    /// What it held.
    pub old: Vec<u8>,
    /// What it is to hold.
    pub new: Vec<u8>,
}

/// What has to be done about a file that has a journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It is as before, or as after, or somebody has written it since: nothing.
    Keep,
    /// It is as after, and has what fills it up behind that: cut it off.
    Cut,
    /// It is neither: write it once more.
    Redo,
}

impl Journal {
    /// What is written in one piece over the old version: the new one, filled up so that all of the old one is covered.
    pub fn target(&self) -> Vec<u8> {
        filled(&self.new, self.old.len())
    }

    /// The bytes of a journal.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = MAGIC.to_vec();
        out.extend((self.old.len() as u64).to_be_bytes());
        out.extend((self.new.len() as u64).to_be_bytes());
        out.extend(&self.old);
        out.extend(&self.new);
        out.extend(checksum(&out));
        out
    }

    /// What the bytes of a journal say; nothing if they are not whole.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let body = bytes.get(..bytes.len().checked_sub(CHECKSUM)?)?;
        if bytes.get(body.len()..)? != checksum(body) || !body.starts_with(MAGIC) {
            return None;
        }
        let number = |at: usize| -> Option<usize> {
            let bytes: [u8; 8] = body.get(at..at.checked_add(8)?)?.try_into().ok()?;
            usize::try_from(u64::from_be_bytes(bytes)).ok()
        };
        let versions = body.get(HEADER..)?;
        let (old, new) = versions.split_at_checked(number(8)?)?;
        (new.len() == number(16)?).then(|| Self {
            old: old.to_vec(),
            new: new.to_vec(),
        })
    }

    /// What has to be done about a file that holds `current` and is not being written.
    pub fn verdict(&self, current: &[u8]) -> Verdict {
        let target = self.target();
        if current == self.new || current == self.old {
            Verdict::Keep
        } else if current == target {
            Verdict::Cut
        } else if decode(current).is_err() || self.is_mixture(current, &target) {
            Verdict::Redo
        } else {
            Verdict::Keep
        }
    }

    /// Whether each sector is of the old or of the new version. A file that has grown may have zeros where nothing was
    /// written yet.
    fn is_mixture(&self, current: &[u8], target: &[u8]) -> bool {
        if current.len() < self.old.len() || current.len() > target.len() {
            return false;
        }
        current.chunks(SECTOR).enumerate().all(|(index, sector)| {
            let start = index * SECTOR;
            let of_old = || {
                let old = self.old.get(start..).unwrap_or_default();
                let zeros = std::iter::repeat(&0);
                sector
                    .iter()
                    .zip(old.iter().chain(zeros))
                    .all(|(a, b)| a == b)
            };
            target.get(start..start + sector.len()) == Some(sector) || of_old()
        })
    }
}

fn checksum(bytes: &[u8]) -> [u8; CHECKSUM] {
    let mut hasher = SipHasher13::new();
    hasher.write(bytes);
    hasher.finish128().as_u128().to_be_bytes()
}
