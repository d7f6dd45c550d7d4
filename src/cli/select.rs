//! Which tokens a command is about.

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;

use crate::error::{Error, ErrorKind, Result};
use crate::pkcs11;
use crate::store::{ObjectId, Patience, Store, TokenName};
use crate::tree::label;

/// The tokens that `wanted` names, each by directory, serial number or label; all if nothing is wanted.
///
/// # Errors
/// [`ErrorKind::NotFound`] if one of them names none; what reading the tokendir fails with.
pub fn chosen(store: &Store, wanted: &[OsString], patience: Patience) -> Result<Vec<TokenName>> {
    let all = store.tokens()?;
    if wanted.is_empty() {
        return Ok(all);
    }
    let mut found = vec![false; wanted.len()];
    let mut matching = Vec::new();
    for name in all {
        let mut names = vec![name.as_bytes().to_vec()];
        let own = store
            .token(&name)
            .and_then(|token| token.object(&ObjectId::Token, patience));
        if let Ok(own) = own {
            names.extend(
                [pkcs11::CKA_OS_TOKENLABEL, pkcs11::CKA_OS_TOKENSERIAL]
                    .iter()
                    .filter_map(|attribute| own.attributes.bytes(*attribute))
                    .map(|stored| label::unpadded(stored).to_vec()),
            );
        }
        let mut is_wanted = false;
        for (wanted, found) in wanted.iter().zip(&mut found) {
            if names.iter().any(|name| name == wanted.as_bytes()) {
                (is_wanted, *found) = (true, true);
            }
        }
        if is_wanted {
            matching.push(name);
        }
    }
    match wanted.iter().zip(found).find(|(_, found)| !found) {
        None => Ok(matching),
        Some((wanted, _)) => Err(Error::new(
            ErrorKind::NotFound,
            format!(
                "no token has {wanted:?} as its directory, serial number or label; \"tokenfs tree\" without it lists all",
            ),
        )
        .at(store.path())),
    }
}
