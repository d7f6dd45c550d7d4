//! How the tables are made and looked up.

use std::sync::LazyLock;

/// Numbers and their names, each of which can be looked up by the other.
pub(super) struct Table {
    /// One name for each number, in ascending order of number.
    pub(super) names: &'static [(u64, &'static str)],
    /// Names and aliases, in ascending order of name.
    by_name: LazyLock<Vec<(&'static str, u64)>>,
}

impl Table {
    pub(super) const fn new(
        names: &'static [(u64, &'static str)],
        by_name: fn() -> Vec<(&'static str, u64)>,
    ) -> Self {
        assert!(
            is_ascending(names),
            "binary search needs an ascending table"
        );
        Self {
            names,
            by_name: LazyLock::new(by_name),
        }
    }

    /// The place of a number in [`Table::names`].
    pub(super) fn position(&self, number: u64) -> Option<usize> {
        self.names
            .binary_search_by_key(&number, |(stored, _)| *stored)
            .ok()
    }

    /// The name of a number.
    pub(super) fn name(&self, number: u64) -> Option<&'static str> {
        let (_, name) = self.names.get(self.position(number)?)?;
        Some(name)
    }

    /// The number with this name or alias.
    pub(super) fn number(&self, name: &str) -> Option<u64> {
        let index = self
            .by_name
            .binary_search_by_key(&name, |(stored, _)| stored)
            .ok()?;
        self.by_name.get(index).map(|(_, number)| *number)
    }

    /// Whether a name or alias begins with this.
    pub(super) fn has_one_that_begins(&self, with: &str) -> bool {
        let index = self.by_name.partition_point(|(stored, _)| *stored < with);
        self.by_name
            .get(index)
            .is_some_and(|(stored, _)| stored.starts_with(with))
    }
}

const fn is_ascending(names: &[(u64, &str)]) -> bool {
    let mut index = 1;
    while index < names.len() {
        if names[index - 1].0 >= names[index].0 {
            return false;
        }
        index += 1;
    }
    true
}

/// The names and the aliases of a table as one, in ascending order of name.
pub(super) fn by_name(
    names: &[(u64, &'static str)],
    aliases: &[(u64, &'static str)],
) -> Vec<(&'static str, u64)> {
    let mut index: Vec<_> = names
        .iter()
        .chain(aliases)
        .map(|(number, name)| (*name, *number))
        .collect();
    index.sort_unstable();
    index
}

/// Makes a constant of each `number NAME | ALIAS…;` and a [`Table`] of all of them. Aliases have no constant.
macro_rules! symbols {
    ($table:ident: $($number:literal $name:ident $(| $alias:ident)*;)*) => {
        $(
            #[doc = concat!("`", stringify!($name), "`")]
            pub const $name: u64 = $number;
        )*

        pub(super) static $table: $crate::pkcs11::table::Table = {
            const NAMES: &[(u64, &str)] = &[$(($number, stringify!($name))),*];
            const ALIASES: &[(u64, &str)] = &[$($(($number, stringify!($alias)),)*)*];
            $crate::pkcs11::table::Table::new(NAMES, || $crate::pkcs11::table::by_name(NAMES, ALIASES))
        };
    };
}

/// As `symbols`, of `number NAME | ALIAS… Kind;`: the table `NAMES`, and beside it the `KINDS` in the same order.
macro_rules! attributes {
    ($($number:literal $name:ident $(| $alias:ident)* $kind:ident;)*) => {
        $crate::pkcs11::table::symbols! { NAMES: $($number $name $(| $alias)*;)* }

        pub(super) static KINDS: &[$crate::store::attribute::Kind] =
            &[$($crate::store::attribute::Kind::$kind),*];
    };
}

pub(super) use {attributes, symbols};
