//! The event stream: `GET /api/v1/events`, server-sent events in CloudEvents 1.0 form.
//!
//! A stream is woken by the commit itself through the store's signal and never polls. Its position is
//! `<epoch>.<number>`; what it may show is judged per event, so numbers may have gaps, and the
//! heartbeat carries the position alone. It ends when its credential does.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt as _;
use http::header::{CACHE_CONTROL, CONTENT_TYPE};
use http::{HeaderName, HeaderValue, Method, Response};
use serde_json::{Value, json};
use store::{Event, EventKind};
use tokio::sync::watch;
use tokio::time::Instant;

use crate::api::time;
use crate::auth::{Caller, Credential, now};
use crate::error::{Refusal, chain};
use crate::metrics::Counted;
use crate::serve::Shared;
use crate::serve::body::Body;
use crate::serve::call::Call;

/// Answers `GET /api/v1/events`.
pub(crate) async fn serve(call: &mut Call) -> Result<Response<Body>, Refusal> {
    call.require_registry("events")?;
    let asked = match call.header(LAST_EVENT_ID) {
        Some(id) => Some(id.to_owned()),
        None => call.query()?.get("after").map(str::to_owned),
    };
    let mut response = Response::new(Body::empty());
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    headers.insert(ACCEL_BUFFERING, HeaderValue::from_static("no"));
    if call.method() == Method::HEAD {
        return Ok(response);
    }
    let shared = Arc::clone(&call.context);
    // Subscribed before the position is read, so no commit can fall between the two.
    let signal = shared.store.event_signal();
    let changes = shared.auth.changes();
    let bounds = shared.store.event_bounds().await?;
    let epoch = shared.store.epoch().to_owned();
    let start = Start::of(asked.as_deref(), &epoch, bounds);
    let position = start.position(bounds);
    let mut ready = VecDeque::new();
    ready.push_back(match start {
        Start::Reset => reset(&epoch, position),
        // At once, so that a client knows where it is before the first event.
        Start::Now | Start::After(_) => heartbeat(&epoch, position),
    });
    let stream = EventStream {
        _counted: shared.metrics.stream(),
        source: shared
            .settings
            .public_url
            .clone()
            .unwrap_or_else(|| "/api/v1/events".to_owned()),
        beat: Instant::now() + shared.settings.limits.heartbeat,
        shared,
        caller: call.caller.clone(),
        epoch,
        position,
        signal,
        changes,
        ready,
    };
    let stream = futures_util::stream::unfold(stream, |mut stream| async move {
        let frame = stream.next().await?;
        Some((frame, stream))
    });
    *response.body_mut() = Body::stream(stream.boxed());
    Ok(response)
}

/// Where a stream begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Start {
    /// With what comes from now on.
    Now,
    /// After this number.
    After(i64),
    /// The position is of another epoch, pruned, of the future or not one at all.
    Reset,
}

impl Start {
    fn of(asked: Option<&str>, epoch: &str, bounds: store::EventBounds) -> Self {
        let Some(asked) = asked.filter(|text| !text.is_empty()) else {
            return Self::Now;
        };
        let number = asked
            .strip_prefix(epoch)
            .and_then(|rest| rest.strip_prefix('.'))
            .and_then(|number| number.parse::<i64>().ok());
        match number {
            Some(number) if (bounds.pruned..=bounds.newest).contains(&number) => {
                Self::After(number)
            }
            _ => Self::Reset,
        }
    }

    fn position(self, bounds: store::EventBounds) -> i64 {
        match self {
            Self::After(number) => number,
            Self::Now | Self::Reset => bounds.newest,
        }
    }
}

struct EventStream {
    shared: Arc<Shared>,
    caller: Caller,
    source: String,
    epoch: String,
    position: i64,
    signal: watch::Receiver<i64>,
    changes: Option<watch::Receiver<u64>>,
    /// Frames that are made but not sent: at most one batch.
    ready: VecDeque<Bytes>,
    beat: Instant,
    _counted: Counted,
}

impl EventStream {
    /// The next frame; `None` ends the stream.
    async fn next(&mut self) -> Option<Bytes> {
        loop {
            if self.shared.stopping.is_cancelled() || !self.shared.auth.still_holds(&self.caller) {
                return None;
            }
            if let Some(frame) = self.ready.pop_front() {
                return Some(frame);
            }
            // What is committed after this mark wakes the wait below.
            self.signal.mark_unchanged();
            let store = &self.shared.store;
            match store.every_event_after(self.position, BATCH).await {
                Ok(Some(events)) if !events.is_empty() => {
                    self.take(&events);
                    continue;
                }
                Ok(Some(_)) => {}
                // So slow a reader that what it has not seen was forgotten meanwhile.
                Ok(None) => match store.event_bounds().await {
                    Ok(bounds) => {
                        self.position = bounds.newest;
                        self.ready.push_back(reset(&self.epoch, self.position));
                        continue;
                    }
                    Err(error) => {
                        tracing::warn!(
                            error = chain(&error),
                            "an event stream ends, its client will come again"
                        );
                        return None;
                    }
                },
                Err(error) => {
                    tracing::warn!(
                        error = chain(&error),
                        "an event stream ends, its client will come again"
                    );
                    return None;
                }
            }
            if !self.wait().await {
                return None;
            }
        }
    }

