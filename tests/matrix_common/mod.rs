//! Out of a mounted store and back into one, with the tools that people have: the axes, what they make together, and the table
//! of what was run.
#![allow(dead_code)]

pub mod cell;
pub mod interrupt;
pub mod stores;
pub mod tools;

use std::collections::BTreeMap;
use std::fmt;
use std::io::Write as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::support::{BACKENDS, Backend, full};

pub use tools::{TOOLS, Tool};

/// What is taken out and brought back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Scope {
    Store,
    Token,
    Object,
}

pub const SCOPES: [Scope; 3] = [Scope::Store, Scope::Token, Scope::Object];

/// What is there before it comes back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum State {
    /// A store without a token.
    Empty,
    /// A store that has everything but this.
    Lacking,
    /// A store that was the same once, and has been changed since: values, objects that are gone, objects that are new, and the PIN.
    Changed,
}

pub const STATES: [State; 3] = [State::Empty, State::Lacking, State::Changed];

/// What there is no cell for, and why.
pub const NO_CELL: [(Scope, State, &str); 2] = [
    (
        Scope::Store,
        State::Lacking,
        "a store that lacks the whole of itself is an empty one",
    ),
    (
        Scope::Object,
        State::Empty,
        "an object is restored into its token: its texts are ciphertext under that token's key",
    ),
];

/// From which backend to which.
pub type Pair = (Backend, Backend);

/// All four of them.
pub fn all_pairs() -> Vec<Pair> {
    let to = |from| BACKENDS.map(|to| (from, to));
    BACKENDS.into_iter().flat_map(to).collect()
}

/// The pairs that a tool is run on: all of them in a full run, else one, and the next one for the next tool.
pub fn pairs(tool: Tool) -> Vec<Pair> {
    let all = all_pairs();
    if full() {
        return all;
    }
    let index = TOOLS.iter().position(|other| *other == tool);
    vec![all[index.expect("it is one of TOOLS") % all.len()]]
}

/// One way out and back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cell {
    pub tool: Tool,
    pub scope: Scope,
    pub pair: Pair,
    pub state: State,
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (from, to) = self.pair;
        let (scope, state) = (format!("{:?}", self.scope), format!("{:?}", self.state));
        let pair = format!("{from} → {to}");
        let tool = self.tool.to_string();
        write!(f, "{tool:28} | {scope:6} | {pair:11} | {state:7}")
    }
}

/// How many cells there are for a tool on one pair of backends.
pub const PER_PAIR: usize = SCOPES.len() * STATES.len() - NO_CELL.len();

/// The cells that have been run, of all tests of this process, with how long each took if it went well.
static RUN: Mutex<BTreeMap<String, Option<Duration>>> = Mutex::new(BTreeMap::new());

/// Past the harness, which keeps what a test prints to itself.
fn say(lines: &str) {
    let _ = std::io::stdout().lock().write_all(lines.as_bytes());
}

/// Runs all cells of a tool, also those behind one that fails, and prints them. The last tool adds up.
pub fn run(tool: Tool) {
    let stores = stores::Stores::shared();
    let mut failed = Vec::new();
    let mut table = String::new();
    for pair in pairs(tool) {
        for (scope, state) in SCOPES.into_iter().flat_map(|s| STATES.map(|t| (s, t))) {
            if NO_CELL.iter().any(|(s, t, _)| (*s, *t) == (scope, state)) {
                continue;
            }
            let cell = Cell {
                tool,
                scope,
                pair,
                state,
            };
            let started = Instant::now();
            let result = catch_unwind(AssertUnwindSafe(|| cell::run(&stores, &cell)));
            let took = started.elapsed();
            let verdict = if result.is_ok() { "ok" } else { "FAILED" };
            table += &format!("{cell} | {verdict:6} | {:5.1} s\n", took.as_secs_f64());
            if result.is_err() {
                failed.push(cell.to_string());
            }
            let mut all = RUN.lock().unwrap_or_else(PoisonError::into_inner);
            all.insert(cell.to_string(), result.ok().map(|()| took));
        }
    }
    say(&format!("\n{table}"));
    add_up();
    assert!(failed.is_empty(), "{tool}: {failed:#?}");
}

/// What all cells come to, once the last of them has been run. A run of some tests only does not get there.
fn add_up() {
    let all = RUN.lock().unwrap_or_else(PoisonError::into_inner);
    let tools = TOOLS.iter().filter(|tool| {
        let of_tool = all
            .keys()
            .filter(|cell| cell.starts_with(&format!("{tool:28} |")));
        let wanted = PER_PAIR * pairs(**tool).len();
        of_tool.count() == wanted
    });
    if tools.count() < TOOLS.len() {
        return;
    }
    let well = all.values().flatten().count();
    let wanted: usize = TOOLS.iter().map(|tool| PER_PAIR * pairs(*tool).len()).sum();
    let mut text = format!("\nmatrix: {well} of {wanted} cells are well");
    text += &format!(
        ", {} tools, {} pairs of backends each\n",
        TOOLS.len(),
        pairs(TOOLS[0]).len()
    );
    for (scope, state, why) in NO_CELL {
        text += &format!("no cell: {scope:?}, {state:?}: {why}\n");
    }
    say(&text);
    assert_eq!(all.len(), wanted, "cells that were run");
}
