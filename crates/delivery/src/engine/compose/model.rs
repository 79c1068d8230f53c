//! The resolved project, rewritten: images by digest, files by content, labels of ours.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use oci::Reference;
use serde_json::{Map, Value, json};
use sha2::{Digest as _, Sha256};

use super::Parts;
use super::content::{self, Content};
use super::process::{Process, redact};
use crate::engine::{Deployment, EngineError};
use crate::release::ImagePin;

/// Names the target that made a container.
pub(super) const LABEL_TARGET: &str = "dev.longshore.target";
/// The hash of the service as we mean it. It changes only with the service, so it recreates nothing
/// that would not be recreated anyway.
pub(super) const LABEL_HASH: &str = "dev.longshore.service";
/// The hashes of the service's parts, so that a plan can say what changed.
const LABEL_PARTS: &str = "dev.longshore.parts";

/// A project that can be handed to `up`.
#[derive(Debug)]
pub(super) struct Model {
    /// What it was made from.
    pub(super) inputs: String,
    /// The document for standard input.
    pub(super) document: Value,
    /// The services by name.
    pub(super) services: BTreeMap<String, Service>,
    contents: BTreeSet<Content>,
    secrets: Vec<String>,
}

/// One service.
#[derive(Debug)]
pub(super) struct Service {
    /// The image by digest.
    pub(super) image: String,
    /// [`LABEL_HASH`].
    pub(super) hash: String,
    /// It is to be started again when it ends.
    pub(super) restarts: bool,
    /// How many containers it has.
    pub(super) replicas: u64,
    parts: Parts,
}

impl Service {
    /// What differs from a running container, by the names of the parts; values are never shown.
    pub(super) fn difference(&self, labels: Option<&HashMap<String, String>>) -> String {
        let old: Parts = labels
            .and_then(|labels| labels.get(LABEL_PARTS))
            .and_then(|text| serde_json::from_str(text).ok())
            .unwrap_or_default();
        let names: BTreeSet<&String> = old.keys().chain(self.parts.keys()).collect();
        let changed: Vec<&str> = names
            .into_iter()
            .filter(|name| old.get(*name) != self.parts.get(*name))
            .map(String::as_str)
            .collect();
        if old.is_empty() || changed.is_empty() {
            return "it was made by someone else".to_owned();
        }
        format!("changed: {}", changed.join(", "))
    }
}

impl Model {
    /// Writes down which content the deployment uses, and makes it.
    pub(super) fn keep(&self, deployment: &Deployment) -> Result<(), EngineError> {
        self.materialise(deployment)?;
        content::remember(&deployment.state, &deployment.digest, &self.contents)
    }

    /// Makes the content paths that are missing.
    pub(super) fn materialise(&self, deployment: &Deployment) -> Result<(), EngineError> {
        for content in &self.contents {
            content.materialise(&deployment.state)?;
        }
        Ok(())
    }

    /// Takes values that may be secret out of a text.
    pub(super) fn redact(&self, text: &str) -> String {
        redact(text, self.secrets.iter())
    }
}

/// What a model depends on, to tell whether a kept one is still right.
pub(super) fn inputs(deployment: &Deployment) -> String {
    let target = &deployment.target;
    let text = json!([
        deployment.digest,
        deployment.directory,
        deployment.variables,
        target.project,
        target.profiles,
        target.name,
    ])
    .to_string();
    hex::encode(Sha256::digest(text.as_bytes()))
}

/// Lets the plugin resolve the project and rewrites the result.
pub(super) async fn resolve(
    process: &Process<'_>,
    deployment: &Deployment,
) -> Result<Model, EngineError> {
    let document = process.config(deployment).await?;
    rewrite(document, deployment)
}

/// Rewrites a resolved project.
pub(super) fn rewrite(mut document: Value, deployment: &Deployment) -> Result<Model, EngineError> {
    let mut rewriter = Rewriter {
        deployment,
        contents: BTreeSet::new(),
        secrets: deployment
            .variables
            .iter()
            .filter(|(name, _)| name.as_str() != "LONGSHORE_DATA")
            .map(|(_, value)| value.clone())
            .collect(),
    };
    let root = document
        .as_object_mut()
        .ok_or_else(|| rejected("Compose resolved no project"))?;
    root.insert("name".to_owned(), json!(deployment.target.project));
    for section in ["configs", "secrets"] {
        if let Some(Value::Object(entries)) = root.get_mut(section) {
            for (name, entry) in entries {
                rewriter.file(section, name, entry)?;
            }
        }
    }
    let definitions: BTreeMap<String, Value> = ["configs", "networks", "secrets", "volumes"]
        .into_iter()
        .filter_map(|section| {
            root.get(section)
                .map(|value| (section.to_owned(), value.clone()))
        })
        .collect();
    let mut services = BTreeMap::new();
    if let Some(Value::Object(entries)) = root.get_mut("services") {
        for (name, entry) in entries {
            let service = entry
                .as_object_mut()
                .ok_or_else(|| rejected(&format!("service `{name}` is not a mapping")))?;
            services.insert(name.clone(), rewriter.service(name, service, &definitions)?);
        }
    }
    if services.is_empty() {
        return Err(rejected("the release has no service for these profiles"));
    }
    Ok(Model {
        inputs: inputs(deployment),
        document,
        services,
        contents: rewriter.contents,
        secrets: rewriter.secrets,
    })
}

