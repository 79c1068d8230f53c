//! `WWW-Authenticate` challenges and token scopes
//! ([RFC 9110 § 11.6.1](https://www.rfc-editor.org/rfc/rfc9110#section-11.6.1),
//! [distribution token scope](https://distribution.github.io/distribution/spec/auth/scope/)).

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

/// What a server asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Challenge {
    /// User and password with each request.
    Basic,
    /// A token from `realm`.
    Bearer {
        /// Where tokens are given.
        realm: String,
        /// Which service the token is for.
        service: Option<String>,
        /// The rights that the request needs.
        scopes: Scopes,
    },
}

impl Challenge {
    /// Chooses from all challenges of an answer: Bearer before Basic, others are unknown here.
    pub(crate) fn choose<'a>(headers: impl Iterator<Item = &'a str>) -> Option<Self> {
        let mut basic = None;
        for header in headers {
            for raw in parse(header) {
                match raw.scheme.as_str() {
                    "bearer" => {
                        if let Some(realm) = raw.parameters.get("realm") {
                            return Some(Self::Bearer {
                                realm: realm.clone(),
                                service: raw.parameters.get("service").cloned(),
                                scopes: raw
                                    .parameters
                                    .get("scope")
                                    .map(|text| Scopes::parse(text))
                                    .unwrap_or_default(),
                            });
                        }
                    }
                    "basic" => basic = Some(Self::Basic),
                    _ => {}
                }
            }
        }
        basic
    }
}

/// One challenge as it was written, scheme and parameter names in lower case.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct RawChallenge {
    pub(crate) scheme: String,
    pub(crate) parameters: BTreeMap<String, String>,
}

/// Reads a header that may hold several challenges. What cannot be read is passed over.
pub(crate) fn parse(header: &str) -> Vec<RawChallenge> {
    let mut found: Vec<RawChallenge> = Vec::new();
    let mut rest = header.trim_start();
    while !rest.is_empty() {
        let length = rest
            .bytes()
            .position(|byte| !is_token(byte))
            .unwrap_or(rest.len());
        if length == 0 {
            let mut chars = rest.chars();
            chars.next();
            rest = chars.as_str();
            continue;
        }
        let word = &rest[..length];
        let after = rest[length..].trim_start();
        if let Some(value) = after.strip_prefix('=') {
            let (value, left) = value_of(value.trim_start());
            if let Some(challenge) = found.last_mut() {
                challenge
                    .parameters
                    .entry(word.to_ascii_lowercase())
                    .or_insert(value);
            }
            rest = left.trim_start();
        } else {
            found.push(RawChallenge {
                scheme: word.to_ascii_lowercase(),
                parameters: BTreeMap::new(),
            });
            rest = after;
        }
    }
    found
}

/// A token or a quoted string, and what follows it.
fn value_of(text: &str) -> (String, &str) {
    let Some(quoted) = text.strip_prefix('"') else {
        let length = text
            .find(|c: char| c == ',' || c.is_whitespace())
            .unwrap_or(text.len());
        return (text[..length].to_owned(), &text[length..]);
    };
    let mut value = String::new();
    let mut chars = quoted.chars();
    while let Some(c) = chars.next() {
        match c {
            '"' => break,
            '\\' => value.extend(chars.next()),
            other => value.push(other),
        }
    }
    (value, chars.as_str())
}

fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

/// A set of rights: resource (`repository:shop/web`) to actions.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Scopes(BTreeMap<String, BTreeSet<String>>);

impl Scopes {
    /// Rights on one repository, such as `pull` or `pull,push`.
    pub(crate) fn repository(name: &str, actions: &str) -> Self {
        Self::parse(&format!("repository:{name}:{actions}"))
    }

    /// Reads `repository:name:pull,push repository:…`. A name may itself hold a colon.
    pub(crate) fn parse(text: &str) -> Self {
        let mut scopes = Self::default();
        for scope in text.split_ascii_whitespace() {
            if let Some((resource, actions)) = scope.rsplit_once(':') {
                scopes
                    .0
                    .entry(resource.to_owned())
                    .or_default()
                    .extend(actions.split(',').map(str::to_owned));
            }
        }
        scopes
    }

    /// Both together.
    pub(crate) fn union(mut self, other: &Self) -> Self {
        for (resource, actions) in &other.0 {
            self.0
                .entry(resource.clone())
                .or_default()
                .extend(actions.iter().cloned());
        }
        self
    }

    /// Tells whether every right of `other` is among these.
    pub(crate) fn covers(&self, other: &Self) -> bool {
        other.0.iter().all(|(resource, actions)| {
            self.0
                .get(resource)
                .is_some_and(|have| have.contains("*") || actions.is_subset(have))
        })
    }

    /// Each scope as the token request wants it.
    pub(crate) fn iter(&self) -> impl Iterator<Item = String> {
        self.0.iter().map(|(resource, actions)| {
            let actions: Vec<&str> = actions.iter().map(String::as_str).collect();
            format!("{resource}:{}", actions.join(","))
        })
    }
}

impl fmt::Display for Scopes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all: Vec<String> = self.iter().collect();
        f.write_str(&all.join(" "))
    }
}

#[cfg(test)]
mod tests;
