//! The two run modes, so that each long proof runs on both: an embedded server on a data directory, or replicas
//! over a PostgreSQL and an S3 store of our own.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context as _, bail};
use clap::ValueEnum;
use e2e::cluster::{Cluster, Storage};
use e2e::server::Options as ServerOptions;
use e2e::{ObjectStore, Postgres, Server, objects};

use crate::{provision, shell};

/// A run mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Mode {
    /// One server on a data directory.
    Embedded,
    /// Replicas on PostgreSQL and S3.
    Cluster,
}

/// Which S3 store is under a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Store {
    /// MinIO.
    Minio,
    /// Versity's gateway.
    Versitygw,
}

impl Store {
    fn kind(self) -> objects::Kind {
        match self {
            Self::Minio => objects::Kind::Minio,
            Self::Versitygw => objects::Kind::Versitygw,
        }
    }
}

/// What the servers of a run stand on.
pub(crate) struct World {
    program: PathBuf,
    cluster: Option<Cluster>,
}

impl World {
    /// Starts what the mode needs.
    pub(crate) fn start(program: &Path, mode: Mode, store: Store) -> anyhow::Result<Self> {
        let cluster = match mode {
            Mode::Embedded => None,
            Mode::Cluster => Some(cluster(Postgres::start, store)?),
        };
        Ok(Self {
            program: program.to_owned(),
            cluster,
        })
    }

    /// The same over this PostgreSQL.
    pub(crate) fn over(program: &Path, cluster: Cluster) -> Self {
        Self {
            program: program.to_owned(),
            cluster: Some(cluster),
        }
    }

    /// PostgreSQL and S3, in cluster mode.
    pub(crate) fn cluster(&mut self) -> Option<&mut Cluster> {
        self.cluster.as_mut()
    }

    /// A place that nothing was ever stored in.
    pub(crate) fn site(&self) -> anyhow::Result<Site> {
        static USED: AtomicU64 = AtomicU64::new(0);
        let name = format!("run{}", USED.fetch_add(1, Ordering::Relaxed));
        Ok(Site {
            program: self.program.clone(),
            storage: self
                .cluster
                .as_ref()
                .map(|cluster| cluster.storage_named(&name)),
            name,
            data: None,
            directory: tempfile::tempdir()?,
        })
    }

    /// A place in this directory, for an embedded server.
    pub(crate) fn site_in(&self, directory: &Path) -> anyhow::Result<Site> {
        let mut site = self.site()?;
        site.data = Some(directory.join("data"));
        Ok(site)
    }

    /// Drops what a site left in the database, so that a long run does not fill the disk.
    pub(crate) fn forget(&self, site: Site) {
        if let Some(cluster) = &self.cluster {
            let statement = format!("DROP DATABASE \"{}\" WITH (FORCE)", site.name);
            cluster.postgres.sql("postgres", &statement);
        }
    }

    /// The objects that a site holds, with their sizes.
    pub(crate) fn objects(&self, site: &Site) -> anyhow::Result<Vec<(String, u64)>> {
        match (&self.cluster, &site.storage) {
            (Some(cluster), Some(storage)) => Ok(cluster.blobs_of(storage)),
            _ => files(&site.data().join("o")),
        }
    }

    /// The count of rows of a table, in cluster mode.
    pub(crate) fn rows(&self, site: &Site, table: &str) -> Option<u64> {
        let cluster = self.cluster.as_ref()?;
        let text = cluster
            .postgres
            .sql(&site.name, &format!("SELECT COUNT(*) FROM {table}"));
        text.parse().ok()
    }
}

/// PostgreSQL and an S3 store.
pub(crate) fn cluster(
    postgres: impl FnOnce() -> Postgres,
    store: Store,
) -> anyhow::Result<Cluster> {
    let program = provision::object_store(store.kind())?;
    let objects = ObjectStore::with(store.kind(), program);
    Ok(Cluster::of(postgres(), objects))
}

