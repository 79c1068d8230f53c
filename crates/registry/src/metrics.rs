//! Metrics in the OpenMetrics text form. No label names a user: their number is not bounded. The largest namespaces, and
//! repositories where that is asked for, are named, their number is bounded, and where there are users only an operator
//! sees them: a name is something that not everybody may know.
//!
//! While the database does not answer, the meters of this process are served all the same: that is when somebody looks at
//! them. What comes from the database then stays as it was last seen, and `longshore_store_reachable` is 0.
//!
//! What the store holds is as old as `longshore_stored_age_seconds` says: counting it costs at most a hundredth of the time.

mod collection;

use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use http::header::CONTENT_TYPE;
use http::{HeaderValue, Method, Response, StatusCode};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};
use store::{StoredUsage, UsageOrder};

use crate::api::storage::{deduplication, ratio};
use crate::auth::Decision;
use crate::error::Refusal;
use crate::serve::body::Body;
use crate::serve::call::Call;
use collection::Collection;

/// The meters. Cloning shares them.
#[derive(Clone)]
pub(crate) struct Metrics(Arc<Meters>);

struct Meters {
    registry: Registry,
    requests: Family<RequestLabels, Counter>,
    seconds: Family<RouteLabel, Histogram, fn() -> Histogram>,
    connections: Gauge,
    streams: Gauge,
    sent: Counter,
    received: Counter,
    delegated: Counter,
    delegated_bytes: Counter,
    logins: Family<OutcomeLabel, Counter>,
    panics: Counter,
    stored: Family<KindLabel, Gauge>,
    stored_bytes: Gauge,
    pending_deletions: Gauge,
    reachable: Gauge,
    read_only: Family<CauseLabel, Gauge>,
    collection: Collection,
    scrubbed: Gauge,
    scrub_found: Gauge,
    suspect: Gauge,
    backup: BackupMeters,
    logical_bytes: Gauge,
    manifest_bytes: Gauge,
    waiting_bytes: Gauge,
    deduplication: Gauge<f64, AtomicU64>,
    stored_age: Gauge<f64, AtomicU64>,
    pulls_dropped: Counter,
    namespace_bytes: Family<NamespaceLabel, Gauge>,
    namespace_objects: Family<NamespaceLabel, Gauge>,
    namespace_quota: Family<NamespaceLabel, Gauge>,
    repository_bytes: Family<RepositoryLabel, Gauge>,
    namespaces_stored: StoredMeters<NamespaceLabel>,
    repositories_stored: StoredMeters<RepositoryLabel>,
    /// Held while gauges are set and written out, so that two scrapes do not see each other's.
    scrape: Mutex<()>,
}

/// What each of something has of the disk.
struct StoredMeters<L> {
    bytes: Family<L, Gauge>,
    exclusive: Family<L, Gauge>,
    deduplication: Family<L, Gauge<f64, AtomicU64>>,
}

impl<L> StoredMeters<L>
where
    L: Clone + std::hash::Hash + Eq + EncodeLabelSet + std::fmt::Debug + Send + Sync + 'static,
{
    /// `what` in the singular, for names, `all` for the help.
    fn new(registry: &mut Registry, what: &str, all: &str) -> Self {
        let (bytes, exclusive, deduplication) =
            (Family::default(), Family::default(), Family::default());
        registry.register_with_unit(
            format!("{what}_stored"),
            format!("What the largest {all} have of the bytes on the disk: of a blob that n repositories hold, each an n-th"),
            Unit::Bytes,
            Family::clone(&bytes),
        );
        registry.register_with_unit(
            format!("{what}_exclusive"),
            format!("Bytes on the disk that only this one of the largest {all} holds"),
            Unit::Bytes,
            Family::clone(&exclusive),
        );
        registry.register(
            format!("{what}_deduplication_ratio"),
            format!("Logical bytes of the largest {all} for one that they have of the disk"),
            Family::clone(&deduplication),
        );
        Self {
            bytes,
            exclusive,
            deduplication,
        }
    }

    fn clear(&self) {
        self.bytes.clear();
        self.exclusive.clear();
        self.deduplication.clear();
    }

    /// Sets nothing while it has not been counted.
    fn set(&self, label: &L, logical: u64, stored: Option<StoredUsage>) {
        let Some(stored) = stored else {
            return;
        };
        self.bytes.get_or_create(label).set(stored.bytes as i64);
        self.exclusive
            .get_or_create(label)
            .set(stored.exclusive as i64);
        if let Some(ratio) = ratio(logical, stored.bytes) {
            self.deduplication.get_or_create(label).set(ratio);
        }
    }
}

