//! The server's configuration file: YAML, strict, every key also from the environment.
//!
//! Two steps: [`Raw`] is what was written; [`Config`] is what it means and cannot be invalid. A key
//! from the environment is named by its path: `LONGSHORE_SERVER__LISTEN` is `server.listen`.

mod backup;
mod gc;
mod redirect;
mod retention;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use store::{DatabaseLocation, Location, ObjectLocation, S3Location};

use crate::output::{Exit, Refused};

/// What a server needs to know, checked.
#[derive(Clone, Debug)]
pub(crate) struct Config {
    /// Addresses to listen on.
    pub(crate) listen: Vec<SocketAddr>,
    /// Where the server is reached from outside; sets the token realm.
    pub(crate) public_url: Option<String>,
    /// Certificate and key files.
    pub(crate) tls: Option<(PathBuf, PathBuf)>,
    /// At most so many connections at once.
    pub(crate) connections: Option<usize>,
    /// How long a request's head may take.
    pub(crate) header_timeout: Option<Duration>,
    /// The longest manifest, in bytes.
    pub(crate) manifest_bytes: Option<u64>,
    /// How long requests may finish after SIGTERM.
    pub(crate) drain: Option<Duration>,
    /// Where metadata and blobs are.
    pub(crate) location: Location,
    /// How many of the largest repositories `/metrics` names.
    pub(crate) metric_repositories: Option<usize>,
    /// Which pulls are sent to the object store.
    pub(crate) redirect: Option<registry::Redirect>,
    /// Settings of the store.
    pub(crate) store: store::Options,
    /// The continuous backup.
    pub(crate) backup: Option<store::BackupOptions>,
    /// The htpasswd file. Without it everyone on this machine may read and write.
    pub(crate) htpasswd: Option<PathBuf>,
    /// Who may do what.
    pub(crate) rules: Vec<Rule>,
    /// How logs look.
    pub(crate) log: Log,
}

impl Config {
    /// Reads the file (when given), lays the environment and the command line over it, and checks.
    ///
    /// # Errors
    /// A sentence that names file, key and what to do; exit code 78.
    pub(crate) fn load(
        file: Option<&Path>,
        data: Option<&Path>,
        listen: &[SocketAddr],
        environment: impl IntoIterator<Item = (String, String)>,
    ) -> anyhow::Result<Self> {
        let raw = match file {
            Some(path) => {
                let text = read(path)?;
                Raw::parse(&text, &path.display().to_string())?
            }
            None => Raw::default(),
        };
        let raw = raw.overlay(environment)?;
        raw.check(data, listen)
            .map_err(|error| config_error(file, error))
    }
}

/// One rule of `access`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Rule {
    /// User names, `*` for every user, `anonymous` for everybody.
    pub(crate) principals: Vec<String>,
    /// Repository patterns: `*` within one component, `**` over several.
    pub(crate) repositories: Vec<String>,
    /// Tag patterns; all tags when left out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) tags: Vec<String>,
    /// `pull`, `push`, `tag-create`, `tag-overwrite`, `delete`, `admin`.
    pub(crate) actions: Vec<String>,
}

/// How logs look.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Log {
    /// A filter such as `info` or `registry=debug,info`.
    pub(crate) level: String,
    /// `text` or `json`.
    pub(crate) format: LogFormat,
}

impl Default for Log {
    fn default() -> Self {
        Self {
            level: "info".to_owned(),
            format: LogFormat::Text,
        }
    }
}

/// The form of a log line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum LogFormat {
    /// One JSON object a line.
    Json,
    /// For people.
    Text,
}

