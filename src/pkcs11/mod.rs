//! The names, kinds and symbols of PKCS #11 3.2, and of the vendor attributes that SoftHSM adds.
