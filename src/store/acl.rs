//! POSIX access control lists (`acl(5)`): what of a mode still holds where a file has one.
//!
//! With such a list the group bits of a mode are not what the owning group may do, but the mask over all named users and groups.
//! A mount can show a mode only, so it shows one that lets in nobody whom the list keeps out.

use rustix::io::Errno;

/// The extended attribute that has the list.
pub(crate) const NAME: &str = "system.posix_acl_access";

// `linux/posix_acl_xattr.h` and `linux/posix_acl.h`.
const VERSION: [u8; 4] = 2u32.to_le_bytes();
const USER: u16 = 0x02;
const GROUP_OBJ: u16 = 0x04;
const GROUP: u16 = 0x08;
const MASK: u16 = 0x10;
const OTHER: u16 = 0x20;

/// The mode `mode` of a file for which `ask` reads the list into a buffer.
pub(crate) fn narrow(mode: u32, ask: impl FnOnce(&mut [u8]) -> Result<usize, Errno>) -> u32 {
    if mode & 0o077 == 0 {
        return mode;
    }
    let mut buffer = [0; 1024];
    match ask(&mut buffer) {
        Ok(length) => {
            let list = buffer.get(..length).unwrap_or_default();
            // One that cannot be understood lets in the owner.
            mode & !0o077 | allowed(list).unwrap_or(0)
        }
        // No list, or no lists at all on this file system.
        Err(Errno::NODATA | Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL | Errno::NOENT) => mode,
        // Nobody knows whom it keeps out, or it has more entries than the buffer holds.
        Err(_) => mode & !0o077,
    }
}

/// The bits for group and others that everybody in a list has: what one of the named may not do, nobody may.
fn allowed(list: &[u8]) -> Option<u32> {
    let entries = list.strip_prefix(&VERSION)?;
    let entries: Vec<(u16, u32)> = entries
        .chunks(8)
        .map(|entry| match entry {
            [tag0, tag1, may0, may1, ..] if entry.len() == 8 => Some((
                u16::from_le_bytes([*tag0, *tag1]),
                u32::from(u16::from_le_bytes([*may0, *may1])) & 0o7,
            )),
            _ => None,
        })
        .collect::<Option<_>>()?;
    let of = |wanted| {
        let found = entries.iter().find(|(tag, _)| *tag == wanted);
        found.map(|(_, may)| *may)
    };
    let mask = of(MASK).unwrap_or(0o7);
    let named = entries
        .iter()
        .filter(|(tag, _)| matches!(*tag, USER | GROUP))
        .fold(0o7, |bits, (_, may)| bits & may & mask);
    let group = of(GROUP_OBJ)? & mask & named;
    let other = of(OTHER)? & named;
    Some(group << 3 | other)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(entries: &[(u16, u16)]) -> Vec<u8> {
        let mut list = VERSION.to_vec();
        for (tag, may) in entries {
            list.extend(tag.to_le_bytes());
            list.extend(may.to_le_bytes());
            list.extend(u32::MAX.to_le_bytes());
        }
        list
    }

    fn narrowed(mode: u32, list: &[u8]) -> u32 {
        narrow(mode, |buffer| {
            buffer[..list.len()].copy_from_slice(list);
            Ok(list.len())
        })
    }

    #[test]
    fn a_list_lets_in_nobody_whom_it_keeps_out() {
        // setfacl -m u:backup:r on a file of mode 0600: the mode says 0640, and the group still may nothing.
        let one = list(&[(1, 6), (USER, 4), (GROUP_OBJ, 0), (MASK, 4), (OTHER, 0)]);
        assert_eq!(narrowed(0o640, &one), 0o600);
        // setfacl -m u:mallory:- on a file of mode 0644.
        let one = list(&[(1, 6), (USER, 0), (GROUP_OBJ, 4), (MASK, 4), (OTHER, 4)]);
        assert_eq!(narrowed(0o644, &one), 0o600);
        // The group has what the mask leaves of it.
        let one = list(&[(1, 6), (GROUP, 6), (GROUP_OBJ, 6), (MASK, 4), (OTHER, 0)]);
        assert_eq!(narrowed(0o2640, &one), 0o2640);
        let one = list(&[(1, 6), (GROUP_OBJ, 4), (OTHER, 4)]);
        assert_eq!(narrowed(0o644, &one), 0o644);
    }

    #[test]
    fn what_cannot_be_understood_lets_in_the_owner() {
        let one = list(&[(1, 6), (GROUP_OBJ, 4), (OTHER, 4)]);
        for cut in 0..one.len() {
            assert_eq!(narrowed(0o644, &one[..cut]), 0o600, "cut at {cut}");
        }
        assert_eq!(narrow(0o644, |_| Err(Errno::RANGE)), 0o600);
        assert_eq!(narrow(0o644, |_| Err(Errno::NODATA)), 0o644);
        assert_eq!(narrow(0o600, |_| panic!("need not be asked")), 0o600);
    }
}
