//! Signatures of requests to S3-compatible stores (AWS Signature Version 4), for what the tests ask a store
//! themselves, and for a proxy that changes signed headers and must sign anew.

use std::time::SystemTime;

use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::{Digest as _, Sha256};

/// The region that every store of the tests is in.
pub(crate) const REGION: &str = "us-east-1";

/// A pair of keys.
#[derive(Clone, Debug)]
pub struct Keys {
    /// The access key's id.
    pub id: String,
    /// The secret.
    pub secret: String,
}

/// What is signed of a request.
#[derive(Debug)]
pub(crate) struct Request<'a> {
    pub(crate) method: &'a str,
    /// The path as it is sent.
    pub(crate) path: &'a str,
    /// The query as it is sent, without its question mark.
    pub(crate) query: &'a str,
    /// The headers to sign, names in lower case; `host`, `x-amz-date` and `x-amz-content-sha256` among them.
    pub(crate) headers: &'a [(String, String)],
    /// The value of `x-amz-content-sha256`.
    pub(crate) payload: &'a str,
    /// The value of `x-amz-date`.
    pub(crate) date: &'a str,
}

/// The `Authorization` header of a request.
pub(crate) fn authorization(request: &Request<'_>, keys: &Keys) -> String {
    let mut headers: Vec<_> = request.headers.to_vec();
    headers.sort();
    let names: Vec<&str> = headers.iter().map(|(name, _)| name.as_str()).collect();
    let names = names.join(";");
    let mut canonical = format!(
        "{}\n{}\n{}\n",
        request.method,
        request.path,
        query(request.query)
    );
    for (name, value) in &headers {
        let value: Vec<_> = value.split_whitespace().collect();
        for part in [name, ":", &value.join(" "), "\n"] {
            canonical.push_str(part);
        }
    }
    for part in ["\n", &names, "\n", request.payload] {
        canonical.push_str(part);
    }

    let day = request.date.get(..8).unwrap_or_default();
    let scope = format!("{day}/{REGION}/s3/aws4_request");
    let text = format!(
        "AWS4-HMAC-SHA256\n{}\n{scope}\n{}",
        request.date,
        hex::encode(Sha256::digest(canonical.as_bytes()))
    );
    let mut key = format!("AWS4{}", keys.secret).into_bytes();
    for part in [day, REGION, "s3", "aws4_request"] {
        key = keyed(&key, part.as_bytes());
    }
    format!(
        "AWS4-HMAC-SHA256 Credential={}/{scope}, SignedHeaders={names}, Signature={}",
        keys.id,
        hex::encode(keyed(&key, text.as_bytes()))
    )
}

/// Now, as `20250102T030405Z`.
pub(crate) fn now() -> String {
    let seconds = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .expect("the clock is after 1970")
        .as_secs();
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = civil(days);
    format!(
        "{year:04}{month:02}{day:02}T{:02}{:02}{:02}Z",
        rest / 3600,
        rest / 60 % 60,
        rest % 60
    )
}

/// The date of a number of days after 1970-01-01, in years that start in March so that leap days come last.
fn civil(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468;
    let (era, of_era) = (days / 146_097, days % 146_097);
    let year = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let shifted = (5 * of_year + 2) / 153;
    let day = of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 {
        shifted + 3
    } else {
        shifted - 9
    };
    (era * 400 + year + u64::from(month <= 2), month, day)
}

/// A query in the order that is signed; each part has its `=`.
fn query(query: &str) -> String {
    let mut parts: Vec<String> = query
        .split('&')
        .filter(|part| !part.is_empty())
        .map(|part| {
            if part.contains('=') {
                part.to_owned()
            } else {
                format!("{part}=")
            }
        })
        .collect();
    parts.sort();
    parts.join("&")
}

fn keyed(key: &[u8], bytes: &[u8]) -> Vec<u8> {
    let mut mac = Hmac::<Sha256>::new_from_slice(key).expect("a key of any length is one");
    mac.update(bytes);
    mac.finalize().into_bytes().to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_documented_example_has_its_documented_signature() {
        // GET Bucket Lifecycle, from the signature's own documentation.
        let empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        let date = "20130524T000000Z";
        let headers = [
            ("host", "examplebucket.s3.amazonaws.com"),
            ("x-amz-content-sha256", empty),
            ("x-amz-date", date),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned()));
        let request = Request {
            method: "GET",
            path: "/",
            query: "lifecycle",
            headers: &headers,
            payload: empty,
            date,
        };
        let keys = Keys {
            id: "AKIAIOSFODNN7EXAMPLE".to_owned(),
            secret: "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY".to_owned(),
        };
        let got = authorization(&request, &keys);
        assert!(
            got.ends_with(
                "Signature=fea454ca298b7da1c68078a5d1bdbfbbe0d65c699e0f91ac7a200a0136783543"
            ),
            "{got}"
        );
    }

    #[test]
    fn days_have_dates() {
        assert_eq!(civil(0), (1970, 1, 1));
        assert_eq!(civil(11_016), (2000, 2, 29));
        assert_eq!(civil(20_454), (2026, 1, 1));
    }
}
