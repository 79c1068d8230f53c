//! A Compose project as far as lint needs it: which files it reaches, which images it runs, which
//! variables stay open.

use std::collections::{BTreeMap, HashMap};
use std::rc::Rc;

use super::super::interpolate::{Template, Usage};
use super::super::tree::{Tree, join, parent};
use super::super::yaml::{self, Node, Value};
use super::super::{Finding, ReleaseError, Severity, Variable, dotenv, finding};
use super::ServiceImage;
use place::{DATA, OPEN, Target, is_remote, lookup, target};

mod place;
mod service;

/// What a project holds.
#[derive(Debug, Default)]
pub(super) struct Project {
    pub(super) name: Option<String>,
    pub(super) variables: Vec<Variable>,
    pub(super) images: Vec<ServiceImage>,
}

/// Loads a project from its entry files.
pub(super) fn load(
    tree: &Tree,
    entry: &[String],
    findings: &mut Vec<Finding>,
) -> Result<Project, ReleaseError> {
    let mut loader = Loader {
        tree,
        findings,
        documents: HashMap::new(),
        usages: BTreeMap::new(),
        name: None,
        steps: 0,
    };
    let directory = entry.first().map_or("", |first| parent(first)).to_owned();
    let environment = loader.dot_env(&join(&directory, ".env"), &Environment::new())?;
    let services = loader.project(entry, &directory, &environment, &mut Vec::new())?;
    let images = loader.finish(services);
    let name = loader.name.take();
    let variables = variables(loader.usages);
    Ok(Project {
        name,
        variables,
        images,
    })
}

/// What `.env` files give: closed at publish time unless the target overrides it.
type Environment = BTreeMap<String, String>;

struct Loader<'a> {
    tree: &'a Tree,
    findings: &'a mut Vec<Finding>,
    /// Parsed files; `None` when they could not be parsed, which was reported.
    documents: HashMap<String, Option<Rc<Vec<Node>>>>,
    usages: BTreeMap<String, Vec<Known>>,
    name: Option<String>,
    steps: usize,
}

/// One use of a variable, as far as its value is known.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Known {
    /// Nothing to fall back to.
    Required,
    /// A fixed default, or the value of a `.env` file.
    Default(String),
    /// It may be missing.
    Optional,
}

/// A service after `extends` and after all files, as far as lint needs it.
#[derive(Clone, Debug, Default)]
struct Service {
    image: Option<Located>,
    build: Option<Place>,
    health: Option<(Health, Place)>,
    place: Option<Place>,
    provider: bool,
    /// Another service waits until this one has ended, so it needs no health check.
    one_shot: bool,
}

#[derive(Clone, Debug)]
struct Located {
    text: String,
    environment: Environment,
    place: Place,
}

#[derive(Clone, Debug)]
struct Place {
    file: String,
    line: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Health {
    Present,
    Disabled,
}

impl Service {
    /// Lays `over` on this.
    fn overlay(&mut self, over: Self) {
        self.image = over.image.or(self.image.take());
        self.build = over.build.or(self.build.take());
        self.health = over.health.or(self.health.take());
        self.place = over.place.or(self.place.take());
        self.provider |= over.provider;
        self.one_shot |= over.one_shot;
    }
}

type Services = BTreeMap<String, Service>;

/// Where a step of the project is read: file, base directory of relative paths, variables.
#[derive(Clone, Copy)]
struct Scope<'a> {
    file: &'a str,
    base: &'a str,
    environment: &'a Environment,
}

