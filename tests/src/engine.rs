//! The Docker Engine that the delivery tests deploy to, looked at through its own client.

use serde_json::Value;

use crate::{Run, tools};

/// Runs the Docker client with the Compose plugin of `line` (`2` or `5`).
pub fn docker(line: &str) -> Run {
    Run::new(tools::tool("docker")).env("DOCKER_CONFIG", tools::compose(line))
}

/// The containers of a Compose project, as `docker inspect` shows them.
///
/// # Panics
/// When the engine does not answer.
pub fn containers(project: &str) -> Vec<Value> {
    let filter = format!("label=com.docker.compose.project={project}");
    let ids = docker("2")
        .args(["ps", "--all", "--quiet", "--no-trunc", "--filter", &filter])
        .ok()
        .text();
    if ids.is_empty() {
        return Vec::new();
    }
    // A container may go between the two calls; what is left is the answer.
    let output = docker("2")
        .arg("inspect")
        .args(ids.split_whitespace())
        .run();
    serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("not JSON: {error}\n{output}"))
}

/// The one container of a service.
///
/// # Panics
/// When there is not exactly one.
pub fn container(project: &str, service: &str) -> Value {
    let mut found: Vec<_> = containers(project)
        .into_iter()
        .filter(|container| container["Config"]["Labels"]["com.docker.compose.service"] == service)
        .collect();
    assert_eq!(
        found.len(),
        1,
        "containers of {project}/{service}: {found:#?}"
    );
    found.remove(0)
}

/// Removes what a project left: containers, networks and volumes.
pub fn clean(project: &str) {
    let filter = format!("label=com.docker.compose.project={project}");
    let ids = docker("2")
        .args(["ps", "--all", "--quiet", "--filter", &filter])
        .run()
        .text();
    if !ids.is_empty() {
        docker("2")
            .args(["rm", "--force", "--volumes"])
            .args(ids.split_whitespace())
            .run();
    }
    let ids = docker("2")
        .args(["network", "ls", "--quiet", "--filter", &filter])
        .run()
        .text();
    if !ids.is_empty() {
        docker("2")
            .args(["network", "rm"])
            .args(ids.split_whitespace())
            .run();
    }
}
