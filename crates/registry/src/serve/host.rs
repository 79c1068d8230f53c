//! Open mode serves this machine alone: requests that a web page made are told by their names.

use std::net::IpAddr;

use http::header::{HOST, ORIGIN};
use http::{HeaderMap, StatusCode, Uri};

use crate::error::{DENIED, Refusal};

/// Refuses a request whose `Host` is not a loopback name (a page that rebinds its own name to
/// 127.0.0.1) or whose `Origin` is a foreign page.
pub(crate) fn check(headers: &HeaderMap, uri: &Uri) -> Result<(), Refusal> {
    let text = |name| {
        headers
            .get(name)
            .and_then(|value: &http::HeaderValue| value.to_str().ok())
    };
    let host = uri
        .authority()
        .map(http::uri::Authority::as_str)
        .or_else(|| text(HOST));
    if headers.get_all(HOST).iter().count() > 1 || !host.is_some_and(is_loopback) {
        return Err(Refusal::new(
            StatusCode::MISDIRECTED_REQUEST,
            DENIED,
            "this server has no users and serves this machine alone, reach it as `127.0.0.1` or \
             `localhost`, or configure users",
        ));
    }
    let foreign = headers.contains_key(ORIGIN)
        && !text(ORIGIN)
            .and_then(|origin| origin.split_once("://"))
            .is_some_and(|(_, host)| is_loopback(host));
    if foreign {
        return Err(Refusal::new(
            StatusCode::FORBIDDEN,
            DENIED,
            "this server has no users and takes no requests of web pages from elsewhere",
        ));
    }
    Ok(())
}

/// Tells whether `host[:port]` names this machine.
fn is_loopback(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => match rest.split_once(']') {
            Some((name, port)) if port.is_empty() || is_port(port) => name,
            _ => return false,
        },
        None => match host.split_once(':') {
            Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) => name,
            Some(_) => return false,
            None => host,
        },
    };
    let name = name.trim_end_matches('.');
    name.eq_ignore_ascii_case("localhost")
        || name.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

fn is_port(text: &str) -> bool {
    text.strip_prefix(':')
        .is_some_and(|port| port.bytes().all(|b| b.is_ascii_digit()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_names() {
        for host in [
            "localhost",
            "LOCALHOST:80",
            "localhost.",
            "127.0.0.1",
            "127.1.2.3:5050",
            "[::1]",
            "[::1]:5050",
        ] {
            assert!(is_loopback(host), "{host}");
        }
        for host in [
            "",
            "example.com",
            "localhost.example.com",
            "10.0.0.1",
            "0.0.0.0",
            "[::]",
            "127.0.0.1.nip.io",
            "127.0.0.1:x",
            "[::1]x",
            "::1",
            "127.1",
        ] {
            assert!(!is_loopback(host), "{host}");
        }
    }
}
