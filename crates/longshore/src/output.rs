//! What the program prints: data on standard output, everything else on standard error, and the
//! exit codes.

use std::fmt::Display;
use std::io::{IsTerminal as _, Write as _};
use std::process::ExitCode;
use std::sync::Mutex;
use std::time::Duration;

use client::transfer::Progress;
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use oci::Digest;
use serde::Serialize;

/// An exit code. The list is part of the interface and stands in `docs/reference/cli.md`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Exit(u8);

impl Exit {
    /// Done.
    pub(crate) const OK: Self = Self(0);
    /// Tried and failed.
    pub(crate) const FAILED: Self = Self(1);
    /// `agent plan`: there are changes.
    pub(crate) const CHANGES: Self = Self(2);
    /// Refused: a signature is missing or wrong, a release has lint errors, a store or audit check
    /// found damage.
    pub(crate) const REFUSED: Self = Self(3);
    /// Not found.
    pub(crate) const NOT_FOUND: Self = Self(4);
    /// The registry refused access.
    pub(crate) const UNAUTHORIZED: Self = Self(5);
    /// The registry or the agent cannot be reached; trying again may help.
    pub(crate) const UNREACHABLE: Self = Self(6);
    /// Wrong arguments (`EX_USAGE`).
    pub(crate) const USAGE: Self = Self(64);
    /// A wrong configuration file (`EX_CONFIG`).
    pub(crate) const CONFIG: Self = Self(78);

    /// The code for an error, by the first cause that has one.
    pub(crate) fn of(error: &anyhow::Error) -> Self {
        for cause in error.chain() {
            if let Some(refused) = cause.downcast_ref::<Refused>() {
                return refused.code;
            }
            if let Some(error) = cause.downcast_ref::<client::Error>() {
                return match error {
                    client::Error::NotFound(_) => Self::NOT_FOUND,
                    client::Error::Unauthorized { .. } => Self::UNAUTHORIZED,
                    client::Error::DigestMismatch { .. } | client::Error::SizeMismatch { .. } => {
                        Self::REFUSED
                    }
                    other if other.is_transient() => Self::UNREACHABLE,
                    _ => Self::FAILED,
                };
            }
            if let Some(error) = cause.downcast_ref::<registry::Error>() {
                return match error {
                    registry::Error::Bind { .. } | registry::Error::Store(_) => Self::FAILED,
                    _ => Self::CONFIG,
                };
            }
            if let Some(store::Error::Damaged { .. }) = cause.downcast_ref::<store::Error>() {
                return Self::REFUSED;
            }
            if cause.is::<oci::reference::ReferenceError>() {
                return Self::USAGE;
            }
        }
        Self::FAILED
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit.0)
    }
}

/// An error with an exit code of its own and an optional hint.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub(crate) struct Refused {
    pub(crate) code: Exit,
    pub(crate) message: String,
    pub(crate) hint: Option<String>,
}

impl Refused {
    pub(crate) fn new(code: Exit, message: impl Display) -> Self {
        Self {
            code,
            message: message.to_string(),
            hint: None,
        }
    }

    pub(crate) fn hint(mut self, hint: impl Display) -> Self {
        self.hint = Some(hint.to_string());
        self
    }
}

/// Prints one line of data. A closed pipe ends the program quietly later, so it is no error here.
pub(crate) fn line(text: impl Display) {
    let _ = writeln!(std::io::stdout().lock(), "{text}");
}

/// Prints text as it is, without a line end.
pub(crate) fn raw(bytes: &[u8]) {
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(bytes).and_then(|()| out.flush());
}

/// Prints a document as JSON.
pub(crate) fn json(value: &impl Serialize) -> anyhow::Result<()> {
    line(escaped_json(&serde_json::to_string_pretty(value)?));
    Ok(())
}

/// JSON leaves some characters that a terminal obeys as they are; they stand in texts alone, where an escape is the same.
fn escaped_json(text: &str) -> String {
    use std::fmt::Write as _;
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if c != '\n' && oci::text::is_unprintable(c) {
            let _ = write!(out, "\\u{:04x}", u32::from(c));
        } else {
            out.push(c);
        }
    }
    out
}

