use crate::harness::{EMPTY, INDEX, MANIFEST, Registry};

fn digests(reply: &crate::harness::Reply) -> Vec<String> {
    let json = reply.json();
    assert_eq!(json["schemaVersion"], 2);
    assert_eq!(json["mediaType"], INDEX);
    assert_eq!(reply.header("content-type"), INDEX);
    json["manifests"]
        .as_array()
        .unwrap()
        .iter()
        .map(|m| m["digest"].as_str().unwrap().to_owned())
        .collect()
}

#[tokio::test]
async fn nothing_refers() {
    let registry = Registry::open().await;
    let digest = oci::Digest::sha256(b"none");
    let reply = registry
        .get(&format!("/v2/a/referrers/{digest}"))
        .await
        .expect(200);
    assert!(digests(&reply).is_empty());
    assert_eq!(reply.header("oci-filters-applied"), "");
    registry
        .get("/v2/a/referrers/sha256:bad")
        .await
        .refused(400, "DIGEST_INVALID");
    registry
        .get("/v2/a/referrers/tag")
        .await
        .refused(400, "DIGEST_INVALID");
}

#[tokio::test]
async fn of_a_present_and_of_a_missing_subject() {
    let registry = Registry::open().await;
    let present = registry.image("a", "v1", "x").await;
    let missing = oci::Digest::sha256(b"missing").to_string();
    for subject in [present, missing] {
        let (one, reply) = registry
            .refer("a", &subject, "application/x-sbom", "1")
            .await;
        assert_eq!(
            reply.header("oci-subject"),
            subject,
            "the subject, not the manifest"
        );
        let (two, _) = registry
            .refer("a", &subject, "application/x-signature", "2")
            .await;
        let reply = registry
            .get(&format!("/v2/a/referrers/{subject}"))
            .await
            .expect(200);
        let mut found = digests(&reply);
        found.sort();
        let mut expected = vec![one.clone(), two];
        expected.sort();
        assert_eq!(found, expected);
        let reply = registry
            .get(&format!(
                "/v2/a/referrers/{subject}?artifactType=application/x-sbom"
            ))
            .await
            .expect(200);
        assert_eq!(digests(&reply), std::slice::from_ref(&one));
        assert_eq!(reply.header("oci-filters-applied"), "artifactType");
        let entry = &reply.json()["manifests"][0];
        assert_eq!(entry["artifactType"], "application/x-sbom");
        assert_eq!(entry["annotations"]["note"], "1");
        assert_eq!(entry["mediaType"], MANIFEST);
        assert!(entry["size"].as_u64().unwrap() > 100);
        let reply = registry
            .get(&format!(
                "/v2/a/referrers/{subject}?artifactType=application/x-none"
            ))
            .await
            .expect(200);
        assert!(digests(&reply).is_empty());
        assert_eq!(reply.header("oci-filters-applied"), "artifactType");
        // A referrer that is deleted is gone from the list at once.
        registry
            .delete(&format!("/v2/a/manifests/{one}"))
            .await
            .expect(202);
        assert_eq!(
            digests(&registry.get(&format!("/v2/a/referrers/{subject}")).await).len(),
            1
        );
        assert!(digests(&registry.get(&format!("/v2/b/referrers/{subject}")).await).is_empty());
    }
}

#[tokio::test]
async fn the_listed_artifact_type() {
    let registry = Registry::open().await;
    registry.blob("a", b"{}").await;
    let subject = oci::Digest::sha256(b"subject");
    let subject_json =
        format!(r#""subject":{{"mediaType":"{MANIFEST}","digest":"{subject}","size":2}}"#);
    let by_config = format!(
        r#"{{"schemaVersion":2,"mediaType":"{MANIFEST}","config":{{"mediaType":"application/x-config","digest":"{EMPTY}","size":2}},"layers":[],{subject_json}}}"#
    );
    let index =
        format!(r#"{{"schemaVersion":2,"mediaType":"{INDEX}","manifests":[],{subject_json}}}"#);
    let typed = format!(
        r#"{{"schemaVersion":2,"mediaType":"{INDEX}","artifactType":"application/x-index","manifests":[],{subject_json}}}"#
    );
    for (body, kind, listed) in [
        (
            by_config,
            MANIFEST,
            serde_json::json!("application/x-config"),
        ),
        (index, INDEX, serde_json::Value::Null),
        (typed, INDEX, serde_json::json!("application/x-index")),
    ] {
        let digest = oci::Digest::sha256(body.as_bytes()).to_string();
        registry
            .call(
                &format!("PUT /v2/a/manifests/{digest}"),
                &[("Content-Type", kind)],
                body.as_bytes(),
            )
            .await
            .expect(201);
        let reply = registry
            .get(&format!("/v2/a/referrers/{subject}"))
            .await
            .json();
        let entry = reply["manifests"]
            .as_array()
            .unwrap()
            .iter()
            .find(|m| m["digest"] == digest.as_str())
            .unwrap()
            .clone();
        assert_eq!(entry["artifactType"], listed);
    }
}

#[tokio::test]
async fn pages() {
    let registry = Registry::open().await;
    let subject = oci::Digest::sha256(b"subject").to_string();
    let mut expected = Vec::new();
    for n in 0..7 {
        let kind = if n % 2 == 0 {
            "application/x-even"
        } else {
            "application/x-odd"
        };
        expected.push(registry.refer("a", &subject, kind, &n.to_string()).await.0);
    }
    for (filter, count) in [("", 7), ("&artifactType=application/x-even", 4)] {
        let mut seen = Vec::new();
        let mut next = Some(format!("/v2/a/referrers/{subject}?n=2{filter}"));
        while let Some(path) = next {
            let reply = registry.get(&path).await.expect(200);
            seen.extend(digests(&reply));
            assert_eq!(
                reply.header("oci-filters-applied").is_empty(),
                filter.is_empty()
            );
            next = reply.next();
        }
        assert_eq!(seen.len(), count);
        let mut unique = seen.clone();
        unique.sort();
        unique.dedup();
        assert_eq!(unique.len(), count);
        assert!(seen.iter().all(|digest| expected.contains(digest)));
    }
}

#[tokio::test]
async fn annotations_that_fill_pages() {
    let registry = Registry::open().await;
    let subject = oci::Digest::sha256(b"subject").to_string();
    let note = "x".repeat(1_500_000);
    for n in 0..3 {
        registry
            .refer("a", &subject, "application/x", &format!("{n}{note}"))
            .await;
    }
    let first = registry
        .get(&format!("/v2/a/referrers/{subject}"))
        .await
        .expect(200);
    assert!(first.body.len() < 4 * 1024 * 1024);
    let mut count = digests(&first).len();
    let mut next = first.next();
    assert!(next.is_some());
    while let Some(path) = next {
        let reply = registry.get(&path).await.expect(200);
        count += digests(&reply).len();
        next = reply.next();
    }
    assert_eq!(count, 3);
}
