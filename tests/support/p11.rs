//! A PKCS #11 client in a process of its own: `SOFTHSM2_CONF=… p11 libsofthsm2.so`.
//!
//! It takes one JSON object per line on standard input, `{"do": "find", …}`, and answers each with one on standard
//! output, `{"ok": …}` or `{"error": "CKR_…"}`. Its session stays open between them, as that of an application would, so
//! a test can have several of them, on both backends, while a mount stands. `tests/support/client.rs` is the other end.
//!
//! | do | with | gives |
//! |---|---|---|
//! | `tokens` | | `[{slot, label, serial, flags}]`, initialised ones only |
//! | `init-token` | `label` (hex), `so_pin`, `pin` or null | the serial number |
//! | `open` | `token` (label or serial), `pin` or null, `so`, `read_only` | |
//! | `close` | | |
//! | `create` | `attributes` | a handle |
//! | `bulk` | `count`, `label`, `attributes` | the handles; each object's label is `label` and its number |
//! | `generate` | `mechanism`, `attributes` | a handle |
//! | `generate-pair` | `mechanism`, `public`, `private` | `[public, private]` |
//! | `copy`, `set` | `object`, `attributes` | a handle of the copy; null |
//! | `destroy` | `object` | |
//! | `find` | `attributes`, `bare` | `[{handle, class, label}]`, or only handles if bare |
//! | `get` | `object`, `types` or null for all | `[attribute]`; a sensitive one is `[type, null]` |
//! | `sign` | `object`, `mechanism`, `data` | the signature, hex |
//! | `verify` | `object`, `mechanism`, `data`, `signature` | whether it is one |
//! | `sleep` | `ms` | |
//! | `populate` | | the store of `tests/golden/README.md` in an empty tokendir |
//! | `finalize` | | `C_Finalize` and `C_Initialize` |
#![allow(unsafe_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod template;

use std::io::{BufRead, Write};
use std::ptr;

use cryptoki_sys::*;
use serde_json::{Value, json};
use template::{Attribute, AttributeValue, boolean, bytes, from_json, hex, mechs, ulong, unhex};

/// Why a command failed.
enum Failure {
    /// PKCS #11 said so.
    Rv(CK_RV),
    /// The command makes no sense.
    Command(String),
}

type Answer<T> = Result<T, Failure>;

/// The types that `get` asks for when it is to give all: those that SoftHSM has.
const ALL_TYPES: &[CK_ATTRIBUTE_TYPE] = &[
    0x0,
    0x1,
    0x2,
    0x3,
    0x4,
    0x10,
    0x11,
    0x12,
    0x80,
    0x81,
    0x82,
    0x83,
    0x84,
    0x85,
    0x86,
    0x87,
    0x88,
    0x89,
    0x8a,
    0x8b,
    0x8c,
    0x90,
    0x100,
    0x101,
    0x102,
    0x103,
    0x104,
    0x105,
    0x106,
    0x107,
    0x108,
    0x109,
    0x10a,
    0x10b,
    0x10c,
    0x110,
    0x111,
    0x120,
    0x121,
    0x122,
    0x123,
    0x124,
    0x125,
    0x126,
    0x127,
    0x128,
    0x129,
    0x130,
    0x131,
    0x132,
    0x133,
    0x134,
    0x160,
    0x161,
    0x162,
    0x163,
    0x164,
    0x165,
    0x166,
    0x170,
    0x171,
    0x172,
    0x180,
    0x181,
    0x202,
    0x210,
    0x4000_0211,
    0x4000_0212,
    0x4000_0600,
];

const TEMPLATES: [CK_ATTRIBUTE_TYPE; 2] = [CKA_WRAP_TEMPLATE, CKA_UNWRAP_TEMPLATE];

fn check(rv: CK_RV) -> Answer<()> {
    if rv == CKR_OK {
        Ok(())
    } else {
        Err(Failure::Rv(rv))
    }
}

