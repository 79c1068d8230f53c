//! What wakes a target: the registry's event stream.
//!
//! A trigger is only a hint. It says that a target should look at its reference; what the reference points to, whether that is
//! proven and whether it runs is decided where the target is, so a forged event deploys nothing, and an event about anything
//! that no target names is dropped. Polling goes on beside it (in [`crate::runner`]): often while there is no stream, rarely
//! while there is one.

use std::sync::Arc;
use std::time::Duration;

use client::longshore::StreamEvent;
use oci::{Digest, Reference, RepositoryName, Tag};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use crate::machine::Trigger;
use crate::runner::Message;
use crate::runner::clock::{Clock, jittered};
use crate::runner::source::{Sources, StreamError};

/// A target that wants to hear of its reference.
#[derive(Clone, Debug)]
pub struct Subscriber {
    /// What it follows.
    pub reference: Reference,
    /// Where it hears.
    pub mailbox: mpsc::Sender<Message>,
}

/// One host's stream, and who listens to it.
pub struct Follower {
    /// Opens streams.
    pub sources: Arc<dyn Sources>,
    /// How the host is reached.
    pub config: client::Config,
    /// `host:port`.
    pub host: String,
    /// Who listens; only those of this host.
    pub subscribers: Vec<Subscriber>,
    /// Whether events arrive.
    pub up: watch::Sender<bool>,
    /// For jitter.
    pub clock: Arc<dyn Clock>,
}

impl Follower {
    /// Follows the stream until `shutdown` is cancelled, opening it again with growing pauses when it breaks.
    pub async fn run(self, shutdown: CancellationToken) {
        tokio::select! {
            biased;
            () = shutdown.cancelled() => {}
            () = self.follow() => {}
        }
    }

    async fn follow(&self) {
        let mut position: Option<String> = None;
        let mut failures = 0_u32;
        loop {
            let pause = match self.read(&mut position, &mut failures).await {
                StreamError::Unsupported => {
                    tracing::debug!(host = self.host, "no event stream; polling");
                    NOT_OURS
                }
                StreamError::Broken(reason) => {
                    if *self.up.borrow() || failures == 0 {
                        tracing::info!(
                            host = self.host,
                            reason,
                            "the event stream is down; polling until it is back"
                        );
                    }
                    let pause = FIRST_PAUSE
                        .saturating_mul(1 << failures.min(10))
                        .min(LONGEST_PAUSE);
                    failures += 1;
                    pause
                }
            };
            self.up.send_replace(false);
            tokio::time::sleep(jittered(pause, &*self.clock)).await;
        }
    }

    /// Reads one connection to its end.
    async fn read(&self, position: &mut Option<String>, failures: &mut u32) -> StreamError {
        let open = self
            .sources
            .events(&self.config, &self.host, position.as_deref());
        let mut events = match tokio::time::timeout(SILENCE, open).await {
            Ok(Ok(events)) => events,
            Ok(Err(error)) => return error,
            Err(_) => return StreamError::Broken("no answer".to_owned()),
        };
        tracing::info!(host = self.host, "the event stream is up");
        self.up.send_replace(true);
        // Whatever happened while nobody listened.
        self.wake_all();
        loop {
            let event = match tokio::time::timeout(SILENCE, events.next()).await {
                Ok(Ok(Some(event))) => event,
                Ok(Ok(None)) => return StreamError::Broken("the server ended it".to_owned()),
                Ok(Err(error)) => return error,
                Err(_) => {
                    return StreamError::Broken(format!(
                        "nothing was heard for {} s",
                        SILENCE.as_secs()
                    ));
                }
            };
            *failures = 0;
            match event {
                StreamEvent::Changed {
                    id,
                    repository,
                    tag,
                    digest,
                    subject,
                    ..
                } => {
                    for subscriber in &self.subscribers {
                        if let Some(message) = message(
                            &subscriber.reference,
                            &repository,
                            tag.as_ref(),
                            &digest,
                            subject.as_ref(),
                        ) {
                            // A full mailbox holds a hint already.
                            let _ = subscriber.mailbox.try_send(message);
                        }
                    }
                    *position = Some(id);
                }
                StreamEvent::Heartbeat(id) => {
                    if id.is_some() {
                        *position = id;
                    }
                }
                StreamEvent::Reset(id) => {
                    *position = Some(id);
                    self.wake_all();
                }
            }
        }
    }

    fn wake_all(&self) {
        for subscriber in &self.subscribers {
            let _ = subscriber.mailbox.try_send(Message::Hint(Trigger::Event));
        }
    }
}

/// What an event says to a target that follows `reference`; `None`: nothing.
fn message(
    reference: &Reference,
    repository: &RepositoryName,
    tag: Option<&Tag>,
    digest: &Digest,
    subject: Option<&Digest>,
) -> Option<Message> {
    if *repository != reference.repository {
        return None;
    }
    if let Some(subject) = subject {
        return Some(Message::Evidence(subject.clone()));
    }
    if let Some(subject) = tag.and_then(Tag::subject) {
        return Some(Message::Evidence(subject));
    }
    let concerns = match (&reference.digest, tag) {
        (Some(wanted), _) => wanted == digest,
        (None, Some(tag)) => reference.tag.as_ref().map_or("latest", Tag::as_str) == tag.as_str(),
        (None, None) => false,
    };
    concerns.then_some(Message::Hint(Trigger::Event))
}

/// A registry that is not ours may become ours.
const NOT_OURS: Duration = Duration::from_mins(10);
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_mins(1);
/// Heartbeats come more often than this.
const SILENCE: Duration = Duration::from_mins(2);

#[cfg(test)]
mod tests;
