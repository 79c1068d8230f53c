//! YAML as a tree that knows its lines.
//!
//! Typed deserialisation loses positions below merge keys and untagged values, and lint needs the line
//! of every scalar. So this builds a tree from parser events, bounded against aliases that multiply.

use std::collections::HashMap;

use serde_saphyr::granit_parser::{Event, Parser, ScalarStyle};

/// A node and where it stands.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Node {
    /// The line, from 1. What comes from an anchor keeps the line of its definition.
    pub(super) line: usize,
    /// Compose's `!reset`: the value is taken away, whatever is written.
    pub(super) reset: bool,
    pub(super) value: Value,
}

#[derive(Clone, Debug, PartialEq)]
pub(super) enum Value {
    Null,
    Scalar(String),
    List(Vec<Node>),
    Map(Vec<Entry>),
}

/// One entry of a mapping, in the order of the document; merged entries come last.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Entry {
    pub(super) key: String,
    pub(super) line: usize,
    pub(super) value: Node,
}

impl Node {
    /// The value under `key`, when this is a mapping that has it.
    pub(super) fn get(&self, key: &str) -> Option<&Node> {
        self.entries()
            .iter()
            .find(|entry| entry.key == key)
            .map(|entry| &entry.value)
            .filter(|node| !node.reset && node.value != Value::Null)
    }

    /// The entries of a mapping; none for anything else.
    pub(super) fn entries(&self) -> &[Entry] {
        match &self.value {
            Value::Map(entries) => entries,
            _ => &[],
        }
    }

    /// The items of a list; none for anything else.
    pub(super) fn items(&self) -> &[Node] {
        match &self.value {
            Value::List(items) => items,
            _ => &[],
        }
    }

    /// The text of a scalar.
    pub(super) fn text(&self) -> Option<&str> {
        match &self.value {
            Value::Scalar(text) => Some(text),
            _ => None,
        }
    }

    /// One scalar, or a list of them, as Compose takes paths.
    pub(super) fn one_or_many(&self) -> Vec<&Node> {
        match &self.value {
            Value::List(items) => items.iter().collect(),
            Value::Null => Vec::new(),
            _ => vec![self],
        }
    }

    pub(super) fn is_true(&self) -> bool {
        self.text()
            .is_some_and(|text| matches!(text, "true" | "True" | "TRUE" | "yes" | "on"))
    }

    fn count(&self) -> usize {
        1 + match &self.value {
            Value::Null | Value::Scalar(_) => 0,
            Value::List(items) => items.iter().map(Node::count).sum(),
            Value::Map(entries) => entries.iter().map(|entry| entry.value.count()).sum(),
        }
    }

    fn depth(&self) -> usize {
        1 + match &self.value {
            Value::Null | Value::Scalar(_) => 0,
            Value::List(items) => items.iter().map(Node::depth).max().unwrap_or(0),
            Value::Map(entries) => entries
                .iter()
                .map(|entry| entry.value.depth())
                .max()
                .unwrap_or(0),
        }
    }
}

/// Why a text is no YAML that is taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct YamlError {
    pub(super) line: usize,
    pub(super) message: String,
}

/// Reads all documents of a text.
pub(super) fn parse(text: &str) -> Result<Vec<Node>, YamlError> {
    if text.len() > MAX_BYTES {
        return Err(YamlError {
            line: 0,
            message: format!("it is larger than {} MiB", MAX_BYTES >> 20),
        });
    }
    let mut builder = Builder::default();
    for event in Parser::new_from_str(text.strip_prefix('\u{feff}').unwrap_or(text)) {
        let (event, span) = event.map_err(|error| YamlError {
            line: error.marker().line(),
            message: first_line(&error.to_string()),
        })?;
        builder.take(event, span.start.line())?;
    }
    Ok(builder.documents)
}

#[derive(Default)]
struct Builder {
    documents: Vec<Node>,
    open: Vec<Frame>,
    anchors: HashMap<usize, Node>,
    nodes: usize,
}

struct Frame {
    line: usize,
    anchor: usize,
    reset: bool,
    kind: FrameKind,
}

enum FrameKind {
    List(Vec<Node>),
    Map {
        entries: Vec<Entry>,
        key: Option<(String, usize)>,
        merges: Vec<Node>,
    },
}