/// The name of a `CK_RV` that tests meet; else its number.
fn rv_name(rv: CK_RV) -> String {
    let name = match rv {
        CKR_HOST_MEMORY => "CKR_HOST_MEMORY",
        CKR_GENERAL_ERROR => "CKR_GENERAL_ERROR",
        CKR_FUNCTION_FAILED => "CKR_FUNCTION_FAILED",
        CKR_ARGUMENTS_BAD => "CKR_ARGUMENTS_BAD",
        CKR_ACTION_PROHIBITED => "CKR_ACTION_PROHIBITED",
        CKR_ATTRIBUTE_READ_ONLY => "CKR_ATTRIBUTE_READ_ONLY",
        CKR_ATTRIBUTE_SENSITIVE => "CKR_ATTRIBUTE_SENSITIVE",
        CKR_ATTRIBUTE_TYPE_INVALID => "CKR_ATTRIBUTE_TYPE_INVALID",
        CKR_ATTRIBUTE_VALUE_INVALID => "CKR_ATTRIBUTE_VALUE_INVALID",
        CKR_DEVICE_ERROR => "CKR_DEVICE_ERROR",
        CKR_KEY_HANDLE_INVALID => "CKR_KEY_HANDLE_INVALID",
        CKR_KEY_FUNCTION_NOT_PERMITTED => "CKR_KEY_FUNCTION_NOT_PERMITTED",
        CKR_KEY_TYPE_INCONSISTENT => "CKR_KEY_TYPE_INCONSISTENT",
        CKR_MECHANISM_INVALID => "CKR_MECHANISM_INVALID",
        CKR_OBJECT_HANDLE_INVALID => "CKR_OBJECT_HANDLE_INVALID",
        CKR_PIN_INCORRECT => "CKR_PIN_INCORRECT",
        CKR_PIN_LEN_RANGE => "CKR_PIN_LEN_RANGE",
        CKR_SESSION_HANDLE_INVALID => "CKR_SESSION_HANDLE_INVALID",
        CKR_SESSION_READ_ONLY => "CKR_SESSION_READ_ONLY",
        CKR_SIGNATURE_INVALID => "CKR_SIGNATURE_INVALID",
        CKR_TEMPLATE_INCOMPLETE => "CKR_TEMPLATE_INCOMPLETE",
        CKR_TEMPLATE_INCONSISTENT => "CKR_TEMPLATE_INCONSISTENT",
        CKR_TOKEN_NOT_PRESENT => "CKR_TOKEN_NOT_PRESENT",
        CKR_TOKEN_NOT_RECOGNIZED => "CKR_TOKEN_NOT_RECOGNIZED",
        CKR_USER_NOT_LOGGED_IN => "CKR_USER_NOT_LOGGED_IN",
        CKR_USER_PIN_NOT_INITIALIZED => "CKR_USER_PIN_NOT_INITIALIZED",
        _ => return format!("{rv:#x}"),
    };
    name.to_owned()
}

/// A template in the memory layout of PKCS #11. What `list` points to lives in `values` and `inner`.
struct Raw {
    list: Vec<CK_ATTRIBUTE>,
    #[allow(dead_code, reason = "keeps what `list` points to")]
    values: Vec<Vec<u8>>,
    #[allow(dead_code, reason = "keeps what `list` points to")]
    inner: Vec<Raw>,
}

impl Raw {
    fn new(attributes: &[Attribute]) -> Self {
        let mut raw = Self {
            list: Vec::new(),
            values: Vec::new(),
            inner: Vec::new(),
        };
        for attribute in attributes {
            let (pointer, length) = match &attribute.value {
                AttributeValue::Bytes(value) => {
                    let mut value = value.clone();
                    let at = (value.as_mut_ptr().cast(), value.len());
                    raw.values.push(value);
                    at
                }
                AttributeValue::Template(nested) => {
                    let mut nested = Self::new(nested);
                    let length = nested.list.len() * size_of::<CK_ATTRIBUTE>();
                    let at = (nested.list.as_mut_ptr().cast(), length);
                    raw.inner.push(nested);
                    at
                }
            };
            raw.list.push(CK_ATTRIBUTE {
                type_: attribute.attribute_type,
                pValue: pointer,
                ulValueLen: length as CK_ULONG,
            });
        }
        raw
    }

    fn pointer(&mut self) -> *mut CK_ATTRIBUTE {
        self.list.as_mut_ptr()
    }

    fn len(&self) -> CK_ULONG {
        self.list.len() as CK_ULONG
    }
}

fn mechanism(mechanism: CK_MECHANISM_TYPE) -> CK_MECHANISM {
    CK_MECHANISM {
        mechanism,
        pParameter: ptr::null_mut(),
        ulParameterLen: 0,
    }
}

/// A text padded with blanks, without them.
fn unpadded(text: &[u8]) -> String {
    String::from_utf8_lossy(text)
        .trim_end_matches([' ', '\0'])
        .to_owned()
}

struct Client {
    library: Pkcs11,
    session: CK_SESSION_HANDLE,
}

impl Client {
    fn new(path: &str) -> Self {
        // SAFETY: a PKCS #11 library; its initialisers are what they are in every application that loads it.
        let library = unsafe { Pkcs11::new(path) }.expect("loading the PKCS #11 library");
        Self {
            library,
            session: CK_INVALID_HANDLE,
        }
    }

    // SAFETY of all the calls below: the function is PKCS #11's own, and every pointer is to a buffer of this process that
    // is as long as the length beside it says, and lives until the call has returned.

    fn initialize(&self) -> Answer<()> {
        check(unsafe { self.library.C_Initialize(ptr::null_mut()) })
    }

