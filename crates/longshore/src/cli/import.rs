//! `longshore import`: what other registries hold, into a store that no server uses, or into a registry that runs.

mod live;
mod target;

use std::path::PathBuf;
use std::str::FromStr;

use clap::Args;
use oci::RepositoryName;
use registry::Glob;
use store::Store;
use store::import::{
    self, Distribution, Layouts, Placement, Plans, Report, Shape, Source, StoreSink,
};

use super::Global;
use crate::output::{self, Exit, Refused};
use crate::place::Place;

pub(crate) use live::Live;
use target::Target;

/// Bring in what another registry holds.
///
/// Reads the storage directory of distribution or zot, a tree of OCI layouts, or a registry that runs, and puts every
/// tag with its manifests, blobs and referrers into a data directory that no server uses, into the store of a
/// configuration, or with `--to` into a registry that runs. Every byte is hashed on its way in. What is there already is skipped, so a run that was broken off
/// is simply started again. At the end both sides are compared.
#[derive(Debug, Args)]
pub(crate) struct Import {
    /// Where from: `distribution:DIR`, `zot:DIR`, `layout:DIR` or `registry:HOST[/PREFIX]`.
    #[arg(long, value_name = "SOURCE")]
    from: From,
    /// Into a registry that runs, over the wire: `HOST`. Log in first, with the right to push. Any registry will do.
    #[arg(long, value_name = "HOST", conflicts_with_all = ["data", "config", "link", "copy"])]
    to: Option<String>,
    #[command(flatten)]
    place: Place,
    /// Only repositories whose name at the source fits: `*` within one component, `**` over several. Several may be
    /// named.
    #[arg(long, value_name = "GLOB", num_args = 1..)]
    repository: Vec<String>,
    /// Put before the name of every repository: `shop` becomes `PREFIX/shop`.
    #[arg(long = "as", value_name = "PREFIX")]
    prefix: Option<String>,
    /// Also manifests without a tag that nothing names or refers to.
    #[arg(long)]
    untagged: bool,
    /// Read and count, write nothing.
    #[arg(long)]
    dry_run: bool,
    /// Hard links in place of copies where blocks cannot be shared. The other program must never write into its files
    /// again, and their owner and mode stay.
    #[arg(long, conflicts_with = "copy")]
    link: bool,
    /// Write every byte anew, share nothing with the source.
    #[arg(long)]
    copy: bool,
    /// How many blobs or manifests move at one time.
    #[arg(long, value_name = "COUNT", default_value_t = 4, value_parser = parallel())]
    parallel: u16,
    /// Send the source no more than this many requests a second.
    #[arg(long, value_name = "REQUESTS", value_parser = clap::value_parser!(u32).range(1..))]
    rate: Option<u32>,
}

/// What `--parallel` of a command takes.
pub(crate) fn parallel() -> clap::builder::RangedI64ValueParser<u16> {
    clap::value_parser!(u16).range(1..=256)
}

/// A source as it was named.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum From {
    Distribution(PathBuf),
    Zot(PathBuf),
    Layout(PathBuf),
    Registry(String),
}

impl FromStr for From {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            Some((_, "")) => Err(format!("`{text}` names nothing after the colon")),
            Some(("distribution", path)) => Ok(Self::Distribution(path.into())),
            Some(("zot", path)) => Ok(Self::Zot(path.into())),
            Some(("layout" | "oci", path)) => Ok(Self::Layout(path.into())),
            Some(("registry", host)) => Ok(Self::Registry(host.trim_end_matches('/').to_owned())),
            _ => Err(format!(
                "`{text}`: write `distribution:DIR`, `zot:DIR`, `layout:DIR` or `registry:HOST[/PREFIX]`"
            )),
        }
    }
}

impl std::fmt::Display for From {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Distribution(path) => write!(formatter, "distribution:{}", path.display()),
            Self::Zot(path) => write!(formatter, "zot:{}", path.display()),
            Self::Layout(path) => write!(formatter, "layout:{}", path.display()),
            Self::Registry(host) => write!(formatter, "registry:{host}"),
        }
    }
}

impl Import {
    pub(crate) async fn run(self, global: &Global) -> anyhow::Result<Exit> {
        let placement = match (self.link, self.copy) {
            (true, _) => Placement::Link,
            (_, true) => Placement::Copy,
            _ => Placement::Share,
        };
        let plans = Plans {
            prefix: self
                .prefix
                .as_deref()
                .map(|text| text.trim_end_matches('/').parse::<RepositoryName>())
                .transpose()?,
            untagged: self.untagged,
            dry_run: self.dry_run,
            ..plans(&self.repository, usize::from(self.parallel), global)?
        };
        // A source that is not there must not leave a data directory behind.
        match &self.from {
            From::Distribution(path) => {
                let source = Distribution::open(path)?;
                self.bring(&source, placement, plans, global).await
            }
            From::Zot(path) => {
                let source = Layouts::open(path, Shape::Zot)?;
                self.bring(&source, placement, plans, global).await
            }
            From::Layout(path) => {
                let source = Layouts::open(path, Shape::Plain)?;
                self.bring(&source, placement, plans, global).await
            }
            From::Registry(name) => {
                let source = Live::new(
                    global.client()?,
                    name,
                    usize::from(self.parallel),
                    self.rate,
                )?;
                self.bring(&source, placement, plans, global).await
            }
        }
    }

