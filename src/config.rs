//! `softhsm2.conf`, as SoftHSM finds and reads it.