    fn finalize(&mut self) -> Answer<()> {
        self.session = CK_INVALID_HANDLE;
        check(unsafe { self.library.C_Finalize(ptr::null_mut()) })
    }

    fn slots(&self) -> Answer<Vec<(CK_SLOT_ID, CK_TOKEN_INFO)>> {
        let mut count: CK_ULONG = 0;
        check(unsafe {
            self.library
                .C_GetSlotList(CK_TRUE, ptr::null_mut(), &mut count)
        })?;
        let mut slots = vec![0; count as usize];
        check(unsafe {
            self.library
                .C_GetSlotList(CK_TRUE, slots.as_mut_ptr(), &mut count)
        })?;
        slots.truncate(count as usize);
        let mut tokens = Vec::new();
        for slot in slots {
            let mut info = CK_TOKEN_INFO::default();
            check(unsafe { self.library.C_GetTokenInfo(slot, &mut info) })?;
            tokens.push((slot, info));
        }
        Ok(tokens)
    }

    /// The first initialised token with that label or serial number.
    fn slot(&self, token: &str) -> Answer<CK_SLOT_ID> {
        self.slots()?
            .iter()
            .find(|(_, info)| {
                info.flags & CKF_TOKEN_INITIALIZED != 0
                    && (unpadded(&info.label) == token || unpadded(&info.serialNumber) == token)
            })
            .map(|(slot, _)| *slot)
            .ok_or_else(|| Failure::Command(format!("no token {token:?}")))
    }

    fn init_token(&mut self, label: &[u8], so_pin: &str, pin: Option<&str>) -> Answer<String> {
        let before: Vec<String> = self
            .slots()?
            .iter()
            .map(|(_, t)| unpadded(&t.serialNumber))
            .collect();
        let free = self
            .slots()?
            .iter()
            .find(|(_, info)| info.flags & CKF_TOKEN_INITIALIZED == 0)
            .map(|(slot, _)| *slot)
            .ok_or_else(|| Failure::Command("no free slot".to_owned()))?;
        let mut padded = [b' '; 32];
        padded[..label.len()].copy_from_slice(label);
        let mut so = so_pin.as_bytes().to_vec();
        check(unsafe {
            self.library.C_InitToken(
                free,
                so.as_mut_ptr(),
                so.len() as CK_ULONG,
                padded.as_mut_ptr(),
            )
        })?;
        // SoftHSM gives the new token another slot as soon as the slots are listed again.
        let serial = self
            .slots()?
            .iter()
            .filter(|(_, info)| info.flags & CKF_TOKEN_INITIALIZED != 0)
            .map(|(_, info)| unpadded(&info.serialNumber))
            .find(|serial| !before.contains(serial))
            .ok_or_else(|| Failure::Command("the new token is not listed".to_owned()))?;
        if let Some(pin) = pin {
            self.open(&serial, Some(so_pin), true, false)?;
            let mut pin = pin.as_bytes().to_vec();
            check(unsafe {
                self.library
                    .C_InitPIN(self.session, pin.as_mut_ptr(), pin.len() as CK_ULONG)
            })?;
            self.close()?;
        }
        Ok(serial)
    }

    fn open(&mut self, token: &str, pin: Option<&str>, so: bool, read_only: bool) -> Answer<()> {
        self.close()?;
        let slot = self.slot(token)?;
        let flags = CKF_SERIAL_SESSION | if read_only { 0 } else { CKF_RW_SESSION };
        check(unsafe {
            self.library
                .C_OpenSession(slot, flags, ptr::null_mut(), None, &mut self.session)
        })?;
        if let Some(pin) = pin {
            let mut pin = pin.as_bytes().to_vec();
            let user = if so { CKU_SO } else { CKU_USER };
            let rv = unsafe {
                self.library
                    .C_Login(self.session, user, pin.as_mut_ptr(), pin.len() as CK_ULONG)
            };
            if rv != CKR_OK {
                self.close()?;
            }
            check(rv)?;
        }
        Ok(())
    }

    fn close(&mut self) -> Answer<()> {
        let session = std::mem::replace(&mut self.session, CK_INVALID_HANDLE);
        if session == CK_INVALID_HANDLE {
            return Ok(());
        }
        check(unsafe { self.library.C_CloseSession(session) })
    }

    fn create(&self, attributes: &[Attribute]) -> Answer<CK_OBJECT_HANDLE> {
        let (mut raw, mut handle) = (Raw::new(attributes), CK_INVALID_HANDLE);
        check(unsafe {
            self.library
                .C_CreateObject(self.session, raw.pointer(), raw.len(), &mut handle)
        })?;
        Ok(handle)
    }

    fn generate(
        &self,
        by: CK_MECHANISM_TYPE,
        attributes: &[Attribute],
    ) -> Answer<CK_OBJECT_HANDLE> {
        let (mut raw, mut by, mut handle) =
            (Raw::new(attributes), mechanism(by), CK_INVALID_HANDLE);
        check(unsafe {
            self.library
                .C_GenerateKey(self.session, &mut by, raw.pointer(), raw.len(), &mut handle)
        })?;
        Ok(handle)
    }

