//! `cargo xtask test`: all tests, and a summary that hides nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use e2e::Cluster;

use crate::{Part, engine, mode, provision, shell};

/// The store's tests that start PostgreSQL servers and S3 stores.
const SERVERS: &[&str] = &[
    "cluster::",
    "collection_race::",
    "contract::",
    "lock_order::",
    "object_store",
    "recovery::",
    "reindex::",
    "transfer::",
    "a_retention_run_on_postgres",
    "the_audit_record_of_a_cluster",
    "a_reindex_makes_no_database",
];

/// The directory of the package with the wire-level suite.
const WIRE: &str = "crates/registry";

/// What of the end-to-end suites for both run modes does not run in cluster mode, and why.
const EMBEDDED: &[(&str, &str)] = &[
    (
        "backup::",
        "it is the backup of a data directory; a cluster is backed up with the tools of its two servers",
    ),
    (
        "disk::",
        "the disk is that of a data directory; the servers of a cluster have their own",
    ),
    ("demo::", "the demonstration is embedded mode"),
    (
        "a_data_directory_in_use_newer_or_foreign_is_left_alone",
        "a cluster has no data directory",
    ),
    (
        "a_damaged_blob_is_found_told_and_healed_by_a_push",
        "it changes a file; the store's own suite has wrong bytes of an object store found and healed",
    ),
    (
        "verify_store_looks_at_a_configuration_and_tells_what_is_not_there",
        "it removes files; the other tests here run `verify-store --config` on the cluster",
    ),
    (
        "a_chunk_cut_at_37_of_100_mib_and_a_kill_go_on_at_a_true_offset",
        "`replica::` of the suite `cluster` kills replicas in the middle of uploads, and goes on at others",
    ),
];

/// What one part of the tests came to.
#[derive(Debug, Default)]
struct Count {
    name: &'static str,
    passed: u64,
    failed: u64,
    not_run: Vec<String>,
    /// Tests that failed among the others and passed alone: each is a fault of the test or a race, to be mended.
    unsteady: Vec<String>,
    took: Duration,
    /// The outcome of each test by name.
    tests: BTreeMap<String, Outcome>,
}