/// How the backup goes. Only of a registry that has one.
#[derive(Default)]
struct BackupMeters {
    success: Gauge,
    lag: Gauge,
    failures: Gauge,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct NamespaceLabel {
    namespace: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct RepositoryLabel {
    repository: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct RequestLabels {
    method: &'static str,
    route: &'static str,
    status: u16,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct RouteLabel {
    route: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct OutcomeLabel {
    outcome: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct CauseLabel {
    cause: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct KindLabel {
    kind: &'static str,
}

impl Metrics {
    pub(crate) fn new() -> Self {
        let mut registry = Registry::with_prefix("longshore");
        let requests = Family::default();
        registry.register("http_requests", "Requests answered", requests.clone());
        let seconds: Family<RouteLabel, Histogram, fn() -> Histogram> =
            Family::new_with_constructor(|| Histogram::new(BUCKETS));
        registry.register_with_unit(
            "http_request_duration",
            "Time from the head of a request to the head of its answer",
            Unit::Seconds,
            seconds.clone(),
        );
        let connections = Gauge::default();
        registry.register("connections", "Open connections", connections.clone());
        let streams = Gauge::default();
        registry.register("event_streams", "Open event streams", streams.clone());
        let sent = Counter::default();
        registry.register_with_unit("sent", "Bytes of answer bodies", Unit::Bytes, sent.clone());
        let received = Counter::default();
        registry.register_with_unit(
            "received",
            "Bytes of uploads",
            Unit::Bytes,
            received.clone(),
        );
        let delegated = Counter::default();
        registry.register(
            "delegated_pulls",
            "Pulls of blobs that were sent to the object store",
            delegated.clone(),
        );
        let delegated_bytes = Counter::default();
        registry.register_with_unit(
            "delegated",
            "Bytes of blobs that were sent to the object store for",
            Unit::Bytes,
            delegated_bytes.clone(),
        );
        let logins = Family::default();
        registry.register("logins", "Password checks", logins.clone());
        let panics = Counter::default();
        registry.register("request_panics", "Requests that panicked", panics.clone());
        let stored = Family::default();
        registry.register("stored", "What the store holds", stored.clone());
        let stored_bytes = Gauge::default();
        registry.register_with_unit(
            "stored_blobs",
            "Bytes of distinct blobs",
            Unit::Bytes,
            stored_bytes.clone(),
        );
        let pending_deletions = Gauge::default();
        registry.register(
            "pending_deletions",
            "Objects that wait for their physical deletion",
            pending_deletions.clone(),
        );
        let scrubbed = Gauge::default();
        registry.register_with_unit(
            "scrub_read",
            "Bytes that the scrub of this process has read since it began",
            Unit::Bytes,
            scrubbed.clone(),
        );
        let scrub_found = Gauge::default();
        registry.register(
            "scrub_damaged",
            "Blobs and manifests that the scrub of this process has found damaged since it began",
            scrub_found.clone(),
        );
        let suspect = Gauge::default();
        registry.register(
            "suspect_blobs",
            "Blobs that are damaged and wait for a push to heal them",
            suspect.clone(),
        );
        let reachable = Gauge::default();
        registry.register(
            "store_reachable",
            "1 when the database answered this scrape; 0: what comes from it is as it was last seen",
            reachable.clone(),
        );
        let read_only = Family::default();
        registry.register(
            "read_only",
            "1 while users cannot write, by cause: an operator's command, a full disk, a database in recovery",
            read_only.clone(),
        );
        let collection = Collection::new(&mut registry);
        let backup = BackupMeters::default();
        registry.register_with_unit(
            "backup_last_success_timestamp",
            "When the backup last succeeded; 0 before it did and without a backup",
            Unit::Seconds,
            backup.success.clone(),
        );
        registry.register_with_unit(
            "backup_lag",
            "How long ago the newest restorable moment is",
            Unit::Seconds,
            backup.lag.clone(),
        );
        registry.register(
            "backup_failures",
            "Rounds of the backup that failed since the start",
            backup.failures.clone(),
        );
        let bytes = |registry: &mut Registry, name: &str, help: &str| {
            let gauge: Gauge = Gauge::default();
            registry.register_with_unit(name, help, Unit::Bytes, gauge.clone());
            gauge
        };
        let logical_bytes = bytes(
            &mut registry,
            "logical",
            "Distinct blobs and manifests of each repository",
        );
        let manifest_bytes = bytes(&mut registry, "stored_manifests", "Bytes of manifests");
        let waiting_bytes = bytes(
            &mut registry,
            "waiting",
            "Bytes of blobs that no repository holds any more",
        );
        let deduplication = Gauge::default();
        registry.register(
            "deduplication_ratio",
            "Logical bytes for one that is stored and wanted",
            deduplication.clone(),
        );
        let stored_age = Gauge::default();
        registry.register_with_unit(
            "stored_age",
            "How long ago what the store holds was counted",
            Unit::Seconds,
            stored_age.clone(),
        );
        let pulls_dropped = Counter::default();
        registry.register(
            "pull_statistics_dropped",
            "Entries of pull statistics that were more than the memory for them",
            pulls_dropped.clone(),
        );
        let namespace_bytes = Family::default();
        registry.register_with_unit(
            "namespace",
            "Logical bytes of the largest namespaces",
            Unit::Bytes,
            namespace_bytes.clone(),
        );
        let namespace_objects = Family::default();
        registry.register(
            "namespace_objects",
            "Blobs and manifests of the largest namespaces",
            namespace_objects.clone(),
        );
        let namespace_quota = Family::default();
        registry.register_with_unit(
            "namespace_quota",
            "Quota of the largest namespaces that have one",
            Unit::Bytes,
            namespace_quota.clone(),
        );
        let repository_bytes = Family::default();
        registry.register_with_unit(
            "repository",
            "Logical bytes of the largest repositories",
            Unit::Bytes,
            repository_bytes.clone(),
        );
        let namespaces_stored = StoredMeters::new(&mut registry, "namespace", "namespaces");
        let repositories_stored = StoredMeters::new(&mut registry, "repository", "repositories");
        Self(Arc::new(Meters {
            registry,
            requests,
            seconds,
            connections,
            streams,
            sent,
            received,
            delegated,
            delegated_bytes,
            logins,
            panics,
            stored,
            stored_bytes,
            pending_deletions,
            reachable,
            read_only,
            collection,
            scrubbed,
            scrub_found,
            suspect,
            backup,
            logical_bytes,
            manifest_bytes,
            waiting_bytes,
            deduplication,
            stored_age,
            pulls_dropped,
            namespace_bytes,
            namespace_objects,
            namespace_quota,
            repository_bytes,
            namespaces_stored,
            repositories_stored,
            scrape: Mutex::default(),
        }))
    }

    pub(crate) fn answered(
        &self,
        method: &Method,
        route: &'static str,
        status: StatusCode,
        took: Duration,
    ) {
        let method = METHODS
            .iter()
            .find(|known| **known == method.as_str())
            .unwrap_or(&"other");
        let labels = RequestLabels {
            method,
            route,
            status: status.as_u16(),
        };
        self.0.requests.get_or_create(&labels).inc();
        self.0
            .seconds
            .get_or_create(&RouteLabel { route })
            .observe(took.as_secs_f64());
    }

    pub(crate) fn sent(&self, bytes: u64) {
        self.0.sent.inc_by(bytes);
    }

    pub(crate) fn received(&self, bytes: u64) {
        self.0.received.inc_by(bytes);
    }

    /// Counts a pull that the object store answers in our place.
    pub(crate) fn delegated(&self, bytes: u64) {
        self.0.delegated.inc();
        self.0.delegated_bytes.inc_by(bytes);
    }

    pub(crate) fn login(&self, outcome: &'static str) {
        self.0.logins.get_or_create(&OutcomeLabel { outcome }).inc();
    }

    pub(crate) fn panicked(&self) {
        self.0.panics.inc();
    }

    /// Counts a connection until the guard is dropped.
    pub(crate) fn connection(&self) -> Counted {
        Counted::of(self.0.connections.clone())
    }

    /// Counts an event stream until the guard is dropped.
    pub(crate) fn stream(&self) -> Counted {
        Counted::of(self.0.streams.clone())
    }

    fn set_totals(&self, totals: &store::Statistics) {
        for (kind, count) in [
            ("repositories", totals.repositories),
            ("blobs", totals.blobs),
            ("manifests", totals.manifests),
            ("tags", totals.tags),
            ("uploads", totals.uploads),
        ] {
            self.0
                .stored
                .get_or_create(&KindLabel { kind })
                .set(count as i64);
        }
        self.0.stored_bytes.set(totals.blob_bytes as i64);
        self.0
            .pending_deletions
            .set(totals.pending_deletions as i64);
        self.0.logical_bytes.set(totals.logical_bytes as i64);
        self.0.manifest_bytes.set(totals.manifest_bytes as i64);
        self.0.waiting_bytes.set(totals.waiting_bytes as i64);
        self.0
            .deduplication
            .set(deduplication(totals).unwrap_or(1.0));
        self.0.stored_age.set(totals.age.as_secs_f64());
    }

    /// Answers `GET /metrics`.
    pub(crate) async fn serve(&self, call: &Call) -> Result<Response<Body>, Refusal> {
        let store = &call.context.store;
        let (seen, reachable) = match tokio::time::timeout(PATIENCE, look(call)).await {
            Ok(Ok(seen)) => (seen, true),
            Ok(Err(error)) => {
                tracing::warn!(
                    error = crate::error::chain(&error),
                    "metrics without the database"
                );
                (Seen::default(), false)
            }
            Err(_) => {
                tracing::warn!("metrics without the database, it does not answer");
                (Seen::default(), false)
            }
        };
        let (namespaces, repositories) = (seen.namespaces, seen.repositories);
        let default_quota = store.default_quota();
        let mode = store.last_mode();
        let totals = seen.totals.or_else(|| store.last_statistics());
        let _scrape = self.0.scrape.lock().unwrap_or_else(PoisonError::into_inner);
        self.0.reachable.set(i64::from(reachable));
        self.0.collection.set_lag(seen.lags);
        self.0.collection.count(store);
        if let Some(totals) = &totals {
            self.set_totals(totals);
        }
        if let Some(status) = store.backup_status() {
            let backup = &self.0.backup;
            let success = status.last_success.map_or(0, |at| at.0 / 1_000_000);
            backup.success.set(success);
            let lag = status.lag.map_or(i64::MAX, |lag| lag.as_secs() as i64);
            backup.lag.set(lag);
            backup.failures.set(status.failures as i64);
        }
        let scrub = store.scrub_counters();
        self.0.scrubbed.set(scrub.bytes as i64);
        self.0.scrub_found.set(scrub.damaged as i64);
        if let Some(suspect) = seen.suspect {
            self.0.suspect.set(suspect as i64);
        }
        for (cause, holds) in [
            ("command", mode.commanded.is_some()),
            ("disk", mode.full.is_some() || mode.disk_read_only),
            ("recovery", mode.recovery),
        ] {
            self.0
                .read_only
                .get_or_create(&CauseLabel { cause })
                .set(i64::from(holds));
        }
        let dropped = store.dropped_pulls();
        self.0
            .pulls_dropped
            .inc_by(dropped.saturating_sub(self.0.pulls_dropped.get()));
        self.0.namespace_bytes.clear();
        self.0.namespace_objects.clear();
        self.0.namespace_quota.clear();
        self.0.repository_bytes.clear();
        self.0.namespaces_stored.clear();
        self.0.repositories_stored.clear();
        for usage in namespaces {
            let label = NamespaceLabel {
                namespace: usage.name,
            };
            let set = |family: &Family<NamespaceLabel, Gauge>, value: u64| {
                family.get_or_create(&label).set(value as i64);
            };
            set(&self.0.namespace_bytes, usage.bytes);
            set(&self.0.namespace_objects, usage.objects);
            if let Some(quota) = usage.quota.or(default_quota) {
                set(&self.0.namespace_quota, quota);
            }
            let stored = &self.0.namespaces_stored;
            stored.set(&label, usage.bytes, usage.stored);
        }
        for usage in repositories {
            let label = RepositoryLabel {
                repository: usage.name.to_string(),
            };
            self.0
                .repository_bytes
                .get_or_create(&label)
                .set(usage.bytes as i64);
            let stored = &self.0.repositories_stored;
            stored.set(&label, usage.bytes, usage.stored);
        }
        let mut text = String::new();
        encode(&mut text, &self.0.registry)
            .map_err(|error| Refusal::internal(error.to_string()))?;
        let mut response = Response::new(Body::full(text));
        response.headers_mut().insert(
            CONTENT_TYPE,
            HeaderValue::from_static("application/openmetrics-text; version=1.0.0; charset=utf-8"),
        );
        Ok(response)
    }
}

/// What the database says.
#[derive(Default)]
struct Seen {
    totals: Option<store::Statistics>,
    namespaces: Vec<store::NamespaceUsage>,
    repositories: Vec<store::RepositoryUsage>,
    suspect: Option<u64>,
    lags: Vec<store::QueueLag>,
}

async fn look(call: &Call) -> Result<Seen, store::Error> {
    let store = &call.context.store;
    let mut seen = Seen {
        totals: Some(store.recent_statistics().await?),
        ..Seen::default()
    };
    if call.context.auth.decide_operator(&call.caller) == Decision::Allowed {
        let largest = UsageOrder::Size(None);
        store.refresh_sharing().await;
        seen.namespaces = store.usage_of_namespaces(&largest, NAMESPACES).await?;
        let wanted = call.context.settings.metric_repositories.min(REPOSITORIES);
        if wanted > 0 {
            seen.repositories = store.usage_of_repositories(None, &largest, wanted).await?;
        }
    }
    // Also what the process knows of the mode comes anew.
    store.mode().await?;
    seen.suspect = Some(store.suspect_count().await?);
    seen.lags = store.collection_lag().await?;
    Ok(seen)
}

/// Holds a gauge up while it lives.
pub(crate) struct Counted(Gauge);

impl Counted {
    fn of(gauge: Gauge) -> Self {
        gauge.inc();
        Self(gauge)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// How long a scrape waits for the database; who scrapes waits for 10 seconds as a rule.
const PATIENCE: Duration = Duration::from_secs(3);
/// Namespaces and repositories that are named at most.
const NAMESPACES: usize = 100;
const REPOSITORIES: usize = 1000;
const METHODS: [&str; 6] = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"];
const BUCKETS: [f64; 12] = [
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1.0, 5.0, 30.0,
];
