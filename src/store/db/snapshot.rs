//! One version of a whole token, made of the rows of a scan.
//!
//! Knows nothing of SQLite's locks and files. A row that makes no sense damages its object alone; the message names table,
//! row and, in a blob, the byte, and never the value.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::SystemTime;

use super::decode::{self, Undecodable};
use super::scan::{Cell, Row, Rows, Table};
use super::{times, uuid};
use crate::error::{Error, Result};
use crate::store::attribute::{AttributeType, Attributes, Value};
use crate::store::{Metadata, Object, ObjectId, ObjectName, TokenName, layout};

/// `CKA_ALLOWED_MECHANISMS` (PKCS #11, section 4.9): the one type whose rows in `attribute_binary` are mechanism sets
/// (`attributeKind` in SoftHSM's `DBObject.cpp`).
pub(super) const CKA_ALLOWED_MECHANISMS: AttributeType = 0x4000_0600;

/// The row of the token's own object (`DBTOKEN_OBJECT_TOKENINFO` in SoftHSM's `DBToken.cpp`).
pub(super) const TOKEN_ROW: i64 = 1;

/// A token as it was at one moment.
#[derive(Debug)]
pub(super) struct Snapshot {
    /// Of `sqlite3.db`.
    pub metadata: Metadata,
    /// The names of its objects.
    pub names: Names,
    /// What was odd and does not stand in the way.
    pub warnings: Vec<String>,
    /// Whether there are rows that belong to no object.
    pub leftovers: bool,
    /// Whether there are remembered names that are not used, so that names can change when objects come and go.
    contested: bool,
    token: Content,
    objects: HashMap<ObjectName, Entry>,
}

/// The names of the objects of a token.
#[derive(Clone, Debug)]
pub(super) struct Names {
    /// In ascending order.
    pub list: Arc<[ObjectName]>,
    /// What [`Names::generation`] is, once somebody has asked.
    generation: Arc<OnceLock<u64>>,
}

impl From<Vec<ObjectName>> for Names {
    fn from(sorted: Vec<ObjectName>) -> Self {
        Self {
            list: sorted.into(),
            generation: Arc::default(),
        }
    }
}

impl Names {
    /// The generation that such a token has in the layout of the `file` backend. SoftHSM asks for it with each attribute.
    pub fn generation(&self) -> u64 {
        *self
            .generation
            .get_or_init(|| layout::generation(&self.list))
    }
}

#[derive(Clone, Debug)]
struct Entry {
    row: i64,
    content: Content,
}

/// An object, and when it was last modified if that is known.
#[derive(Clone, Debug)]
struct Content {
    object: Result<Arc<Object>>,
    modified: Option<SystemTime>,
}

impl Content {
    fn new(attributes: Attributes, modified: Option<SystemTime>, file: Metadata) -> Self {
        let object = Object {
            metadata: own(file, modified),
            generation: None,
            attributes,
        };
        Self {
            object: Ok(Arc::new(object)),
            modified,
        }
    }

    /// This, or `previous` if it is the same object in the same state: what did not change keeps its times, although those of the
    /// file are others with every commit.
    fn or_previous(self, previous: Option<&Self>) -> Self {
        if let (Ok(new), Some(previous)) = (&self.object, previous)
            && let Ok(old) = &previous.object
            && self.modified == previous.modified
            && new.metadata.same_access(&old.metadata)
            && new.attributes == old.attributes
        {
            return previous.clone();
        }
        self
    }

    /// The same in a file with the metadata `file`, which had `before`.
    fn with_metadata(&self, file: Metadata, before: &Metadata) -> Self {
        let Ok(object) = &self.object else {
            return self.clone();
        };
        let mut renewed = Self::new(object.attributes.clone(), self.modified, file);
        if file.mtime == before.mtime
            && let Ok(new) = &mut renewed.object
        {
            // Mode or owner has changed, and not the time.
            Arc::make_mut(new).metadata.mtime = object.metadata.mtime;
        }
        renewed
    }
}

/// Of an object in a database with the metadata `file`.
fn own(file: Metadata, modified: Option<SystemTime>) -> Metadata {
    Metadata {
        mtime: modified.unwrap_or(file.mtime),
        ..file
    }
}

/// What a commit of our own did to a token.
#[derive(Debug)]
pub(super) enum Change {
    /// An object is there, or holds something else.
    Put {
        id: ObjectId,
        row: i64,
        attributes: Attributes,
        modified: Option<SystemTime>,
    },
    /// One is gone.
    Removed(ObjectName),
    /// So many that a scan costs less than keeping count.
    Many,
    /// One has another name, and a time that is known, if it has any.
    Renamed {
        from: ObjectName,
        to: ObjectName,
        modified: Option<SystemTime>,
    },
}

