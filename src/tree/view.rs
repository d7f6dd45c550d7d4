//! From a node to what it is: its attributes, its children, its content.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;

use super::name::Name;
use super::node::Node;
use super::slot::{Slot, map_key};
use super::text::Context;
use super::{Attributes, FileKind, Tree, by_label, lock, mode, name, text};
use crate::error::{Error, ErrorKind, Result};
use crate::store::attribute::{AttributeKey, AttributeType, Kind, Value};
use crate::store::layout::LayoutFile;
use crate::store::{Metadata, Object, ObjectId, ObjectName, Patience, TokenName};

/// The directory of everything derived, in the root and not listed there.
pub(crate) const CONTROL: &str = ".tokenfs";

/// The directory of the token's own attributes.
pub(crate) const TOKEN: &str = "token";

/// The names in `.tokenfs`.
pub(super) const BY_LABEL: &str = "by-label";
pub(crate) const LAYOUT: &str = "file";
pub(crate) const LOG: &str = "log";
pub(crate) const SERVER: &str = "server";

impl Tree {
    /// The child `name` of `directory`. That it exists is for [`Tree::describe`] to find out.
    pub(super) fn child(&self, directory: &Node, name: &OsStr, patience: Patience) -> Result<Node> {
        let absent = || Error::not_found("no such file or directory");
        if let Some(id) = lock(&self.scratch).find(directory, name) {
            return Ok(Node::Scratch(id));
        }
        match directory {
            Node::Scratch(id) => match lock(&self.scratch).get(*id)?.kind() {
                FileKind::Directory => Err(absent()),
                _ => Err(not_a_directory()),
            },
            Node::Root if name == CONTROL => Ok(Node::Control),
            Node::Root => TokenName::new(name).map(Node::Token).ok_or_else(absent),
            Node::Token(token) if name == TOKEN => Ok(Node::Object(token.clone(), ObjectId::Token)),
            Node::Token(token) => {
                let object = ObjectName::new(name).ok_or_else(absent)?;
                Ok(Node::Object(token.clone(), ObjectId::Object(object)))
            }
            Node::Object(token, id) => {
                // Also of a name that can be no attribute: in a damaged object nobody can tell what there is.
                self.object(token, id, patience)?;
                let key = attribute_key(name).ok_or_else(absent)?;
                Ok(Node::Attribute(token.clone(), id.clone(), key))
            }
            Node::Attribute(token, id, map) if map.kind == Kind::Map => {
                let key = attribute_key(name).ok_or_else(absent)?;
                Ok(Node::MapEntry(
                    token.clone(),
                    id.clone(),
                    map.attribute_type,
                    key,
                ))
            }
            Node::Control if name == BY_LABEL => Ok(Node::ByLabel),
            Node::Control if name == LAYOUT => Ok(Node::Layout),
            Node::Control if name == LOG => Ok(Node::Log),
            Node::Control if name == SERVER && self.settings.server.is_some() => Ok(Node::Server),
            Node::Control => Err(absent()),
            Node::ByLabel => {
                let tokens = self.tokens_by_label(patience)?;
                tokens.get(name).map(Node::TokenByLabel).ok_or_else(absent)
            }
            Node::TokenByLabel(token) => {
                let objects = self.objects_by_label(token, patience)?;
                let object = objects.get(name).ok_or_else(absent)?;
                Ok(Node::ObjectByLabel(token.clone(), object))
            }
            Node::Layout => TokenName::new(name)
                .map(Node::TokenLayout)
                .ok_or_else(absent),
            Node::TokenLayout(token) => {
                let file = LayoutFile::parse(name).ok_or_else(absent)?;
                Ok(Node::FileInLayout(token.clone(), file))
            }
            Node::Attribute(..)
            | Node::MapEntry(..)
            | Node::Log
            | Node::Server
            | Node::ObjectByLabel(..)
            | Node::FileInLayout(..) => Err(not_a_directory()),
        }
    }

