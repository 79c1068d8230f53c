//! The connection string: what libpq understands, checked, with what the driver does not know taken out.
//!
//! The driver knows `sslmode` up to `require` and no files; those are ours. Nothing here prints the
//! string: it may hold a password.

use std::path::PathBuf;
use std::time::Duration;

use tokio_postgres::Config;
use tokio_postgres::config::{Host, SslMode, TargetSessionAttrs};

use super::tls::Identity;

/// How the server's certificate is checked, as libpq has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verify {
    /// No TLS.
    Disable,
    /// TLS where the server has it, any certificate.
    Prefer,
    /// TLS, any certificate; with `sslrootcert` as `verify-ca`.
    Require,
    /// The certificate comes from a trusted root.
    Ca,
    /// And is the host's own.
    Full,
}

/// Where the trusted roots are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Roots {
    /// Those of the system.
    System,
    /// A PEM file.
    File(PathBuf),
}

/// A connection string that was understood.
#[derive(Clone, Debug)]
pub(super) struct Settings {
    /// One for each host, in the order in which they are tried.
    pub(super) hosts: Vec<Config>,
    pub(super) verify: Verify,
    pub(super) roots: Roots,
    /// The certificate that we show, with its key.
    pub(super) identity: Option<Identity>,
    /// Whether a server that takes no writes may answer reads while there is no other one.
    pub(super) read_only_too: bool,
}

impl Settings {
    /// Reads a connection string: a URL, or the driver's `key=value` form.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        refuse_second_at(text)?;
        let (text, own) = take_own(text)?;
        // The driver's message names the key at fault and no value.
        let mut config: Config = text
            .parse()
            .map_err(|error: tokio_postgres::Error| chain(&error))?;
        let (verify, roots) = own.verification(&config)?;
        config.ssl_mode(match verify {
            Verify::Disable => SslMode::Disable,
            Verify::Prefer => SslMode::Prefer,
            Verify::Require | Verify::Ca | Verify::Full => SslMode::Require,
        });
        if config.get_application_name().is_none() {
            config.application_name("longshore");
        }
        if config.get_connect_timeout().is_none() {
            config.connect_timeout(CONNECT);
        }
        if config.get_tcp_user_timeout().is_none() {
            config.tcp_user_timeout(UNACKNOWLEDGED);
        }
        if !text.contains("keepalives_idle") {
            config.keepalives_idle(Duration::from_secs(15));
            config.keepalives_interval(Duration::from_secs(5));
            config.keepalives_retries(3);
        }
        let asked = config.get_target_session_attrs();
        if asked == TargetSessionAttrs::ReadOnly {
            return Err("`target_session_attrs=read-only` cannot serve a registry, use `read-write` or leave it out".to_owned());
        }
        config.target_session_attrs(TargetSessionAttrs::Any);
        Ok(Self {
            hosts: one_host_each(&config)?,
            verify,
            roots,
            identity: match (own.certificate, own.key) {
                (Some(certificate), Some(key)) => Some((certificate.into(), key.into())),
                (None, None) => None,
                _ => return Err("`sslcert` and `sslkey` belong together".to_owned()),
            },
            read_only_too: asked == TargetSessionAttrs::Any,
        })
    }
}

/// Refuses a URL with an `@` behind the one that ends the credentials: what the driver would take for a host is then the end
/// of a password, and hosts are named in logs.
fn refuse_second_at(text: &str) -> Result<(), String> {
    let Some((_, rest)) = text
        .split_once("://")
        .and_then(|(_, rest)| rest.split_once('@'))
    else {
        return Ok(());
    };
    let place = rest.split('?').next().unwrap_or_default();
    if place.contains('@') {
        return Err(
            "it has more than one `@`: write those of the user's name and the password as `%40`"
                .to_owned(),
        );
    }
    Ok(())
}

/// Parameters that the driver does not know.
#[derive(Default)]
struct Own {
    mode: Option<String>,
    root: Option<String>,
    certificate: Option<String>,
    key: Option<String>,
}

