//! The text of a value: what is in an attribute's file, and what a file's content means.
//!
//! A byte string is its own text. Everything else is lines of one word each, a symbol or a number. A number is `0x…` where
//! other values of the type have symbols, and decimal elsewhere. [`parse`] reads all that [`render`] writes as the same
//! value, and some more spellings. An attribute map has no text, since it is a directory.
//!
//! No error of this module quotes what was written: it ends up in the log, where no value may.

use std::borrow::Cow;

use super::name::file_name;
use crate::error::{Error, ErrorKind, Result};
use crate::pkcs11::{CK_UNAVAILABLE_INFORMATION, CKA_KEY_TYPE, CKA_PARAMETER_SET, Symbols};
use crate::store::attribute::{AttributeKey, AttributeType, Attributes, Kind, Value};

const UNAVAILABLE: &str = "CK_UNAVAILABLE_INFORMATION";

/// The words for a `CK_BBOOL`.
const TRUE: [&str; 3] = ["true", "CK_TRUE", "1"];
const FALSE: [&str; 3] = ["false", "CK_FALSE", "0"];

/// What the text of an attribute depends on beside its value: other attributes of the same object, or of the same map.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Context {
    /// `CKA_KEY_TYPE`, which says what a `CKA_PARAMETER_SET` is a parameter set of.
    pub key_type: Option<u64>,
}

impl Context {
    /// The context of each of these attributes.
    #[must_use]
    pub fn of(attributes: &Attributes) -> Self {
        Self {
            key_type: attributes.ulong(CKA_KEY_TYPE),
        }
    }
}

/// The text of a value.
///
/// # Errors
/// [`ErrorKind::IsADirectory`] for a map.
pub fn render(
    attribute_type: AttributeType,
    value: &Value,
    context: Context,
) -> Result<Cow<'_, [u8]>> {
    if let Value::Bytes(bytes) = value {
        return Ok(bytes.into());
    }
    let mut text = Vec::new();
    for_each_word(attribute_type, value, context, |word| word.push(&mut text))?;
    Ok(text.into())
}

/// The length of the text of a value, in bytes, without making it.
///
/// # Errors
/// [`ErrorKind::IsADirectory`] for a map.
pub fn length(attribute_type: AttributeType, value: &Value, context: Context) -> Result<u64> {
    if let Value::Bytes(bytes) = value {
        return Ok(bytes.len() as u64);
    }
    let mut length = 0;
    for_each_word(attribute_type, value, context, |word| {
        length += word.length();
    })?;
    Ok(length)
}

/// How long a text is at most that is no byte string, in bytes: whoever reads it should not take long over it.
pub const LONGEST_TEXT: usize = 1024 * 1024;

/// That the text of a value is none that [`parse`] refuses for its length.
///
/// # Errors
/// [`ErrorKind::TooLarge`].
pub fn check_readable(key: AttributeKey, value: &Value, context: Context) -> Result<()> {
    if key.kind == Kind::Bytes {
        return Ok(());
    }
    let length = length(key.attribute_type, value, context)?;
    match usize::try_from(length) {
        Ok(length) if length <= LONGEST_TEXT => Ok(()),
        length => Err(too_long(length.unwrap_or(usize::MAX))),
    }
}

fn too_long(length: usize) -> Error {
    let detail = format!(
        "a text of {length} bytes; one that is no byte string has at most {LONGEST_TEXT}, as it is read"
    );
    Error::new(ErrorKind::TooLarge, detail)
}

/// The value that a text means.
///
/// # Errors
/// [`ErrorKind::TooLarge`] beyond [`LONGEST_TEXT`];
/// [`ErrorKind::Invalid`] if it is none of that kind, with a sentence about what would be; [`ErrorKind::IsADirectory`]
/// for a map.
pub fn parse(key: AttributeKey, text: &[u8], context: Context) -> Result<Value> {
    if key.kind != Kind::Bytes && text.len() > LONGEST_TEXT {
        return Err(too_long(text.len()));
    }
    match key.kind {
        Kind::Bool => parse_bool(key, text).map(Value::Bool),
        Kind::Ulong => parse_ulong(key, text, context).map(Value::Ulong),
        Kind::Bytes => Ok(Value::Bytes(text.to_vec())),
        Kind::Mechs => numbered_lines(text)
            .map(|(number, line)| {
                number_or(line, |name| Symbols::Mechanisms.value(name))
                    .ok_or_else(|| bad_line(key, number, Symbols::Mechanisms))
            })
            .collect::<Result<_>>()
            .map(Value::Mechs)
            .and_then(|set| check_readable(key, &set, context).map(|()| set)),
        Kind::Map => Err(is_a_directory()),
    }
}

