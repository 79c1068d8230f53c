use std::sync::Mutex;

use serde_json::Value;

use super::*;
use crate::attempt::{Ledger, Record};
use crate::engine::BoxFuture;
use crate::machine::{Attempt, Generation, Running, Standing, Trigger};
use crate::release::{EngineKind, ImagePin, ReleaseConfig};
use crate::runner::disk::Kept;
use crate::testing::{Fake, target};

/// A registry made of memory.
#[derive(Default)]
struct World {
    ours: bool,
    down: bool,
    /// What was asked of it, without the records.
    calls: Vec<&'static str>,
    pins: Vec<(String, Vec<Pin>)>,
    records: Vec<Value>,
    /// The last record that it says it knows.
    head: Option<String>,
    /// What the batches said they follow.
    previous: Vec<Option<String>>,
}

#[derive(Clone, Default)]
struct Registry(Arc<Mutex<World>>);

impl Registry {
    fn ours() -> Self {
        let registry = Self::default();
        registry.world().ours = true;
        registry
    }

    fn world(&self) -> std::sync::MutexGuard<'_, World> {
        self.0.lock().unwrap()
    }

    fn called(&self, call: &'static str) -> Result<(), ReportError> {
        let mut world = self.world();
        world.calls.push(call);
        if world.down {
            return Err(ReportError::Failed("it is down".to_owned()));
        }
        Ok(())
    }

    fn count(&self, call: &str) -> usize {
        let world = self.world();
        world.calls.iter().filter(|other| **other == call).count()
    }
}

impl Reports for Registry {
    fn takes_reports<'a>(&'a self, _: &'a str) -> BoxFuture<'a, Result<bool, ReportError>> {
        Box::pin(async {
            self.called("probe")?;
            Ok(self.world().ours)
        })
    }

    fn user<'a>(&'a self, _: &'a str) -> BoxFuture<'a, Option<String>> {
        Box::pin(async { Some("deploy".to_owned()) })
    }

    fn set_pins<'a>(
        &'a self,
        _: &'a str,
        holder: &'a str,
        pins: &'a [Pin],
    ) -> BoxFuture<'a, Result<usize, ReportError>> {
        Box::pin(async move {
            self.called("pins")?;
            self.world().pins.push((holder.to_owned(), pins.to_vec()));
            Ok(0)
        })
    }

    fn add_attempts<'a>(
        &'a self,
        _: &'a str,
        _: &'a str,
        _: &'a str,
        previous: Option<&'a str>,
        records: &'a [Value],
    ) -> BoxFuture<'a, Result<Option<String>, ReportError>> {
        Box::pin(async move {
            self.called("attempts")?;
            let mut world = self.world();
            if let Some(last) = records.last() {
                world.head = last["hash"].as_str().map(str::to_owned);
                world.previous.push(previous.map(str::to_owned));
                world.records.extend_from_slice(records);
            }
            Ok(world.head.clone())
        })
    }
}

struct Bench {
    _state: tempfile::TempDir,
    paths: Paths,
    registry: Registry,
    handle: Handle,
    task: tokio::task::JoinHandle<()>,
}

impl Bench {
    fn new(registry: Registry) -> Self {
        let state = tempfile::tempdir().unwrap();
        let paths = Paths::new(state.path(), "shop");
        paths.create().unwrap();
        let handle = Handle::new();
        let task = start(&paths, &registry, &handle);
        Self {
            _state: state,
            paths,
            registry,
            handle,
            task,
        }
    }

    /// Another process, another task; what is on the disk stays.
    fn restart(&mut self) {
        self.task.abort();
        self.handle = Handle::new();
        self.task = start(&self.paths, &self.registry, &self.handle);
    }

    fn ledger(&self) -> Ledger {
        Ledger::open(&self.paths.ledger(), "now").unwrap()
    }

