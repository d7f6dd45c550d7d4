//! Where in an object a value stands: at the top, or in one of its attribute maps.

use std::sync::Arc;

use super::node::Node;
use crate::error::{Error, ErrorKind, Result};
use crate::store::attribute::{AttributeKey, AttributeType, Attributes, Kind, Value};
use crate::store::{ObjectId, TokenName};

/// The place of one value in an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Slot {
    /// The attribute map that it is in.
    pub map: Option<AttributeType>,
    /// What it is called there.
    pub key: AttributeKey,
}

impl Slot {
    /// The object and the place in it that `node` stands for, if it is an attribute.
    pub fn of(node: &Node) -> Option<(&TokenName, &ObjectId, Self)> {
        match node {
            Node::Attribute(token, id, key) => {
                let slot = Self {
                    map: None,
                    key: *key,
                };
                Some((token, id, slot))
            }
            Node::MapEntry(token, id, map, key) => {
                let slot = Self {
                    map: Some(*map),
                    key: *key,
                };
                Some((token, id, slot))
            }
            _ => None,
        }
    }

    /// What stands for this place in an object.
    pub fn node(self, token: &TokenName, id: &ObjectId) -> Node {
        match self.map {
            None => Node::Attribute(token.clone(), id.clone(), self.key),
            Some(map) => Node::MapEntry(token.clone(), id.clone(), map, self.key),
        }
    }

    /// The attributes that this is one of: those of the object, or those in the map.
    pub fn siblings(self, attributes: &Attributes) -> Option<&Attributes> {
        match self.map {
            None => Some(attributes),
            Some(map) => match attributes.get(map_key(map)) {
                Some(Value::Map(entries)) => Some(entries),
                _ => None,
            },
        }
    }

    fn siblings_mut(self, attributes: &mut Attributes) -> Option<&mut Attributes> {
        match self.map {
            None => Some(attributes),
            Some(map) => attributes.map_mut(map),
        }
    }

    /// Puts a value there.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if the map that it belongs in is gone; [`ErrorKind::Exists`] if the type is there with another
    /// kind: SoftHSM knows one value of each type.
    pub fn set(self, attributes: &mut Attributes, value: Value) -> Result<()> {
        let siblings = self
            .siblings_mut(attributes)
            .ok_or_else(|| Error::not_found("the attribute map is gone"))?;
        let there = siblings.all_of_type(self.key.attribute_type);
        let other = there.map(|(key, _)| key).find(|key| *key != self.key);
        if let Some(other) = other {
            return Err(Error::new(
                ErrorKind::Exists,
                format!(
                    "an object has one value of each type, and this one is there as {}; remove that first",
                    super::name::file_name(other)
                ),
            ));
        }
        siblings.insert(self.key.attribute_type, value);
        Ok(())
    }

    /// The value that is there.
    pub fn get(self, attributes: &Attributes) -> Option<&Value> {
        self.siblings(attributes)?.get(self.key)
    }

    /// Takes the value out, and returns it.
    pub fn remove(self, attributes: &mut Attributes) -> Option<Arc<Value>> {
        self.siblings_mut(attributes)?.remove(self.key)
    }

    /// Takes the value out if it is the one that was there `then`; whether it was.
    pub fn remove_unchanged(self, attributes: &mut Attributes, then: &Attributes) -> bool {
        let is_same = self.get(attributes) == self.get(then);
        if is_same {
            self.remove(attributes);
        }
        is_same
    }

    /// Whether it is the `CKA_CLASS` of an object, which goes with the object.
    pub fn is_class(self) -> bool {
        self.map.is_none() && self.key.attribute_type == crate::pkcs11::CKA_CLASS
    }

    /// Whether this is in the map that `map` is.
    pub fn is_in(self, map: Self) -> bool {
        map.map.is_none() && map.key.kind == Kind::Map && self.map == Some(map.key.attribute_type)
    }
}

/// The attribute map of a type.
pub(super) fn map_key(attribute_type: AttributeType) -> AttributeKey {
    AttributeKey {
        attribute_type,
        kind: Kind::Map,
    }
}