/// Where the servers of one run keep what they have.
pub(crate) struct Site {
    program: PathBuf,
    name: String,
    /// The data directory, when it is not in `directory`.
    data: Option<PathBuf>,
    directory: tempfile::TempDir,
    pub(crate) storage: Option<Storage>,
}

impl Site {
    /// A place in a directory, for an embedded server.
    pub(crate) fn data(&self) -> PathBuf {
        self.data
            .clone()
            .unwrap_or_else(|| self.directory.path().join("data"))
    }

    /// How a server of it is started.
    pub(crate) fn options(&self) -> ServerOptions {
        let mut options = ServerOptions::new(self.program.clone()).data(self.data());
        options.storage.clone_from(&self.storage);
        options
    }

    /// Starts so many servers; one in embedded mode.
    pub(crate) fn servers(
        &self,
        options: &ServerOptions,
        count: usize,
    ) -> anyhow::Result<Vec<Server>> {
        let count = if self.storage.is_some() { count } else { 1 };
        (0..count).map(|_| start(options)).collect()
    }

    /// What `verify-store` says of an embedded store, beside a running server.
    pub(crate) fn report(&self) -> anyhow::Result<serde_json::Value> {
        let mut command = shell::command(&self.program);
        command.args(["--json", "verify-store"]).arg(self.data());
        let output = command.output()?;
        serde_json::from_slice(&output.stdout).with_context(|| {
            format!(
                "`verify-store` said {}{}",
                String::from_utf8_lossy(&output.stdout),
                String::from_utf8_lossy(&output.stderr)
            )
        })
    }

    /// Checks the store and the audit chain; a problem is an error.
    pub(crate) fn verify(&self) -> anyhow::Result<()> {
        match &self.storage {
            None => verify_directory(&self.program, &self.data()),
            Some(storage) => {
                let config = self.directory.path().join("verify.yaml");
                std::fs::write(&config, format!("version: 1\n{}", storage.config()))?;
                for words in [&["verify-store"][..], &["audit", "verify"]] {
                    // The audit chain is checked where the program can do it without a data directory.
                    let mut help = shell::command(&self.program);
                    if !shell::read(help.args(words).arg("--help"))?.contains("--config") {
                        static TOLD: std::sync::Once = std::sync::Once::new();
                        TOLD.call_once(|| {
                            println!("`{}` cannot check a cluster", words.join(" "));
                        });
                        continue;
                    }
                    let mut command = shell::command(&self.program);
                    command.args(words).arg("--config").arg(&config);
                    command.envs(storage.environment());
                    sound(&words.join(" "), &mut command)?;
                }
                Ok(())
            }
        }
    }
}

fn verify_directory(program: &Path, data: &Path) -> anyhow::Result<()> {
    for words in [&["verify-store"][..], &["audit", "verify"]] {
        let mut command = shell::command(program);
        command.args(words).arg(data);
        sound(&words.join(" "), &mut command)?;
    }
    Ok(())
}

fn sound(what: &str, command: &mut std::process::Command) -> anyhow::Result<()> {
    let output = command.output()?;
    if !output.status.success() {
        bail!(
            "`{what}` found damage: {}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(())
}

/// Starts a server, with an error in place of a panic.
pub(crate) fn start(options: &ServerOptions) -> anyhow::Result<Server> {
    options.start().map_err(|error| anyhow::anyhow!(error))
}

/// All files below a directory, with their sizes.
fn files(directory: &Path) -> anyhow::Result<Vec<(String, u64)>> {
    let mut found = Vec::new();
    let mut open = vec![directory.to_owned()];
    while let Some(directory) = open.pop() {
        for entry in std::fs::read_dir(&directory)? {
            let entry = entry?;
            // It may be deleted between the two looks.
            let Ok(metadata) = entry.metadata() else {
                continue;
            };
            if metadata.is_dir() {
                open.push(entry.path());
            } else {
                found.push((entry.path().display().to_string(), metadata.len()));
            }
        }
    }
    Ok(found)
}
