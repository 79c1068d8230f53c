//! From the resolved project to the one that is applied: images by digest, mounted content by content, and a definition hash per service.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path, PathBuf};

use oci::{Algorithm, Digest, Platform, Reference};
use serde_json::{Map, Value, json};

use super::content::{self, Content, ContentError};
use super::model;
use super::redact::Redactor;
use crate::engine::{Deployment, EngineError};

/// The label that names the target.
pub(super) const TARGET_LABEL: &str = "dev.longshore.target";
/// The label with a service's definition hash. It changes exactly when the service must be made anew; Compose's own hash covers neither the content of
/// configs and secrets nor networks and volumes, and changes between versions.
pub(super) const DEFINITION_LABEL: &str = "dev.longshore.definition";

/// A project that is ready to be planned with.
#[derive(Debug)]
pub(super) struct Resolved {
    /// The definition that Compose is given, with real (unescaped) values. Holds secrets.
    pub(super) model: Value,
    /// What each service is to be.
    pub(super) services: BTreeMap<String, Wanted>,
    /// What must be placed before it is applied.
    pub(super) contents: Vec<Content>,
    /// Directories of persistent data that binds name.
    pub(super) data: BTreeSet<PathBuf>,
    /// Takes the secrets out of text.
    pub(super) redactor: Redactor,
    /// Things to know.
    pub(super) notes: Vec<String>,
}

/// What a service is to be.
#[derive(Clone, Debug)]
pub(super) struct Wanted {
    /// The definition hash, 64 hexadecimal digits.
    pub(super) definition: String,
    /// What the definition hash is made of: name for people → canonical value. Holds secrets.
    pub(super) parts: BTreeMap<String, String>,
    /// How many containers.
    pub(super) replicas: u64,
    /// The image, by digest.
    pub(super) image: Reference,
    /// Services whose containers this one's refer to by id (`network_mode: service:…`, `volumes_from`): made anew with them.
    pub(super) parents: BTreeSet<String>,
    /// The platform that the definition asks for; else the host's.
    pub(super) platform: Option<String>,
    /// What the image exists for, as pinned; empty when nobody wrote it down.
    pub(super) platforms: Vec<Platform>,
}

impl Wanted {
    /// The image as Compose and the engine are told: `repository@digest`.
    pub(super) fn image_text(&self) -> String {
        self.image.to_string()
    }

    /// Whether `text` names the same image: `busybox@…` is `docker.io/library/busybox@…`.
    pub(super) fn is_image(&self, text: &str) -> bool {
        Reference::parse_familiar(text).is_ok_and(|image| image == self.image)
    }
}

/// Rewrites `model`, which the plugin resolved from the release. Reads mounted files to name them, writes nothing.
pub(super) fn rewrite(
    mut model: Value,
    deployment: &Deployment,
    content_root: &Path,
) -> Result<Resolved, EngineError> {
    let mut rewriter = Rewriter {
        deployment,
        content_root,
        contents: BTreeMap::new(),
        data: BTreeSet::new(),
    };
    let redactor = redactor(&model, deployment);
    let top = model
        .as_object_mut()
        .ok_or_else(|| rejected("the resolved project is not an object"))?;
    top.retain(|name, _| !name.starts_with("x-") && name != "version");

    for kind in [Kind::Config, Kind::Secret] {
        if let Some(definitions) = top.get_mut(kind.section()).and_then(Value::as_object_mut) {
            for (name, definition) in definitions {
                rewriter.file_definition(kind, name, definition)?;
            }
        }
    }
    if let Some(volumes) = top.get("volumes").and_then(Value::as_object) {
        for (name, volume) in volumes {
            rewriter.named_volume(name, volume)?;
        }
    }
    let shared: Map<String, Value> = ["configs", "secrets", "networks", "volumes"]
        .into_iter()
        .filter_map(|name| Some((name.to_owned(), top.get(name)?.clone())))
        .collect();

    let mut services = BTreeMap::new();
    let definitions = top
        .get_mut("services")
        .and_then(Value::as_object_mut)
        .filter(|services| !services.is_empty());
    let Some(definitions) = definitions else {
        return Err(rejected(
            "the release has no service that is active: is a profile missing from the target's `profiles`?",
        ));
    };
    for (name, service) in definitions {
        let service = service
            .as_object_mut()
            .ok_or_else(|| rejected(format!("service `{name}` is not an object")))?;
        let wanted = rewriter.service(name, service, &shared)?;
        services.insert(name.clone(), wanted);
    }
    Ok(Resolved {
        services,
        contents: rewriter.contents.into_values().collect(),
        data: rewriter.data,
        redactor,
        notes: Vec::new(),
        model,
    })
}

