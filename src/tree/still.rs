//! Where a file is while somebody uses it: what is renamed takes along all that is open in it, so nobody may be between finding out where a file
//! is and using it there.
//!
//! Who does that keeps the object still; who renames it shuts it, waits for those who are inside, and lets nobody in before all has followed.
//! The files of a scratch directory that becomes an object, or a map, are shut one by one.

use std::collections::{BTreeSet, HashMap};

use super::draft::Key;
use super::node::{Ino, Node};
use super::scratch::ScratchId;
use super::settle::PAUSE;
use super::{FileKind, Tree, lock};
use crate::error::Result;
use crate::store::Patience;

/// What is renamed as a whole.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Spot {
    /// An object, with all that is in it.
    Object(Key),
    /// A scratch file.
    Scratch(ScratchId),
}

/// Who is where.
#[derive(Debug, Default)]
pub(super) struct Spots(HashMap<Spot, State>);

#[derive(Debug, Default)]
struct State {
    inside: usize,
    is_shut: bool,
}

impl Spots {
    fn tidy(&mut self, spot: &Spot) {
        let state = self.0.get(spot);
        if state.is_some_and(|state| state.inside == 0 && !state.is_shut) {
            self.0.remove(spot);
        }
    }
}

/// What it was made for stays where it is.
#[derive(Debug)]
pub(super) struct Still<'a> {
    tree: &'a Tree,
    spot: Spot,
}

impl Drop for Still<'_> {
    fn drop(&mut self) {
        let mut spots = lock(&self.tree.spots);
        if let Some(state) = spots.0.get_mut(&self.spot) {
            state.inside = state.inside.saturating_sub(1);
        }
        spots.tidy(&self.spot);
    }
}

/// Nobody uses what it was made for.
#[derive(Debug)]
pub(super) struct Shut<'a> {
    tree: &'a Tree,
    spots: Vec<Spot>,
}

impl Drop for Shut<'_> {
    fn drop(&mut self) {
        let mut spots = lock(&self.tree.spots);
        for spot in &self.spots {
            if let Some(state) = spots.0.get_mut(spot) {
                state.is_shut = false;
            }
            spots.tidy(spot);
        }
    }
}

impl Tree {
    /// What moves when `node` does, if it is not alone.
    fn spot_of(&self, node: &Node) -> Option<Spot> {
        let object = |node: &Node| {
            let (token, id) = node.object()?;
            Some(Spot::Object((token.clone(), id.clone())))
        };
        match node {
            Node::Scratch(id) => {
                let became = lock(&self.scratch).became(*id);
                became.map_or(Some(Spot::Scratch(*id)), |became| object(&became))
            }
            node => object(node),
        }
    }

    /// Keeps `node` where it is, for as long as what is returned lives. Whether it is still there has to be looked at again then.
    ///
    /// # Errors
    /// [`crate::error::ErrorKind::WouldBlock`] or [`crate::error::ErrorKind::Busy`] if it is being renamed for longer than `patience` lasts.
    pub(super) fn keep_still(&self, node: &Node, patience: Patience) -> Result<Option<Still<'_>>> {
        let Some(spot) = self.spot_of(node) else {
            return Ok(None);
        };
        loop {
            {
                let mut spots = lock(&self.spots);
                let state = spots.0.entry(spot.clone()).or_default();
                if !state.is_shut {
                    state.inside += 1;
                    return Ok(Some(Still { tree: self, spot }));
                }
            }
            patience.wait(PAUSE, "it is being renamed")?;
        }
    }

    /// Does something with what the kernel knows by a number, which stays where it is meanwhile. Nobody has to wait who writes into a scratch
    /// file: whoever makes an attribute of that looks at its end what has come into it since.
    ///
    /// # Errors
    /// As [`Tree::keep_still`], and what `act` fails with.
    pub(super) fn in_place<T>(
        &self,
        ino: Ino,
        patience: Patience,
        act: impl FnOnce(&Node) -> Result<T>,
    ) -> Result<T> {
        loop {
            let node = self.node(ino)?;
            let _still = match self.spot_of(&node) {
                Some(Spot::Scratch(id)) if !self.is_scratch_directory(id) => None,
                _ => self.keep_still(&node, patience)?,
            };
            if self.node(ino)? == node {
                return act(&node);
            }
        }
    }

    fn is_scratch_directory(&self, id: ScratchId) -> bool {
        let scratch = lock(&self.scratch);
        scratch
            .get(id)
            .map_or(true, |entry| entry.kind() == FileKind::Directory)
    }

    /// Keeps everybody from what is going to be renamed, or replaced, for as long as what is returned lives.
    ///
    /// # Errors
    /// As [`Tree::keep_still`] if somebody is using it, or is renaming it too.
    pub(super) fn shut(
        &self,
        spots: impl IntoIterator<Item = Spot>,
        patience: Patience,
    ) -> Result<Shut<'_>> {
        let mut shut = Shut {
            tree: self,
            spots: Vec::new(),
        };
        // In one order, so that no two wait for each other.
        for spot in spots.into_iter().collect::<BTreeSet<_>>() {
            loop {
                {
                    let mut spots = lock(&self.spots);
                    let state = spots.0.entry(spot.clone()).or_default();
                    if !state.is_shut {
                        state.is_shut = true;
                        break;
                    }
                }
                patience.wait(PAUSE, "it is being renamed")?;
            }
            shut.spots.push(spot);
        }
        let is_used = |spot: &Spot| {
            let spots = lock(&self.spots);
            spots.0.get(spot).is_some_and(|state| state.inside > 0)
        };
        while shut.spots.iter().any(is_used) {
            patience.wait(PAUSE, "the file is being written")?;
        }
        Ok(shut)
    }

    /// What was `node` is not there. If it is just being renamed, or has been, what the kernel knows by the number is there, or will be in a moment,
    /// which is waited for.
    ///
    /// # Errors
    /// As [`Tree::keep_still`].
    pub(super) fn has_moved(&self, ino: Ino, node: &Node, patience: Patience) -> Result<bool> {
        let is_shut = self.spot_of(node).is_some_and(|spot| {
            // Scratch is there until it is something else.
            let is_scratch =
                matches!(&spot, Spot::Scratch(id) if lock(&self.scratch).get(*id).is_ok());
            let spots = lock(&self.spots);
            !is_scratch && spots.0.get(&spot).is_some_and(|state| state.is_shut)
        });
        if is_shut {
            self.keep_still(node, patience)?;
            return Ok(true);
        }
        Ok(self.node(ino)? != *node)
    }
}
