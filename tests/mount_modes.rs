//! Modes and owners as a user of a mount meets them: what `stat` says for every mask and every mode in the store, and what
//! the kernel makes of it when somebody else comes.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod support;

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use support::template::{Attribute, boolean, bytes, ulong};
use support::*;

const FILE_MODES: [u32; 4] = [0o666, 0o644, 0o660, 0o600];
const DIRECTORY_MODES: [u32; 5] = [0o777, 0o750, 0o700, 0o2770, 0o2755];

/// The store of four tokens, with maps, where modes and owners go round: `shift` says where they begin.
fn motley(backend: Backend, shift: usize) -> Softhsm {
    assert!(
        is_root(),
        "this test makes files of other users: run scripts/test as root"
    );
    let softhsm = Softhsm::golden(Golden::V2_6_1, backend);
    set_mode(&softhsm.tokendir, [0o755, 0o2775, 0o711][shift % 3]);
    let mut count = shift;
    for (index, token) in softhsm.token_directories().into_iter().enumerate() {
        for path in walk(&token) {
            let (uid, gid) = (1000 + count % 7, 2000 + count % 5);
            let owner = (Some((uid as u32).into()), Some((gid as u32).into()));
            nix::unistd::chown(&path, owner.0, owner.1).unwrap();
            set_mode(
                &path,
                if path.is_dir() {
                    DIRECTORY_MODES[(index + shift) % DIRECTORY_MODES.len()]
                } else {
                    FILE_MODES[count % FILE_MODES.len()]
                },
            );
            count += 1;
        }
    }
    softhsm
}

#[track_caller]
fn assert_is(seen: &Path, backing: &Path, mode_wanted: u32) {
    let (seen_as, stored) = (
        fs::symlink_metadata(seen).unwrap(),
        fs::metadata(backing).unwrap(),
    );
    let text = |mode: u32, uid: u32, gid: u32| format!("{mode:04o} {uid}:{gid}");
    assert_eq!(
        text(seen_as.mode() & 0o7777, seen_as.uid(), seen_as.gid()),
        text(mode_wanted, stored.uid(), stored.gid()),
        "{} of {}",
        seen.display(),
        backing.display()
    );
}

fn names(directory: &Path) -> Vec<std::ffi::OsString> {
    let entries =
        fs::read_dir(directory).unwrap_or_else(|e| panic!("{}: {e}", directory.display()));
    entries.map(|entry| entry.unwrap().file_name()).collect()
}

/// The bits that a directory made of labels keeps: `r` and `x` for a class of its users only if they may read every file that the labels
/// are in. Where owner or group are others than the directory's, both the group and everybody have to be allowed.
fn listable(directory: &Path, sources: &[PathBuf], mask: u32) -> u32 {
    let directory = fs::metadata(directory).unwrap();
    let mut bits = 0o7777;
    for source in sources {
        let source = fs::metadata(source).unwrap();
        let may = |bit: u32| source.mode() & !mask & bit == bit;
        if !may(0o004) {
            bits &= !0o005;
        }
        if !may(0o040) || source.gid() != directory.gid() && !may(0o044) {
            bits &= !0o050;
        }
        let is_owner = source.uid() == directory.uid();
        if is_owner && !may(0o400) || !is_owner && directory.uid() != 0 && !may(0o044) {
            bits &= !0o500;
        }
    }
    bits
}

/// What was looked at.
#[derive(Debug, Default)]
struct Looked {
    tokens: usize,
    objects: usize,
    attributes: usize,
    maps: usize,
}

