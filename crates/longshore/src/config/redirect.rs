//! The section `storage.redirect`: which pulls are sent to the object store.

use std::time::Duration;

use anyhow::Context as _;
use serde::{Deserialize, Serialize};

use super::period;

/// `storage.redirect` as it was written.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Redirect {
    networks: Vec<String>,
    ttl: Option<String>,
    except: Except,
}

/// What is never sent there.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Except {
    strict_audit: Vec<String>,
}

impl Redirect {
    /// Checks the section. An object that is to be deleted waits for as long as a URL to it may be used.
    pub(super) fn check(
        &self,
        options: &mut store::Options,
        s3: bool,
    ) -> anyhow::Result<Option<registry::Redirect>> {
        if self.networks.is_empty() {
            if self.ttl.is_some() || !self.except.strict_audit.is_empty() {
                anyhow::bail!(
                    "`storage.redirect` names no `networks`, write for example `networks: [10.0.0.0/8]`"
                );
            }
            return Ok(None);
        }
        if !s3 {
            anyhow::bail!(
                "`storage.redirect` is for blobs in an object store, and `storage.objects` names none"
            );
        }
        let networks = self
            .networks
            .iter()
            .map(|text| text.parse().context("`storage.redirect.networks`"))
            .collect::<anyhow::Result<_>>()?;
        let except = self
            .except
            .strict_audit
            .iter()
            .map(|text| {
                text.parse()
                    .context("`storage.redirect.except.strict_audit`")
            })
            .collect::<anyhow::Result<_>>()?;
        let ttl = match &self.ttl {
            None => TTL,
            Some(text) => period("storage.redirect.ttl", text)?,
        };
        if !(SHORTEST..=LONGEST).contains(&ttl) {
            anyhow::bail!("`storage.redirect.ttl` must be between 1m and 12h");
        }
        options.gc.read_grace = options.gc.read_grace.max(ttl);
        Ok(Some(registry::Redirect {
            networks,
            ttl,
            except,
        }))
    }
}

const TTL: Duration = Duration::from_mins(10);
const SHORTEST: Duration = Duration::from_mins(1);
/// Stores refuse URLs for more than a week, and credentials of an instance end much earlier.
const LONGEST: Duration = Duration::from_hours(12);
