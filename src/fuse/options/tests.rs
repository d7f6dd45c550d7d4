use super::*;
use proptest::prelude::*;

fn read(list: &str) -> MountOptions {
    MountOptions::parse([OsStr::new(list)], Unknown::Refuse).unwrap()
}

fn refused(list: &str) -> String {
    MountOptions::parse([OsStr::new(list)], Unknown::Refuse).unwrap_err()
}

#[test]
fn nothing_gives_the_defaults_and_a_mount_that_writes() {
    assert_eq!(read(""), MountOptions::default());
    for list in [
        "rw",
        "ro,rw",
        "defaults",
        ",,",
        "rw,nonempty,default_permissions",
    ] {
        assert_eq!(read(list), MountOptions::default(), "{list}");
        assert!(!read(list).flags.contains(MsFlags::MS_RDONLY));
    }
}

#[test]
fn of_ro_and_rw_the_last_counts() {
    assert!(read("ro").read_only && read("rw,ro").read_only);
    assert!(read("ro").flags.contains(MsFlags::MS_RDONLY));
    assert!(!read("ro,rw").read_only && !read("").read_only);
    assert!(!read("ro,rw").flags.contains(MsFlags::MS_RDONLY));
}

#[test]
fn what_mount_passes_on_from_fstab_is_ignored() {
    let list = "rw,auto,noauto,user,user=me,nouser,users,owner,group,nofail,_netdev,x-systemd.automount,\
                X-mount.mkdir=0755,comment=systemd,uhelper=x,async,norelatime";
    assert_eq!(read(list), MountOptions::default());
}

#[test]
fn every_option_of_ours_is_read() {
    let options = MountOptions::parse(
        [
            OsStr::new("allow_other,auto_unmount,fsname=a\\,b,subtype=x-1,max_read=4096"),
            OsStr::new(
                "config=/c,tokendir=/t=1,backend=db,umask=027,lock_wait=0.5,noinotify,snapshot",
            ),
        ],
        Unknown::Refuse,
    )
    .unwrap();
    assert_eq!(options.sharing, Sharing::Everybody);
    assert!(options.auto_unmount && options.noinotify && options.snapshot);
    assert_eq!(options.fsname, Some("a,b".into()));
    assert_eq!(options.subtype, Some("x-1".into()));
    assert_eq!(options.max_read, Some(4096));
    assert_eq!(options.config, Some("/c".into()));
    assert_eq!(options.tokendir, Some("/t=1".into()));
    assert_eq!(options.backend, Some(Backend::Db));
    assert_eq!(options.umask, Some(0o27));
    assert_eq!(options.lock_wait, Some(Duration::from_millis(500)));
}

#[test]
fn flags_are_set_and_taken_away_and_the_later_one_counts() {
    let default = MountOptions::default().flags;
    assert_eq!(
        read("noexec,noatime,sync,dirsync").flags,
        default
            | MsFlags::MS_NOEXEC
            | MsFlags::MS_NOATIME
            | MsFlags::MS_SYNCHRONOUS
            | MsFlags::MS_DIRSYNC
    );
    assert_eq!(read("noexec,exec,noatime,atime").flags, default);
    assert_eq!(read("dev,suid").flags, MsFlags::empty());
    assert_eq!(read("dev,nodev,suid,nosuid").flags, default);
}

#[test]
fn bad_options_are_named() {
    assert_eq!(
        refused("ro,frobnicate"),
        "unknown option \"frobnicate\" behind -o; \"tokenfs mount --help\" lists those that exist"
    );
    assert!(refused("colour=red").contains("\"colour=red\""));
    assert_eq!(refused("config"), "-o config needs a value: -o config=…");
    assert!(refused("backend=sqlite").starts_with("-o backend: unknown backend \"sqlite\""));
    assert!(refused("umask=8").starts_with("-o umask: \"8\" is not an octal number"));
    for value in ["", "-1", "soon", "1e9", "NaN"] {
        assert_eq!(
            refused(&format!("lock_wait={value}")),
            format!("-o lock_wait: \"{value}\" is not a number of seconds up to 3600")
        );
    }
    assert!(refused("max_read=much").contains("max_read"));
    assert!(refused("subtype=a,subtype=a.b").contains("\"a.b\""));
    assert!(refused("tokendir=").contains("tokendir"));
    assert!(refused("remount,rw").contains("cannot be remounted"));
    assert!(refused("allow_root,allow_other").contains("exclude each other"));
}

#[test]
fn a_sloppy_mount_ignores_the_unknown_and_nothing_else() {
    let sloppy = |list| MountOptions::parse([OsStr::new(list)], Unknown::Ignore);
    assert_eq!(sloppy("frobnicate,x=y"), Ok(MountOptions::default()));
    assert!(sloppy("umask=8").is_err());
}

#[test]
fn backslashes_are_read_as_libfuse_reads_them() {
    assert_eq!(
        split(b"a\\,b,c\\\\,\\054\\x\\"),
        [&b"a,b"[..], b"c\\", b",x\\"]
    );
}

proptest! {
    #[test]
    fn what_is_escaped_is_one_option_again(value in proptest::collection::vec(any::<u8>(), 1..40)) {
        let escaped = escape(OsStr::from_bytes(&value));
        prop_assert_eq!(split(escaped.as_bytes()), vec![value]);
    }

    #[test]
    fn any_list_can_be_read(list in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = MountOptions::parse([OsStr::from_bytes(&list)], Unknown::Refuse);
    }
}
