//! `longshore login` and `longshore logout`.

use std::io::{IsTerminal as _, Read as _};
use std::sync::Arc;

use anyhow::Context as _;
use clap::Args;

use super::Global;
use crate::output::{self, Exit, Refused};

/// Check a user name and password with a registry and store them in the docker configuration.
#[derive(Debug, Args)]
pub(crate) struct Login {
    /// The registry: `host[:port]`.
    host: String,
    /// The user name. Asked for when left out.
    #[arg(long, short)]
    username: Option<String>,
    /// Read the password from standard input.
    #[arg(long)]
    password_stdin: bool,
}

impl Login {
    pub(crate) async fn run(self, global: &Global) -> anyhow::Result<Exit> {
        let host = host(&self.host)?;
        let username = match self.username {
            Some(name) => name,
            None if self.password_stdin => {
                return Err(
                    Refused::new(Exit::USAGE, "`--password-stdin` needs `--username`").into(),
                );
            }
            None => {
                output::note("User name:");
                let mut line = String::new();
                std::io::stdin()
                    .read_line(&mut line)
                    .context("reading the user name")?;
                line.trim().to_owned()
            }
        };
        let password = if self.password_stdin {
            let mut text = String::new();
            std::io::stdin()
                .take(64 * 1024)
                .read_to_string(&mut text)
                .context("reading the password")?;
            text.trim_end_matches(['\r', '\n']).to_owned()
        } else if std::io::stdin().is_terminal() {
            rpassword::prompt_password("Password: ").context("reading the password")?
        } else {
            return Err(
                Refused::new(Exit::USAGE, "no terminal to ask for the password")
                    .hint("use `--password-stdin`")
                    .into(),
            );
        };
        let config = client::Config {
            credentials: Arc::new(client::credentials::Source::Basic {
                host: host.clone(),
                username: username.clone(),
                password: password.clone(),
            }),
            ..client::Config::default()
        };
        let client = global.client_with(config)?;
        client
            .ping(&host)
            .await
            .with_context(|| format!("cannot log in to `{host}` as `{username}`"))?;
        client::credentials::store(&host, &username, &password)?;
        if global.json {
            output::json(&serde_json::json!({"host": host, "username": username}))?;
        } else {
            global.remark(format!("logged in to `{host}` as `{username}`"));
        }
        Ok(Exit::OK)
    }
}

/// Remove the credentials of a registry from the docker configuration.
#[derive(Debug, Args)]
pub(crate) struct Logout {
    /// The registry: `host[:port]`.
    host: String,
}

impl Logout {
    pub(crate) fn run(self, global: &Global) -> anyhow::Result<Exit> {
        let host = host(&self.host)?;
        let removed = client::credentials::erase(&host)?;
        if global.json {
            output::json(&serde_json::json!({"host": host, "removed": removed}))?;
        } else if removed {
            global.remark(format!("removed the credentials for `{host}`"));
        } else {
            global.remark(format!("there were no credentials for `{host}`"));
        }
        Ok(Exit::OK)
    }
}

/// Takes `host[:port]`, also when somebody wrote a URL.
pub(super) fn host(text: &str) -> anyhow::Result<String> {
    let host = text
        .strip_prefix("https://")
        .or_else(|| text.strip_prefix("http://"))
        .unwrap_or(text)
        .trim_end_matches('/');
    // A reference checks the form of a host.
    format!("{host}/x").parse::<oci::Reference>().map_err(|_| {
        Refused::new(
            Exit::USAGE,
            format!("`{text}` is not a registry, write `host[:port]`"),
        )
    })?;
    Ok(host.to_owned())
}