#[derive(Clone, Copy)]
enum Kind {
    Config,
    Secret,
}

impl Kind {
    const fn section(self) -> &'static str {
        match self {
            Self::Config => "configs",
            Self::Secret => "secrets",
        }
    }

    const fn word(self) -> &'static str {
        match self {
            Self::Config => "config",
            Self::Secret => "secret",
        }
    }
}

struct Rewriter<'a> {
    deployment: &'a Deployment,
    content_root: &'a Path,
    contents: BTreeMap<PathBuf, Content>,
    data: BTreeSet<PathBuf>,
}

/// What a path on this host is to a release.
enum Source {
    /// A file or directory of the release, and where its copy stands.
    Release(PathBuf),
    /// Persistent data of the target.
    Data,
    /// A path that the author named in full.
    Host,
}

impl Rewriter<'_> {
    fn service(
        &mut self,
        name: &str,
        service: &mut Map<String, Value>,
        shared: &Map<String, Value>,
    ) -> Result<Wanted, EngineError> {
        if service.contains_key("provider") {
            return Err(rejected(format!(
                "service `{name}` has a `provider`, a program on the host that no release can pin; use an image"
            )));
        }
        service.retain(|key, _| !key.starts_with("x-"));
        for key in [
            "build",
            "pull_policy",
            "develop",
            "profiles",
            "env_file",
            "label_file",
        ] {
            service.remove(key);
        }
        let (image, platforms) = self.image(name, service.get("image").and_then(Value::as_str))?;
        service.insert("image".to_owned(), image.to_string().into());

        if let Some(volumes) = service.get_mut("volumes").and_then(Value::as_array_mut) {
            for volume in volumes {
                self.mount(name, volume)?;
            }
        }
        let replicas = replicas(service);
        let parts = self.parts(service, shared);
        let definition = definition(&parts);

        let labels = service.entry("labels").or_insert_with(|| json!({}));
        let Some(labels) = labels.as_object_mut() else {
            return Err(rejected(format!(
                "the labels of service `{name}` are not resolved to names and values"
            )));
        };
        labels.insert(
            TARGET_LABEL.to_owned(),
            self.deployment.target.name.clone().into(),
        );
        labels.insert(DEFINITION_LABEL.to_owned(), definition.clone().into());
        let platform = service
            .get("platform")
            .and_then(Value::as_str)
            .map(str::to_owned);
        Ok(Wanted {
            definition,
            parts,
            replicas,
            image,
            parents: parents(service),
            platform,
            platforms,
        })
    }

    /// The image by digest: from the release's pins, or as written where a foreign format carries none.
    fn image(
        &self,
        service: &str,
        image: Option<&str>,
    ) -> Result<(Reference, Vec<Platform>), EngineError> {
        let Some(image) = image else {
            return Err(rejected(format!(
                "service `{service}` has no image: a release cannot build one; push the image and name it with `image:`"
            )));
        };
        let reference = Reference::parse_familiar(image).map_err(|error| {
            rejected(format!(
                "the image `{image}` of service `{service}` is not a reference: {error}"
            ))
        })?;
        let pins = &self.deployment.config.images;
        if pins.is_empty() {
            let Some(digest) = reference.digest.clone() else {
                return Err(rejected(format!(
                    "the image `{image}` of service `{service}` is not pinned; write it as `{image}@sha256:…`, or publish with `longshore release push`"
                )));
            };
            return Ok((by_digest(&reference, digest, service)?, Vec::new()));
        }
        let Some(pin) = pins.iter().find(|pin| pin.service == service) else {
            return Err(rejected(format!(
                "the release pins no image for service `{service}`; publish it again with `longshore release push`"
            )));
        };
        let same = pin.reference == image
            || Reference::parse_familiar(&pin.reference).is_ok_and(|pinned| pinned == reference);
        if !same {
            return Err(rejected(format!(
                "service `{service}` resolves to image `{image}`, and the release pins `{}`; a variable or an override must not change a pinned image",
                pin.reference
            )));
        }
        if reference
            .digest
            .as_ref()
            .is_some_and(|digest| *digest != pin.digest)
        {
            return Err(rejected(format!(
                "service `{service}` names image `{image}`, and the release pins it to `{}`",
                pin.digest
            )));
        }
        Ok((
            by_digest(&reference, pin.digest.clone(), service)?,
            pin.platforms.clone(),
        ))
    }

    /// A mount of a service. Mutable content never comes out of a release, so what does is read-only.
    fn mount(&mut self, service: &str, volume: &mut Value) -> Result<(), EngineError> {
        let Some(volume) = volume.as_object_mut() else {
            return Err(rejected(format!(
                "a volume of service `{service}` is not resolved to its long form"
            )));
        };
        let kind = volume
            .get("type")
            .and_then(Value::as_str)
            .unwrap_or_default()
            .to_owned();
        match kind.as_str() {
            "bind" => {}
            "image" => {
                return Err(rejected(format!(
                    "service `{service}` mounts an image, which no release can pin yet; use a file, a config or a volume"
                )));
            }
            _ => return Ok(()),
        }
        let Some(source) = volume
            .get("source")
            .and_then(Value::as_str)
            .map(PathBuf::from)
        else {
            return Err(rejected(format!(
                "a bind of service `{service}` has no source"
            )));
        };
        match self.source(&source, &format!("service `{service}`"))? {
            Source::Release(path) => {
                volume.insert("source".to_owned(), text(&path)?);
                volume.insert("read_only".to_owned(), true.into());
            }
            Source::Data => {
                self.data.insert(normal(&source));
            }
            Source::Host => {}
        }
        Ok(())
    }

    /// A config or secret at the top level.
    fn file_definition(
        &mut self,
        kind: Kind,
        name: &str,
        definition: &mut Value,
    ) -> Result<(), EngineError> {
        let Some(definition) = definition.as_object_mut() else {
            return Ok(());
        };
        if let Some(file) = definition
            .get("file")
            .and_then(Value::as_str)
            .map(PathBuf::from)
            && let Source::Release(path) =
                self.source(&file, &format!("{} `{name}`", kind.word()))?
        {
            definition.insert("file".to_owned(), text(&path)?);
        }
        if let Some(variable) = definition.get("environment").and_then(Value::as_str)
            && !self.deployment.variables.contains_key(variable)
        {
            return Err(rejected(format!(
                "{} `{name}` takes variable `{variable}`, which the target does not set; add it to the target's `variables`",
                kind.word()
            )));
        }
        Ok(())
    }

    /// A named volume may be a bind in disguise (`driver_opts: {o: bind, device: …}`).
    fn named_volume(&self, name: &str, volume: &Value) -> Result<(), EngineError> {
        let options = volume.get("driver_opts");
        let device = options
            .and_then(|options| options.get("device"))
            .and_then(Value::as_str);
        let bind = options
            .and_then(|options| options.get("o"))
            .and_then(Value::as_str)
            .is_some_and(|o| o.split(',').any(|word| word.trim() == "bind"));
        if let Some(device) = device.filter(|_| bind) {
            let path = normal(Path::new(device));
            if path.is_relative() || path.starts_with(normal(&self.deployment.directory)) {
                return Err(rejected(format!(
                    "volume `{name}` binds `{device}` out of the release, whose directory is replaced by the next one; use a plain volume, or a path below `${{LONGSHORE_DATA}}`"
                )));
            }
        }
        Ok(())
    }

    fn source(&mut self, source: &Path, what: &str) -> Result<Source, EngineError> {
        let path = normal(source);
        let release = normal(&self.deployment.directory);
        if path.starts_with(&release) {
            let relative = path.strip_prefix(&release).unwrap_or(&path).to_owned();
            let shown = if relative.as_os_str().is_empty() {
                ".".to_owned()
            } else {
                relative.display().to_string()
            };
            // A link inside the release may lead to another file of it, and nowhere else.
            let real = match std::fs::canonicalize(&path) {
                Ok(real) => real,
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                    return Err(rejected(format!(
                        "{what} mounts `{shown}`, which is not in the release; add the file, or use a volume or a path below `${{LONGSHORE_DATA}}` for data"
                    )));
                }
                Err(error) => {
                    return Err(EngineError::Unavailable(format!(
                        "cannot read `{shown}` of the release: {error}"
                    )));
                }
            };
            let root = std::fs::canonicalize(&release).map_err(|error| {
                EngineError::Unavailable(format!("cannot read the release's directory: {error}"))
            })?;
            if !real.starts_with(&root) {
                return Err(rejected(format!(
                    "{what} mounts `{shown}`, a link that leaves the release"
                )));
            }
            let content = if let Some(content) = self.contents.get(&real) {
                content.clone()
            } else {
                let name = content::name(&real).map_err(|error| match error {
                    ContentError::Io { .. } => EngineError::Unavailable(error.to_string()),
                    _ => rejected(format!("{what} mounts `{shown}`: {error}")),
                })?;
                let content = Content {
                    name,
                    source: real.clone(),
                };
                self.contents.insert(real, content.clone());
                content
            };
            return Ok(Source::Release(
                self.content_root.join(content.name.as_str()),
            ));
        }
        if path.starts_with(normal(&self.deployment.data)) {
            return Ok(Source::Data);
        }
        // `../x` is resolved against the release's directory, so what it names lies among the agent's own files.
        let beside = release.parent().filter(|parent| parent.parent().is_some());
        if path.is_relative()
            || beside.is_some_and(|beside| path.starts_with(beside))
            || path.starts_with(normal(&self.deployment.state))
        {
            return Err(rejected(format!(
                "{what} mounts `{}`, which is outside the release; use a volume, or a path below `${{LONGSHORE_DATA}}`",
                source.display()
            )));
        }
        Ok(Source::Host)
    }

    /// All that makes a service what it is, by names that a reason can show.
    fn parts(
        &self,
        service: &Map<String, Value>,
        shared: &Map<String, Value>,
    ) -> BTreeMap<String, String> {
        let mut parts = BTreeMap::new();
        let definition = |section: &str, name: &str| {
            shared
                .get(section)
                .and_then(|definitions| definitions.get(name))
                .cloned()
                .unwrap_or(Value::Null)
        };
        for (key, value) in service {
            match (key.as_str(), value) {
                // These decide how many containers there are and when they start, not what they are.
                ("depends_on" | "scale", _) => {}
                ("deploy", Value::Object(deploy)) => {
                    let mut deploy = deploy.clone();
                    deploy.remove("replicas");
                    insert(&mut parts, "`deploy`".to_owned(), &Value::Object(deploy));
                }
                ("environment", Value::Object(variables)) => {
                    for (name, value) in variables {
                        parts.insert(format!("environment `{name}`"), model::canonical(value));
                    }
                }
                ("labels", Value::Object(labels)) => {
                    for (name, value) in labels {
                        parts.insert(format!("label `{name}`"), model::canonical(value));
                    }
                }
                ("volumes", Value::Array(volumes)) => {
                    for volume in volumes {
                        let mut volume = volume.clone();
                        // Plugin versions differ in whether they print this default.
                        if let Some(bind) = volume.get_mut("bind").and_then(Value::as_object_mut) {
                            bind.remove("create_host_path");
                        }
                        let target = volume
                            .get("target")
                            .and_then(Value::as_str)
                            .unwrap_or_default()
                            .to_owned();
                        let named = match (
                            volume.get("type").and_then(Value::as_str),
                            volume.get("source").and_then(Value::as_str),
                        ) {
                            (Some("volume"), Some(source)) => definition("volumes", source),
                            _ => Value::Null,
                        };
                        insert(
                            &mut parts,
                            format!("mount `{target}`"),
                            &json!([volume, named]),
                        );
                    }
                }
                ("configs" | "secrets", Value::Array(entries)) => {
                    for entry in entries {
                        let name = entry
                            .get("source")
                            .and_then(Value::as_str)
                            .unwrap_or_default();
                        let definition = definition(key, name);
                        let variable = definition
                            .get("environment")
                            .and_then(Value::as_str)
                            .and_then(|name| self.deployment.variables.get(name));
                        let word = key.strip_suffix('s').unwrap_or(key);
                        insert(
                            &mut parts,
                            format!("{word} `{name}`"),
                            &json!([entry, definition, variable]),
                        );
                    }
                }
                ("networks", Value::Object(networks)) => {
                    for (name, entry) in networks {
                        insert(
                            &mut parts,
                            format!("network `{name}`"),
                            &json!([entry, definition("networks", name)]),
                        );
                    }
                }
                (key, value) => insert(&mut parts, format!("`{key}`"), value),
            }
        }
        parts
    }
}

