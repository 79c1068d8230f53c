//! Takes secret values out of text before it leaves the engine.

/// Replaces known values by a mark.
#[derive(Clone, Debug, Default)]
pub(super) struct Redactor {
    /// Longest first, so that a value inside another one does not leave the rest of it readable.
    needles: Vec<String>,
}

impl Redactor {
    /// A redactor for `values`. Very short values are left alone: replacing each `1` hides nothing and makes the text useless.
    pub(super) fn new<'a>(values: impl IntoIterator<Item = &'a str>) -> Self {
        let mut needles: Vec<String> = Vec::new();
        for value in values {
            let value = value.trim();
            // A program prints a value of several lines line by line.
            for candidate in std::iter::once(value).chain(value.lines().map(str::trim)) {
                let telling = candidate.len() >= 6
                    || candidate.len() >= 4 && !candidate.bytes().all(|b| b.is_ascii_digit());
                if telling && needles.len() < LIMIT {
                    needles.push(candidate.to_owned());
                    // Compose and loggers quote what they print.
                    if let Ok(quoted) = serde_json::to_string(candidate) {
                        let inner = &quoted[1..quoted.len() - 1];
                        if inner != candidate {
                            needles.push(inner.to_owned());
                        }
                    }
                }
            }
        }
        needles.sort_by(|a, b| b.len().cmp(&a.len()).then_with(|| a.cmp(b)));
        needles.dedup();
        Self { needles }
    }

    /// The text without the values.
    pub(super) fn redact(&self, text: &str) -> String {
        self.needles.iter().fold(text.to_owned(), |text, needle| {
            if text.contains(needle.as_str()) {
                text.replace(needle.as_str(), MARK)
            } else {
                text
            }
        })
    }
}

/// The last lines of `text`, at most `lines` of them and `bytes` bytes, without control characters other than line ends.
pub(super) fn last_lines(text: &str, lines: usize, bytes: usize) -> String {
    let mut kept: Vec<String> = Vec::new();
    let mut total = 0;
    for line in text
        .lines()
        .rev()
        .filter(|line| !line.trim().is_empty())
        .take(lines)
    {
        let line: String = line
            .trim_end()
            .chars()
            .filter(|c| !c.is_control() || *c == '\t')
            .collect();
        total += line.len() + 1;
        if total > bytes {
            if kept.is_empty() {
                kept.push(line.chars().take(bytes / 4).collect());
            }
            break;
        }
        kept.push(line);
    }
    kept.reverse();
    kept.join("\n")
}

const MARK: &str = "[redacted]";
const LIMIT: usize = 4096;

#[cfg(test)]
mod tests;
