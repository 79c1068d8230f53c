//! The section `gc`: garbage collection.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::period;

/// `gc` as it was written.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Gc {
    enabled: Option<bool>,
    rate: Option<u32>,
    window: Option<String>,
    untagged: Option<String>,
    orphan_referrers: Option<String>,
    keep_deleted: Option<String>,
}

impl Gc {
    /// Lays these settings over those of the store. `options.lease` is known by now.
    pub(super) fn apply(self, options: &mut store::Options, s3: bool) -> anyhow::Result<()> {
        let gc = &mut options.gc;
        if s3 {
            // Reads that have begun there are not kept by an open file.
            gc.read_grace = S3_GRACE;
            gc.keep_deleted = S3_GRACE;
        }
        if let Some(enabled) = self.enabled {
            gc.enabled = enabled;
        }
        if let Some(rate) = self.rate {
            if rate == 0 {
                anyhow::bail!(
                    "`gc.rate` must be 1 or more; to switch collection off write `gc: {{enabled: false}}`"
                );
            }
            gc.rate = rate;
        }
        gc.window = match self.window.as_deref().map(str::trim) {
            None | Some("always" | "") => None,
            Some(text) => Some(text.parse().map_err(|error: store::WindowError| {
                anyhow::anyhow!("`gc.window`: {error}, or `always`")
            })?),
        };
        if let Some(text) = &self.untagged {
            let untagged = period("gc.untagged", text)?;
            if untagged < options.lease {
                anyhow::bail!(
                    "`gc.untagged` must not be shorter than the lease, which is {} hours",
                    options.lease.as_secs() / 3600
                );
            }
            gc.beyond_lease = untagged.saturating_sub(options.lease);
        }
        for (key, text, place) in [
            (
                "gc.orphan_referrers",
                &self.orphan_referrers,
                &mut gc.orphan_referrers,
            ),
            ("gc.keep_deleted", &self.keep_deleted, &mut gc.keep_deleted),
        ] {
            if let Some(text) = text {
                *place = period(key, text)?;
            }
        }
        Ok(())
    }
}

const S3_GRACE: Duration = Duration::from_hours(1);
