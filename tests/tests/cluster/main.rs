//! Cluster mode under attack, through the built program: replicas that push at once, databases that restart and fail
//! over, object stores that err, and replicas that stop in the middle of a push. After each the same must hold:
//! what was acknowledged reads back and re-hashes through every replica, and a refusal is a clear one.

#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot go on ends here, with what was said"
)]

#[cfg(test)]
mod database;
#[cfg(test)]
mod events;
#[cfg(test)]
mod full;
#[cfg(test)]
mod objects;
#[cfg(test)]
mod pushes;
#[cfg(test)]
mod recovery;
#[cfg(test)]
mod redirect;
#[cfg(test)]
mod replica;
#[cfg(test)]
mod tls;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use e2e::cluster::{Storage, replicas};
use e2e::http::{Connection, Response};
use e2e::objects::Kind;
use e2e::server::Options;
use e2e::wire::noise;
use e2e::{Cluster, Run, Scratch, Server, digest, image, tools};

/// Replicas over a cluster of their own.
struct Site {
    /// Dropped first.
    servers: Vec<Server>,
    storage: Storage,
    cluster: Cluster,
}

impl Site {
    fn start(kind: Kind, count: usize) -> Self {
        let cluster = Cluster::start(kind);
        let storage = cluster.storage();
        Self::over(cluster, storage, count)
    }

    fn over(cluster: Cluster, storage: Storage, count: usize) -> Self {
        Self {
            servers: replicas(&options(&storage), count),
            storage,
            cluster,
        }
    }

    /// After the trouble: the pushes end, every replica goes on, whatever was refused was refused clearly, and what was
    /// acknowledged before and meanwhile is readable from each.
    fn lost_nothing(&mut self, pushers: Pushers, kept: &Keepsake) {
        let pushed = pushers.finish();
        healthy(&mut self.servers);
        pushed.refused_clearly();
        pushed.all_there(&self.servers);
        for server in &self.servers {
            kept.readable(server);
        }
    }
}

/// A replica of a storage.
fn options(storage: &Storage) -> Options {
    Options::new(tools::program()).storage(storage)
}

/// An artifact with a layer in a row and one in an object, which must stay readable whatever happens.
fn keepsake(server: &Server, name: &str) -> Keepsake {
    let repository = format!("kept/{name}");
    let layers = [noise(5, 900), noise(6, 300_000)];
    let manifests = layers
        .iter()
        .zip(["small", "large"])
        .map(|(layer, tag)| {
            image::push_artifact(
                server.url(),
                &repository,
                tag,
                "application/vnd.example",
                layer,
            )
        })
        .collect();
    Keepsake {
        repository,
        layers: layers.iter().map(|layer| digest(layer)).collect(),
        manifests,
    }
}

struct Keepsake {
    repository: String,
    layers: Vec<String>,
    manifests: Vec<String>,
}

impl Keepsake {
    /// Wants all of it through this server.
    #[track_caller]
    fn readable(&self, server: &Server) {
        for (tag, manifest) in ["small", "large"].iter().zip(&self.manifests) {
            let answer = server.get(&format!("/v2/{}/manifests/{tag}", self.repository));
            assert_eq!(answer.status(), 200, "{}", answer.text());
            assert_eq!(&digest(&answer.body), manifest);
        }
        for layer in &self.layers {
            e2e::wire::holds(server, &self.repository, layer);
        }
    }
}

/// Wants what a server in trouble may say: an error of its own with words, and nothing that blames the client.
#[track_caller]
fn in_trouble(answer: &Response) {
    let text = answer.text();
    assert!(
        [500, 503, 507].contains(&answer.status()),
        "{} {text}",
        answer.status()
    );
    let message = answer.json()["errors"][0]["message"].to_string();
    assert!(message.len() > 10, "{text}");
    if answer.status() != 500 {
        assert!(answer.header("retry-after").is_some(), "{text}");
    }
}

/// Clients that push without end, each into a repository of its own, and note what was acknowledged and what was
/// answered else.
struct Pushers {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
    pushed: Arc<Mutex<Pushed>>,
}

/// What pushers know.
#[derive(Debug, Default)]
struct Pushed {
    /// Repository, tag, manifest.
    tags: Vec<(String, String, String)>,
    /// Repository, blob.
    blobs: Vec<(String, String)>,
    /// Answers that were no acknowledgement, as `STATUS TEXT`.
    refused: Vec<String>,
    /// Connections that broke.
    broken: u64,
}

