//! The SQL of writing: which rows of an object change, and how.
//!
//! Assumes a write transaction. Rows are changed as SoftHSM's `DBObject.cpp` changes them: all rows that repeat a type at once,
//! so that the first one never comes to differ from the others.

use rusqlite::types::Value as Cell;
use rusqlite::{Connection, params};

use super::encode;
use super::scan::Table;
use super::snapshot::CKA_ALLOWED_MECHANISMS;
use super::times::CKA_TOKENFS_TIMES;
use super::uuid::CKA_TOKENFS_UUID;
use crate::error::{Error, ErrorKind, Result};
use crate::pkcs11;
use crate::store::attribute::{AttributeKey, AttributeType, Attributes, Kind, Value};
use crate::store::crash::point;
use crate::store::validate;

/// Every table with rows that belong to an object, SoftHSM's unused ones too.
const CHILDREN: [&str; 7] = [
    "attribute_text",
    "attribute_integer",
    "attribute_binary",
    "attribute_array",
    "attribute_boolean",
    "attribute_datetime",
    "attribute_real",
];

/// One attribute of one object.
#[derive(Debug, PartialEq)]
enum Step {
    Insert(Cell),
    Update(Cell),
    Delete,
}

/// What is to be done with an object's rows.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Plan(Vec<(Table, AttributeType, Step)>);

impl Plan {
    /// How `old` becomes `new`.
    ///
    /// # Errors
    /// Of kind `Invalid` for what would not come back as it is.
    pub fn new(old: &Attributes, new: &Attributes) -> Result<Self> {
        let mut steps = Vec::new();
        for (key, _) in old.iter() {
            if new.get(key).is_none() {
                steps.push((table(key.kind), key.attribute_type, Step::Delete));
            }
        }
        for (key, value) in new.iter() {
            let step = match old.get(key) {
                Some(before) if before == value => continue,
                Some(_) => Step::Update(cell(key, value)?),
                None => Step::Insert(cell(key, value)?),
            };
            steps.push((table(key.kind), key.attribute_type, step));
        }
        Ok(Self(steps))
    }

