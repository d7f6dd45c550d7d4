use super::*;
use std::os::unix::fs::symlink;

fn request() -> Request {
    Request {
        point: "/p".into(),
        fsname: "a,b\\c".into(),
        subtype: "tokenfs".into(),
        sharing: Sharing::Owner,
        flags: MsFlags::MS_NODEV | MsFlags::MS_NOEXEC,
        max_read: Some(8192),
    }
}

#[test]
fn a_tokendir_is_checked() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "").unwrap();
    let refused = |path: &Path| check_tokendir(path).unwrap_err().to_string();
    assert!(refused(&dir.path().join("gone")).contains("there is no such token directory"));
    assert!(refused(&file).contains("not a directory"));
    symlink(dir.path(), dir.path().join("link")).unwrap();
    assert_eq!(
        check_tokendir(&dir.path().join("link/.")).unwrap(),
        dir.path().canonicalize().unwrap()
    );
}

#[test]
fn a_mount_point_is_checked() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().canonicalize().unwrap();
    let tokendir = root.join("tokens");
    fs::create_dir_all(tokendir.join("inside")).unwrap();
    fs::create_dir(root.join("point")).unwrap();
    fs::create_dir(root.join("tokens2")).unwrap();
    fs::write(root.join("file"), "").unwrap();
    symlink("tokens", root.join("link")).unwrap();
    let refused = |name: &str| {
        check_point(&root.join(name), &tokendir)
            .unwrap_err()
            .to_string()
    };
    assert_eq!(
        check_point(&root.join("point/"), &tokendir).unwrap(),
        root.join("point")
    );
    assert_eq!(
        check_point(&root.join("tokens2"), &tokendir).unwrap(),
        root.join("tokens2")
    );
    assert!(refused("gone").contains("make it with mkdir"));
    assert!(refused("file").contains("not a directory"));
    assert!(refused("tokens").contains("the mount point is the token directory"));
    assert!(refused("link").contains("the mount point is the token directory"));
    assert!(refused("tokens/inside").contains("lies inside the token directory"));
    assert!(refused(".").contains("contains the token directory"));
    assert!(refused("/proc").contains("something else (proc) is mounted there already"));
}

#[test]
fn fuser_gets_what_fusermount_understands() {
    assert_eq!(
        fuser_options(&request()),
        [
            MountOption::FSName("a\\,b\\\\c".into()),
            MountOption::Subtype("tokenfs".into()),
            MountOption::DefaultPermissions,
            MountOption::NoDev,
            MountOption::NoExec,
            MountOption::CUSTOM("max_read=8192".into()),
        ]
    );
}

#[test]
fn what_fusermount_says_becomes_one_line() {
    let explain = |said| explain_fusermount(&request(), said).to_string();
    assert!(
        explain("fusermount3: option allow_other only allowed if 'user_allow_other' is set in /etc/fuse.conf\n")
            .contains("let root put the line")
    );
    assert!(
        explain("fusermount3: user has no write access to mountpoint /p\n")
            .contains("that they own")
    );
    assert!(
        explain("fusermount3: mount failed: Operation not permitted\n").contains("setuid root")
    );
    assert!(explain("fusermount3: too many FUSE filesystems mounted; mount_max=N can be set in /etc/fuse.conf").contains("too many"));
    assert_eq!(
        explain("fusermount3: strange\nfusermount3: very\n"),
        "/p: fusermount3 refuses the mount: strange; very"
    );
    assert!(explain("").contains("no reason"));
}
