//! What SoftHSM stores of an object of each class: all attributes that the class has, with default values where nobody gave one
//! (`P11Objects.cpp`, `P11Attribute::init`). What one lacks it is given when SoftHSM looks at it.

use crate::pkcs11::{
    self, CKA_ALLOWED_MECHANISMS, CKA_CERTIFICATE_TYPE, CKA_CLASS, CKA_COPYABLE, CKA_DESTROYABLE,
    CKA_EC_PARAMS, CKA_EC_POINT, CKA_END_DATE, CKA_ID, CKA_KEY_TYPE, CKA_MODULUS, CKA_PRIVATE,
    CKA_PRIVATE_EXPONENT, CKA_PUBLIC_EXPONENT, CKA_PUBLIC_KEY_INFO, CKA_START_DATE, CKA_SUBJECT,
    CKA_URL, CKA_VALUE, CKC_X_509, CKK_AES, CKK_DES, CKK_DES2, CKK_DES3, CKK_EC, CKK_EC_EDWARDS,
    CKK_GENERIC_SECRET, CKK_RSA, CKO_CERTIFICATE, CKO_DATA, CKO_DOMAIN_PARAMETERS, CKO_PRIVATE_KEY,
    CKO_PUBLIC_KEY, CKO_SECRET_KEY,
};
use crate::store::attribute::{AttributeType, Attributes};

/// What every object of SoftHSM's has (`P11Object::init`).
pub(super) const OF_ALL: &[AttributeType] = &[
    CKA_CLASS,
    pkcs11::CKA_TOKEN,
    CKA_PRIVATE,
    pkcs11::CKA_LABEL,
    pkcs11::CKA_MODIFIABLE,
    CKA_COPYABLE,
    CKA_DESTROYABLE,
];

/// What is added in each class, whatever the type of key or certificate. Types that depend on that are left out: the last ones of
/// a class do not, and a cut anywhere loses those.
pub(super) fn of_class(class: u64) -> &'static [AttributeType] {
    match class {
        CKO_DATA => &[pkcs11::CKA_APPLICATION, CKA_VALUE, pkcs11::CKA_OBJECT_ID],
        CKO_CERTIFICATE => &[
            CKA_CERTIFICATE_TYPE,
            pkcs11::CKA_TRUSTED,
            pkcs11::CKA_CERTIFICATE_CATEGORY,
            pkcs11::CKA_CHECK_VALUE,
            pkcs11::CKA_START_DATE,
            pkcs11::CKA_END_DATE,
        ],
        CKO_PUBLIC_KEY => &[
            pkcs11::CKA_TRUSTED,
            CKA_KEY_TYPE,
            pkcs11::CKA_ID,
            pkcs11::CKA_ENCRYPT,
            pkcs11::CKA_VERIFY,
            pkcs11::CKA_DERIVE,
            pkcs11::CKA_LOCAL,
            pkcs11::CKA_KEY_GEN_MECHANISM,
            pkcs11::CKA_WRAP_TEMPLATE,
            CKA_ALLOWED_MECHANISMS,
        ],
        CKO_PRIVATE_KEY => &[
            CKA_KEY_TYPE,
            pkcs11::CKA_ID,
            pkcs11::CKA_SENSITIVE,
            pkcs11::CKA_DECRYPT,
            pkcs11::CKA_SIGN,
            pkcs11::CKA_DERIVE,
            pkcs11::CKA_EXTRACTABLE,
            pkcs11::CKA_LOCAL,
            pkcs11::CKA_KEY_GEN_MECHANISM,
            pkcs11::CKA_ALWAYS_AUTHENTICATE,
            pkcs11::CKA_WRAP_WITH_TRUSTED,
            pkcs11::CKA_UNWRAP_TEMPLATE,
            CKA_ALLOWED_MECHANISMS,
        ],
        CKO_SECRET_KEY => &[
            CKA_KEY_TYPE,
            pkcs11::CKA_ID,
            pkcs11::CKA_SENSITIVE,
            pkcs11::CKA_ENCRYPT,
            pkcs11::CKA_DECRYPT,
            pkcs11::CKA_DERIVE,
            pkcs11::CKA_EXTRACTABLE,
            pkcs11::CKA_LOCAL,
            pkcs11::CKA_KEY_GEN_MECHANISM,
            pkcs11::CKA_WRAP_WITH_TRUSTED,
            pkcs11::CKA_WRAP_TEMPLATE,
            pkcs11::CKA_UNWRAP_TEMPLATE,
            CKA_ALLOWED_MECHANISMS,
        ],
        CKO_DOMAIN_PARAMETERS => &[CKA_KEY_TYPE, pkcs11::CKA_LOCAL],
        _ => &[],
    }
}