impl Count {
    /// The names of what failed.
    fn failures(&self) -> Vec<String> {
        let failed = self
            .tests
            .iter()
            .filter(|(_, outcome)| **outcome == Outcome::Failed);
        failed.map(|(test, _)| test.clone()).collect()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Passed,
    Failed,
    NotRun,
}

/// Runs the tests; `false` when one failed.
pub(crate) fn run(
    only: Option<Part>,
    filter: Option<&str>,
    program: Option<PathBuf>,
) -> anyhow::Result<bool> {
    let mut counts = Vec::new();
    if only != Some(Part::E2e) {
        // What is built with Go takes minutes; the tests that need it come later.
        let tools = (only.is_none()).then(|| std::thread::spawn(provision::tools));
        let mut cargo = workspace();
        cargo.args(filter).arg("--");
        for name in SERVERS {
            cargo.args(["--skip", name]);
        }
        counts.push(tests("unit", &mut cargo)?);
        if let Some(Err(error)) = tools.map(std::thread::JoinHandle::join) {
            std::panic::resume_unwind(error);
        }
    }
    if only != Some(Part::Unit) {
        end_to_end(filter, program, &mut counts)?;
    }
    Ok(summary(&counts))
}

fn end_to_end(
    filter: Option<&str>,
    program: Option<PathBuf>,
    counts: &mut Vec<Count>,
) -> anyhow::Result<()> {
    let tools = provision::tools()?;
    if !tools.missing.is_empty() {
        let mut count = Count {
            name: "end to end",
            failed: 1,
            ..Count::default()
        };
        println!("the end-to-end tests did not start, because this is missing:");
        for line in &tools.missing {
            println!("  {line}");
            count.not_run.push(line.clone());
        }
        counts.push(count);
        return Ok(());
    }
    let program = match program {
        Some(program) => std::path::absolute(program)?,
        None => shell::build(false, &[])?,
    };
    let switched = shell::build(false, &["longshore/failpoints"])?;

    if filter.is_none_or(|filter| SERVERS.iter().any(|name| filter.contains(name))) {
        let mut cargo = workspace();
        cargo.args(["--test", "it", "--"]);
        match filter {
            Some(filter) => cargo.arg(filter),
            None => cargo.args(SERVERS),
        };
        cargo
            .env("LONGSHORE_TEST_S3_MINIO", tools.dir.join("bin/minio"))
            .env(
                "LONGSHORE_TEST_S3_VERSITYGW",
                tools.dir.join("bin/versitygw"),
            );
        counts.push(tests("databases and object stores", &mut cargo)?);
    }

    // One PostgreSQL and one S3 store for all that runs on both modes.
    let on_wire = filter.is_none_or(is_wire_level);
    let on_both = filter.is_none_or(|filter| !filter.contains("cluster"));
    let cluster = if on_wire || on_both {
        Some(mode::cluster(e2e::Postgres::start, mode::Store::Minio)?)
    } else {
        None
    };
    if let Some(cluster) = cluster.as_ref().filter(|_| on_wire) {
        counts.push(wire_level(filter, cluster)?);
    }

    let engine = engine::engine()?;
    if filter.is_none() {
        // The Compose engine alone, against the same real engine.
        let mut cargo = shell::cargo();
        cargo.args([
            "test",
            "--package",
            "delivery",
            "--features",
            "engine-tests",
        ]);
        cargo.args([
            "--test",
            "compose",
            "--no-fail-fast",
            "--",
            "--test-threads",
            "2",
        ]);
        cargo.env("PATH", with_path(&[&tools.dir.join("bin")])).env(
            "LONGSHORE_TEST_COMPOSE",
            tools.dir.join("compose-2/cli-plugins/docker-compose"),
        );
        if let Some(host) = &engine.host {
            cargo.env("DOCKER_HOST", host);
        }
        counts.push(tests("compose engine", &mut cargo)?);
    }

    let end_to_end = |only: &[&str], skip: &[(&str, &str)]| {
        let mut cargo = shell::cargo();
        cargo
            .args(["test", "--package", "e2e", "--no-fail-fast"])
            .args(only)
            .arg("--")
            .args(filter);
        cargo.args(["--test-threads", "4"]);
        let missing = tools.not_run.iter().map(|(name, _)| name);
        for name in missing.chain(skip.iter().map(|(name, _)| name)) {
            cargo.args(["--skip", name]);
        }
        cargo
            .env(e2e::tools::PROGRAM, &program)
            .env(e2e::tools::SWITCHED, &switched)
            .env(e2e::tools::TOOLS, &tools.dir)
            .env("PATH", with_path(&[&tools.dir.join("bin")]));
        if let Some(host) = &engine.host {
            cargo.env("DOCKER_HOST", host);
        }
        cargo
    };
    if let Some(cluster) = cluster.filter(|_| on_both) {
        // The clients, and the store under attack, once more on the other run mode.
        let mut cargo = end_to_end(&["--test", "store", "--test", "it"], EMBEDDED);
        cargo.env(e2e::cluster::CLUSTER, cluster.name());
        let mut count = tests("end to end, cluster mode", &mut cargo)?;
        let named = EMBEDDED
            .iter()
            .filter(|(name, _)| filter.is_none_or(|filter| about(name, filter)));
        count.not_run.extend(
            named.map(|(name, why)| format!("in cluster mode, tests named `{name}`: {why}")),
        );
        counts.push(count);
    }
    let mut cargo = end_to_end(&[], &[]);
    let mut count = tests("end to end", &mut cargo)?;
    count.not_run = tools
        .not_run
        .iter()
        .map(|(name, reason)| format!("tests named `{name}`: {reason}"))
        .collect();
    table(&count, &tools.not_run);
    counts.push(count);
    Ok(())
}

/// Whether a filter means tests of the wire-level suite, one module of which is one file.
fn is_wire_level(filter: &str) -> bool {
    let module = filter.split("::").next().unwrap_or(filter);
    let file = format!("{WIRE}/tests/it/{module}.rs");
    module
        .chars()
        .all(|c| c.is_ascii_alphanumeric() || c == '_')
        && shell::root().join(file).is_file()
}

/// Whether a filter and a name of tests to skip may mean the same tests.
fn about(name: &str, filter: &str) -> bool {
    name.contains(filter) || filter.contains(name)
}

/// The wire-level suite once more, on PostgreSQL and S3.
fn wire_level(filter: Option<&str>, cluster: &Cluster) -> anyhow::Result<Count> {
    let keys = e2e::ObjectStore::keys();
    let objects = format!(
        "http://{}:{}@{}/{}",
        keys.id,
        keys.secret,
        cluster.objects.host(),
        e2e::cluster::BUCKET
    );
    // The program itself, for `cargo test` of this package alone would compile it anew with fewer features.
    let mut suite = shell::command(wire_level_program()?);
    suite
        .current_dir(shell::root().join(WIRE))
        .args(filter)
        .args(["--test-threads", "4"])
        .env(
            "LONGSHORE_TEST_POSTGRES",
            cluster.postgres.url("").trim_end_matches('/'),
        )
        .env("LONGSHORE_TEST_S3", objects)
        .env("PATH", with_path(&[&e2e::postgres::programs()]));
    tests("wire level, cluster mode", &mut suite)
}

/// Builds the test program of the wire-level suite as the unit tests do, and gives back where it is.
fn wire_level_program() -> anyhow::Result<PathBuf> {
    let mut cargo = workspace();
    cargo.args(["--test", "it", "--no-run", "--quiet"]);
    cargo.arg("--message-format=json-render-diagnostics");
    let source = shell::root().join(WIRE).join("tests/it/main.rs");
    let said = shell::read(&mut cargo)?;
    said.lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .filter(|message| message["target"]["src_path"].as_str().map(Path::new) == Some(&source))
        .find_map(|message| message["executable"].as_str().map(PathBuf::from))
        .context("cargo names no test program of the wire-level suite")
}

/// All tests but the end-to-end ones, in one build with the store's failpoints, which its crash tests need.
fn workspace() -> Command {
    let mut cargo = shell::cargo();
    cargo.args([
        "test",
        "--workspace",
        "--exclude",
        "e2e",
        "--no-fail-fast",
        "--features",
        "longshore/failpoints",
    ]);
    cargo
}

/// `PATH` with directories before it.
fn with_path(first: &[&Path]) -> std::ffi::OsString {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let all = first
        .iter()
        .map(|dir| PathBuf::from(*dir))
        .chain(std::env::split_paths(&path));
    std::env::join_paths(all).unwrap_or(path.clone())
}

/// The most failed tests that are tried once more: of more, the change is at fault and not the moment.
const TRIED_AGAIN: usize = 3;

/// Runs a `cargo test` or one test program, shows its output as it comes, and counts. Few failures are tried once more,
/// alone and one after the other; what passes then is counted as passed, and named in the summary as unsteady.
fn tests(name: &'static str, command: &mut Command) -> anyhow::Result<Count> {
    println!("\n== {name} ==");
    let start = Instant::now();
    let mut count = once(name, command)?;
    let failed = count.failures();
    if !failed.is_empty() && failed.len() <= TRIED_AGAIN && failed.len() as u64 == count.failed {
        println!("\n== {name}: {} failed, tried once more ==", failed.len());
        let second = once(name, &mut alone(command, &failed))?;
        let again = second.failures();
        for test in failed {
            if !again.contains(&test) && second.tests.contains_key(&test) {
                count.failed -= 1;
                count.passed += 1;
                count.tests.insert(test.clone(), Outcome::Passed);
                count.unsteady.push(test);
            }
        }
    }
    count.took = start.elapsed();
    Ok(count)
}

/// The same run of nothing but these tests, one at a time.
fn alone(command: &Command, tests: &[String]) -> Command {
    let mut again = Command::new(command.get_program());
    // What follows the dashes chooses tests; a test program has none.
    let cargo = command.get_args().any(|argument| argument == "test");
    if cargo {
        again.args(command.get_args().take_while(|argument| *argument != "--"));
        again.arg("--");
    }
    again.args(["--exact", "--test-threads", "1"]).args(tests);
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => again.env(name, value),
            None => again.env_remove(name),
        };
    }
    if let Some(dir) = command.get_current_dir() {
        again.current_dir(dir);
    }
    again
}

