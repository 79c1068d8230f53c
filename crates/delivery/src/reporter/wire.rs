//! How a registry is told, behind a trait so that reporting can be tested without one.

use std::time::Duration;

use client::longshore::api::{self, Pin};
use serde_json::Value;

use crate::engine::BoxFuture;
use crate::runner::source::chain;

/// Tells registries.
pub trait Reports: Send + Sync {
    /// Whether a host is a registry of this program. It is told nothing by the question.
    fn takes_reports<'a>(&'a self, host: &'a str) -> BoxFuture<'a, Result<bool, ReportError>>;
    /// The user that the agent is for a host.
    fn user<'a>(&'a self, host: &'a str) -> BoxFuture<'a, Option<String>>;
    /// Replaces the pins of a holder; how many are of nothing that the registry has.
    fn set_pins<'a>(
        &'a self,
        host: &'a str,
        holder: &'a str,
        pins: &'a [Pin],
    ) -> BoxFuture<'a, Result<usize, ReportError>>;
    /// Sends records of a ledger, which follow the one with the hash `previous`; the hash of the last one that the registry
    /// knows then.
    fn add_attempts<'a>(
        &'a self,
        host: &'a str,
        holder: &'a str,
        target: &'a str,
        previous: Option<&'a str>,
        records: &'a [Value],
    ) -> BoxFuture<'a, Result<Option<String>, ReportError>>;
}

/// Why a registry was not told.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReportError {
    /// It is not ours.
    #[error("the registry takes no reports")]
    Unsupported,
    /// It could not be reached or refused; tried again.
    #[error("{0}")]
    Failed(String),
}

/// The real thing.
pub struct ClientReports {
    /// With the agent's credentials.
    pub client: client::Client,
    /// Where these come from.
    pub config: client::Config,
}

impl Reports for ClientReports {
    fn takes_reports<'a>(&'a self, host: &'a str) -> BoxFuture<'a, Result<bool, ReportError>> {
        Box::pin(in_time(api::takes_reports(&self.client, host)))
    }

    fn user<'a>(&'a self, host: &'a str) -> BoxFuture<'a, Option<String>> {
        Box::pin(async move {
            let (source, host) = (self.config.credentials.clone(), host.to_owned());
            let found =
                tokio::task::spawn_blocking(move || client::credentials::password(&source, &host))
                    .await;
            match found {
                Ok(Ok(found)) => found.map(|(user, _)| user),
                _ => None,
            }
        })
    }

    fn set_pins<'a>(
        &'a self,
        host: &'a str,
        holder: &'a str,
        pins: &'a [Pin],
    ) -> BoxFuture<'a, Result<usize, ReportError>> {
        Box::pin(async move {
            let answer = in_time(api::set_pins(&self.client, host, holder, pins)).await?;
            Ok(answer.missing.len())
        })
    }

    fn add_attempts<'a>(
        &'a self,
        host: &'a str,
        holder: &'a str,
        target: &'a str,
        previous: Option<&'a str>,
        records: &'a [Value],
    ) -> BoxFuture<'a, Result<Option<String>, ReportError>> {
        Box::pin(async move {
            let sent = api::add_attempts(&self.client, host, holder, target, previous, records);
            Ok(in_time(sent).await?.known.map(|known| known.hash))
        })
    }
}

/// The client repeats requests; a report is better given up and made anew.
async fn in_time<T>(
    work: impl Future<Output = Result<T, client::Error>>,
) -> Result<T, ReportError> {
    match tokio::time::timeout(LIMIT, work).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(client::Error::Unsupported(_))) => Err(ReportError::Unsupported),
        Ok(Err(error)) => Err(ReportError::Failed(chain(&error))),
        Err(_) => Err(ReportError::Failed(format!(
            "no answer within {} s",
            LIMIT.as_secs()
        ))),
    }
}

const LIMIT: Duration = Duration::from_mins(1);
