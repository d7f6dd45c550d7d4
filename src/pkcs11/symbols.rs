//! Which attributes have symbols for their values, and which.

use super::table::Table;
use super::{attributes as cka, mechanisms, values};
use crate::store::attribute::AttributeType;

/// A family of symbols for a `CK_ULONG`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Symbols {
    /// `CKO_`
    Classes,
    /// `CKK_`
    KeyTypes,
    /// `CKC_`
    CertificateTypes,
    /// `CKM_`
    Mechanisms,
    /// `CKP_`, of profiles
    Profiles,
    /// `CKP_ML_DSA_`
    MlDsaParameterSets,
    /// `CKP_ML_KEM_`
    MlKemParameterSets,
    /// `CKP_SLH_DSA_`
    SlhDsaParameterSets,
    /// `CKH_`
    HardwareFeatures,
    /// `CKT_`
    Trusts,
    /// `CK_CERTIFICATE_CATEGORY_`
    CertificateCategories,
    /// `CK_SECURITY_DOMAIN_`
    SecurityDomains,
    /// `CK_OTP_FORMAT_`
    OtpFormats,
    /// `CK_OTP_PARAM_`
    OtpRequirements,
    /// `CKV_TYPE_`
    ValidationTypes,
    /// `CKV_AUTHORITY_TYPE_`
    ValidationAuthorities,
    /// `CKF_`, of tokens: a value is a set of them
    TokenFlags,
}

impl Symbols {
    /// The three families that a `CKA_PARAMETER_SET` can be from. They have numbers in common and no names.
    pub const PARAMETER_SETS: [Self; 3] = [
        Self::MlDsaParameterSets,
        Self::MlKemParameterSets,
        Self::SlhDsaParameterSets,
    ];

    /// The symbols for the values of an attribute, if it has any. Those of `CKA_PARAMETER_SET` follow from the
    /// `CKA_KEY_TYPE` of the same object.
    #[must_use]
    pub fn of(attribute_type: AttributeType, key_type: Option<u64>) -> Option<Self> {
        Some(match attribute_type {
            cka::CKA_CLASS => Self::Classes,
            cka::CKA_KEY_TYPE => Self::KeyTypes,
            cka::CKA_CERTIFICATE_TYPE => Self::CertificateTypes,
            cka::CKA_KEY_GEN_MECHANISM | cka::CKA_NAME_HASH_ALGORITHM | cka::CKA_MECHANISM_TYPE => {
                Self::Mechanisms
            }
            cka::CKA_PROFILE_ID => Self::Profiles,
            cka::CKA_PARAMETER_SET => match key_type? {
                values::CKK_ML_DSA => Self::MlDsaParameterSets,
                values::CKK_ML_KEM => Self::MlKemParameterSets,
                values::CKK_SLH_DSA => Self::SlhDsaParameterSets,
                _ => return None,
            },
            cka::CKA_HW_FEATURE_TYPE => Self::HardwareFeatures,
            cka::CKA_TRUST_SERVER_AUTH
            | cka::CKA_TRUST_CLIENT_AUTH
            | cka::CKA_TRUST_CODE_SIGNING
            | cka::CKA_TRUST_EMAIL_PROTECTION
            | cka::CKA_TRUST_IPSEC_IKE
            | cka::CKA_TRUST_TIME_STAMPING
            | cka::CKA_TRUST_OCSP_SIGNING => Self::Trusts,
            cka::CKA_CERTIFICATE_CATEGORY => Self::CertificateCategories,
            cka::CKA_JAVA_MIDP_SECURITY_DOMAIN => Self::SecurityDomains,
            cka::CKA_OTP_FORMAT => Self::OtpFormats,
            cka::CKA_OTP_CHALLENGE_REQUIREMENT
            | cka::CKA_OTP_TIME_REQUIREMENT
            | cka::CKA_OTP_COUNTER_REQUIREMENT
            | cka::CKA_OTP_PIN_REQUIREMENT => Self::OtpRequirements,
            cka::CKA_VALIDATION_TYPE => Self::ValidationTypes,
            cka::CKA_VALIDATION_AUTHORITY_TYPE => Self::ValidationAuthorities,
            cka::CKA_OS_TOKENFLAGS => Self::TokenFlags,
            _ => return None,
        })
    }

    /// The name of a value.
    #[must_use]
    pub fn name(self, value: u64) -> Option<&'static str> {
        self.table().name(value)
    }

    /// The value with this name or alias.
    #[must_use]
    pub fn value(self, name: &str) -> Option<u64> {
        self.table().number(name)
    }

    /// Whether a name or alias begins with this.
    #[must_use]
    pub fn has_one_that_begins(self, with: &str) -> bool {
        self.table().has_one_that_begins(with)
    }

    /// All values that have a name, in ascending order, with the name.
    pub fn iter(self) -> impl Iterator<Item = (u64, &'static str)> {
        self.table().names.iter().copied()
    }

    /// Whether a value is a set of these, one bit each.
    #[must_use]
    pub fn are_flags(self) -> bool {
        matches!(self, Self::TokenFlags)
    }

    /// What the names of the family begin with.
    #[must_use]
    pub fn prefix(self) -> &'static str {
        match self {
            Self::Classes => "CKO_",
            Self::KeyTypes => "CKK_",
            Self::CertificateTypes => "CKC_",
            Self::Mechanisms => "CKM_",
            Self::Profiles => "CKP_",
            Self::MlDsaParameterSets => "CKP_ML_DSA_",
            Self::MlKemParameterSets => "CKP_ML_KEM_",
            Self::SlhDsaParameterSets => "CKP_SLH_DSA_",
            Self::HardwareFeatures => "CKH_",
            Self::Trusts => "CKT_",
            Self::CertificateCategories => "CK_CERTIFICATE_CATEGORY_",
            Self::SecurityDomains => "CK_SECURITY_DOMAIN_",
            Self::OtpFormats => "CK_OTP_FORMAT_",
            Self::OtpRequirements => "CK_OTP_PARAM_",
            Self::ValidationTypes => "CKV_TYPE_",
            Self::ValidationAuthorities => "CKV_AUTHORITY_TYPE_",
            Self::TokenFlags => "CKF_",
        }
    }

    fn table(self) -> &'static Table {
        match self {
            Self::Classes => &values::CLASSES,
            Self::KeyTypes => &values::KEY_TYPES,
            Self::CertificateTypes => &values::CERTIFICATE_TYPES,
            Self::Mechanisms => &mechanisms::MECHANISMS,
            Self::Profiles => &values::PROFILES,
            Self::MlDsaParameterSets => &values::ML_DSA_PARAMETER_SETS,
            Self::MlKemParameterSets => &values::ML_KEM_PARAMETER_SETS,
            Self::SlhDsaParameterSets => &values::SLH_DSA_PARAMETER_SETS,
            Self::HardwareFeatures => &values::HARDWARE_FEATURES,
            Self::Trusts => &values::TRUSTS,
            Self::CertificateCategories => &values::CERTIFICATE_CATEGORIES,
            Self::SecurityDomains => &values::SECURITY_DOMAINS,
            Self::OtpFormats => &values::OTP_FORMATS,
            Self::OtpRequirements => &values::OTP_REQUIREMENTS,
            Self::ValidationTypes => &values::VALIDATION_TYPES,
            Self::ValidationAuthorities => &values::VALIDATION_AUTHORITIES,
            Self::TokenFlags => &values::TOKEN_FLAGS,
        }
    }
}