impl Snapshot {
    /// What `rows` of the database at `path` mean; `previous` is what was known of it before.
    pub fn new(
        name: &TokenName,
        path: &Path,
        metadata: Metadata,
        rows: Rows,
        previous: Option<&Self>,
    ) -> Self {
        let mut warnings = Vec::new();
        if !rows.stray.is_empty() {
            let tables: Vec<&str> = rows.stray.iter().map(|table| table.name()).collect();
            warnings.push(format!(
                "rows in {} belong to no object; they are ignored",
                tables.join(", ")
            ));
        }

        let mut by_object: BTreeMap<i64, Vec<Row>> = BTreeMap::new();
        for id in &rows.objects {
            by_object.insert(*id, Vec::new());
        }
        for row in rows.attributes {
            if let Some(of_object) = by_object.get_mut(&row.object) {
                of_object.push(row);
            }
        }

        let finish = |row: i64, attributes: Result<Attributes>| match attributes {
            Ok(attributes) => {
                let time = rows.times.get(&row);
                let modified = time.and_then(|text| times::modified(text, &attributes));
                Content::new(attributes, modified, metadata)
            }
            Err(error) => Content {
                object: Err(error.at(path)),
                modified: None,
            },
        };
        let token = by_object.remove(&TOKEN_ROW).map_or_else(
            || {
                Err(Error::damaged(
                    "the table object lacks row 1, which is the token itself",
                ))
            },
            attributes_of,
        );
        let token = finish(TOKEN_ROW, token).or_previous(previous.map(|previous| &previous.token));

        let ids: Vec<i64> = by_object.keys().copied().collect();
        let mut names = uuid::assign(name, &ids, &rows.remembered);
        let contested = !names.warnings.is_empty();
        warnings.append(&mut names.warnings);
        let objects: HashMap<ObjectName, Entry> = by_object
            .into_iter()
            .filter_map(|(row, rows)| {
                let name = names.of_row.remove(&row)?;
                let known = previous
                    .and_then(|previous| previous.objects.get(&name))
                    .filter(|known| known.row == row);
                let content = finish(row, attributes_of(rows));
                let content = content.or_previous(known.map(|known| &known.content));
                Some((name, Entry { row, content }))
            })
            .collect();
        let mut names: Vec<ObjectName> = objects.keys().cloned().collect();
        names.sort();
        Self {
            metadata,
            names: names.into(),
            warnings,
            leftovers: rows.stray_text || !rows.stray.is_empty(),
            contested,
            token,
            objects,
        }
    }

    /// The same content in a file whose owner, mode or times have changed.
    pub fn with_metadata(&self, metadata: Metadata) -> Self {
        Self {
            metadata,
            names: self.names.clone(),
            warnings: self.warnings.clone(),
            leftovers: self.leftovers,
            contested: self.contested,
            token: self.token.with_metadata(metadata, &self.metadata),
            objects: self
                .objects
                .iter()
                .map(|(name, Entry { row, content })| {
                    let (row, content) = (*row, content.with_metadata(metadata, &self.metadata));
                    (name.clone(), Entry { row, content })
                })
                .collect(),
        }
    }

    /// What a scan would find after `change`, if that can be told without one. `metadata` is that of the file now.
    pub fn after(&self, change: Change, metadata: Metadata) -> Option<Self> {
        if matches!(change, Change::Many) {
            return None;
        }
        let mut next = if metadata.same_access(&self.metadata) {
            Self {
                metadata,
                names: self.names.clone(),
                warnings: self.warnings.clone(),
                leftovers: self.leftovers,
                contested: self.contested,
                token: self.token.clone(),
                objects: self.objects.clone(),
            }
        } else {
            self.with_metadata(metadata)
        };
        let (names_change, name) = match change {
            Change::Renamed { from, to, modified } => {
                if self.contested {
                    return None;
                }
                let mut entry = next.objects.remove(&from)?;
                if let Ok(object) = &entry.content.object {
                    let attributes = object.attributes.clone();
                    entry.content = Content::new(attributes, modified, metadata);
                }
                next.objects.insert(to, entry);
                let mut names: Vec<ObjectName> = next.objects.keys().cloned().collect();
                names.sort();
                next.names = names.into();
                return Some(next);
            }
            Change::Put {
                id,
                row,
                attributes,
                modified,
            } => {
                let content = Content::new(attributes, modified, metadata);
                match id {
                    ObjectId::Token => {
                        next.token = content;
                        return Some(next);
                    }
                    ObjectId::Object(name) => {
                        let entry = Entry { row, content };
                        let known = next.objects.insert(name.clone(), entry);
                        (known.is_none(), name)
                    }
                }
            }
            Change::Many => return None,
            Change::Removed(name) => {
                next.objects.remove(&name);
                (true, name)
            }
        };
        if names_change {
            if self.contested {
                return None;
            }
            let mut names = self.names.list.to_vec();
            match (names.binary_search(&name), next.objects.contains_key(&name)) {
                (Err(index), true) => names.insert(index, name),
                (Ok(index), false) => drop(names.remove(index)),
                _ => return None,
            }
            next.names = names.into();
        }
        Some(next)
    }

