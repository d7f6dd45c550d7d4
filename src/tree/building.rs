//! Tokens that are being built change under the hands of whoever uses them when they are published: another file has another name. So
//! nobody is using one at that moment.

use std::sync::Arc;

use super::Tree;
use super::still::Spot;
use crate::error::Result;
use crate::store::{Patience, Token, TokenName};

impl Tree {
    /// Asks a token something, or has it write something, unless it is just being published: that is waited for.
    pub(super) fn ask<T>(
        &self,
        token: &TokenName,
        patience: Patience,
        ask: impl FnOnce(&Arc<dyn Token>) -> Result<T>,
    ) -> Result<T> {
        let _still = if self.store.is_building(token) {
            Some(self.enter(Spot::Building(token.clone()), patience)?)
        } else {
            None
        };
        ask(&self.token(token)?)
    }

    /// Does what ends the building of a token while nobody uses it.
    pub(super) fn end_building<T>(
        &self,
        token: &TokenName,
        patience: Patience,
        end: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        let _shut = self.shut([Spot::Building(token.clone()), Spot::Publishing], patience)?;
        end()
    }
}
