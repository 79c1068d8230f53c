//! The figures: medians, ratios, a table and JSON.

use std::fmt::Write as _;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use super::content::{LAYER, LAYERS};
use super::contestant::OURS;
use super::growth::Table;
use super::load::{CONNECTIONS, Noticed};
use super::{Arguments, MIB, MOVES, PUSHERS, Task};

/// Everything that came out.
pub(crate) struct Report {
    head: Value,
    pub(crate) sections: Vec<Section>,
    pub(crate) growth: Vec<Table>,
    not_run: Vec<String>,
}

/// One task.
pub(crate) struct Section {
    task: Task,
    title: String,
    /// The machine's load average when it began.
    load: String,
    pub(crate) entries: Vec<Entry>,
}

/// One contestant in one task.
pub(crate) struct Entry {
    name: String,
    limit: bool,
    pub(crate) samples: Vec<Sample>,
    /// The highest resident memory, in bytes.
    pub(crate) peak: Option<u64>,
    /// The peak is of the whole life of the process, because it could not be forgotten.
    pub(crate) since_start: bool,
    failure: Option<String>,
}

/// One contestant in one round.
#[derive(Clone, Debug, Default)]
pub(crate) struct Sample {
    /// In bytes, requests, images or moves.
    pub(crate) work: u64,
    pub(crate) took: Duration,
    /// Of the contestant's process.
    pub(crate) cpu: Duration,
    /// How long the kernel then took to write out what was left to it.
    pub(crate) settled: Option<Duration>,
    pub(crate) noticed: Vec<Noticed>,
}

/// How a task's figures are shown.
struct Units {
    rate: &'static str,
    /// Work per unit of the rate.
    per_rate: f64,
    cpu: &'static str,
    /// Work and seconds per unit of the CPU figure.
    per_cpu: (f64, f64),
}

const MIB_F: f64 = 1024.0 * 1024.0;

impl Task {
    fn units(self) -> Units {
        match self {
            Self::Pull | Self::Push => Units {
                rate: "MiB/s",
                per_rate: MIB_F,
                cpu: "CPU s/GiB",
                per_cpu: (1024.0 * MIB_F, 1.0),
            },
            Self::Manifest => Units {
                rate: "requests/s",
                per_rate: 1.0,
                cpu: "CPU us/request",
                per_cpu: (1.0, 1e-6),
            },
            Self::Images | Self::ImagesParallel => Units {
                rate: "images/s",
                per_rate: 1.0,
                cpu: "CPU ms/image",
                per_cpu: (1.0, 1e-3),
            },
            Self::Start
            | Self::TagPage
            | Self::PushAtTags
            | Self::Collection
            | Self::Replicas
            | Self::Events => Units {
                rate: "moves/s",
                per_rate: 1.0,
                cpu: "CPU ms/move",
                per_cpu: (1.0, 1e-3),
            },
        }
    }
}

impl Report {
    pub(crate) fn new(arguments: &Arguments, program: &Path, dir: &Path) -> Self {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let cpu = read("/proc/cpuinfo")
            .lines()
            .find_map(|line| line.strip_prefix("model name")?.split_once(": "))
            .map_or_else(String::new, |(_, name)| name.to_owned());
        Self {
            head: json!({
                "program": program,
                "data": dir,
                "cores": std::thread::available_parallelism().map_or(0, usize::from),
                "cpu": cpu,
                "kernel": read("/proc/sys/kernel/osrelease").trim(),
                "size_mib": arguments.size,
                "rounds": arguments.rounds,
                "seconds": arguments.seconds,
            }),
            sections: Vec::new(),
            growth: Vec::new(),
            not_run: Vec::new(),
        }
    }

    /// Notes that a contestant is missing from all its tasks.
    pub(crate) fn not_run(&mut self, name: &str, error: &anyhow::Error) {
        self.not_run.push(format!("{name}: not run: {error:#}"));
    }

    /// Whether someone failed a task. Who was not run did not fail.
    pub(crate) fn failed(&self) -> bool {
        let mut entries = self.sections.iter().flat_map(|section| &section.entries);
        entries.any(Entry::failed) || self.growth.iter().any(Table::failed)
    }

