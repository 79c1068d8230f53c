//! PEM files (RFC 7468), one block each.

use zeroize::Zeroizing;

use crate::{Error, base64};

/// The label and the content of the only block in `text`. What stands before it is skipped, as
/// certificates often have a text form there.
pub(crate) fn decode(text: &str) -> Result<(&str, Zeroizing<Vec<u8>>), Error> {
    let not_pem = || Error::invalid("this is not a PEM file");
    if text.len() > MAX_FILE {
        return Err(Error::invalid("this file is too large for a key"));
    }
    let (_, rest) = text.split_once("-----BEGIN ").ok_or_else(not_pem)?;
    let (label, rest) = rest.split_once("-----").ok_or_else(not_pem)?;
    let (body, _) = rest
        .split_once(&format!("-----END {label}-----"))
        .ok_or_else(not_pem)?;
    let body: Zeroizing<String> =
        Zeroizing::new(body.chars().filter(|c| !c.is_ascii_whitespace()).collect());
    let content = base64::decode(&body).ok_or_else(not_pem)?;
    Ok((label, Zeroizing::new(content)))
}

pub(crate) fn encode(label: &str, content: &[u8]) -> String {
    let body = base64::encode(content);
    let mut text = format!("-----BEGIN {label}-----\n");
    let mut rest = body.as_str();
    while !rest.is_empty() {
        let (line, after) = rest.split_at(rest.len().min(64));
        text.push_str(line);
        text.push('\n');
        rest = after;
    }
    text + "-----END " + label + "-----\n"
}

const MAX_FILE: usize = 64 << 10;
