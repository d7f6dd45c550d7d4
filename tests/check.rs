//! `tokenfs check` calls nothing wrong that is not, and names what is torn or suspicious, and where. It writes nothing.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod check_common;
mod support;

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use check_common::*;
use support::template::{boolean, ulong};
use support::*;

// ------------------------------------------------------------------------------------------------------- no alarm

#[test]
fn golden_stores_are_clean() {
    for golden in GOLDEN {
        for backend in BACKENDS {
            let softhsm = Softhsm::golden(golden, backend);
            let checked = look(&softhsm);
            checked.assert_clean();
            assert_eq!(checked.summary(), "4 tokens, 36 objects: clean");
            let said = check(&softhsm, &["-v"]);
            assert_eq!(said.code, 0, "{said:#?}");
            let expected = format!(": note: a token of the backend {backend}, 32 objects\n");
            assert!(said.out.contains(&expected), "{said:#?}");
            let before = exactly(&softhsm);
            check(&softhsm, &["--repair"]).assert_clean();
            assert!(before == exactly(&softhsm), "a clean store is not written");
        }
    }
}

both_backends! {
    fn what_softhsm_fills_stays_clean(backend) {
        let softhsm = Softhsm::new(backend);
        softhsm.p11().populate().unwrap();
        check(&softhsm, &[]).assert_clean();
        // A listing writes.
        let mut client = softhsm.p11();
        client.open("Prod Schlüssel 1", Some(PIN)).unwrap();
        client.find(&[]).unwrap();
        check(&softhsm, &[]).assert_clean();
    }

    fn a_store_in_use_is_clean(backend) {
        let (softhsm, mut writer) = Softhsm::with_token(backend);
        let mut logins = softhsm.p11();
        let mut keys = softhsm.p11();
        keys.open("test", Some(PIN)).unwrap();
        let done = AtomicBool::new(false);
        let running = || !done.load(Ordering::Relaxed);
        let (mut rounds, written) = (0, AtomicUsize::new(0));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while running() {
                    let made = writer.bulk(3, "made", &data_object("x")).unwrap();
                    writer.set_label(made[0], "changed").unwrap();
                    for object in made {
                        writer.destroy(object).unwrap();
                    }
                    written.fetch_add(1, Ordering::Relaxed);
                }
            });
            scope.spawn(|| {
                while running() {
                    logins.open("test", Some(PIN)).unwrap();
                }
            });
            scope.spawn(|| {
                let template = [boolean(1, true), boolean(2, true), ulong(0x161, 32)];
                while running() {
                    let key = keys.generate(0x1080, &template).unwrap();
                    keys.destroy(key).unwrap();
                }
            });
            let start = Instant::now();
            let enough = Duration::from_secs(if full() { 30 } else { 6 });
            // On a busy machine SQLite lets each of the writers wait for seconds.
            let few = |rounds| rounds <= 3 || written.load(Ordering::Relaxed) <= 3;
            let mut alarms = Vec::new();
            while start.elapsed() < enough || (few(rounds) && start.elapsed() < 10 * enough) {
                let checked = check(&softhsm, &[]);
                rounds += 1;
                if checked.code != 0 {
                    alarms.push(checked);
                }
            }
            done.store(true, Ordering::Relaxed);
            assert!(alarms.is_empty(), "{alarms:#?}");
        });
        let written = written.into_inner();
        println!("{rounds} checks beside {written} rounds of writing");
        assert!(rounds > 3 && written > 3, "{rounds} {written}");
        check(&softhsm, &[]).assert_clean();
    }
}

#[test]
fn an_object_with_few_attributes_is_not_called_cut_off() {
    let (softhsm, _, object) = with_object();
    let data = fs::read(&object).unwrap();
    // CKA_LABEL without CKA_TOKEN before it is nothing that a cut leaves.
    let ends = ends(&data);
    let sparse = [&data[..ends[1]], &data[ends[2]..ends[4]]].concat();
    fs::write(&object, sparse).unwrap();
    check(&softhsm, &[]).assert_clean();
}

// ------------------------------------------------------------------------------------------------ torn, suspicious

