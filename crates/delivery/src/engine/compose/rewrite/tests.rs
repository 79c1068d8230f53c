use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::time::Duration;

use oci::{Digest, Platform, Reference};
use proptest::prelude::*;
use serde_json::{Value, json};

use super::{DEFINITION_LABEL, Resolved, TARGET_LABEL, Wanted, rewrite};
use crate::engine::{Deployment, EngineError};
use crate::release::{EngineKind, ImagePin, ReleaseConfig};
use crate::target::{Health, Rollback, Target};

/// A service that is wanted with this definition hash.
pub(in crate::engine::compose) fn wanted(definition: &str) -> Wanted {
    Wanted {
        definition: definition.to_owned(),
        parts: BTreeMap::new(),
        replicas: 1,
        image: Reference::parse_familiar(&format!("r.example/x@sha256:{}", "a".repeat(64)))
            .unwrap(),
        parents: BTreeSet::new(),
        platform: None,
        platforms: Vec::new(),
    }
}

/// A deployment below `base`, with pins of `web` and `db` and a release directory `releases/one`.
pub(in crate::engine::compose) fn deployment(base: &Path) -> Deployment {
    let directory = base.join("releases/one");
    fs::create_dir_all(&directory).unwrap();
    let pin = |service: &str| ImagePin {
        service: service.to_owned(),
        reference: format!("r.example/{service}:1"),
        digest: digest('a'),
        media_type: "application/vnd.oci.image.index.v1+json".to_owned(),
        platforms: vec![Platform {
            architecture: "amd64".to_owned(),
            os: "linux".to_owned(),
            variant: None,
            os_version: None,
        }],
    };
    Deployment {
        target: Target {
            name: "shop".to_owned(),
            reference: Reference::parse_familiar("r.example/shop:production").unwrap(),
            release: "shop".to_owned(),
            engine: EngineKind::Compose,
            project: "shop".to_owned(),
            variables: BTreeMap::new(),
            profiles: Vec::new(),
            trust: None,
            health: Health {
                stability: Duration::ZERO,
                timeout: Duration::ZERO,
                interval: Duration::ZERO,
                http: Vec::new(),
                command: Vec::new(),
            },
            rollback: Rollback::Auto,
            adopt: false,
            files: None,
        },
        digest: digest('f'),
        config: ReleaseConfig {
            schema_version: 1,
            name: "shop".to_owned(),
            version: None,
            engine: EngineKind::Compose,
            entry: vec!["compose.yaml".to_owned()],
            variables: Vec::new(),
            images: vec![pin("web"), pin("db")],
        },
        directory,
        state: base.join("targets/shop"),
        data: base.join("data/shop"),
        variables: BTreeMap::from([("PASSWORD".to_owned(), "hunter2".to_owned())]),
    }
}

fn digest(digit: char) -> Digest {
    format!("sha256:{}", digit.to_string().repeat(64))
        .parse()
        .unwrap()
}

fn run(deployment: &Deployment, model: Value) -> Result<Resolved, EngineError> {
    rewrite(model, deployment, &deployment.state.join("engine/content"))
}

fn rejection(deployment: &Deployment, model: Value) -> String {
    match run(deployment, model) {
        Err(EngineError::Rejected(message)) => message,
        other => panic!("not rejected: {other:?}"),
    }
}

fn web(extra: Value) -> Value {
    let mut service = json!({"image": "r.example/web:1"});
    service
        .as_object_mut()
        .unwrap()
        .extend(extra.as_object().unwrap().clone());
    json!({"name": "shop", "services": {"web": service}})
}

#[test]
fn images_become_digests_and_labels_are_added() {
    let dir = tempfile::tempdir().unwrap();
    let deployment = deployment(dir.path());
    let resolved =
        run(&deployment, web(json!({"build": {}, "pull_policy": "always", "develop": {}, "profiles": ["p"], "x-note": 1, "labels": {"mine": "x"}, "deploy": {"replicas": 3}}))).unwrap();
    let service = &resolved.model["services"]["web"];
    assert_eq!(service["image"], format!("r.example/web@{}", digest('a')));
    for gone in ["build", "pull_policy", "develop", "profiles", "x-note"] {
        assert!(service.get(gone).is_none(), "{gone}");
    }
    assert_eq!(service["labels"][TARGET_LABEL], "shop");
    assert_eq!(service["labels"]["mine"], "x");
    assert_eq!(
        service["labels"][DEFINITION_LABEL],
        resolved.services["web"].definition
    );
    assert_eq!(resolved.services["web"].replicas, 3);
}

