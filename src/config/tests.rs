use super::*;
use proptest::prelude::*;

fn read(text: &str) -> Config {
    parse(Path::new("/c"), text.as_bytes()).unwrap()
}

fn refused(text: &str) -> String {
    parse(Path::new("/c"), text.as_bytes())
        .unwrap_err()
        .to_string()
}

fn warnings(text: &str) -> Vec<String> {
    read(text).warnings.iter().map(Warning::to_string).collect()
}

#[test]
fn an_empty_file_gives_the_defaults() {
    let config = read("");
    assert_eq!(config.tokendir, Path::new("/var/lib/softhsm/tokens/"));
    assert_eq!(config.backend, Backend::File);
    assert_eq!(config.umask, 0o077);
    assert_eq!(config.warnings, []);
}

#[test]
fn the_file_that_debian_installs_is_read_without_a_warning() {
    let config = read(
        "# SoftHSM v2 configuration file\n\ndirectories.tokendir = /var/lib/softhsm/tokens/\n\
         objectstore.backend = file\n\n# ERROR, WARNING, INFO, DEBUG\nlog.level = ERROR\n\n\
         # If CKF_REMOVABLE_DEVICE flag should be set\nslots.removable = false\n\n\
         slots.mechanisms = ALL\n\nlibrary.reset_on_fork = false\n",
    );
    assert_eq!(config.warnings, []);
}

#[test]
fn the_last_one_wins_and_only_it_is_judged() {
    let config = read(
        "objectstore.backend=db\nobjectstore.umask = 9\nobjectstore.umask = 0007\n\
         directories.tokendir = /a\ndirectories.tokendir = rel/b c \t\r\nobjectstore.backend = file\n",
    );
    assert_eq!(config.backend, Backend::File);
    assert_eq!(config.umask, 0o007);
    assert_eq!(config.tokendir, Path::new("rel/b c"));
}

#[test]
fn values_end_where_strtok_ends_them() {
    let tokendir = |text: &str| read(text).tokendir.into_os_string().into_string().unwrap();
    assert_eq!(tokendir("directories.tokendir = /a=b"), "/a");
    assert_eq!(tokendir("directories.tokendir == /a=b"), "/a");
    assert_eq!(tokendir("=directories.tokendir=/a"), "/a");
    assert_eq!(tokendir("directories.tokendir = /a#b"), "/a");
    assert_eq!(tokendir("directories.tokendir = /a\rb"), "/a");
    assert_eq!(tokendir("directories.tokendir = /a\0b"), "/a");
    assert_eq!(tokendir("\x0b directories.tokendir\t=\x0c/a b"), "/a b");
}

#[test]
fn bad_lines_and_unknown_names_are_warned_about() {
    assert_eq!(
        warnings("nonsense\n\n  \n# x\n=\na =\n= b\nlog.level = INFO\nobject.umask = 1\n"),
        [
            "/c:1: not of the form \"name = value\", ignored",
            "/c:5: not of the form \"name = value\", ignored",
            "/c:6: not of the form \"name = value\", ignored",
            "/c:7: not of the form \"name = value\", ignored",
            "/c:9: SoftHSM has no setting \"object.umask\", ignored",
        ]
    );
}

#[test]
fn a_long_line_falls_into_the_pieces_that_fgets_makes() {
    let long = format!(
        "log.level = {}objectstore.backend = db\n",
        "x".repeat(1023 - 12)
    );
    assert_eq!(read(&long).backend, Backend::Db);
    let shorter = format!(
        "log.level = {}objectstore.backend = db\n",
        "x".repeat(1023 - 13)
    );
    assert_eq!(read(&shorter).backend, Backend::File);
    // A comment that goes on is read as a setting, as SoftHSM does.
    let comment = format!("#{}objectstore.umask = 0\n", "x".repeat(1022));
    assert_eq!(read(&comment).umask, 0);
}

#[test]
fn what_softhsm_would_not_start_with_is_refused() {
    assert_eq!(
        refused("\nobjectstore.backend = sqlite\n"),
        "/c: line 2: objectstore.backend: unknown backend \"sqlite\", it can be \"file\" or \"db\""
    );
    for value in ["1000", "8", "0x3f", "-1", "+7", "077 7", "rwx"] {
        assert_eq!(
            refused(&format!("objectstore.umask = {value}")),
            format!(
                "/c: line 1: objectstore.umask: \"{value}\" is not an octal number from 0 to 0777, such as 0077"
            )
        );
    }
    for (value, umask) in [("0", 0), ("0777", 0o777), ("22", 0o22), ("00000027", 0o27)] {
        assert_eq!(read(&format!("objectstore.umask = {value}")).umask, umask);
    }
}

#[test]
fn the_file_is_found_where_softhsm_finds_it() {
    let home = tempfile::tempdir().unwrap();
    let mine = home.path().join(".config/softhsm2/softhsm2.conf");
    let mut places = Places {
        variable: None,
        home: Some(home.path().to_path_buf()),
    };
    assert_ne!(places.find().as_deref(), Some(mine.as_path()));
    fs::create_dir_all(mine.parent().unwrap()).unwrap();
    fs::write(&mine, "objectstore.backend = db\n").unwrap();
    assert_eq!(places.find().as_deref(), Some(mine.as_path()));
    assert_eq!(load(None, &places).unwrap().backend, Backend::Db);
    // The variable counts even if it names nothing.
    places.variable = Some("/nowhere/x.conf".into());
    assert_eq!(
        load(None, &places).unwrap_err().to_string(),
        "/nowhere/x.conf: no such configuration file ($SOFTHSM2_CONF names it); name another one with --config"
    );
    assert_eq!(load(Some(&mine), &places).unwrap().path, Some(mine));
    places.variable = Some(OsString::new());
    assert!(load(None, &places).is_err());
}

#[test]
fn the_masks_are_joined() {
    assert_eq!(umask_in("Name:\tx\nUmask:\t0022\nState:\tR\n"), Some(0o22));
    assert_eq!(umask_in("Name:\tx\n"), None);
    assert_eq!(effective_mask(0o777), 0o777);
    assert_eq!(effective_mask(0) | process_umask(), effective_mask(0));
}

proptest! {
    #[test]
    fn any_bytes_can_be_read(bytes in proptest::collection::vec(any::<u8>(), 0..4096)) {
        let _ = parse(Path::new("/c"), &bytes);
    }

    #[test]
    fn anything_like_a_setting_can_be_read(text in "([a-z.= #\r\0]{0,20}(objectstore.umask|objectstore.backend|=)?[ 0-9=]{0,9}\n?){0,20}") {
        if let Ok(config) = parse(Path::new("/c"), text.as_bytes()) {
            prop_assert!(config.umask <= 0o777);
        }
    }
}
