//! What a registry costs as it grows: start, pages, pushes and collection at different sizes.
//!
//! Each task makes what it needs, measures it at two or more sizes in one run, and shows the ratio of each size to the
//! first: a cost that is flat has ratios near 1. Peers take part where a task needs nothing but the distribution API.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use anyhow::{Context as _, ensure};
use e2e::Server;
use e2e::server::Options;
use serde_json::{Value, json};

use super::content::{MANIFEST, Random};
use super::contestant::{OURS, Peer};
use super::load::{all, expect, push_blob};
use super::report::median;
use super::wire::{Base, Wire};
use super::{Arguments, Task, collection, process, replicas, say};

/// Pushers that fill a registry.
const FILLERS: usize = 32;
/// Repositories that manifests are spread over.
const REPOSITORIES: u64 = 100;
/// Starts that are measured at each size.
const STARTS: usize = 5;
/// Pages and pushes that are measured at each size.
const SAMPLES: usize = 300;
/// The figures of one task.
pub(crate) struct Table {
    task: Task,
    title: String,
    load: String,
    rows: Vec<Row>,
    failures: Vec<String>,
}

/// One contestant at one size.
struct Row {
    name: String,
    size: u64,
    /// What was measured, in the unit that its name ends with.
    figures: BTreeMap<&'static str, f64>,
}

impl Table {
    fn new(task: Task, title: String) -> Self {
        let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
        Self {
            task,
            title,
            load: load.split(' ').next().unwrap_or_default().to_owned(),
            rows: Vec::new(),
            failures: Vec::new(),
        }
    }

    pub(crate) fn row(&mut self, name: &str, size: u64, figures: &[(&'static str, f64)]) {
        self.rows.push(Row {
            name: name.to_owned(),
            size,
            figures: figures.iter().copied().collect(),
        });
    }

    /// The ratio of a figure to that of the same contestant's first row.
    fn ratio(&self, row: &Row, figure: &str) -> Option<f64> {
        let first = self.rows.iter().find(|first| first.name == row.name)?;
        Some(row.figures.get(figure)? / first.figures.get(figure)?.max(1e-9))
    }

    pub(crate) fn failed(&self) -> bool {
        !self.failures.is_empty()
    }

    pub(crate) fn write(&self, text: &mut String) {
        // Writing to a string does not fail.
        let _ = writeln!(
            text,
            "\n{}: {} (load average {})",
            self.task.name(),
            self.title,
            self.load
        );
        for row in &self.rows {
            let _ = write!(text, "  {:<20} {:>9}", row.name, row.size);
            for (figure, value) in &row.figures {
                let ratio = self
                    .ratio(row, figure)
                    .map_or_else(String::new, |ratio| format!(" ({ratio:.2})"));
                let _ = write!(text, "   {figure} {value:.3}{ratio}");
            }
            text.push('\n');
        }
        for failure in &self.failures {
            let _ = writeln!(text, "  failed: {failure}");
        }
    }

    pub(crate) fn json(&self) -> Value {
        let rows: Vec<_> = self
            .rows
            .iter()
            .map(|row| {
                let ratios: BTreeMap<_, _> = row
                    .figures
                    .keys()
                    .map(|figure| (*figure, self.ratio(row, figure)))
                    .collect();
                json!({ "name": row.name, "size": row.size, "figures": row.figures, "of_first": ratios })
            })
            .collect();
        json!({
            "task": self.task.name(),
            "title": self.title,
            "load_average": self.load,
            "rows": rows,
            "failures": self.failures,
        })
    }
}

/// Does one task.
pub(crate) fn run(task: Task, arguments: &Arguments, program: &Path, dir: &Path) -> Table {
    let growth = Growth {
        arguments,
        program: program.to_owned(),
        dir: dir.join(task.name()),
    };
    let title = match task {
        Task::Start => {
            "from the start of the process until it answers, by number of manifests".to_owned()
        }
        Task::TagPage => "a page of 100 tags from a random place, by number of tags".to_owned(),
        Task::PushAtTags => {
            "PUT of one manifest under a new tag, by number of tags in the repository".to_owned()
        }
        Task::Collection => {
            "collection, by number of live manifests: its cost; pulls of 1 MiB on 8 connections beside it and without"
                .to_owned()
        }
        Task::Replicas => {
            "by number of replicas over one PostgreSQL and one S3 store, 12 clients; `held`: each replica to a tenth of a core"
                .to_owned()
        }
        _ => String::new(),
    };
    let mut table = Table::new(task, title);
    let outcome = match task {
        Task::Start => growth.start(&mut table),
        Task::TagPage => growth.each(&mut table, |growth, name, base, table| {
            growth.tag_page(name, base, table)
        }),
        Task::PushAtTags => growth.each(&mut table, |growth, name, base, table| {
            growth.push_at_tags(name, base, table)
        }),
        Task::Collection => collection::run(&growth, &mut table),
        Task::Replicas => replicas::run(&growth, &mut table),
        _ => Ok(()),
    };
    if let Err(error) = outcome {
        say(&format!("{}: {error:#}", task.name()));
        table.failures.push(format!("{error:#}"));
    }
    table
}

/// What a task has to work with.
pub(crate) struct Growth<'a> {
    pub(crate) arguments: &'a Arguments,
    pub(crate) program: PathBuf,
    /// A directory of the task's own.
    pub(crate) dir: PathBuf,
}

impl Growth<'_> {
    fn server(&self, config: Option<&str>) -> anyhow::Result<(Server, Base)> {
        self.server_in(&self.dir, config)
    }