/// The image of a pin by digest.
pub(super) fn pinned(pin: &ImagePin) -> Result<String, EngineError> {
    let reference = Reference::parse_familiar(&pin.reference)
        .map_err(|error| rejected(&format!("service `{}`: {error}", pin.service)))?;
    Ok(reference.with_digest(pin.digest.clone()).to_string())
}

struct Rewriter<'a> {
    deployment: &'a Deployment,
    contents: BTreeSet<Content>,
    secrets: Vec<String>,
}

impl Rewriter<'_> {
    fn service(
        &mut self,
        name: &str,
        service: &mut Map<String, Value>,
        definitions: &BTreeMap<String, Value>,
    ) -> Result<Service, EngineError> {
        let image = self.image(name, service)?;
        service.insert("image".to_owned(), json!(escape(&image)));
        service.remove("build");
        service.remove("pull_policy");
        if let Some(Value::Array(volumes)) = service.get_mut("volumes") {
            for volume in volumes {
                self.mount(name, volume)?;
            }
        }
        if let Some(Value::Object(environment)) = service.get("environment") {
            self.secrets.extend(
                environment
                    .iter()
                    .filter(|(key, _)| is_secret_name(key))
                    .filter_map(|(_, value)| value.as_str().map(unescape)),
            );
        }
        let parts = parts(service, definitions);
        let hash = hex::encode(Sha256::digest(
            serde_json::to_vec(&parts).unwrap_or_default(),
        ));
        let labels = service.entry("labels").or_insert_with(|| json!({}));
        if let Value::Object(labels) = labels {
            labels.insert(LABEL_TARGET.to_owned(), json!(self.deployment.target.name));
            labels.insert(LABEL_HASH.to_owned(), json!(hash));
            labels.insert(
                LABEL_PARTS.to_owned(),
                json!(serde_json::to_string(&parts).unwrap_or_default()),
            );
        }
        let restarts = service
            .get("restart")
            .and_then(Value::as_str)
            .is_some_and(|policy| policy == "always" || policy == "unless-stopped");
        let replicas = service
            .get("scale")
            .or_else(|| {
                service
                    .get("deploy")
                    .and_then(|deploy| deploy.get("replicas"))
            })
            .and_then(Value::as_u64)
            .unwrap_or(1);
        Ok(Service {
            image,
            hash,
            restarts,
            replicas,
            parts,
        })
    }

    /// The image by digest, out of the release's pins; an image that was not pinned does not run.
    fn image(&self, name: &str, service: &Map<String, Value>) -> Result<String, EngineError> {
        let image = service
            .get("image")
            .and_then(Value::as_str)
            .map(unescape)
            .ok_or_else(|| {
                rejected(&format!(
                    "service `{name}` has no image; build it, push it and name it"
                ))
            })?;
        let pins = &self.deployment.config.images;
        if pins.is_empty() {
            let reference = Reference::parse_familiar(&image)
                .map_err(|error| rejected(&format!("service `{name}`: {error}")))?;
            return match &reference.digest {
                Some(digest) => Ok(reference.with_digest(digest.clone()).to_string()),
                None => Err(rejected(&format!(
                    "image `{image}` of service `{name}` is not pinned; name it by digest, or publish with \
                     `longshore release push`, which pins it"
                ))),
            };
        }
        let same = |reference: &str| {
            reference == image
                || matches!(
                    (Reference::parse_familiar(reference), Reference::parse_familiar(&image)),
                    (Ok(a), Ok(b)) if a == b
                )
        };
        match pins.iter().find(|pin| pin.service == name) {
            Some(pin) if same(&pin.reference) => pinned(pin),
            Some(pin) => Err(rejected(&format!(
                "service `{name}` resolves to image `{image}`, but `{}` was pinned when the release was made; \
                 a variable must not change an image",
                pin.reference
            ))),
            None => Err(rejected(&format!(
                "service `{name}` was not pinned when the release was made; publish the release again"
            ))),
        }
    }

    /// A bind mount: of the release by content and read-only, of the target's data as it is.
    fn mount(&mut self, service: &str, volume: &mut Value) -> Result<(), EngineError> {
        let Some(volume) = volume.as_object_mut() else {
            return Ok(());
        };
        if volume.get("type").and_then(Value::as_str) != Some("bind") {
            return Ok(());
        }
        let Some(source) = volume.get("source").and_then(Value::as_str).map(unescape) else {
            return Ok(());
        };
        let source = PathBuf::from(source);
        if source.starts_with(&self.deployment.data) {
            return content::make_directory(&source);
        }
        if !source.starts_with(&self.deployment.directory) {
            if source.starts_with(&self.deployment.state) {
                return Err(rejected(&format!(
                    "service `{service}` mounts `{}`, which leaves the release",
                    source.display()
                )));
            }
            return Ok(());
        }
        let path = self.content(&source, &format!("service `{service}` mounts"))?;
        volume.insert(
            "source".to_owned(),
            json!(escape(&path.display().to_string())),
        );
        volume.insert("read_only".to_owned(), json!(true));
        Ok(())
    }

    /// The `file:` of a config or a secret.
    fn file(&mut self, section: &str, name: &str, entry: &mut Value) -> Result<(), EngineError> {
        let Some(entry) = entry.as_object_mut() else {
            return Ok(());
        };
        if section == "secrets"
            && let Some(content) = entry.get("content").and_then(Value::as_str)
        {
            self.secrets.push(unescape(content));
        }
        let Some(file) = entry.get("file").and_then(Value::as_str).map(unescape) else {
            return Ok(());
        };
        let file = PathBuf::from(file);
        if !file.starts_with(&self.deployment.directory) {
            return if file.starts_with(&self.deployment.state) {
                Err(rejected(&format!(
                    "`{section}.{name}` names `{}`, which leaves the release",
                    file.display()
                )))
            } else {
                Ok(())
            };
        }
        if section == "secrets"
            && let Ok(text) = std::fs::read_to_string(&file)
        {
            self.secrets.push(text.trim().to_owned());
        }
        let path = self.content(&file, &format!("`{section}.{name}` names"))?;
        entry.insert(
            "file".to_owned(),
            json!(escape(&path.display().to_string())),
        );
        Ok(())
    }

    fn content(&mut self, source: &Path, who: &str) -> Result<PathBuf, EngineError> {
        if !source.exists() {
            let name = source
                .strip_prefix(&self.deployment.directory)
                .unwrap_or(source);
            return Err(rejected(&format!(
                "{who} `{}`, which the release does not have; add it, use a named volume, or \
                 `${{LONGSHORE_DATA}}/{}` for data of the target",
                name.display(),
                name.display()
            )));
        }
        let content = Content::of(source)?;
        let path = content.path(&self.deployment.state);
        self.contents.insert(content);
        Ok(path)
    }
}