    /// One object.
    ///
    /// # Errors
    /// Of kind `NotFound` if there is no such object, `Damaged` if it makes no sense.
    pub fn object(&self, id: &ObjectId) -> Result<Arc<Object>> {
        self.content(id)?.object.clone()
    }

    /// What the object would have for a file of its own, be it damaged or not: the database's, but for a time that is known.
    ///
    /// # Errors
    /// Of kind `NotFound` if there is no such object.
    pub fn metadata_of(&self, id: &ObjectId) -> Result<Metadata> {
        let content = self.content(id)?;
        Ok(match &content.object {
            Ok(object) => object.metadata,
            Err(_) => own(self.metadata, content.modified),
        })
    }

    /// The id of the row of an object, damaged or not.
    ///
    /// # Errors
    /// Of kind `NotFound` if there is no such object.
    pub fn row(&self, id: &ObjectId) -> Result<i64> {
        match id {
            ObjectId::Token => Ok(TOKEN_ROW),
            ObjectId::Object(name) => Ok(self.entry(name)?.row),
        }
    }

    fn content(&self, id: &ObjectId) -> Result<&Content> {
        match id {
            ObjectId::Token => Ok(&self.token),
            ObjectId::Object(name) => Ok(&self.entry(name)?.content),
        }
    }

    fn entry(&self, name: &ObjectName) -> Result<&Entry> {
        self.objects
            .get(name)
            .ok_or_else(|| Error::not_found(format!("the token has no object {name}")))
    }
}

/// The attributes in the rows of one object; the first row that makes no sense fails it.
fn attributes_of(rows: Vec<Row>) -> Result<Attributes> {
    let mut decoded = Vec::with_capacity(rows.len());
    for row in rows {
        decoded.push(attribute(row)?);
    }
    // In order, each one goes to the end; in any other order, inserting would be quadratic.
    decoded.sort_by_key(|(attribute_type, value)| (*attribute_type, value.kind()));
    let mut attributes = Attributes::new();
    for (attribute_type, value) in decoded {
        attributes.insert(attribute_type, value);
    }
    Ok(attributes)
}

fn attribute(row: Row) -> Result<(AttributeType, Value)> {
    let Row {
        table,
        id,
        attribute_type,
        value,
        ..
    } = row;
    let place = || format!("row {id} of {}", table.name());
    let wrong = |wanted: &str, cell: &Cell| {
        let found = cell.type_name();
        Error::damaged(format!(
            "{}: the value is {found}, where {wanted} belongs",
            place()
        ))
    };
    let undecodable = |what: &str, undecodable: Undecodable| {
        let reason = undecodable.reason;
        Error::damaged(format!("{}: in the {what}, {reason}", place()))
            .at_offset(undecodable.offset as u64)
    };
    let attribute_type = attribute_type
        .map_err(|found| {
            Error::damaged(format!(
                "{}: the attribute's type is {found}, where an integer belongs",
                place()
            ))
        })?
        .cast_unsigned();
    let value = match (table, value) {
        // SoftHSM asks for an `int`, for which SQLite gives the low 32 bits.
        (Table::Boolean, Cell::Integer(value)) => Value::Bool(value as i32 != 0),
        (Table::Integer, Cell::Integer(value)) => Value::Ulong(value.cast_unsigned()),
        (Table::Boolean | Table::Integer, other) => return Err(wrong("an integer", &other)),
        (Table::Binary | Table::Array, cell) => {
            let blob = match cell {
                Cell::Blob(blob) => blob,
                // `sqlite3_column_bytes` of NULL is 0, so that SoftHSM sees an empty value.
                Cell::Null => Vec::new(),
                other => return Err(wrong("a blob", &other)),
            };
            if table == Table::Array {
                let map = decode::map(&blob);
                Value::Map(map.map_err(|error| undecodable("attribute map", error))?)
            } else if attribute_type == CKA_ALLOWED_MECHANISMS {
                let set = decode::mechanisms(&blob);
                Value::Mechs(set.map_err(|error| undecodable("mechanism set", error))?)
            } else {
                Value::Bytes(blob)
            }
        }
    };
    Ok((attribute_type, value))
}