    /// Starts our server on a data directory.
    pub(crate) fn server_in(
        &self,
        dir: &Path,
        config: Option<&str>,
    ) -> anyhow::Result<(Server, Base)> {
        let mut options = Options::new(self.program.clone()).data(dir);
        if let Some(config) = config {
            options = options.config(config);
        }
        let server = options.start().map_err(|error| anyhow::anyhow!(error))?;
        let base = Base::parse(server.url()).map_err(anyhow::Error::msg)?;
        Ok((server, base))
    }

    /// Every contestant does a task; one that fails takes nobody with it.
    fn each(
        &self,
        table: &mut Table,
        work: impl Fn(&Self, &str, &Base, &mut Table) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let (_server, base) = self.server(None)?;
        let peers = self.arguments.peers.iter().map(Peer::place);
        for (name, base) in std::iter::once((OURS, &base)).chain(peers) {
            if let Err(error) = work(self, name, base, table) {
                table.failures.push(format!("{name}: {error:#}"));
            }
        }
        Ok(())
    }

    fn start(&self, table: &mut Table) -> anyhow::Result<()> {
        let mut there = 0;
        for &size in &self.arguments.manifests {
            let (mut server, base) = self.server(None)?;
            say(&format!("start: filling up to {size} manifests"));
            fill(&base, there..size)?;
            there = there.max(size);
            server.stop();
            drop(server);
            let mut times = Vec::new();
            let mut memory = Vec::new();
            for _ in 0..STARTS {
                let start = Instant::now();
                let (mut server, base) = self.server(None)?;
                let (head, _) = Wire::open(&base)?.call("GET", "/v2/", "", b"")?;
                times.push(start.elapsed().as_secs_f64() * 1e3);
                expect(&head, 200, "GET of /v2/")?;
                memory.push(process::peak(server.pid())? as f64 / super::MIB as f64);
                server.stop();
            }
            table.row(
                OURS,
                size,
                &[("ms", median(&times)), ("peak MiB", median(&memory))],
            );
        }
        Ok(())
    }

    fn tag_page(&self, name: &str, base: &Base, table: &mut Table) -> anyhow::Result<()> {
        let tags = self.arguments.tags;
        for size in [tags / 20, tags] {
            let repository = format!("bench/page-{size}");
            say(&format!("tag-page: {name}: {size} tags"));
            set_tags(base, &repository, size)?;
            let mut wire = Wire::open(base)?;
            let mut random = Random::new()?;
            let (mut times, mut lengths) = (Vec::new(), Vec::new());
            for _ in 0..SAMPLES {
                let last = random.below(size.saturating_sub(101).max(1));
                let target = format!("/v2/{repository}/tags/list?n=100&last={}", tag(last));
                let start = Instant::now();
                let (head, body) = wire.call("GET", &target, "", b"")?;
                times.push(start.elapsed().as_secs_f64() * 1e3);
                expect(&head, 200, "GET of a page of tags")?;
                let page: Value = serde_json::from_slice(&body)?;
                let page = page["tags"].as_array().context("`tags` is missing")?;
                let wanted = Value::String(tag(last + 1));
                // A registry without pages gives all tags each time.
                ensure!(
                    page.contains(&wanted) && (name != OURS || page[0] == wanted),
                    "the page lacks {wanted}"
                );
                lengths.push(page.len() as f64);
            }
            let [middle, late] = percentiles(&times);
            let length = ("tags in an answer", median(&lengths));
            table.row(name, size, &[middle, late, length]);
        }
        Ok(())
    }

    fn push_at_tags(&self, name: &str, base: &Base, table: &mut Table) -> anyhow::Result<()> {
        let sizes = [0, self.arguments.tags];
        let repositories = sizes.map(|size| format!("bench/push-{size}"));
        for (repository, size) in repositories.iter().zip(sizes) {
            say(&format!("push-at-tags: {name}: {size} tags"));
            set_tags(base, repository, size.max(1))?;
        }
        let mut wire = Wire::open(base)?;
        let mut times = [Vec::new(), Vec::new()];
        // By turns, so that both see the same machine.
        for number in 0..SAMPLES as u64 {
            for (repository, times) in repositories.iter().zip(&mut times) {
                let manifest = manifest(&format!("{repository}-{number}-{}", process_id()));
                let start = Instant::now();
                put(&mut wire, repository, &format!("new-{number}"), &manifest)?;
                times.push(start.elapsed().as_secs_f64() * 1e3);
            }
        }
        for (size, times) in sizes.into_iter().zip(&times) {
            table.row(name, size, &percentiles(times));
        }
        Ok(())
    }
}

