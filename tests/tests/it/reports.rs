//! The agent tells the registry what it runs: that stays, and what was reported is what its ledger says.

use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::{Duration, Instant};

use e2e::server::{Options, free_port};
use e2e::{Run, Scratch, Server, http, tools};
use serde_json::Value;

/// How long something may take before the test fails.
const PATIENCE: Duration = Duration::from_mins(1);

/// An agent with the `files` engine, which needs nothing else.
struct Agent {
    child: Child,
    scratch: Scratch,
}

impl Agent {
    fn start(scratch: Scratch, host: &str, more: &str) -> Self {
        let config = format!(
            "version: 1\nregistry:\n  host: {host}\n{more}state: state\nsocket: agent.sock\npoll: 1s\ntargets:\n  \
             - name: site\n    reference: {host}/shop/site:production\n    release: site\n    engine: files\n    \
             trust: none\n    files: {{path: {}}}\n    health: {{stability: 100ms, interval: 50ms}}\n",
            scratch.join("site").display()
        );
        let file = scratch.write("agent.yaml", config);
        let child = Run::new(tools::program())
            .words("agent run --config")
            .arg(file)
            .env("DOCKER_CONFIG", scratch.path())
            .spawn(&scratch.join("agent.log"));
        Self { child, scratch }
    }

    /// Waits until this release runs and is good; the agent hears of it by itself.
    fn runs(&self, digest: &str) {
        let socket = self.scratch.join("agent.sock");
        eventually("deployment", || {
            if !socket.exists() {
                return None;
            }
            let status = Run::new(tools::program())
                .words("agent status --json --socket")
                .arg(&socket)
                .run();
            // The socket answers before the first target starts.
            let status: Value = serde_json::from_str(&status.text()).ok()?;
            let is_there = status[0]["state"] == "good" && status[0]["running"]["digest"] == digest;
            is_there.then_some(())
        });
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.scratch.join("agent.log")).unwrap_or_default()
    }

    /// The lines of its ledger.
    fn ledger(&self) -> Vec<Value> {
        std::fs::read_to_string(self.scratch.join("state/targets/site/attempts.jsonl"))
            .unwrap_or_default()
            .lines()
            .map(|line| serde_json::from_str(line).expect("a line of the ledger is JSON"))
            .collect()
    }

    /// Kills it as a crash would, and gives back what it leaves.
    fn kill(mut self) -> Scratch {
        self.end();
        std::mem::take(&mut self.scratch)
    }

    fn end(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if std::thread::panicking() {
            #[expect(
                clippy::print_stderr,
                reason = "a test that failed shows what the program said"
            )]
            {
                eprintln!("the agent's log:\n{}", self.log());
            }
        }
        self.end();
    }
}

/// Publishes a version of the site and gives its digest.
fn publish(scratch: &Scratch, host: &str, version: u32) -> String {
    let files = scratch.dir(&format!("v{version}"));
    std::fs::write(files.join("index.html"), format!("version {version}"))
        .expect("a file can be written");
    Run::new(tools::program())
        .words("release push --json --name site --engine files --version")
        .arg(version.to_string())
        .arg(&files)
        .arg(format!("{host}/shop/site:production"))
        .env("DOCKER_CONFIG", scratch.path())
        .ok();
    let head = http::request(
        "HEAD",
        &format!("http://{host}/v2/shop/site/manifests/production"),
        &[("Accept", "application/vnd.oci.image.manifest.v1+json")],
        b"",
    );
    head.header("docker-content-digest")
        .expect("the registry tells the digest")
        .to_owned()
}

fn eventually<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(start.elapsed() < PATIENCE, "no {what} in time");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn delete(server: &Server, digest: &str) -> u16 {
    let url = format!("{}/v2/shop/site/manifests/{digest}", server.url());
    http::request("DELETE", &url, &[], b"").status()
}

/// The pins of the only holder.
fn pins(server: &Server) -> Vec<(String, String)> {
    let holders = server.get("/api/v1/pins").json();
    let Some(holder) = holders["items"][0]["holder"].as_str() else {
        return Vec::new();
    };
    assert!(holder.ends_with("/site"), "{holders}");
    let set = server.get(&format!("/api/v1/pins/{holder}")).json();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let mut pins: Vec<_> = set["pins"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|pin| (text(&pin["digest"]), text(&pin["reason"])))
        .collect();
    pins.sort();
    pins
}

/// What the registry keeps of the ledger, in the ledger's order.
fn reported(server: &Server) -> Vec<Value> {
    let page = server.get("/api/v1/attempts?limit=1000").json();
    assert_eq!(page["next"], Value::Null);
    let mut records: Vec<Value> = page["items"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|item| {
            assert!(item["link"] == "next" || item["sequence"] == 1, "{item}");
            item["record"].clone()
        })
        .collect();
    records.reverse();
    records
}

