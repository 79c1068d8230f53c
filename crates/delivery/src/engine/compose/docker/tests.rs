use bollard::errors::Error;
use bollard::models::ImageInspect;
use oci::Reference;

use super::{holds, pull_error};
use crate::engine::EngineError;

fn image(name: &str) -> Reference {
    Reference::parse_familiar(&format!("{name}@sha256:{}", "a".repeat(64))).unwrap()
}

#[test]
fn an_image_counts_only_under_its_own_repository_and_digest() {
    let known = |digest: &str| ImageInspect {
        repo_digests: Some(vec![digest.to_owned()]),
        ..Default::default()
    };
    let a = "a".repeat(64);
    assert!(holds(
        &known(&format!("busybox@sha256:{a}")),
        &image("docker.io/library/busybox")
    ));
    assert!(holds(
        &known(&format!("127.0.0.1:5000/x@sha256:{a}")),
        &image("127.0.0.1:5000/x")
    ));
    assert!(!holds(
        &known(&format!("127.0.0.1:5000/y@sha256:{a}")),
        &image("127.0.0.1:5000/x")
    ));
    assert!(!holds(
        &known(&format!("127.0.0.1:5000/x@sha256:{}", "b".repeat(64))),
        &image("127.0.0.1:5000/x")
    ));
    assert!(!holds(&ImageInspect::default(), &image("127.0.0.1:5000/x")));
}

#[test]
fn only_what_does_not_exist_for_this_platform_is_rejected() {
    let judge = |message: &str| {
        pull_error(
            &image("r.example/x"),
            &Error::DockerResponseServerError {
                status_code: 404,
                message: message.to_owned(),
            },
        )
    };
    assert!(matches!(
        judge("no matching manifest for linux/amd64 in the manifest list entries"),
        EngineError::Rejected(_)
    ));
    for passing in [
        "manifest for r.example/x@sha256:aa not found: manifest unknown: manifest unknown",
        "r.example/x@sha256:aa: not found",
        "Get \"https://r.example/v2/\": dial tcp: lookup r.example: no such host",
        "Get \"http://127.0.0.1:1/v2/\": dial tcp 127.0.0.1:1: connect: connection refused",
        "write /var/lib/docker/tmp/x: no space left on device",
        "toomanyrequests: rate limit",
        "pull access denied for r.example/x, repository does not exist or may require 'docker login'",
        "received unexpected HTTP status: 500 Internal Server Error",
    ] {
        assert!(
            matches!(judge(passing), EngineError::Unavailable(_)),
            "{passing}"
        );
    }
    assert!(
        judge("unauthorized: authentication required")
            .to_string()
            .contains("login")
    );
}