    /// What `stat` says of `node`, and of which version of which object.
    pub(super) fn describe(
        &self,
        node: &Node,
        patience: Patience,
    ) -> Result<(Attributes, Option<Arc<Object>>)> {
        let mask = self.settings.mask;
        Ok(match node {
            Node::Root | Node::Control | Node::Layout => {
                let metadata = self.store.metadata()?;
                (directory(&metadata, metadata.mode), None)
            }
            Node::Token(token) => {
                let metadata = self.ask(token, patience, |token| token.metadata())?;
                let own = mode::of_token(metadata.mode, mask);
                let mut attributes = directory(&metadata, own);
                let drafts = lock(&self.drafts);
                if let Some(changed) = drafts.changed(token) {
                    (attributes.mtime, attributes.ctime) = (changed, changed);
                } else if let Some(given) = drafts.kept_time(token) {
                    // Which it has for good once what is being written is there.
                    attributes.mtime = given;
                }
                drop(drafts);
                (attributes, None)
            }
            Node::TokenLayout(token) => {
                let metadata = self.stored_token(token)?.metadata()?;
                let own = mode::of_token(metadata.mode, mask);
                (directory(&metadata, own), None)
            }
            Node::FileInLayout(token, file) => {
                (self.describe_in_layout(token, file, patience)?, None)
            }
            // What their names tell is in files: nobody may list them who may not read all of those.
            Node::ByLabel => {
                let metadata = self.store.metadata()?;
                let names = self.tokens_by_label(patience)?;
                let own = names.mode(&metadata, metadata.mode, mask);
                (directory(&metadata, own), None)
            }
            Node::TokenByLabel(token) => {
                let metadata = self.token(token)?.metadata()?;
                let names = self.objects_by_label(token, patience)?;
                let own = names.mode(&metadata, mode::of_token(metadata.mode, mask), mask);
                (directory(&metadata, own), None)
            }
            Node::Scratch(id) => {
                let became = lock(&self.scratch).became(*id);
                match became {
                    Some(node) => self.describe(&node, patience)?,
                    None => (lock(&self.scratch).get(*id)?.attributes(), None),
                }
            }
            Node::Object(token, id) => {
                let metadata = self.object_metadata(token, id, patience)?;
                (
                    directory(&metadata, mode::of_object(metadata.mode, mask)),
                    None,
                )
            }
            Node::Attribute(token, id, _) | Node::MapEntry(token, id, _, _) => {
                let object = self.object(token, id, patience)?;
                let described = match (value(node, &object), self.fresh_size(node)) {
                    (None, Some(size)) => Attributes {
                        size,
                        ..file(&object.metadata, mask)
                    },
                    _ => self.describe_version(node, &object)?,
                };
                (described, Some(object))
            }
            Node::Log | Node::Server => (self.describe_control_file(node), None),
            Node::ObjectByLabel(token, object) => {
                let id = ObjectId::Object(object.clone());
                let metadata = self.token(token)?.object_metadata(&id, patience)?;
                let attributes = Attributes {
                    kind: FileKind::Link,
                    size: by_label::target(token, object).len() as u64,
                    ..directory(&metadata, 0o777)
                };
                (attributes, None)
            }
        })
    }

    /// What `stat` says of an attribute in a version of its object.
    pub(super) fn describe_version(&self, node: &Node, object: &Object) -> Result<Attributes> {
        let metadata = &object.metadata;
        let mask = self.settings.mask;
        let described = match content_length(node, object)? {
            Some(size) => Attributes {
                size,
                ..file(metadata, mask)
            },
            None => directory(metadata, mode::of_object(metadata.mode, mask)),
        };
        Ok(Attributes {
            mtime: self.date_of(node, object),
            ..described
        })
    }

    /// The text of a file in `.tokenfs`.
    pub(super) fn control_file(&self, node: &Node) -> String {
        match node {
            Node::Server => self.settings.server.clone().unwrap_or_default(),
            _ => self.diagnostics.render(),
        }
    }

    fn describe_control_file(&self, node: &Node) -> Attributes {
        let latest = match node {
            Node::Log => self.diagnostics.latest(),
            _ => None,
        };
        let latest = latest.unwrap_or(self.mounted_at);
        Attributes {
            ino: 0,
            kind: FileKind::File,
            size: self.control_file(node).len() as u64,
            mode: 0o600,
            uid: self.settings.uid,
            gid: self.settings.gid,
            atime: latest,
            mtime: latest,
            ctime: latest,
        }
    }

