//! `longshore agent …`: the agent itself and the commands that talk to it over its socket.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use delivery::control::{
    self, Explanation, HealthStatus, PlanReport, Refusal, RefusalKind, Request, Response,
    TargetStatus,
};
use delivery::engine::{Action, Plan};
use oci::Digest;

use super::Global;
use crate::output::{self, Exit, Refused};

/// Keep targets running.
#[derive(Debug, Subcommand)]
pub(crate) enum Agent {
    /// Run the agent.
    Run(Run),
    /// Show what the targets are and do.
    Status {
        /// One target; all when left out.
        target: Option<String>,
        #[command(flatten)]
        socket: Socket,
    },
    /// Show the attempts of a target, newest first.
    History {
        /// The target.
        target: String,
        /// How many.
        #[arg(long, default_value_t = 20)]
        limit: usize,
        #[command(flatten)]
        socket: Socket,
    },
    /// Show what a deployment would change. Ends with 2 when there are changes.
    Plan {
        /// The target.
        target: String,
        /// A tag, a digest or a reference of the target's repository [default: what it follows].
        reference: Option<String>,
        #[command(flatten)]
        socket: Socket,
    },
    /// Deploy now, and wait for the outcome.
    Deploy {
        /// The target.
        target: String,
        /// As for `plan`. A digest stays until what the target follows moves.
        reference: Option<String>,
        /// Do not wait for the outcome.
        #[arg(long)]
        no_wait: bool,
        #[command(flatten)]
        socket: Socket,
    },
    /// Go back to the good release before the one that runs, and quarantine the one that it leaves.
    Rollback {
        /// The target.
        target: String,
        /// Do not wait for the outcome.
        #[arg(long)]
        no_wait: bool,
        #[command(flatten)]
        socket: Socket,
    },
    /// Why is this running: reference, digest, signer, rule, verdict, plan, steps, health.
    Explain {
        /// The target.
        target: String,
        #[command(flatten)]
        socket: Socket,
    },
    /// Allow a quarantined release again.
    Unquarantine {
        /// The target.
        target: String,
        /// The release's digest.
        digest: Digest,
        #[command(flatten)]
        socket: Socket,
    },
}

/// Run the agent in the foreground.
#[derive(Debug, Args)]
pub(crate) struct Run {
    /// The agent's configuration (YAML).
    #[arg(long, short, value_name = "FILE")]
    config: PathBuf,
}

/// Where the agent answers.
#[derive(Debug, Args)]
pub(crate) struct Socket {
    /// The agent's socket [default: that of `longshore up` in the default data directory].
    #[arg(long, value_name = "FILE", env = "LONGSHORE_AGENT_SOCKET")]
    socket: Option<PathBuf>,
}

impl Agent {
    pub(crate) async fn run(self, global: &Global) -> anyhow::Result<Exit> {
        let (socket, request) = match self {
            Self::Run(command) => {
                crate::serve::logging(&crate::config::Log::default());
                crate::agent::run(&command.config).await?;
                return Ok(Exit::OK);
            }
            Self::Status { target, socket } => (socket, Request::Status { target }),
            Self::History {
                target,
                limit,
                socket,
            } => (socket, Request::History { target, limit }),
            Self::Plan {
                target,
                reference,
                socket,
            } => (socket, Request::Plan { target, reference }),
            Self::Deploy {
                target,
                reference,
                no_wait,
                socket,
            } => (
                socket,
                Request::Deploy {
                    target,
                    reference,
                    wait: !no_wait,
                },
            ),
            Self::Rollback {
                target,
                no_wait,
                socket,
            } => (
                socket,
                Request::Rollback {
                    target,
                    wait: !no_wait,
                },
            ),
            Self::Explain { target, socket } => (socket, Request::Explain { target }),
            Self::Unquarantine {
                target,
                digest,
                socket,
            } => (socket, Request::Unquarantine { target, digest }),
        };
        let socket = match socket.socket {
            Some(socket) => socket,
            None => default_socket()?,
        };
        let must_be_good = matches!(
            request,
            Request::Deploy { wait: true, .. } | Request::Rollback { wait: true, .. }
        );
        match control::call(&socket, &request).await {
            Ok(response) => show(response, must_be_good, global),
            Err(error @ control::ControlError::Connect { .. }) => {
                Err(Refused::new(Exit::UNREACHABLE, error)
                    .hint("name another socket with `--socket FILE`")
                    .into())
            }
            Err(error) => Err(error.into()),
        }
    }
}

