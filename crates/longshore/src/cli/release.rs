//! `longshore release lint|push|show|pull`.

use std::path::PathBuf;

use anyhow::Context as _;
use clap::{Args, Subcommand, ValueEnum};
use delivery::release::{self, EngineKind, Finding, PackOptions, ReleaseError, Severity};
use oci::reference::TagOrDigest;
use serde_json::json;

use super::Global;
use super::artifact::reference;
use super::proof;
use crate::output::{self, Exit, Refused};

/// Make, check and publish releases.
#[derive(Debug, Subcommand)]
pub(crate) enum Release {
    /// Check a release directory without the network and without Docker.
    Lint(Lint),
    /// Check, pin every image by digest, pack, push, sign, and tag last.
    Push(Push),
    /// Show what a release holds.
    Show(Show),
    /// Fetch a release, verify every blob and extract its files.
    Pull(Pull),
}

impl Release {
    pub(crate) async fn run(self, global: &Global) -> anyhow::Result<Exit> {
        match self {
            Self::Lint(command) => command.run(global),
            Self::Push(command) => command.run(global).await,
            Self::Show(command) => command.run(global).await,
            Self::Pull(command) => command.run(global).await,
        }
    }
}

/// What describes a release directory.
#[derive(Debug, Args)]
struct Description {
    /// The directory with the definition files.
    directory: PathBuf,
    /// The release's name [default: `name:` of the Compose file, else the directory's name].
    #[arg(long)]
    name: Option<String>,
    /// The release's version, free text.
    #[arg(long)]
    version: Option<String>,
    /// The engine [default: compose when there is a Compose file, else files].
    #[arg(long)]
    engine: Option<Engine>,
    /// A definition file to start from; may be given several times [default: as Compose finds them].
    #[arg(long, short = 'f', visible_alias = "file", value_name = "FILE")]
    entry: Vec<String>,
}

/// How a release is applied.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Engine {
    /// Docker Compose.
    Compose,
    /// Plain files behind a symbolic link.
    Files,
}

impl Description {
    fn options(&self) -> PackOptions {
        PackOptions {
            name: self.name.clone(),
            version: self.version.clone(),
            engine: self.engine.map(|engine| match engine {
                Engine::Compose => EngineKind::Compose,
                Engine::Files => EngineKind::Files,
            }),
            entry: self.entry.clone(),
            ..PackOptions::default()
        }
    }
}

/// Check a release directory.
#[derive(Debug, Args)]
pub(crate) struct Lint {
    #[command(flatten)]
    description: Description,
}

impl Lint {
    fn run(self, global: &Global) -> anyhow::Result<Exit> {
        let findings = release::lint(&self.description.directory, &self.description.options())?;
        report(&findings, global)?;
        let errors = count(&findings, Severity::Error);
        if !global.json {
            output::line(format!(
                "{errors} errors, {} warnings",
                count(&findings, Severity::Warning)
            ));
        }
        Ok(if errors == 0 { Exit::OK } else { Exit::REFUSED })
    }
}

/// Check, pin, pack, push, sign, tag.
#[derive(Debug, Args)]
pub(crate) struct Push {
    #[command(flatten)]
    description: Description,
    /// Where to: `host/repository:tag`. Without a tag it is pushed by digest alone.
    reference: String,
    /// Sign it with this private key before the tag moves.
    #[arg(long, value_name = "KEY")]
    sign: Option<PathBuf>,
    /// Do everything but push: print the digest that it would have.
    #[arg(long)]
    dry_run: bool,
}

impl Push {
    async fn run(self, global: &Global) -> anyhow::Result<Exit> {
        let reference = reference(&self.reference)?;
        if reference.digest.is_some() {
            return Err(
                Refused::new(Exit::USAGE, "a release is pushed to a tag, not to a digest").into(),
            );
        }
        // A wrong password must show before anything is pushed.
        let key = self.sign.as_deref().map(proof::read_key).transpose()?;
        let client = global.client()?;
        let options = self.description.options();
        let packed = match release::pack(&self.description.directory, &options, &client).await {
            Ok(packed) => packed,
            Err(ReleaseError::Lint(findings)) => {
                report(&findings, global)?;
                return Err(Refused::new(
                    Exit::REFUSED,
                    format!(
                        "the release has {} errors, nothing was pushed",
                        count(&findings, Severity::Error)
                    ),
                )
                .into());
            }
            Err(error) => return Err(error.into()),
        };
        if !global.json {
            for finding in &packed.findings {
                output::note(text(finding));
            }
        }
        let digest = packed.descriptor.digest.clone();
        if !self.dry_run {
            release::push(&packed, &client, &reference)
                .await
                .with_context(|| format!("cannot push to `{reference}`"))?;
            if let Some(key) = &key {
                proof::sign_artifact(&client, &reference, &packed.descriptor, key).await?;
            }
            if let Some(tag) = &reference.tag {
                client
                    .repository(&reference.host, &reference.repository)
                    .put_manifest(
                        &TagOrDigest::Tag(tag.clone()),
                        &packed.descriptor.media_type,
                        packed.manifest.clone().into(),
                    )
                    .await
                    .with_context(|| format!("cannot set the tag `{tag}`"))?;
            }
        }
        if global.json {
            output::json(&json!({
                "reference": reference,
                "digest": digest,
                "signed": key.is_some() && !self.dry_run,
                "pushed": !self.dry_run,
                "release": packed.config,
                "findings": packed.findings,
            }))?;
        } else {
            for pin in &packed.config.images {
                global.remark(format!(
                    "{}: {} → {}",
                    pin.service, pin.reference, pin.digest
                ));
            }
            output::line(format!("{reference}@{digest}"));
        }
        Ok(Exit::OK)
    }
}