/// Adds a part. What says nothing is left out, so that a plugin that prints more emptiness changes no hash.
fn insert(parts: &mut BTreeMap<String, String>, name: String, value: &Value) {
    let canonical = model::canonical(value);
    if canonical == "null" {
        return;
    }
    // Two mounts on one target, two entries of one config: both count.
    parts
        .entry(name)
        .and_modify(|before| *before = format!("{before}\n{canonical}"))
        .or_insert(canonical);
}

fn definition(parts: &BTreeMap<String, String>) -> String {
    let text = serde_json::to_string(&(DEFINITION_VERSION, parts)).unwrap_or_default();
    Digest::sha256(text.as_bytes()).hex()
}

fn replicas(service: &Map<String, Value>) -> u64 {
    let scale = service.get("scale").and_then(Value::as_u64);
    let deploy = service
        .get("deploy")
        .and_then(|deploy| deploy.get("replicas"))
        .and_then(Value::as_u64);
    scale.or(deploy).unwrap_or(1)
}

fn parents(service: &Map<String, Value>) -> BTreeSet<String> {
    let namespaces = ["network_mode", "ipc", "pid"]
        .into_iter()
        .filter_map(|key| service.get(key)?.as_str()?.strip_prefix("service:"));
    let volumes = service
        .get("volumes_from")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .filter_map(Value::as_str);
    let volumes = volumes
        .filter(|from| !from.starts_with("container:"))
        .map(|from| from.split_once(':').map_or(from, |(name, _)| name));
    namespaces.chain(volumes).map(str::to_owned).collect()
}

