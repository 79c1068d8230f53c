//! `longshore push`, `pull`, `copy`, `ls`, `inspect`, `tag`, `rm`.

use std::path::Path;

use anyhow::Context as _;
use clap::Args;
use client::longshore::api;
use client::transfer::{self, Artifact, CopyOptions, CopyReport, FileLayer, Location};
use oci::Reference;
use oci::reference::TagOrDigest;
use serde_json::json;

use super::Global;
use crate::output::{self, Bars, Exit, Refused};

/// Push files as one artifact, or an OCI layout directory.
///
/// `longshore push app.tar.gz:application/gzip 127.0.0.1:5050/app:v1` makes an artifact of files;
/// `longshore push oci:DIR:v1 127.0.0.1:5050/app:v1` pushes what a layout directory holds.
#[derive(Debug, Args)]
pub(crate) struct Push {
    /// Files (`PATH[:MEDIA-TYPE]`), or one `oci:DIR[:TAG|@DIGEST]`; last the destination reference.
    #[arg(required = true, num_args = 2.., value_name = "SOURCE… REFERENCE")]
    arguments: Vec<String>,
    /// The artifact type of an artifact made of files.
    #[arg(
        long,
        value_name = "TYPE",
        default_value = "application/vnd.unknown.artifact.v1"
    )]
    artifact_type: String,
    /// An annotation of the manifest: `KEY=VALUE`.
    #[arg(long, value_name = "KEY=VALUE")]
    annotation: Vec<String>,
}

impl Push {
    pub(crate) async fn run(self, global: &Global) -> anyhow::Result<Exit> {
        let mut sources = self.arguments;
        // Invariant: clap asked for two at least.
        let destination = sources.pop().unwrap_or_default();
        if let [only] = sources.as_slice()
            && only.starts_with("oci:")
        {
            return copy(only, &destination, true, PARALLEL, global).await;
        }
        let location = location(&destination)?;
        let mut artifact = Artifact {
            artifact_type: self.artifact_type,
            ..Artifact::default()
        };
        for source in &sources {
            let file = FileLayer::from_argument(source).map_err(|error| {
                Refused::new(Exit::USAGE, error)
                    .hint("a directory is pushed with `longshore release push DIR REFERENCE`, or packed first")
            })?;
            artifact.files.push(file);
        }
        for text in &self.annotation {
            let (key, value) = text.split_once('=').ok_or_else(|| {
                Refused::new(
                    Exit::USAGE,
                    format!("`--annotation {text}`: write KEY=VALUE"),
                )
            })?;
            artifact
                .annotations
                .insert(key.to_owned(), value.to_owned());
        }
        let bars = Bars::new(global.quiet || global.json);
        let report = transfer::push_files(&global.client()?, &location, &artifact, PARALLEL, &bars)
            .await
            .with_context(|| format!("cannot push to `{destination}`"))?;
        if global.json {
            output::json(&json!({"reference": destination, "digest": report.digest}))?;
        } else {
            output::line(format!("{destination}@{}", report.digest));
        }
        Ok(Exit::OK)
    }
}

/// Pull an artifact.
///
/// Into `oci:DIR` it goes whole, with children and everything attached. Into a directory its layers
/// go as files, named by their titles.
#[derive(Debug, Args)]
pub(crate) struct Pull {
    /// The artifact.
    reference: String,
    /// A directory for the layers as files, or `oci:DIR[:TAG]` for the whole artifact.
    #[arg(long, short, value_name = "DIR", default_value = ".")]
    output: String,
}

impl Pull {
    pub(crate) async fn run(self, global: &Global) -> anyhow::Result<Exit> {
        if self.output.starts_with("oci:") {
            return copy(&self.reference, &self.output, true, PARALLEL, global).await;
        }
        let reference = self.reference;
        let bars = Bars::new(global.quiet || global.json);
        let pulled = transfer::pull_files(
            &global.client()?,
            &location(&reference)?,
            Path::new(&self.output),
            PARALLEL,
            &bars,
        )
        .await
        .with_context(|| format!("cannot pull `{reference}`"))?;
        if global.json {
            output::json(&json!({
                "reference": reference,
                "digest": pulled.digest,
                "files": pulled.files,
            }))?;
        } else {
            for file in &pulled.files {
                output::line(file.display());
            }
            global.remark(format!("{reference}@{}", pulled.digest));
        }
        Ok(Exit::OK)
    }
}