/// Show what a release holds.
#[derive(Debug, Args)]
pub(crate) struct Show {
    /// The release.
    reference: String,
}

impl Show {
    async fn run(self, global: &Global) -> anyhow::Result<Exit> {
        let reference = reference(&self.reference)?;
        let client = global.client()?;
        let fetched = fetch(&client, &reference).await?;
        let config = &fetched.release.config;
        if global.json {
            output::json(&json!({
                "reference": reference,
                "digest": fetched.release.descriptor.digest,
                "format": fetched.release.format,
                "release": config,
            }))?;
            return Ok(Exit::OK);
        }
        output::line(
            format!(
                "release  {} {}",
                config.name,
                config.version.as_deref().unwrap_or("")
            )
            .trim_end(),
        );
        output::line(format!("digest   {}", fetched.release.descriptor.digest));
        output::line(format!("format   {}", fetched.release.format));
        output::line(format!(
            "engine   {}",
            serde_json::to_value(config.engine)?
                .as_str()
                .unwrap_or_default()
        ));
        for entry in &config.entry {
            output::line(format!("entry    {entry}"));
        }
        for variable in &config.variables {
            let state = match (&variable.default, variable.required) {
                (Some(default), _) => format!("default `{default}`"),
                (None, true) => "required".to_owned(),
                (None, false) => "optional".to_owned(),
            };
            output::line(format!("variable {} ({state})", variable.name));
        }
        for pin in &config.images {
            output::line(format!(
                "image    {}: {} → {}",
                pin.service, pin.reference, pin.digest
            ));
        }
        Ok(Exit::OK)
    }
}

/// Fetch and extract a release.
#[derive(Debug, Args)]
pub(crate) struct Pull {
    /// The release.
    reference: String,
    /// The directory to make. It must not exist.
    #[arg(long, short, value_name = "DIR")]
    output: PathBuf,
}

impl Pull {
    async fn run(self, global: &Global) -> anyhow::Result<Exit> {
        let reference = reference(&self.reference)?;
        if self.output.exists() {
            return Err(
                Refused::new(Exit::USAGE, format!("`{}` exists", self.output.display()))
                    .hint("name a directory that does not exist yet; nothing is overwritten")
                    .into(),
            );
        }
        let fetched = fetch(&global.client()?, &reference).await?;
        let digest = fetched.release.descriptor.digest.clone();
        let directory = self.output.clone();
        tokio::task::spawn_blocking(move || release::extract(&fetched.release, &directory))
            .await
            .context("extracting")??;
        if global.json {
            output::json(
                &json!({"reference": reference, "digest": digest, "directory": self.output}),
            )?;
        } else {
            output::line(self.output.display());
            global.remark(format!("{reference}@{digest}"));
        }
        Ok(Exit::OK)
    }
}

/// A fetched release and the directory that holds its blobs until this is dropped.
struct Fetched {
    release: release::FetchedRelease,
    _staging: tempfile::TempDir,
}

async fn fetch(client: &client::Client, reference: &oci::Reference) -> anyhow::Result<Fetched> {
    let descriptor = proof::resolve(client, reference).await?.descriptor;
    let staging = tempfile::tempdir().context("cannot make a temporary directory")?;
    let repository = client.repository(&reference.host, &reference.repository);
    let release = release::fetch(&repository, &descriptor.digest, staging.path())
        .await
        .with_context(|| format!("`{reference}` cannot be used as a release"))?;
    Ok(Fetched {
        release,
        _staging: staging,
    })
}

fn report(findings: &[Finding], global: &Global) -> anyhow::Result<()> {
    if global.json {
        return output::json(&json!({"findings": findings}));
    }
    for finding in findings {
        output::line(text(finding));
    }
    Ok(())
}

fn text(finding: &Finding) -> String {
    let severity = match finding.severity {
        Severity::Error => "error",
        Severity::Warning => "warning",
    };
    let place = if finding.line == 0 {
        finding.file.clone()
    } else {
        format!("{}:{}", finding.file, finding.line)
    };
    format!(
        "{place}: {severity}: {}\n  hint: {}",
        finding.message, finding.hint
    )
}

fn count(findings: &[Finding], severity: Severity) -> usize {
    findings
        .iter()
        .filter(|finding| finding.severity == severity)
        .count()
}