/// What is added besides to objects of this class, whatever the type of key or certificate.
fn of_class_besides(class: u64) -> &'static [AttributeType] {
    match class {
        CKO_PUBLIC_KEY => &[
            CKA_SUBJECT,
            CKA_START_DATE,
            CKA_END_DATE,
            pkcs11::CKA_VERIFY_RECOVER,
            pkcs11::CKA_WRAP,
            CKA_PUBLIC_KEY_INFO,
        ],
        CKO_PRIVATE_KEY => &[
            CKA_SUBJECT,
            CKA_START_DATE,
            CKA_END_DATE,
            pkcs11::CKA_SIGN_RECOVER,
            pkcs11::CKA_UNWRAP,
            pkcs11::CKA_ALWAYS_SENSITIVE,
            pkcs11::CKA_NEVER_EXTRACTABLE,
            CKA_PUBLIC_KEY_INFO,
        ],
        CKO_SECRET_KEY => &[
            CKA_VALUE,
            CKA_START_DATE,
            CKA_END_DATE,
            pkcs11::CKA_SIGN,
            pkcs11::CKA_VERIFY,
            pkcs11::CKA_WRAP,
            pkcs11::CKA_UNWRAP,
            pkcs11::CKA_TRUSTED,
            pkcs11::CKA_CHECK_VALUE,
            pkcs11::CKA_ALWAYS_SENSITIVE,
            pkcs11::CKA_NEVER_EXTRACTABLE,
        ],
        _ => &[],
    }
}

/// What is added by the type of key or certificate, if that is known here.
fn of_type(attributes: &Attributes) -> Option<&'static [AttributeType]> {
    let class = attributes.ulong(CKA_CLASS)?;
    let key_type = attributes.ulong(CKA_KEY_TYPE);
    Some(match (class, key_type) {
        (CKO_DATA, _) => &[],
        (CKO_CERTIFICATE, _) if attributes.ulong(CKA_CERTIFICATE_TYPE) == Some(CKC_X_509) => &[
            CKA_VALUE,
            pkcs11::CKA_ISSUER,
            pkcs11::CKA_SERIAL_NUMBER,
            CKA_URL,
            pkcs11::CKA_HASH_OF_SUBJECT_PUBLIC_KEY,
            pkcs11::CKA_HASH_OF_ISSUER_PUBLIC_KEY,
            pkcs11::CKA_JAVA_MIDP_SECURITY_DOMAIN,
            pkcs11::CKA_NAME_HASH_ALGORITHM,
            CKA_SUBJECT,
            CKA_ID,
            CKA_PUBLIC_KEY_INFO,
        ],
        (CKO_PUBLIC_KEY, Some(CKK_RSA)) => {
            &[CKA_MODULUS, pkcs11::CKA_MODULUS_BITS, CKA_PUBLIC_EXPONENT]
        }
        (CKO_PUBLIC_KEY, Some(CKK_EC | CKK_EC_EDWARDS)) => &[CKA_EC_PARAMS, CKA_EC_POINT],
        (CKO_PRIVATE_KEY, Some(CKK_RSA)) => &[
            CKA_MODULUS,
            CKA_PUBLIC_EXPONENT,
            CKA_PRIVATE_EXPONENT,
            pkcs11::CKA_PRIME_1,
            pkcs11::CKA_PRIME_2,
            pkcs11::CKA_EXPONENT_1,
            pkcs11::CKA_EXPONENT_2,
            pkcs11::CKA_COEFFICIENT,
        ],
        (CKO_PRIVATE_KEY, Some(CKK_EC | CKK_EC_EDWARDS)) => &[CKA_EC_PARAMS, CKA_VALUE],
        (CKO_SECRET_KEY, Some(CKK_GENERIC_SECRET | CKK_AES)) => &[pkcs11::CKA_VALUE_LEN],
        (CKO_SECRET_KEY, Some(CKK_DES | CKK_DES2 | CKK_DES3)) => &[],
        _ => return None,
    })
}

/// Whether an object has all that one of SoftHSM 2.6.1 of its class and type has. Of what SoftHSM cannot use, and of the rarer types (DSA, DH, GOST), that
/// cannot be told.
#[must_use]
pub fn is_complete(attributes: &Attributes) -> bool {
    let (Some(class), Some(of_type)) = (attributes.ulong(CKA_CLASS), of_type(attributes)) else {
        return false;
    };
    let wanted = [OF_ALL, of_class(class), of_class_besides(class), of_type];
    let mut wanted = wanted.into_iter().flatten();
    wanted.all(|wanted| attributes.of_type(*wanted).is_some())
}
