//! What is told of a target: its status, why it runs what it runs, and what is left out because it is secret.

use oci::Digest;

use super::disk::Paths;
use crate::attempt;
use crate::control::{Explanation, HealthStatus, QuarantineStatus, RunningStatus, TargetStatus};
use crate::machine::{Standing, State};
use crate::release::EngineKind;
use crate::target::Target;

/// What is known besides the state.
#[derive(Clone, Debug, Default)]
pub struct Circumstances {
    /// The version of what runs.
    pub version: Option<String>,
    /// The last look at what runs.
    pub health: Option<HealthStatus>,
    /// Why the registry cannot be asked.
    pub source_error: Option<String>,
    /// Why the state cannot be written.
    pub disk_error: Option<String>,
    /// Whether events arrive.
    pub stream: bool,
}

/// The status of a target.
pub fn status(target: &Target, state: &State, circumstances: Circumstances) -> TargetStatus {
    TargetStatus {
        target: target.name.clone(),
        reference: target.reference.to_string(),
        release: target.release.clone(),
        engine: target.engine,
        state: state.phase.name().to_owned(),
        reason: circumstances.disk_error.or_else(|| state.phase.reason()),
        settled: state.is_settled(),
        attempt: state.attempt.as_ref().map_or(0, |attempt| attempt.number),
        digest: state.attempt.as_ref().map(|attempt| attempt.digest.clone()),
        resolved: state.resolved.clone(),
        running: state.running.as_ref().map(|running| RunningStatus {
            digest: running.digest.clone(),
            version: circumstances.version,
            good: running.standing == Standing::Good,
            since: running.since.clone(),
        }),
        health: circumstances.health,
        good: state
            .good
            .iter()
            .map(|generation| generation.digest.clone())
            .collect(),
        quarantine: state
            .quarantine
            .iter()
            .map(|entry| QuarantineStatus {
                digest: entry.digest.clone(),
                reason: entry.reason.clone(),
                since: entry.since.clone(),
            })
            .collect(),
        stream: circumstances.stream,
        source_error: circumstances.source_error,
    }
}

/// Why is this running. Reads the ledger, which may be long: call it where blocking is allowed.
pub fn explain(target: &Target, status: TargetStatus, paths: &Paths) -> Explanation {
    let ledger = paths.ledger();
    let checked = attempt::verify(&ledger).map_err(|error| super::source::chain(&error));
    let about: Option<&Digest> = status
        .running
        .as_ref()
        .map(|running| &running.digest)
        .or(status.digest.as_ref());
    // What stands before a break in the chain is still told; `ledger` says that it broke.
    let story = about.and_then(|digest| attempt::story_of(&ledger, digest).ok().flatten());
    let mut explanation = Explanation {
        status,
        rule: rule(target),
        attempt: None,
        rollback: None,
        verdict: None,
        plan: None,
        steps: Vec::new(),
        samples: Vec::new(),
        ledger: checked,
    };
    if let Some(story) = story {
        explanation.attempt = Some(story.summary);
        explanation.rollback = story.rollback;
        explanation.verdict = story.verdict;
        explanation.plan = story.plan;
        explanation.steps = story.steps;
        explanation.samples = story.samples;
    }
    explanation
}

/// The target's rule in words.
pub fn rule(target: &Target) -> String {
    match &target.trust {
        None => "trust is switched off for this target (`trust: none`): nobody need have signed"
            .to_owned(),
        Some(policy) => {
            let keys: Vec<&str> = policy.keys.iter().map(|key| key.label.as_str()).collect();
            format!(
                "at least {} of {} key(s) must have signed: {}",
                policy.threshold,
                keys.len(),
                keys.join(", ")
            )
        }
    }
}

/// A fingerprint of all that changes what runs or whether a release is refused for good.
pub fn fingerprint(target: &Target) -> String {
    let files = target
        .files
        .as_ref()
        .map(|files| serde_json::json!([files.path.to_string_lossy(), files.activate]));
    let engine = match target.engine {
        EngineKind::Compose => "compose",
        EngineKind::Files => "files",
    };
    let value = serde_json::json!({
        "adopt": target.adopt,
        "engine": engine,
        "files": files,
        "profiles": target.profiles,
        "project": target.project,
        "release": target.release,
        "repository": format!("{}/{}", target.reference.host, target.reference.repository),
        "variables": target.variables,
    });
    // Only a hash: variables may be secrets, and it stands in the state.
    Digest::sha256(value.to_string().as_bytes()).hex()
}

/// The values that must not be seen: those of variables whose names say so.
pub fn secrets(target: &Target) -> Vec<String> {
    let mut secrets: Vec<String> = target
        .variables
        .iter()
        .filter(|(name, value)| {
            let name = name.to_uppercase();
            value.len() >= SHORTEST_SECRET && SECRET_NAMES.iter().any(|word| name.contains(word))
        })
        .map(|(_, value)| value.clone())
        .collect();
    // The longest first, so that a secret inside another one does not leave the rest of it.
    secrets.sort_by_key(|secret| std::cmp::Reverse(secret.len()));
    secrets
}

/// The text without secrets.
pub fn redact(text: &str, secrets: &[String]) -> String {
    let mut text = text.to_owned();
    for secret in secrets {
        if text.contains(secret.as_str()) {
            text = text.replace(secret.as_str(), "***");
        }
    }
    text
}

const SHORTEST_SECRET: usize = 4;
const SECRET_NAMES: [&str; 8] = [
    "PASS",
    "SECRET",
    "TOKEN",
    "KEY",
    "CREDENTIAL",
    "AUTH",
    "DSN",
    "DATABASE_URL",
];
