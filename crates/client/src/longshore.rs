//! Our own registry's API: the event stream here, the rest in [`api`].
//!
//! Events are hints. Whoever reads them resolves and verifies by itself, so an event that cannot be
//! understood only moves the position.

pub mod api;
mod sse;

use std::collections::VecDeque;
use std::time::Duration;

use http::header::ACCEPT;
use http::{HeaderName, Method};
use oci::{Digest, RepositoryName, Tag};
use serde::Deserialize;

use crate::transport::{Answer, Call};
use crate::{Client, Error};
use sse::{Event, Parser};

/// An event of the stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StreamEvent {
    /// Something changed.
    Changed {
        /// `<epoch>.<number>`.
        id: String,
        /// CloudEvents type, such as `dev.longshore.tag.updated`.
        kind: String,
        /// Where.
        repository: RepositoryName,
        /// The tag.
        tag: Option<Tag>,
        /// The digest; of a deleted tag, the one that it stood for.
        digest: Digest,
        /// The subject of a referrer.
        subject: Option<Digest>,
    },
    /// Position alone.
    Heartbeat(Option<String>),
    /// The position is gone: look at everything anew. Holds the position from which the stream goes
    /// on, empty when the server names none.
    Reset(String),
}

/// Reads `GET /api/v1/events` of one host; ends when the server ends it.
#[derive(Debug)]
pub struct EventStream {
    answer: Answer,
    host: String,
    parser: Parser,
    ready: VecDeque<StreamEvent>,
}

impl EventStream {
    /// Opens the stream after `last_event_id`. `Error::Unsupported` where the host is not ours (404, HTML
    /// …).
    ///
    /// # Errors
    /// [`Error::Unsupported`], [`Error::Unauthorized`], [`Error::Unreachable`].
    pub async fn open(
        client: &Client,
        host: &str,
        last_event_id: Option<&str>,
    ) -> Result<Self, Error> {
        let mut call = Call::new(
            host,
            Method::GET,
            "/api/v1/events".to_owned(),
            "the event stream".to_owned(),
        )
        .header(ACCEPT, EVENT_STREAM);
        if let Some(id) = last_event_id {
            call = call.header(LAST_EVENT_ID, id);
        }
        let answer = client.send(call).await?;
        match answer.status().as_u16() {
            200 if answer.media_type() == EVENT_STREAM => Ok(Self {
                answer,
                host: host.to_owned(),
                parser: Parser::default(),
                ready: VecDeque::new(),
            }),
            // Another registry may send its web page, or lead to its login, for any path.
            200..=399 | 404..=406 | 501 => Err(Error::Unsupported(host.to_owned())),
            _ => Err(answer.into_error().await),
        }
    }

    /// The next event; `None`: the server ended the stream.
    ///
    /// # Errors
    /// [`Error::Unreachable`] when the connection breaks or nothing, not even a heartbeat, comes for
    /// two minutes.
    ///
    /// # Cancel safety
    /// Cancel safe: no event is lost.
    pub async fn next(&mut self) -> Result<Option<StreamEvent>, Error> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Ok(Some(event));
            }
            let Some(piece) = self.answer.chunk_within(SILENCE).await? else {
                return Ok(None);
            };
            let mut events = Vec::new();
            self.parser
                .feed(&piece, &mut events)
                .map_err(|error| Error::unreachable(&self.host, error))?;
            self.ready.extend(events.into_iter().map(meaning));
        }
    }
}

/// What an event says. The position alone, when nothing else of it is understood.
fn meaning(event: Event) -> StreamEvent {
    match event.name.as_str() {
        "heartbeat" => return StreamEvent::Heartbeat(event.id),
        "reset" => return StreamEvent::Reset(event.id.unwrap_or_default()),
        _ => {}
    }
    let Some(changed) = changed(&event) else {
        if !event.data.is_empty() {
            tracing::debug!(name = %event.name, id = ?event.id, "an event was passed over");
        }
        return StreamEvent::Heartbeat(event.id);
    };
    changed
}