/// The hashes of a service's parts: what makes a container another one.
fn parts(service: &Map<String, Value>, definitions: &BTreeMap<String, Value>) -> Parts {
    let mut parts = Parts::new();
    for (key, value) in service {
        match (key.as_str(), value) {
            ("depends_on" | "profiles" | "scale" | "deploy", _) | (_, Value::Null) => {}
            ("environment" | "labels", Value::Object(entries)) => {
                for (name, value) in entries {
                    parts.insert(format!("{key} {name}"), short(value));
                }
            }
            ("volumes", Value::Array(mounts)) => {
                for mount in mounts {
                    let target = mount
                        .get("target")
                        .and_then(Value::as_str)
                        .unwrap_or_default();
                    parts.insert(format!("mount {target}"), short(mount));
                }
            }
            ("image", Value::String(image)) => {
                parts.insert(
                    key.clone(),
                    image.rsplit('@').next().unwrap_or_default().to_owned(),
                );
            }
            _ => {
                parts.insert(key.clone(), short(value));
            }
        }
    }
    // A config or secret is the same reference when its file changes, so its definition counts.
    for section in ["configs", "secrets"] {
        let used = service
            .get(section)
            .and_then(Value::as_array)
            .into_iter()
            .flatten();
        for name in used.filter_map(|entry| entry.get("source").and_then(Value::as_str)) {
            if let Some(definition) = definitions.get(section).and_then(|all| all.get(name)) {
                parts.insert(format!("{section} {name}"), short(definition));
            }
        }
    }
    parts
}

/// A short hash of canonical JSON.
fn short(value: &Value) -> String {
    let bytes = oci::record::canonical(value).unwrap_or_else(|_| value.to_string().into_bytes());
    hex::encode(Sha256::digest(bytes))
        .chars()
        .take(16)
        .collect()
}

fn is_secret_name(name: &str) -> bool {
    let name = name.to_uppercase();
    [
        "PASSWORD",
        "PASSWD",
        "SECRET",
        "TOKEN",
        "KEY",
        "CREDENTIAL",
        "DSN",
    ]
    .iter()
    .any(|word| name.contains(word))
}

/// In a Compose document `$$` is a dollar.
fn escape(text: &str) -> String {
    text.replace('$', "$$")
}

fn unescape(text: &str) -> String {
    text.replace("$$", "$")
}

fn rejected(message: &str) -> EngineError {
    EngineError::Rejected(message.to_owned())
}
