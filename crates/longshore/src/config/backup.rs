//! The section `backup`: the continuous backup of an embedded store.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::period;

/// `backup` as it was written.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Backup {
    directory: Option<PathBuf>,
    every: Option<String>,
    keep: Option<String>,
    link: Option<bool>,
}

impl Backup {
    pub(super) fn check(self) -> anyhow::Result<Option<store::BackupOptions>> {
        let Some(directory) = self.directory else {
            if self.every.is_some() || self.keep.is_some() || self.link.is_some() {
                anyhow::bail!(
                    "`backup` needs to know where to: add `directory: /backup/longshore`"
                );
            }
            return Ok(None);
        };
        if !directory.is_absolute() {
            anyhow::bail!("`backup.directory` must be an absolute path");
        }
        let mut options = store::BackupOptions::new(directory);
        if let Some(text) = &self.every {
            options.every = period("backup.every", text)?;
            if options.every.is_zero() {
                anyhow::bail!("`backup.every` must be longer than nothing, write for example `1m`");
            }
        }
        if let Some(text) = &self.keep {
            options.keep = period("backup.keep", text)?;
        }
        if options.keep < options.every {
            anyhow::bail!("`backup.keep` must be at least as long as `backup.every`");
        }
        options.link = self.link.unwrap_or_default();
        Ok(Some(options))
    }
}