    fn generate_pair(
        &self,
        by: CK_MECHANISM_TYPE,
        public: &[Attribute],
        private: &[Attribute],
    ) -> Answer<[CK_OBJECT_HANDLE; 2]> {
        let (mut public, mut private, mut by) =
            (Raw::new(public), Raw::new(private), mechanism(by));
        let mut handles = [CK_INVALID_HANDLE; 2];
        let [first, second] = &mut handles;
        check(unsafe {
            self.library.C_GenerateKeyPair(
                self.session,
                &mut by,
                public.pointer(),
                public.len(),
                private.pointer(),
                private.len(),
                first,
                second,
            )
        })?;
        Ok(handles)
    }

    fn copy(&self, object: CK_OBJECT_HANDLE, attributes: &[Attribute]) -> Answer<CK_OBJECT_HANDLE> {
        let (mut raw, mut handle) = (Raw::new(attributes), CK_INVALID_HANDLE);
        check(unsafe {
            self.library
                .C_CopyObject(self.session, object, raw.pointer(), raw.len(), &mut handle)
        })?;
        Ok(handle)
    }

    fn set(&self, object: CK_OBJECT_HANDLE, attributes: &[Attribute]) -> Answer<()> {
        let mut raw = Raw::new(attributes);
        check(unsafe {
            self.library
                .C_SetAttributeValue(self.session, object, raw.pointer(), raw.len())
        })
    }

    fn destroy(&self, object: CK_OBJECT_HANDLE) -> Answer<()> {
        check(unsafe { self.library.C_DestroyObject(self.session, object) })
    }

    fn find(&self, attributes: &[Attribute]) -> Answer<Vec<CK_OBJECT_HANDLE>> {
        let mut raw = Raw::new(attributes);
        check(unsafe {
            self.library
                .C_FindObjectsInit(self.session, raw.pointer(), raw.len())
        })?;
        let mut found = Vec::new();
        let result = loop {
            let (mut some, mut count) = ([CK_INVALID_HANDLE; 256], 0);
            let rv = unsafe {
                self.library
                    .C_FindObjects(self.session, some.as_mut_ptr(), 256, &mut count)
            };
            if rv != CKR_OK || count == 0 {
                break check(rv);
            }
            found.extend_from_slice(&some[..count as usize]);
        };
        check(unsafe { self.library.C_FindObjectsFinal(self.session) })?;
        result.map(|()| found)
    }

    fn get_raw(&self, object: CK_OBJECT_HANDLE, list: &mut [CK_ATTRIBUTE]) -> CK_RV {
        unsafe {
            self.library.C_GetAttributeValue(
                self.session,
                object,
                list.as_mut_ptr(),
                list.len() as CK_ULONG,
            )
        }
    }

    fn get(
        &self,
        object: CK_OBJECT_HANDLE,
        attribute_type: CK_ATTRIBUTE_TYPE,
    ) -> Answer<Attribute> {
        let mut one = [CK_ATTRIBUTE {
            type_: attribute_type,
            pValue: ptr::null_mut(),
            ulValueLen: 0,
        }];
        check(self.get_raw(object, &mut one))?;
        let length = one[0].ulValueLen as usize;
        if TEMPLATES.contains(&attribute_type) {
            // First the types and lengths of what is in it, then the values.
            let mut list = vec![CK_ATTRIBUTE::default(); length / size_of::<CK_ATTRIBUTE>()];
            one[0].pValue = list.as_mut_ptr().cast();
            if !list.is_empty() {
                check(self.get_raw(object, &mut one))?;
            }
            let mut values: Vec<Vec<u8>> = list
                .iter()
                .map(|a| vec![0; a.ulValueLen as usize])
                .collect();
            for (attribute, value) in list.iter_mut().zip(&mut values) {
                attribute.pValue = value.as_mut_ptr().cast();
            }
            if !list.is_empty() {
                check(self.get_raw(object, &mut one))?;
            }
            let inner = list
                .iter()
                .zip(&values)
                .map(|(a, v)| bytes(a.type_, v))
                .collect();
            return Ok(template::template(attribute_type, inner));
        }
        let mut value = vec![0u8; length];
        one[0].pValue = value.as_mut_ptr().cast();
        check(self.get_raw(object, &mut one))?;
        value.truncate(one[0].ulValueLen as usize);
        Ok(bytes(attribute_type, value))
    }

