//! Taking a damaged object away, or putting a good one in its place: what an operator does who has a backup.
//!
//! It goes by the verdict under the locks, on a file at rest, after what a crash left of a write was put right.

use super::FileToken;
use super::change::{check_storable, encode_checked, following};
use super::generation::microseconds;
use super::guard::dress_lock_file;
use crate::error::Result;
use crate::store::damaged::{replaced_damaged, undamaged};
use crate::store::{NewObject, ObjectId, ObjectName, Patience, validate};

impl FileToken {
    pub(super) fn replace(
        &self,
        name: &ObjectName,
        new: Option<&NewObject>,
        patience: Patience,
    ) -> Result<()> {
        self.check_writable(patience)?;
        if let Some(new) = new {
            check_storable(&new.attributes)?;
            validate::check(None, &new.attributes)?;
        }
        let id = ObjectId::Object(name.clone());
        let names = self.names(&id);
        loop {
            let reading = self.read_for_writing(&names, patience)?;
            let Err(damage) = &reading.version.content else {
                return Err(undamaged());
            };
            if let Some(new) = new {
                // SoftHSM has the number that is there, or, where there is none, one that it read before: it has to see another.
                let number = reading.bytes.first_chunk().copied();
                let generation = number.map_or_else(microseconds, u64::from_be_bytes);
                let bytes = encode_checked(following(Some(generation)), &new.attributes)?;
                let looks = (Some(new.access), new.mtime);
                if !self.put(&id, &names, &reading, &bytes, looks)? {
                    continue;
                }
                if let Some(lock) = &reading.transaction {
                    dress_lock_file(lock, new.access);
                }
                self.changes().forget(&id);
                self.cache().remove(&id);
            } else {
                self.unmake_locked(&id, &names, patience)?;
            }
            let said = replaced_damaged(name, damage, new);
            self.diagnostics
                .warning(format!("{}: {said}", self.path.display()));
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::super::fixture::{
        Fixture, files, fixture, generation, id, name, new_object, sample, soon,
    };
    use super::super::{decode, encode};
    use super::*;
    use crate::store::Token;

    /// Has another version put in the place of this damaged file; the generation of that.
    fn replaced(fixture: &Fixture, damaged: &[u8]) -> u64 {
        fixture.write("a.object", damaged);
        let new = new_object(sample());
        let done = fixture
            .token
            .replace_damaged(&name("a"), Some(&new), soon());
        done.unwrap();
        assert_eq!(
            files(fixture),
            ["a.lock", "a.object", "generation", "token.object"]
        );
        for file in ["a.object", "a.lock"] {
            let mode = fs::metadata(fixture.path(file)).unwrap().permissions();
            assert_eq!(mode.mode() & 0o7777, 0o640, "{file}");
        }
        assert_eq!(generation(fixture), 7, "nothing came or went");
        let decoded = decode(&fs::read(fixture.path("a.object")).unwrap()).unwrap();
        assert_eq!(decoded.attributes, sample());
        assert!(fixture.token.object(&id("a"), soon()).is_ok());
        decoded.generation.unwrap()
    }

    /// Who may rename files in the token's directory can have given the name of a lock file to anything, and is not given that.
    #[test]
    fn what_is_only_called_a_lock_file_keeps_its_mode() {
        let fixture = fixture();
        fixture.write("a.lock", b"somebody else's key");
        let lock = fixture.path("a.lock");
        fs::set_permissions(&lock, fs::Permissions::from_mode(0o600)).unwrap();
        fixture.write("a.object", b"");
        let new = new_object(sample());
        let replaced = fixture
            .token
            .replace_damaged(&name("a"), Some(&new), soon());
        replaced.unwrap();
        let mode = fs::metadata(&lock).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn softhsm_sees_another_generation_than_any_that_it_can_have_read() {
        let fixture = fixture();
        let whole = encode(41, &sample());
        assert_eq!(replaced(&fixture, &whole[..whole.len() - 1]), 42);
        let begun = microseconds();
        assert!(replaced(&fixture, b"") > begun, "where there is no number");
        let giant = fixture.path("a.object");
        fs::File::create(&giant).unwrap().set_len(1 << 30).unwrap();
        let removed = fixture.token.replace_damaged(&name("a"), None, soon());
        removed.unwrap();
        assert_eq!(files(&fixture), ["generation", "token.object"]);
        assert_eq!(generation(&fixture), 9);
        assert_eq!(fixture.diagnostics.render().lines().count(), 3);
    }
}