/// Copy an artifact by digest, with children, signatures and everything else attached to it.
#[derive(Debug, Args)]
pub(crate) struct Copy {
    /// A reference, or `oci:DIR[:TAG|@DIGEST]`.
    source: String,
    /// A reference, or `oci:DIR[:TAG]`.
    destination: String,
    /// Leave out what is attached to it.
    #[arg(long)]
    no_referrers: bool,
    /// How many blobs at once.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u8).range(1..=64))]
    parallel: u8,
}

impl Copy {
    pub(crate) async fn run(self, global: &Global) -> anyhow::Result<Exit> {
        copy(
            &self.source,
            &self.destination,
            !self.no_referrers,
            usize::from(self.parallel),
            global,
        )
        .await
    }
}

async fn copy(
    from: &str,
    to: &str,
    referrers: bool,
    parallel: usize,
    global: &Global,
) -> anyhow::Result<Exit> {
    let (source, destination) = (location(from)?, location(to)?);
    let bars = Bars::new(global.quiet || global.json);
    let options = CopyOptions {
        referrers,
        parallel,
    };
    let report: CopyReport =
        transfer::copy(&global.client()?, &source, &destination, options, &bars)
            .await
            .with_context(|| format!("cannot copy `{from}` to `{to}`"))?;
    if global.json {
        output::json(&json!({
            "digest": report.digest,
            "manifests": report.manifests,
            "blobs": report.blobs,
            "skipped": report.skipped,
            "bytes": report.bytes,
        }))?;
    } else {
        output::line(&report.digest);
        global.remark(format!(
            "{} manifests, {} blobs moved ({}), {} there already",
            report.manifests,
            report.blobs,
            output::bytes(report.bytes),
            report.skipped
        ));
    }
    Ok(Exit::OK)
}

/// List the repositories of a registry, or the tags of a repository.
#[derive(Debug, Args)]
pub(crate) struct Ls {
    /// `host[:port]` for its repositories, `host[:port]/repository` for its tags.
    what: String,
}

impl Ls {
    pub(crate) async fn run(self, global: &Global) -> anyhow::Result<Exit> {
        let client = global.client()?;
        let what = self.what.trim_end_matches('/');
        let names = if what.contains('/') && !what.contains("://") {
            let reference = reference(what)?;
            client
                .repository(&reference.host, &reference.repository)
                .tags()
                .await
                .with_context(|| format!("cannot list the tags of `{what}`"))?
        } else {
            let host = super::login::host(what)?;
            client
                .catalog(&host)
                .await
                .with_context(|| format!("cannot list the repositories of `{host}`"))?
        };
        if global.json {
            output::json(&names)?;
        } else {
            for name in &names {
                output::line(name);
            }
        }
        Ok(Exit::OK)
    }
}

/// Show a manifest and what is attached to it.
#[derive(Debug, Args)]
pub(crate) struct Inspect {
    /// The artifact.
    reference: String,
    /// Print the manifest's exact bytes and nothing else.
    #[arg(long)]
    raw: bool,
}

impl Inspect {
    pub(crate) async fn run(self, global: &Global) -> anyhow::Result<Exit> {
        let reference = reference(&self.reference)?;
        let client = global.client()?;
        let repository = client.repository(&reference.host, &reference.repository);
        let fetched = repository
            .manifest(&reference.tag_or_digest())
            .await?
            .ok_or_else(|| client::Error::NotFound(reference.to_string()))?;
        if self.raw {
            output::raw(&fetched.body);
            return Ok(Exit::OK);
        }
        let view = oci::Manifest::parse(&fetched.body, &fetched.descriptor.media_type)
            .with_context(|| format!("`{reference}` is not a manifest that can be shown"))?;
        let digest = &fetched.descriptor.digest;
        let referrers = repository.referrers(digest, None).await?;
        if global.json {
            let manifest: serde_json::Value = serde_json::from_slice(&fetched.body)?;
            output::json(&json!({
                "reference": reference,
                "digest": digest,
                "mediaType": fetched.descriptor.media_type,
                "size": fetched.body.len(),
                "manifest": manifest,
                "referrers": referrers,
            }))?;
            return Ok(Exit::OK);
        }
        output::line(format!("reference   {reference}"));
        output::line(format!("digest      {digest}"));
        output::line(format!("media type  {}", fetched.descriptor.media_type));
        if let Some(kind) = view.listed_artifact_type() {
            output::line(format!("artifact    {kind}"));
        }
        if let Some(subject) = &view.subject {
            output::line(format!("subject     {}", subject.digest));
        }
        for (key, value) in &view.annotations {
            output::line(format!("annotation  {key}={value}"));
        }
        for (name, descriptors) in [
            ("layer", view.layers.unwrap_or_default()),
            ("manifest", view.manifests.unwrap_or_default()),
            ("referrer", referrers),
        ] {
            for descriptor in descriptors {
                let kind = descriptor
                    .artifact_type
                    .as_deref()
                    .unwrap_or(&descriptor.media_type);
                let platform = descriptor
                    .platform
                    .as_ref()
                    .map(|platform| format!("  {platform}"))
                    .unwrap_or_default();
                output::line(format!(
                    "{name:<10}  {}  {:>10}  {kind}{platform}",
                    descriptor.digest,
                    output::bytes(descriptor.size)
                ));
            }
        }
        Ok(Exit::OK)
    }
}