    /// What PKCS #11 gives of these types; null where it says that it is sensitive.
    fn get_all(&self, object: CK_OBJECT_HANDLE, types: &[CK_ATTRIBUTE_TYPE]) -> Answer<Value> {
        let mut all = Vec::new();
        for &attribute_type in types {
            match self.get(object, attribute_type) {
                Ok(attribute) => all.push(attribute.to_json()),
                Err(Failure::Rv(CKR_ATTRIBUTE_TYPE_INVALID)) => {}
                Err(Failure::Rv(CKR_ATTRIBUTE_SENSITIVE)) => {
                    all.push(json!([attribute_type, null]))
                }
                Err(other) => return Err(other),
            }
        }
        Ok(Value::Array(all))
    }

    fn sign(
        &self,
        object: CK_OBJECT_HANDLE,
        by: CK_MECHANISM_TYPE,
        data: &[u8],
    ) -> Answer<Vec<u8>> {
        let (mut by, mut data) = (mechanism(by), data.to_vec());
        check(unsafe { self.library.C_SignInit(self.session, &mut by, object) })?;
        let mut signature = vec![0u8; 8192];
        let mut length = signature.len() as CK_ULONG;
        check(unsafe {
            self.library.C_Sign(
                self.session,
                data.as_mut_ptr(),
                data.len() as CK_ULONG,
                signature.as_mut_ptr(),
                &mut length,
            )
        })?;
        signature.truncate(length as usize);
        Ok(signature)
    }

    fn verify(
        &self,
        object: CK_OBJECT_HANDLE,
        by: CK_MECHANISM_TYPE,
        data: &[u8],
        signature: &[u8],
    ) -> Answer<bool> {
        let (mut by, mut data, mut signature) = (mechanism(by), data.to_vec(), signature.to_vec());
        check(unsafe { self.library.C_VerifyInit(self.session, &mut by, object) })?;
        let rv = unsafe {
            self.library.C_Verify(
                self.session,
                data.as_mut_ptr(),
                data.len() as CK_ULONG,
                signature.as_mut_ptr(),
                signature.len() as CK_ULONG,
            )
        };
        match rv {
            CKR_SIGNATURE_INVALID | CKR_SIGNATURE_LEN_RANGE => Ok(false),
            other => check(other).map(|()| true),
        }
    }

    /// One command.
    fn answer(&mut self, command: &Value) -> Answer<Value> {
        let text = |name: &str| command.get(name).and_then(Value::as_str);
        let number = |name: &str| {
            let missing = || Failure::Command(format!("no {name}"));
            command
                .get(name)
                .and_then(Value::as_u64)
                .ok_or_else(missing)
        };
        let data = |name: &str| {
            let missing = || Failure::Command(format!("no {name}"));
            text(name).and_then(unhex).ok_or_else(missing)
        };
        let list = |name: &str| {
            let missing = || Failure::Command(format!("no {name}"));
            command.get(name).and_then(from_json).ok_or_else(missing)
        };
        let flag = |name: &str| command.get(name).and_then(Value::as_bool).unwrap_or(false);
        Ok(match text("do").unwrap_or_default() {
            "tokens" => {
                let tokens = self.slots()?;
                tokens
                    .iter()
                    .filter(|(_, info)| info.flags & CKF_TOKEN_INITIALIZED != 0)
                    .map(|(slot, info)| {
                        json!({
                            "slot": slot,
                            "label": unpadded(&info.label),
                            "serial": unpadded(&info.serialNumber),
                            "flags": info.flags,
                        })
                    })
                    .collect()
            }
            "init-token" => {
                let so_pin = text("so_pin").unwrap_or("5678").to_owned();
                json!(self.init_token(&data("label")?, &so_pin, text("pin"))?)
            }
            "open" => {
                let token = text("token").unwrap_or_default();
                self.open(token, text("pin"), flag("so"), flag("read_only"))?;
                Value::Null
            }
            "close" => {
                self.close()?;
                Value::Null
            }
            "create" => json!(self.create(&list("attributes")?)?),
            "bulk" => {
                let (prefix, attributes) = (data("label")?, list("attributes")?);
                let mut handles = Vec::new();
                for index in 0..number("count")? {
                    let mut attributes = attributes.clone();
                    let label = [prefix.as_slice(), index.to_string().as_bytes()].concat();
                    attributes.push(bytes(CKA_LABEL, label));
                    handles.push(self.create(&attributes)?);
                }
                json!(handles)
            }
            "generate" => json!(self.generate(number("mechanism")?, &list("attributes")?)?),
            "generate-pair" => {
                let (public, private) = (list("public")?, list("private")?);
                json!(self.generate_pair(number("mechanism")?, &public, &private)?)
            }
            "copy" => json!(self.copy(number("object")?, &list("attributes")?)?),
            "set" => {
                self.set(number("object")?, &list("attributes")?)?;
                Value::Null
            }
            "destroy" => {
                self.destroy(number("object")?)?;
                Value::Null
            }
            "find" => {
                let found = self.find(&list("attributes")?)?;
                if flag("bare") {
                    return Ok(json!(found));
                }
                let mut objects = Vec::new();
                for handle in found {
                    let [class, label] =
                        [CKA_CLASS, CKA_LABEL].map(|t| match self.get(handle, t) {
                            Ok(Attribute {
                                value: AttributeValue::Bytes(value),
                                ..
                            }) => Some(value),
                            _ => None,
                        });
                    let class = class
                        .and_then(|c| c.try_into().ok())
                        .map(u64::from_ne_bytes);
                    let label = label.as_deref().map(hex);
                    objects.push(json!({ "handle": handle, "class": class, "label": label }));
                }
                Value::Array(objects)
            }
            "get" => {
                let types: Option<Vec<u64>> = command
                    .get("types")
                    .and_then(Value::as_array)
                    .map(|types| types.iter().filter_map(Value::as_u64).collect());
                self.get_all(number("object")?, types.as_deref().unwrap_or(ALL_TYPES))?
            }
            "sign" => {
                json!(hex(&self.sign(
                    number("object")?,
                    number("mechanism")?,
                    &data("data")?
                )?))
            }
            "verify" => {
                let (by, data, signature) =
                    (number("mechanism")?, data("data")?, data("signature")?);
                json!(self.verify(number("object")?, by, &data, &signature)?)
            }
            "sleep" => {
                std::thread::sleep(std::time::Duration::from_millis(number("ms")?));
                Value::Null
            }
            "populate" => {
                self.populate()?;
                Value::Null
            }
            "finalize" => {
                self.finalize()?;
                self.initialize()?;
                Value::Null
            }
            other => return Err(Failure::Command(format!("no such command: {other:?}"))),
        })
    }