/// Whether a text can be the first part of a value that is no byte string: its last line may be no more than the beginning of a word.
///
/// # Errors
/// As [`parse`], if its last line can be no such thing.
pub fn check_beginning(key: AttributeKey, text: &[u8], context: Context) -> Result<()> {
    let Err(error) = parse(key, text, context) else {
        return Ok(());
    };
    let last = text.rsplit(|byte| *byte == b'\n').next();
    let Ok(word) = std::str::from_utf8(last.unwrap_or_default().trim_ascii()) else {
        return Err(error);
    };
    let begins = |whole: &&str| whole.starts_with(word);
    let can_be = match key.kind {
        Kind::Bool => TRUE.iter().chain(&FALSE).any(begins),
        _ => {
            let symbols = families(key, context);
            begins(&UNAVAILABLE)
                || begins(&"0x")
                || begins(&"0X")
                || number_or(word.as_bytes(), |_| None).is_some()
                || symbols
                    .iter()
                    .any(|symbols| symbols.has_one_that_begins(word))
        }
    };
    // Some programs take a file's room with zeros first.
    if can_be || word.contains('\0') {
        return Ok(());
    }
    Err(error)
}

/// One line of a text.
#[derive(Clone, Copy)]
enum Word {
    Symbol(&'static str),
    Decimal(u64),
    Hexadecimal(u64),
}

impl Word {
    /// Its length with the newline.
    fn length(self) -> u64 {
        1 + match self {
            Self::Symbol(name) => name.len() as u64,
            Self::Decimal(number) => u64::from(number.checked_ilog10().unwrap_or(0) + 1),
            Self::Hexadecimal(number) => {
                let digits = (u64::BITS - number.leading_zeros()).div_ceil(4);
                2 + u64::from(digits.max(8))
            }
        }
    }

