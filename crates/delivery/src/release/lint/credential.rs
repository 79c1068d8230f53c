//! Credentials in files. Only forms that are nothing else: a false alarm blocks a release.

/// Finds credentials: line (from 1) and what it is. The credential itself is never handed on.
pub(super) fn scan(content: &[u8]) -> Vec<(usize, &'static str)> {
    let mut found = Vec::new();
    for (index, line) in content.split(|byte| *byte == b'\n').enumerate() {
        if let Some(what) = kind(line) {
            found.push((index + 1, what));
        }
    }
    found
}

fn kind(line: &[u8]) -> Option<&'static str> {
    if is_private_key(line) {
        return Some("a private key");
    }
    PREFIXES
        .iter()
        .find(|form| form.is_in(line))
        .map(|form| form.what)
}

/// `-----BEGIN … PRIVATE KEY-----` in any flavour, also in one line of JSON or a `.env` file.
fn is_private_key(line: &[u8]) -> bool {
    let Some(start) = find(line, b"-----BEGIN ") else {
        return false;
    };
    let rest = &line[start + 11..];
    let end = find(rest, b"-----").unwrap_or(0).min(64);
    find(&rest[..end], b"PRIVATE KEY").is_some()
}

/// A token that is told by how it begins.
struct Form {
    prefix: &'static [u8],
    /// How many characters follow at least.
    length: usize,
    /// Which ones.
    alphabet: fn(u8) -> bool,
    what: &'static str,
}

impl Form {
    fn is_in(&self, line: &[u8]) -> bool {
        let mut from = 0;
        while let Some(at) = find(&line[from..], self.prefix) {
            let start = from + at;
            let after = &line[start + self.prefix.len()..];
            let length = after
                .iter()
                .take_while(|byte| (self.alphabet)(**byte))
                .count();
            // Inside a longer word it is chance, as in base64.
            let alone = start == 0 || !line[start - 1].is_ascii_alphanumeric();
            if alone && length >= self.length {
                return true;
            }
            from = start + 1;
        }
        false
    }
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack
        .windows(needle.len())
        .position(|window| window == needle)
}

fn word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-'
}

fn alphanumeric(byte: u8) -> bool {
    byte.is_ascii_alphanumeric()
}

fn capital(byte: u8) -> bool {
    byte.is_ascii_uppercase() || byte.is_ascii_digit()
}

const fn form(
    prefix: &'static [u8],
    length: usize,
    alphabet: fn(u8) -> bool,
    what: &'static str,
) -> Form {
    Form {
        prefix,
        length,
        alphabet,
        what,
    }
}

const PREFIXES: [Form; 21] = [
    form(b"AKIA", 16, capital, "an AWS access key"),
    form(b"ASIA", 16, capital, "an AWS access key"),
    form(b"ghp_", 36, alphanumeric, "a GitHub token"),
    form(b"gho_", 36, alphanumeric, "a GitHub token"),
    form(b"ghu_", 36, alphanumeric, "a GitHub token"),
    form(b"ghs_", 36, alphanumeric, "a GitHub token"),
    form(b"ghr_", 36, alphanumeric, "a GitHub token"),
    form(b"github_pat_", 22, word, "a GitHub token"),
    form(b"glpat-", 20, word, "a GitLab token"),
    form(b"gldt-", 20, word, "a GitLab token"),
    form(b"xoxa-", 10, word, "a Slack token"),
    form(b"xoxb-", 10, word, "a Slack token"),
    form(b"xoxp-", 10, word, "a Slack token"),
    form(b"xoxr-", 10, word, "a Slack token"),
    form(b"xoxs-", 10, word, "a Slack token"),
    form(b"sk_live_", 24, alphanumeric, "a Stripe key"),
    form(b"AIza", 35, word, "a Google API key"),
    form(b"npm_", 36, alphanumeric, "an npm token"),
    form(b"dckr_pat_", 20, word, "a Docker Hub token"),
    form(b"hvs.", 24, word, "a Vault token"),
    form(b"AGE-SECRET-KEY-1", 58, capital, "an age key"),
];

/// Whether a variable of this name usually holds a secret.
pub(super) fn is_secret_name(name: &str) -> bool {
    let name = name.to_ascii_uppercase();
    let points = [
        "_FILE",
        "_PATH",
        "_URL",
        "_NAME",
        "_ID",
        "_ENDPOINT",
        "_TTL",
        "_LENGTH",
    ];
    !points.iter().any(|suffix| name.ends_with(suffix))
        && [
            "PASSWORD",
            "PASSWD",
            "PASSPHRASE",
            "SECRET",
            "TOKEN",
            "API_KEY",
            "APIKEY",
            "PRIVATE_KEY",
            "ACCESS_KEY",
        ]
        .iter()
        .any(|part| name.ends_with(part) || name.ends_with(&format!("{part}_KEY")))
}