fn by_digest(
    reference: &Reference,
    digest: Digest,
    service: &str,
) -> Result<Reference, EngineError> {
    if digest.algorithm() != Algorithm::Sha256 {
        return Err(rejected(format!(
            "the image of service `{service}` is pinned by {}, which Docker does not pull; pin it by sha256",
            digest.algorithm().name()
        )));
    }
    Ok(reference.with_digest(digest))
}

/// A path without `.` and `..`, by names alone.
fn normal(path: &Path) -> PathBuf {
    let mut result = PathBuf::new();
    for component in path.components() {
        match component {
            Component::CurDir => {}
            Component::ParentDir => {
                if !result.pop() {
                    result.push("..");
                }
            }
            other => result.push(other),
        }
    }
    result
}

fn text(path: &Path) -> Result<Value, EngineError> {
    path.to_str().map(Into::into).ok_or_else(|| {
        EngineError::Unavailable(format!(
            "the path `{}` is not UTF-8; move the agent's directory",
            path.display()
        ))
    })
}

/// Knows every value that must not be seen: variables, secrets, and environment with a telling name.
fn redactor(model: &Value, deployment: &Deployment) -> Redactor {
    let mut values: Vec<String> = deployment
        .variables
        .iter()
        .filter(|(name, _)| *name != DATA_VARIABLE)
        .map(|(_, value)| value.clone())
        .collect();
    for secret in members(model.get("secrets")) {
        if let Some(content) = secret.get("content").and_then(Value::as_str) {
            values.push(content.to_owned());
        }
        if let Some(file) = secret.get("file").and_then(Value::as_str) {
            let mut bytes = Vec::new();
            if std::fs::File::open(file)
                .and_then(|file| {
                    std::io::Read::read_to_end(
                        &mut std::io::Read::take(file, SECRET_LIMIT),
                        &mut bytes,
                    )
                })
                .is_ok()
            {
                values.push(String::from_utf8_lossy(&bytes).into_owned());
            }
        }
    }
    for service in members(model.get("services")) {
        for (name, value) in service
            .get("environment")
            .and_then(Value::as_object)
            .into_iter()
            .flatten()
        {
            let upper = name.to_ascii_uppercase();
            if let Some(value) = value
                .as_str()
                .filter(|_| SECRET_WORDS.iter().any(|word| upper.contains(word)))
            {
                values.push(value.to_owned());
            }
        }
    }
    Redactor::new(values.iter().map(String::as_str))
}

fn members(value: Option<&Value>) -> impl Iterator<Item = &Value> {
    value
        .and_then(Value::as_object)
        .into_iter()
        .flat_map(Map::values)
}

fn rejected(message: impl Into<String>) -> EngineError {
    EngineError::Rejected(message.into())
}

/// Stands before everything that is hashed. A change recreates every container once.
const DEFINITION_VERSION: &str = "longshore compose definition 1";
const DATA_VARIABLE: &str = "LONGSHORE_DATA";
const SECRET_LIMIT: u64 = 64 * 1024;
const SECRET_WORDS: [&str; 8] = [
    "PASS",
    "SECRET",
    "TOKEN",
    "KEY",
    "CREDENTIAL",
    "DSN",
    "AUTH",
    "PRIVATE",
];

#[cfg(test)]
pub(super) mod tests;