/// Runs them once.
fn once(name: &'static str, command: &mut Command) -> anyhow::Result<Count> {
    let mut count = Count {
        name,
        ..Count::default()
    };
    let mut child = command
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start {}", command.get_program().display()))?;
    let output = child.stdout.take().context("the output is a pipe")?;
    let mut summed = (0, 0);
    for line in BufReader::new(output).split(b'\n') {
        let line = String::from_utf8_lossy(&line?).into_owned();
        println!("{line}");
        read_line(&line, &mut count, &mut summed);
    }
    let status = child.wait()?;
    (count.passed, count.failed) = summed;
    if !status.success() && count.failed == 0 {
        // It did not compile, or a test program died.
        count.failed = 1;
    }
    Ok(count)
}

/// Reads one line of a test program's output.
fn read_line(line: &str, count: &mut Count, summed: &mut (u64, u64)) {
    if let Some(rest) = line.strip_prefix("test result: ") {
        for part in rest.split(';') {
            let mut words = part.trim().rsplit(' ');
            let (Some(kind), Some(number)) = (
                words.next(),
                words.next().and_then(|word| word.parse::<u64>().ok()),
            ) else {
                continue;
            };
            match kind {
                "passed" => summed.0 += number,
                "failed" => summed.1 += number,
                "ignored" if number > 0 => count
                    .not_run
                    .push(format!("{number} tests marked as ignored")),
                _ => {}
            }
        }
    } else if let Some((test, outcome)) = line
        .strip_prefix("test ")
        .and_then(|rest| rest.split_once(" ... "))
    {
        let outcome = match outcome.trim() {
            "ok" => Outcome::Passed,
            word if word.starts_with("FAILED") => Outcome::Failed,
            _ => return,
        };
        count.tests.insert(test.to_owned(), outcome);
    }
}

