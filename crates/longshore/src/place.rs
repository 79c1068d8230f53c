//! Which store a command works on: a data directory, or that of a configuration.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::Args;
use store::{Location, Options, Store};

use crate::config::Config;
use crate::output::{Exit, Refused};

/// The options that name a store.
#[derive(Clone, Debug, Default, Args)]
pub(crate) struct Place {
    /// The data directory [default: the one that `serve` uses].
    #[arg(long, value_name = "DIR")]
    pub(crate) data: Option<PathBuf>,
    /// The configuration of the server; its `storage` names the store.
    #[arg(long, short, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
}

impl Place {
    /// Opens the store, which no server may use when it is a data directory.
    pub(crate) async fn open(&self, command: &str) -> anyhow::Result<Store> {
        let (location, options) = self.location()?;
        open(&location, options, command).await
    }

    /// Where the store is, and its settings.
    pub(crate) fn location(&self) -> anyhow::Result<(Location, Options)> {
        let config = Config::load(
            self.config.as_deref(),
            self.data.as_deref(),
            &[],
            std::env::vars(),
        )?;
        Ok((config.location, config.store))
    }
}

/// A store that is named by one word: a data directory, or a configuration file.
pub(crate) fn named(path: &Path) -> anyhow::Result<(Location, Options)> {
    let place = if path.is_file() {
        Place {
            config: Some(path.to_owned()),
            ..Place::default()
        }
    } else {
        Place {
            data: Some(path.to_owned()),
            ..Place::default()
        }
    };
    place.location()
}

async fn open(location: &Location, options: Options, command: &str) -> anyhow::Result<Store> {
    match Store::open_at(location, options).await {
        Ok(store) => Ok(store),
        Err(error @ store::Error::InUse(_)) => Err(Refused::new(Exit::FAILED, error)
            .hint(format!(
                "stop the server for the time of the {command}, or go over the wire: {}",
                if command == "export" {
                    "`longshore export --from HOST --to DIR`"
                } else {
                    "`longshore copy FROM TO` for an artifact, `longshore import --from registry:HOST` \
                     into another data directory"
                }
            ))
            .into()),
        Err(error) => Err(error).context("cannot open the store"),
    }
}
