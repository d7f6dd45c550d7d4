//! A mutex that can be waited for until a deadline, or not at all.
//!
//! `std`'s mutex waits for ever or not at all, and a caller's [`Patience`] is neither. So threads wait on a condition
//! variable for their turn, and who has the turn finds the value's own mutex free.

use std::ops::{Deref, DerefMut};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use crate::error::{Error, ErrorKind, Result};
use crate::store::Patience;

/// A value for one thread at a time.
#[derive(Debug, Default)]
pub(super) struct Exclusive<T> {
    taken: Mutex<bool>,
    released: Condvar,
    value: Mutex<T>,
}

impl<T> Exclusive<T> {
    /// Waits for the value as long as `patience` says; `what` is what is being waited for.
    ///
    /// # Errors
    /// [`ErrorKind::WouldBlock`] or [`ErrorKind::Busy`] if it stays taken.
    pub fn lock(&self, patience: Patience, what: &str) -> Result<Held<'_, T>> {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        while *taken {
            let Patience::Until(deadline) = patience else {
                return Err(Error::new(ErrorKind::WouldBlock, what));
            };
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Error::new(ErrorKind::Busy, what));
            }
            let waited = self.released.wait_timeout(taken, left);
            taken = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        *taken = true;
        drop(taken);
        let turn = Turn {
            taken: &self.taken,
            released: &self.released,
        };
        // Nobody else has the turn, so this does not wait.
        let value = self.value.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(Held { value, _turn: turn })
    }
}

/// The value, until this is dropped.
#[derive(Debug)]
pub(super) struct Held<'a, T> {
    // Dropped in this order: the value is free before the turn is.
    value: MutexGuard<'a, T>,
    _turn: Turn<'a>,
}

#[derive(Debug)]
struct Turn<'a> {
    taken: &'a Mutex<bool>,
    released: &'a Condvar,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        *self.taken.lock().unwrap_or_else(PoisonError::into_inner) = false;
        self.released.notify_one();
    }
}

impl<T> Deref for Held<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.value
    }
}

impl<T> DerefMut for Held<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.value
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn waits_as_long_as_told_and_no_longer() {
        let shared = Exclusive::<u32>::default();
        let held = shared.lock(Patience::Now, "it").unwrap();
        let now = shared.lock(Patience::Now, "it").unwrap_err();
        assert_eq!(now.kind(), ErrorKind::WouldBlock);
        let start = Instant::now();
        let limit = Duration::from_millis(30);
        let late = shared.lock(Patience::at_most(limit), "it").unwrap_err();
        assert_eq!(late.kind(), ErrorKind::Busy);
        assert!(start.elapsed() >= limit);
        drop(held);
        assert!(shared.lock(Patience::Now, "it").is_ok());
    }

    #[test]
    fn one_thread_at_a_time_and_each_gets_its_turn() {
        let shared = Exclusive::<u32>::default();
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..100 {
                        let patience = Patience::at_most(Duration::from_secs(60));
                        *shared.lock(patience, "it").unwrap() += 1;
                    }
                });
            }
        });
        assert_eq!(*shared.lock(Patience::Now, "it").unwrap(), 800);
    }
}