both_backends! {
    fn what_does_not_say_whether_it_is_private_is_suspicious_with_a_text(backend) {
        let (softhsm, mut client) = Softhsm::with_token(backend);
        client.create(&data_object("it")).unwrap();
        drop(client);
        let token = softhsm.token_directory();
        match backend {
            Backend::File => {
                let object = objects(&token).remove(0);
                let data = fs::read(&object).unwrap();
                let ends = ends(&data);
                fs::write(&object, [&data[..ends[2]], &data[ends[3]..]].concat()).unwrap();
            }
            Backend::Db => {
                let writer = rusqlite::Connection::open(token.join("sqlite3.db")).unwrap();
                assert_eq!(writer.execute("delete from attribute_boolean where type = 2 and object_id > 1", []), Ok(1));
            }
        }
        let checked = look(&softhsm);
        assert_eq!(checked.code, 1);
        let said = ": CKA_LABEL of an object without CKA_PRIVATE, which SoftHSM takes for private, is no ciphertext (2 bytes)";
        assert!(checked.findings().iter().any(|line| line.contains(": suspicious: ") && line.contains(said)), "{checked:#?}");
        let mut client = softhsm.p11();
        client.open("test", Some(PIN)).unwrap();
        assert_eq!(client.find_label("it"), Err(Refusal("CKR_GENERAL_ERROR".into())));
    }
}

#[test]
fn every_cut_of_an_object_is_found_with_its_place() {
    let softhsm = Softhsm::golden(Golden::V2_6_1, Backend::File);
    let mut expected = BTreeMap::new();
    for token in softhsm.token_directories() {
        for object in objects(&token) {
            let data = fs::read(&object).unwrap();
            let ends = ends(&data);
            let (whole, boundaries) = ends.split_last().unwrap();
            assert_eq!(*whole, data.len());
            for end in boundaries {
                for (length, word) in [
                    (*end, "suspicious"),
                    (end + 7, "suspicious"),
                    (end + 8, "torn"),
                ] {
                    let stem = object.file_stem().unwrap().to_str().unwrap();
                    let copy = token.join(format!("{stem}-{length}.object"));
                    fs::write(&copy, &data[..length]).unwrap();
                    set_mode(&copy, 0o600);
                    fs::File::create(copy.with_extension("lock")).unwrap();
                    set_mode(&copy.with_extension("lock"), 0o600);
                    // Within an attribute, the offset is that of the field that is not there.
                    let place = if word == "torn" { length } else { *end };
                    expected.insert(copy, (word, place));
                }
            }
        }
    }
    let checked = look(&softhsm);
    assert_eq!(checked.code, 1);
    assert_eq!(checked.findings().len(), expected.len());
    for (path, (word, place)) in &expected {
        let line = checked.of_path(path);
        assert!(line.starts_with(&format!("{word}: ")), "{line}");
        assert!(line.contains(&format!(" at byte {place} (")), "{line}");
    }
    let said = format!(
        "4 tokens, {} objects: {} findings",
        36 + expected.len(),
        expected.len()
    );
    assert_eq!(checked.summary(), said);
    println!("{} cuts", expected.len());
    // Nothing of that can be mended.
    let before = exactly(&softhsm);
    assert_eq!(check(&softhsm, &["--repair"]).code, 1);
    assert!(before == exactly(&softhsm));
}

#[test]
fn a_cut_that_softhsm_has_filled_up_is_found_by_the_lost_key() {
    let (softhsm, mut client) = Softhsm::with_token(Backend::File);
    let public = [boolean(1, true), ulong(0x121, 1024)];
    let private = [boolean(1, true), boolean(2, true)];
    client.generate_pair(0, &public, &private).unwrap();
    drop(client);
    let class = |object: &PathBuf| {
        independent::parse_object(&fs::read(object).unwrap())
            .unwrap()
            .1
    };
    let mut files = objects(&softhsm.token_directory());
    files.retain(|object| class(object)[0].1 == independent::Value::Ulong(3));
    let key = files.remove(0);
    let data = fs::read(&key).unwrap();
    // Before CKA_PRIVATE_EXPONENT, in the middle of the key.
    let exponent = *ends(&data)
        .iter()
        .find(|end| data[**end..].starts_with(&0x123u64.to_be_bytes()))
        .unwrap();
    fs::write(&key, &data[..exponent]).unwrap();
    let checked = check(&softhsm, &[]);
    let line = checked.of_path(&key);
    let behind = "suspicious: it loads, and looks cut off behind CKA_PUBLIC_EXPONENT: ";
    assert!(line.starts_with(behind), "{line}");

    // A SoftHSM that looks at it makes a whole object of it.
    let mut client = softhsm.p11();
    client.open("test", Some(PIN)).unwrap();
    for object in client.find(&[]).unwrap() {
        client.get(object.handle).unwrap();
    }
    drop(client);
    let filled = fs::read(&key).unwrap();
    assert_eq!(ends(&filled).len(), ends(&data).len());
    let checked = look(&softhsm);
    let line = checked.of_path(&key);
    assert!(
        line.starts_with("suspicious: CKA_PRIVATE_EXPONENT is empty"),
        "{line}"
    );
}