impl Loader<'_> {
    fn error(&mut self, file: &str, line: usize, message: &str, hint: &str) {
        self.findings
            .push(finding(Severity::Error, file, line, message, hint));
    }

    fn warning(&mut self, file: &str, line: usize, message: &str, hint: &str) {
        self.findings
            .push(finding(Severity::Warning, file, line, message, hint));
    }

    /// Loads files that are merged, with what they include.
    fn project(
        &mut self,
        files: &[String],
        directory: &str,
        environment: &Environment,
        chain: &mut Vec<String>,
    ) -> Result<Services, ReleaseError> {
        let mut services = Services::new();
        for file in files {
            if chain.contains(file) || chain.len() > MAX_CHAIN || !self.step() {
                self.error(
                    file,
                    0,
                    "the file includes itself, or too many files are included",
                    "take the circle out of `include`",
                );
                continue;
            }
            chain.push(file.clone());
            let Some(documents) = self.documents(file)? else {
                chain.pop();
                continue;
            };
            let scope = Scope {
                file,
                base: directory,
                environment,
            };
            for document in documents.iter() {
                match document.value {
                    Value::Map(_) => {
                        self.document(scope, document, &documents, &mut services, chain)?;
                    }
                    Value::Null => {}
                    _ => self.error(
                        file,
                        document.line,
                        "it is not a Compose file",
                        "its top level must be a mapping with `services`",
                    ),
                }
            }
            chain.pop();
        }
        Ok(services)
    }

    fn document(
        &mut self,
        scope: Scope<'_>,
        document: &Node,
        documents: &[Node],
        services: &mut Services,
        chain: &mut Vec<String>,
    ) -> Result<(), ReleaseError> {
        for entry in document.entries() {
            match entry.key.as_str() {
                // Closed at publish time, so these do not stay open.
                "include" | "services" => {}
                _ => self.usages(scope, &entry.value),
            }
        }
        if chain.len() == 1
            && let Some(name) = document.get("name").and_then(Node::text)
            && let Ok(template) = Template::parse(name)
        {
            let expansion = template.expand(&|name| scope.environment.get(name).cloned(), "");
            if expansion.missing.is_empty() {
                self.name = Some(expansion.text);
            }
        }
        if let Some(include) = document.get("include") {
            for item in include.one_or_many() {
                self.include(scope, item, services, chain)?;
            }
        }
        if let Some(list) = document.get("services") {
            for entry in list.entries() {
                if entry.value.reset {
                    services.remove(&entry.key);
                    continue;
                }
                let mut own = self.service(scope, documents, &entry.key, &entry.value, services)?;
                own.place = Some(scope.place(entry.line));
                services.entry(entry.key.clone()).or_default().overlay(own);
            }
            for entry in list.entries() {
                for dependency in entry.value.get("depends_on").map_or(&[][..], Node::entries) {
                    let waits = dependency.value.get("condition").and_then(Node::text);
                    if waits == Some("service_completed_successfully") {
                        services.entry(dependency.key.clone()).or_default().one_shot = true;
                    }
                }
            }
        }
        for kind in ["configs", "secrets"] {
            let what = &kind[..kind.len() - 1];
            for entry in document.get(kind).map_or(&[][..], Node::entries) {
                if let Some(file) = entry.value.get("file") {
                    self.needed_file(scope, file, what);
                }
                if let Some(name) = entry.value.get("environment").and_then(Node::text) {
                    self.usage(scope, name, Usage::Required);
                }
            }
        }
        if let Some(models) = document.get("models") {
            self.error(
                scope.file,
                models.line,
                "models cannot be pinned",
                "run the model as a service with an image",
            );
        }
        Ok(())
    }

    fn include(
        &mut self,
        scope: Scope<'_>,
        item: &Node,
        services: &mut Services,
        chain: &mut Vec<String>,
    ) -> Result<(), ReleaseError> {
        let paths = if item.text().is_some() {
            vec![item]
        } else {
            item.get("path").map(Node::one_or_many).unwrap_or_default()
        };
        let mut files = Vec::new();
        for path in paths {
            if let Some(file) = self.definition(scope, path, "include") {
                files.push(file);
            }
        }
        let Some(first) = files.first() else {
            return Ok(());
        };
        let directory = match item.get("project_directory") {
            None => parent(first).to_owned(),
            Some(node) => {
                let Some(text) = node.text() else {
                    return Ok(());
                };
                match self.target(scope, node.line, text) {
                    Target::Tree(directory) => directory,
                    Target::Invalid => return Ok(()),
                    _ => {
                        self.error(
                            scope.file,
                            node.line,
                            &format!("`project_directory: {text}` is not in the release"),
                            "name a directory of the release, relative to this file",
                        );
                        return Ok(());
                    }
                }
            }
        };
        let mut environment = Environment::new();
        match item.get("env_file") {
            None => environment = self.dot_env(&join(&directory, ".env"), &environment)?,
            Some(list) => {
                for node in list.one_or_many() {
                    if let Some(file) = self.needed_file(scope, node, "env_file") {
                        environment = self.dot_env(&file, &environment)?;
                    }
                }
            }
        }
        // What the including project knows wins.
        environment.extend(scope.environment.clone());
        let included = self.project(&files, &directory, &environment, chain)?;
        for (name, service) in included {
            services.entry(name).or_insert(service);
        }
        Ok(())
    }

    /// A Compose file that `include` or `extends` names.
    fn definition(&mut self, scope: Scope<'_>, node: &Node, what: &str) -> Option<String> {
        let text = node.text()?;
        if is_remote(text) {
            self.error(
                scope.file,
                node.line,
                &format!("`{what}` of `{text}` is remote"),
                "copy the file into the release: nothing is fetched that was not verified",
            );
            return None;
        }
        self.closed_file(scope, node.line, text, what)
    }

    /// A file that must be in the release: no variable may decide which.
    fn closed_file(
        &mut self,
        scope: Scope<'_>,
        line: usize,
        text: &str,
        what: &str,
    ) -> Option<String> {
        let inside = "copy it into the release and name it relative to this file";
        match self.target(scope, line, text) {
            Target::Tree(name) if self.tree.is_file(&name) => return Some(name),
            Target::Tree(name) => {
                let state = if self.tree.has(&name) {
                    "a directory"
                } else {
                    "not in the release"
                };
                self.error(
                    scope.file,
                    line,
                    &format!("`{what}` names `{text}`, which is {state}"),
                    "create it or mend the path; `.longshoreignore` may hide it",
                );
            }
            Target::Open(variable) => self.error(
                scope.file,
                line,
                &format!("`{what}` of `{text}` stays open: `{variable}` has no value"),
                &format!("write the path itself, or give `{variable}` a value in `.env`"),
            ),
            Target::Data => self.error(
                scope.file,
                line,
                &format!("`{what}` names `{text}`, which only a host has"),
                inside,
            ),
            Target::Host(_) => self.error(
                scope.file,
                line,
                &format!("`{what}` names the absolute path `{text}`"),
                inside,
            ),
            Target::Escapes | Target::Home => self.error(
                scope.file,
                line,
                &format!("`{what}` names `{text}`, which leaves the release"),
                inside,
            ),
            Target::Invalid => {}
        }
        None
    }

    /// A file of an `env_file`, config or secret: in the release or below `${LONGSHORE_DATA}`.
    fn needed_file(&mut self, scope: Scope<'_>, node: &Node, what: &str) -> Option<String> {
        let text = node.text()?;
        if matches!(self.target(scope, node.line, text), Target::Data) {
            return None;
        }
        self.closed_file(scope, node.line, text, what)
    }

    fn target(&mut self, scope: Scope<'_>, line: usize, text: &str) -> Target {
        let Ok(template) = Template::parse(text) else {
            self.template(scope, line, text);
            return Target::Invalid;
        };
        let expansion = template.expand(&|name| lookup(scope.environment, name), OPEN);
        target(scope.base, &expansion.text, expansion.missing.first())
    }

    /// Reports a text that is no template.
    fn template(&mut self, scope: Scope<'_>, line: usize, text: &str) -> Option<Template> {
        match Template::parse(text) {
            Ok(template) => Some(template),
            Err(error) => {
                self.error(
                    scope.file,
                    line,
                    &error.to_string(),
                    "Compose refuses this value as it stands",
                );
                None
            }
        }
    }

    /// Checks one service and what it extends.
    fn service(
        &mut self,
        scope: Scope<'_>,
        documents: &[Node],
        name: &str,
        node: &Node,
        earlier: &Services,
    ) -> Result<Service, ReleaseError> {
        let mut chain = vec![(scope.file.to_owned(), name.to_owned())];
        self.extended(scope, documents, node, earlier, &mut chain, name)
    }

    fn extended(
        &mut self,
        scope: Scope<'_>,
        documents: &[Node],
        node: &Node,
        earlier: &Services,
        chain: &mut Vec<(String, String)>,
        shown: &str,
    ) -> Result<Service, ReleaseError> {
        let mut service = Service::default();
        if let Some(extends) = node.get("extends") {
            let (base, line) = match extends.text() {
                Some(base) => (Some(base), extends.line),
                None => (
                    extends.get("service").and_then(Node::text),
                    extends
                        .get("service")
                        .map_or(extends.line, |node| node.line),
                ),
            };
            let base = base.unwrap_or(shown).to_owned();
            let file = match extends.get("file") {
                None => Some(scope.file.to_owned()),
                Some(file) => self.definition(scope, file, "extends"),
            };
            if let Some(file) = file {
                let step = (file.clone(), base.clone());
                if chain.contains(&step) || chain.len() > MAX_CHAIN || !self.step() {
                    self.error(
                        scope.file,
                        line,
                        &format!("`{shown}` extends itself, or too many services are extended"),
                        "take the circle out of `extends`",
                    );
                } else {
                    chain.push(step);
                    service = self.base(scope, documents, &file, &base, line, earlier, chain)?;
                    chain.pop();
                }
            }
        }
        service.overlay(self.own(scope, shown, node)?);
        Ok(service)
    }

    /// The service that another one extends.
    #[expect(clippy::too_many_arguments, reason = "a step of a walk, called once")]
    fn base(
        &mut self,
        scope: Scope<'_>,
        documents: &[Node],
        file: &str,
        name: &str,
        line: usize,
        earlier: &Services,
        chain: &mut Vec<(String, String)>,
    ) -> Result<Service, ReleaseError> {
        let find = |documents: &[Node]| {
            documents
                .iter()
                .rev()
                .find_map(|document| document.get("services")?.get(name).cloned())
        };
        if file == scope.file {
            return match find(documents) {
                Some(node) => self.extended(scope, documents, &node, earlier, chain, name),
                None => Ok(earlier.get(name).cloned().unwrap_or_else(|| {
                    self.missing_base(scope.file, line, name, file);
                    Service::default()
                })),
            };
        }
        let Some(documents) = self.documents(file)? else {
            return Ok(Service::default());
        };
        let directory = parent(file).to_owned();
        let scope_of_base = Scope {
            file,
            base: &directory,
            environment: scope.environment,
        };
        let Some(node) = find(&documents) else {
            self.missing_base(scope.file, line, name, file);
            return Ok(Service::default());
        };
        self.extended(
            scope_of_base,
            &documents,
            &node,
            &Services::new(),
            chain,
            name,
        )
    }

    fn missing_base(&mut self, file: &str, line: usize, name: &str, base: &str) {
        self.error(
            file,
            line,
            &format!("`extends` names the service `{name}`, which `{base}` does not have"),
            "name a service of that file",
        );
    }

    /// Reads a `.env` file, when there is one, over what is known already, which wins.
    fn dot_env(&mut self, file: &str, known: &Environment) -> Result<Environment, ReleaseError> {
        let mut environment = known.clone();
        if !self.tree.is_file(file) {
            return Ok(environment);
        }
        for assignment in self.assignments(file)? {
            self.literal_secret(file, assignment.line, &assignment.key, &assignment.value);
            let value = if assignment.interpolated {
                let scope = Scope {
                    file,
                    base: "",
                    environment: &environment,
                };
                let Some(template) = self.template(scope, assignment.line, &assignment.value)
                else {
                    continue;
                };
                let expansion = template.expand(&|name| environment.get(name).cloned(), "");
                if !expansion.missing.is_empty() {
                    let environment = environment.clone();
                    let scope = Scope {
                        file,
                        base: "",
                        environment: &environment,
                    };
                    template.usages(&mut |name, usage| self.usage(scope, name, usage));
                    continue;
                }
                expansion.text
            } else {
                assignment.value
            };
            environment.insert(assignment.key, value);
        }
        Ok(environment)
    }

    fn assignments(&mut self, file: &str) -> Result<Vec<dotenv::Assignment>, ReleaseError> {
        let content = self.tree.read(file, MAX_FILE)?;
        match dotenv::parse(&String::from_utf8_lossy(&content)) {
            Ok(assignments) => Ok(assignments),
            Err((line, message)) => {
                self.error(
                    file,
                    line,
                    &message,
                    "Compose refuses the file as it stands",
                );
                Ok(Vec::new())
            }
        }
    }

    fn documents(&mut self, file: &str) -> Result<Option<Rc<Vec<Node>>>, ReleaseError> {
        if let Some(known) = self.documents.get(file) {
            return Ok(known.clone());
        }
        let content = self.tree.read(file, MAX_FILE)?;
        let parsed = match String::from_utf8(content) {
            Err(_) => {
                self.error(file, 0, "it is not UTF-8", "save it as UTF-8");
                None
            }
            Ok(text) => match yaml::parse(&text) {
                Ok(documents) => Some(Rc::new(documents)),
                Err(error) => {
                    self.error(
                        file,
                        error.line,
                        &format!("it is not YAML that can be read: {}", error.message),
                        "mend it; `docker compose config` says the same",
                    );
                    None
                }
            },
        };
        self.documents.insert(file.to_owned(), parsed.clone());
        Ok(parsed)
    }

    /// Takes in the variables of all values below a node.
    fn usages(&mut self, scope: Scope<'_>, node: &Node) {
        match &node.value {
            Value::Null => {}
            Value::Scalar(text) => {
                if text.contains('$')
                    && let Some(template) = self.template(scope, node.line, text)
                {
                    template.usages(&mut |name, usage| self.usage(scope, name, usage));
                }
            }
            Value::List(items) => {
                for item in items {
                    self.usages(scope, item);
                }
            }
            Value::Map(entries) => {
                for entry in entries {
                    self.usages(scope, &entry.value);
                }
            }
        }
    }

    fn usage(&mut self, scope: Scope<'_>, name: &str, usage: Usage) {
        if name == DATA || name == "COMPOSE_PROJECT_NAME" {
            return;
        }
        let known = match (scope.environment.get(name), usage) {
            (Some(value), _) => Known::Default(value.clone()),
            (None, Usage::Required) => Known::Required,
            (None, Usage::Default(Some(text))) => Known::Default(text),
            (None, Usage::Default(None) | Usage::Optional) => Known::Optional,
        };
        let usages = self.usages.entry(name.to_owned()).or_default();
        if !usages.contains(&known) {
            usages.push(known);
        }
    }

    /// Bounds the work that foreign files can ask for.
    fn step(&mut self) -> bool {
        self.steps += 1;
        self.steps <= MAX_STEPS
    }
}

impl Scope<'_> {
    fn place(&self, line: usize) -> Place {
        Place {
            file: self.file.to_owned(),
            line,
        }
    }
}

/// One line per variable. A default counts only when all uses agree on it: otherwise filling it in
/// would change what the definition means.
fn variables(usages: BTreeMap<String, Vec<Known>>) -> Vec<Variable> {
    usages
        .into_iter()
        .map(|(name, usages)| {
            let required = usages.contains(&Known::Required);
            // Uses are kept once each, so one is left where all agree.
            let default = match usages.as_slice() {
                [Known::Default(text)] => Some(text.clone()),
                _ => None,
            };
            Variable {
                name,
                default,
                required,
            }
        })
        .collect()
}

const MAX_CHAIN: usize = 32;
const MAX_FILE: u64 = 8 << 20;
const MAX_STEPS: usize = 2000;