    /// What is listed in `directory`.
    pub(super) fn children(
        &self,
        directory: &Node,
        patience: Patience,
    ) -> Result<Vec<(OsString, FileKind, Node)>> {
        let as_directory = |name: OsString, node| (name, FileKind::Directory, node);
        Ok(match directory {
            Node::Root => {
                let tokens = self.store.tokens()?.into_iter();
                tokens
                    .filter(|token| token.as_os_str() != CONTROL || self.shadowed(token))
                    .map(|token| as_directory(token.as_os_str().into(), Node::Token(token.clone())))
                    .collect()
            }
            Node::Token(token) => {
                // The token's own comes last: who copies in this order makes a token of it when all its objects are there, and who
                // removes in this order leaves a token until the end.
                let mut listed: Vec<_> = self
                    .objects(token, patience)?
                    .into_iter()
                    .map(|object| {
                        let id = ObjectId::Object(object.clone());
                        let node = Node::Object(token.clone(), id);
                        as_directory(object.as_os_str().into(), node)
                    })
                    .collect();
                if self.has_own(token) {
                    let own = Node::Object(token.clone(), ObjectId::Token);
                    listed.push(as_directory(TOKEN.into(), own));
                }
                listed
            }
            Node::Object(token, id) => {
                let object = self.object(token, id, patience)?;
                let mut listed = listed(&object.attributes, |key| {
                    Node::Attribute(token.clone(), id.clone(), key)
                });
                self.add_fresh(token, id, None, &mut listed);
                listed
            }
            Node::Attribute(token, id, map) => {
                let object = self.object(token, id, patience)?;
                match value(directory, &object) {
                    Some(Value::Map(entries)) => {
                        let mut listed = listed(entries, |key| {
                            Node::MapEntry(token.clone(), id.clone(), map.attribute_type, key)
                        });
                        self.add_fresh(token, id, Some(map.attribute_type), &mut listed);
                        listed
                    }
                    Some(_) => return Err(not_a_directory()),
                    None if self.fresh_size(directory).is_some() => return Err(not_a_directory()),
                    None => return Err(gone()),
                }
            }
            Node::Control => {
                let mut listed = vec![
                    as_directory(BY_LABEL.into(), Node::ByLabel),
                    as_directory(LAYOUT.into(), Node::Layout),
                    (LOG.into(), FileKind::File, Node::Log),
                ];
                if self.settings.server.is_some() {
                    listed.push((SERVER.into(), FileKind::File, Node::Server));
                }
                listed
            }
            Node::ByLabel => {
                let tokens = self.tokens_by_label(patience)?;
                tokens
                    .iter()
                    .map(|(name, token)| {
                        as_directory(name.clone(), Node::TokenByLabel(token.clone()))
                    })
                    .collect()
            }
            Node::TokenByLabel(token) => {
                let objects = self.objects_by_label(token, patience)?;
                objects
                    .iter()
                    .map(|(name, object)| {
                        let node = Node::ObjectByLabel(token.clone(), object.clone());
                        (name.clone(), FileKind::Link, node)
                    })
                    .collect()
            }
            Node::Layout => self.tokens_in_layout()?,
            Node::TokenLayout(token) => self.files_in_layout(token, patience)?,
            Node::Scratch(_) => {
                let scratch = lock(&self.scratch);
                let names = scratch.names(directory).ok_or_else(not_a_directory)?;
                names
                    .iter()
                    .map(|(name, id)| {
                        Ok((name.clone(), scratch.get(*id)?.kind(), Node::Scratch(*id)))
                    })
                    .collect::<Result<_>>()?
            }
            Node::MapEntry(..)
            | Node::Log
            | Node::Server
            | Node::ObjectByLabel(..)
            | Node::FileInLayout(..) => {
                return Err(not_a_directory());
            }
        })
    }

    /// The files in an object, or in a map, that were created and have no value yet.
    fn add_fresh(
        &self,
        token: &TokenName,
        id: &ObjectId,
        map: Option<AttributeType>,
        listed: &mut Vec<(OsString, FileKind, Node)>,
    ) {
        let drafts = lock(&self.drafts);
        if let Some(draft) = drafts.get(&(token.clone(), id.clone())) {
            let fresh = draft.fresh.keys().filter(|slot| slot.map == map);
            let mut more: BTreeMap<OsString, Node> = fresh
                .map(|slot| {
                    let name = OsString::from(&*name::file_name(slot.key));
                    (name, slot.node(token, id))
                })
                .collect();
            if more.is_empty() {
                return;
            }
            // What has a value by now is listed already.
            for (name, _, _) in &*listed {
                more.remove(name);
            }
            listed.extend(
                more.into_iter()
                    .map(|(name, node)| (name, FileKind::File, node)),
            );
        }
    }

