//! `longshore key`, `sign`, `verify`.

use std::io::{IsTerminal as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use bytes::Bytes;
use clap::{Args, Subcommand};
use client::{Client, FetchedManifest};
use oci::reference::TagOrDigest;
use oci::{Descriptor, Digest, Reference, media_type};
use serde_json::json;
use trust::key::{PrivateKey, PublicKey};
use trust::{Policy, TrustedKey, Verdict};

use super::Global;
use super::artifact::reference;
use crate::clock;
use crate::output::{self, Exit, Refused};

/// Make signing keys.
#[derive(Debug, Subcommand)]
pub(crate) enum Key {
    /// Make a P-256 key pair: NAME.key (encrypted, cosign's format) and NAME.pub.
    ///
    /// The password comes from LONGSHORE_KEY_PASSWORD, else it is asked for.
    Generate {
        /// The path without its ending.
        #[arg(long, value_name = "NAME", default_value = "longshore")]
        output: PathBuf,
    },
}

impl Key {
    pub(crate) fn run(self, global: &Global) -> anyhow::Result<Exit> {
        let Self::Generate { output } = self;
        let (private, public) = (with_ending(&output, "key"), with_ending(&output, "pub"));
        for path in [&private, &public] {
            if path.exists() {
                return Err(Refused::new(Exit::FAILED, format!("`{}` exists", path.display()))
                    .hint("keys are never overwritten: choose another name, or move the old key away")
                    .into());
            }
        }
        let password = new_password()?;
        let key = PrivateKey::generate(&mut clock::random);
        write_new(
            &private,
            0o600,
            &key.to_encrypted_pem(password.as_bytes(), &mut clock::random),
        )?;
        if let Err(error) = write_new(&public, 0o644, &key.public().to_pem()) {
            // Half a key pair helps nobody.
            let _ = std::fs::remove_file(&private);
            return Err(error);
        }
        if global.json {
            output::json(&json!({
                "private": private,
                "public": public,
                "id": key.public().id(),
            }))?;
        } else {
            output::line(format!("{} (keep it secret)", private.display()));
            output::line(format!(
                "{} (give it to whoever verifies)",
                public.display()
            ));
        }
        Ok(Exit::OK)
    }
}

/// Sign an artifact in a registry, as a bundle and in cosign's older form, so that every version of
/// cosign verifies it.
#[derive(Debug, Args)]
pub(crate) struct Sign {
    /// The private key. Its password comes from LONGSHORE_KEY_PASSWORD, else it is asked for.
    #[arg(long, value_name = "FILE")]
    key: PathBuf,
    /// The artifact. A tag is resolved first; what is signed is the digest.
    reference: String,
}

impl Sign {
    pub(crate) async fn run(self, global: &Global) -> anyhow::Result<Exit> {
        let reference = reference(&self.reference)?;
        let key = read_key(&self.key)?;
        let client = global.client()?;
        let fetched = resolve(&client, &reference).await?;
        sign_artifact(&client, &reference, &fetched.descriptor, &key).await?;
        let signed = reference.with_digest(fetched.descriptor.digest.clone());
        if global.json {
            output::json(&json!({"reference": signed, "key": key.public().id()}))?;
        } else {
            output::line(format!("signed {signed}"));
        }
        Ok(Exit::OK)
    }
}

/// Verify that trusted keys signed an artifact.
///
/// States exactly what was checked: the signatures of the given keys over this digest, in a bundle or
/// in cosign's older form. No transparency log is asked.
#[derive(Debug, Args)]
pub(crate) struct Verify {
    /// A public key that is trusted. May be given several times.
    #[arg(long, value_name = "FILE", required = true)]
    key: Vec<PathBuf>,
    /// How many different keys must have signed.
    #[arg(long, default_value_t = 1)]
    threshold: usize,
    /// The artifact.
    reference: String,
}

impl Verify {
    pub(crate) async fn run(self, global: &Global) -> anyhow::Result<Exit> {
        let reference = reference(&self.reference)?;
        let mut keys = Vec::new();
        for path in &self.key {
            keys.push(TrustedKey {
                label: path.display().to_string(),
                key: read_public_key(path)?,
            });
        }
        if self.threshold == 0 || self.threshold > keys.len() {
            return Err(Refused::new(
                Exit::USAGE,
                format!("`--threshold {}` with {} keys", self.threshold, keys.len()),
            )
            .hint("it must be at least 1 and at most the number of keys")
            .into());
        }
        let policy = Policy {
            name: "command line".to_owned(),
            keys,
            threshold: self.threshold,
        };
        let client = global.client()?;
        let fetched = resolve(&client, &reference).await?;
        let digest = fetched.descriptor.digest;
        let evidence = client
            .repository(&reference.host, &reference.repository)
            .evidence(&digest)
            .await
            .context("cannot collect the evidence")?;
        let verdict = trust::verify(&digest, &evidence, &policy);
        if global.json {
            output::json(&verdict)?;
        } else {
            print_verdict(&verdict);
        }
        Ok(if verdict.is_allowed() {
            Exit::OK
        } else {
            Exit::REFUSED
        })
    }
}

/// Prints a verdict for people.
pub(crate) fn print_verdict(verdict: &Verdict) {
    output::line(format!("{}: {}", verdict.digest, verdict.message));
    for accepted in &verdict.accepted {
        output::line(format!(
            "  signed with {} ({}), {} {}",
            accepted.label, accepted.key, accepted.shape, accepted.evidence
        ));
    }
    for rejected in &verdict.rejected {
        output::line(format!(
            "  not counted: {} {}",
            rejected.evidence, rejected.reason
        ));
    }
}

/// Fetches the manifest that a reference names now.
pub(crate) async fn resolve(
    client: &Client,
    reference: &Reference,
) -> anyhow::Result<FetchedManifest> {
    Ok(client
        .repository(&reference.host, &reference.repository)
        .manifest(&reference.tag_or_digest())
        .await?
        .ok_or_else(|| client::Error::NotFound(reference.to_string()))?)
}

/// Signs a subject and pushes both shapes. The legacy tag only grows: what others signed stays.
pub(crate) async fn sign_artifact(
    client: &Client,
    reference: &Reference,
    subject: &Descriptor,
    key: &PrivateKey,
) -> anyhow::Result<()> {
    let repository = client.repository(&reference.host, &reference.repository);
    let name = format!("{}/{}", reference.host, reference.repository);
    let legacy_tag = format!("{}-{}", subject.digest.algorithm(), subject.digest.hex());
    let legacy_tag: oci::Tag = format!("{legacy_tag}.sig").parse()?;
    let legacy_tag = TagOrDigest::Tag(legacy_tag);
    let existing = repository.manifest(&legacy_tag).await?;
    let signed = trust::sign(
        key,
        subject,
        &name,
        existing.as_ref().map(|manifest| manifest.body.as_ref()),
        &clock::now_rfc3339(),
    )?;
    for (descriptor, content) in signed.bundle.blobs.iter().chain(&signed.legacy.blobs) {
        repository
            .put_blob(descriptor, Bytes::copy_from_slice(content))
            .await
            .context("cannot push the signature")?;
    }
    let digest = Digest::sha256(&signed.bundle.manifest);
    repository
        .put_manifest(
            &TagOrDigest::Digest(digest),
            media_type::OCI_MANIFEST,
            signed.bundle.manifest.into(),
        )
        .await
        .context("cannot push the signature")?;
    repository
        .put_manifest(
            &legacy_tag,
            media_type::OCI_MANIFEST,
            signed.legacy.manifest.into(),
        )
        .await
        .context("cannot push the signature in its older form")?;
    Ok(())
}

/// Reads and opens a private key.
pub(crate) fn read_key(path: &Path) -> anyhow::Result<PrivateKey> {
    let pem = read_pem(path)?;
    let password = match std::env::var(PASSWORD) {
        Ok(password) => password,
        Err(_) if std::io::stdin().is_terminal() => {
            rpassword::prompt_password(format!("Password of {}: ", path.display()))
                .context("reading the password")?
        }
        Err(_) => return Err(no_password().into()),
    };
    PrivateKey::from_encrypted_pem(&pem, password.as_bytes())
        .with_context(|| format!("cannot open the key `{}`", path.display()))
}

fn read_public_key(path: &Path) -> anyhow::Result<PublicKey> {
    PublicKey::from_pem(&read_pem(path)?)
        .with_context(|| format!("`{}` is not a public key that can be used", path.display()))
}

fn read_pem(path: &Path) -> anyhow::Result<String> {
    std::fs::read_to_string(path).map_err(|error| {
        Refused::new(
            Exit::USAGE,
            format!("cannot read key `{}`: {error}", path.display()),
        )
        .hint("make a key pair with `longshore key generate --output NAME`")
        .into()
    })
}

fn new_password() -> anyhow::Result<String> {
    if let Ok(password) = std::env::var(PASSWORD) {
        return Ok(password);
    }
    if !std::io::stdin().is_terminal() {
        return Err(no_password().into());
    }
    let first =
        rpassword::prompt_password("Password for the new key: ").context("reading the password")?;
    let second = rpassword::prompt_password("Again: ").context("reading the password")?;
    if first != second {
        return Err(Refused::new(Exit::USAGE, "the two passwords differ").into());
    }
    Ok(first)
}

fn no_password() -> Refused {
    Refused::new(Exit::USAGE, "no terminal to ask for the key's password").hint(format!(
        "set `{PASSWORD}` (an empty value is an empty password)"
    ))
}

fn with_ending(path: &Path, ending: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".");
    name.push(ending);
    PathBuf::from(name)
}

fn write_new(path: &Path, mode: u32, content: &str) -> anyhow::Result<()> {
    std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(path)
        .and_then(|mut file| {
            file.write_all(content.as_bytes())?;
            file.sync_all()
        })
        .with_context(|| format!("cannot write `{}`", path.display()))
}

const PASSWORD: &str = "LONGSHORE_KEY_PASSWORD";
