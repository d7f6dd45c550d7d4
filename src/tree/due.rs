//! When what the mount shows becomes what the store has.
//!
//! What has been left alone for long enough is due. [`Tree::due`] hands it out as tasks, each of which can wait for a lock for as long as it
//! likes: whoever does them ([`Tree::attend`]) does so at the same time, so that one object's lock holds up no other object. What shares a
//! lock, as all of a database does, is one task. At the end of the mount [`Tree::finish`] does everything. How each is done is in
//! [`super::settle`].
//!
//! A task is handed out once, until it is dropped; what was not done is handed out again.

use std::collections::{BTreeMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::draft::{Key, LEFT_ALONE, New};
use super::node::Node;
use super::settle::Finished;
use super::{Tree, lock};
use crate::error::ErrorKind;
use crate::store::layout::LayoutFile;
use crate::store::{Backend, Patience, TokenName};

/// How many objects are written at once at the end of a mount.
const AT_ONCE: usize = 64;

/// How long each waits at least for the locks that it shares with what is written at the same time, however short `lock_wait` is.
pub(super) const AT_LEAST: Duration = Duration::from_secs(1);

/// How long one waits for a lock that another one has waited for in vain.
pub(super) const BRIEFLY: Duration = Duration::from_millis(20);

/// How long one waits for work at a time.
const FOREVER: Duration = Duration::from_secs(3600);

/// What there is to do.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum What {
    /// SoftHSM may have brought back an object, overwritten a change of it, or stepped over what was made or removed.
    LookAfter(TokenName, LayoutFile),
    /// An object is new, or something in it was unlinked.
    Write(Key),
    /// The same of objects of one token, one after the other, since they share a lock; and then that token itself, if it is being built.
    WriteAll(TokenName),
    /// The directory of a token was given a time, and nothing is written in it any more.
    RestoreTime(TokenName),
}

/// What is to be handed out, and what is handed out and not done yet.
#[derive(Debug, Default)]
pub(super) struct Tasks {
    taken: HashSet<What>,
    returned: HashSet<(TokenName, LayoutFile)>,
}

/// Something that is due. As long as it is there nobody else is given the same.
#[derive(Debug)]
pub struct Task {
    what: What,
    all: Arc<Mutex<Tasks>>,
    /// Of [`What::WriteAll`]: which objects are due, and whether the token is to be published.
    objects: Vec<Key>,
    is_finished: bool,
    is_done: bool,
}

/// When the next look is due at what may be due. A look goes through all that is pending, so there is one only if it can find something: most of
/// what is done in the mount does no more than begin the time anew for which an object has to be left alone.
#[derive(Debug, Default)]
pub(super) struct Work {
    /// At the latest then, as far as is known since the last look.
    look: Option<Instant>,
    /// Until when somebody waits; without an end if there is none.
    waiting: Option<Option<Instant>>,
}

impl Work {
    /// Whether somebody waits for longer than until `at`.
    fn sleeps_beyond(&self, at: Instant) -> bool {
        self.waiting
            .is_some_and(|until| until.is_none_or(|until| until > at))
    }
}

impl Task {
    /// Takes on what nobody else has taken on.
    fn take(all: &Arc<Mutex<Tasks>>, what: What) -> Option<Self> {
        lock(all).taken.insert(what.clone()).then(|| Self {
            what,
            all: Arc::clone(all),
            objects: Vec::new(),
            is_finished: false,
            is_done: false,
        })
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        let mut all = lock(&self.all);
        all.taken.remove(&self.what);
        // Nobody else would know of it; what is to be written is due until it is.
        if let What::LookAfter(token, file) = &self.what
            && !self.is_done
        {
            all.returned.insert((token.clone(), file.clone()));
        }
    }
}

impl Tree {
    /// SoftHSM may have undone a change of ours, or not have seen it: who can wait sees to it.
    pub(super) fn is_to_be_looked_after(&self, token: &TokenName, file: &LayoutFile) {
        lock(&self.tasks)
            .returned
            .insert((token.clone(), file.clone()));
        self.wake();
    }

    /// What is due, and when the next thing will be that is not.
    pub fn due(&self) -> (Vec<Task>, Option<Instant>) {
        let take = |what| Task::take(&self.tasks, what);
        let returned: Vec<_> = {
            let mut all = lock(&self.tasks);
            let Tasks { taken, returned } = &mut *all;
            // Something has happened to it since somebody has begun to look after it.
            let is_free = |(token, file): &(TokenName, LayoutFile)| {
                !taken.contains(&What::LookAfter(token.clone(), file.clone()))
            };
            returned.extract_if(is_free).collect()
        };
        let looks = returned
            .into_iter()
            .filter_map(|(token, file)| take(What::LookAfter(token, file)));
        let mut tasks: Vec<Task> = looks.collect();
        let open = self.open_objects();
        let (keys, finished, next) = lock(&self.drafts).due(Instant::now(), &open);
        let mut together: BTreeMap<TokenName, Vec<Key>> = BTreeMap::new();
        for token in &finished {
            together.entry(token.clone()).or_default();
        }
        for key in keys {
            if self.share_a_lock(&key.0) {
                together.entry(key.0.clone()).or_default().push(key);
            } else {
                tasks.extend(take(What::Write(key)));
            }
        }
        for (token, objects) in together {
            let is_finished = finished.contains(&token);
            if let Some(mut task) = take(What::WriteAll(token)) {
                (task.objects, task.is_finished) = (objects, is_finished);
                tasks.push(task);
            }
        }
        let dated = lock(&self.drafts).times_to_restore();
        let dated = dated.into_iter().map(What::RestoreTime);
        tasks.extend(dated.filter_map(take));
        (tasks, next)
    }