impl Pushers {
    fn start(servers: &[Server], count: u64) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let pushed = Arc::new(Mutex::new(Pushed::default()));
        let urls: Vec<_> = servers
            .iter()
            .map(|server| server.url().to_owned())
            .collect();
        let threads = (0..count)
            .map(|number| {
                let (stop, pushed, urls) = (Arc::clone(&stop), Arc::clone(&pushed), urls.clone());
                std::thread::spawn(move || {
                    let mut round = 0;
                    while !stop.load(Ordering::Relaxed) {
                        round += 1;
                        let at = usize::try_from(number + round).unwrap() % urls.len();
                        let repository = format!("push/app{number}");
                        if let Err(error) = push(&urls[at], &repository, number, round, &pushed) {
                            let mut pushed = pushed.lock().unwrap();
                            match error {
                                Some(text) => pushed.refused.push(text),
                                None => pushed.broken += 1,
                            }
                            drop(pushed);
                            std::thread::sleep(std::time::Duration::from_millis(20));
                        }
                    }
                })
            })
            .collect();
        Self {
            stop,
            threads,
            pushed,
        }
    }

    /// How many tags were acknowledged so far.
    fn acknowledged(&self) -> usize {
        self.pushed.lock().unwrap().tags.len()
    }

    /// How many requests were refused or broke off so far.
    fn troubles(&self) -> u64 {
        let pushed = self.pushed.lock().unwrap();
        pushed.refused.len() as u64 + pushed.broken
    }

    /// Waits until a push had trouble since `troubles` was `before`.
    #[track_caller]
    fn wait_for_trouble_since(&self, before: u64) {
        e2e::wire::wait_for("a refused push", || {
            (self.troubles() > before).then_some(())
        });
    }

    /// How many answers of this status came so far.
    fn refusals(&self, status: &str) -> usize {
        let pushed = self.pushed.lock().unwrap();
        let of_status = |text: &&String| text.starts_with(status);
        pushed.refused.iter().filter(of_status).count()
    }

    /// Waits until so many more tags were acknowledged.
    #[track_caller]
    fn wait_for_more(&self, more: usize) {
        let wanted = self.acknowledged() + more;
        e2e::wire::wait_for("further pushes", || {
            (self.acknowledged() >= wanted).then_some(())
        });
    }

    fn finish(self) -> Pushed {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads {
            thread.join().unwrap();
        }
        Arc::into_inner(self.pushed).unwrap().into_inner().unwrap()
    }
}

/// One push: a small blob, an object every third time, a manifest. `Some` is what a refusal said.
fn push(
    url: &str,
    repository: &str,
    number: u64,
    round: u64,
    pushed: &Mutex<Pushed>,
) -> Result<(), Option<String>> {
    let mut connection = Connection::open(url).map_err(|_| None)?;
    let mut send = |method: &str, target: &str, kind: &str, body: &[u8]| {
        let answer = connection
            .request(method, target, &[("Content-Type", kind)], body)
            .map_err(|_| None)?;
        if answer.status() == 201 {
            return Ok(());
        }
        Err(Some(format!("{} {}", answer.status(), answer.text())))
    };
    let seed = number * 1_000_000 + round;
    let length = if round.is_multiple_of(3) { 30_000 } else { 500 };
    let mut descriptors = Vec::new();
    for bytes in [noise(seed, 100), noise(seed + 500_000, length)] {
        let blob = digest(&bytes);
        let target = format!("/v2/{repository}/blobs/uploads/?digest={blob}");
        send("POST", &target, "application/octet-stream", &bytes)?;
        descriptors.push(image::descriptor(
            "application/vnd.example",
            &blob,
            bytes.len(),
        ));
        pushed
            .lock()
            .unwrap()
            .blobs
            .push((repository.to_owned(), blob));
    }
    let manifest = serde_json::json!({
        "schemaVersion": 2,
        "mediaType": image::MANIFEST,
        "config": descriptors[0],
        "layers": [descriptors[1]],
    })
    .to_string();
    let tag = format!("t{round}");
    let target = format!("/v2/{repository}/manifests/{tag}");
    send("PUT", &target, image::MANIFEST, manifest.as_bytes())?;
    let manifest = digest(manifest.as_bytes());
    pushed
        .lock()
        .unwrap()
        .tags
        .push((repository.to_owned(), tag, manifest));
    Ok(())
}

impl Pushed {
    /// Wants everything that was acknowledged, through each of these servers in turn.
    #[track_caller]
    fn all_there(&self, servers: &[Server]) {
        let mut connections: Vec<_> = servers
            .iter()
            .map(|server| Connection::open(server.url()).unwrap())
            .collect();
        let count = connections.len();
        let mut lost = Vec::new();
        let mut look = |at: usize, target: String, wanted: &str| {
            let answer = connections[at % count]
                .request("GET", &target, &[("Accept", image::MANIFEST)], &[])
                .unwrap();
            if answer.status() != 200 || digest(&answer.body) != wanted {
                lost.push(format!("{target}: {}", answer.status()));
            }
        };
        for (at, (repository, tag, manifest)) in self.tags.iter().enumerate() {
            look(at, format!("/v2/{repository}/manifests/{tag}"), manifest);
        }
        for (at, (repository, blob)) in self.blobs.iter().enumerate() {
            look(at, format!("/v2/{repository}/blobs/{blob}"), blob);
        }
        assert!(
            lost.is_empty(),
            "{} of {} acknowledged writes are lost: {lost:#?}",
            lost.len(),
            self.tags.len() + self.blobs.len()
        );
    }

    /// Wants every refusal to be a server's own trouble.
    #[track_caller]
    fn refused_clearly(&self) {
        for text in &self.refused {
            assert!(
                ["500 ", "503 ", "507 "]
                    .iter()
                    .any(|status| text.starts_with(status))
                    && text.contains("message"),
                "{text}"
            );
        }
    }
}

/// Wants `verify-store` to find nothing.
#[track_caller]
fn verify(storage: &Storage) {
    let scratch = Scratch::new();
    let config = scratch.write("verify.yaml", format!("version: 1\n{}", storage.config()));
    let mut run = Run::new(tools::program())
        .args(["--json", "verify-store", "--config"])
        .arg(config);
    for (key, value) in storage.environment() {
        run = run.env(key, value);
    }
    let report = run.ok();
    assert_eq!(report.json()["problems"], serde_json::json!([]), "{report}");
}

/// Wants servers that run and did not panic.
#[track_caller]
fn healthy(servers: &mut [Server]) {
    for server in servers {
        assert!(server.runs(), "a replica ended\n{}", server.logged());
        e2e::wire::wait_for("a ready replica", || {
            (server.get("/readyz").status() == 200).then_some(())
        });
        assert!(!server.logged().contains("panicked"), "{}", server.logged());
    }
}