#[test]
fn what_runs_and_can_be_gone_back_to_cannot_be_deleted() {
    let server = Server::start();
    let sources = Scratch::new();
    let first = publish(&sources, server.host(), 1);
    let agent = Agent::start(Scratch::new(), server.host(), "");
    agent.runs(&first);
    eventually("pin of what runs", || {
        (pins(&server) == [(first.clone(), "runs".to_owned())]).then_some(())
    });
    assert_eq!(delete(&server, &first), 409);

    let mut digests = vec![first];
    for version in 2..=5 {
        let digest = publish(&sources, server.host(), version);
        agent.runs(&digest);
        // What was deployed just now was pinned before it was applied.
        assert_eq!(delete(&server, &digest), 409);
        digests.push(digest);
    }
    let mut wanted: Vec<_> = digests[2..]
        .iter()
        .map(|digest| (digest.clone(), "was good, to go back to".to_owned()))
        .collect();
    "runs".clone_into(&mut wanted[2].1);
    wanted.sort();
    eventually("set of three generations", || {
        (pins(&server) == wanted).then_some(())
    });
    for (digest, status) in digests.iter().zip([202, 202, 409, 409, 409]) {
        assert_eq!(delete(&server, digest), status, "{digest}");
    }

    // What was reported is what the ledger says, to the letter; also after the agent died.
    eventually("whole ledger", || {
        (reported(&server) == agent.ledger()).then_some(())
    });
    let outcomes = server.get("/api/v1/attempts?kind=outcome").json();
    let outcomes = outcomes["items"].as_array().expect("a list").len();
    assert_eq!(outcomes, 5);
    let scratch = agent.kill();
    std::fs::remove_file(scratch.join("agent.sock")).expect("the socket is left");
    let agent = Agent::start(scratch, server.host(), "");
    agent.runs(&publish(&sources, server.host(), 6));
    eventually("whole ledger", || {
        (reported(&server) == agent.ledger()).then_some(())
    });

    // An operator's word is the last one.
    let holders = server.get("/api/v1/pins").json();
    let holder = holders["items"][0]["holder"].as_str().expect("a holder");
    drop(agent);
    let run = |words: &str| Run::new(tools::program()).words(words).arg(server.host());
    run("pin ls").ok().says(holder);
    run("pin ls").arg(holder).ok().says("runs");
    run("pin rm").arg(holder).ok();
    run("pin ls").arg(holder).fails();
    assert_eq!(delete(&server, &digests[4]), 202);
    let manifest = format!("shop/site@{}", digests[3]);
    run("pin set")
        .arg("legal/hold")
        .arg(&manifest)
        .ok()
        .says("held");
    assert_eq!(delete(&server, &digests[3]), 409);
    run("storage").ok().says("shop").says("stored in");
    run("quota set").args(["shop", "1KiB"]).ok().says("1.0 KiB");
    run("quota ls").ok().says("1.0 KiB");
    let refused = Run::new(tools::program())
        .words("release push --name site --engine files")
        .arg(sources.dir("v1"))
        .arg(format!("{}/shop/site:late", server.host()))
        .fails();
    refused.says("quota of");
}

#[test]
fn an_agent_that_may_not_report_or_is_not_to_deploys_all_the_same() {
    let server = Server::start();
    let sources = Scratch::new();
    let digest = publish(&sources, server.host(), 1);
    let agent = Agent::start(Scratch::new(), server.host(), "  report: false\n");
    agent.runs(&digest);
    assert_eq!(pins(&server), []);
    assert_eq!(reported(&server), Vec::<Value>::new());
}

#[test]
fn another_registry_is_told_nothing_and_nobody_complains() {
    let scratch = Scratch::new();
    let host = format!("127.0.0.1:{}", free_port());
    let config = format!(
        "version: 0.1\nlog: {{accesslog: {{disabled: false}}, level: info}}\nstorage:\n  filesystem:\n    rootdirectory: {}\nhttp:\n  addr: {host}\n",
        scratch.join("data").display()
    );
    let config = scratch.write("registry.yml", config);
    let other = Other::start(&config, &scratch.join("registry.log"));
    eventually("registry", || {
        std::net::TcpStream::connect(&host).ok().map(drop)
    });
    let sources = Scratch::new();
    let digest = publish(&sources, &host, 1);
    let agent = Agent::start(Scratch::new(), &host, "");
    agent.runs(&digest);
    agent.runs(&publish(&sources, &host, 2));
    let log = agent.log();
    for word in ["WARN", "ERROR", "pins", "report"] {
        assert!(!log.contains(word), "{word}: {log}");
    }
    drop(agent);
    let asked = std::fs::read_to_string(&other.log).expect("it logs");
    let api: Vec<_> = asked
        .lines()
        .filter(|line| line.contains("/api/v1/") && line.contains("HTTP/1.1\" "))
        .collect();
    assert!(
        api.iter()
            .all(|line| line.contains("GET /api/v1/openapi.json")
                || line.contains("GET /api/v1/events")),
        "{api:#?}"
    );
    assert!(
        api.iter().filter(|line| line.contains("openapi")).count() <= 1,
        "{api:#?}"
    );
}