    async fn bring<S: Source>(
        &self,
        source: &S,
        placement: Placement,
        plans: Plans,
        global: &Global,
    ) -> anyhow::Result<Exit> {
        // A source with nothing to bring is a wrong path or a wrong pattern, and must not leave a data directory behind.
        let found = source.repositories().await?;
        if found.problems.is_empty() && !found.names.iter().any(|name| (plans.filter)(name)) {
            let refused = Refused::new(
                Exit::FAILED,
                format!("`{}` holds no repository to bring", self.from),
            );
            return Err(match (&self.from, found.names.len()) {
                (From::Zot(_) | From::Layout(_), 0) => {
                    refused.hint("no directory below it has a file `oci-layout`")
                }
                (_, 0) => refused,
                (_, others) => refused.hint(format!(
                    "it has {others} whose names do not fit `--repository`"
                )),
            }
            .into());
        }
        if let Some(host) = &self.to {
            let sink = Target::new(target_client(host, global).await?, host);
            let report = Box::pin(import::run(source, &sink, &plans)).await?;
            return show(&report, global);
        }
        let store = self.place.open("import").await?;
        let sink = StoreSink::new(&store, placement)?;
        let outcome =
            beside_maintenance(&store, Box::pin(import::run(source, &sink, &plans))).await;
        store.close().await?;
        let report = outcome?;
        show(&report, global)
    }
}

/// A client that the destination let in: what is wrong with the name or the login is told before anything is read.
async fn target_client(host: &str, global: &Global) -> anyhow::Result<client::Client> {
    if host.contains('/') {
        return Err(
            Refused::new(Exit::USAGE, format!("`--to {host}`: a host has no slash"))
                .hint("`--as PREFIX` puts a prefix before every name")
                .into(),
        );
    }
    let client = global.client()?;
    client.ping(host).await?;
    Ok(client)
}

/// Runs work on a store beside its background work.
pub(crate) async fn beside_maintenance(
    store: &Store,
    mut work: impl Future<Output = Result<Report, import::Failure>> + Unpin,
) -> anyhow::Result<Report> {
    tokio::select! {
        outcome = &mut work => Ok(outcome?),
        () = Box::pin(store.maintain()) => {
            anyhow::bail!("the store stopped, look at its log and run this again")
        }
    }
}

/// The plans that import and export share.
pub(crate) fn plans(globs: &[String], parallel: usize, global: &Global) -> anyhow::Result<Plans> {
    let globs = globs
        .iter()
        .map(|text| {
            text.parse::<Glob>().map_err(|error| {
                Refused::new(Exit::USAGE, format!("`--repository {text}`: {error}"))
            })
        })
        .collect::<Result<Vec<_>, _>>()?;
    let quiet = global.quiet || global.json;
    Ok(Plans {
        filter: Box::new(move |name| {
            globs.is_empty() || globs.iter().any(|glob| glob.matches(name.as_str()))
        }),
        parallel,
        progress: Box::new(move |name, left| {
            if !quiet {
                output::note(format!("{name} is done, {left} left"));
            }
        }),
        ..Plans::default()
    })
}

/// Prints what was done, and what is wrong; the exit code tells whether all is there.
pub(crate) fn show(report: &Report, global: &Global) -> anyhow::Result<Exit> {
    if global.json {
        output::json(&report.to_json())?;
    } else {
        let row = |name: &str, counts: &import::Counts| {
            vec![
                name.to_owned(),
                counts.repositories.to_string(),
                counts.tags.to_string(),
                counts.manifests.to_string(),
                counts.blobs.to_string(),
                counts.referrers.to_string(),
                output::bytes(counts.bytes),
            ]
        };
        let mut rows = vec![row("source", &report.source)];
        if !report.dry_run {
            rows.push(row("destination", &report.destination));
        }
        output::table(
            &[
                "",
                "REPOSITORIES",
                "TAGS",
                "MANIFESTS",
                "BLOBS",
                "REFERRERS",
                "BYTES",
            ],
            &rows,
        );
        let moved = &report.moved;
        if !report.dry_run {
            output::line(format!(
                "{} manifests and {} tags written; blobs: {} copied, {} shared, {} linked, {} were there",
                moved.manifests,
                moved.tags,
                moved.copied,
                moved.reflinked,
                moved.linked,
                moved.skipped
            ));
        }
        for problem in report.problems.iter().take(SHOWN) {
            let place = problem
                .repository
                .as_ref()
                .map_or_else(String::new, |repository| format!("{repository}: "));
            output::line(format!("skipped: {place}{}", problem.message));
        }
        more(report.problems.len(), "skipped");
        for difference in report.differences.iter().take(SHOWN) {
            let there = difference
                .destination
                .as_ref()
                .map_or_else(|| "nothing".to_owned(), ToString::to_string);
            output::line(format!(
                "differs: {}: {} is {there} at the destination",
                difference.repository, difference.what
            ));
        }
        more(report.differences.len(), "differs");
    }
    Ok(if report.is_complete() {
        Exit::OK
    } else {
        Exit::FAILED
    })
}

fn more(count: usize, word: &str) {
    if count > SHOWN {
        output::line(format!(
            "{word}: {} more, `--json` names all of them",
            count - SHOWN
        ));
    }
}

/// How many problems of one kind are printed.
const SHOWN: usize = 100;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources() {
        assert_eq!("zot:/a:b".parse(), Ok(From::Zot("/a:b".into())));
        assert_eq!(
            "registry:127.0.0.1:5000/x/".parse(),
            Ok(From::Registry("127.0.0.1:5000/x".into()))
        );
        for wrong in ["", "zot:", "/var/lib", "ftp:x"] {
            assert!(wrong.parse::<From>().is_err(), "{wrong}");
        }
    }
}