#[test]
fn each_thing_in_an_object_is_named_with_its_byte() {
    let (softhsm, mut client) = Softhsm::with_token(Backend::File);
    let mut private = data_object("private");
    private[2] = boolean(2, true);
    for _ in 0..6 {
        client.create(&private).unwrap();
    }
    drop(client);
    let files = objects(&softhsm.token_directory());
    let data = fs::read(&files[0]).unwrap();
    let ends = ends(&data);
    // Empty, as SoftHSM leaves it when it dies at the wrong moment.
    fs::write(&files[0], b"").unwrap();
    // Attributes in another order.
    let swapped = [
        &data[..ends[1]],
        &data[ends[2]..ends[3]],
        &data[ends[1]..ends[2]],
        &data[ends[3]..],
    ];
    fs::write(&files[1], swapped.concat()).unwrap();
    // One twice, next to each other.
    let twice = [&data[..ends[2]], &data[ends[1]..ends[2]], &data[ends[2]..]];
    fs::write(&files[2], twice.concat()).unwrap();
    // A label in the clear.
    let mut clear = data.clone();
    let label = ends[3];
    clear.splice(
        label + 16..ends[4],
        [&5u64.to_be_bytes()[..], b"clear"].concat(),
    );
    fs::write(&files[3], clear).unwrap();
    let checked = look(&softhsm);
    for (file, start, end) in [
        (0, "torn: ", " at byte 0".to_owned()),
        (
            1,
            "suspicious: CKA_TOKEN follows CKA_PRIVATE",
            format!(" at byte {}", ends[1] + ends[3] - ends[2]),
        ),
        (
            2,
            "suspicious: CKA_TOKEN is stored more than once",
            format!(" at byte {}", ends[2]),
        ),
        (
            3,
            "suspicious: CKA_LABEL of a private object is no ciphertext (5 bytes)",
            format!(" at byte {label}"),
        ),
    ] {
        let line = checked.of_path(&files[file]);
        assert!(
            line.starts_with(start) && line.contains(&format!("{end} (")),
            "{line}"
        );
    }
    assert_eq!(checked.findings().len(), 4, "{checked:#?}");
    // No value is ever quoted.
    assert!(!checked.out.contains("\"clear\"") && !checked.out.contains("clear\n"));
    // And it is as bad as it says.
    let mut client = softhsm.p11();
    client.open("test", Some(PIN)).unwrap();
    assert_eq!(
        client.find_label("it"),
        Err(Refusal("CKR_GENERAL_ERROR".into()))
    );
}

#[test]
fn a_token_object_that_is_cut_is_found() {
    let (softhsm, client) = Softhsm::with_token(Backend::File);
    drop(client);
    let own = softhsm.token_directory().join("token.object");
    let data = fs::read(&own).unwrap();
    let ends = ends(&data);
    fs::write(&own, &data[..ends[3]]).unwrap();
    let checked = look(&softhsm);
    assert_eq!(
        checked.of_path(&own),
        "suspicious: the token lacks CKA_OS_SOPIN, CKA_OS_USERPIN (bring it back from a backup)"
    );
    // The last one alone, which the flags say has been set.
    fs::write(&own, &data[..ends[4]]).unwrap();
    assert_eq!(
        look(&softhsm).of_path(&own),
        "suspicious: the token lacks CKA_OS_USERPIN (bring it back from a backup)"
    );
    fs::write(&own, &data[..ends[3] + 9]).unwrap();
    let checked = look(&softhsm);
    let line = checked.of_path(&own);
    assert!(line.starts_with("torn: ") && line.contains(&format!(" at byte {} (", ends[3] + 8)));
    assert_eq!(checked.code, 1);
}

#[test]
fn a_file_that_is_larger_than_any_object_is_not_read() {
    let (softhsm, client, object) = with_object();
    drop(client);
    let file = fs::File::options().write(true).open(&object).unwrap();
    file.set_len(1 << 30).unwrap();
    let checked = check(&softhsm, &[]);
    let line = checked.of_path(&object);
    assert!(
        line.starts_with("torn: the file has 1073741824 bytes"),
        "{line}"
    );
}
