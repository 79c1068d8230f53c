use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::model::{self, Model};
use super::process::{check_version, redact};
use super::*;
use crate::release::{EngineKind, ImagePin, ReleaseConfig};

const IMAGE: &str = "sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a";

/// A deployment below a temporary directory: release files, state, data.
fn deployment(root: &std::path::Path) -> Deployment {
    let directory = root.join("state/releases/sha256-1");
    std::fs::create_dir_all(&directory).unwrap();
    std::fs::write(directory.join("greeting.txt"), "hello").unwrap();
    let yaml = "version: 1\ntargets:\n  - {name: shop, reference: \"r.example/shop:p\", release: shop, engine: compose, trust: none}\n";
    let target = crate::agent::AgentConfig::parse(yaml, "agent.yaml", root)
        .unwrap()
        .targets
        .remove(0);
    Deployment {
        target,
        digest: IMAGE.parse().unwrap(),
        config: ReleaseConfig {
            schema_version: 1,
            name: "shop".into(),
            version: None,
            engine: EngineKind::Compose,
            entry: vec!["compose.yaml".into()],
            variables: Vec::new(),
            images: vec![ImagePin {
                service: "web".into(),
                reference: "r.example/web:1".into(),
                digest: IMAGE.parse().unwrap(),
                media_type: oci::media_type::OCI_MANIFEST.into(),
                platforms: Vec::new(),
            }],
        },
        directory,
        state: root.join("state"),
        data: root.join("data"),
        variables: BTreeMap::from([("TOKEN".to_owned(), "very-secret".to_owned())]),
    }
}

fn document(deployment: &Deployment) -> Value {
    json!({
        "name": "other",
        "services": {"web": {
            "image": "r.example/web:1",
            "build": {"context": "/x"},
            "environment": {"A": "1", "PRICE": "5$$"},
            "volumes": [
                {"type": "bind", "source": deployment.directory.join("greeting.txt"), "target": "/g"},
                {"type": "volume", "source": "db", "target": "/db"},
            ],
        }},
        "volumes": {"db": {"name": "shop_db"}},
    })
}

fn rewrite(document: Value, deployment: &Deployment) -> Model {
    model::rewrite(document, deployment).unwrap()
}

fn refusal(document: Value, deployment: &Deployment) -> String {
    match model::rewrite(document, deployment) {
        Err(EngineError::Rejected(message)) => message,
        other => panic!("{other:?}"),
    }
}

#[test]
fn images_become_digests_and_files_become_content() {
    let root = tempfile::tempdir().unwrap();
    let deployment = deployment(root.path());
    let model = rewrite(document(&deployment), &deployment);
    let web = &model.document["services"]["web"];
    assert_eq!(web["image"], json!(format!("r.example/web@{IMAGE}")));
    assert_eq!(web.get("build"), None);
    assert_eq!(model.document["name"], "shop");
    assert_eq!(web["environment"]["PRICE"], "5$$");
    assert_eq!(web["volumes"][0]["read_only"], true);
    let source = PathBuf::from(web["volumes"][0]["source"].as_str().unwrap());
    assert!(source.starts_with(deployment.state.join("engine/content")));
    model.keep(&deployment).unwrap();
    assert_eq!(std::fs::read_to_string(source).unwrap(), "hello");
}

#[test]
fn only_what_changed_changes_the_hash() {
    let root = tempfile::tempdir().unwrap();
    let mut deployment = deployment(root.path());
    let before = rewrite(document(&deployment), &deployment);
    // Another directory with the same bytes is the same service.
    let moved = deployment.state.join("releases/sha256-2");
    std::fs::create_dir_all(&moved).unwrap();
    std::fs::write(moved.join("greeting.txt"), "hello").unwrap();
    deployment.directory.clone_from(&moved);
    let same = rewrite(document(&deployment), &deployment);
    assert_eq!(before.services["web"].hash, same.services["web"].hash);
    std::fs::write(moved.join("greeting.txt"), "bye").unwrap();
    let other = rewrite(document(&deployment), &deployment);
    assert_ne!(before.services["web"].hash, other.services["web"].hash);
    let labels: HashMap<String, String> =
        serde_json::from_value(before.document["services"]["web"]["labels"].clone()).unwrap();
    assert_eq!(
        other.services["web"].difference(Some(&labels)),
        "changed: mount /g"
    );
}

#[test]
fn what_cannot_be_meant_is_refused_with_a_way_out() {
    let root = tempfile::tempdir().unwrap();
    let deployment = deployment(root.path());
    let mut missing = document(&deployment);
    missing["services"]["web"]["volumes"][0]["source"] = json!(deployment.directory.join("data"));
    assert!(refusal(missing, &deployment).contains("LONGSHORE_DATA"));
    let mut escaping = document(&deployment);
    escaping["services"]["web"]["volumes"][0]["source"] =
        json!(deployment.state.join("state.json"));
    assert!(refusal(escaping, &deployment).contains("leaves the release"));
    let mut other = document(&deployment);
    other["services"]["web"]["image"] = json!("r.example/web:2");
    assert!(refusal(other, &deployment).contains("pinned"));
    let mut unpinned = document(&deployment);
    unpinned["services"]["db"] = json!({"image": "r.example/db:1"});
    assert!(refusal(unpinned, &deployment).contains("not pinned"));
}

#[test]
fn data_of_the_target_is_made_and_left_writable() {
    let root = tempfile::tempdir().unwrap();
    let deployment = deployment(root.path());
    let mut with_data = document(&deployment);
    let data = deployment.data.join("files");
    with_data["services"]["web"]["volumes"][0]["source"] = json!(data);
    let model = rewrite(with_data, &deployment);
    assert!(data.is_dir());
    assert_eq!(
        model.document["services"]["web"]["volumes"][0].get("read_only"),
        None
    );
}

#[test]
fn content_that_no_kept_release_uses_is_removed() {
    let root = tempfile::tempdir().unwrap();
    let deployment = deployment(root.path());
    rewrite(document(&deployment), &deployment)
        .keep(&deployment)
        .unwrap();
    let count = || {
        std::fs::read_dir(deployment.state.join("engine/content"))
            .unwrap()
            .count()
    };
    assert_eq!(count(), 1);
    content::clean(&deployment.state, &[&deployment.digest]).unwrap();
    assert_eq!(count(), 1);
    content::clean(&deployment.state, &[]).unwrap();
    assert_eq!(count(), 0);
}

#[test]
fn versions_of_the_plugin() {
    for good in ["2.8.0", "v2.26.1-4", "2.30.1", "5.0.2", "dev"] {
        assert!(check_version(good).is_ok(), "{good}");
    }
    for bad in ["1.29.2", "v2.7.0", "2.30.0"] {
        assert!(check_version(bad).is_err(), "{bad}");
    }
}

#[test]
fn secrets_do_not_show() {
    let root = tempfile::tempdir().unwrap();
    let deployment = deployment(root.path());
    let model = rewrite(document(&deployment), &deployment);
    assert_eq!(
        model.redact("token very-secret is wrong"),
        "token *** is wrong"
    );
    let secrets = ["abcd".to_owned(), "abcdef".to_owned(), "x".to_owned()];
    assert_eq!(redact("abcdef abcd x", secrets.iter()), "*** *** x");
}