#[test]
fn an_image_other_than_the_pinned_one_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut deployment = deployment(dir.path());
    for (service, expected) in [
        (
            json!({"image": "r.example/web:2"}),
            "pins `r.example/web:1`",
        ),
        (
            json!({"image": format!("r.example/web:1@{}", digest('b'))}),
            "pins",
        ),
        (json!({"image": "UPPER//x"}), "not a reference"),
        (json!({"build": {"context": "."}}), "no image"),
        (
            json!({"provider": {"type": "x"}, "image": "r.example/web:1"}),
            "provider",
        ),
    ] {
        let message = rejection(&deployment, json!({"services": {"web": service}}));
        assert!(message.contains(expected), "{message}");
    }
    assert!(
        rejection(
            &deployment,
            json!({"services": {"other": {"image": "r.example/web:1"}}})
        )
        .contains("pins no image for service `other`")
    );
    assert!(rejection(&deployment, json!({"services": {}})).contains("profiles"));

    // A foreign format has no pins: only a digest will do.
    deployment.config.images.clear();
    assert!(rejection(&deployment, web(json!({}))).contains("not pinned"));
    let pinned = format!("busybox:1@{}", digest('c'));
    let resolved = run(&deployment, web(json!({"image": pinned}))).unwrap();
    assert_eq!(
        resolved.model["services"]["web"]["image"],
        format!("docker.io/library/busybox@{}", digest('c'))
    );
}

#[test]
fn mounts_of_the_release_go_by_content_and_read_only() {
    let dir = tempfile::tempdir().unwrap();
    let deployment = deployment(dir.path());
    fs::write(deployment.directory.join("f.conf"), "one").unwrap();
    fs::create_dir(deployment.directory.join("html")).unwrap();
    let bind = |source: &Path, target: &str| json!({"type": "bind", "source": source, "target": target, "bind": {"create_host_path": true}});
    let model = |deployment: &Deployment| {
        let mut model = web(json!({"volumes": [
            bind(&deployment.directory.join("f.conf"), "/f"), bind(&deployment.directory.join("html/../html"), "/html"),
            bind(&deployment.data.join("db"), "/data"), bind(Path::new("/etc/hosts"), "/hosts"),
            {"type": "volume", "source": "v", "target": "/v"}, {"type": "tmpfs", "target": "/t"}],
            "configs": [{"source": "c"}], "secrets": [{"source": "s"}]}));
        model["configs"] = json!({"c": {"file": deployment.directory.join("f.conf")}});
        model["secrets"] = json!({"s": {"environment": "PASSWORD"}});
        model["volumes"] = json!({"v": {"name": "shop_v"}});
        model
    };
    let resolved = run(&deployment, model(&deployment)).unwrap();
    let volumes = &resolved.model["services"]["web"]["volumes"];
    let content = deployment.state.join("engine/content");
    for index in [0, 1] {
        assert_eq!(volumes[index]["read_only"], true);
        assert!(Path::new(volumes[index]["source"].as_str().unwrap()).starts_with(&content));
    }
    assert_eq!(
        volumes[0]["source"], resolved.model["configs"]["c"]["file"],
        "the same bytes have one name"
    );
    assert_eq!(
        volumes[2]["source"],
        deployment.data.join("db").to_str().unwrap()
    );
    assert!(volumes[2].get("read_only").is_none());
    assert_eq!(volumes[3]["source"], "/etc/hosts");
    assert_eq!(
        resolved.data.iter().collect::<Vec<_>>(),
        [&deployment.data.join("db")]
    );
    assert_eq!(resolved.contents.len(), 2);

    // Another release directory with the same files is the same definition; another byte is not.
    let mut next = deployment.clone();
    next.directory = dir.path().join("releases/two");
    fs::create_dir_all(next.directory.join("html")).unwrap();
    fs::write(next.directory.join("f.conf"), "one").unwrap();
    let same = run(&next, model(&next)).unwrap();
    assert_eq!(
        same.services["web"].definition,
        resolved.services["web"].definition
    );
    assert_eq!(same.model, resolved.model);
    fs::write(next.directory.join("f.conf"), "two").unwrap();
    let changed = run(&next, model(&next)).unwrap();
    assert_ne!(
        changed.services["web"].definition,
        resolved.services["web"].definition
    );
    let differing: Vec<&str> = changed.services["web"]
        .parts
        .iter()
        .filter(|(name, value)| resolved.services["web"].parts[*name] != **value)
        .map(|(name, _)| name.as_str())
        .collect();
    assert_eq!(differing, ["config `c`", "mount `/f`"]);

    // A secret from a variable counts by its value.
    next.variables
        .insert("PASSWORD".to_owned(), "other".to_owned());
    assert_ne!(
        run(&next, model(&next)).unwrap().services["web"].definition,
        changed.services["web"].definition
    );
    next.variables.clear();
    assert!(rejection(&next, model(&next)).contains("`PASSWORD`"));
}