    /// The size of a file that was created and has no value yet.
    fn fresh_size(&self, node: &Node) -> Option<u64> {
        let (token, id, slot) = Slot::of(node)?;
        let drafts = lock(&self.drafts);
        let bytes = drafts.get(&(token.clone(), id.clone()))?.fresh.get(&slot)?;
        Some(lock(bytes).len() as u64)
    }

    /// A token that nobody can get at, since the tree has that name for something else.
    fn shadowed(&self, token: &TokenName) -> bool {
        self.diagnostics.warning(format!(
            "{}: the token in the directory {token} is not shown, since that name is taken; rename the directory",
            self.store.path().display()
        ));
        false
    }
}

fn attribute_key(file: &OsStr) -> Option<AttributeKey> {
    match name::parse(file.as_bytes()) {
        Name::Attribute(key) => Some(key),
        Name::Impossible | Name::Scratch => None,
    }
}

fn listed(
    attributes: &crate::store::attribute::Attributes,
    node: impl Fn(AttributeKey) -> Node,
) -> Vec<(OsString, FileKind, Node)> {
    attributes
        .iter()
        .map(|(key, value)| {
            let kind = match value {
                Value::Map(_) => FileKind::Directory,
                _ => FileKind::File,
            };
            (OsString::from(&*name::file_name(key)), kind, node(key))
        })
        .collect()
}

/// The value that `node` stands for in a version of its object.
pub(super) fn value<'a>(node: &Node, object: &'a Object) -> Option<&'a Value> {
    match node {
        Node::Attribute(_, _, key) => object.attributes.get(*key),
        Node::MapEntry(_, _, map, key) => match object.attributes.get(map_key(*map)) {
            Some(Value::Map(entries)) => entries.get(*key),
            _ => None,
        },
        _ => None,
    }
}

/// The text of the value that `node` stands for; nothing if it is a directory.
pub(super) fn content(node: &Node, object: &Object) -> Result<Option<Vec<u8>>> {
    with_text(node, object, |key, value, context| {
        text::render(key.attribute_type, value, context).map(Cow::into_owned)
    })
}

fn content_length(node: &Node, object: &Object) -> Result<Option<u64>> {
    with_text(node, object, |key, value, context| {
        text::length(key.attribute_type, value, context)
    })
}

fn with_text<T>(
    node: &Node,
    object: &Object,
    ask: impl FnOnce(AttributeKey, &Value, Context) -> Result<T>,
) -> Result<Option<T>> {
    let (Node::Attribute(_, _, key) | Node::MapEntry(_, _, _, key)) = node else {
        return Ok(None);
    };
    match value(node, object).ok_or_else(gone)? {
        Value::Map(_) => Ok(None),
        value => ask(*key, value, context(node, object)).map(Some),
    }
}

/// Whether what `node` stands for reads the same in both versions of its object.
pub(super) fn same_text(node: &Node, old: &Arc<Object>, new: &Arc<Object>) -> bool {
    Arc::ptr_eq(old, new)
        || (value(node, old) == value(node, new) && context(node, old) == context(node, new))
}

/// What the text of an attribute depends on: the object that it is in, or the map.
fn context(node: &Node, object: &Object) -> Context {
    match node {
        Node::MapEntry(_, _, map, _) => match object.attributes.get(map_key(*map)) {
            Some(Value::Map(entries)) => Context::of(entries),
            _ => Context::default(),
        },
        _ => Context::of(&object.attributes),
    }
}

fn directory(metadata: &Metadata, mode: u32) -> Attributes {
    Attributes {
        ino: 0,
        kind: FileKind::Directory,
        size: 0,
        mode,
        uid: metadata.uid,
        gid: metadata.gid,
        atime: metadata.atime,
        mtime: metadata.mtime,
        ctime: metadata.ctime,
    }
}

/// An empty file in an object.
pub(super) fn file(metadata: &Metadata, mask: u32) -> Attributes {
    Attributes {
        kind: FileKind::File,
        mode: mode::of_attribute(metadata.mode, mask),
        ..directory(metadata, 0)
    }
}

fn not_a_directory() -> Error {
    Error::new(ErrorKind::NotADirectory, "not a directory")
}

fn gone() -> Error {
    Error::not_found("the attribute is gone")
}