fn changed(event: &Event) -> Option<StreamEvent> {
    let cloud: CloudEvent = serde_json::from_str(&event.data).ok()?;
    let data = cloud.data?;
    let repository = data.repository?.parse().ok()?;
    // A tag that is none of the specification makes the event none either.
    let tag = match data.tag.filter(|tag| !tag.is_empty()) {
        Some(tag) => Some(tag.parse().ok()?),
        None => None,
    };
    let digest = data
        .digest
        .or(data.previous)
        .and_then(|digest| digest.parse().ok())?;
    Some(StreamEvent::Changed {
        id: event.id.clone().or(cloud.id).unwrap_or_default(),
        kind: cloud.kind.unwrap_or_else(|| event.name.clone()),
        repository,
        tag,
        digest,
        subject: data.subject.and_then(|digest| digest.parse().ok()),
    })
}

/// The parts of a CloudEvent that are read
/// ([CloudEvents 1.0](https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/spec.md)).
#[derive(Deserialize)]
struct CloudEvent {
    id: Option<String>,
    #[serde(rename = "type")]
    kind: Option<String>,
    data: Option<Data>,
}

#[derive(Deserialize)]
struct Data {
    repository: Option<String>,
    tag: Option<String>,
    digest: Option<String>,
    previous: Option<String>,
    subject: Option<String>,
}

const EVENT_STREAM: &str = "text/event-stream";
const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");
/// Longer than several heartbeats.
const SILENCE: Duration = Duration::from_mins(2);

#[cfg(test)]
mod tests {
    use super::*;

    fn event(name: &str, id: Option<&str>, data: &str) -> Event {
        Event {
            name: name.to_owned(),
            id: id.map(str::to_owned),
            data: data.to_owned(),
        }
    }

    #[test]
    fn meanings() {
        let digest = Digest::sha256(b"x");
        let moved = format!(
            r#"{{"specversion":"1.0","id":"e.7","source":"/","type":"dev.longshore.tag.updated","data":{{"repository":"shop/web","tag":"production","digest":"{digest}","previous":null,"mediaType":"x","artifactType":null,"subject":null,"actor":"user:a"}}}}"#
        );
        let expected = |id: &str| StreamEvent::Changed {
            id: id.to_owned(),
            kind: "dev.longshore.tag.updated".to_owned(),
            repository: "shop/web".parse().unwrap(),
            tag: Some("production".parse().unwrap()),
            digest: digest.clone(),
            subject: None,
        };
        assert_eq!(
            meaning(event("message", Some("e.7"), &moved)),
            expected("e.7")
        );
        assert_eq!(meaning(event("", None, &moved)), expected("e.7"));
        assert_eq!(
            meaning(event("dev.longshore.tag.updated", Some("e.8"), &moved)),
            expected("e.8")
        );

        let deleted = format!(
            r#"{{"type":"dev.longshore.tag.deleted","data":{{"repository":"a","tag":"t","digest":null,"previous":"{digest}"}}}}"#
        );
        assert!(
            matches!(meaning(event("", Some("e.9"), &deleted)), StreamEvent::Changed { digest: d, .. } if d == digest)
        );
    }

    #[test]
    fn what_is_not_understood_moves_the_position() {
        let position = || StreamEvent::Heartbeat(Some("e.1".to_owned()));
        for data in [
            "",
            "{",
            "[]",
            "null",
            r#"{"data":{}}"#,
            r#"{"data":{"repository":"A!","digest":"sha256:0"}}"#,
        ] {
            assert_eq!(
                meaning(event("message", Some("e.1"), data)),
                position(),
                "{data}"
            );
        }
        assert_eq!(meaning(event("heartbeat", Some("e.1"), "")), position());
        assert_eq!(
            meaning(event("heartbeat", None, "{}")),
            StreamEvent::Heartbeat(None)
        );
        assert_eq!(
            meaning(event("reset", Some("f.1"), "{}")),
            StreamEvent::Reset("f.1".to_owned())
        );
    }
}
