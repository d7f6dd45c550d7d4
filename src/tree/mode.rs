//! Permission bits: what a backing file's mode becomes in the mount.

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

#[cfg(test)]
mod tests {
    use super::*;

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
