//! The resolved project as the plugin prints and reads it.
//!
//! `docker compose config` doubles each `$` of its whole output, names and values alike, so that reading it again interpolates nothing.
//! Reading a definition interpolates values alone. So: every pair is undone on the way in, only values are escaped on the way out.

use serde_json::{Map, Value};

/// Reads what `config --format json` printed.
pub(super) fn parse(output: &[u8]) -> Result<Value, String> {
    let text = std::str::from_utf8(output).map_err(|_| "it is not UTF-8".to_owned())?;
    let model: Value = serde_json::from_str(&text.replace("$$", "$"))
        .map_err(|error| format!("it is not JSON ({error})"))?;
    if model.is_object() {
        Ok(model)
    } else {
        Err("it is not an object".to_owned())
    }
}

/// The model as a definition that Compose reads back to the same values.
pub(super) fn render(model: &Value) -> Vec<u8> {
    escaped(model).to_string().into_bytes()
}

fn escaped(value: &Value) -> Value {
    match value {
        Value::String(text) => Value::String(text.replace('$', "$$")),
        Value::Array(items) => items.iter().map(escaped).collect(),
        Value::Object(map) => Value::Object(
            map.iter()
                .map(|(key, value)| (key.clone(), escaped(value)))
                .collect(),
        ),
        other => other.clone(),
    }
}

/// The one text form of a value that is hashed: names sorted, and without the emptiness (`null`, `{}`) that plugin versions print differently.
pub(super) fn canonical(value: &Value) -> String {
    canonical_value(value, "").to_string()
}

fn canonical_value(value: &Value, name: &str) -> Value {
    match value {
        Value::Array(items) => items.iter().map(|item| canonical_value(item, "")).collect(),
        Value::Object(map) => {
            let mut names: Vec<&String> = map.keys().collect();
            names.sort();
            let mut sorted = Map::new();
            for key in names {
                let value = canonical_value(&map[key], key);
                // In these the name alone says something.
                if !value.is_null() || MEANINGFUL_NAMES.contains(&name) {
                    sorted.insert(key.clone(), value);
                }
            }
            if sorted.is_empty() {
                Value::Null
            } else {
                Value::Object(sorted)
            }
        }
        other => other.clone(),
    }
}

/// Maps whose entries count without a value.
const MEANINGFUL_NAMES: [&str; 6] = [
    "environment",
    "networks",
    "labels",
    "sysctls",
    "driver_opts",
    "options",
];

#[cfg(test)]
mod tests;
