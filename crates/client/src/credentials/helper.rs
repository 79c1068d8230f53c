//! Helper programs, `docker-credential-*`: a verb as argument, the server on standard input, JSON on
//! standard output
//! ([docker-credential-helpers](https://github.com/docker/docker-credential-helpers#development)).

use std::io::{Read as _, Write as _};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use serde::Deserialize;
use serde_json::json;

use super::Credential;
use crate::Error;
use crate::error::printable;

/// What a helper keeps for a server; `None` when it keeps nothing.
pub(super) fn get(helper: &str, server: &str) -> Result<Option<Credential>, Error> {
    let Some(answer) = run(helper, "get", server)? else {
        return Ok(None);
    };
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Kept {
        #[serde(default)]
        username: String,
        #[serde(default)]
        secret: String,
    }
    // The parser's message could quote the secret.
    let kept: Kept = serde_json::from_slice(&answer).map_err(|_| {
        Error::Other(format!(
            "the credential helper `docker-credential-{helper}` answered `get` with something other than its JSON"
        ))
    })?;
    Ok(if kept.secret.is_empty() {
        None
    } else if kept.username == "<token>" {
        Some(Credential::Identity(kept.secret))
    } else {
        Some(Credential::Password {
            username: kept.username,
            password: kept.secret,
        })
    })
}

/// Has a helper keep a login.
pub(super) fn store(
    helper: &str,
    server: &str,
    username: &str,
    password: &str,
) -> Result<(), Error> {
    let input = json!({ "ServerURL": server, "Username": username, "Secret": password });
    match run(helper, "store", &input.to_string())? {
        Some(_) => Ok(()),
        None => Err(Error::Other(format!(
            "the credential helper `docker-credential-{helper}` did not store the login"
        ))),
    }
}

/// Has a helper forget a login; `false` when it had none.
pub(super) fn erase(helper: &str, server: &str) -> Result<bool, Error> {
    if get(helper, server)?.is_none() {
        return Ok(false);
    }
    Ok(run(helper, "erase", server)?.is_some())
}

/// Runs a helper; `None` when it says that it has no such login.
fn run(helper: &str, verb: &str, input: &str) -> Result<Option<Vec<u8>>, Error> {
    let name_fits = !helper.is_empty()
        && helper
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'));
    if !name_fits {
        return Err(Error::Other(format!(
            "`{}` is not the name of a credential helper; correct `credsStore` or `credHelpers` in docker's `config.json`",
            printable(helper)
        )));
    }
    start(&format!("docker-credential-{helper}"), verb, input, TIMEOUT)
}

/// Runs a program in the protocol of the helpers.
fn start(
    program: &str,
    verb: &str,
    input: &str,
    timeout: Duration,
) -> Result<Option<Vec<u8>>, Error> {
    let broken = |error: std::io::Error| Error::File {
        path: program.to_owned(),
        source: error,
    };
    #[expect(
        clippy::disallowed_methods,
        reason = "credential helpers are programs, and this is the one place that starts them"
    )]
    let mut child = Command::new(program)
        .arg(verb)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(broken)?;
    let (Some(mut stdin), Some(stdout)) = (child.stdin.take(), child.stdout.take()) else {
        return Err(Error::Other(format!("`{program}` has no standard input")));
    };
    // Both pipes are served by a thread of their own: a helper that neither reads nor answers must not
    // hold this one.
    let input = input.to_owned();
    thread::spawn(move || {
        // A helper that answers without reading all of it closes the pipe; its answer decides.
        let _ = stdin.write_all(input.as_bytes());
    });
    let (done, waiting) = mpsc::channel();
    thread::spawn(move || {
        let mut answer = Vec::new();
        let read = stdout.take(MAX_ANSWER).read_to_end(&mut answer);
        // Nobody waits any more after the time is up.
        let _ = done.send(read.map(|_| answer));
    });
    let answer = waiting.recv_timeout(timeout);
    let Ok(answer) = answer else {
        // It may have ended by itself just now.
        let _ = child.kill();
        let _ = child.wait();
        return Err(Error::Other(format!(
            "the credential helper `{program}` did not answer `{verb}` within {} seconds",
            timeout.as_secs()
        )));
    };
    let answer = answer.map_err(broken)?;
    if answer.len() as u64 == MAX_ANSWER {
        let _ = child.kill();
    }
    let status = child.wait().map_err(broken)?;
    if status.success() {
        return Ok(Some(answer));
    }
    // A failing helper says why on standard output; it never holds the secret then.
    let said = printable(&String::from_utf8_lossy(&answer));
    if said.contains("not found") || said.contains("no credentials") {
        return Ok(None);
    }
    Err(Error::Other(format!(
        "the credential helper `{program}` failed to `{verb}`: {said}"
    )))
}

const TIMEOUT: Duration = Duration::from_mins(1);
const MAX_ANSWER: u64 = 1024 * 1024;

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn the_protocol() {
        let directory = tempfile::tempdir().unwrap();
        // All scripts are written before the first one is started: a file that is open for writing in
        // a process that is just being made cannot be executed.
        let script = |name: &str, body: &str| {
            let path = directory.path().join(name);
            fs::write(&path, format!("#!/bin/sh\n{body}\n")).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o700)).unwrap();
            path.to_str().unwrap().to_owned()
        };
        let echo = script("echo", r#"printf '%s:' "$1"; cat"#);
        let deaf = script("deaf", "exec 0<&-; echo fine");
        let none = script(
            "none",
            "echo 'credentials not found in native keychain'; exit 1",
        );
        let fails = script("fails", "echo 'the keychain is locked'; exit 1");
        let hangs = script("hangs", "exec sleep 600");
        let run = |program: &str, input: &str| start(program, "get", input, TIMEOUT);
        assert_eq!(run(&echo, "host").unwrap().unwrap(), b"get:host");
        let long = "x".repeat(1 << 20);
        assert_eq!(run(&deaf, &long).unwrap().unwrap(), b"fine\n");
        assert_eq!(run(&none, "host").unwrap(), None);
        let error = run(&fails, "host").unwrap_err().to_string();
        assert!(error.contains("the keychain is locked"), "{error}");
        let error = start(&hangs, "get", "host", Duration::ZERO)
            .unwrap_err()
            .to_string();
        assert!(error.contains("did not answer"), "{error}");
        assert!(run("/nowhere", "host").is_err());
    }
}
