//! Operations on a store, through the store layer alone, in a process that a test can kill at any system call.
//!
//! `step BACKEND TOKENDIR OPERATION ARGUMENT… [, OPERATION ARGUMENT…]…`; exit 0 when all are done, 1 with the reason on standard
//! error. Between what it looks up first and the first operation it asks for [`READY`], which is in no file system, so that a
//! trace shows where the operations begin.
//!
//! | operation | |
//! |---|---|
//! | `update TOKEN OBJECT TYPE HEX [SECONDS]` | sets a byte string, and the time; the object `-` is the token itself |
//! | `unset TOKEN OBJECT TYPE` | removes it |
//! | `create TOKEN NAME LIKE [SECONDS]` | makes a copy of an object |
//! | `remove TOKEN NAME` | |
//! | `replace TOKEN NAME [LIKE]` | takes a damaged object away, and puts a copy of another in its place |
//! | `chmod TOKEN NAME OCTAL`, `chown TOKEN NAME UID GID`, `mtime TOKEN NAME SECONDS` | |
//! | `copy-token TOKEN NAME LABEL` | makes a token with the objects of another, with that label and another serial number |
//! | `unbuild TOKEN` | begins a token, and removes it before it is published |
//! | `remove-token TOKEN` | |
//! | `sync TOKEN` | |
//! | `recover` | |
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use std::ffi::OsStr;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokenfs::diagnostics::Diagnostics;
use tokenfs::error::Result;
use tokenfs::store::attribute::{AttributeKey, Attributes, Kind, Value};
use tokenfs::store::{
    Access, Backend, MetadataChange, NewObject, ObjectId, ObjectName, Options, Patience, Store,
    Target, Time, Token, TokenName,
};

/// Asked for right before the operations.
const READY: &str = "/tokenfs-step-ready";

fn token_name(name: &str) -> TokenName {
    TokenName::new(OsStr::new(name)).expect("the name of a token")
}

fn object_name(name: &str) -> ObjectName {
    ObjectName::new(OsStr::new(name)).expect("the name of an object")
}

fn object_id(name: &str) -> ObjectId {
    match name {
        "-" => ObjectId::Token,
        name => ObjectId::Object(object_name(name)),
    }
}

fn patience() -> Patience {
    Patience::at_most(Duration::from_secs(20))
}

fn time(seconds: &str) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(seconds.parse().unwrap())
}

fn unhex(text: &str) -> Vec<u8> {
    let digits = text.as_bytes().chunks(2);
    digits
        .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap())
        .collect()
}

/// What an operation needs to know of others, looked up before it begins.
fn access(token: &dyn Token, id: &ObjectId) -> Access {
    let metadata = token.object_metadata(id, patience()).unwrap();
    Access {
        mode: metadata.mode,
        uid: metadata.uid,
        gid: metadata.gid,
    }
}

/// An object like another one.
fn copy_of(token: &dyn Token, like: &str) -> NewObject {
    let like = object_id(like);
    NewObject {
        attributes: (token.object(&like, patience()).unwrap())
            .attributes
            .clone(),
        access: access(token, &like),
        mtime: None,
    }
}

type Operation<'a> = Box<dyn FnOnce() -> Result<()> + 'a>;

