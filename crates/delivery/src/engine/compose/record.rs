//! What definitions were applied, so that a later plan can say why one differs.
//!
//! Which containers are right is decided by their labels alone; this file only gives reasons, so losing it costs nothing else.
//! It holds names and salted fingerprints, never values.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

use oci::Digest;
use serde::{Deserialize, Serialize};

use super::content::{self, ContentError};
use super::rewrite::Wanted;

/// Definitions by their hash.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    version: u32,
    /// Random, so that a short value cannot be found by trying.
    salt: String,
    definitions: BTreeMap<String, BTreeMap<String, String>>,
}

impl Record {
    /// An empty record with this salt.
    pub(super) fn new(salt: &[u8]) -> Self {
        Self {
            version: VERSION,
            salt: hex::encode(salt),
            definitions: BTreeMap::new(),
        }
    }

    /// Reads the record; `None` when there is none or it is damaged.
    ///
    /// # Errors
    ///
    /// A record of a newer version is refused by name, since writing over it would lose what the newer one needs.
    pub(super) fn read(path: &Path) -> Result<Option<Self>, String> {
        let bytes = match std::fs::read(path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(format!("cannot read `{}`: {error}", path.display())),
        };
        #[derive(Deserialize)]
        struct Versioned {
            version: u32,
        }
        match serde_json::from_slice::<Versioned>(&bytes) {
            Ok(Versioned { version }) if version > VERSION => Err(format!(
                "`{}` has version {version}, written by a newer program; this one reads version {VERSION}",
                path.display()
            )),
            _ => Ok(serde_json::from_slice(&bytes).ok()),
        }
    }

    /// Writes it, durable.
    pub(super) fn write(&self, path: &Path) -> Result<(), ContentError> {
        content::write_durably(path, &serde_json::to_vec_pretty(self).unwrap_or_default())
    }

    /// Adds what is about to be applied.
    pub(super) fn add(&mut self, services: &BTreeMap<String, Wanted>) {
        for wanted in services.values() {
            let fingerprints = wanted
                .parts
                .iter()
                .map(|(name, value)| (name.clone(), self.fingerprint(name, value)))
                .collect();
            self.definitions
                .insert(wanted.definition.clone(), fingerprints);
        }
    }

    /// Forgets definitions that nothing was made from.
    pub(super) fn retain(&mut self, used: impl Fn(&str) -> bool) {
        self.definitions.retain(|definition, _| used(definition));
    }

    /// The names of the parts in which the definition differs from `parts`; `None` when the definition is unknown.
    pub(super) fn changed_parts(
        &self,
        definition: &str,
        parts: &BTreeMap<String, String>,
    ) -> Option<Vec<String>> {
        let before = self.definitions.get(definition)?;
        let mut names: Vec<String> = parts
            .iter()
            .filter(|(name, value)| before.get(*name) != Some(&self.fingerprint(name, value)))
            .map(|(name, _)| name.clone())
            .collect();
        names.extend(
            before
                .keys()
                .filter(|name| !parts.contains_key(*name))
                .cloned(),
        );
        names.sort();
        Some(names)
    }

    fn fingerprint(&self, name: &str, value: &str) -> String {
        Digest::sha256(format!("{}\0{name}\0{value}", self.salt).as_bytes()).hex()[..32].to_owned()
    }
}

const VERSION: u32 = 1;

#[cfg(test)]
mod tests;