    /// Fills an empty tokendir with what the golden stores have: see `tests/golden/README.md`.
    fn populate(&mut self) -> Answer<()> {
        const SO_PIN: &str = "5678";
        const PIN: &str = "1234";
        let prod = self.init_token("Prod Schlüssel 1".as_bytes(), SO_PIN, Some(PIN))?;
        self.open(&prod, Some(PIN), false, false)?;
        self.populate_keys()?;
        self.populate_templates()?;
        self.populate_certificate()?;
        self.populate_data()?;
        for _ in 0..2 {
            let dup = self.init_token(b"dup", SO_PIN, Some(PIN))?;
            self.open(&dup, Some(PIN), false, false)?;
            for (label, private) in [("mini-public", false), ("mini-private", true)] {
                self.create(&data_object(label.as_bytes(), private, b"mini"))?;
            }
        }
        self.init_token(b"sopin-only", SO_PIN, None)?;
        self.close()
    }

    fn populate_keys(&self) -> Answer<()> {
        let token = || boolean(CKA_TOKEN, true);
        let named =
            |label: &str, id: u8| vec![token(), bytes(CKA_LABEL, label), bytes(CKA_ID, [id])];
        let with = |mut list: Vec<Attribute>, more: Vec<Attribute>| {
            list.extend(more);
            list
        };
        let private = |label: &str, id: u8| {
            with(
                named(label, id),
                vec![boolean(CKA_PRIVATE, true), boolean(CKA_SENSITIVE, true)],
            )
        };
        let public =
            |label: &str, id: u8| with(named(label, id), vec![boolean(CKA_PRIVATE, false)]);
        let rsa = || {
            vec![
                ulong(CKA_MODULUS_BITS, 2048),
                bytes(CKA_PUBLIC_EXPONENT, [1, 0, 1]),
            ]
        };
        self.generate_pair(
            CKM_RSA_PKCS_KEY_PAIR_GEN,
            &with(public("rsa-2048", 1), rsa()),
            &private("rsa-2048", 1),
        )?;
        let derive = || vec![boolean(CKA_DERIVE, true)];
        let p256 = [0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07];
        self.generate_pair(
            CKM_EC_KEY_PAIR_GEN,
            &with(
                public("ec-p256", 2),
                vec![bytes(CKA_EC_PARAMS, p256), boolean(CKA_DERIVE, true)],
            ),
            &with(private("ec-p256", 2), derive()),
        )?;
        self.generate_pair(
            CKM_EC_EDWARDS_KEY_PAIR_GEN,
            &with(
                public("ed25519", 3),
                vec![
                    bytes(CKA_EC_PARAMS, b"\x13\x0cedwards25519"),
                    boolean(CKA_DERIVE, true),
                ],
            ),
            &with(private("ed25519", 3), derive()),
        )?;
        self.generate(
            CKM_AES_KEY_GEN,
            &with(private("aes-256", 4), vec![ulong(CKA_VALUE_LEN, 32)]),
        )?;
        self.generate(CKM_DES3_KEY_GEN, &private("des3", 6))?;
        let counting: Vec<u8> = (0..32).collect();
        let secret = |key_type: u64, value: &[u8]| {
            vec![
                ulong(CKA_CLASS, CKO_SECRET_KEY),
                ulong(CKA_KEY_TYPE, key_type),
                bytes(CKA_VALUE, value),
                boolean(CKA_SENSITIVE, false),
                boolean(CKA_EXTRACTABLE, true),
            ]
        };
        let hidden = |label: &str, id: u8| with(named(label, id), vec![boolean(CKA_PRIVATE, true)]);
        self.create(&with(
            hidden("generic-secret", 5),
            secret(CKK_GENERIC_SECRET, &counting),
        ))?;
        self.create(&with(
            with(public("aes-public", 7), secret(CKK_AES, &counting)),
            vec![
                bytes(CKA_START_DATE, b"20240101"),
                bytes(CKA_END_DATE, b"20341231"),
            ],
        ))?;
        self.create(&with(
            hidden("twin-key", 8),
            secret(CKK_AES, &counting[..16]),
        ))?;
        self.create(&with(hidden("twin-key", 8), secret(CKK_AES, &counting)))?;
        self.generate_pair(
            CKM_RSA_PKCS_KEY_PAIR_GEN,
            &with(public("rsa-allowed-mechs", 9), rsa()),
            &with(
                private("rsa-allowed-mechs", 9),
                vec![mechs(
                    CKA_ALLOWED_MECHANISMS,
                    &[CKM_RSA_PKCS_PSS, CKM_SHA256_RSA_PKCS, CKM_SHA512_RSA_PKCS],
                )],
            ),
        )?;
        Ok(())
    }

