//! Attributes and objects as both backends store them.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// A `CK_ATTRIBUTE_TYPE`. SoftHSM stores an `unsigned long`, 64 bits in both backends.
pub type AttributeType = u64;

/// The kind of a stored value. SoftHSM's `file` backend stores it beside the value, its `db` backend derives it from the
/// type and keeps each kind in a table of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// `CK_BBOOL`.
    Bool,
    /// `CK_ULONG`.
    Ulong,
    /// An array of bytes, `CK_DATE`s included.
    Bytes,
    /// A set of `CK_MECHANISM_TYPE`s.
    Mechs,
    /// A template: attributes in an attribute.
    Map,
}

/// A stored value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    /// `CK_BBOOL`.
    Bool(bool),
    /// `CK_ULONG`; `CK_UNAVAILABLE_INFORMATION` is [`u64::MAX`].
    Ulong(u64),
    /// The bytes as stored: ciphertext in a private object.
    Bytes(Vec<u8>),
    /// A set of mechanisms, in ascending order.
    Mechs(BTreeSet<u64>),
    /// A template. The decoders of both backends refuse a template in a template.
    Map(Attributes),
}

impl Value {
    /// Some value of a kind.
    #[must_use]
    pub fn some_of(kind: Kind) -> Self {
        match kind {
            Kind::Bool => Self::Bool(false),
            Kind::Ulong => Self::Ulong(0),
            Kind::Bytes => Self::Bytes(Vec::new()),
            Kind::Mechs => Self::Mechs(BTreeSet::new()),
            Kind::Map => Self::Map(Attributes::new()),
        }
    }

    /// The kind of this value.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match self {
            Self::Bool(_) => Kind::Bool,
            Self::Ulong(_) => Kind::Ulong,
            Self::Bytes(_) => Kind::Bytes,
            Self::Mechs(_) => Kind::Mechs,
            Self::Map(_) => Kind::Map,
        }
    }
}

/// What identifies an attribute in an object. In the `db` backend, one type can be stored in two tables, that is with
/// two kinds; SoftHSM then looks at one of them only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AttributeKey {
    /// The type.
    pub attribute_type: AttributeType,
    /// The kind with which it is stored.
    pub kind: Kind,
}

/// Attributes in ascending order of type, then kind.
///
/// A clone costs nothing until one of the two is changed, and is equal to the other without a look at the values: a commit to
/// one object of a database gives all the others new times, and nothing else. What is not changed is shared by both from then on,
/// too: of an object with a large value there can be many versions that differ in small ones.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Attributes(Arc<Vec<(AttributeType, Arc<Value>)>>);

impl Attributes {
    /// No attributes.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// How many attributes there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// All of them, in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (AttributeKey, &Value)> {
        self.0.iter().map(|(attribute_type, value)| {
            let key = AttributeKey {
                attribute_type: *attribute_type,
                kind: value.kind(),
            };
            (key, &**value)
        })
    }

    /// The value of one attribute.
    #[must_use]
    pub fn get(&self, key: AttributeKey) -> Option<&Value> {
        let index = self.position(key).ok()?;
        self.0.get(index).map(|(_, value)| &**value)
    }

    /// The value of a type, whatever its kind: the one of the lowest kind if there are several.
    #[must_use]
    pub fn of_type(&self, attribute_type: AttributeType) -> Option<&Value> {
        let (_, value) = self.all_of_type(attribute_type).next()?;
        Some(value)
    }

    /// The values of a type, one of each kind with which it is stored.
    pub fn all_of_type(
        &self,
        attribute_type: AttributeType,
    ) -> impl Iterator<Item = (AttributeKey, &Value)> {
        let first = self
            .0
            .partition_point(|(stored, _)| *stored < attribute_type);
        let there = self.0.iter().skip(first);
        let there = there.take_while(move |(stored, _)| *stored == attribute_type);
        there.map(|(attribute_type, value)| {
            let key = AttributeKey {
                attribute_type: *attribute_type,
                kind: value.kind(),
            };
            (key, &**value)
        })
    }

    /// The value of a type if it is stored as a boolean.
    #[must_use]
    pub fn boolean(&self, attribute_type: AttributeType) -> Option<bool> {
        let kind = Kind::Bool;
        match self.get(AttributeKey {
            attribute_type,
            kind,
        }) {
            Some(Value::Bool(value)) => Some(*value),
            _ => None,
        }
    }

    /// The value of a type if it is stored as a `CK_ULONG`.
    #[must_use]
    pub fn ulong(&self, attribute_type: AttributeType) -> Option<u64> {
        let kind = Kind::Ulong;
        match self.get(AttributeKey {
            attribute_type,
            kind,
        }) {
            Some(Value::Ulong(value)) => Some(*value),
            _ => None,
        }
    }

    /// The value of a type if it is stored as a byte string.
    #[must_use]
    pub fn bytes(&self, attribute_type: AttributeType) -> Option<&[u8]> {
        let kind = Kind::Bytes;
        match self.get(AttributeKey {
            attribute_type,
            kind,
        }) {
            Some(Value::Bytes(value)) => Some(value),
            _ => None,
        }
    }

    /// Sets an attribute, and returns what it was before with that kind.
    pub fn insert(&mut self, attribute_type: AttributeType, value: Value) -> Option<Arc<Value>> {
        let kind = value.kind();
        match self.position(AttributeKey {
            attribute_type,
            kind,
        }) {
            Ok(index) => {
                let old = Arc::make_mut(&mut self.0).get_mut(index);
                old.map(|(_, old)| std::mem::replace(old, Arc::new(value)))
            }
            Err(index) => {
                Arc::make_mut(&mut self.0).insert(index, (attribute_type, Arc::new(value)));
                None
            }
        }
    }

    /// Removes an attribute, and returns what it was.
    pub fn remove(&mut self, key: AttributeKey) -> Option<Arc<Value>> {
        let index = self.position(key).ok()?;
        let (_, value) = Arc::make_mut(&mut self.0).remove(index);
        Some(value)
    }

    /// Keeps what is `wanted`.
    pub fn retain(&mut self, wanted: impl Fn(AttributeKey) -> bool) {
        Arc::make_mut(&mut self.0).retain(|(attribute_type, value)| {
            wanted(AttributeKey {
                attribute_type: *attribute_type,
                kind: value.kind(),
            })
        });
    }

    /// The entries of an attribute map, to be changed.
    pub fn map_mut(&mut self, attribute_type: AttributeType) -> Option<&mut Self> {
        let kind = Kind::Map;
        let index = self
            .position(AttributeKey {
                attribute_type,
                kind,
            })
            .ok()?;
        let (_, value) = Arc::make_mut(&mut self.0).get_mut(index)?;
        match Arc::make_mut(value) {
            Value::Map(entries) => Some(entries),
            _ => None,
        }
    }

    fn position(&self, key: AttributeKey) -> Result<usize, usize> {
        self.0.binary_search_by(|(attribute_type, value)| {
            match attribute_type.cmp(&key.attribute_type) {
                Ordering::Equal => value.kind().cmp(&key.kind),
                other => other,
            }
        })
    }
}

impl From<BTreeMap<AttributeType, Value>> for Attributes {
    fn from(attributes: BTreeMap<AttributeType, Value>) -> Self {
        let values = attributes.into_iter();
        let values = values.map(|(attribute_type, value)| (attribute_type, Arc::new(value)));
        Self(Arc::new(values.collect()))
    }
}
