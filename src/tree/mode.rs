//! Permission bits: what a backing file's mode becomes in the mount.

use crate::store::Metadata;

/// Bits of a file's mode that are shown: never `x`, never a set-id bit.
const FILE: u32 = 0o666;

/// `rwx` for all.
const ACCESS: u32 = 0o777;

/// The mode of an attribute: that of the backing file, without the bits of `mask` and without `x`.
#[must_use]
pub fn of_attribute(backing: u32, mask: u32) -> u32 {
    backing & FILE & !mask
}

/// The mode of an object's directory, and of a map's: that of its attributes, with `x` wherever it has `r`.
#[must_use]
pub fn of_object(backing: u32, mask: u32) -> u32 {
    let file = of_attribute(backing, mask);
    file | (file & 0o444) >> 2
}

/// The mode of a token's directory: its own without the bits of `mask`. The set-group-id and sticky bits stay, since they say
/// what happens to what is made in it.
#[must_use]
pub fn of_token(backing: u32, mask: u32) -> u32 {
    backing & !(mask & ACCESS)
}

/// All bits but the `r` and the `x` of each class of users of `directory` who may not read the file `source`. Where the two have
/// different owners or groups, nobody can tell which class of the one is which of the other: then all have to be allowed.
#[must_use]
pub fn listable(directory: &Metadata, source: &Metadata, mask: u32) -> u32 {
    let mode = source.mode & !mask;
    let (group, other) = (mode & 0o040 != 0, mode & 0o004 != 0);
    let owner_may = if directory.uid == source.uid {
        mode & 0o400 != 0
    } else {
        // root may in any case.
        directory.uid == 0 || (group && other)
    };
    let group_may = if directory.gid == source.gid {
        group
    } else {
        group && other
    };
    [(owner_may, 0o500), (group_may, 0o050), (other, 0o005_u32)]
        .iter()
        .filter(|(may, _)| !may)
        .fold(u32::MAX, |bits, (_, bit)| bits & !bit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_lists_what_he_may_not_read() {
        let of = |mode, uid, gid| Metadata {
            mode,
            uid,
            gid,
            atime: std::time::UNIX_EPOCH,
            mtime: std::time::UNIX_EPOCH,
            ctime: std::time::UNIX_EPOCH,
        };
        let directory = of(0o755, 7, 7);
        let listed = |source| 0o755 & listable(&directory, &source, 0o000);
        assert_eq!(listed(of(0o644, 7, 7)), 0o755);
        assert_eq!(listed(of(0o640, 7, 7)), 0o750);
        assert_eq!(listed(of(0o600, 7, 7)), 0o700);
        assert_eq!(listed(of(0o600, 8, 8)), 0o200);
        assert_eq!(listed(of(0o640, 7, 8)), 0o700);
        assert_eq!(listed(of(0o644, 8, 8)), 0o755);
        assert_eq!(
            0o755 & listable(&of(0o755, 0, 0), &of(0o600, 8, 8), 0),
            0o700
        );
        assert_eq!(0o755 & listable(&directory, &of(0o644, 7, 7), 0o027), 0o750);
    }

    #[test]
    fn modes_are_what_the_contract_says() {
        // backing file, mask, attribute, object's directory
        let files = [
            (0o600, 0o077, 0o600, 0o700),
            (0o640, 0o027, 0o640, 0o750),
            (0o660, 0o007, 0o660, 0o770),
            (0o644, 0o022, 0o644, 0o755),
            (0o666, 0o077, 0o600, 0o700),
            (0o777, 0o027, 0o640, 0o750),
            (0o6755, 0o000, 0o644, 0o755),
            (0o200, 0o000, 0o200, 0o200),
            (0o000, 0o000, 0o000, 0o000),
        ];
        for (backing, mask, attribute, object) in files {
            assert_eq!(
                of_attribute(backing, mask),
                attribute,
                "{backing:o} {mask:o}"
            );
            assert_eq!(of_object(backing, mask), object, "{backing:o} {mask:o}");
        }
        assert_eq!(of_token(0o2770, 0o027), 0o2750);
        assert_eq!(of_token(0o777, 0o077), 0o700);
        assert_eq!(of_token(0o1777, 0o022), 0o1755);
    }
}