    fn populate_templates(&self) -> Answer<()> {
        self.generate(
            CKM_AES_KEY_GEN,
            &[
                boolean(CKA_TOKEN, true),
                bytes(CKA_LABEL, "wrap-key"),
                bytes(CKA_ID, [10]),
                boolean(CKA_PRIVATE, true),
                boolean(CKA_SENSITIVE, true),
                ulong(CKA_VALUE_LEN, 32),
                template::template(
                    CKA_WRAP_TEMPLATE,
                    vec![
                        bytes(CKA_LABEL, "wrappable"),
                        ulong(CKA_KEY_TYPE, CKK_AES),
                        bytes(CKA_ID, [0xde, 0xad, 0xbe, 0xef]),
                        boolean(CKA_EXTRACTABLE, true),
                    ],
                ),
                template::template(
                    CKA_UNWRAP_TEMPLATE,
                    vec![
                        ulong(CKA_CLASS, CKO_SECRET_KEY),
                        bytes(CKA_LABEL, "unwrapped"),
                        bytes(CKA_APPLICATION, []),
                        ulong(CKA_KEY_TYPE, CKK_AES),
                        boolean(CKA_SENSITIVE, true),
                        boolean(CKA_EXTRACTABLE, false),
                        mechs(CKA_ALLOWED_MECHANISMS, &[CKM_AES_CBC, CKM_AES_GCM]),
                    ],
                ),
            ],
        )?;
        self.create(&[
            ulong(CKA_CLASS, CKO_DOMAIN_PARAMETERS),
            ulong(CKA_KEY_TYPE, CKK_DH),
            boolean(CKA_TOKEN, true),
            boolean(CKA_PRIVATE, false),
            bytes(CKA_LABEL, "dh-params"),
            bytes(CKA_PRIME, [0xff; 128]),
            bytes(CKA_BASE, [2]),
        ])?;
        Ok(())
    }

    fn populate_certificate(&self) -> Answer<()> {
        let certificate = include_bytes!("data/certificate.der");
        let name = &certificate[149..214];
        self.create(&[
            ulong(CKA_CLASS, CKO_CERTIFICATE),
            ulong(CKA_CERTIFICATE_TYPE, CKC_X_509),
            boolean(CKA_TOKEN, true),
            boolean(CKA_PRIVATE, false),
            bytes(CKA_LABEL, "x509-cert"),
            bytes(CKA_ID, [12]),
            bytes(CKA_SUBJECT, name),
            bytes(CKA_ISSUER, name),
            bytes(CKA_SERIAL_NUMBER, &certificate[13..35]),
            bytes(CKA_VALUE, certificate),
        ])?;
        let mut key = vec![
            ulong(CKA_CLASS, CKO_PRIVATE_KEY),
            ulong(CKA_KEY_TYPE, CKK_RSA),
            boolean(CKA_TOKEN, true),
            boolean(CKA_PRIVATE, true),
            boolean(CKA_SENSITIVE, true),
            boolean(CKA_EXTRACTABLE, false),
            bytes(CKA_LABEL, "rsa-imported"),
            bytes(CKA_ID, [12]),
        ];
        let parts = [
            CKA_MODULUS,
            CKA_PUBLIC_EXPONENT,
            CKA_PRIVATE_EXPONENT,
            CKA_PRIME_1,
            CKA_PRIME_2,
            CKA_EXPONENT_1,
            CKA_EXPONENT_2,
            CKA_COEFFICIENT,
        ];
        let integers = der_integers(include_bytes!("data/key.der"));
        // The first is the version of the format.
        for (attribute_type, value) in parts.into_iter().zip(integers.iter().skip(1)) {
            key.push(bytes(attribute_type, value));
        }
        self.create(&key)?;
        Ok(())
    }