    pub(crate) fn json(&self) -> Value {
        let mut value = self.head.clone();
        value["tasks"] = self.sections.iter().map(Section::json).collect();
        value["growth"] = self.growth.iter().map(Table::json).collect();
        value["not_run"] = json!(self.not_run);
        value
    }

    pub(crate) fn table(&self) -> String {
        let mut text = String::new();
        // Writing to a string does not fail.
        let _ = writeln!(
            text,
            "\n{} cores ({}), kernel {}, {} rounds; medians (lowest to highest round)",
            self.head["cores"],
            self.head["cpu"].as_str().unwrap_or_default(),
            self.head["kernel"].as_str().unwrap_or_default(),
            self.head["rounds"],
        );
        for section in &self.sections {
            section.write(&mut text);
        }
        for table in &self.growth {
            table.write(&mut text);
        }
        if !self.growth.is_empty() {
            text.push_str("  in parentheses: the ratio to the same contestant at its first size\n");
        }
        if !self.not_run.is_empty() {
            text.push('\n');
        }
        for line in &self.not_run {
            let _ = writeln!(text, "{line}");
        }
        text.push_str(
            "\n`of limit` and `of longshore` are medians of the ratios of each round; more is better. CPU time is the server's\n\
             alone, user and system, of all rounds. `then sync` is what the kernel still had to write when the push was acknowledged.\n\
             The load generator runs on the same machine.\n",
        );
        text
    }
}

impl Section {
    pub(crate) fn new(task: Task, arguments: &Arguments) -> Self {
        let size = arguments.size;
        let seconds = arguments.seconds;
        let kib = LAYER / 1024;
        let title = match task {
            Task::Pull => format!("pull of a blob of {size} MiB on one connection"),
            Task::Manifest => {
                format!("GET of a manifest by tag on {CONNECTIONS} connections, for {seconds} s")
            }
            Task::Push => format!("push of a blob of {size} MiB on one connection"),
            Task::Images => format!(
                "pushes of images of {LAYERS} layers of {kib} KiB, one pusher, for {seconds} s"
            ),
            Task::ImagesParallel => format!(
                "pushes of images of {LAYERS} layers of {kib} KiB, {PUSHERS} pushers, for {seconds} s"
            ),
            Task::Events => format!("{MOVES} moves of a tag, until the event arrives"),
            Task::Start | Task::TagPage | Task::PushAtTags | Task::Collection | Task::Replicas => {
                String::new()
            }
        };
        let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
        Self {
            task,
            title,
            load: load.split(' ').next().unwrap_or_default().to_owned(),
            entries: Vec::new(),
        }
    }

    fn write(&self, text: &mut String) {
        let units = self.task.units();
        let _ = writeln!(
            text,
            "\n{}: {} (load average {})",
            self.task.name(),
            self.title,
            self.load
        );
        let _ = writeln!(
            text,
            "  {:<20} {:>10} {:>17} {:>9} {:>13} {:>15} {:>9}",
            "", units.rate, "", "of limit", "of longshore", units.cpu, "peak MiB"
        );
        for entry in &self.entries {
            if let Some(failure) = &entry.failure {
                let _ = writeln!(text, "  {:<20} failed: {failure}", entry.name);
                continue;
            }
            let rates = entry.rates(&units);
            let (low, high) = bounds(&rates);
            let ratio =
                |of: Option<f64>| of.map_or_else(|| "-".to_owned(), |of| format!("{of:.2}"));
            let _ = write!(
                text,
                "  {:<20} {:>10} {:>17} {:>9} {:>13} {:>15.3} {:>8}{}",
                entry.name,
                number(median(&rates)),
                format!("({} to {})", number(low), number(high)),
                ratio(self.of(entry, |other| other.limit)),
                ratio(self.of(entry, |other| other.name == OURS)),
                entry.cpu(&units),
                entry
                    .peak
                    .map_or_else(|| "-".to_owned(), |peak| (peak / MIB).to_string()),
                if entry.since_start { "+" } else { " " },
            );
            if let Some(seconds) = entry.settled() {
                let _ = write!(text, "  then sync {seconds:.2} s");
            }
            text.push('\n');
            if let Some((answered, arrived)) = entry.noticed() {
                for (what, [middle, late]) in
                    [("PUT answered", answered), ("event arrived", arrived)]
                {
                    let _ = writeln!(
                        text,
                        "  {:<20} {middle:>10.3} ms median {late:>10.3} ms p99",
                        format!("  {what}")
                    );
                }
            }
        }
        if self.entries.iter().any(|entry| entry.since_start) {
            text.push_str("  +: since the process started, because its peak could not be reset\n");
        }
    }

