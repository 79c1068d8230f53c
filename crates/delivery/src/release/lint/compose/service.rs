//! One service: what stands in it, and what it is once everything it extends is known.

use oci::{Algorithm, Reference};

use super::super::super::ReleaseError;
use super::super::super::interpolate::{Template, Usage};
use super::super::super::yaml::{Node, Value};
use super::super::{ServiceImage, credential};
use super::place::{OPEN, Target, is_engine_socket, lookup, target};
use super::{Health, Loader, Located, Place, Scope, Service, Services};

impl Loader<'_> {
    /// Checks what stands in one service itself.
    pub(super) fn own(
        &mut self,
        scope: Scope<'_>,
        name: &str,
        node: &Node,
    ) -> Result<Service, ReleaseError> {
        for entry in node.entries() {
            match entry.key.as_str() {
                "image" | "extends" => {}
                _ => self.usages(scope, &entry.value),
            }
        }
        let image = node.get("image").and_then(|node| {
            Some(Located {
                text: node.text()?.to_owned(),
                environment: scope.environment.clone(),
                place: scope.place(node.line),
            })
        });
        let health = node.get("healthcheck").map(|node| {
            let disabled = node.get("disable").is_some_and(Node::is_true)
                || node.get("test").is_some_and(|test| {
                    test.one_or_many().first().and_then(|first| first.text()) == Some("NONE")
                });
            let health = if disabled {
                Health::Disabled
            } else {
                Health::Present
            };
            (health, scope.place(node.line))
        });
        self.privileges(scope, name, node);
        self.environment(scope, node);
        for key in ["env_file", "label_file"] {
            let Some(list) = node.get(key) else { continue };
            for item in list.one_or_many() {
                let path = item.get("path").unwrap_or(item);
                let optional = item
                    .get("required")
                    .is_some_and(|required| !required.is_true());
                if optional
                    && let Some(text) = path.text()
                    && let Target::Tree(name) = self.target(scope, path.line, text)
                    && !self.tree.has(&name)
                {
                    continue;
                }
                if let Some(file) = self.needed_file(scope, path, key)
                    && key == "env_file"
                    && item.get("format").and_then(Node::text) != Some("raw")
                {
                    self.env_file(scope, &file)?;
                }
            }
        }
        for item in node.get("volumes").map_or(&[][..], Node::items) {
            self.volume(scope, name, item);
        }
        Ok(Service {
            image,
            build: node.get("build").map(|node| scope.place(node.line)),
            health,
            place: None,
            provider: node.get("provider").is_some(),
            one_shot: false,
        })
    }

    fn privileges(&mut self, scope: Scope<'_>, name: &str, node: &Node) {
        if let Some(privileged) = node.get("privileged").filter(|node| node.is_true()) {
            self.warning(
                scope.file,
                privileged.line,
                &format!("`{name}` is privileged: it can do anything on the host"),
                "name the capabilities and devices that it needs instead",
            );
        }
        for (key, space) in [
            ("pid", "process"),
            ("ipc", "IPC"),
            ("network_mode", "network"),
            ("uts", "host name"),
            ("userns_mode", "user"),
            ("cgroup", "cgroup"),
        ] {
            if let Some(host) = node.get(key).filter(|node| node.text() == Some("host")) {
                self.warning(
                    scope.file,
                    host.line,
                    &format!("`{name}` shares the host's {space} namespace"),
                    &format!("leave out `{key}: host` unless it is needed"),
                );
            }
        }
        if let Some(socket) = node.get("use_api_socket").filter(|node| node.is_true()) {
            self.engine_socket(scope, socket.line, name);
        }
    }

    fn engine_socket(&mut self, scope: Scope<'_>, line: usize, name: &str) {
        self.warning(
            scope.file,
            line,
            &format!("`{name}` gets the engine's socket: it can do anything on the host"),
            "put a proxy that allows only what it needs in front of the socket",
        );
    }

    fn environment(&mut self, scope: Scope<'_>, node: &Node) {
        let Some(environment) = node.get("environment") else {
            return;
        };
        for entry in environment.entries() {
            match &entry.value.value {
                Value::Null if !entry.value.reset => {
                    self.usage(scope, &entry.key, Usage::Optional);
                }
                Value::Scalar(value) => {
                    self.literal_secret(scope.file, entry.value.line, &entry.key, value);
                }
                _ => {}
            }
        }
        for item in environment.items() {
            match item.text().map(|text| (text, text.split_once('='))) {
                Some((name, None)) if !name.contains('$') => {
                    self.usage(scope, name, Usage::Optional);
                }
                Some((_, Some((name, value)))) => {
                    self.literal_secret(scope.file, item.line, name, value);
                }
                _ => {}
            }
        }
    }

    pub(super) fn literal_secret(&mut self, file: &str, line: usize, name: &str, value: &str) {
        if !value.is_empty() && !value.contains('$') && credential::is_secret_name(name) {
            self.warning(
                file,
                line,
                &format!("`{name}` has a literal value that everyone who can pull the release reads"),
                &format!("let the target give it: `${{{name}:?}}`, or a secret file below `${{LONGSHORE_DATA}}`"),
            );
        }
    }

    fn volume(&mut self, scope: Scope<'_>, name: &str, item: &Node) {
        let (source, line, read_only) = if let Some(text) = item.text() {
            let Ok(template) = Template::parse(text) else {
                return;
            };
            let expansion = template.expand(&|name| lookup(scope.environment, name), OPEN);
            let parts: Vec<&str> = expansion.text.split(':').collect();
            // Compose takes anything else for the name of a volume.
            if parts.len() < 2 || !parts[0].starts_with(['.', '/', '~', '\u{1}']) {
                return;
            }
            let read_only = parts
                .get(2)
                .is_some_and(|mode| mode.split(',').any(|option| option == "ro"));
            let open = expansion
                .missing
                .first()
                .filter(|_| parts[0].contains(OPEN));
            (target(scope.base, parts[0], open), item.line, read_only)
        } else {
            match item.get("type").and_then(Node::text) {
                Some("bind") => {}
                Some("image") => {
                    self.error(
                        scope.file,
                        item.line,
                        &format!("the image volume of `{name}` cannot be pinned"),
                        "put the files into the release or into the service's own image",
                    );
                    return;
                }
                _ => return,
            }
            let Some((node, text)) = item
                .get("source")
                .and_then(|node| Some((node, node.text()?)))
            else {
                return;
            };
            let read_only = item.get("read_only").is_some_and(Node::is_true);
            (self.target(scope, node.line, text), node.line, read_only)
        };
        match source {
            Target::Tree(path) if !self.tree.has(&path) => self.error(
                scope.file,
                line,
                &format!("`{name}` binds `{path}`, which the release does not hold"),
                "data that is written belongs into a named volume or below `${LONGSHORE_DATA}`; a file \
                 that is only read must be in the release (`.longshoreignore` may hide it)",
            ),
            Target::Tree(path) if !read_only => {
                let path = if path.is_empty() { "." } else { &path };
                self.warning(
                    scope.file,
                    line,
                    &format!("`{name}` binds `{path}` of the release without `:ro`"),
                    "it is mounted read-only all the same: a release never changes; write `:ro`",
                );
            }
            Target::Escapes | Target::Home => self.error(
                scope.file,
                line,
                &format!("`{name}` binds a path that leaves the release"),
                "use a path in the release, a named volume, `${LONGSHORE_DATA}` or an absolute path",
            ),
            Target::Host(path) if is_engine_socket(&path) => {
                self.engine_socket(scope, line, name);
            }
            Target::Open(variable) => self.warning(
                scope.file,
                line,
                &format!("`{name}` binds a path that depends on `{variable}`, it cannot be checked"),
                "the agent refuses it when it is relative and the release does not hold it",
            ),
            Target::Tree(_) | Target::Data | Target::Host(_) | Target::Invalid => {}
        }
    }

    /// Variables inside the values of an `env_file`.
    fn env_file(&mut self, scope: Scope<'_>, file: &str) -> Result<(), ReleaseError> {
        let mut known = scope.environment.clone();
        for assignment in self.assignments(file)? {
            self.literal_secret(file, assignment.line, &assignment.key, &assignment.value);
            if assignment.interpolated {
                let scope = Scope {
                    file,
                    base: scope.base,
                    environment: &known,
                };
                if let Some(template) = self.template(scope, assignment.line, &assignment.value) {
                    template.usages(&mut |name, usage| {
                        // Compose puts nothing in for what is missing here.
                        let usage = match usage {
                            Usage::Required => Usage::Optional,
                            other => other,
                        };
                        self.usage(scope, name, usage);
                    });
                }
            }
            known.insert(assignment.key, assignment.value);
        }
        Ok(())
    }

    /// Judges the services as a whole and gives their images.
    pub(super) fn finish(&mut self, services: Services) -> Vec<ServiceImage> {
        let mut images = Vec::new();
        for (name, service) in services {
            // A name that is only waited for is Compose's to refuse.
            let Some(place) = service.place else { continue };
            match (&service.image, &service.build) {
                _ if service.provider => self.error(
                    &place.file,
                    place.line,
                    &format!("`{name}` is run by a provider and cannot be pinned"),
                    "run it as a service with an image",
                ),
                (Some(image), _) => images.extend(self.image(&name, image)),
                (None, Some(build)) => self.error(
                    &build.file,
                    build.line,
                    &format!("`{name}` has only `build`, so no image can be pinned"),
                    "build and push the image first, then name it with `image`",
                ),
                (None, None) => self.error(
                    &place.file,
                    place.line,
                    &format!("`{name}` has no image"),
                    "name one with `image`",
                ),
            }
            match &service.health {
                Some((Health::Disabled, place)) => self.warning(
                    &place.file,
                    place.line,
                    &format!("the health check of `{name}` is switched off"),
                    "with one, a release that starts but does not work is rolled back",
                ),
                None if !service.one_shot => self.warning(
                    &place.file,
                    place.line,
                    &format!("`{name}` has no health check here"),
                    "add `healthcheck`, unless its image has one: a release that starts but does not work is \
                     then rolled back",
                ),
                _ => {}
            }
        }
        images
    }

    fn image(&mut self, service: &str, image: &Located) -> Option<ServiceImage> {
        let Place { file, line } = &image.place;
        let scope = Scope {
            file,
            base: "",
            environment: &image.environment,
        };
        let template = self.template(scope, *line, &image.text)?;
        let expansion = template.expand(&|name| image.environment.get(name).cloned(), "");
        if let Some(variable) = expansion.missing.first() {
            self.error(
                file,
                *line,
                &format!("the image of `{service}` stays open: `{variable}` has no value"),
                &format!("write the tag itself, or give `{variable}` a value in `.env`, so that it can be pinned"),
            );
            return None;
        }
        let text = expansion.text;
        let reference = match Reference::parse_familiar(&text) {
            Ok(reference) => reference,
            Err(error) => {
                self.error(
                    file,
                    *line,
                    &format!("the image of `{service}` is no reference: {error}"),
                    "write it as `host/repository:tag`",
                );
                return None;
            }
        };
        if reference
            .digest
            .as_ref()
            .is_some_and(|digest| digest.algorithm() != Algorithm::Sha256)
        {
            self.error(
                file,
                *line,
                &format!("the image of `{service}` is named by a digest other than sha256"),
                "name it by its sha256 digest or by a tag: engines pull by sha256",
            );
            return None;
        }
        if !template.is_literal() {
            self.warning(
                file,
                *line,
                &format!("the image of `{service}` is fixed to `{text}`"),
                "its variables are filled in when the release is made; a target that sets them is refused",
            );
        }
        Some(ServiceImage {
            service: service.to_owned(),
            text,
            reference,
            file: file.clone(),
            line: *line,
        })
    }
}