    /// Makes frames of a batch. Rights may differ from event to event and from hour to hour.
    fn take(&mut self, events: &[Event]) {
        for event in events {
            self.position = event.number;
            if self.shared.auth.may_list(&self.caller, &event.repository) {
                let data = cloud_event(event, &self.epoch, &self.source);
                self.ready
                    .push_back(frame(kind(event.kind), &self.epoch, event.number, &data));
            }
        }
    }

    /// Waits for whatever comes first; a heartbeat that is due is made ready. `false`: the end.
    async fn wait(&mut self) -> bool {
        let expiry = match &self.caller.credential {
            Credential::Token { expires, .. } => {
                Duration::from_secs(u64::try_from(expires.saturating_sub(now())).unwrap_or(0))
            }
            _ => FAR,
        };
        let changed = async {
            match &mut self.changes {
                Some(changes) => changes.changed().await.is_ok(),
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = self.shared.stopping.cancelled() => false,
            result = self.signal.changed() => result.is_ok(),
            going_on = changed => going_on,
            () = tokio::time::sleep(expiry) => false,
            () = tokio::time::sleep_until(self.beat) => {
                self.beat = Instant::now() + self.shared.settings.limits.heartbeat;
                self.ready.push_back(heartbeat(&self.epoch, self.position));
                true
            }
        }
    }
}

fn id(epoch: &str, number: i64) -> String {
    format!("{epoch}.{number}")
}

fn heartbeat(epoch: &str, position: i64) -> Bytes {
    frame(
        "heartbeat",
        epoch,
        position,
        &json!({ "position": id(epoch, position) }),
    )
}

fn reset(epoch: &str, position: i64) -> Bytes {
    frame(
        "reset",
        epoch,
        position,
        &json!({ "position": id(epoch, position) }),
    )
}

/// One server-sent event. JSON in one line holds no line break, so nothing can be smuggled in.
fn frame(kind: &str, epoch: &str, number: i64, data: &Value) -> Bytes {
    format!("event: {kind}\nid: {}\ndata: {data}\n\n", id(epoch, number)).into()
}

fn kind(kind: EventKind) -> &'static str {
    match kind {
        EventKind::ManifestPushed => "dev.longshore.manifest.pushed",
        EventKind::ManifestDeleted => "dev.longshore.manifest.deleted",
        EventKind::TagUpdated => "dev.longshore.tag.updated",
        EventKind::TagDeleted => "dev.longshore.tag.deleted",
        EventKind::RepositoryDeleted => "dev.longshore.repository.deleted",
    }
}

/// An event in the JSON form of CloudEvents 1.0.
fn cloud_event(event: &Event, epoch: &str, source: &str) -> Value {
    let whole = event.kind == EventKind::RepositoryDeleted;
    let subject = match &event.tag {
        Some(tag) => format!("{}:{tag}", event.repository),
        None if whole => event.repository.as_str().to_owned(),
        None => format!("{}@{}", event.repository, event.digest),
    };
    json!({
        "specversion": "1.0",
        "id": id(epoch, event.number),
        "source": source,
        "type": kind(event.kind),
        "subject": subject,
        "time": time(event.at),
        "datacontenttype": "application/json",
        "data": {
            "repository": event.repository,
            "tag": event.tag,
            "digest": (!whole).then_some(&event.digest),
            "previous": event.previous,
            "mediaType": (!whole).then_some(&event.media_type),
            "artifactType": event.artifact_type,
            "subject": event.subject,
            "actor": event.actor,
        },
    })
}

const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");
const ACCEL_BUFFERING: HeaderName = HeaderName::from_static("x-accel-buffering");
const BATCH: usize = 256;
const FAR: Duration = Duration::from_hours(365 * 24);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions() {
        let bounds = store::EventBounds {
            pruned: 5,
            newest: 9,
        };
        for (asked, expected) in [
            (None, Start::Now),
            (Some(""), Start::Now),
            (Some("e1.5"), Start::After(5)),
            (Some("e1.9"), Start::After(9)),
            (Some("e1.4"), Start::Reset),
            (Some("e1.10"), Start::Reset),
            (Some("e2.7"), Start::Reset),
            (Some("e1"), Start::Reset),
            (Some("e1.x"), Start::Reset),
            (Some("e1.-1"), Start::Reset),
            (Some("7"), Start::Reset),
        ] {
            assert_eq!(Start::of(asked, "e1", bounds), expected, "{asked:?}");
        }
    }

    #[test]
    fn an_event_is_one_line_of_json() {
        let event = Event {
            number: 7,
            kind: EventKind::TagUpdated,
            repository: "shop/web".parse().unwrap(),
            tag: Some("v1".parse().unwrap()),
            digest: oci::Digest::sha256(b""),
            previous: None,
            media_type: "a\nb".to_owned(),
            artifact_type: None,
            subject: None,
            actor: "user:alice".to_owned(),
            at: store::Timestamp(0),
        };
        let data = cloud_event(&event, "e", "/");
        let text = String::from_utf8(frame(kind(event.kind), "e", 7, &data).to_vec()).unwrap();
        let lines: Vec<&str> = text.split('\n').collect();
        assert_eq!(lines.len(), 5, "{text}");
        assert_eq!(lines[0], "event: dev.longshore.tag.updated");
        assert_eq!(lines[1], "id: e.7");
        let value: Value = serde_json::from_str(lines[2].strip_prefix("data: ").unwrap()).unwrap();
        assert_eq!(value["subject"], "shop/web:v1");
        assert_eq!(value["data"]["mediaType"], "a\nb");
        assert_eq!(value["data"]["tag"], "v1");
    }
}
