//! Interpolation as Compose does it: `$VAR`, `${VAR}`, `${VAR:-default}`, `${VAR-default}`,
//! `${VAR:?error}`, `${VAR?error}`, `${VAR:+alternative}`, `${VAR+alternative}`, `$$`
//! ([compose-spec § Interpolation](https://github.com/compose-spec/compose-spec/blob/main/12-interpolation.md)).

/// A text with variables, parsed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Template(Vec<Part>);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Part {
    Text(String),
    Variable { name: String, form: Form },
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Form {
    Plain,
    Operator {
        operator: Operator,
        /// With the colon an empty value counts as none.
        colon: bool,
        rest: Template,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Operator {
    Default,
    Required,
    Alternative,
}

/// How a variable is used at one place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Usage {
    /// Without anything to fall back to.
    Required,
    /// With a default: the text, or `None` where it depends on other variables.
    Default(Option<String>),
    /// `${VAR:+alternative}`: may be missing.
    Optional,
}

/// A text with its variables filled in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Expansion {
    /// The text; what is missing stands as the blank that was asked for.
    pub(super) text: String,
    /// Variables that have neither a value nor a default, in order.
    pub(super) missing: Vec<String>,
}

/// Not a template.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum TemplateError {
    #[error("`{0}` is not a variable, write `$${{` for `${{` itself")]
    Invalid(String),
    #[error("variables are nested too deep")]
    Depth,
}

impl Template {
    /// Parses a text. Text without `$` is always a template.
    pub(super) fn parse(text: &str) -> Result<Self, TemplateError> {
        Self::parse_at(text, 0)
    }

    fn parse_at(text: &str, depth: usize) -> Result<Self, TemplateError> {
        if depth > MAX_DEPTH {
            return Err(TemplateError::Depth);
        }
        let mut parts = Vec::new();
        let mut literal = String::new();
        let mut rest = text;
        while let Some(at) = rest.find('$') {
            literal.push_str(&rest[..at]);
            let found = &rest[at..];
            let invalid = || TemplateError::Invalid(found.chars().take(40).collect());
            let after = &found[1..];
            if let Some(escaped) = after.strip_prefix('$') {
                literal.push('$');
                rest = escaped;
                continue;
            }
            let (part, left) = if after.starts_with('{') {
                let end = closing_brace(after).ok_or_else(invalid)?;
                let inner = &after[1..end];
                let name = name(inner).ok_or_else(invalid)?;
                let form = match &inner[name.len()..] {
                    "" => Form::Plain,
                    tail => {
                        let (colon, tail) = match tail.strip_prefix(':') {
                            Some(tail) => (true, tail),
                            None => (false, tail),
                        };
                        let operator = match tail.as_bytes().first() {
                            Some(b'-') => Operator::Default,
                            Some(b'?') => Operator::Required,
                            Some(b'+') => Operator::Alternative,
                            _ => return Err(invalid()),
                        };
                        Form::Operator {
                            operator,
                            colon,
                            rest: Self::parse_at(&tail[1..], depth + 1)?,
                        }
                    }
                };
                let name = name.to_owned();
                (Part::Variable { name, form }, &after[end + 1..])
            } else {
                // Like Compose, which leaves a dollar sign before anything else as it is.
                let Some(name) = name(after) else {
                    literal.push('$');
                    rest = after;
                    continue;
                };
                let part = Part::Variable {
                    name: name.to_owned(),
                    form: Form::Plain,
                };
                (part, &after[name.len()..])
            };
            if !literal.is_empty() {
                parts.push(Part::Text(std::mem::take(&mut literal)));
            }
            parts.push(part);
            rest = left;
        }
        literal.push_str(rest);
        if !literal.is_empty() {
            parts.push(Part::Text(literal));
        }
        Ok(Self(parts))
    }

    /// Tells whether there is no variable in it.
    pub(super) fn is_literal(&self) -> bool {
        self.0.iter().all(|part| matches!(part, Part::Text(_)))
    }

    /// Fills in what `lookup` knows. `blank` stands where Compose would put nothing.
    pub(super) fn expand(&self, lookup: &dyn Fn(&str) -> Option<String>, blank: &str) -> Expansion {
        let mut expansion = Expansion {
            text: String::new(),
            missing: Vec::new(),
        };
        self.expand_into(lookup, blank, &mut expansion);
        expansion
    }

    fn expand_into(
        &self,
        lookup: &dyn Fn(&str) -> Option<String>,
        blank: &str,
        expansion: &mut Expansion,
    ) {
        for part in &self.0 {
            let (name, form) = match part {
                Part::Text(text) => {
                    expansion.text.push_str(text);
                    continue;
                }
                Part::Variable { name, form } => (name, form),
            };
            let value = lookup(name);
            let Form::Operator {
                operator,
                colon,
                rest,
            } = form
            else {
                if let Some(value) = value {
                    expansion.text.push_str(&value);
                } else {
                    expansion.missing.push(name.clone());
                    expansion.text.push_str(blank);
                }
                continue;
            };
            let present = value.filter(|value| !(*colon && value.is_empty()));
            match (operator, present) {
                (Operator::Default | Operator::Required, Some(value)) => {
                    expansion.text.push_str(&value);
                }
                (Operator::Default, None) | (Operator::Alternative, Some(_)) => {
                    rest.expand_into(lookup, blank, expansion);
                }
                (Operator::Required, None) => {
                    expansion.missing.push(name.clone());
                    expansion.text.push_str(blank);
                }
                (Operator::Alternative, None) => {}
            }
        }
    }

    /// Calls `visit` for every variable, also for those inside defaults.
    pub(super) fn usages(&self, visit: &mut dyn FnMut(&str, Usage)) {
        for part in &self.0 {
            let Part::Variable { name, form } = part else {
                continue;
            };
            match form {
                Form::Plain => visit(name, Usage::Required),
                Form::Operator { operator, rest, .. } => {
                    let usage = match operator {
                        Operator::Default => Usage::Default(
                            rest.is_literal().then(|| rest.expand(&|_| None, "").text),
                        ),
                        Operator::Required => Usage::Required,
                        Operator::Alternative => Usage::Optional,
                    };
                    visit(name, usage);
                    if *operator != Operator::Required {
                        rest.usages(visit);
                    }
                }
            }
        }
    }
}

/// The name at the start of a text: `[A-Za-z_][A-Za-z0-9_]*`.
fn name(text: &str) -> Option<&str> {
    let end = text
        .bytes()
        .position(|b| !(b.is_ascii_alphanumeric() || b == b'_'))
        .unwrap_or(text.len());
    let name = &text[..end];
    name.bytes()
        .next()
        .is_some_and(|b| !b.is_ascii_digit())
        .then_some(name)
}

/// The `}` that closes the `{` at the start. Like Compose, it counts every brace, and does not look
/// at the byte right after an opening one.
fn closing_brace(text: &str) -> Option<usize> {
    let bytes = text.as_bytes();
    let mut open = 0_usize;
    let mut at = 0;
    while let Some(&byte) = bytes.get(at) {
        match byte {
            b'}' => {
                open = open.saturating_sub(1);
                if open == 0 {
                    return Some(at);
                }
            }
            b'{' => {
                open += 1;
                at += 1;
            }
            _ => {}
        }
        at += 1;
    }
    None
}

const MAX_DEPTH: usize = 32;

#[cfg(test)]
mod tests;