/// Prints client × operation from the names `clients::CLIENT::OPERATION`.
fn table(count: &Count, skipped: &[(&'static str, String)]) {
    let mut cells: BTreeMap<&str, BTreeMap<&str, Outcome>> = BTreeMap::new();
    let mut operations: BTreeSet<&str> = BTreeSet::new();
    for (name, outcome) in &count.tests {
        let mut words = name.split("::");
        if words.next() != Some("clients") {
            continue;
        }
        if let (Some(client), Some(operation)) = (words.next(), words.next()) {
            // The table shows operations; a second test of one is `push_…`.
            let operation = operation.split('_').next().unwrap_or(operation);
            operations.insert(operation);
            let cell = cells
                .entry(client)
                .or_default()
                .entry(operation)
                .or_insert(*outcome);
            if *outcome == Outcome::Failed {
                *cell = *outcome;
            }
        }
    }
    for (name, _) in skipped {
        if *name == "helm" {
            let row = cells.entry("helm").or_default();
            for operation in ["push", "pull"] {
                operations.insert(operation);
                row.insert(operation, Outcome::NotRun);
            }
        }
    }
    if cells.is_empty() {
        return;
    }
    println!("\nclients and operations (a dash: the client has no such operation)");
    print!("{:<12}", "");
    for operation in &operations {
        print!("{operation:>10}");
    }
    println!();
    for (client, row) in &cells {
        print!("{client:<12}");
        for operation in &operations {
            let word = match row.get(operation) {
                Some(Outcome::Passed) => "ok",
                Some(Outcome::Failed) => "FAILED",
                Some(Outcome::NotRun) => "NOT RUN",
                None => "-",
            };
            print!("{word:>10}");
        }
        println!();
    }
}

/// Prints what came out, and tells whether all is well.
fn summary(counts: &[Count]) -> bool {
    println!(
        "\n{:<28}{:>10}{:>10}{:>10}",
        "", "passed", "failed", "seconds"
    );
    for count in counts {
        println!(
            "{:<28}{:>10}{:>10}{:>10}",
            count.name,
            count.passed,
            count.failed,
            count.took.as_secs()
        );
        for test in count.failures() {
            println!("  failed: {test}");
        }
        for test in &count.unsteady {
            println!("  UNSTEADY (failed among the others, passed alone; to be mended): {test}");
        }
    }
    for line in counts.iter().flat_map(|count| &count.not_run) {
        println!("NOT RUN: {line}");
    }
    let passed: u64 = counts.iter().map(|count| count.passed).sum();
    let failed: u64 = counts.iter().map(|count| count.failed).sum();
    println!("{passed} passed, {failed} failed");
    failed == 0 && passed > 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_output_of_a_test_program_is_counted() {
        let mut count = Count::default();
        let mut summed = (0, 0);
        for line in [
            "running 3 tests",
            "test clients::oras::push ... ok",
            "test clients::oras::pull ... FAILED",
            "test result: FAILED. 12 passed; 1 failed; 2 ignored; 0 measured; 7 filtered out; finished in 0.10s",
            "test result: ok. 4 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s",
        ] {
            read_line(line, &mut count, &mut summed);
        }
        assert_eq!(summed, (16, 1));
        assert_eq!(
            count.tests.get("clients::oras::pull"),
            Some(&Outcome::Failed)
        );
        assert_eq!(count.not_run, ["2 tests marked as ignored"]);
    }

    #[test]
    fn what_is_left_out_in_cluster_mode_is_there() {
        for (name, why) in EMBEDDED {
            let found = ["store", "it"].iter().any(|suite| {
                let suite = shell::root().join("tests/tests").join(suite);
                match name.strip_suffix("::") {
                    Some(module) => suite.join(format!("{module}.rs")).is_file(),
                    None => std::fs::read_dir(suite).unwrap().flatten().any(|file| {
                        std::fs::read_to_string(file.path())
                            .is_ok_and(|text| text.contains(&format!("fn {name}(")))
                    }),
                }
            });
            assert!(found, "no test is named `{name}`");
            assert!(!why.is_empty());
        }
    }

    #[test]
    fn filters_of_the_wire_level_suite_are_known() {
        for filter in ["upload", "upload::", "tag::pages_follow_links"] {
            assert!(is_wire_level(filter), "{filter}");
        }
        for filter in ["", "clients::crane", "collection::", "../it/tag"] {
            assert!(!is_wire_level(filter), "{filter}");
        }
    }

    #[test]
    fn a_second_try_runs_the_failed_tests_and_nothing_else() {
        let mut cargo = Command::new("cargo");
        cargo.args(["test", "--package", "e2e", "--", "filter", "--skip", "x"]);
        cargo.env("A", "1").env_remove("B").current_dir("/");
        let again = alone(&cargo, &["one::two".to_owned()]);
        let arguments: Vec<_> = again.get_args().collect();
        assert_eq!(
            arguments,
            [
                "test",
                "--package",
                "e2e",
                "--",
                "--exact",
                "--test-threads",
                "1",
                "one::two"
            ]
        );
        assert_eq!(again.get_envs().count(), 2);
        assert_eq!(again.get_current_dir(), Some(Path::new("/")));
    }

    #[test]
    fn nothing_run_is_no_success() {
        assert!(!summary(&[Count::default()]));
        assert!(summary(&[Count {
            passed: 1,
            ..Count::default()
        }]));
        assert!(!summary(&[Count {
            passed: 1,
            failed: 1,
            ..Count::default()
        }]));
    }
}
