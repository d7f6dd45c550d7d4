//! `tokenfs tree`: the store with its labels and classes, without a mount.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{self, Write};
use std::sync::Arc;

use super::Failure;
use super::args::TreeArgs;
use super::mount::{configuration, one_token};
use super::select::chosen;
use crate::diagnostics::Diagnostics;
use crate::error::{Error, ErrorKind, Result};
use crate::fuse::mount::check_tokendir;
use crate::pkcs11::{self, Symbols};
use crate::store::{self, Object, ObjectId, Patience, Store, Token};
use crate::tree::label;

/// What an object may be used for, in the order in which it is said.
const USES: [(u64, &str); 9] = [
    (pkcs11::CKA_ENCRYPT, "encrypt"),
    (pkcs11::CKA_DECRYPT, "decrypt"),
    (pkcs11::CKA_SIGN, "sign"),
    (pkcs11::CKA_VERIFY, "verify"),
    (pkcs11::CKA_WRAP, "wrap"),
    (pkcs11::CKA_UNWRAP, "unwrap"),
    (pkcs11::CKA_DERIVE, "derive"),
    (pkcs11::CKA_SENSITIVE, "sensitive"),
    (pkcs11::CKA_EXTRACTABLE, "extractable"),
];

/// The most bytes of a label that a line shows.
const LONGEST_LABEL: usize = 64;

/// Prints the store, or one token of it.
///
/// # Errors
/// See [`Failure`]. What can be read is printed all the same.
pub fn run(args: &TreeArgs) -> Result<(), Failure> {
    let (config, warnings) = configuration(&args.store, None)?;
    for warning in &warnings {
        eprintln!("tokenfs: warning: {warning}");
    }
    let options = store::Options {
        backend: config.backend,
        // What only looks does not roll anything back either.
        read_only: true,
        ..store::Options::default()
    };
    let tokendir = check_tokendir(&config.tokendir)?;
    if let Some(warning) = one_token(&tokendir) {
        eprintln!("tokenfs: warning: {warning}");
    }
    let store = Store::open(&tokendir, options, Arc::new(Diagnostics::new()))?;
    let patience = Patience::at_most(store.options().lock_wait);
    let tokens = chosen(&store, args.token.as_slice(), patience)?;

    let mut out = format!("{}\n", store.path().display());
    let mut failures = Vec::new();
    for (index, token) in tokens.iter().enumerate() {
        let last = index + 1 == tokens.len();
        let outcome = store
            .token(token)
            .and_then(|token| print_token(&mut out, &*token, last, &mut failures));
        if let Err(error) = outcome {
            failures.push(error);
        }
    }
    match io::stdout().write_all(out.as_bytes()) {
        // Whoever reads has seen enough.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
        Err(error) => return Err(Error::io("write to stdout", &error).into()),
        Ok(()) => {}
    }
    let Some(last) = failures.pop() else {
        return Ok(());
    };
    let mut said = std::collections::HashSet::from([last.to_string()]);
    for failure in failures {
        if said.insert(failure.to_string()) {
            eprintln!("tokenfs: {failure}");
        }
    }
    Err(last.into())
}

fn print_token(
    out: &mut String,
    token: &dyn Token,
    last: bool,
    failures: &mut Vec<Error>,
) -> Result<()> {
    let (branch, trunk) = if last {
        ("└── ", "    ")
    } else {
        ("├── ", "│   ")
    };
    let _ = write!(out, "{branch}{}  ", token.name());
    let patience = || Patience::at_most(store::Options::default().lock_wait);
    match token.object(&ObjectId::Token, patience()) {
        Ok(own) => out.push_str(&token_line(&own)),
        Err(error) => {
            out.push_str(&trouble(&error));
            failures.push(error);
        }
    }
    let listing = match token.list(patience()) {
        Ok(listing) => listing,
        Err(error) => {
            out.push('\n');
            return Err(error);
        }
    };
    let count = listing.len();
    let objects = if count == 1 { "object" } else { "objects" };
    let _ = writeln!(out, "  ({}, {count} {objects})", token.backend());
    // By class and label, as one looks for them.
    let mut lines: BTreeMap<(String, String), String> = BTreeMap::new();
    for name in listing.iter() {
        let line = match token.object(&ObjectId::Object(name.clone()), patience()) {
            Ok(object) => object_line(&object),
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            Err(error) => {
                let line = trouble(&error);
                failures.push(error);
                line
            }
        };
        lines.insert((line.clone(), name.to_string()), line);
    }
    let count = lines.len();
    for (index, ((_, name), line)) in lines.into_iter().enumerate() {
        let branch = if index + 1 == count {
            "└── "
        } else {
            "├── "
        };
        let _ = writeln!(out, "{trunk}{branch}{name}  {line}");
    }
    Ok(())
}

