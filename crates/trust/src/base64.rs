//! Base64 as signatures use it: written in the standard alphabet, read in both.

use base64::Engine as _;
use base64::alphabet;
use base64::engine::DecodePaddingMode;
use base64::engine::general_purpose::{GeneralPurpose, GeneralPurposeConfig, STANDARD};

pub(crate) fn encode(bytes: &[u8]) -> String {
    STANDARD.encode(bytes)
}

/// Reads standard or URL-safe base64, with or without padding, as Go's DSSE library does.
pub(crate) fn decode(text: &str) -> Option<Vec<u8>> {
    TOLERANT
        .decode(text)
        .or_else(|_| TOLERANT_URL.decode(text))
        .ok()
}

const TOLERANT: GeneralPurpose = GeneralPurpose::new(&alphabet::STANDARD, CONFIG);
const TOLERANT_URL: GeneralPurpose = GeneralPurpose::new(&alphabet::URL_SAFE, CONFIG);
const CONFIG: GeneralPurposeConfig =
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent);