/// The socket that `longshore agent` uses when none is named.
fn default_socket() -> anyhow::Result<PathBuf> {
    let of_up = crate::config::default_data()?.join("agent.sock");
    let of_agent = delivery::target::config::default_socket();
    Ok(if !of_up.exists() && of_agent.exists() {
        of_agent
    } else {
        of_up
    })
}

fn show(response: Response, must_be_good: bool, global: &Global) -> anyhow::Result<Exit> {
    let exit = match &response {
        Response::Plan(report) if report.plan.has_changes() => Exit::CHANGES,
        Response::Status(targets)
            if must_be_good
                && targets
                    .iter()
                    .any(|target| !matches!(target.state.as_str(), "good" | "rolled-back")) =>
        {
            Exit::FAILED
        }
        Response::Error(refusal) => return Err(refused(refusal).into()),
        _ => Exit::OK,
    };
    if global.json {
        match &response {
            Response::Status(value) => output::json(value)?,
            Response::History(value) => output::json(value)?,
            Response::Plan(value) => output::json(value)?,
            Response::Explain(value) => output::json(value)?,
            Response::Done(message) => output::json(&serde_json::json!({"message": message}))?,
            Response::Error(_) => {}
        }
        return Ok(exit);
    }
    match response {
        Response::Status(targets) => {
            if targets.is_empty() {
                output::line("no targets are configured");
            }
            for target in &targets {
                status(target);
            }
        }
        Response::History(attempts) => {
            let rows: Vec<Vec<String>> = attempts.iter().map(history_row).collect();
            output::table(
                &["ATTEMPT", "STARTED", "TRIGGER", "DIGEST", "OUTCOME"],
                &rows,
            );
        }
        Response::Plan(report) => plan_report(&report),
        Response::Explain(explanation) => explain(&explanation),
        Response::Done(message) => output::line(message),
        Response::Error(_) => {}
    }
    Ok(exit)
}

fn refused(refusal: &Refusal) -> Refused {
    let code = match refusal.kind {
        RefusalKind::UnknownTarget => Exit::NOT_FOUND,
        RefusalKind::Invalid => Exit::USAGE,
        RefusalKind::Quarantined | RefusalKind::Rejected => Exit::REFUSED,
        RefusalKind::Unavailable => Exit::UNREACHABLE,
        RefusalKind::Impossible => Exit::FAILED,
    };
    Refused::new(code, &refusal.message)
}

fn history_row(attempt: &delivery::attempt::AttemptSummary) -> Vec<String> {
    vec![
        attempt.attempt.to_string(),
        attempt.started.clone(),
        attempt.trigger.clone(),
        attempt.digest.short(),
        match (&attempt.outcome, &attempt.reason) {
            (Some(outcome), Some(reason)) => format!("{outcome}: {reason}"),
            (Some(outcome), None) => outcome.clone(),
            (None, _) => "goes on".to_owned(),
        },
    ]
}

fn status(target: &TargetStatus) {
    output::line(format!("{}  {}", target.target, target.state));
    if let Some(reason) = &target.reason {
        output::line(format!("  reason     {reason}"));
    }
    output::line(format!("  follows    {}", target.reference));
    if let Some(running) = &target.running {
        output::line(format!(
            "  running    {}{}{} since {}",
            running.digest,
            running
                .version
                .as_ref()
                .map(|version| format!(" ({version})"))
                .unwrap_or_default(),
            if running.good { "" } else { ", not yet good" },
            running.since
        ));
    }
    if target.digest.is_some()
        && target.digest
            != target
                .running
                .as_ref()
                .map(|running| running.digest.clone())
    {
        output::line(format!(
            "  attempt    {} {}",
            target.attempt,
            target
                .digest
                .as_ref()
                .map(ToString::to_string)
                .unwrap_or_default()
        ));
    }
    if let Some(health) = &target.health {
        health_lines(health);
    }
    for entry in &target.quarantine {
        output::line(format!(
            "  quarantine {} since {}: {}",
            entry.digest, entry.since, entry.reason
        ));
    }
    if let Some(error) = &target.source_error {
        output::line(format!("  registry   {error}"));
    }
}