/// Compares all modes and owners in a mount with those in the store.
fn check_all(softhsm: &Softhsm, mount: &Path, mask: u32) -> Looked {
    let mut looked = Looked::default();
    assert_is(mount, &softhsm.tokendir, mode(&softhsm.tokendir));
    let control = mount.join(".tokenfs");
    assert_is(&control, &softhsm.tokendir, mode(&softhsm.tokendir));
    let own = |token: &PathBuf| match softhsm.backend {
        Backend::Db => token.join("sqlite3.db"),
        Backend::File => token.join("token.object"),
    };
    let tokens = softhsm.token_directories();
    let told: Vec<PathBuf> = tokens.iter().map(own).chain(tokens.clone()).collect();
    assert_is(
        &control.join("by-label"),
        &softhsm.tokendir,
        mode(&softhsm.tokendir) & listable(&softhsm.tokendir, &told, mask),
    );
    assert_eq!(mode(&control.join("log")), 0o600);
    for store in softhsm.token_directories() {
        let token = mount.join(store.file_name().unwrap());
        let of_token = mode(&store) & !mask;
        assert_is(&token, &store, of_token);
        let objects: Vec<PathBuf> = walk(&store)
            .into_iter()
            .filter(|path| match softhsm.backend {
                Backend::Db => path.ends_with("sqlite3.db") && names(&token).len() > 1,
                Backend::File => {
                    path.extension() == Some(OsStr::new("object"))
                        && !path.ends_with("token.object")
                }
            })
            .collect();
        let listed = of_token & listable(&store, &objects, mask);
        assert_is(&by_label(mount, &token), &store, listed);
        looked.tokens += 1;
        for name in names(&token) {
            let backing = match softhsm.backend {
                Backend::Db => store.join("sqlite3.db"),
                Backend::File => store.join(Path::new(&name).with_extension("object")),
            };
            let of_file = mode(&backing) & !mask & 0o666;
            let of_directory = of_file | (of_file & 0o444) >> 2;
            assert_is(&token.join(&name), &backing, of_directory);
            looked.objects += 1;
            for attribute in walk(&token.join(&name)).into_iter().skip(1) {
                if attribute.is_dir() {
                    looked.maps += 1;
                    assert_is(&attribute, &backing, of_directory);
                } else {
                    looked.attributes += 1;
                    assert_is(&attribute, &backing, of_file);
                }
            }
        }
    }
    looked
}

/// The directory of a token below `by-label`.
fn by_label(mount: &Path, token: &Path) -> PathBuf {
    let label = fs::read(token.join("token/CKA_OS_TOKENLABEL")).unwrap();
    let label = label.trim_ascii_end();
    let start = &token.file_name().unwrap().as_bytes()[..8];
    let twin = [label, b"~", start].concat();
    let all = mount.join(".tokenfs/by-label");
    let alone = all.join(OsStr::from_bytes(label));
    if alone.exists() {
        alone
    } else {
        all.join(OsStr::from_bytes(&twin))
    }
}

/// What a command says on standard error when it is refused; it must be refused for want of permission.
#[track_caller]
fn denied(command: &mut Command) {
    let said = run_to_fail(command);
    assert!(said.contains("Permission denied"), "{command:?}: {said}");
}

fn cat(user: User, path: &Path) -> Command {
    let mut command = as_user(user, "cat");
    command.arg(path);
    command
}

fn ls(user: User, path: &Path) -> Command {
    let mut command = as_user(user, "ls");
    command.arg("-A").arg(path);
    command
}

/// A public object of a label.
fn data(label: &str) -> Vec<Attribute> {
    vec![
        ulong(0, 0),
        boolean(1, true),
        boolean(2, false),
        bytes(3, label),
        bytes(0x11, "the value"),
    ]
}

/// The directory of the only object in the only token of a mount.
fn only_object(softhsm: &Softhsm, mount: &Path) -> PathBuf {
    let store = softhsm.read();
    let (token, content) = store.first_key_value().unwrap();
    assert_eq!(content.objects.len(), 1);
    let token = mount.join(token);
    let mut objects = names(&token);
    objects.retain(|name| name != "token");
    assert_eq!(objects.len(), 1, "{objects:?}");
    token.join(objects.remove(0))
}

/// The file that an object is stored in.
fn backing_file(softhsm: &Softhsm, object: &Path) -> PathBuf {
    softhsm.token_directory().join(match softhsm.backend {
        Backend::Db => PathBuf::from("sqlite3.db"),
        Backend::File => Path::new(object.file_name().unwrap()).with_extension("object"),
    })
}