impl Builder {
    fn take(&mut self, event: Event<'_>, line: usize) -> Result<(), YamlError> {
        match event {
            Event::DocumentStart(..) => self.anchors.clear(),
            Event::Scalar(text, style, anchor, tag) => {
                let reset = tag.as_ref().is_some_and(|tag| is_reset(tag));
                let null = matches!(style, ScalarStyle::Plain)
                    && matches!(text.as_ref(), "" | "~" | "null" | "Null" | "NULL");
                let value = if null {
                    Value::Null
                } else {
                    Value::Scalar(text.into_owned())
                };
                self.complete(Node { line, reset, value }, anchor, line)?;
            }
            Event::SequenceStart(_, anchor, tag) => self.open.push(Frame {
                line,
                anchor,
                reset: tag.as_ref().is_some_and(|tag| is_reset(tag)),
                kind: FrameKind::List(Vec::new()),
            }),
            Event::MappingStart(_, anchor, tag) => self.open.push(Frame {
                line,
                anchor,
                reset: tag.as_ref().is_some_and(|tag| is_reset(tag)),
                kind: FrameKind::Map {
                    entries: Vec::new(),
                    key: None,
                    merges: Vec::new(),
                },
            }),
            Event::SequenceEnd | Event::MappingEnd => {
                if let Some(frame) = self.open.pop() {
                    let value = match frame.kind {
                        FrameKind::List(items) => Value::List(items),
                        FrameKind::Map {
                            entries, merges, ..
                        } => Value::Map(merge(entries, merges)?),
                    };
                    let node = Node {
                        line: frame.line,
                        reset: frame.reset,
                        value,
                    };
                    self.complete(node, frame.anchor, line)?;
                }
            }
            Event::Alias(anchor) => {
                let Some(node) = self.anchors.get(&anchor) else {
                    return Err(YamlError {
                        line,
                        message: "an alias refers to a node that it is part of".to_owned(),
                    });
                };
                let depth = node.depth() + self.open.len();
                let count = node.count();
                self.nodes = self.nodes.saturating_add(count);
                if depth > MAX_DEPTH {
                    return Err(YamlError {
                        line,
                        message: format!("it is nested deeper than {MAX_DEPTH}"),
                    });
                }
                // Only what `complete` finds to be within the limit is kept; what is cloned here is
                // not larger than the limit itself.
                let node = node.clone();
                self.complete(node, 0, line)?;
            }
            _ => {}
        }
        Ok(())
    }

    /// Counts nodes, so that aliases of aliases cannot take all memory.
    fn grow(&mut self, count: usize, line: usize) -> Result<(), YamlError> {
        self.nodes = self.nodes.saturating_add(count);
        if self.nodes > MAX_NODES {
            return Err(YamlError {
                line,
                message: format!("it has more than {MAX_NODES} values, aliases counted"),
            });
        }
        Ok(())
    }

    fn complete(&mut self, node: Node, anchor: usize, line: usize) -> Result<(), YamlError> {
        self.grow(1, line)?;
        if anchor != 0 {
            let count = node.count();
            self.grow(count, line)?;
            self.anchors.insert(anchor, node.clone());
        }
        let Some(frame) = self.open.last_mut() else {
            self.documents.push(node);
            return Ok(());
        };
        match &mut frame.kind {
            FrameKind::List(items) => items.push(node),
            FrameKind::Map {
                entries,
                key,
                merges,
            } => match key.take() {
                None => {
                    let text = match node.value {
                        Value::Scalar(text) => text,
                        Value::Null => "null".to_owned(),
                        Value::List(_) | Value::Map(_) => {
                            return Err(YamlError {
                                line: node.line,
                                message: "a key must be a plain text".to_owned(),
                            });
                        }
                    };
                    *key = Some((text, line));
                }
                Some((name, _)) if name == "<<" => match node.value {
                    Value::List(items) => merges.extend(items),
                    _ => merges.push(node),
                },
                Some((name, line)) => {
                    if entries.len() > MAX_NODES {
                        return Ok(());
                    }
                    entries.push(Entry {
                        key: name,
                        line,
                        value: node,
                    });
                }
            },
        }
        Ok(())
    }
}

/// Lays merged mappings under the entries of a mapping, and finds keys that are there twice.
fn merge(mut entries: Vec<Entry>, merges: Vec<Node>) -> Result<Vec<Entry>, YamlError> {
    let mut known = std::collections::HashSet::new();
    for entry in &entries {
        if !known.insert(entry.key.clone()) {
            return Err(YamlError {
                line: entry.line,
                message: format!("`{}` is there twice", entry.key),
            });
        }
    }
    for merge in merges {
        let Value::Map(merged) = merge.value else {
            return Err(YamlError {
                line: merge.line,
                message: "`<<` takes mappings".to_owned(),
            });
        };
        for entry in merged {
            if known.insert(entry.key.clone()) {
                entries.push(entry);
            }
        }
    }
    Ok(entries)
}

fn is_reset(tag: &serde_saphyr::granit_parser::Tag) -> bool {
    tag.to_string().trim_start_matches('!') == "reset"
}

fn first_line(text: &str) -> String {
    text.lines().next().unwrap_or_default().to_owned()
}

const MAX_BYTES: usize = 4 << 20;
const MAX_DEPTH: usize = 256;
const MAX_NODES: usize = 200_000;

#[cfg(test)]
mod tests;