impl Own {
    fn verification(&self, config: &Config) -> Result<(Verify, Roots), String> {
        let roots = match self.root.as_deref() {
            None | Some("system") => Roots::System,
            Some(path) => Roots::File(PathBuf::from(path)),
        };
        let verify = match self.mode.as_deref() {
            Some("verify-full") => Verify::Full,
            Some("verify-ca") => Verify::Ca,
            Some(other) => {
                return Err(format!(
                    "`sslmode={other}` is not known, write `disable`, `prefer`, `require`, `verify-ca` or `verify-full`"
                ));
            }
            None => match config.get_ssl_mode() {
                SslMode::Disable => Verify::Disable,
                SslMode::Require => Verify::Require,
                _ => Verify::Prefer,
            },
        };
        Ok(match (verify, self.root.as_deref()) {
            // The roots of the system vouch for anybody: only with the host's name do they say something.
            (Verify::Ca, None | Some("system")) => {
                return Err(
                    "`sslmode=verify-ca` needs `sslrootcert=FILE`; with the roots of the system use `verify-full`"
                        .to_owned(),
                );
            }
            (Verify::Prefer | Verify::Require, Some("system")) => (Verify::Full, roots),
            (Verify::Require, Some(_)) => (Verify::Ca, roots),
            (verify, _) => (verify, roots),
        })
    }
}

/// Takes the files of TLS and the modes that verify out of the parameters of a URL.
fn take_own(text: &str) -> Result<(String, Own), String> {
    let mut own = Own::default();
    let is_url = text.starts_with("postgres://") || text.starts_with("postgresql://");
    let Some((head, query)) = text.split_once('?').filter(|_| is_url) else {
        return Ok((text.to_owned(), own));
    };
    let mut kept = Vec::new();
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        match key {
            "sslrootcert" => own.root = Some(decode(value)?),
            "sslcert" => own.certificate = Some(decode(value)?),
            "sslkey" => own.key = Some(decode(value)?),
            "sslmode" if !["disable", "prefer", "require"].contains(&value) => {
                // libpq's `allow` begins without TLS; to begin with it is never worse.
                if value == "allow" {
                    kept.push("sslmode=prefer");
                } else {
                    own.mode = Some(value.to_owned());
                }
            }
            _ => kept.push(pair),
        }
    }
    Ok((format!("{head}?{}", kept.join("&")), own))
}

fn decode(value: &str) -> Result<String, String> {
    let wrong =
        || "a parameter has a `%` that is not followed by two hexadecimal digits".to_owned();
    let mut bytes = Vec::with_capacity(value.len());
    let mut rest = value.as_bytes();
    while let Some((first, tail)) = rest.split_first() {
        rest = tail;
        if *first == b'%' {
            let (digits, tail) = rest.split_at_checked(2).ok_or_else(wrong)?;
            bytes.extend(hex::decode(digits).map_err(|_| wrong())?);
            rest = tail;
        } else {
            bytes.push(*first);
        }
    }
    String::from_utf8(bytes).map_err(|_| "a parameter is not UTF-8".to_owned())
}

/// The same configuration for each host alone, so that each attempt has a time limit of its own and the server
/// that takes writes can be looked for.
fn one_host_each(config: &Config) -> Result<Vec<Config>, String> {
    let (hosts, addresses, ports) = (
        config.get_hosts(),
        config.get_hostaddrs(),
        config.get_ports(),
    );
    let count = hosts.len().max(addresses.len());
    if count == 0 {
        return Err(
            "it names no host, write for example `postgres://user@host/database`".to_owned(),
        );
    }
    if !hosts.is_empty() && !addresses.is_empty() && hosts.len() != addresses.len() {
        return Err("`host` and `hostaddr` must name as many servers".to_owned());
    }
    if ports.len() > 1 && ports.len() != count {
        return Err("write one port, or one for each host".to_owned());
    }
    Ok((0..count)
        .map(|index| {
            let mut one = Config::new();
            if let Some(user) = config.get_user() {
                one.user(user);
            }
            if let Some(password) = config.get_password() {
                one.password(password);
            }
            if let Some(name) = config.get_dbname() {
                one.dbname(name);
            }
            if let Some(options) = config.get_options() {
                one.options(options);
            }
            if let Some(name) = config.get_application_name() {
                one.application_name(name);
            }
            if let Some(timeout) = config.get_connect_timeout() {
                one.connect_timeout(*timeout);
            }
            if let Some(timeout) = config.get_tcp_user_timeout() {
                one.tcp_user_timeout(*timeout);
            }
            one.ssl_mode(config.get_ssl_mode())
                .ssl_negotiation(config.get_ssl_negotiation())
                .keepalives(config.get_keepalives())
                .keepalives_idle(config.get_keepalives_idle())
                .channel_binding(config.get_channel_binding())
                .load_balance_hosts(config.get_load_balance_hosts())
                .port(
                    ports
                        .get(index)
                        .or_else(|| ports.first())
                        .copied()
                        .unwrap_or(5432),
                );
            if let Some(interval) = config.get_keepalives_interval() {
                one.keepalives_interval(interval);
            }
            if let Some(retries) = config.get_keepalives_retries() {
                one.keepalives_retries(retries);
            }
            match hosts.get(index) {
                Some(Host::Tcp(name)) => {
                    one.host(name);
                }
                Some(Host::Unix(path)) => {
                    one.host_path(path);
                }
                None => {}
            }
            if let Some(address) = addresses.get(index) {
                one.hostaddr(*address);
            }
            one
        })
        .collect())
}

