//! A test's end of a `p11` process: see `p11.rs` for the commands.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

use serde_json::{Value, json};

use super::template::{Attribute, hex, to_json, unhex};
use super::{Softhsm, User, as_user, example, reachable};

/// What PKCS #11 answered, `CKR_…`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal(pub String);

/// The answer to a command.
pub type Answer<T> = Result<T, Refusal>;

/// A SoftHSM in a process of its own, with at most one session.
#[derive(Debug)]
pub struct P11 {
    child: Child,
    input: Option<ChildStdin>,
    /// Locked by nobody: with it tests can share what holds a client.
    answers: Mutex<Receiver<String>>,
    /// How long an answer may take: a minute, unless a test says otherwise.
    pub patience: Duration,
}

/// An object as `find` gives it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    pub handle: u64,
    pub class: Option<u64>,
    pub label: Option<Vec<u8>>,
}

/// What `get` gives: each type with its value, or with none if that is sensitive.
pub type Seen = Vec<(u64, Option<Attribute>)>;

impl P11 {
    /// Loads the library of a store's backend, with the store's configuration.
    pub fn start(softhsm: &Softhsm) -> Self {
        Self::start_command(softhsm, Command::new(example("p11")), &softhsm.library())
    }

    /// The same as another user, who must be able to reach the store.
    pub fn start_as(softhsm: &Softhsm, user: User) -> Self {
        let command = as_user(user, reachable(&example("p11")));
        Self::start_command(softhsm, command, &reachable(&softhsm.library()))
    }