    fn populate_data(&self) -> Answer<()> {
        let large: Vec<u8> = (0..65536u32).map(|index| (index * 7) as u8).collect();
        let long = [b'L'; 300];
        let data: [(&[u8], bool, &[u8]); 11] = [
            (b"data-public", false, b"hello public\n"),
            (b"data-private", true, b"hello private\n"),
            (b"dir/with/slashes\nand newline/../x", false, b"slashes"),
            (b"bad\xff\xfe\0nul", false, b"badutf8"),
            (b"", false, b"emptylabel"),
            (&long, false, b"longlabel"),
            (b"..", false, b"dotdot"),
            (b"twin", false, b"twin one"),
            (b"twin", false, b"twin two"),
            (b"data-64k", false, &large),
            (b"data-64k-private", true, &large),
        ];
        for (label, private, value) in data {
            self.create(&data_object(label, private, value))?;
        }
        for (label, private) in [("data-empty", false), ("data-empty-private", true)] {
            self.create(&[
                ulong(CKA_CLASS, CKO_DATA),
                boolean(CKA_TOKEN, true),
                boolean(CKA_PRIVATE, private),
                bytes(CKA_LABEL, label),
                bytes(CKA_APPLICATION, []),
                bytes(CKA_VALUE, []),
                bytes(CKA_OBJECT_ID, OBJECT_ID),
            ])?;
        }
        self.create(&[
            ulong(CKA_CLASS, CKO_DATA),
            boolean(CKA_TOKEN, true),
            boolean(CKA_PRIVATE, false),
            boolean(CKA_MODIFIABLE, false),
            boolean(CKA_DESTROYABLE, false),
            bytes(CKA_LABEL, "data-undestroyable"),
            bytes(CKA_VALUE, "stay"),
        ])?;
        Ok(())
    }
}

const OBJECT_ID: &[u8] = &[6, 9, 0x2b, 6, 1, 4, 1, 0x82, 0x37, 0x15, 7];

fn data_object(label: &[u8], private: bool, value: &[u8]) -> Vec<Attribute> {
    vec![
        ulong(CKA_CLASS, CKO_DATA),
        boolean(CKA_TOKEN, true),
        boolean(CKA_PRIVATE, private),
        bytes(CKA_LABEL, label),
        bytes(CKA_APPLICATION, "tokenfs tests"),
        bytes(CKA_VALUE, value),
        bytes(CKA_OBJECT_ID, OBJECT_ID),
    ]
}

/// The integers of a DER `SEQUENCE` of integers, without their leading zeros.
fn der_integers(der: &[u8]) -> Vec<Vec<u8>> {
    fn header(der: &[u8]) -> (usize, usize) {
        let first = der[1] as usize;
        if first < 0x80 {
            return (2, first);
        }
        let count = first & 0x7f;
        let length = der[2..2 + count]
            .iter()
            .fold(0, |sum, byte| sum << 8 | *byte as usize);
        (2 + count, length)
    }
    let (start, _) = header(der);
    let mut rest = &der[start..];
    let mut integers = Vec::new();
    while !rest.is_empty() {
        let (start, length) = header(rest);
        let value = &rest[start..start + length];
        integers.push(
            value
                .iter()
                .copied()
                .skip_while(|byte| *byte == 0)
                .collect(),
        );
        rest = &rest[start + length..];
    }
    integers
}

fn main() {
    let path = std::env::args()
        .nth(1)
        .expect("usage: SOFTHSM2_CONF=FILE p11 LIBRARY");
    let mut client = Client::new(&path);
    let ready = client.initialize().map(|()| Value::Null);
    reply(ready);
    for line in std::io::stdin().lock().lines() {
        let Ok(line) = line else { break };
        if line.trim().is_empty() {
            continue;
        }
        let answer = serde_json::from_str(&line)
            .map_err(|error| Failure::Command(error.to_string()))
            .and_then(|command| client.answer(&command));
        reply(answer);
    }
    let _ = client.close();
    let _ = client.finalize();
}

fn reply(answer: Answer<Value>) {
    let answer = match answer {
        Ok(value) => json!({ "ok": value }),
        Err(Failure::Rv(rv)) => json!({ "error": rv_name(rv) }),
        Err(Failure::Command(text)) => json!({ "error": text }),
    };
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{answer}");
    let _ = out.flush();
}