both_backends! {
    fn every_mode_and_owner_is_the_stores_without_the_mask(backend) {
        let mut shift = 0;
        for configured in [0o077, 0o027, 0o007, 0o022] {
            for of_process in [0o022, 0o077] {
                let softhsm = motley(backend, shift);
                softhsm.configure(&format!("objectstore.umask = {configured:04o}\n"));
                let mount = MountOptions::new().umask(of_process).mount(&softhsm);
                let looked = check_all(&softhsm, mount.path(), configured | of_process);
                assert_eq!(looked.tokens, 4);
                assert!(looked.objects == 36 + 4 && looked.attributes > 500 && looked.maps >= 2, "{looked:?}");
                shift += 1;
            }
        }
    }

    fn a_lax_mask_shows_lax_modes(backend) {
        // Nobody may widen a mode: what the store forbids stays forbidden without any mask.
        let softhsm = motley(backend, 0);
        softhsm.configure("objectstore.umask = 0000\n");
        let mount = MountOptions::new().umask(0).mount(&softhsm);
        check_all(&softhsm, mount.path(), 0);
    }

    fn the_umask_option_stands_for_the_configured_one(backend) {
        let softhsm = motley(backend, 1);
        softhsm.configure("objectstore.umask = 0077\n");
        let with = |options: MountOptions, mask: u32| {
            let mount = options.mount(&softhsm);
            check_all(&softhsm, mount.path(), mask);
        };
        with(MountOptions::new().umask(0).argument("--umask").argument("0027"), 0o027);
        with(MountOptions::new().umask(0).option("umask=0007"), 0o007);
        // That of the process is added all the same.
        with(MountOptions::new().umask(0o022).argument("--umask=0"), 0o022);
        with(MountOptions::new().umask(0o027).option("umask=0"), 0o027);
    }

    fn the_group_reads_what_the_mode_lets_it_and_others_do_not(backend) {
        let (softhsm, mut client) = Softhsm::with_token(backend);
        client.create(&data("shared")).unwrap();
        drop(client);
        softhsm.configure("objectstore.umask = 0000\n");
        let mount = MountOptions::new().umask(0o022).option("allow_other").mount(&softhsm);
        let object = only_object(&softhsm, mount.path());
        let (token, label) = (object.parent().unwrap().to_owned(), object.join("CKA_LABEL"));
        let (file, directory) = (backing_file(&softhsm, &object), softhsm.token_directory());
        nix::unistd::chown(&file, None, Some(ALICE.gid.into())).unwrap();
        nix::unistd::chown(&directory, None, Some(ALICE.gid.into())).unwrap();
        // Who is to find an object by its label has to be allowed to read those of the tokens too.
        nix::unistd::chown(&softhsm.tokendir, None, Some(ALICE.gid.into())).unwrap();
        if backend == Backend::File {
            let own = directory.join("token.object");
            nix::unistd::chown(&own, None, Some(ALICE.gid.into())).unwrap();
            set_mode(&own, 0o640);
        }
        // Each look is what the kernel remembers from then on; each change in the store has to undo that.
        let change = |path: &Path, to: u32, seen: &Path, as_mode: u32| {
            set_mode(path, to);
            let start = Instant::now();
            eventually(Duration::from_secs(1), "a change of the mode", || mode(seen) == as_mode);
            println!("{backend}: chmod {to:o} seen after {:?}", start.elapsed());
        };
        set_mode(&directory, 0o755);
        change(&file, 0o640, &label, 0o640);
        assert_eq!(text_of(&mut cat(ALICE, &label)), "shared");
        assert!(text_of(&mut ls(ALICE, &object)).contains("CKA_VALUE"));
        assert!(text_of(&mut ls(BOB, &token)).lines().count() == 2);
        denied(&mut cat(BOB, &label));
        denied(&mut ls(BOB, &object));
        denied(as_user(BOB, "stat").arg(&label));

        change(&file, 0o644, &object, 0o755);
        change(&file, 0o644, &label, 0o644);
        assert_eq!(text_of(&mut cat(BOB, &label)), "shared");
        assert!(text_of(&mut ls(BOB, &object)).contains("CKA_VALUE"));

        // List and open are two things: r without x is not given to a directory.
        change(&file, 0o600, &object, 0o700);
        for user in [ALICE, BOB] {
            denied(&mut cat(user, &label));
            denied(&mut ls(user, &object));
        }
        assert_eq!(fs::read(&label).unwrap(), b"shared");

        change(&file, 0o644, &object, 0o755);
        change(&file, 0o644, &label, 0o644);
        change(&directory, 0o750, &token, 0o750);
        assert_eq!(text_of(&mut cat(ALICE, &label)), "shared");
        denied(&mut cat(BOB, &label));
        denied(&mut ls(BOB, &token));
        // Not by the other way either.
        let labelled = by_label(mount.path(), &token);
        assert_eq!(mode(&labelled), 0o750);
        assert_eq!(text_of(&mut ls(ALICE, &labelled)), "shared.data\n");
        assert_eq!(text_of(&mut cat(ALICE, &labelled.join("shared.data/CKA_LABEL"))), "shared");
        denied(&mut ls(BOB, &labelled));
        denied(&mut cat(BOB, &labelled.join("shared.data/CKA_LABEL")));
        assert!(text_of(&mut ls(BOB, mount.path())).contains(token.file_name().unwrap().to_str().unwrap()));

        // A change of the owner counts as much as one of the mode.
        nix::unistd::chown(&directory, Some(BOB.uid.into()), None).unwrap();
        eventually(Duration::from_secs(1), "a change of the owner", || fs::metadata(&token).unwrap().uid() == BOB.uid);
        assert_eq!(text_of(&mut cat(BOB, &label)), "shared");

        let log = mount.join(".tokenfs/log");
        fs::read(&log).unwrap();
        denied(&mut cat(BOB, &log));
        denied(&mut cat(ALICE, &log));
        mount.unmount();
    }

    fn the_mask_keeps_others_out_of_a_lax_store(backend) {
        let (softhsm, mut client) = Softhsm::with_token(backend);
        client.create(&data("lax")).unwrap();
        drop(client);
        softhsm.configure("objectstore.umask = 0027\n");
        let token = softhsm.token_directory();
        for path in walk(&token) {
            nix::unistd::chown(&path, None, Some(ALICE.gid.into())).unwrap();
            set_mode(&path, if path.is_dir() { 0o777 } else { 0o666 });
        }
        // He could read the files themselves.
        run(as_user(BOB, "ls").arg(&token));
        let mount = MountOptions::new().umask(0).option("allow_other").mount(&softhsm);
        let object = only_object(&softhsm, mount.path());
        assert_eq!(text_of(&mut cat(ALICE, &object.join("CKA_LABEL"))), "lax");
        denied(&mut cat(BOB, &object.join("CKA_LABEL")));
        denied(&mut ls(BOB, object.parent().unwrap()));
        // In a group that may, he may.
        let mut in_group = as_user_in(BOB, &[ALICE.gid], "cat");
        assert_eq!(text_of(in_group.arg(object.join("CKA_LABEL"))), "lax");
    }

    fn without_allow_other_nobody_else_comes_in(backend) {
        let softhsm = motley(backend, 0);
        softhsm.configure("objectstore.umask = 0000\n");
        let mount = MountOptions::new().umask(0).mount(&softhsm);
        assert_eq!(names(mount.path()).len(), 4);
        for user in [ALICE, BOB] {
            denied(&mut ls(user, mount.path()));
            denied(&mut ls(user, &mount.join(".tokenfs")));
            denied(as_user(user, "stat").arg(mount.path()));
        }
    }

    fn an_ordinary_user_mounts_a_store_of_his_own(backend) {
        let softhsm = Softhsm::new(backend);
        give(softhsm.directory.path(), ALICE);
        let mut client = P11::start_as(&softhsm, ALICE);
        for label in ["hers", "not hers"] {
            client.init_token(label, Some(PIN)).unwrap();
            client.open(label, Some(PIN)).unwrap();
            client.create(&data(label)).unwrap();
        }
        drop(client);
        let mount = MountOptions::new().user(ALICE).umask(0o022).mount(&softhsm);
        let root = mount.path();
        let link = |label: &str| root.join(format!(".tokenfs/by-label/{label}/{label}.data"));
        let tokens = text_of(&mut ls(ALICE, root));
        assert_eq!(tokens.lines().count(), 2);
        let place = |label: &str| {
            let target = text_of(as_user(ALICE, "readlink").arg(link(label)));
            let mut parts = target.trim_end().rsplit('/').map(str::to_owned);
            let object = parts.next().unwrap();
            (parts.next().unwrap(), object)
        };
        let ((his, one), (other, two)) = (place("hers"), place("not hers"));
        let owner = text_of(as_user(ALICE, "stat").arg("-c").arg("%u:%g %a").arg(root.join(&his).join(&one).join("CKA_LABEL")));
        assert_eq!(owner, format!("{}:{} 600\n", ALICE.uid, ALICE.gid));
        // Root, too, is somebody else.
        assert!(fs::read_dir(root).is_err());
        denied(&mut ls(BOB, root));

        // Something that is not hers among her things.
        let file = softhsm.tokendir.join(&other).join(match backend {
            Backend::File => format!("{two}.object"),
            Backend::Db => "sqlite3.db".to_owned(),
        });
        nix::unistd::chown(&file, Some(0.into()), Some(0.into())).unwrap();
        set_mode(&file, 0o600);
        assert_eq!(text_of(&mut ls(ALICE, root)), tokens, "what cannot be read is listed");
        let object = root.join(&other).join(&two);
        if backend == Backend::File {
            assert!(text_of(&mut ls(ALICE, &root.join(&other))).contains(&two));
            assert_eq!(text_of(as_user(ALICE, "stat").arg("-c").arg("%u %a").arg(&object)), "0 700\n");
        }
        denied(&mut ls(ALICE, &object));
        denied(&mut cat(ALICE, &object.join("CKA_LABEL")));
        assert_eq!(text_of(&mut cat(ALICE, &root.join(&his).join(&one).join("CKA_LABEL"))), "hers");

        // A mount that never could read it says the same.
        let later = MountOptions::new().user(ALICE).umask(0o022).mount(&softhsm);
        let object_later = later.join(&other).join(&two);
        assert_eq!(text_of(&mut ls(ALICE, later.path())), tokens);
        if backend == Backend::File {
            assert!(text_of(&mut ls(ALICE, &later.join(&other))).contains(&two));
        } else {
            // The names of the objects are in the database that she may not read.
            denied(&mut ls(ALICE, &later.join(&other)));
        }
        denied(&mut ls(ALICE, &object_later));
        denied(&mut cat(ALICE, &object_later.join("CKA_LABEL")));
        let log = text_of(&mut cat(ALICE, &later.join(".tokenfs/log")));
        assert!(backend == Backend::File || log.contains(file.to_str().unwrap()), "{log}");
        drop(later);

        // And hers again.
        give(&file, ALICE);
        let start = Instant::now();
        eventually(Duration::from_secs(2), "the object is hers again", || {
            cat(ALICE, &object.join("CKA_LABEL")).output().unwrap().stdout == b"not hers"
        });
        println!("{backend}: chown seen after {:?}, a process included", start.elapsed());
        run(tokenfs_as(ALICE).arg("umount").arg(root));
        assert!(!mount.is_mounted());
    }
}