    fn json(&self) -> Value {
        let units = self.task.units();
        let entries: Vec<_> = self
            .entries
            .iter()
            .map(|entry| {
                let rates = entry.rates(&units);
                let noticed = entry.noticed().map(|(answered, arrived)| {
                    json!({
                        "answered_ms": { "median": answered[0], "p99": answered[1] },
                        "arrived_ms": { "median": arrived[0], "p99": arrived[1] },
                    })
                });
                json!({
                    "name": entry.name,
                    "limit": entry.limit,
                    "failed": entry.failure,
                    "median": median(&rates),
                    "rounds": rates,
                    "of_limit": self.of(entry, |other| other.limit),
                    "of_longshore": self.of(entry, |other| other.name == OURS),
                    "cpu": entry.cpu(&units),
                    "peak_bytes": entry.peak,
                    "peak_since_start": entry.since_start,
                    "settled_seconds": entry.settled(),
                    "events": noticed,
                })
            })
            .collect();
        json!({
            "task": self.task.name(),
            "title": self.title,
            "load_average": self.load,
            "rate_unit": units.rate,
            "cpu_unit": units.cpu,
            "contestants": entries,
        })
    }

    /// The median of an entry's ratios to another one, round by round.
    fn of(&self, entry: &Entry, other: impl Fn(&Entry) -> bool) -> Option<f64> {
        let other = self.entries.iter().find(|entry| other(entry))?;
        let units = self.task.units();
        let (mine, theirs) = (entry.rates(&units), other.rates(&units));
        let ratios: Vec<_> = mine
            .iter()
            .zip(&theirs)
            .map(|(mine, theirs)| mine / theirs)
            .collect();
        (!ratios.is_empty()).then(|| median(&ratios))
    }
}

impl Entry {
    pub(crate) fn new(name: &str, limit: bool) -> Self {
        Self {
            name: name.to_owned(),
            limit,
            samples: Vec::new(),
            peak: None,
            since_start: false,
            failure: None,
        }
    }

    pub(crate) fn fail(&mut self, error: &anyhow::Error) {
        self.failure = Some(format!("{error:#}"));
    }

    pub(crate) fn failed(&self) -> bool {
        self.failure.is_some()
    }

    fn rates(&self, units: &Units) -> Vec<f64> {
        self.samples
            .iter()
            .map(|sample| sample.work as f64 / units.per_rate / sample.took.as_secs_f64().max(1e-9))
            .collect()
    }

    /// Of all rounds together, because the kernel counts in steps of 10 ms.
    fn cpu(&self, units: &Units) -> f64 {
        let work: u64 = self.samples.iter().map(|sample| sample.work).sum();
        let cpu: Duration = self.samples.iter().map(|sample| sample.cpu).sum();
        let (work_unit, cpu_unit) = units.per_cpu;
        cpu.as_secs_f64() / cpu_unit / (work as f64 / work_unit).max(1e-9)
    }

    fn settled(&self) -> Option<f64> {
        let seconds: Vec<_> = self
            .samples
            .iter()
            .filter_map(|sample| sample.settled)
            .map(|settled| settled.as_secs_f64())
            .collect();
        (!seconds.is_empty()).then(|| median(&seconds))
    }