fn prepare<'a>(store: &'a Store, words: &[&'a str]) -> Operation<'a> {
    let token = |name: &str| store.token(&token_name(name)).expect("the token");
    match *words {
        [
            "update",
            name,
            object,
            attribute_type,
            value,
            ref mtime @ ..,
        ] => {
            let mtime = mtime.first().map(|seconds| time(seconds));
            let (token, id, value) = (token(name), object_id(object), unhex(value));
            let _ = token.object(&id, patience());
            let attribute_type = attribute_type.parse().unwrap();
            Box::new(move || {
                let mut edit = |attributes: &mut Attributes| {
                    attributes.insert(attribute_type, Value::Bytes(value.clone()));
                    Ok(())
                };
                token.update(&id, &mut edit, mtime, patience())
            })
        }
        ["unset", name, object, attribute_type] => {
            let (token, id) = (token(name), object_id(object));
            let attribute_type = attribute_type.parse().unwrap();
            Box::new(move || {
                let key = AttributeKey {
                    attribute_type,
                    kind: Kind::Bytes,
                };
                let mut edit = |attributes: &mut Attributes| {
                    attributes.remove(key);
                    Ok(())
                };
                token.update(&id, &mut edit, None, patience())
            })
        }
        ["create", name, object, like, ref mtime @ ..] => {
            let (token, name) = (token(name), object_name(object));
            let mut new = copy_of(&*token, like);
            new.mtime = mtime.first().map(|seconds| time(seconds));
            Box::new(move || token.create(&name, &new, patience()))
        }
        ["replace", name, object, ref like @ ..] => {
            let (token, name) = (token(name), object_name(object));
            let new = like.first().map(|like| copy_of(&*token, like));
            Box::new(move || token.replace_damaged(&name, new.as_ref(), patience()))
        }
        ["remove", name, object] => {
            let (token, name) = (token(name), object_name(object));
            Box::new(move || token.remove(&name, patience()))
        }
        ["rename", name, from, to] => {
            let (token, from, to) = (token(name), object_name(from), object_name(to));
            Box::new(move || token.rename(&from, &to, patience()))
        }
        ["chmod", name, object, mode] => {
            let (token, target) = (token(name), Target::Object(object_id(object)));
            let change = MetadataChange {
                mode: Some(u32::from_str_radix(mode, 8).unwrap()),
                ..MetadataChange::default()
            };
            Box::new(move || token.set_metadata(&target, &change, patience()))
        }
        ["chown", name, object, uid, gid] => {
            let (token, target) = (token(name), Target::Object(object_id(object)));
            let change = MetadataChange {
                uid: Some(uid.parse().unwrap()),
                gid: Some(gid.parse().unwrap()),
                ..MetadataChange::default()
            };
            Box::new(move || token.set_metadata(&target, &change, patience()))
        }
        ["mtime", name, object, seconds] => {
            let (token, target) = (token(name), Target::Object(object_id(object)));
            let change = MetadataChange {
                mtime: Some(Time::At(time(seconds))),
                ..MetadataChange::default()
            };
            Box::new(move || token.set_metadata(&target, &change, patience()))
        }
        ["copy-token", name, copy, label] => {
            let from = token(name);
            let own = from.object(&ObjectId::Token, patience()).unwrap();
            let mut own = own.attributes.clone();
            own.insert(0x8000_5349, Value::Bytes(format!("{label:32}").into()));
            own.insert(0x8000_534a, Value::Bytes("0011223344556677".into()));
            let files = access(&*from, &ObjectId::Token);
            let objects: Vec<_> = (from.list(patience()).unwrap().iter())
                .map(|name| {
                    let object = from.object(&ObjectId::Object(name.clone()), patience());
                    (object.unwrap().attributes.clone(), files)
                })
                .collect();
            let directory = from.metadata().unwrap();
            let directory = Access {
                mode: directory.mode,
                uid: directory.uid,
                gid: directory.gid,
            };
            let copy = token_name(copy);
            Box::new(move || {
                let token = store.create_token(&copy, directory, files)?;
                let mut edit = |attributes: &mut Attributes| {
                    attributes.clone_from(&own);
                    Ok(())
                };
                token.update(&ObjectId::Token, &mut edit, None, patience())?;
                for (index, (attributes, access)) in objects.iter().enumerate() {
                    let name = format!("00000000-0000-4000-9000-{index:012x}");
                    let new = NewObject {
                        attributes: attributes.clone(),
                        access: *access,
                        mtime: None,
                    };
                    token.create(&object_name(&name), &new, patience())?;
                }
                store.publish_token(&copy, patience())
            })
        }
        ["unbuild", name] => Box::new(move || {
            let (name, uid) = (token_name(name), nix::unistd::getuid().as_raw());
            let access = |mode| Access {
                mode,
                uid,
                gid: nix::unistd::getgid().as_raw(),
            };
            store.create_token(&name, access(0o700), access(0o600))?;
            store.remove_token(&name, patience())
        }),
        ["remove-token", name] => Box::new(move || {
            let name = token_name(name);
            store.remove_token(&name, patience())
        }),
        ["sync", name] => {
            let token = token(name);
            Box::new(move || token.sync(patience()))
        }
        ["recover"] => Box::new(move || {
            store.recover();
            Ok(())
        }),
        _ => panic!("no such operation: {words:?}"),
    }
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let [backend, tokendir, operations @ ..] = &words[..] else {
        panic!("step BACKEND TOKENDIR OPERATION ARGUMENT…");
    };
    let options = Options {
        backend: if *backend == "db" {
            Backend::Db
        } else {
            Backend::File
        },
        lock_wait: Duration::from_secs(20),
        ..Options::default()
    };
    let diagnostics = Arc::new(Diagnostics::new());
    let store = Store::open(Path::new(tokendir), options, diagnostics.clone()).expect("the store");
    let operations = operations.split(|word| *word == ",");
    let operations: Vec<Operation<'_>> = operations.map(|words| prepare(&store, words)).collect();
    let _ = std::fs::metadata(READY);
    for (index, operation) in operations.into_iter().enumerate() {
        if let Err(error) = operation() {
            eprintln!("operation {index}: {error}\n{}", diagnostics.render());
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}
