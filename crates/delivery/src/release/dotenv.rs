//! `.env` files as Compose reads them: `KEY=value`, `export`, comments, quotes over several lines.

/// One assignment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Assignment {
    /// The line of the key, from 1.
    pub(super) line: usize,
    pub(super) key: String,
    /// The value; a template when `interpolated`.
    pub(super) value: String,
    /// Single quotes keep a value as it is.
    pub(super) interpolated: bool,
}

/// Reads a file. A key without `=` takes its value from the environment and is left out.
///
/// # Errors
/// The line and what is wrong there.
pub(super) fn parse(text: &str) -> Result<Vec<Assignment>, (usize, String)> {
    let mut assignments = Vec::new();
    let mut rest = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut line = 1;
    while !rest.is_empty() {
        let end = rest.find('\n').map_or(rest.len(), |at| at + 1);
        let this = rest[..end].trim();
        if this.is_empty() || this.starts_with('#') {
            rest = &rest[end..];
            line += 1;
            continue;
        }
        let start = rest.len() - rest.trim_start().len();
        let mut entry = &rest[start..];
        if let Some(after) = entry.strip_prefix("export")
            && after.starts_with([' ', '\t'])
        {
            entry = after.trim_start();
        }
        let length = entry
            .find(|c: char| {
                !(c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-' | '[' | ']'))
            })
            .unwrap_or(entry.len());
        let (key, after) = entry.split_at(length);
        let separator = after.trim_start_matches([' ', '\t']);
        if key.is_empty() {
            return Err((line, "a variable name was expected".to_owned()));
        }
        let Some(value) = separator.strip_prefix(['=', ':']) else {
            if separator.is_empty() || separator.starts_with(['\n', '\r', '#']) {
                rest = &rest[end..];
                line += 1;
                continue;
            }
            return Err((line, format!("`{key}` is not followed by `=`")));
        };
        let value = value.trim_start_matches([' ', '\t']);
        let consumed = rest.len() - value.len();
        let quote = value.chars().next().filter(|c| matches!(c, '"' | '\''));
        let (value, used, interpolated) = if let Some(quote) = quote {
            let (value, used) = quoted(&value[1..], quote)
                .ok_or_else(|| (line, format!("the quote of `{key}` is not closed")))?;
            (value, used + 1, quote == '"')
        } else {
            let end = value.find('\n').unwrap_or(value.len());
            let raw = &value[..end];
            let raw = raw
                .find(" #")
                .or_else(|| raw.starts_with('#').then_some(0))
                .map_or(raw, |at| &raw[..at]);
            (raw.trim().to_owned(), end, true)
        };
        assignments.push(Assignment {
            line,
            key: key.to_owned(),
            value,
            interpolated,
        });
        let whole = consumed + used;
        // What stands behind a closing quote on the same line is a comment or nothing.
        let end = rest[whole..]
            .find('\n')
            .map_or(rest.len(), |at| whole + at + 1);
        line += rest[..end].matches('\n').count();
        rest = &rest[end..];
    }
    Ok(assignments)
}

/// The value up to the closing quote, and how many bytes it took with that quote.
fn quoted(text: &str, quote: char) -> Option<(String, usize)> {
    let mut value = String::new();
    let mut characters = text.char_indices();
    while let Some((at, character)) = characters.next() {
        match character {
            c if c == quote => return Some((value, at + 1)),
            '\\' if quote == '"' => match characters.next()?.1 {
                'n' => value.push('\n'),
                'r' => value.push('\r'),
                't' => value.push('\t'),
                '$' => value.push_str("$$"),
                c @ ('"' | '\\') => value.push(c),
                c => {
                    value.push('\\');
                    value.push(c);
                }
            },
            '\\' if text[at + 1..].starts_with(quote) => {
                value.push(quote);
                characters.next();
            }
            c => value.push(c),
        }
    }
    None
}

#[cfg(test)]
mod tests;