    async fn until(&self, condition: impl Fn(&World) -> bool) {
        let reached = async {
            let mut pause = Duration::from_millis(100);
            while !condition(&self.registry.world()) {
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(Duration::from_mins(10));
                // File work is done on other threads, for which paused time does not wait.
                std::thread::sleep(Duration::from_millis(1));
            }
        };
        tokio::time::timeout(Duration::from_hours(100), reached)
            .await
            .expect("it comes about");
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn start(paths: &Paths, registry: &Registry, handle: &Handle) -> tokio::task::JoinHandle<()> {
    let reporter = Reporter {
        reports: Arc::new(registry.clone()),
        target: Arc::new(target()),
        paths: paths.clone(),
        holder: Some("deploy/host1".to_owned()),
        clock: Arc::new(Fake::default()),
        handle: handle.clone(),
    };
    tokio::spawn(reporter.run(CancellationToken::new()))
}

fn digest(text: &str) -> Digest {
    Digest::sha256(text.as_bytes())
}

/// `runs` runs, `good` were good, and `next` is at its beginning.
fn state(runs: &str, good: &[&str], next: &str) -> State {
    State {
        phase: Phase::Resolved,
        attempt: Some(Attempt {
            number: 7,
            digest: digest(next),
            trigger: Trigger::Poll,
            config: String::new(),
            started: String::new(),
            previous: Some(digest(runs)),
        }),
        running: Some(Running {
            digest: digest(runs),
            standing: Standing::Good,
            config: String::new(),
            since: String::new(),
        }),
        good: good
            .iter()
            .map(|text| Generation {
                digest: digest(text),
                since: String::new(),
            })
            .collect(),
        ..State::default()
    }
}

fn note(text: &str) -> Record {
    Record::Note {
        at: "now".to_owned(),
        text: text.to_owned(),
    }
}

#[tokio::test(start_paused = true)]
async fn what_runs_what_was_good_and_what_comes_is_pinned_before_anybody_goes_on() {
    let bench = Bench::new(Registry::ours());
    bench
        .handle
        .need(Releases::of(&state("one", &["one", "zero"], "two")));
    bench.handle.settle().await;
    let (holder, pins) = bench.registry.world().pins[0].clone();
    assert_eq!(holder, "deploy/host1/shop");
    let told: Vec<_> = pins
        .iter()
        .map(|pin| (pin.digest.clone(), pin.reason.as_str()))
        .collect();
    assert_eq!(
        told,
        [
            (digest("one"), "runs"),
            (digest("two"), "is being deployed"),
            (digest("zero"), "was good, to go back to"),
        ]
    );
    assert!(
        pins.iter()
            .all(|pin| pin.repository.as_str() == "shop/release")
    );

    // Its images are pinned once they are known, those of this registry.
    let image = |service: &str, reference: &str| ImagePin {
        service: service.to_owned(),
        reference: reference.to_owned(),
        digest: digest(service),
        media_type: String::new(),
        platforms: Vec::new(),
    };
    let config = ReleaseConfig {
        schema_version: 1,
        name: "shop".to_owned(),
        version: None,
        engine: EngineKind::Compose,
        entry: Vec::new(),
        variables: Vec::new(),
        images: vec![
            image("web", "registry.example:5000/shop/web:v2"),
            image("db", "docker.io/library/postgres:16"),
        ],
    };
    let two = digest("two");
    std::fs::create_dir(bench.paths.release(&two)).unwrap();
    bench
        .paths
        .keep(&two, &Kept::new(config, "longshore".to_owned()))
        .unwrap();
    let mut extracted = state("one", &["one", "zero"], "two");
    extracted.phase = Phase::Extracted;
    bench.handle.need(Releases::of(&extracted));
    bench.handle.settle().await;
    let (_, pins) = bench.registry.world().pins[1].clone();
    assert_eq!(pins.len(), 4);
    assert_eq!(pins[3].repository.as_str(), "shop/web");
    assert_eq!(pins[3].digest, digest("web"));

    // The same is not sent again; after hours it is, because the registry may have been restored.
    bench.handle.need(Releases::of(&extracted));
    bench.handle.settle().await;
    assert_eq!(bench.registry.count("pins"), 2);
    bench.until(|world| world.pins.len() == 3).await;
    assert_eq!(bench.registry.count("probe"), 1);
}

#[tokio::test(start_paused = true)]
async fn a_registry_of_another_kind_is_told_nothing_and_asked_rarely() {
    let bench = Bench::new(Registry::default());
    bench.handle.need(Releases::of(&state("one", &[], "two")));
    let begun = Instant::now();
    bench.handle.settle().await;
    assert!(begun.elapsed() < PATIENCE, "nobody waits for it");
    for n in 0..100 {
        let next = format!("{n}");
        bench.handle.need(Releases::of(&state("one", &[], &next)));
        bench.handle.wrote(n);
        bench.handle.settle().await;
        tokio::time::sleep(Duration::from_secs(30)).await;
    }
    assert!(bench.registry.count("probe") <= 2);
    assert_eq!(
        bench.registry.count("pins") + bench.registry.count("attempts"),
        0
    );
    // It may become ours.
    bench.registry.world().ours = true;
    bench.until(|world| !world.pins.is_empty()).await;
}

#[tokio::test(start_paused = true)]
async fn a_registry_that_is_down_delays_nobody_and_is_told_later() {
    let bench = Bench::new(Registry::ours());
    bench.registry.world().down = true;
    let begun = Instant::now();
    for n in 0..20 {
        let next = format!("{n}");
        bench.handle.need(Releases::of(&state("one", &[], &next)));
        bench.handle.settle().await;
    }
    assert!(begun.elapsed() < PATIENCE, "{:?}", begun.elapsed());
    let tries = bench.registry.count("probe");
    // The ledger grows, which is no reason to try sooner.
    for n in 0..600 {
        bench.handle.wrote(n);
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    let more = bench.registry.count("probe") - tries;
    assert!((1..15).contains(&more), "{more}");
    bench.handle.wrote(0);
    bench.registry.world().down = false;
    bench.until(|world| !world.pins.is_empty()).await;
    assert_eq!(bench.registry.world().pins[0].1[1].digest, digest("19"));
}

#[tokio::test(start_paused = true)]
async fn the_ledger_is_sent_in_order_and_after_what_is_known() {
    let mut bench = Bench::new(Registry::ours());
    let mut ledger = bench.ledger();
    let need = |bench: &Bench| bench.handle.need(Releases::of(&State::default()));
    let texts = |bench: &Bench| -> Vec<String> {
        let world = bench.registry.world();
        let texts = world.records.iter().map(|record| record["text"].as_str());
        texts.map(|text| text.unwrap().to_owned()).collect()
    };
    for n in 0..450 {
        ledger.append(&note(&n.to_string())).unwrap();
    }
    need(&bench);
    bench.handle.wrote(ledger.length());
    bench.until(|world| world.records.len() == 450).await;
    let expected: Vec<String> = (0..450).map(|n| n.to_string()).collect();
    assert_eq!(texts(&bench), expected);
    assert_eq!(bench.registry.world().previous[0], None);
    // What is written later follows, and nothing that is not on the disk for good is sent.
    let before = ledger.length();
    ledger.append(&note("later")).unwrap();
    bench.handle.wrote(before);
    tokio::time::sleep(Duration::from_mins(10)).await;
    assert_eq!(bench.registry.world().records.len(), 450);
    bench.handle.wrote(ledger.length());
    bench.until(|world| world.records.len() == 451).await;

    // Another process goes on where the registry is, also when that is further back than it was.
    bench.restart();
    {
        let mut world = bench.registry.world();
        world.records.truncate(3);
        world.head = world.records[2]["hash"].as_str().map(str::to_owned);
        world.previous.clear();
    }
    need(&bench);
    bench.handle.wrote(ledger.length());
    bench.until(|world| world.records.len() == 451).await;
    assert_eq!(texts(&bench)[2..5], ["2", "3", "4"]);
    let third = bench.registry.world().records[2]["hash"].clone();
    assert_eq!(
        bench.registry.world().previous[0].as_deref(),
        third.as_str()
    );

    // A registry that lost all of it gets all of it.
    bench.restart();
    *bench.registry.world() = World {
        ours: true,
        ..World::default()
    };
    need(&bench);
    bench.handle.wrote(ledger.length());
    bench.until(|world| world.records.len() == 451).await;

    // A ledger that begins anew follows nothing that the registry knows.
    bench.restart();
    std::fs::remove_file(bench.paths.ledger()).unwrap();
    let mut ledger = bench.ledger();
    ledger.append(&note("anew")).unwrap();
    bench.registry.world().previous.clear();
    need(&bench);
    bench.handle.wrote(ledger.length());
    bench.until(|world| world.records.len() == 452).await;
    assert_eq!(bench.registry.world().previous, [None]);
    assert_eq!(texts(&bench).last().unwrap(), "anew");
}

#[tokio::test(start_paused = true)]
async fn without_a_reporter_nobody_waits() {
    let begun = Instant::now();
    for handle in [Handle::default(), Handle::new()] {
        handle.need(Releases::of(&state("one", &[], "two")));
        handle.wrote(10);
        handle.settle().await;
    }
    assert_eq!(begun.elapsed(), Duration::ZERO);
}
