//! What the tests of writing in the `file` backend share: a live SoftHSM and a store on the same tokendir.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, dead_code)]

use std::collections::BTreeSet;
use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::support::template::{boolean, bytes, ulong};
use crate::support::*;
use tokenfs::diagnostics::Diagnostics;
use tokenfs::error::Result;
use tokenfs::store::attribute::Value;
use tokenfs::store::file::FileToken;
use tokenfs::store::{Access, ObjectId, ObjectName, Options, Patience, Store, Token, TokenName};

pub const LABEL: u64 = 3;
pub const ID: u64 = 0x102;

pub fn patient() -> Patience {
    Patience::at_most(Duration::from_secs(20))
}

/// Ends the other threads of a test, also when this one panics.
pub struct Over<'a>(pub &'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

pub struct Side {
    pub softhsm: Softhsm,
    pub client: P11,
    pub store: Store,
    pub log: Arc<Diagnostics>,
}

pub fn side() -> Side {
    let (softhsm, client) = Softhsm::with_token(crate::support::Backend::File);
    let log = Arc::new(Diagnostics::new());
    let store = Store::open(&softhsm.tokendir, Options::default(), Arc::clone(&log)).unwrap();
    Side {
        softhsm,
        client,
        store,
        log,
    }
}

impl Side {
    pub fn token(&self) -> Arc<dyn Token> {
        let names = self.store.tokens().unwrap();
        self.store.token(&names[0]).unwrap()
    }

    pub fn file_token(&self) -> FileToken {
        let tokendir = File::open(&self.softhsm.tokendir).unwrap();
        let path = self.softhsm.token_directory();
        FileToken::open(
            std::os::fd::AsFd::as_fd(&tokendir),
            TokenName::new(path.file_name().unwrap()).unwrap(),
            &path,
            Options::default(),
            Arc::clone(&self.log),
        )
        .unwrap()
    }

    /// A public key with a label, which is no secret: its handle and its name.
    pub fn key(&mut self, label: &str) -> (u64, ObjectName) {
        let before: BTreeSet<_> = self
            .token()
            .list(patient())
            .unwrap()
            .iter()
            .cloned()
            .collect();
        let (public, private) = self
            .client
            .generate_pair(
                0,
                &[
                    boolean(1, true),
                    boolean(2, false),
                    bytes(LABEL, label),
                    ulong(0x121, 1024),
                    bytes(0x122, [1, 0, 1]),
                ],
                &[boolean(1, false), boolean(2, false)],
            )
            .unwrap();
        self.client.destroy(private).unwrap();
        let after = self.token().list(patient()).unwrap();
        let mut new = after.iter().filter(|name| !before.contains(name));
        (public, new.next().unwrap().clone())
    }

    pub fn path(&self, name: &ObjectName, suffix: &str) -> PathBuf {
        self.softhsm
            .token_directory()
            .join(format!("{name}{suffix}"))
    }
}

pub fn id(name: &ObjectName) -> ObjectId {
    ObjectId::Object(name.clone())
}

pub fn name(name: &str) -> ObjectName {
    ObjectName::new(name.as_ref()).unwrap()
}

pub fn set(token: &dyn Token, object: &ObjectId, attribute_type: u64, value: &[u8]) -> Result<()> {
    token.update(
        object,
        &mut |attributes| {
            attributes.insert(attribute_type, Value::Bytes(value.to_vec()));
            Ok(())
        },
        None,
        patient(),
    )
}

pub fn get(token: &dyn Token, object: &ObjectId, attribute_type: u64) -> Vec<u8> {
    let object = token.object(object, patient()).unwrap();
    object.attributes.bytes(attribute_type).unwrap().to_vec()
}

pub fn access() -> Access {
    Access {
        mode: 0o600,
        uid: nix::unistd::getuid().as_raw(),
        gid: nix::unistd::getgid().as_raw(),
    }
}