/// Prints a line for people on standard error.
pub(crate) fn note(text: impl Display) {
    let _ = writeln!(std::io::stderr().lock(), "{text}");
}

/// Prints an error with its causes and its hint.
pub(crate) fn error(error: &anyhow::Error) {
    let mut err = std::io::stderr().lock();
    let _ = writeln!(err, "error: {error}");
    let mut last = error.to_string();
    for cause in error.chain().skip(1) {
        let text = cause.to_string();
        // Transparent errors repeat what stands above them.
        if text != last {
            let _ = writeln!(err, "  caused by: {text}");
        }
        last = text;
    }
    if let Some(hint) = hint(error) {
        let _ = writeln!(err, "hint: {hint}");
    }
}

/// What to do about an error, as far as its message does not say it.
fn hint(error: &anyhow::Error) -> Option<&str> {
    error.chain().find_map(|cause| {
        if let Some(refused) = cause.downcast_ref::<Refused>() {
            return refused.hint.as_deref();
        }
        match cause.downcast_ref::<client::Error>()? {
            // Trying again does not help: it is the certificate.
            error @ client::Error::Unreachable { .. } if !error.is_transient() => Some(
                "its certificate is not trusted: name the authority that issued it with `--ca-file FILE`",
            ),
            client::Error::Unauthorized { .. } => {
                Some("log in with `longshore login HOST`, or ask the registry's owner for the right")
            }
            _ => None,
        }
    })
}

/// Bytes for people: `1.5 MiB`.
pub(crate) fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = count as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 {
        format!("{count} B")
    } else {
        format!("{value:.1} {}", UNITS[unit])
    }
}

/// A table with columns as wide as needed. What a terminal would obey is escaped: cells come from elsewhere.
pub(crate) fn table(head: &[&str], rows: &[Vec<String>]) {
    for text in table_lines(head, rows) {
        line(text);
    }
}

fn table_lines(head: &[&str], rows: &[Vec<String>]) -> Vec<String> {
    let rows: Vec<Vec<_>> = rows
        .iter()
        .map(|row| row.iter().map(|cell| oci::text::escaped(cell)).collect())
        .collect();
    let mut widths: Vec<usize> = head.iter().map(|cell| cell.chars().count()).collect();
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let join = |cells: &mut dyn Iterator<Item = &str>| {
        let mut text = String::new();
        for (cell, width) in cells.zip(&widths) {
            text.push_str(cell);
            text.extend(std::iter::repeat_n(
                ' ',
                width.saturating_sub(cell.chars().count()) + 2,
            ));
        }
        text.trim_end().to_owned()
    };
    let mut lines = vec![join(&mut head.iter().copied())];
    for row in &rows {
        lines.push(join(&mut row.iter().map(AsRef::as_ref)));
    }
    lines
}

/// One line on a terminal that tells how far something is, nothing elsewhere.
pub(crate) struct Meter(ProgressBar);

impl Meter {
    /// A line on standard error when it is a terminal and `quiet` is not wanted.
    pub(crate) fn new(quiet: bool) -> Self {
        let target = if quiet || !std::io::stderr().is_terminal() {
            ProgressDrawTarget::hidden()
        } else {
            ProgressDrawTarget::stderr()
        };
        let style = ProgressStyle::with_template("{spinner} {msg}")
            .unwrap_or_else(|_| ProgressStyle::default_spinner());
        Self(ProgressBar::with_draw_target(None, target).with_style(style))
    }

    /// Shows `done` of `total`.
    pub(crate) fn show(&self, what: &str, done: u64, total: Option<u64>) {
        self.0.set_message(match total {
            Some(total) => format!("{what}: {done} of {total}"),
            None => format!("{what}: {done}"),
        });
        self.0.tick();
    }

    /// Takes the line away.
    pub(crate) fn clear(&self) {
        self.0.finish_and_clear();
    }
}