fn health_lines(health: &HealthStatus) {
    output::line(format!(
        "  health     {}{} since {}",
        health.state,
        health
            .reason
            .as_ref()
            .map(|reason| format!(" ({reason})"))
            .unwrap_or_default(),
        health.since
    ));
    for service in &health.services {
        output::line(format!("    {}: {}", service.service, service.detail));
    }
}

fn plan_report(report: &PlanReport) {
    output::line(format!(
        "{}: {}{}",
        report.target,
        report.digest,
        report
            .version
            .as_ref()
            .map(|version| format!(" ({version})"))
            .unwrap_or_default()
    ));
    if let Some(verdict) = &report.verdict {
        output::line(format!("  verdict  {}", verdict.message));
    }
    if report.quarantined {
        output::line(
            "  this release is quarantined: it is not deployed before `agent unquarantine`",
        );
    }
    plan_lines(&report.plan);
    if !report.plan.has_changes() {
        output::line("  no changes");
    }
}

fn plan_lines(plan: &Plan) {
    for change in &plan.changes {
        let sign = match change.action {
            Action::Create => "+",
            Action::Recreate => "~",
            Action::Remove => "-",
            Action::Keep => "=",
        };
        output::line(format!("  {sign} {}  {}", change.subject, change.reason));
    }
    for note in &plan.notes {
        output::line(format!("  note: {note}"));
    }
}

/// Prints why something runs.
pub(crate) fn explain(explanation: &Explanation) {
    let target = &explanation.status;
    output::line(format!("{} follows {}", target.target, target.reference));
    match &target.running {
        Some(running) => output::line(format!(
            "  runs      {}{} since {}",
            running.digest,
            running
                .version
                .as_ref()
                .map(|version| format!(" ({version})"))
                .unwrap_or_default(),
            running.since
        )),
        None => output::line("  runs      nothing that this agent deployed"),
    }
    output::line(format!("  rule      {}", explanation.rule));
    if let Some(verdict) = &explanation.verdict {
        output::line(format!("  verdict   {}", verdict.message));
        for accepted in &verdict.accepted {
            output::line(format!(
                "  signer    {} ({}), {} {}",
                accepted.label, accepted.key, accepted.shape, accepted.evidence
            ));
        }
    }
    if let Some(attempt) = &explanation.attempt {
        output::line(format!(
            "  attempt   {} by {} at {}: {}",
            attempt.attempt,
            attempt.trigger,
            attempt.started,
            attempt.outcome.as_deref().unwrap_or("goes on")
        ));
    }
    if let Some(rollback) = &explanation.rollback {
        output::line(format!(
            "  back from {} by attempt {} by {} at {}: {}",
            rollback.digest,
            rollback.attempt,
            rollback.trigger,
            rollback.started,
            rollback.reason.as_deref().unwrap_or("goes on")
        ));
    }
    if let Some(plan) = &explanation.plan {
        output::line("  plan");
        for change in &plan.changes {
            let action = match change.action {
                Action::Create => "create",
                Action::Recreate => "recreate",
                Action::Remove => "remove",
                Action::Keep => "keep",
            };
            output::line(format!(
                "    {action} {}: {}",
                change.subject, change.reason
            ));
        }
    }
    if !explanation.steps.is_empty() {
        output::line("  steps");
    }
    for step in &explanation.steps {
        output::line(format!(
            "    {} {}{}",
            step.finished,
            step.step,
            step.error
                .as_ref()
                .map(|error| format!(": {error}"))
                .unwrap_or_default()
        ));
        for note in &step.notes {
            output::line(format!("      {note}"));
        }
    }
    if let Some(health) = &target.health {
        health_lines(health);
    }
    for entry in &target.quarantine {
        output::line(format!(
            "  quarantine {} since {}: {}",
            entry.digest, entry.since, entry.reason
        ));
    }
    match &explanation.ledger {
        Ok(records) => output::line(format!("  ledger    {records} records, the chain is whole")),
        Err(problem) => output::line(format!("  ledger    DAMAGED: {problem}")),
    }
}