/// The file as it was written.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Raw {
    version: Option<u32>,
    server: Server,
    storage: Storage,
    auth: Auth,
    access: Option<Vec<Rule>>,
    attempts: Attempts,
    events: Events,
    gc: gc::Gc,
    retention: retention::Retention,
    scrub: retention::Scrub,
    backup: backup::Backup,
    log: Option<Log>,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Server {
    listen: Option<OneOrMany>,
    public_url: Option<String>,
    tls: Option<Tls>,
    limits: Limits,
    drain: Option<String>,
    metric_repositories: Option<usize>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Tls {
    certificate: PathBuf,
    key: PathBuf,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Limits {
    connections: Option<usize>,
    header_timeout: Option<String>,
    manifest_bytes: Option<Size>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(untagged)]
enum Size {
    Bytes(u64),
    Text(String),
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Storage {
    directory: Option<PathBuf>,
    database: Option<Hidden>,
    database_file: Option<PathBuf>,
    database_connections: Option<usize>,
    objects: Option<String>,
    s3: S3,
    redirect: redirect::Redirect,
    allow_sparse: bool,
    exports: Option<bool>,
    lease: Option<String>,
    upload_expiry: Option<String>,
    floor: Option<Size>,
    quota: Option<Size>,
    pull_statistics: Option<String>,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct S3 {
    endpoint: Option<String>,
    region: Option<String>,
    path_style: Option<bool>,
}

/// Text that may hold a password: `Debug` does not show it.
#[derive(Clone, Serialize, Deserialize)]
#[serde(transparent)]
struct Hidden(String);

impl std::fmt::Debug for Hidden {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("…")
    }
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Auth {
    htpasswd: Option<PathBuf>,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Attempts {
    retention: Option<String>,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Events {
    retention: Option<String>,
}

impl Raw {
    fn parse(text: &str, name: &str) -> anyhow::Result<Self> {
        let raw: Self = if text.trim().is_empty() {
            Self::default()
        } else {
            serde_saphyr::from_str(text).map_err(|error| malformed(name, &error))?
        };
        match raw.version {
            Some(1) => Ok(raw),
            None => Err(
                Refused::new(Exit::CONFIG, format!("{name}: `version` is missing"))
                    .hint("write `version: 1` at the top")
                    .into(),
            ),
            Some(0) => Err(
                Refused::new(Exit::CONFIG, format!("{name}: there is no `version: 0`"))
                    .hint("write `version: 1` at the top")
                    .into(),
            ),
            Some(other) => Err(Refused::new(
                Exit::CONFIG,
                format!("{name}: `version: {other}` is newer than this program knows, which is 1"),
            )
            .hint("use a newer longshore")
            .into()),
        }
    }

    /// Lays `LONGSHORE_…` variables over the file. Variables of other commands are left alone.
    fn overlay(
        self,
        environment: impl IntoIterator<Item = (String, String)>,
    ) -> anyhow::Result<Self> {
        let mut document = serde_json::to_value(&self)?;
        for (name, text) in environment {
            let Some(path) = name.strip_prefix("LONGSHORE_") else {
                continue;
            };
            let path: Vec<String> = path.split("__").map(str::to_lowercase).collect();
            let section = path.first().map(String::as_str).unwrap_or_default();
            if path.len() < 2 || !SECTIONS.contains(&section) {
                continue;
            }
            let value: Value =
                serde_saphyr::from_str(&text).unwrap_or_else(|_| Value::String(text.clone()));
            put(&mut document, &path, value);
            // Each variable is checked at once, so that the message can name it.
            if let Err(error) = serde_json::from_value::<Self>(document.clone()) {
                let message = error.to_string();
                let refused = Refused::new(
                    Exit::CONFIG,
                    format!("environment variable `{name}`: {message}"),
                );
                return Err(match nearest_of_message(&message) {
                    Some(hint) => refused.hint(hint),
                    None => refused,
                }
                .into());
            }
        }
        Ok(serde_json::from_value(document)?)
    }

    fn check(self, data: Option<&Path>, listen: &[SocketAddr]) -> anyhow::Result<Config> {
        let listen = if listen.is_empty() {
            match &self.server.listen {
                None => vec![DEFAULT_LISTEN.parse().context("default address")?],
                Some(OneOrMany::One(one)) => vec![address(one)?],
                Some(OneOrMany::Many(many)) => many
                    .iter()
                    .map(|one| address(one))
                    .collect::<anyhow::Result<_>>()?,
            }
        } else {
            listen.to_vec()
        };
        let mut options = store::Options {
            allow_sparse: self.storage.allow_sparse,
            exports: self.storage.exports.unwrap_or(true),
            ..store::Options::default()
        };
        let periods = [
            ("storage.lease", &self.storage.lease, &mut options.lease),
            (
                "storage.upload_expiry",
                &self.storage.upload_expiry,
                &mut options.upload_expiry,
            ),
            (
                "events.retention",
                &self.events.retention,
                &mut options.event_retention,
            ),
        ];
        for (key, text, place) in periods {
            if let Some(text) = text {
                *place = period(key, text)?;
            }
        }
        options.floor = self
            .storage
            .floor
            .as_ref()
            .map(|size| bytes("storage.floor", size))
            .transpose()?;
        if let Some(connections) = self.storage.database_connections {
            if !(2..=1000).contains(&connections) {
                anyhow::bail!("`storage.database_connections` must be between 2 and 1000");
            }
            options.database_connections = connections;
        }
        options.quota = self
            .storage
            .quota
            .as_ref()
            .map(|size| bytes("storage.quota", size))
            .transpose()?;
        match self.storage.pull_statistics.as_deref() {
            None => {}
            Some("off") => options.pull_retention = Duration::ZERO,
            Some(text) => options.pull_retention = period("storage.pull_statistics", text)?,
        }
        match self.attempts.retention.as_deref() {
            None => {}
            Some("forever") => options.attempt_retention = None,
            Some(text) => options.attempt_retention = Some(period("attempts.retention", text)?),
        }
        if options.lease < MIN_LEASE {
            anyhow::bail!(
                "`storage.lease` must be 12h or more: a client that was told a blob exists relies on it"
            );
        }
        let location = self.storage.location(data)?;
        let s3 = matches!(location.objects, ObjectLocation::S3(_));
        self.gc.apply(&mut options, s3)?;
        let redirect = self.storage.redirect.check(&mut options, s3)?;
        self.retention.apply(&mut options)?;
        self.scrub.apply(&mut options)?;
        options.test_switches();
        let log = self.log.unwrap_or_default();
        if let Err(error) = tracing_subscriber::EnvFilter::try_new(&log.level) {
            anyhow::bail!(
                "`log.level`: `{}` is no filter, write for example `info` or `registry=debug,info`: {error}",
                log.level
            );
        }
        let htpasswd = self.auth.htpasswd;
        let rules = match (self.access, &htpasswd) {
            (Some(_), None) => {
                anyhow::bail!(
                    "`access` has rules but there are no users: add `auth: {{htpasswd: FILE}}`"
                )
            }
            (Some(rules), Some(_)) => rules,
            // Users without rules: everyone who can log in may do everything.
            (None, Some(_)) => vec![Rule {
                principals: vec!["*".to_owned()],
                repositories: vec!["**".to_owned()],
                tags: Vec::new(),
                actions: ALL_ACTIONS.map(str::to_owned).to_vec(),
            }],
            (None, None) => Vec::new(),
        };
        if htpasswd.is_none()
            && let Some(open) = listen.iter().find(|address| !address.ip().is_loopback())
        {
            return Err(Refused::new(
                Exit::CONFIG,
                format!("`{open}` can be reached from other machines, but no users are configured"),
            )
            .hint(
                "add `auth: {htpasswd: /etc/longshore/htpasswd}` to the configuration (make the file \
                 with `htpasswd -B -c /etc/longshore/htpasswd USER`), or listen on 127.0.0.1",
            )
            .into());
        }
        Ok(Config {
            listen,
            public_url: self.server.public_url,
            tls: self.server.tls.map(|tls| (tls.certificate, tls.key)),
            connections: self.server.limits.connections,
            header_timeout: self
                .server
                .limits
                .header_timeout
                .map(|text| period("server.limits.header_timeout", &text))
                .transpose()?,
            manifest_bytes: self
                .server
                .limits
                .manifest_bytes
                .map(|size| bytes("server.limits.manifest_bytes", &size))
                .transpose()?,
            drain: self
                .server
                .drain
                .map(|text| period("server.drain", &text))
                .transpose()?,
            metric_repositories: self.server.metric_repositories,
            location,
            redirect,
            store: options,
            backup: self.backup.check()?,
            htpasswd,
            rules,
            log,
        })
    }
}

impl Storage {
    /// Where metadata and blobs are. The data directory is that of the command line, of the file, or the default.
    fn location(&self, data: Option<&Path>) -> anyhow::Result<Location> {
        let directory = || {
            data.map(Path::to_path_buf)
                .or_else(|| self.directory.clone())
                .map_or_else(default_data, Ok)
        };
        let database = match self.connection()? {
            Some((key, text)) => DatabaseLocation::postgres(&text)
                .map_err(|problem| anyhow::anyhow!("`{key}`: {problem}"))?,
            None => DatabaseLocation::Sqlite(directory()?),
        };
        let objects = match &self.objects {
            None => ObjectLocation::Directory(directory()?),
            Some(text) if text.starts_with("s3:") => ObjectLocation::S3(self.bucket(text)?),
            Some(text) if Path::new(text).is_absolute() => ObjectLocation::Directory(text.into()),
            // What was written here is not shown: it may hold keys.
            Some(_) => anyhow::bail!(
                "`storage.objects` is neither an absolute path nor `s3://bucket/prefix`"
            ),
        };
        if !matches!(objects, ObjectLocation::S3(_)) && self.s3.is_used() {
            anyhow::bail!(
                "`storage.s3` has settings, but `storage.objects` is no bucket: write `objects: s3://bucket/prefix`"
            );
        }
        Ok(Location { database, objects })
    }

    /// The connection string with the key that it came from.
    fn connection(&self) -> anyhow::Result<Option<(&'static str, String)>> {
        match (&self.database, &self.database_file) {
            (Some(_), Some(_)) => {
                anyhow::bail!("`storage.database` and `storage.database_file` exclude each other")
            }
            (Some(Hidden(text)), None) if text == "embedded" => Ok(None),
            (Some(Hidden(text)), None) => {
                if !store::is_postgres(text) {
                    // What was written here is not shown: it may still hold a password.
                    anyhow::bail!(
                        "`storage.database` is neither `embedded` nor a connection string such as `postgres://user@host/database`"
                    );
                }
                Ok(Some(("storage.database", text.clone())))
            }
            (None, Some(path)) => {
                let text = std::fs::read_to_string(path).with_context(|| {
                    format!("`storage.database_file`: cannot read `{}`", path.display())
                })?;
                Ok(Some(("storage.database_file", text.trim().to_owned())))
            }
            (None, None) => Ok(None),
        }
    }

    fn bucket(&self, text: &str) -> anyhow::Result<S3Location> {
        let location = S3Location::parse(text)
            .map_err(|problem| anyhow::anyhow!("`storage.objects`: {problem}"))?;
        if let Some(endpoint) = &self.s3.endpoint
            && !["http://", "https://"].iter().any(|scheme| {
                endpoint
                    .strip_prefix(scheme)
                    .is_some_and(|host| !host.trim_end_matches('/').is_empty())
            })
        {
            anyhow::bail!(
                "`storage.s3.endpoint` is no URL, write for example `https://s3.example.com`"
            );
        }
        if self
            .s3
            .endpoint
            .as_ref()
            .is_some_and(|url| url.contains('@'))
        {
            anyhow::bail!(
                "`storage.s3.endpoint` holds an `@`: credentials come from `AWS_ACCESS_KEY_ID` and \
                 `AWS_SECRET_ACCESS_KEY`, files or the instance"
            );
        }
        Ok(S3Location {
            endpoint: self
                .s3
                .endpoint
                .as_ref()
                .map(|url| url.trim_end_matches('/').to_owned()),
            region: self.s3.region.clone(),
            path_style: self.s3.path_style.unwrap_or(false),
            ..location
        })
    }
}

impl S3 {
    fn is_used(&self) -> bool {
        self.endpoint.is_some() || self.region.is_some() || self.path_style.is_some()
    }
}

/// The data directory when none is named: `/var/lib/longshore` as root, else
/// `$XDG_DATA_HOME/longshore`.
pub(crate) fn default_data() -> anyhow::Result<PathBuf> {
    if rustix::process::geteuid().is_root() {
        return Ok(PathBuf::from("/var/lib/longshore"));
    }
    if let Some(home) = std::env::var_os("XDG_DATA_HOME").filter(|text| !text.is_empty()) {
        return Ok(PathBuf::from(home).join("longshore"));
    }
    std::env::var_os("HOME")
        .filter(|text| !text.is_empty())
        .map(|home| PathBuf::from(home).join(".local/share/longshore"))
        .context("no data directory is known: set HOME or use --data DIR")
}

fn read(path: &Path) -> anyhow::Result<String> {
    std::fs::read_to_string(path).map_err(|error| {
        Refused::new(
            Exit::CONFIG,
            format!("cannot read configuration `{}`: {error}", path.display()),
        )
        .into()
    })
}

fn config_error(file: Option<&Path>, error: anyhow::Error) -> anyhow::Error {
    if error.downcast_ref::<Refused>().is_some() {
        return error;
    }
    let place = file.map_or_else(
        || "configuration".to_owned(),
        |path| path.display().to_string(),
    );
    Refused::new(Exit::CONFIG, format!("{place}: {error:#}")).into()
}

fn put(document: &mut Value, path: &[String], value: Value) {
    let Some((first, rest)) = path.split_first() else {
        return;
    };
    if !document.is_object() {
        *document = Value::Object(serde_json::Map::new());
    }
    if let Value::Object(fields) = document {
        let field = fields.entry(first.clone()).or_insert(Value::Null);
        if rest.is_empty() {
            *field = value;
        } else {
            put(field, rest, value);
        }
    }
}

/// A message with file and line, and without the document, which may hold secrets.
fn malformed(name: &str, error: &serde_saphyr::Error) -> Refused {
    let error = error.without_snippet();
    let place = error
        .location()
        .map_or_else(|| name.to_owned(), |at| format!("{name}:{}", at.line()));
    if let serde_saphyr::Error::SerdeUnknownField {
        field, expected, ..
    } = error
    {
        let refused = Refused::new(Exit::CONFIG, format!("{place}: unknown key `{field}`"));
        return match delivery::target::nearest(field, expected) {
            Some(known) => refused.hint(format!("did you mean `{known}`?")),
            None => refused.hint(format!("known here are `{}`", expected.join("`, `"))),
        };
    }
    let text = error.to_string();
    let first = text.lines().next().unwrap_or_default();
    Refused::new(Exit::CONFIG, format!("{place}: {first}"))
}

/// The nearest known key, when a message of the parser says "unknown field".
fn nearest_of_message(message: &str) -> Option<String> {
    let (_, rest) = message.split_once("unknown field `")?;
    let (unknown, rest) = rest.split_once('`')?;
    // One parser puts the known keys into backticks and goes on with the line itself, the other not.
    let (_, known) = rest.lines().next()?.split_once("expected ")?;
    let known: Vec<&str> = known
        .trim_start_matches("one of ")
        .split([',', ' ', '`'])
        .filter(|word| !word.is_empty() && *word != "or")
        .collect();
    delivery::target::nearest(unknown, &known).map(|known| format!("did you mean `{known}`?"))
}

fn address(text: &str) -> anyhow::Result<SocketAddr> {
    text.parse()
        .with_context(|| format!("`server.listen`: `{text}` is no address, write for example `127.0.0.1:5050` or `[::]:443`"))
}

fn period(key: &str, text: &str) -> anyhow::Result<Duration> {
    parse_period(text).with_context(|| {
        format!("`{key}`: `{text}` is no period, write for example `30s`, `5m`, `24h` or `7d`")
    })
}

/// `90s`, `5m`, `24h`, `7d`; several may follow one another.
pub(crate) fn parse_period(text: &str) -> Option<Duration> {
    let mut rest = text.trim();
    let mut total = Duration::ZERO;
    if rest.is_empty() {
        return None;
    }
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit())?;
        let count: u64 = rest.get(..digits)?.parse().ok()?;
        rest = rest.get(digits..)?;
        let end = rest
            .find(|c: char| c.is_ascii_digit())
            .unwrap_or(rest.len());
        let seconds = match rest.get(..end)?.trim() {
            "ms" => {
                total = total.checked_add(Duration::from_millis(count))?;
                0
            }
            "s" => 1,
            "m" => 60,
            "h" => 3600,
            "d" => 86_400,
            _ => return None,
        };
        total = total.checked_add(Duration::from_secs(count.checked_mul(seconds)?))?;
        rest = rest.get(end..)?;
    }
    Some(total)
}

/// The bytes of a size.
fn bytes(key: &str, size: &Size) -> anyhow::Result<u64> {
    match size {
        Size::Bytes(bytes) => Ok(*bytes),
        Size::Text(text) => parse_size(text)
            .with_context(|| format!("`{key}`: `{text}` is no size, write for example `8MiB`")),
    }
}

/// `4MiB`, `10 MB`, `4096`.
pub(crate) fn parse_size(text: &str) -> Option<u64> {
    let text = text.trim();
    let digits = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let count: u64 = text.get(..digits)?.parse().ok()?;
    let unit = match text.get(digits..)?.trim() {
        "" | "B" => 1,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        "TiB" => 1 << 40,
        "KB" | "kB" => 1000,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        "TB" => 1_000_000_000_000,
        _ => return None,
    };
    count.checked_mul(unit)
}

const ALL_ACTIONS: [&str; 6] = [
    "pull",
    "push",
    "tag-create",
    "tag-overwrite",
    "delete",
    "admin",
];
const DEFAULT_LISTEN: &str = "127.0.0.1:5050";
const MIN_LEASE: Duration = Duration::from_hours(12);
const SECTIONS: [&str; 11] = [
    "server",
    "storage",
    "auth",
    "access",
    "attempts",
    "events",
    "gc",
    "retention",
    "scrub",
    "backup",
    "log",
];

#[cfg(test)]
mod tests;