/// Give an artifact more tags in its repository. No bytes are moved.
#[derive(Debug, Args)]
pub(crate) struct Tag {
    /// The artifact.
    reference: String,
    /// The new tags.
    #[arg(required = true)]
    tags: Vec<String>,
}

impl Tag {
    pub(crate) async fn run(self, global: &Global) -> anyhow::Result<Exit> {
        let reference = reference(&self.reference)?;
        let tags: Vec<oci::Tag> = self
            .tags
            .iter()
            .map(|text| text.parse())
            .collect::<Result<_, _>>()?;
        let client = global.client()?;
        let repository = client.repository(&reference.host, &reference.repository);
        let fetched = repository
            .manifest(&reference.tag_or_digest())
            .await?
            .ok_or_else(|| client::Error::NotFound(reference.to_string()))?;
        for tag in tags {
            repository
                .put_manifest(
                    &TagOrDigest::Tag(tag.clone()),
                    &fetched.descriptor.media_type,
                    fetched.body.clone(),
                )
                .await
                .with_context(|| format!("cannot set the tag `{tag}`"))?;
            global.remark(format!(
                "{} → {}",
                reference.with_tag(tag),
                fetched.descriptor.digest
            ));
        }
        if global.json {
            output::json(&json!({"digest": fetched.descriptor.digest, "tags": self.tags}))?;
        }
        Ok(Exit::OK)
    }
}

/// Delete a tag, a manifest by digest (with all its tags), or with `--repository` a whole repository.
#[derive(Debug, Args)]
pub(crate) struct Rm {
    /// Delete the whole repository that each reference names, with everything in it.
    #[arg(long)]
    repository: bool,
    /// `host/repository:tag` or `host/repository@digest`; with `--repository`, `host/repository`.
    #[arg(required = true)]
    references: Vec<String>,
}

impl Rm {
    pub(crate) async fn run(self, global: &Global) -> anyhow::Result<Exit> {
        let mut parsed = Vec::new();
        for text in &self.references {
            let reference = reference(text)?;
            let whole = reference.tag.is_none() && reference.digest.is_none();
            if whole && !self.repository {
                return Err(Refused::new(
                    Exit::USAGE,
                    format!("`{text}` names neither a tag nor a digest"),
                )
                .hint("a whole repository is not deleted by accident: name each tag or digest, or use `--repository`")
                .into());
            }
            if self.repository && !whole {
                return Err(Refused::new(
                    Exit::USAGE,
                    format!("`{text}` names more than a repository"),
                )
                .hint("`--repository` deletes whole repositories: leave out the tag and the digest")
                .into());
            }
            parsed.push(reference);
        }
        let client = global.client()?;
        for reference in &parsed {
            if self.repository {
                let path = format!(
                    "repositories/{}",
                    api::path_of(reference.repository.as_str())
                );
                api::delete(&client, &reference.host, &path).await
            } else {
                client
                    .repository(&reference.host, &reference.repository)
                    .delete_manifest(&reference.tag_or_digest())
                    .await
            }
            .with_context(|| format!("cannot delete `{reference}`"))?;
            global.remark(format!("deleted {reference}"));
        }
        if global.json {
            output::json(&json!({"deleted": parsed}))?;
        }
        Ok(Exit::OK)
    }
}

/// Parses a reference or a layout directory of a command line.
fn location(text: &str) -> anyhow::Result<Location> {
    text.parse()
        .map_err(|error: client::Error| Refused::new(Exit::USAGE, error).into())
}

/// Parses a reference of a command line.
pub(super) fn reference(text: &str) -> anyhow::Result<Reference> {
    text.parse()
        .map_err(|error: oci::reference::ReferenceError| Refused::new(Exit::USAGE, error).into())
}

const PARALLEL: usize = 4;
