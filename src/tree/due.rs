//! When what the mount shows becomes what the store has.
//!
//! What has been left alone for long enough is due. [`Tree::due`] hands it out as tasks, each of which can wait for a lock for as long as it
//! likes: whoever does them ([`Tree::attend`]) does so at the same time, so that one object's lock holds up no other object. At the end of
//! the mount [`Tree::finish`] does everything. How each is done is in [`super::settle`].
//!
//! A task is handed out once, until it is dropped.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::draft::{Key, New};
use super::node::Node;
use super::settle::Finished;
use super::{Tree, lock};
use crate::store::{ObjectName, Patience, TokenName};

/// How many objects are written at once at the end of a mount.
const AT_ONCE: usize = 64;

/// What there is to do.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum What {
    /// SoftHSM may have brought back an object, or overwritten a change of it.
    LookAfter(TokenName, ObjectName),
    /// An object is new, or something in it was unlinked.
    Write(Key),
    /// Objects of a token that is being built, one after the other, and then that token itself.
    Build(TokenName),
}

/// What is handed out and not done yet.
pub(super) type Tasks = Arc<Mutex<HashSet<What>>>;

/// Something that is due. As long as it is there nobody else is given the same.
#[derive(Debug)]
pub struct Task {
    what: What,
    tasks: Tasks,
    /// Of a token that is being built: which of its objects are due, and whether it is to be published.
    objects: Vec<Key>,
    is_finished: bool,
}

impl Task {
    /// Takes on what nobody else has taken on.
    fn take(tasks: &Tasks, what: What) -> Option<Self> {
        lock(tasks).insert(what.clone()).then(|| Self {
            what,
            tasks: Arc::clone(tasks),
            objects: Vec::new(),
            is_finished: false,
        })
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        lock(&self.tasks).remove(&self.what);
    }
}

impl Tree {
    /// What is due, and when the next thing will be that is not.
    pub fn due(&self) -> (Vec<Task>, Option<Instant>) {
        let take = |what| Task::take(&self.tasks, what);
        let returned = std::mem::take(&mut *lock(&self.returned));
        let mut tasks = Vec::new();
        for (token, object) in returned {
            match take(What::LookAfter(token.clone(), object.clone())) {
                Some(task) => tasks.push(task),
                // It is being looked after, and something has happened to it since that began.
                None => lock(&self.returned).push((token, object)),
            }
        }
        let drafts = lock(&self.drafts);
        let (mut keys, finished, next) = drafts.due(Instant::now());
        let building = drafts.builds();
        drop(drafts);
        for token in building {
            let objects: Vec<Key> = keys.extract_if(.., |key| key.0 == token).collect();
            let is_finished = finished.contains(&token);
            if !is_finished && objects.is_empty() {
                continue;
            }
            if let Some(mut task) = take(What::Build(token)) {
                (task.objects, task.is_finished) = (objects, is_finished);
                tasks.push(task);
            }
        }
        tasks.extend(keys.into_iter().filter_map(|key| take(What::Write(key))));
        (tasks, next)
    }

    /// Does what is due. What fails is in the log, and is due again in a while.
    pub fn attend(&self, task: Task, patience: Patience) {
        match &task.what {
            What::LookAfter(token, object) => {
                let seen_to = self.ask(token, patience, |token| token.look_after(object, patience));
                let _ = self.noted(seen_to);
            }
            What::Write(key) => {
                let _ = self.write_draft(key, Finished::Assumed, patience);
            }
            What::Build(token) => {
                for key in &task.objects {
                    let _ = self.write_draft(key, Finished::Assumed, patience);
                }
                if task.is_finished {
                    let _ = self.publish(token, patience);
                }
            }
        }
        drop(task);
        // It may be due again.
        self.wake();
    }

    /// Does all that is due, one after the other; returns when the next thing will be.
    pub fn settle(&self) -> Option<Instant> {
        let (tasks, next) = self.due();
        if tasks.is_empty() {
            return next;
        }
        for task in tasks {
            self.attend(task, Patience::at_most(self.store.options().lock_wait));
        }
        // That took a while, in which more may have become due.
        Some(Instant::now())
    }

    /// Waits until `due`, or until there may be something to do before that.
    pub fn wait_for_work(&self, due: Option<Instant>) {
        let mut woken = lock(&self.work.0);
        if !*woken {
            let most = Duration::from_secs(3600);
            let limit = due.map_or(most, |due| due.saturating_duration_since(Instant::now()));
            let waited = self.work.1.wait_timeout(woken, limit);
            woken = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        *woken = false;
    }

    /// Ends [`Tree::wait_for_work`].
    pub fn wake(&self) {
        *lock(&self.work.0) = true;
        self.work.1.notify_all();
    }

    /// Writes everything that is not in the store yet: the mount ends. What cannot be written is lost, and is in the log.
    pub fn finish(&self) {
        let limit = self.store.options().lock_wait;
        let patience = Patience::at_most(limit);
        for token in self.store.tokens().unwrap_or_default() {
            if let Ok(token) = self.store.token(&token) {
                token.look_after_all(patience);
            }
        }
        let mut keys = lock(&self.drafts).keys(None);
        keys.retain(|key| self.is_to_be_written(key));
        for keys in keys.chunks(AT_ONCE) {
            let write = |key| {
                let _ = self.write_draft(key, Finished::Ended, Patience::at_most(limit));
            };
            thread::scope(|scope| {
                for key in keys {
                    let thread = thread::Builder::new().name("tokenfs-finish".to_owned());
                    if thread.spawn_scoped(scope, move || write(key)).is_err() {
                        write(key);
                    }
                }
            });
        }
        let tokens = lock(&self.drafts).builds();
        for token in tokens {
            let outcome = if self.is_token(&token) {
                self.publish(&token, Patience::at_most(limit))
            } else {
                self.diagnostics.warning(format!(
                    "{token}: a directory without the attributes of a token was left in the root; it is removed with all that is in it"
                ));
                self.store.abandon_token(&token, Patience::at_most(limit))
            };
            if let Err(error) = outcome {
                self.diagnostics.error(&error);
            }
        }
    }

    /// Whether what is pending of an object is written when the mount ends.
    fn is_to_be_written(&self, key: &Key) -> bool {
        let Some(draft) = lock(&self.drafts).get(key).cloned() else {
            return false;
        };
        if let Some(lacks) = draft.new.as_ref().and_then(New::lacks) {
            // SoftHSM would show an object that nobody can use, or remove; and nobody could complete it.
            self.diagnostics.warning(format!(
                "{}: {lacks}, and the mount ends: it is not written to the store",
                self.path_of(&Node::Object(key.0.clone(), key.1.clone()))
                    .display()
            ));
            return false;
        }
        !draft.gone
    }
}
