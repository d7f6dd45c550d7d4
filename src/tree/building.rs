//! Tokens that are being built change under the hands of whoever uses them when they are published: another file has another name. So
//! nobody is using one at that moment.

use std::collections::HashMap;
use std::sync::Arc;

use super::settle::PAUSE;
use super::{Tree, lock};
use crate::error::Result;
use crate::store::{Patience, Token, TokenName};

/// Who is using the tokens that are being built.
#[derive(Debug, Default)]
pub(super) struct Gates(HashMap<TokenName, Gate>);

#[derive(Debug, Default)]
struct Gate {
    inside: usize,
    publishing: bool,
}

impl Tree {
    /// Asks a token something, or has it write something, unless it is just being published: that is waited for.
    pub(super) fn ask<T>(
        &self,
        token: &TokenName,
        patience: Patience,
        ask: impl FnOnce(&Arc<dyn Token>) -> Result<T>,
    ) -> Result<T> {
        while self.store.is_building(token) {
            if self.enter(token) {
                let outcome = self.token(token).and_then(|token| ask(&token));
                self.leave(token);
                return outcome;
            }
            patience.wait(PAUSE, "the token is being published")?;
        }
        ask(&self.token(token)?)
    }

    fn enter(&self, token: &TokenName) -> bool {
        let mut gates = lock(&self.gates);
        let gate = gates.0.entry(token.clone()).or_default();
        if !gate.publishing {
            gate.inside += 1;
        }
        !gate.publishing
    }

    fn leave(&self, token: &TokenName) {
        let mut gates = lock(&self.gates);
        if let Some(gate) = gates.0.get_mut(token) {
            gate.inside -= 1;
            if gate.inside == 0 && !gate.publishing {
                gates.0.remove(token);
            }
        }
    }

    /// Does what ends the building of a token while nobody uses it.
    pub(super) fn end_building<T>(
        &self,
        token: &TokenName,
        patience: Patience,
        end: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        loop {
            {
                let mut gates = lock(&self.gates);
                // One at a time: each asks all others which slot they are in.
                if !gates.0.values().any(|gate| gate.publishing) {
                    gates.0.entry(token.clone()).or_default().publishing = true;
                    break;
                }
            }
            patience.wait(PAUSE, "a token is being published")?;
        }
        let outcome = loop {
            let inside = lock(&self.gates).0.get(token).map_or(0, |gate| gate.inside);
            if inside == 0 {
                break end();
            }
            if let Err(error) = patience.wait(PAUSE, "the token that is to be published is in use")
            {
                break Err(error);
            }
        };
        let mut gates = lock(&self.gates);
        if let Some(gate) = gates.0.get_mut(token) {
            gate.publishing = false;
            if gate.inside == 0 {
                gates.0.remove(token);
            }
        }
        outcome
    }
}