/// Progress bars on a terminal, nothing elsewhere.
pub(crate) struct Bars {
    all: MultiProgress,
    open: Mutex<Vec<(Digest, ProgressBar)>>,
}

impl Bars {
    /// Bars on standard error when it is a terminal and `quiet` is not wanted.
    pub(crate) fn new(quiet: bool) -> Self {
        let target = if quiet || !std::io::stderr().is_terminal() {
            ProgressDrawTarget::hidden()
        } else {
            ProgressDrawTarget::stderr()
        };
        Self {
            all: MultiProgress::with_draw_target(target),
            open: Mutex::default(),
        }
    }

    fn with(&self, digest: &Digest, action: impl FnOnce(&ProgressBar)) {
        if let Ok(open) = self.open.lock()
            && let Some((_, bar)) = open.iter().find(|(of, _)| of == digest)
        {
            action(bar);
        }
    }
}

impl Progress for Bars {
    fn start(&self, digest: &Digest, size: u64) {
        let style = ProgressStyle::with_template(
            "{prefix} {bar:30} {bytes:>10}/{total_bytes:10} {bytes_per_sec:>12} {msg}",
        )
        .unwrap_or_else(|_| ProgressStyle::default_bar());
        let bar = self.all.add(ProgressBar::new(size).with_style(style));
        bar.set_prefix(digest.short());
        bar.enable_steady_tick(Duration::from_millis(200));
        if let Ok(mut open) = self.open.lock() {
            open.push((digest.clone(), bar));
        }
    }

    fn advance(&self, digest: &Digest, bytes: u64) {
        self.with(digest, |bar| bar.inc(bytes));
    }

    fn finish(&self, digest: &Digest, skipped: bool) {
        self.with(digest, |bar| {
            bar.finish_with_message(if skipped { "there already" } else { "done" });
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_for_people() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!(bytes(5 * 1024 * 1024 * 1024), "5.0 GiB");
    }

    #[test]
    fn what_a_terminal_would_obey_is_escaped() {
        let rows = [vec!["a".to_owned(), "\u{1b}[31mred\r\n\u{202e}".to_owned()]];
        assert_eq!(
            table_lines(&["WHAT", "WHY"], &rows),
            ["WHAT  WHY", "a     \\u{1b}[31mred\\r\\n\\u{202e}"]
        );
        let document = serde_json::json!({ "why": "\u{1b}\u{9b}\u{202e}" });
        let shown = escaped_json(&serde_json::to_string_pretty(&document).unwrap());
        assert!(!shown.contains(|c| c != '\n' && oci::text::is_unprintable(c)));
        let read: serde_json::Value = serde_json::from_str(&shown).unwrap();
        assert_eq!(read, document);
    }

    #[test]
    fn a_refused_access_says_what_to_do() {
        let error = anyhow::Error::new(client::Error::Unauthorized {
            host: "r.example".into(),
            what: "x".into(),
            message: "no".into(),
        });
        assert!(
            hint(&error.context("listing"))
                .unwrap()
                .contains("longshore login")
        );
        let error = anyhow::Error::new(Refused::new(Exit::USAGE, "no").hint("do this"));
        assert_eq!(hint(&error), Some("do this"));
        assert_eq!(hint(&anyhow::anyhow!("x")), None);
    }

    #[test]
    fn exit_codes_by_cause() {
        let error = anyhow::Error::new(client::Error::NotFound("x".into())).context("reading");
        assert_eq!(Exit::of(&error), Exit::NOT_FOUND);
        let error = anyhow::Error::new(Refused::new(Exit::REFUSED, "no"));
        assert_eq!(Exit::of(&error), Exit::REFUSED);
        let error = anyhow::Error::new(registry::Error::PublicUrl("x".into()));
        assert_eq!(Exit::of(&error), Exit::CONFIG);
        let error = anyhow::Error::new(store::Error::Damaged {
            path: "x".into(),
            problem: "y".into(),
        });
        assert_eq!(Exit::of(&error), Exit::REFUSED);
    }
}