both_backends! {
    /// setfacl(1) for one user makes the group's bits of the mode a mask, which says nothing of the group.
    fn an_access_control_list_opens_a_file_to_nobody_else(backend) {
        let (softhsm, mut client) = Softhsm::with_token(backend);
        client.create(&data("listed")).unwrap();
        drop(client);
        softhsm.configure("objectstore.umask = 0007\n");
        set_mode(&softhsm.token_directory(), 0o750);
        nix::unistd::chown(&softhsm.token_directory(), None, Some(ALICE.gid.into())).unwrap();
        let mount = MountOptions::new().umask(0o002).option("allow_other").mount(&softhsm);
        let object = only_object(&softhsm, mount.path());
        let file = backing_file(&softhsm, &object);
        nix::unistd::chown(&file, None, Some(ALICE.gid.into())).unwrap();
        run(tool("setfacl").args(["-m", &format!("u:{}:r", BOB.uid)]).arg(&file));
        assert_eq!(mode(&file), 0o640, "what stat says of it");
        let label = object.join("CKA_LABEL");
        // Each is seen in its own time.
        let are = |directory, file| (mode(&object), mode(&label)) == (directory, file);
        eventually(Duration::from_secs(1), "no bit for the group", || are(0o700, 0o600));
        denied(&mut cat(ALICE, &label));
        denied(&mut ls(ALICE, &object));
        assert_eq!(fs::read(&label).unwrap(), b"listed");
        run(tool("setfacl").arg("-b").arg(&file));
        set_mode(&file, 0o640);
        eventually(Duration::from_secs(1), "the bit of the mode", || are(0o750, 0o640));
        assert_eq!(text_of(&mut cat(ALICE, &label)), "listed");
    }
}
