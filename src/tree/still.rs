//! Where a file is while somebody uses it: what is renamed takes along all that is open in it, so nobody may be between finding out where a file
//! is and using it there.
//!
//! Who does that keeps the object still; who renames it shuts it, waits for those who are inside, and lets nobody in before all has followed.
//! The files of a scratch directory that becomes an object, or a map, are shut one by one. Who only reads keeps nothing still: he asks again if it
//! was gone from where it was and has moved meanwhile.

use std::collections::{BTreeSet, HashMap};
use std::ffi::OsStr;

use super::draft::Key;
use super::node::{Ino, Node};
use super::remove::object_called;
use super::scratch::ScratchId;
use super::settle::PAUSE;
use super::{FileKind, Tree, lock};
use crate::error::{ErrorKind, Result};
use crate::store::{Patience, TokenName};

/// What is renamed as a whole.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Spot {
    /// An object, with all that is in it.
    Object(Key),
    /// A scratch file, or what is in a scratch directory.
    Scratch(ScratchId),
    /// A token that is being built.
    Building(TokenName),
    /// The right to publish one: each looks which slots all others are in.
    Publishing,
}

impl Spot {
    /// Why it is waited for.
    fn is_shut_for(&self) -> &'static str {
        match self {
            Self::Object(_) | Self::Scratch(_) => "it is being renamed",
            Self::Building(_) | Self::Publishing => "a token is being published",
        }
    }
}

/// Who is where.
#[derive(Debug, Default)]
pub(super) struct Spots {
    states: HashMap<Spot, State>,
    /// How often something was shut and is not any more.
    turns: u64,
}

#[derive(Debug, Default)]
struct State {
    inside: usize,
    is_shut: bool,
}

impl Spots {
    fn tidy(&mut self, spot: &Spot) {
        let state = self.states.get(spot);
        if state.is_some_and(|state| state.inside == 0 && !state.is_shut) {
            self.states.remove(spot);
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
        if let Some(state) = spots.states.get_mut(&self.spot) {
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
        spots.turns += 1;
        for spot in &self.spots {
            if let Some(state) = spots.states.get_mut(spot) {
                state.is_shut = false;
            }
            spots.tidy(spot);
        }
    }
}

impl Tree {
    /// What moves when `node` does, if it is not alone.
    pub(super) fn spot_of(&self, node: &Node) -> Option<Spot> {
        if let Node::Scratch(id) = node {
            let became = lock(&self.scratch).became(*id);
            return match became {
                Some(became) => self.spot_of(&became),
                None => Some(Spot::Scratch(*id)),
            };
        }
        let (token, id) = node.object()?;
        Some(Spot::Object((token.clone(), id.clone())))
    }

    /// Keeps what is there, for as long as what is returned lives.
    ///
    /// # Errors
    /// [`crate::error::ErrorKind::WouldBlock`] or [`crate::error::ErrorKind::Busy`] if it is shut for longer than `patience` lasts.
    pub(super) fn enter(&self, spot: Spot, patience: Patience) -> Result<Still<'_>> {
        loop {
            {
                let mut spots = lock(&self.spots);
                let state = spots.states.entry(spot.clone()).or_default();
                if !state.is_shut {
                    state.inside += 1;
                    return Ok(Still { tree: self, spot });
                }
            }
            patience.wait(PAUSE, spot.is_shut_for())?;
        }
    }

    /// Keeps `node` where it is. Whether it is still there has to be looked at again then.
    ///
    /// # Errors
    /// As [`Tree::enter`] if it is being renamed.
    pub(super) fn keep_still(&self, node: &Node, patience: Patience) -> Result<Option<Still<'_>>> {
        let spot = self.spot_of(node);
        spot.map(|spot| self.enter(spot, patience)).transpose()
    }

    /// How often something was renamed, made or removed.
    pub(super) fn turns(&self) -> u64 {
        lock(&self.spots).turns
    }

    /// Answers a question about what the kernel knows by a number: if it is not where it was, and is being renamed or has been, it is asked again
    /// where it is then.
    ///
    /// # Errors
    /// As [`Tree::enter`], and what `ask` fails with.
    pub(super) fn wherever<T>(
        &self,
        ino: Ino,
        patience: Patience,
        mut ask: impl FnMut(&Node) -> Result<T>,
    ) -> Result<T> {
        loop {
            let turns = lock(&self.spots).turns;
            let node = self.node(ino)?;
            let answer = ask(&node);
            let is_gone = matches!(&answer, Err(error) if error.kind() == ErrorKind::NotFound);
            if !is_gone || !self.may_have_moved(&node, turns, patience)? {
                return answer;
            }
        }
    }

    /// Does something with what the kernel knows by a number, which stays where it is meanwhile. Nobody has to wait who writes into a scratch
    /// file: whoever makes an attribute of that looks at its end what has come into it since. What was scratch when the kernel heard of it is what
    /// it has become.
    ///
    /// # Errors
    /// As [`Tree::enter`], and what `act` fails with.
    pub(super) fn in_place<T>(
        &self,
        ino: Ino,
        patience: Patience,
        act: impl FnOnce(&Node) -> Result<T>,
    ) -> Result<T> {
        loop {
            let node = self.node_now(ino)?;
            let _still = match &node {
                Node::Scratch(id) if !self.is_scratch_directory(*id) => None,
                _ => self.keep_still(&node, patience)?,
            };
            if self.node_now(ino)? == node {
                return act(&node);
            }
        }
    }

    fn node_now(&self, ino: Ino) -> Result<Node> {
        Ok(match self.node(ino)? {
            Node::Scratch(id) => lock(&self.scratch).became(id).unwrap_or(Node::Scratch(id)),
            node => node,
        })
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
    /// As [`Tree::enter`] if somebody is using it, or is renaming it too.
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
                    let state = spots.states.entry(spot.clone()).or_default();
                    if !state.is_shut {
                        state.is_shut = true;
                        break;
                    }
                }
                patience.wait(PAUSE, spot.is_shut_for())?;
            }
            shut.spots.push(spot);
        }
        let is_used = |spot: &Spot| {
            let spots = lock(&self.spots);
            spots.states.get(spot).is_some_and(|state| state.inside > 0)
        };
        while shut.spots.iter().any(is_used) {
            patience.wait(PAUSE, "it is in use")?;
        }
        Ok(shut)
    }

    /// Keeps everybody from the object that is called `name` in the directory of a token, which is going to be made or removed.
    ///
    /// # Errors
    /// As [`Tree::shut`].
    pub(super) fn shut_object(
        &self,
        directory: &Node,
        name: &OsStr,
        patience: Patience,
    ) -> Result<Option<Shut<'_>>> {
        let Node::Token(_) = directory else {
            return Ok(None);
        };
        let key = object_called(directory, name);
        key.map(|key| self.shut([Spot::Object(key)], patience))
            .transpose()
    }

    /// Whether what was not there as `node`, after so many turns, may have been somewhere else just then: what is being renamed is waited for.
    fn may_have_moved(&self, node: &Node, turns: u64, patience: Patience) -> Result<bool> {
        // Scratch is there until it is something else.
        let is_scratch = matches!(node, Node::Scratch(id) if lock(&self.scratch).get(*id).is_ok());
        if is_scratch {
            return Ok(false);
        }
        // Tokens stay where they are, and so does the root.
        let Some(spot) = self.spot_of(node) else {
            return Ok(false);
        };
        // Only to wait until it is not being renamed.
        drop(self.enter(spot, patience)?);
        Ok(lock(&self.spots).turns != turns)
    }
}