    fn start_command(softhsm: &Softhsm, mut command: Command, library: &Path) -> Self {
        let mut child = command
            .arg(library)
            .env("SOFTHSM2_CONF", &softhsm.conf)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("starting the p11 example");
        let (sender, answers) = channel();
        let output = BufReader::new(child.stdout.take().expect("its output"));
        std::thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        let mut client = Self {
            input: child.stdin.take(),
            child,
            answers: Mutex::new(answers),
            patience: Duration::from_secs(60),
        };
        client.finish().expect("C_Initialize");
        client
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends a command and does not wait: [`P11::finish`] does.
    pub fn begin(&mut self, command: &Value) {
        let input = self.input.as_mut().expect("its input");
        writeln!(input, "{command}").expect("writing to the p11 process");
    }

    /// The answer to the command that was begun, if it comes in time.
    pub fn poll(&mut self, limit: Duration) -> Option<Answer<Value>> {
        let answers = self.answers.get_mut().unwrap_or_else(|e| e.into_inner());
        let line = match answers.recv_timeout(limit) {
            Ok(line) => line,
            Err(RecvTimeoutError::Timeout) => return None,
            Err(RecvTimeoutError::Disconnected) => {
                panic!("the p11 process has died: {:?}", self.child.wait())
            }
        };
        let answer: Value = serde_json::from_str(&line).expect("an answer");
        Some(match answer.get("error").and_then(Value::as_str) {
            Some(error) => Err(Refusal(error.to_owned())),
            None => Ok(answer["ok"].clone()),
        })
    }

    /// The answer to the command that was begun.
    pub fn finish(&mut self) -> Answer<Value> {
        self.poll(self.patience)
            .unwrap_or_else(|| panic!("the p11 process did not answer in {:?}", self.patience))
    }

    /// One command and its answer.
    pub fn call(&mut self, command: &Value) -> Answer<Value> {
        self.begin(command);
        self.finish()
    }

    /// The labels and serial numbers of the initialised tokens.
    pub fn tokens(&mut self) -> Answer<Vec<(String, String)>> {
        let tokens = self.call(&json!({"do": "tokens"}))?;
        let text = |token: &Value, name: &str| token[name].as_str().unwrap_or_default().to_owned();
        let tokens = tokens.as_array().cloned().unwrap_or_default();
        Ok(tokens
            .iter()
            .map(|t| (text(t, "label"), text(t, "serial")))
            .collect())
    }

    /// A new token with the SO PIN 5678; its serial number. Without a PIN, the user's PIN stays unset.
    pub fn init_token(&mut self, label: &str, pin: Option<&str>) -> Answer<String> {
        let label = hex(label.as_bytes());
        let command = json!({"do": "init-token", "label": label, "so_pin": "5678", "pin": pin});
        let serial = self.call(&command)?;
        Ok(serial.as_str().unwrap_or_default().to_owned())
    }

    /// Opens a session with the token of that label or serial number, as its user, or as nobody without a PIN. A
    /// session that was open is closed.
    pub fn open(&mut self, token: &str, pin: Option<&str>) -> Answer<()> {
        let command = json!({"do": "open", "token": token, "pin": pin});
        self.call(&command).map(drop)
    }

    /// The same as the security officer.
    pub fn open_so(&mut self, token: &str, pin: &str) -> Answer<()> {
        let command = json!({"do": "open", "token": token, "pin": pin, "so": true});
        self.call(&command).map(drop)
    }

    /// Closes the session.
    pub fn close(&mut self) -> Answer<()> {
        self.call(&json!({"do": "close"})).map(drop)
    }

    /// `C_Finalize` and `C_Initialize`: as a new process would see the store.
    pub fn reinitialize(&mut self) -> Answer<()> {
        self.call(&json!({"do": "finalize"})).map(drop)
    }

    /// `C_CreateObject`.
    pub fn create(&mut self, attributes: &[Attribute]) -> Answer<u64> {
        let command = json!({"do": "create", "attributes": to_json(attributes)});
        self.call(&command).map(handle)
    }

    /// As many objects, labelled `label` and a number from 0.
    pub fn bulk(
        &mut self,
        count: usize,
        label: &str,
        attributes: &[Attribute],
    ) -> Answer<Vec<u64>> {
        let (label, attributes) = (hex(label.as_bytes()), to_json(attributes));
        let command =
            json!({"do": "bulk", "count": count, "label": label, "attributes": attributes});
        self.call(&command).map(handles)
    }

    /// `C_GenerateKey`.
    pub fn generate(&mut self, mechanism: u64, attributes: &[Attribute]) -> Answer<u64> {
        let attributes = to_json(attributes);
        let command = json!({"do": "generate", "mechanism": mechanism, "attributes": attributes});
        self.call(&command).map(handle)
    }

    /// `C_GenerateKeyPair`: the public key, the private key.
    pub fn generate_pair(
        &mut self,
        mechanism: u64,
        public: &[Attribute],
        private: &[Attribute],
    ) -> Answer<(u64, u64)> {
        let (public, private) = (to_json(public), to_json(private));
        let command = json!({"do": "generate-pair", "mechanism": mechanism, "public": public, "private": private});
        let pair = handles(self.call(&command)?);
        Ok((pair[0], pair[1]))
    }

    /// `C_CopyObject`.
    pub fn copy(&mut self, object: u64, attributes: &[Attribute]) -> Answer<u64> {
        let command = json!({"do": "copy", "object": object, "attributes": to_json(attributes)});
        self.call(&command).map(handle)
    }

    /// `C_SetAttributeValue`.
    pub fn set(&mut self, object: u64, attributes: &[Attribute]) -> Answer<()> {
        let command = json!({"do": "set", "object": object, "attributes": to_json(attributes)});
        self.call(&command).map(drop)
    }

    /// Begins a `C_SetAttributeValue` of the label.
    pub fn begin_label(&mut self, object: u64, label: &str) {
        let attributes = [super::template::bytes(super::independent::CKA_LABEL, label)];
        let command = json!({"do": "set", "object": object, "attributes": to_json(&attributes)});
        self.begin(&command);
    }

    /// `C_SetAttributeValue` of the label.
    pub fn set_label(&mut self, object: u64, label: &str) -> Answer<()> {
        self.set(
            object,
            &[super::template::bytes(super::independent::CKA_LABEL, label)],
        )
    }

    /// `C_DestroyObject`.
    pub fn destroy(&mut self, object: u64) -> Answer<()> {
        self.call(&json!({"do": "destroy", "object": object}))
            .map(drop)
    }

    /// The objects that have these attributes; all of them without any.
    pub fn find(&mut self, attributes: &[Attribute]) -> Answer<Vec<Found>> {
        let found = self.call(&json!({"do": "find", "attributes": to_json(attributes)}))?;
        let found = found.as_array().cloned().unwrap_or_default();
        Ok(found
            .iter()
            .map(|object| Found {
                handle: object["handle"].as_u64().unwrap_or_default(),
                class: object["class"].as_u64(),
                label: object["label"].as_str().and_then(unhex),
            })
            .collect())
    }

    /// The objects of a label.
    pub fn find_label(&mut self, label: &str) -> Answer<Vec<u64>> {
        let label = super::template::bytes(super::independent::CKA_LABEL, label);
        let command = json!({"do": "find", "bare": true, "attributes": to_json(&[label])});
        self.call(&command).map(handles)
    }

    /// All attributes that the session gives of an object.
    pub fn get(&mut self, object: u64) -> Answer<Seen> {
        let seen = self.call(&json!({"do": "get", "object": object}))?;
        let seen = seen.as_array().cloned().unwrap_or_default();
        Ok(seen
            .iter()
            .map(|attribute| {
                let attribute_type = attribute[0].as_u64().unwrap_or_default();
                (attribute_type, Attribute::from_json(attribute))
            })
            .collect())
    }

    /// One attribute as bytes; none if the object lacks it, or if it is sensitive.
    pub fn get_bytes(&mut self, object: u64, attribute_type: u64) -> Answer<Option<Vec<u8>>> {
        let seen = self.call(&json!({"do": "get", "object": object, "types": [attribute_type]}))?;
        Ok(seen[0][1].as_str().and_then(unhex))
    }

    /// The label of an object.
    pub fn label(&mut self, object: u64) -> Answer<Option<Vec<u8>>> {
        self.get_bytes(object, super::independent::CKA_LABEL)
    }

    /// `C_Sign`.
    pub fn sign(&mut self, object: u64, mechanism: u64, data: &[u8]) -> Answer<Vec<u8>> {
        let command =
            json!({"do": "sign", "object": object, "mechanism": mechanism, "data": hex(data)});
        let signature = self.call(&command)?;
        Ok(signature.as_str().and_then(unhex).unwrap_or_default())
    }

    /// `C_Verify`: whether it is a signature.
    pub fn verify(
        &mut self,
        object: u64,
        mechanism: u64,
        data: &[u8],
        signature: &[u8],
    ) -> Answer<bool> {
        let (data, signature) = (hex(data), hex(signature));
        let command = json!({"do": "verify", "object": object, "mechanism": mechanism, "data": data, "signature": signature});
        Ok(self.call(&command)? == json!(true))
    }

    /// Fills an empty tokendir as the golden stores are.
    pub fn populate(&mut self) -> Answer<()> {
        self.call(&json!({"do": "populate"})).map(drop)
    }

    /// Kills it, as a crash would.
    pub fn kill(mut self) {
        let _ = self.child.kill();
    }
}

impl Drop for P11 {
    /// The end of its input is its end; whatever hangs is killed.
    fn drop(&mut self) {
        drop(self.input.take());
        for _ in 0..200 {
            if matches!(self.child.try_wait(), Ok(Some(_))) {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn handle(value: Value) -> u64 {
    value.as_u64().expect("a handle")
}

fn handles(value: Value) -> Vec<u64> {
    let handles = value.as_array().expect("handles");
    handles
        .iter()
        .map(|h| h.as_u64().expect("a handle"))
        .collect()
}