/// Pushes manifests with these numbers, each under a tag of its own, spread over the repositories.
pub(crate) fn fill(base: &Base, numbers: std::ops::Range<u64>) -> anyhow::Result<()> {
    if numbers.is_empty() {
        return Ok(());
    }
    let mut wire = Wire::open(base)?;
    for repository in 0..REPOSITORIES {
        push_blob(&mut wire, &format!("bench/fill-{repository}"), EMPTY)?;
    }
    let next = AtomicU64::new(numbers.start);
    all(FILLERS, |_| {
        let mut wire = Wire::open(base)?;
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= numbers.end {
                return Ok(());
            }
            let repository = format!("bench/fill-{}", number % REPOSITORIES);
            put(
                &mut wire,
                &repository,
                &tag(number),
                &manifest(&number.to_string()),
            )?;
        }
    })?;
    Ok(())
}

/// Gives a repository so many tags of one manifest.
fn set_tags(base: &Base, repository: &str, count: u64) -> anyhow::Result<()> {
    push_blob(&mut Wire::open(base)?, repository, EMPTY)?;
    let bytes = manifest(repository);
    let next = AtomicU64::new(0);
    all(8, |_| {
        let mut wire = Wire::open(base)?;
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= count {
                return Ok(());
            }
            put(&mut wire, repository, &tag(number), &bytes)?;
        }
    })?;
    Ok(())
}

fn put(wire: &mut Wire, repository: &str, tag: &str, manifest: &[u8]) -> anyhow::Result<()> {
    let kind = format!("Content-Type: {MANIFEST}\r\n");
    let target = format!("/v2/{repository}/manifests/{tag}");
    let (head, _) = wire.call("PUT", &target, &kind, manifest)?;
    expect(&head, 201, "PUT of a manifest")
}

/// A small manifest that only this name has.
fn manifest(name: &str) -> Vec<u8> {
    json!({
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "artifactType": "application/vnd.example.bench",
        "config": { "mediaType": "application/vnd.oci.empty.v1+json", "digest": e2e::digest(EMPTY), "size": EMPTY.len() },
        "layers": [{ "mediaType": "application/vnd.oci.empty.v1+json", "digest": e2e::digest(EMPTY), "size": EMPTY.len() }],
        "annotations": { "bench": name },
    })
    .to_string()
    .into_bytes()
}

/// Tags in the order of their numbers.
fn tag(number: u64) -> String {
    format!("v{number:08}")
}

fn process_id() -> u32 {
    std::process::id()
}

fn percentiles(times: &[f64]) -> [(&'static str, f64); 2] {
    [
        ("p50 ms", percentile(times, 50)),
        ("p99 ms", percentile(times, 99)),
    ]
}

pub(crate) fn percentile(values: &[f64], percent: usize) -> f64 {
    let mut values = values.to_vec();
    values.sort_unstable_by(f64::total_cmp);
    let at = values.len() * percent / 100;
    values.get(at).or(values.last()).copied().unwrap_or(0.0)
}

/// The empty JSON object, which every manifest here names.
const EMPTY: &[u8] = b"{}";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_to_the_first_size_of_the_same_contestant() {
        let mut table = Table::new(Task::TagPage, "t".to_owned());
        table.row(OURS, 10, &[("p50 ms", 2.0)]);
        table.row("peer", 10, &[("p50 ms", 1.0)]);
        table.row(OURS, 20, &[("p50 ms", 3.0)]);
        table.row("peer", 20, &[("p50 ms", 7.0)]);
        let value = table.json();
        assert_eq!(value["rows"][2]["of_first"]["p50 ms"], 1.5);
        assert_eq!(value["rows"][3]["of_first"]["p50 ms"], 7.0);
        let mut text = String::new();
        table.write(&mut text);
        assert!(text.contains("3.000 (1.50)"), "{text}");
    }

    #[test]
    fn percentiles_of_few_and_many() {
        let many: Vec<_> = (0..1000).map(f64::from).collect();
        assert!((percentile(&many, 99) - 990.0).abs() < 1e-9);
        assert!((percentile(&[5.0], 99) - 5.0).abs() < 1e-9);
        assert!(percentile(&[], 50).abs() < 1e-9);
    }

    #[test]
    fn tags_sort_as_their_numbers_do() {
        assert!(tag(9) < tag(10) && tag(99_999) < tag(100_000));
    }
}