/// An error with its causes; the driver's own text leaves them out.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        let more = source.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        next = source.source();
    }
    text
}

const CONNECT: Duration = Duration::from_secs(5);
const UNACKNOWLEDGED: Duration = Duration::from_secs(20);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_libpq_means_by_its_modes() {
        for (parameters, verify, roots) in [
            ("", Verify::Prefer, Roots::System),
            ("?sslmode=disable", Verify::Disable, Roots::System),
            ("?sslmode=allow", Verify::Prefer, Roots::System),
            ("?sslmode=require", Verify::Require, Roots::System),
            (
                "?sslmode=require&sslrootcert=/etc/ca%20file.pem",
                Verify::Ca,
                Roots::File("/etc/ca file.pem".into()),
            ),
            (
                "?sslrootcert=/ca.pem&sslmode=verify-full&application_name=x",
                Verify::Full,
                Roots::File("/ca.pem".into()),
            ),
            ("?sslmode=verify-full", Verify::Full, Roots::System),
            (
                "?sslmode=require&sslrootcert=system",
                Verify::Full,
                Roots::System,
            ),
        ] {
            let settings = Settings::parse(&format!("postgres://u:p@h/d{parameters}")).unwrap();
            assert_eq!(
                (settings.verify, settings.roots),
                (verify, roots),
                "{parameters}"
            );
        }
    }

    #[test]
    fn each_host_stands_alone() {
        let settings = Settings::parse(
            "postgresql://u:se%40cret@one:5433,two,[::1]:7/db?target_session_attrs=read-write",
        )
        .unwrap();
        assert!(!settings.read_only_too);
        let hosts: Vec<_> = settings
            .hosts
            .iter()
            .map(|one| (one.get_hosts().to_vec(), one.get_ports()[0]))
            .collect();
        assert_eq!(
            hosts,
            [
                (vec![Host::Tcp("one".to_owned())], 5433),
                (vec![Host::Tcp("two".to_owned())], 5432),
                (vec![Host::Tcp("::1".to_owned())], 7),
            ]
        );
        assert!(settings.hosts.iter().all(|one| {
            one.get_password() == Some(b"se@cret")
                && one.get_dbname() == Some("db")
                && one.get_application_name() == Some("longshore")
        }));
    }

    #[test]
    fn what_is_wrong_is_named_without_the_password() {
        for (text, says) in [
            ("postgres://u:secret@h/d?sslmode=verify", "verify-full"),
            ("postgres://u:secret@h/d?sslmode=verify-ca", "sslrootcert"),
            ("postgres://u:secret@h/d?colour=blue", "colour"),
            ("postgres://u:secret@h:x/d", "port"),
            ("postgres://u:secret@/d", "host"),
            (
                "postgres://u:secret@h/d?target_session_attrs=read-only",
                "read-write",
            ),
            ("postgres://u:secret@h/d?sslrootcert=%4", "hexadecimal"),
            ("postgres://u:secret@h/d?sslcert=/x", "sslkey"),
            ("postgres://u:secret@a,b/d?port=1,2,3", "port"),
            ("postgres://u:my@secret@h/d", "%40"),
            ("postgres://u:my@sec/secret@h/d?sslmode=disable", "%40"),
        ] {
            let problem = Settings::parse(text).unwrap_err();
            assert!(problem.contains(says), "{text}: {problem}");
            assert!(!problem.contains("secret"), "{problem}");
        }
    }
}