/// What is wrong, in a word; the sentence comes behind the tree.
fn trouble(error: &Error) -> String {
    match error.kind() {
        ErrorKind::Damaged => "damaged",
        ErrorKind::PermissionDenied => "permission denied",
        ErrorKind::Busy => "locked by another process",
        _ => "cannot be read",
    }
    .to_owned()
}

fn token_line(own: &Object) -> String {
    let label = own.attributes.bytes(pkcs11::CKA_OS_TOKENLABEL);
    let flags = own.attributes.ulong(pkcs11::CKA_OS_TOKENFLAGS);
    let pin = match flags {
        Some(flags) if flags & pkcs11::CKF_USER_PIN_INITIALIZED == 0 => "  no user PIN",
        Some(flags) if flags & pkcs11::CKF_USER_PIN_LOCKED != 0 => "  user PIN locked",
        _ => "",
    };
    format!(
        "\"{}\"{pin}",
        label::shown(label::unpadded(label.unwrap_or_default()))
    )
}

/// Class, kind of key, label, and what it is for.
fn object_line(object: &Object) -> String {
    let attributes = &object.attributes;
    let mut line = match attributes.ulong(pkcs11::CKA_CLASS) {
        Some(class) => pkcs11::class_word(class),
        None => "no class".to_owned(),
    };
    if let Some(key_type) = attributes.ulong(pkcs11::CKA_KEY_TYPE) {
        let name = Symbols::KeyTypes.name(key_type);
        let name = name.map_or_else(|| format!("{key_type:#x}"), |name| name.replace("CKK_", ""));
        let _ = write!(line, " {name}");
    }
    let private = attributes.boolean(pkcs11::CKA_PRIVATE) == Some(true);
    let modulus = attributes
        .bytes(pkcs11::CKA_MODULUS)
        .filter(|modulus| !private && !modulus.is_empty())
        .map(|modulus| 8 * modulus.len() as u64);
    let bits = attributes
        .ulong(pkcs11::CKA_MODULUS_BITS)
        .filter(|bits| *bits > 0 && *bits != pkcs11::CK_UNAVAILABLE_INFORMATION);
    let length = attributes
        .ulong(pkcs11::CKA_VALUE_LEN)
        .filter(|bytes| *bytes > 0 && *bytes < u64::MAX / 8)
        .map(|bytes| 8 * bytes);
    if let Some(bits) = bits.or(modulus).or(length) {
        let _ = write!(line, " {bits}");
    }
    match attributes.bytes(pkcs11::CKA_LABEL) {
        Some(_) if private => line.push_str("  (label needs the PIN)"),
        Some(bytes) => {
            let (label, cut) = label::encode(bytes, LONGEST_LABEL);
            let _ = write!(line, "  \"{label}{}\"", if cut { "…" } else { "" });
        }
        None => line.push_str("  (no label)"),
    }
    if private {
        line.push_str("  private");
    }
    let is_key = attributes.of_type(pkcs11::CKA_KEY_TYPE).is_some();
    for (attribute, word) in USES {
        if is_key && attributes.boolean(attribute) == Some(true) {
            let _ = write!(line, " {word}");
        }
    }
    line
}
