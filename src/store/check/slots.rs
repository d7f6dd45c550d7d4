//! Which slots SoftHSM shows the tokens in. It ends the program of everybody who uses it where one slot would have two
//! (`SlotManager::insertToken`), and has an empty one besides, whose number is how many tokens there are (`SlotManager`'s constructor).

use std::collections::BTreeMap;
use std::sync::Arc;

use super::{Category, Finding, Report, Settings};
use crate::diagnostics::Diagnostics;
use crate::error::Result;
use crate::pkcs11::CKA_OS_TOKENSERIAL;
use crate::store::attribute::Attributes;
use crate::store::validate::slot_id;
use crate::store::{Backend, ObjectId, Patience, Store, TokenName};

/// Where SoftHSM, configured for `backend`, shows a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Slot {
    backend: Backend,
    id: u64,
}

impl Slot {
    /// Of a token that has these attributes of its own.
    pub fn of(backend: Backend, own: &Attributes) -> Self {
        let serial = own.bytes(CKA_OS_TOKENSERIAL);
        Self {
            backend,
            id: slot_id(serial.unwrap_or_default()),
        }
    }
}

/// Tells of each token in `looked_at` whose slot is taken. The slots of the others are read here, as far as they can be.
///
/// # Errors
/// The tokendir cannot be read.
pub(super) fn look(
    store: &Store,
    settings: &Settings,
    looked_at: &BTreeMap<TokenName, Slot>,
    report: &mut Report,
) -> Result<()> {
    let mut all = looked_at.clone();
    if !settings.only.is_empty() {
        others(store, &mut all)?;
    }
    for (name, slot) in looked_at {
        // SoftHSM sees those of one backend.
        let beside: Vec<&TokenName> = all
            .iter()
            .filter(|(_, other)| other.backend == slot.backend)
            .map(|(name, _)| name)
            .collect();
        let same = |other: &&TokenName| *other != name && all.get(*other) == Some(slot);
        let whose = match beside.iter().copied().find(same) {
            Some(other) => format!("of the token {other} too"),
            None if slot.id == beside.len() as u64 => {
                format!("{}, which is the empty one beside as many tokens", slot.id)
            }
            None => continue,
        };
        let detail = format!(
            "by the last eight digits of its serial number it is in the slot {whose}, so that SoftHSM aborts every program that uses it; \
             move the token to another store, or write another CKA_OS_TOKENSERIAL through a mount"
        );
        let path = store.path().join(name.as_os_str());
        report.found(Finding::new(Category::Suspicious, detail), &path);
    }
    Ok(())
}

/// The slots of all tokens that are not among `known`. What cannot be read has none, for SoftHSM too.
fn others(store: &Store, known: &mut BTreeMap<TokenName, Slot>) -> Result<()> {
    // Of its own, so that the databases are closed again.
    let options = store.options().clone();
    let log = Arc::new(Diagnostics::new());
    let store = Store::open(store.path(), options, log)?;
    for name in store.tokens()? {
        if known.contains_key(&name) {
            continue;
        }
        let patience = Patience::at_most(store.options().lock_wait);
        let slot = store.token(&name).and_then(|token| {
            let own = token.object(&ObjectId::Token, patience)?;
            Ok(Slot::of(token.backend(), &own.attributes))
        });
        if let Ok(slot) = slot {
            known.insert(name, slot);
        }
    }
    Ok(())
}
