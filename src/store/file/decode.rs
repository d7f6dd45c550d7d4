//! `.object` files: from bytes to attributes.
//!
//! ```text
//! object    := generation:u64 attribute*                       all integers big-endian
//! attribute := type:u64 kind:u64 value
//! value     := 1 boolean        one byte, 0 is false
//!            | 2 ulong          u64
//!            | 3 byte string    length:u64 byte*
//!            | 4 attribute map  length:u64 entry*               length in bytes
//!            | 5 mechanism set  count:u64 u64*
//! entry     := type:u64 kind:u64 value                          2 is an integer, 3 a byte string, 4 is refused
//! ```
//!
//! The verdict is that of SoftHSM's `ObjectFile::refresh` on every content, so that the mount shows an object where SoftHSM
//! has one and an error where it has none. Nothing is allocated by a length that was not checked against what is there.

use std::collections::{BTreeMap, BTreeSet};

use super::{CKA_TOKENFS_FILLER, KIND_BOOLEAN, KIND_BYTES, KIND_MAP, KIND_MECHANISMS, KIND_ULONG};
use crate::error::{Error, Result};
use crate::store::attribute::{Attributes, Value};

/// An object file that parses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decoded {
    /// The first 8 bytes; absent if there are fewer.
    pub generation: Option<u64>,
    /// What follows. Of a type that is repeated, the last. What only fills the file is not among them.
    pub attributes: Attributes,
    /// Where fewer than 8 bytes follow the last attribute: their offset. SoftHSM takes that for the end of the
    /// file; it is the trace of a write that was cut short.
    pub trailing: Option<u64>,
}

/// Decodes a whole `.object` file.
///
/// # Errors
/// [`crate::error::ErrorKind::Damaged`] with the offset of the first field that cannot be, if the file is empty or is cut
/// off within an attribute, or if a kind is unknown.
pub fn decode(bytes: &[u8]) -> Result<Decoded> {
    if bytes.is_empty() {
        return Err(Error::damaged(
            "an object that was destroyed or never finished: the file is empty",
        )
        .at_offset(0));
    }
    let mut reader = Reader { bytes, position: 0 };
    if bytes.len() < 8 {
        return Ok(Decoded {
            generation: None,
            attributes: Attributes::new(),
            trailing: Some(0),
        });
    }
    let generation = reader.ulong("the generation")?;
    let mut attributes = BTreeMap::new();
    while reader.left() >= 8 {
        let attribute_type = reader.ulong("an attribute's type")?;
        let value = reader.value()?;
        attributes.insert(attribute_type, value);
    }
    // What a crash in the middle of a rewriting in place left behind the attributes.
    if let Some(Value::Bytes(bytes)) = attributes.get(&CKA_TOKENFS_FILLER)
        && bytes.iter().all(|byte| *byte == 0)
    {
        attributes.remove(&CKA_TOKENFS_FILLER);
    }
    Ok(Decoded {
        generation: Some(generation),
        attributes: attributes.into(),
        trailing: (reader.left() > 0).then_some(reader.offset()),
    })
}

/// A position in the bytes of a file.
struct Reader<'a> {
    bytes: &'a [u8],
    position: usize,
}

impl<'a> Reader<'a> {
    fn left(&self) -> usize {
        self.bytes.len() - self.position
    }

    fn offset(&self) -> u64 {
        self.position as u64
    }

    /// The next `count` bytes.
    fn take(&mut self, count: u64, what: &str) -> Result<&'a [u8]> {
        let end = usize::try_from(count)
            .ok()
            .and_then(|count| self.position.checked_add(count));
        match end.and_then(|end| self.bytes.get(self.position..end).map(|taken| (end, taken))) {
            Some((end, taken)) => {
                self.position = end;
                Ok(taken)
            }
            None => Err(Error::damaged(format!(
                "the file ends within {what}: {count} bytes are needed, {} are left",
                self.left()
            ))
            .at_offset(self.offset())),
        }
    }

    fn ulong(&mut self, what: &str) -> Result<u64> {
        let mut buffer = [0; 8];
        buffer.copy_from_slice(self.take(8, what)?);
        Ok(u64::from_be_bytes(buffer))
    }

    fn boolean(&mut self) -> Result<bool> {
        Ok(self.take(1, "a boolean")?.iter().any(|byte| *byte != 0))
    }

    fn byte_string(&mut self) -> Result<&'a [u8]> {
        let length = self.ulong("the length of a byte string")?;
        self.take(length, "a byte string")
    }

    fn mechanisms(&mut self) -> Result<BTreeSet<u64>> {
        let at = self.offset();
        let count = self.ulong("the count of a mechanism set")?;
        if count > self.left() as u64 / 8 {
            return Err(Error::damaged(format!(
                "the file ends within a mechanism set: it claims {count} members, {} bytes are left",
                self.left()
            ))
            .at_offset(at));
        }
        (0..count).map(|_| self.ulong("a mechanism")).collect()
    }

    /// Kind and value of an attribute of an object.
    fn value(&mut self) -> Result<Value> {
        let at = self.offset();
        Ok(match self.ulong("an attribute's kind")? {
            KIND_BOOLEAN => Value::Bool(self.boolean()?),
            KIND_ULONG => Value::Ulong(self.ulong("an unsigned long")?),
            KIND_BYTES => Value::Bytes(self.byte_string()?.to_vec()),
            KIND_MAP => Value::Map(self.map()?),
            KIND_MECHANISMS => Value::Mechs(self.mechanisms()?),
            other => {
                return Err(
                    Error::damaged(format!("{other} is no kind of attribute")).at_offset(at)
                );
            }
        })
    }

    /// Length and entries of an attribute map, counted down the way SoftHSM does (`File::readAttributeMap`): of a
    /// mechanism set, the distinct members count.
    fn map(&mut self) -> Result<Attributes> {
        let start = self.offset();
        let mut left = self.ulong("the length of an attribute map")?;
        if left > self.left() as u64 {
            return Err(Error::damaged(format!(
                "the file ends within an attribute map: {left} bytes are needed, {} are left",
                self.left()
            ))
            .at_offset(start));
        }
        let mut entries = BTreeMap::new();
        while left != 0 {
            let at = self.offset();
            let attribute_type = self.ulong("the type of an entry of an attribute map")?;
            let kind_at = self.offset();
            let kind = self.ulong("the kind of an entry of an attribute map")?;
            let value = match kind {
                KIND_BOOLEAN => Value::Bool(self.boolean()?),
                KIND_ULONG => Value::Ulong(self.ulong("an unsigned long")?),
                KIND_BYTES => Value::Bytes(self.byte_string()?.to_vec()),
                KIND_MECHANISMS => Value::Mechs(self.mechanisms()?),
                KIND_MAP => {
                    return Err(Error::damaged("an attribute map within an attribute map")
                        .at_offset(kind_at));
                }
                other => {
                    return Err(Error::damaged(format!(
                        "{other} is no kind of attribute in an attribute map"
                    ))
                    .at_offset(kind_at));
                }
            };
            let length = 16
                + match &value {
                    Value::Bool(_) => 1,
                    Value::Ulong(_) => 8,
                    Value::Bytes(bytes) => 8 + bytes.len() as u64,
                    Value::Mechs(set) => 8 + 8 * set.len() as u64,
                    Value::Map(_) => 0,
                };
            left = left.checked_sub(length).ok_or_else(|| {
                Error::damaged("an entry reaches beyond its attribute map").at_offset(at)
            })?;
            // SoftHSM inserts into a std::map, which keeps what it has.
            entries.entry(attribute_type).or_insert(value);
        }
        Ok(entries.into())
    }
}