#[test]
fn a_user_reports_under_its_own_name() {
    let home = Scratch::new();
    let users = home.write("htpasswd", HTPASSWD);
    let access = "access:\n  - principals: [alice]\n    repositories: ['**']\n    actions: [pull, push, tag-create, tag-overwrite]\n";
    let config = format!(
        "version: 1\nauth:\n  htpasswd: {}\n{access}",
        users.display()
    );
    let server = Server::with(&Options::new(tools::program()).config(config));
    let sources = Scratch::new();
    Run::new(tools::program())
        .words("login --username alice --password-stdin")
        .arg(server.host())
        .env("DOCKER_CONFIG", sources.path())
        .stdin("correct-horse")
        .ok();
    publish_as(&sources, server.host());
    let scratch = Scratch::new();
    let password = scratch.write("password", "correct-horse\n");
    let more = format!(
        "  username: alice\n  password_file: {}\n",
        password.display()
    );
    let _agent = Agent::start(scratch, server.host(), &more);
    let holder = eventually("holder", || {
        let list = Run::new(tools::program())
            .words("pin ls --json")
            .arg(server.host())
            .env("DOCKER_CONFIG", sources.path())
            .ok()
            .json();
        list[0]["holder"].as_str().map(str::to_owned)
    });
    assert!(
        holder.starts_with("alice/") && holder.ends_with("/site"),
        "{holder}"
    );
    // She is no operator, and another name is another one's.
    let refused = Run::new(tools::program())
        .words("pin set")
        .args([server.host(), "bob/web"])
        .env("DOCKER_CONFIG", sources.path())
        .fails();
    refused.says("alice");
}

fn publish_as(scratch: &Scratch, host: &str) {
    let files = scratch.dir("files");
    std::fs::write(files.join("index.html"), "x").expect("a file can be written");
    Run::new(tools::program())
        .words("release push --name site --engine files")
        .arg(&files)
        .arg(format!("{host}/shop/site:production"))
        .env("DOCKER_CONFIG", scratch.path())
        .ok();
}

/// A registry of another kind, killed when this value goes.
struct Other {
    child: Child,
    log: PathBuf,
}

impl Other {
    fn start(config: &Path, log: &Path) -> Self {
        let child = Run::new(tools::tool("docker-registry"))
            .arg("serve")
            .arg(config)
            .spawn(log);
        Self {
            child,
            log: log.to_owned(),
        }
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// Operators have a password, so their commands go by the token service, as those of every client.
#[test]
fn an_operator_with_a_password_may_use_every_command_of_one() {
    let home = Scratch::new();
    let users = home.write("htpasswd", HTPASSWD);
    let access = "access:\n  - principals: [alice]\n    repositories: ['**']\n    actions: [pull, push, tag-create, tag-overwrite, delete, admin]\n";
    let config = format!(
        "version: 1\nauth:\n  htpasswd: {}\n{access}",
        users.display()
    );
    let server = Server::with(&Options::new(tools::program()).config(config));
    let host = server.host();
    let as_alice = |words: &str| {
        Run::new(tools::program())
            .words(words)
            .env("DOCKER_CONFIG", home.path())
    };
    as_alice(&format!("login --username alice --password-stdin {host}"))
        .stdin("correct-horse")
        .ok();
    publish_as(&home, host);
    for words in [
        "gc status HOST",
        "gc dry-run HOST",
        "gc run HOST",
        "scrub status HOST",
        "scrub run HOST",
        "retention ls HOST",
        "storage HOST",
        "quota set HOST shop 1GiB",
        "quota ls HOST",
        "pin set HOST another/holder",
        "pin ls HOST",
        "explain HOST/shop/site:production",
        "mode read-only HOST",
        "mode normal HOST",
        "rm --repository HOST/shop/site",
    ] {
        as_alice(&words.replace("HOST", host)).ok();
    }
}

/// `alice` with the password `correct-horse`, at the least cost.
const HTPASSWD: &str = "alice:$2b$05$abcdefghijklmnopqrstuuZ0Fx87Pb/Aqb0E90lfvCwzXnaFKUHpS\n";