    /// Whether the objects of a token are written one after the other: those of a database, and of a token that has to wait for them.
    fn share_a_lock(&self, token: &TokenName) -> bool {
        self.store.is_building(token)
            || self
                .token(token)
                .is_ok_and(|token| token.backend() == Backend::Db)
    }

    /// Writes objects that share a lock. What has been waited for in vain is not waited for again for each of them.
    fn write_in_turn(&self, keys: &[Key], finished: Finished) {
        let mut patience = None;
        for key in keys {
            let patient = patience.map_or_else(|| self.patience(), Patience::at_most);
            match self.write_draft(key, finished, patient) {
                Err(error) if error.kind() == ErrorKind::Busy => patience = Some(BRIEFLY),
                _ => patience = None,
            }
        }
    }

    /// How long each thing that is due waits.
    pub(super) fn patience(&self) -> Patience {
        Patience::at_most(self.store.options().lock_wait.max(AT_LEAST))
    }

    /// Does what is due. What fails is in the log, and is due again in a while.
    pub fn attend(&self, mut task: Task) {
        match &task.what {
            What::LookAfter(token, file) => {
                let patience = self.patience();
                let seen_to = self.ask(token, patience, |token| token.look_after(file, patience));
                if let Err(error) = self.noted(seen_to)
                    && error.kind() == ErrorKind::Busy
                {
                    // It is due again: a lock is free one day.
                    drop(task);
                    return self.wake_when_left_alone();
                }
            }
            What::Write(key) => {
                let _ = self.write_draft(key, Finished::LeftAlone, self.patience());
            }
            What::RestoreTime(token) => self.restore_time(token, self.patience()),
            What::WriteAll(token) => {
                self.write_in_turn(&task.objects, Finished::LeftAlone);
                if task.is_finished {
                    let _ = self.publish(token, self.patience());
                }
            }
        }
        task.is_done = true;
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
            self.attend(task);
        }
        // That took a while, in which more may have become due.
        Some(Instant::now())
    }

    /// Waits until `due`, or until there may be something to do before that.
    pub fn wait_for_work(&self, due: Option<Instant>) {
        let mut work = lock(&self.work.0);
        loop {
            let until = due.into_iter().chain(work.look).min();
            let now = Instant::now();
            let limit = until.map_or(FOREVER, |until| until.saturating_duration_since(now));
            if limit.is_zero() {
                break;
            }
            work.waiting = Some(until);
            let waited = self.work.1.wait_timeout(work, limit);
            work = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        *work = Work::default();
    }

    /// Ends [`Tree::wait_for_work`].
    pub fn wake(&self) {
        self.wake_by(Instant::now());
    }

    /// Something was changed that has to be left alone from now on before it is due: ends [`Tree::wait_for_work`] when it may have been.
    pub(super) fn wake_when_left_alone(&self) {
        self.wake_by(Instant::now() + LEFT_ALONE);
    }

    /// Ends [`Tree::wait_for_work`] at once where something `can_be_due`, and otherwise when it may have been left alone.
    pub(super) fn wake_for(&self, can_be_due: bool) {
        if can_be_due {
            self.wake();
        } else {
            self.wake_when_left_alone();
        }
    }

    fn wake_by(&self, at: Instant) {
        let mut work = lock(&self.work.0);
        if work.look.is_some_and(|look| look <= at) {
            return;
        }
        work.look = Some(at);
        if work.sleeps_beyond(at) {
            self.work.1.notify_all();
        }
    }

    /// Writes everything that is not in the store yet: the mount ends. What cannot be written is lost, and is in the log.
    pub fn finish(&self) {
        let patience = self.patience();
        for token in self.store.tokens().unwrap_or_default() {
            if let Ok(token) = self.store.token(&token) {
                token.look_after_all(patience);
            }
        }
        let mut keys = lock(&self.drafts).keys(None);
        keys.retain(|key| self.is_to_be_written(key));
        let (shared, own): (Vec<Key>, Vec<Key>) =
            keys.into_iter().partition(|key| self.share_a_lock(&key.0));
        let mut turns: BTreeMap<TokenName, Vec<Key>> = BTreeMap::new();
        for key in shared {
            turns.entry(key.0.clone()).or_default().push(key);
        }
        let mut turns: Vec<Vec<Key>> = turns.into_values().collect();
        turns.extend(own.into_iter().map(|key| vec![key]));
        for turns in turns.chunks(AT_ONCE) {
            thread::scope(|scope| {
                for keys in turns {
                    let thread = thread::Builder::new().name("tokenfs-finish".to_owned());
                    let write = || self.write_in_turn(keys, Finished::Ended);
                    if thread.spawn_scoped(scope, write).is_err() {
                        write();
                    }
                }
            });
        }
        let tokens = lock(&self.drafts).builds();
        for token in tokens {
            let outcome = if self.is_token(&token) {
                self.publish(&token, self.patience())
            } else {
                self.diagnostics.warning(format!(
                    "{token}: a directory without the attributes of a token was left in the root; it is removed with all that is in it"
                ));
                self.store.abandon_token(&token, self.patience())
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