    /// Does it. `false` if a row that is to be changed is not there, which a scan in the same transaction has seen.
    pub fn run(&self, connection: &Connection, object: i64) -> rusqlite::Result<bool> {
        for (table, attribute_type, step) in &self.0 {
            let attribute_type = attribute_type.cast_signed();
            let changed =
                match step {
                    Step::Delete => {
                        let changed = connection
                            .prepare_cached(delete(*table))?
                            .execute(params![attribute_type, object])?;
                        point("db.deleted");
                        changed
                    }
                    Step::Update(cell) => {
                        let changed = connection
                            .prepare_cached(update(*table))?
                            .execute(params![cell, attribute_type, object])?;
                        point("db.updated");
                        changed
                    }
                    Step::Insert(cell) => {
                        let changed = connection
                            .prepare_cached(insert(*table))?
                            .execute(params![cell, attribute_type, object])?;
                        point("db.inserted");
                        changed
                    }
                };
            if changed == 0 {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

fn table(kind: Kind) -> Table {
    match kind {
        Kind::Bool => Table::Boolean,
        Kind::Ulong => Table::Integer,
        Kind::Bytes | Kind::Mechs => Table::Binary,
        Kind::Map => Table::Array,
    }
}

/// That a database can hold an attribute of this type and kind.
///
/// # Errors
/// [`crate::error::ErrorKind::Invalid`].
pub(super) fn check_key(key: AttributeKey) -> Result<()> {
    cell(key, &Value::some_of(key.kind)).map(drop)
}

/// A value as it is stored, if [`super::snapshot`] would make the same of it again.
fn cell(key: AttributeKey, value: &Value) -> Result<Cell> {
    let refuse = |reason: &str| {
        let name = pkcs11::attribute_name(key.attribute_type)
            .map_or_else(|| format!("{:#010x}", key.attribute_type), str::to_owned);
        let detail = format!("{name} cannot be stored in a database: {reason}");
        Err(Error::new(ErrorKind::Invalid, detail))
    };
    let mechanisms = key.attribute_type == CKA_ALLOWED_MECHANISMS;
    validate::check_key(key)?;
    match value {
        Value::Bool(value) => Ok(Cell::Integer(i64::from(*value))),
        Value::Ulong(value) => Ok(Cell::Integer(value.cast_signed())),
        Value::Bytes(_) if mechanisms => {
            refuse("there, a byte string of this type is a set of mechanisms")
        }
        Value::Bytes(value) => Ok(Cell::Blob(value.clone())),
        Value::Mechs(value) if mechanisms => Ok(Cell::Blob(encode::mechanisms(value))),
        Value::Mechs(_) => refuse(
            "there, a set of mechanisms of any type but CKA_ALLOWED_MECHANISMS is a byte string",
        ),
        Value::Map(map) => encode::map(map)
            .map(Cell::Blob)
            .or_else(|error| refuse(&error.to_string())),
    }
}

fn insert(table: Table) -> &'static str {
    match table {
        Table::Boolean => "insert into attribute_boolean (value, type, object_id) values (?, ?, ?)",
        Table::Integer => "insert into attribute_integer (value, type, object_id) values (?, ?, ?)",
        Table::Binary => "insert into attribute_binary (value, type, object_id) values (?, ?, ?)",
        Table::Array => "insert into attribute_array (value, type, object_id) values (?, ?, ?)",
    }
}

fn update(table: Table) -> &'static str {
    match table {
        Table::Boolean => "update attribute_boolean set value = ? where type = ? and object_id = ?",
        Table::Integer => "update attribute_integer set value = ? where type = ? and object_id = ?",
        Table::Binary => "update attribute_binary set value = ? where type = ? and object_id = ?",
        Table::Array => "update attribute_array set value = ? where type = ? and object_id = ?",
    }
}

fn delete(table: Table) -> &'static str {
    match table {
        Table::Boolean => "delete from attribute_boolean where type = ? and object_id = ?",
        Table::Integer => "delete from attribute_integer where type = ? and object_id = ?",
        Table::Binary => "delete from attribute_binary where type = ? and object_id = ?",
        Table::Array => "delete from attribute_array where type = ? and object_id = ?",
    }
}

/// Remembers the name of an object that is new.
pub(super) fn remember_name(
    connection: &Connection,
    object: i64,
    name: &str,
) -> rusqlite::Result<()> {
    connection
        .prepare_cached("insert into attribute_text (value, type, object_id) values (?, ?, ?)")?
        .execute(params![name, CKA_TOKENFS_UUID.cast_signed(), object])?;
    point("db.named");
    Ok(())
}

/// Forgets the name of an object: it has the derived one from then on.
pub(super) fn forget_name(connection: &Connection, object: i64) -> rusqlite::Result<()> {
    connection
        .prepare_cached("delete from attribute_text where type = ? and object_id = ?")?
        .execute(params![CKA_TOKENFS_UUID.cast_signed(), object])?;
    Ok(())
}

/// Sees to it that no object gets the row `object`, which is above all that there have been, unless it is asked for.
pub(super) fn use_up(connection: &Connection, object: i64) -> rusqlite::Result<()> {
    // SQLite remembers the highest one.
    connection
        .prepare_cached("insert into object (id) values (?)")?
        .execute([object])?;
    connection
        .prepare_cached("delete from object where id = ?")?
        .execute([object])?;
    Ok(())
}

/// Remembers when an object was modified.
pub(super) fn remember_time(
    connection: &Connection,
    object: i64,
    text: &str,
) -> rusqlite::Result<()> {
    let attribute_type = CKA_TOKENFS_TIMES.cast_signed();
    let known = connection
        .prepare_cached("update attribute_text set value = ? where type = ? and object_id = ?")?
        .execute(params![text, attribute_type, object])?;
    if known == 0 {
        return remember_first_time(connection, object, text);
    }
    point("db.timed");
    Ok(())
}

/// The same of an object that is new, for which the rows of all others need not be looked at.
pub(super) fn remember_first_time(
    connection: &Connection,
    object: i64,
    text: &str,
) -> rusqlite::Result<()> {
    connection
        .prepare_cached("insert into attribute_text (value, type, object_id) values (?, ?, ?)")?
        .execute(params![text, CKA_TOKENFS_TIMES.cast_signed(), object])?;
    point("db.timed");
    Ok(())
}

/// The highest id that an object has or had, as far as the database knows.
pub(super) fn highest(connection: &Connection) -> rusqlite::Result<i64> {
    let present = connection
        .prepare_cached("select max(id) from object")?
        .query_row([], |row| row.get::<_, Option<i64>>(0))?;
    // It is there as long as there is a table with `autoincrement`.
    let counted = connection
        .prepare_cached("select 1 from sqlite_master where name = 'sqlite_sequence'")?
        .exists([])?;
    let past = if counted {
        connection
            .prepare_cached("select max(seq) from sqlite_sequence where name = 'object'")?
            .query_row([], |row| row.get::<_, Option<i64>>(0))?
    } else {
        None
    };
    Ok(present.max(past).unwrap_or(0))
}

/// A new row in `object`: the row `wanted` if there is one and it is free, otherwise one that never was. Says which, and whether it
/// is the wanted one.
pub(super) fn new_row(
    connection: &Connection,
    wanted: Option<i64>,
) -> rusqlite::Result<(i64, bool)> {
    if let Some(wanted) = wanted
        && !connection
            .prepare_cached("select 1 from object where id = ?")?
            .exists([wanted])?
    {
        connection
            .prepare_cached("insert into object (id) values (?)")?
            .execute([wanted])?;
        point("db.row");
        return Ok((wanted, true));
    }
    connection
        .prepare_cached("insert into object default values")?
        .execute([])?;
    point("db.row");
    Ok((connection.last_insert_rowid(), false))
}

/// Removes the row of an object and all that belongs to it.
pub(super) fn remove(connection: &Connection, object: i64) -> rusqlite::Result<()> {
    for table in CHILDREN {
        if !cascades(connection, table)? {
            remove_children(connection, table, object)?;
        }
    }
    connection
        .prepare_cached("delete from object where id = ?")?
        .execute([object])?;
    point("db.removed");
    Ok(())
}

/// Removes what an object left behind that was deleted by somebody without foreign keys: the next object in its row would have it.
pub(super) fn remove_leftovers(connection: &Connection, object: i64) -> rusqlite::Result<()> {
    for table in CHILDREN {
        remove_children(connection, table, object)?;
    }
    Ok(())
}

fn remove_children(connection: &Connection, table: &str, object: i64) -> rusqlite::Result<()> {
    let there = connection
        .prepare_cached("select 1 from sqlite_master where type = 'table' and name = ?")?
        .exists([table])?;
    if there {
        // One of `CHILDREN`.
        connection
            .prepare_cached(&format!("delete from {table} where object_id = ?"))?
            .execute([object])?;
    }
    Ok(())
}

/// Whether the rows of a table go with their object by themselves.
fn cascades(connection: &Connection, table: &str) -> rusqlite::Result<bool> {
    connection
        .prepare_cached(
            "select 1 from pragma_foreign_key_list(?) where \"table\" = 'object' collate nocase
             and \"from\" = 'object_id' collate nocase and on_delete = 'CASCADE'",
        )?
        .exists([table])
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    fn with(values: &[(AttributeType, Value)]) -> Attributes {
        let mut attributes = Attributes::new();
        for (attribute_type, value) in values {
            attributes.insert(*attribute_type, value.clone());
        }
        attributes
    }

    #[test]
    fn only_what_changes_is_written() {
        let old = with(&[
            (1, Value::Bool(true)),
            (2, Value::Bool(true)),
            (3, Value::Bytes(b"a".to_vec())),
            (4, Value::Ulong(4)),
        ]);
        let new = with(&[
            (1, Value::Bool(true)),
            (2, Value::Bool(false)),
            (4, Value::Bytes(b"b".to_vec())),
            (5, Value::Ulong(u64::MAX)),
        ]);
        let plan = Plan::new(&old, &new).unwrap();
        assert_eq!(
            plan.0,
            [
                (Table::Binary, 3, Step::Delete),
                (Table::Integer, 4, Step::Delete),
                (Table::Boolean, 2, Step::Update(Cell::Integer(0))),
                (Table::Binary, 4, Step::Insert(Cell::Blob(b"b".to_vec()))),
                (Table::Integer, 5, Step::Insert(Cell::Integer(-1))),
            ]
        );
        assert_eq!(Plan::new(&old, &old).unwrap(), Plan::default());
    }

    #[test]
    fn what_would_come_back_as_something_else_is_refused() {
        let set = || BTreeSet::from([0x40]);
        let nested = with(&[(1, Value::Map(Attributes::new()))]);
        for (attribute_type, value, says) in [
            (3, Value::Mechs(set()), "CKA_LABEL cannot"),
            (
                CKA_ALLOWED_MECHANISMS,
                Value::Bytes(vec![0; 8]),
                "CKA_ALLOWED_MECHANISMS cannot",
            ),
            (0x4000_0211, Value::Map(nested), "hold another one"),
        ] {
            let new = with(&[(attribute_type, value)]);
            let error = Plan::new(&Attributes::new(), &new).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Invalid);
            assert!(error.to_string().contains(says), "{error}");
            // What is there already stays.
            assert!(Plan::new(&new, &new).is_ok());
        }
        let good = with(&[(CKA_ALLOWED_MECHANISMS, Value::Mechs(set()))]);
        assert!(Plan::new(&Attributes::new(), &good).is_ok());
    }
}
