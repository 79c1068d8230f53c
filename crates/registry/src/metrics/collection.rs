//! The meters of the garbage collector.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};

/// How far the collector is behind, and what this process did.
pub(super) struct Collection {
    due: Family<Kind, Gauge>,
    oldest: Family<Kind, Gauge>,
    looked_at: Counter,
    failed: Counter,
    collected: Family<Kind, Counter>,
    collected_bytes: Family<Kind, Counter>,
    objects: Counter,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Kind {
    kind: &'static str,
}

impl Collection {
    pub(super) fn new(registry: &mut Registry) -> Self {
        let registry = registry.sub_registry_with_prefix("collection");
        let meters = Self {
            due: Family::default(),
            oldest: Family::default(),
            looked_at: Counter::default(),
            failed: Counter::default(),
            collected: Family::default(),
            collected_bytes: Family::default(),
            objects: Counter::default(),
        };
        registry.register(
            "due",
            "Candidates that are due, up to 10 000",
            meters.due.clone(),
        );
        registry.register_with_unit(
            "oldest_timestamp",
            "When the candidate that waits longest is or was due, since the Unix epoch",
            Unit::Seconds,
            meters.oldest.clone(),
        );
        let looked_at = meters.looked_at.clone();
        registry.register("candidates", "Candidates this process looked at", looked_at);
        let failed = meters.failed.clone();
        registry.register("failures", "Candidates whose transaction failed", failed);
        let collected = meters.collected.clone();
        registry.register("collected", "What this process collected", collected);
        registry.register_with_unit(
            "collected",
            "Bytes of what this process collected",
            Unit::Bytes,
            meters.collected_bytes.clone(),
        );
        let objects = meters.objects.clone();
        registry.register("objects", "Objects this process deleted", objects);
        meters
    }

    /// Brings the meters of what is due to the state of the store.
    pub(super) fn set_lag(&self, lags: Vec<store::QueueLag>) {
        for lag in lags {
            let kind = Kind {
                kind: lag.kind.name(),
            };
            self.due.get_or_create(&kind).set(lag.due as i64);
            let oldest = lag.oldest.map_or(0, |at| at.0 / 1_000_000);
            self.oldest.get_or_create(&kind).set(oldest);
        }
    }

    /// Brings the meters of this process's own work to what it is.
    pub(super) fn count(&self, store: &store::Store) {
        let totals = store.collection_totals();
        raise(&self.looked_at, totals.looked_at);
        raise(&self.failed, totals.failed);
        raise(&self.objects, totals.objects);
        for (kind, number, bytes) in &totals.collected {
            let kind = Kind { kind: kind.name() };
            raise(&self.collected.get_or_create(&kind), *number);
            raise(&self.collected_bytes.get_or_create(&kind), *bytes);
        }
    }
}

/// Brings a counter up to a total that is counted elsewhere.
fn raise(counter: &Counter, total: u64) {
    counter
        .inner()
        .fetch_max(total, std::sync::atomic::Ordering::Relaxed);
}
