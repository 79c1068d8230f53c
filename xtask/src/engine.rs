//! A Docker Engine of our own, for machines where none answers.
//!
//! It has its own data, state, socket and bridge, and sets no packet filter rules and no kernel
//! switches, so that it leaves nothing behind and disturbs no other engine. (Without a bridge of its own, a second
//! engine would delete the first one's.) Published ports go through its proxy process.

use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use rustix::process::{Pid, Signal};

use crate::shell;

/// An engine that answers: the machine's, or ours while this value lives.
pub(crate) struct Engine {
    /// What `DOCKER_HOST` must be, when it is ours.
    pub(crate) host: Option<String>,
    /// Stops the engine when this value goes.
    _own: Option<Own>,
}

struct Own {
    daemon: Child,
    bridge: String,
    dir: PathBuf,
}

/// Finds an engine that answers, or starts one.
pub(crate) fn engine() -> anyhow::Result<Engine> {
    let answers =
        shell::read(shell::command("docker").args(["version", "--format", "{{.Server.Version}}"]));
    if let Ok(version) = answers {
        println!("using the Docker Engine that answers ({})", version.trim());
        return Ok(Engine {
            host: None,
            _own: None,
        });
    }
    if !shell::is_root() {
        bail!(
            "no Docker Engine answers, and starting one needs root: start one, or run this as root"
        );
    }
    let dockerd = shell::find("dockerd")
        .context("no Docker Engine answers and `dockerd` is not installed")?;

    let id = std::process::id();
    let bridge = format!("lse{id}");
    let dir = PathBuf::from(format!("/var/tmp/longshore-engine-{id}"));
    std::fs::create_dir_all(&dir)?;
    // The third and fourth byte follow the process, so that two runs rarely meet; a meeting is an error.
    let address = format!("172.31.{}.{}/28", 64 + (id / 8) % 128, (id % 8) * 16 + 1);
    shell::run("ip", ["link", "add", &bridge, "type", "bridge"])?;
    let mut engine = Own {
        bridge: bridge.clone(),
        daemon: {
            shell::run("ip", ["addr", "add", &address, "dev", &bridge])?;
            shell::run("ip", ["link", "set", &bridge, "up"])?;
            let log = std::fs::File::create(dir.join("log"))?;
            let empty = dir.join("daemon.json");
            std::fs::write(&empty, "{}")?;
            shell::command(dockerd)
                .arg("--config-file")
                .arg(&empty)
                .arg("--data-root")
                .arg(dir.join("data"))
                .arg("--exec-root")
                .arg(dir.join("exec"))
                .arg("--pidfile")
                .arg(dir.join("pid"))
                .arg("--host")
                .arg(format!("unix://{}/s", dir.display()))
                .arg("--bridge")
                .arg(&bridge)
                .args([
                    "--iptables=false",
                    "--ip6tables=false",
                    "--ip-masq=false",
                    "--ip-forward=false",
                ])
                .stdin(Stdio::null())
                .stdout(log.try_clone()?)
                .stderr(log)
                .spawn()
                .context("cannot start dockerd")?
        },
        dir: dir.clone(),
    };
    let host = format!("unix://{}/s", dir.display());
    let start = Instant::now();
    loop {
        let asked = shell::read(
            shell::command("docker")
                .args(["version", "--format", "{{.Server.Version}}"])
                .env("DOCKER_HOST", &host),
        );
        if let Ok(version) = asked {
            println!("started a Docker Engine of our own ({})", version.trim());
            return Ok(Engine {
                host: Some(host),
                _own: Some(engine),
            });
        }
        let ended = engine.daemon.try_wait()?;
        if ended.is_some() || start.elapsed() > Duration::from_mins(1) {
            let log = std::fs::read_to_string(dir.join("log")).unwrap_or_default();
            let tail: Vec<_> = log.lines().rev().take(20).collect();
            drop(engine);
            bail!(
                "the Docker Engine did not start:\n{}",
                tail.into_iter().rev().collect::<Vec<_>>().join("\n")
            );
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

impl Drop for Own {
    fn drop(&mut self) {
        let pid = i32::try_from(self.daemon.id()).ok().and_then(Pid::from_raw);
        if let Some(pid) = pid {
            // On SIGTERM it stops its containers and takes its mounts away.
            let _ = rustix::process::kill_process(pid, Signal::TERM);
        }
        let start = Instant::now();
        while matches!(self.daemon.try_wait(), Ok(None)) {
            if start.elapsed() > Duration::from_secs(40) {
                drop(self.daemon.kill());
                drop(self.daemon.wait());
                break;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        drop(shell::run("ip", ["link", "del", &self.bridge]));
        if let Err(error) = std::fs::remove_dir_all(&self.dir) {
            eprintln!(
                "the engine's directory {} stays: {error}",
                self.dir.display()
            );
        }
    }
}
