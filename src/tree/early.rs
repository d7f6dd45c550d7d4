//! What can be told of a text while it is being written.
//!
//! Most programs, and every shell, ignore what `close` says. So `write` refuses what nothing that could follow would make a value: what the
//! word itself rules out, and what SoftHSM could not live with. All else is left to `close`.

use std::time::{Duration, Instant};

use super::node::Node;
use super::slot::Slot;
use super::text::{self, Context};
use super::{Tree, lock};
use crate::error::{ErrorKind, Result};
use crate::pkcs11::{self, CKA_PRIVATE};
use crate::store::attribute::{AttributeKey, Attributes, Kind, Value};
use crate::store::{ObjectId, Patience, TokenName, validate};

/// What is as long as this and can be read is no part of a ciphertext, in bytes: one in fifty is so by chance, where it is written
/// in pieces that are no longer.
const SHORTEST_TEXT: usize = 4;

/// How long an object is waited for that is being read, or written, by somebody else: a scan of a database, mostly.
const A_MOMENT: Duration = Duration::from_secs(1);

/// The longest text of another kind than bytes that is looked at while it is written, in bytes: a set of some thousand mechanisms.
const LONGEST_WORD: usize = 64 * 1024;

/// Which value it is, of what.
type Place<'a> = (&'a TokenName, &'a ObjectId, Slot);

/// What is known of a text before it is there: the object is asked without a lock on the text.
pub(super) struct Early {
    key: AttributeKey,
    /// Whether `CKA_PRIVATE` can be turned on, if it is that.
    as_private: Result<()>,
    /// Whether what is written can be all that there is.
    as_whole: Result<()>,
}

impl Early {
    /// Whether `content` can be a value or the beginning of one, of which `written` bytes have just been written.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`](crate::error::ErrorKind::Invalid) if it can be neither.
    pub fn of(self, content: &[u8], written: usize) -> Result<()> {
        // All of it is read each time. What is longer is left to `close`.
        let is_word = self.key.kind != Kind::Bytes && content.len() <= LONGEST_WORD;
        let parsed = is_word.then(|| text::parse(self.key, content, Context::default()));
        match parsed {
            Some(Ok(Value::Bool(true))) => self.as_private,
            Some(parsed) if content.ends_with(b"\n") => parsed.map(drop),
            _ if content.len() == written => self.as_whole,
            _ => Ok(()),
        }
    }
}

impl Tree {
    /// What can be told of a text, `data` of which is about to be written, or all of it, as far as can be seen; nothing if it is no
    /// attribute.
    ///
    /// # Errors
    /// [`ErrorKind::WouldBlock`] where it is waited for.
    pub(super) fn foresee(
        &self,
        node: &Node,
        is_whole: bool,
        data: &[u8],
        patience: Patience,
    ) -> Result<Option<Early>> {
        let Some(place) = Slot::of(node) else {
            return Ok(None);
        };
        let as_whole = if is_whole {
            self.check_whole(place, data, patience)
        } else {
            Ok(())
        };
        let as_private = self.check_as_private(place, patience);
        match (as_whole, as_private) {
            (Err(error), _) | (_, Err(error)) if error.kind() == ErrorKind::WouldBlock => {
                Err(error)
            }
            (as_whole, as_private) => Ok(Some(Early {
                key: place.2.key,
                as_private,
                as_whole,
            })),
        }
    }

    /// Of the `CKA_PRIVATE` of an object: whether that can be turned on. It is rare, and worth waiting for.
    fn check_as_private(&self, (token, id, slot): Place<'_>, patience: Patience) -> Result<()> {
        if slot.map.is_some() || slot.key.attribute_type != CKA_PRIVATE {
            return Ok(());
        }
        let is_new = lock(&self.drafts).is_new(&(token.clone(), id.clone()));
        let is_finished = *id != ObjectId::Token && !is_new;
        let private = (slot, Value::Bool(true));
        self.check_with((token, id), private, is_finished, patience)
    }

    /// Whether a text, which is all that has been written until now, can be the value, or the beginning of it. What can only be
    /// told of all of it, or not soon, is left to `close`.
    fn check_whole(
        &self,
        (token, id, slot): Place<'_>,
        data: &[u8],
        patience: Patience,
    ) -> Result<()> {
        if slot.key.kind != Kind::Bytes {
            return text::check_beginning(slot.key, data, Context::default());
        }
        if slot.map.is_some() {
            return Ok(());
        }
        let value = Value::Bytes(data.to_vec());
        if *id == ObjectId::Token {
            let mut alone = Attributes::new();
            alone.insert(slot.key.attribute_type, value);
            validate::check_token(&alone)?;
            let is_serial = slot.key.attribute_type == pkcs11::CKA_OS_TOKENSERIAL;
            if !is_serial || data.len() != validate::SERIAL {
                return Ok(());
            }
            // It is rare, and one that is taken stops SoftHSM: that is worth waiting for.
            return match self.slots_of_others(token, patience) {
                Ok(taken) => validate::check_slot(&alone, &taken),
                Err(error) if error.kind() == ErrorKind::WouldBlock => Err(error),
                Err(_) => Ok(()),
            };
        }
        // The first bytes of a ciphertext hardly ever look like this.
        let is_text = data.len() >= SHORTEST_TEXT
            && std::str::from_utf8(data)
                .is_ok_and(|text| !text.contains(|c: char| c.is_control() && c != '\n'));
        if !is_text
            || validate::is_possible_ciphertext(data)
            || lock(&self.drafts).is_new(&(token.clone(), id.clone()))
        {
            return Ok(());
        }
        // Who holds it for longer leaves that to `close`.
        let briefly = match patience {
            Patience::Now => Patience::Now,
            Patience::Until(until) => Patience::Until(until.min(Instant::now() + A_MOMENT)),
        };
        self.check_with((token, id), (slot, value), true, briefly)
    }

    /// Whether SoftHSM could live with an object that has this value too.
    ///
    /// # Errors
    /// [`ErrorKind::WouldBlock`] if that has to be waited for.
    fn check_with(
        &self,
        (token, id): (&TokenName, &ObjectId),
        (slot, value): (Slot, Value),
        is_finished: bool,
        patience: Patience,
    ) -> Result<()> {
        let object = match self.object(token, id, patience) {
            Ok(object) => object,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Err(error),
            Err(_) => return Ok(()),
        };
        let old = Some(&object.attributes);
        let mut attributes = object.attributes.clone();
        match slot.set(&mut attributes, value) {
            Ok(()) if is_finished => validate::check_finished(old, &attributes),
            Ok(()) => validate::check(old, &attributes),
            Err(_) => Ok(()),
        }
    }
}
