//! All rows of a token, read in one go.
//!
//! Owns the SQL of reading. One scan per table: there is no index on `object_id` or `type`, so one query per attribute
//! would be quadratic. Rows come in ascending order of id, and of rows that repeat an (object, type) only the first one
//! counts, which is the one that SoftHSM's scan finds (`docs/store-format.md`, "Rows can be doubled"). What the rows mean
//! is the business of [`super::snapshot`], after the transaction.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use rusqlite::Connection;
use rusqlite::types::ValueRef;

use super::times::CKA_TOKENFS_TIMES;
use super::uuid::CKA_TOKENFS_UUID;

/// The tables that attributes are stored in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Table {
    Boolean,
    Integer,
    Binary,
    Array,
}

impl Table {
    pub const ALL: [Self; 4] = [Self::Boolean, Self::Integer, Self::Binary, Self::Array];

    pub fn name(self) -> &'static str {
        match self {
            Self::Boolean => "attribute_boolean",
            Self::Integer => "attribute_integer",
            Self::Binary => "attribute_binary",
            Self::Array => "attribute_array",
        }
    }

    fn select(self) -> &'static str {
        match self {
            Self::Boolean => "select value, type, object_id, id from attribute_boolean order by id",
            Self::Integer => "select value, type, object_id, id from attribute_integer order by id",
            Self::Binary => "select value, type, object_id, id from attribute_binary order by id",
            Self::Array => "select value, type, object_id, id from attribute_array order by id",
        }
    }
}

/// A value as SQLite has it.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Cell {
    Null,
    Integer(i64),
    Blob(Vec<u8>),
    /// A type that SoftHSM never stores; the value is not kept.
    Other(&'static str),
}

impl Cell {
    /// How a message calls the SQLite type.
    pub fn type_name(&self) -> &'static str {
        match self {
            Self::Null => "NULL",
            Self::Integer(_) => "an integer",
            Self::Blob(_) => "a blob",
            Self::Other(name) => name,
        }
    }
}

impl From<ValueRef<'_>> for Cell {
    fn from(value: ValueRef<'_>) -> Self {
        match value {
            ValueRef::Null => Self::Null,
            ValueRef::Integer(value) => Self::Integer(value),
            ValueRef::Blob(value) => Self::Blob(value.to_vec()),
            ValueRef::Text(_) => Self::Other("text"),
            ValueRef::Real(_) => Self::Other("a real number"),
        }
    }
}

/// One row of an attribute table that names an existing object.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Row {
    pub table: Table,
    pub id: i64,
    pub object: i64,
    /// The type of the attribute, or what stands in its place.
    pub attribute_type: Result<i64, &'static str>,
    pub value: Cell,
}

/// What a scan finds.
#[derive(Debug, Default)]
pub(super) struct Rows {
    /// The ids in `object`, ascending.
    pub objects: Vec<i64>,
    /// By table, then id.
    pub attributes: Vec<Row>,
    /// The UUIDs in `attribute_text`; `None` for a value that is no text.
    pub remembered: BTreeMap<i64, Option<String>>,
    /// The times in `attribute_text`.
    pub times: BTreeMap<i64, String>,
    /// The tables with rows that belong to no object.
    pub stray: BTreeSet<Table>,
    /// Whether `attribute_text` has such rows.
    pub stray_text: bool,
}

/// The tables of a token that are not there, of those without which objects would seem to lack attributes.
/// `attribute_text`, `attribute_datetime` and `attribute_real` hold nothing of SoftHSM's and may lack.
pub(super) fn missing_tables(connection: &Connection) -> rusqlite::Result<Vec<&'static str>> {
    let mut statement = connection
        .prepare_cached("select 1 from sqlite_master where type = 'table' and name = ?")?;
    let required = Table::ALL.map(Table::name);
    let mut missing = Vec::new();
    for name in std::iter::once("object").chain(required) {
        if !statement.exists([name])? {
            missing.push(name);
        }
    }
    Ok(missing)
}

/// Reads everything. To be called in a transaction, so that it is of one version.
pub(super) fn read(connection: &Connection) -> rusqlite::Result<Rows> {
    let mut rows = Rows::default();
    let mut statement = connection.prepare_cached("select id from object order by id")?;
    let mut found = statement.query([])?;
    while let Some(row) = found.next()? {
        rows.objects.push(row.get(0)?);
    }
    rows.objects.dedup();
    let objects: HashSet<i64> = rows.objects.iter().copied().collect();
    for table in Table::ALL {
        read_table(connection, table, &objects, &mut rows)?;
    }
    if has_text(connection)? {
        read_text(connection, &objects, &mut rows)?;
    }
    Ok(rows)
}

fn read_table(
    connection: &Connection,
    table: Table,
    objects: &HashSet<i64>,
    rows: &mut Rows,
) -> rusqlite::Result<()> {
    let mut seen: HashSet<(i64, i64)> = HashSet::new();
    let mut statement = connection.prepare_cached(table.select())?;
    let mut found = statement.query([])?;
    while let Some(row) = found.next()? {
        let object = match row.get_ref(2)? {
            ValueRef::Integer(object) if objects.contains(&object) => object,
            _ => {
                rows.stray.insert(table);
                continue;
            }
        };
        let attribute_type = match row.get_ref(1)? {
            ValueRef::Integer(attribute_type) => {
                if !seen.insert((object, attribute_type)) {
                    continue;
                }
                Ok(attribute_type)
            }
            other => Err(Cell::from(other).type_name()),
        };
        let value = match attribute_type {
            Ok(_) => row.get_ref(0)?.into(),
            // The row is damaged whatever its value is.
            Err(_) => Cell::Null,
        };
        rows.attributes.push(Row {
            table,
            id: row.get(3)?,
            object,
            attribute_type,
            value,
        });
    }
    Ok(())
}

/// Whether there is a table `attribute_text`, which SoftHSM makes and a token can do without.
pub(super) fn has_text(connection: &Connection) -> rusqlite::Result<bool> {
    connection
        .prepare_cached(
            "select 1 from sqlite_master where type = 'table' and name = 'attribute_text'",
        )?
        .exists([])
}

/// What tokenfs itself has stored. Of rows that repeat each other the first one counts here too.
fn read_text(
    connection: &Connection,
    objects: &HashSet<i64>,
    rows: &mut Rows,
) -> rusqlite::Result<()> {
    let mut statement = connection
        .prepare_cached("select value, object_id, type from attribute_text order by id")?;
    let mut found = statement.query([])?;
    while let Some(row) = found.next()? {
        let object = match row.get_ref(1)? {
            ValueRef::Integer(object) if objects.contains(&object) => object,
            _ => {
                rows.stray_text = true;
                continue;
            }
        };
        let ValueRef::Integer(attribute_type) = row.get_ref(2)? else {
            continue;
        };
        let attribute_type = attribute_type.cast_unsigned();
        if attribute_type != CKA_TOKENFS_UUID && attribute_type != CKA_TOKENFS_TIMES {
            continue;
        }
        let text = match row.get_ref(0)? {
            ValueRef::Text(text) => std::str::from_utf8(text).ok().map(str::to_owned),
            _ => None,
        };
        if attribute_type == CKA_TOKENFS_UUID {
            rows.remembered.entry(object).or_insert(text);
        } else {
            // One that is no text is none.
            rows.times.entry(object).or_insert(text.unwrap_or_default());
        }
    }
    Ok(())
}