    /// Median and 99th percentile in milliseconds: of the answer, and of the event.
    fn noticed(&self) -> Option<([f64; 2], [f64; 2])> {
        let all = |of: fn(&Noticed) -> Duration| {
            let mut times: Vec<_> = self
                .samples
                .iter()
                .flat_map(|sample| &sample.noticed)
                .map(|noticed| of(noticed).as_secs_f64() * 1e3)
                .collect();
            times.sort_unstable_by(f64::total_cmp);
            times
        };
        let (answered, arrived) = (all(|n| n.answered), all(|n| n.arrived));
        let both = |times: &[f64]| Some([median(times), *times.get(times.len() * 99 / 100)?]);
        Some((both(&answered)?, both(&arrived)?))
    }
}

/// The middle, or between the two in the middle; 0 of nothing.
pub(crate) fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_unstable_by(f64::total_cmp);
    match (values.len(), values.len() / 2) {
        (0, _) => 0.0,
        (length, middle) if length % 2 == 1 => values[middle],
        (_, middle) => f64::midpoint(values[middle - 1], values[middle]),
    }
}

fn bounds(values: &[f64]) -> (f64, f64) {
    let low = values.iter().copied().reduce(f64::min);
    let high = values.iter().copied().reduce(f64::max);
    (low.unwrap_or(0.0), high.unwrap_or(0.0))
}

fn number(value: f64) -> String {
    if value < 100.0 {
        format!("{value:.1}")
    } else {
        format!("{value:.0}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(name: &str, limit: bool, seconds: &[u64]) -> Entry {
        let mut entry = Entry::new(name, limit);
        entry.samples = seconds
            .iter()
            .map(|&seconds| Sample {
                work: 1024 * MIB,
                took: Duration::from_secs(seconds),
                cpu: Duration::from_millis(500),
                ..Sample::default()
            })
            .collect();
        entry
    }

    #[test]
    fn ratios_are_of_the_same_round() {
        let section = Section {
            task: Task::Pull,
            title: String::new(),
            load: String::new(),
            entries: vec![
                entry(OURS, false, &[2, 20, 4]),
                entry("nginx", true, &[1, 10, 4]),
            ],
        };
        let ours = &section.entries[0];
        assert_eq!(section.of(ours, |other| other.limit), Some(0.5));
        assert_eq!(section.of(ours, |other| other.name == OURS), Some(1.0));
        assert_eq!(section.of(ours, |other| other.name == "else"), None);
        let units = Task::Pull.units();
        assert!((ours.cpu(&units) - 0.5).abs() < 1e-9);
        assert!((median(&ours.rates(&units)) - 256.0).abs() < 1e-9);
        assert_eq!(section.json()["contestants"][0]["of_limit"], 0.5);
    }

    #[test]
    fn medians() {
        for (values, expected) in [
            (&[3.0, 1.0, 2.0][..], 2.0),
            (&[4.0, 1.0, 2.0, 3.0], 2.5),
            (&[], 0.0),
        ] {
            assert!((median(values) - expected).abs() < 1e-9, "{values:?}");
        }
    }

    #[test]
    fn events_have_a_median_and_a_tail() {
        let mut entry = entry(OURS, false, &[1]);
        assert!(entry.noticed().is_none());
        entry.samples[0].noticed = (1..=100)
            .map(|n| Noticed {
                answered: Duration::from_millis(1),
                arrived: Duration::from_millis(n),
            })
            .collect();
        let (answered, arrived) = entry.noticed().unwrap();
        assert_eq!((answered[1], arrived[0], arrived[1]), (1.0, 50.5, 100.0));
    }

    #[test]
    fn who_failed_is_shown_and_counted() {
        let mut failed = entry("peer", false, &[]);
        failed.fail(&anyhow::anyhow!("status 500"));
        let report = Report {
            head: json!({}),
            sections: vec![Section {
                task: Task::Push,
                title: String::new(),
                load: String::new(),
                entries: vec![failed],
            }],
            growth: Vec::new(),
            not_run: vec!["nginx: not run: nginx is not installed".to_owned()],
        };
        assert!(report.failed());
        let table = report.table();
        assert!(table.contains("failed: status 500"), "{table}");
        assert!(table.contains("not run: nginx is not installed"), "{table}");
    }
}