    fn push(self, text: &mut Vec<u8>) {
        match self {
            Self::Symbol(name) => text.extend_from_slice(name.as_bytes()),
            Self::Decimal(number) => text.extend_from_slice(number.to_string().as_bytes()),
            Self::Hexadecimal(number) => {
                text.extend_from_slice(format!("{number:#010x}").as_bytes());
            }
        }
        text.push(b'\n');
    }
}

/// Calls `emit` with each line of the text of a value, which is not a byte string.
fn for_each_word(
    attribute_type: AttributeType,
    value: &Value,
    context: Context,
    mut emit: impl FnMut(Word),
) -> Result<()> {
    let symbol_or_number = |symbols: Symbols, number| match symbols.name(number) {
        Some(name) => Word::Symbol(name),
        None => Word::Hexadecimal(number),
    };
    match value {
        Value::Bool(value) => emit(Word::Symbol(if *value { "true" } else { "false" })),
        Value::Ulong(CK_UNAVAILABLE_INFORMATION) => emit(Word::Symbol(UNAVAILABLE)),
        Value::Ulong(number) => match Symbols::of(attribute_type, context.key_type) {
            None => emit(Word::Decimal(*number)),
            Some(symbols) if symbols.are_flags() => flags(symbols, *number, emit),
            Some(symbols) => emit(symbol_or_number(symbols, *number)),
        },
        Value::Mechs(mechanisms) => mechanisms
            .iter()
            .for_each(|mechanism| emit(symbol_or_number(Symbols::Mechanisms, *mechanism))),
        Value::Bytes(_) => {}
        Value::Map(_) => return Err(is_a_directory()),
    }
    Ok(())
}

/// A set of flags: those with a name in ascending order, then all others as one number.
fn flags(symbols: Symbols, set: u64, mut emit: impl FnMut(Word)) {
    if set == 0 {
        return emit(Word::Decimal(0));
    }
    let mut rest = set;
    for (flag, name) in symbols.iter() {
        if rest & flag != 0 {
            emit(Word::Symbol(name));
            rest &= !flag;
        }
    }
    if rest != 0 {
        emit(Word::Hexadecimal(rest));
    }
}

fn parse_bool(key: AttributeKey, text: &[u8]) -> Result<bool> {
    let word = text.trim_ascii();
    let is_one_of = |words: &[&str]| words.iter().any(|known| known.as_bytes() == word);
    if is_one_of(&TRUE) {
        Ok(true)
    } else if is_one_of(&FALSE) {
        Ok(false)
    } else {
        Err(invalid(key, "is true or false"))
    }
}

fn parse_ulong(key: AttributeKey, text: &[u8], context: Context) -> Result<u64> {
    let families = families(key, context);
    if let [symbols] = families[..]
        && symbols.are_flags()
    {
        return parse_flags(key, text, symbols);
    }
    number_or(text.trim_ascii(), |name| {
        if name == UNAVAILABLE {
            return Some(CK_UNAVAILABLE_INFORMATION);
        }
        families.iter().find_map(|symbols| symbols.value(name))
    })
    .ok_or_else(|| match families[..] {
        [] => invalid(key, "is one number below 2^64, decimal or 0x…"),
        [symbols] => invalid(
            key,
            &format!(
                "is one {}… symbol or number, decimal or 0x…",
                symbols.prefix()
            ),
        ),
        _ => invalid(key, "is one CKP_… symbol or number, decimal or 0x…"),
    })
}

/// The symbols that a value can be.
fn families(key: AttributeKey, context: Context) -> Vec<Symbols> {
    match Symbols::of(key.attribute_type, context.key_type) {
        _ if key.kind == Kind::Mechs => vec![Symbols::Mechanisms],
        Some(symbols) => vec![symbols],
        // A parameter set can be written before the key type that says which family it is from.
        None if key.attribute_type == CKA_PARAMETER_SET => Symbols::PARAMETER_SETS.to_vec(),
        None => Vec::new(),
    }
}

/// A set of flags. No line at all is no set: a file that was truncated and never written must not
/// leave a token without its flags.
fn parse_flags(key: AttributeKey, text: &[u8], symbols: Symbols) -> Result<u64> {
    let mut set = None;
    for (number, line) in numbered_lines(text) {
        let flags = number_or(line, |name| {
            if name == UNAVAILABLE {
                return Some(CK_UNAVAILABLE_INFORMATION);
            }
            symbols.value(name)
        })
        .ok_or_else(|| bad_line(key, number, symbols))?;
        set = Some(set.unwrap_or(0) | flags);
    }
    set.ok_or_else(|| {
        let prefix = symbols.prefix();
        invalid(
            key,
            &format!("is at least one line, {prefix}… or 0 for none"),
        )
    })
}

/// The lines that are not blank, without the blanks around them, and their numbers from 1.
fn numbered_lines(text: &[u8]) -> impl Iterator<Item = (usize, &[u8])> {
    let lines = text.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii);
    (1..).zip(lines).filter(|(_, line)| !line.is_empty())
}

/// The number that a word is, decimal or `0x…`, or else what `symbol` says.
fn number_or(word: &[u8], symbol: impl Fn(&str) -> Option<u64>) -> Option<u64> {
    let word = std::str::from_utf8(word).ok()?;
    let (digits, radix) = match word.strip_prefix("0x").or(word.strip_prefix("0X")) {
        Some(digits) => (digits, 16),
        None => (word, 10),
    };
    if digits.starts_with(|first: char| first.is_digit(radix)) {
        u64::from_str_radix(digits, radix).ok()
    } else {
        symbol(word)
    }
}

fn is_a_directory() -> Error {
    Error::new(
        ErrorKind::IsADirectory,
        "an attribute map is a directory of attributes and has no text",
    )
}

/// An error that says what the value of an attribute `is`.
fn invalid(key: AttributeKey, is: &str) -> Error {
    Error::new(ErrorKind::Invalid, format!("{} {is}", file_name(key)))
}

fn bad_line(key: AttributeKey, number: usize, symbols: Symbols) -> Error {
    let (name, prefix) = (file_name(key), symbols.prefix());
    Error::new(
        ErrorKind::Invalid,
        format!("line {number} of {name} is neither a {prefix}… symbol nor a number below 2^64"),
    )
}

#[cfg(test)]
mod tests;
