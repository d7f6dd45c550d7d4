//! The command `tokenfs`, and `mount.tokenfs` under that name.

fn main() {}