#[test]
fn paths_that_the_release_lacks_or_leaves_are_refused_with_a_hint() {
    let dir = tempfile::tempdir().unwrap();
    let deployment = deployment(dir.path());
    fs::create_dir_all(dir.path().join("secret")).unwrap();
    std::os::unix::fs::symlink(dir.path().join("secret"), deployment.directory.join("link"))
        .unwrap();
    for source in [
        deployment.directory.join("data"),
        deployment.directory.join("../two/f"),
        deployment.directory.join(".."),
        deployment.directory.join("link"),
        deployment
            .directory
            .join("../../targets/shop/engine/applied.json"),
        "relative".into(),
    ] {
        let message = rejection(
            &deployment,
            web(json!({"volumes": [{"type": "bind", "source": source, "target": "/x"}]})),
        );
        assert!(
            message.contains("web")
                && (message.contains("LONGSHORE_DATA") || message.contains("link")),
            "{message}"
        );
    }
    let mut model = web(json!({}));
    model["secrets"] = json!({"s": {"file": deployment.directory.join("nope")}});
    assert!(rejection(&deployment, model).contains("secret `s` mounts `nope`"));
    let mut model = web(json!({}));
    model["volumes"] = json!({"v": {"driver": "local", "driver_opts": {"type": "none", "o": "bind", "device": deployment.directory.join("x")}}});
    assert!(rejection(&deployment, model).contains("volume `v`"));
    assert!(
        rejection(
            &deployment,
            web(json!({"volumes": [{"type": "image", "source": "busybox", "target": "/x"}]}))
        )
        .contains("image")
    );
}

#[test]
fn what_only_counts_or_orders_containers_is_no_definition() {
    let dir = tempfile::tempdir().unwrap();
    let deployment = deployment(dir.path());
    let hash = |extra: Value| {
        run(&deployment, web(extra)).unwrap().services["web"]
            .definition
            .clone()
    };
    let plain = hash(json!({}));
    for same in [
        json!({"depends_on": {"db": {"condition": "service_started"}}}),
        json!({"deploy": {"replicas": 2, "resources": {}, "placement": {}}}),
        json!({"scale": 2}),
        json!({"command": null, "entrypoint": null, "profiles": ["p"]}),
    ] {
        assert_eq!(hash(same.clone()), plain, "{same}");
    }
    for other in [
        json!({"command": ["x"]}),
        json!({"environment": {"A": "1"}}),
        json!({"environment": {"A": null}}),
        json!({"labels": {"a": "b"}}),
        json!({"networks": {"n": null}}),
        json!({"deploy": {"resources": {"limits": {"cpus": 1}}}}),
    ] {
        assert_ne!(hash(other.clone()), plain, "{other}");
    }
    let bind = |bind: Value| {
        hash(
            json!({"volumes": [{"type": "bind", "source": "/etc/hosts", "target": "/h", "bind": bind}]}),
        )
    };
    assert_eq!(
        bind(json!({"create_host_path": true})),
        bind(json!({})),
        "plugin versions differ in this"
    );
}

#[test]
fn secrets_are_known_to_the_redactor() {
    let dir = tempfile::tempdir().unwrap();
    let deployment = deployment(dir.path());
    fs::write(deployment.directory.join("s.txt"), "file-secret\n").unwrap();
    let mut model = web(json!({"environment": {"API_TOKEN": "tok-12345", "MODE": "production"}}));
    model["secrets"] = json!({"s": {"file": deployment.directory.join("s.txt")}, "t": {"content": "inline-secret"}});
    let redactor = run(&deployment, model).unwrap().redactor;
    assert_eq!(
        redactor.redact("hunter2 file-secret tok-12345 inline-secret production"),
        "[redacted] [redacted] [redacted] [redacted] production"
    );
}

#[test]
fn shared_namespaces_name_their_parents() {
    let dir = tempfile::tempdir().unwrap();
    let deployment = deployment(dir.path());
    let resolved = run(&deployment, web(json!({"network_mode": "service:db", "pid": "host", "volumes_from": ["a:ro", "container:x"]}))).unwrap();
    assert_eq!(
        resolved.services["web"].parents.iter().collect::<Vec<_>>(),
        ["a", "db"]
    );
}

fn any_json() -> impl Strategy<Value = Value> {
    let keys = prop::sample::select(vec![
        "image",
        "volumes",
        "labels",
        "type",
        "source",
        "file",
        "environment",
        "networks",
        "deploy",
        "replicas",
        "configs",
        "target",
        "x",
    ]);
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i32>().prop_map(Value::from),
        "[a-z/.:]{0,8}".prop_map(Value::from)
    ];
    leaf.prop_recursive(4, 40, 5, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::vec((keys.clone(), inner), 0..4).prop_map(|list| list
                .into_iter()
                .map(|(k, v)| (k.to_owned(), v))
                .collect::<Value>())
        ]
    })
}

proptest! {
    #[test]
    fn no_shape_of_a_model_panics(service in any_json(), top in any_json()) {
        let dir = tempfile::tempdir().unwrap();
        let deployment = deployment(dir.path());
        let _ = run(&deployment, json!({"services": {"web": service}, "configs": top.clone(), "volumes": top}));
    }
}
