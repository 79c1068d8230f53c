use bytes::Bytes;
use client::Repository;
use oci::evidence::EvidenceSource;
use oci::reference::TagOrDigest;
use oci::{Descriptor, Digest, Manifest, media_type};
use serde_json::Value;

use crate::fake::{Fake, answer};
use crate::support::repository;

fn manifest(kind: &str, layer: &[u8], subject: Option<&Descriptor>) -> (Descriptor, Bytes) {
    let body = Manifest {
        schema_version: 2,
        media_type: media_type::OCI_MANIFEST.to_owned(),
        artifact_type: Some(kind.to_owned()),
        config: Some(Descriptor::empty()),
        layers: Some(vec![Descriptor::of("x/y", layer)]),
        subject: subject.cloned(),
        ..Manifest::default()
    }
    .to_bytes();
    (Descriptor::of(media_type::OCI_MANIFEST, &body), body.into())
}

async fn push(repository: &Repository, (descriptor, body): (Descriptor, Bytes)) -> Descriptor {
    let by_digest = TagOrDigest::Digest(descriptor.digest.clone());
    repository
        .put_manifest(&by_digest, media_type::OCI_MANIFEST, body)
        .await
        .unwrap();
    descriptor
}

fn digests(found: &[Descriptor]) -> Vec<Digest> {
    let mut all: Vec<Digest> = found.iter().map(|found| found.digest.clone()).collect();
    all.sort();
    all
}

fn sorted<const N: usize>(mut all: [Digest; N]) -> [Digest; N] {
    all.sort();
    all
}

#[tokio::test]
async fn the_api_has_pages_and_may_not_filter() {
    let fake = Fake::start().await;
    let repository = repository(&fake, "a");
    let subject = push(&repository, manifest("t/image", b"", None)).await;
    let one = push(&repository, manifest("t/one", b"1", Some(&subject))).await;
    let two = push(&repository, manifest("t/two", b"2", Some(&subject))).await;
    let all = repository.referrers(&subject.digest, None).await.unwrap();
    assert_eq!(
        digests(&all),
        sorted([one.digest.clone(), two.digest.clone()])
    );
    let some = repository
        .referrers(&subject.digest, Some("t/two"))
        .await
        .unwrap();
    assert_eq!(digests(&some), [two.digest]);
    assert!(
        fake.asked(
            "PUT",
            &format!("/manifests/sha256-{}", subject.digest.hex())
        )
        .is_empty(),
        "the registry keeps the list"
    );
    assert!(
        repository
            .referrers(&one.digest, None)
            .await
            .unwrap()
            .is_empty()
    );
}

#[tokio::test]
async fn without_the_api_the_index_is_kept_by_us() {
    let fake = Fake::start().await;
    fake.state().referrers_api = false;
    let repository = repository(&fake, "a");
    let subject = push(&repository, manifest("t/image", b"", None)).await;
    assert!(
        repository
            .referrers(&subject.digest, None)
            .await
            .unwrap()
            .is_empty()
    );
    let referrers = [b"1", b"2", b"3"].map(|layer| manifest("t/one", layer, Some(&subject)));
    let expected = sorted([0, 1, 2].map(|at| referrers[at].0.digest.clone()));
    let [one, two, three] = referrers;
    tokio::join!(
        push(&repository, one.clone()),
        push(&repository, two),
        push(&repository, three)
    );
    let found = repository
        .referrers(&subject.digest, Some("t/another"))
        .await
        .unwrap();
    assert_eq!(digests(&found), expected, "not filtered, none lost");
    assert_eq!(found[0].artifact_type.as_deref(), Some("t/one"));

    // The same again changes nothing.
    let tag = format!("sha256-{}", subject.digest.hex());
    let before = fake.manifest("a", &tag).unwrap();
    push(&repository, one.clone()).await;
    assert_eq!(fake.manifest("a", &tag).unwrap(), before);

    repository
        .delete_manifest(&TagOrDigest::Digest(one.0.digest.clone()))
        .await
        .unwrap();
    let found = repository.referrers(&subject.digest, None).await.unwrap();
    assert_eq!(found.len(), 2);
    assert!(!digests(&found).contains(&one.0.digest));
}

#[tokio::test]
async fn an_entry_that_another_writer_removed_is_written_again() {
    let fake = Fake::start().await;
    fake.state().referrers_api = false;
    let repository = repository(&fake, "a");
    let subject = push(&repository, manifest("t/image", b"", None)).await;
    let tag = format!("sha256-{}", subject.digest.hex());
    let stranger = Descriptor::of("x/y", b"stranger");
    let mut raced = false;
    let index_path = format!("/v2/a/manifests/{tag}");
    let theirs = Manifest {
        schema_version: 2,
        media_type: media_type::OCI_INDEX.to_owned(),
        manifests: Some(vec![stranger.clone()]),
        ..Manifest::default()
    }
    .to_bytes();
    fake.hook(move |asked, state| {
        if asked.method != "PUT" || asked.path != index_path || raced {
            return None;
        }
        raced = true;
        // Theirs, read before ours was written, comes right after it.
        let answer = state.handle(asked);
        let tag = index_path.rsplit('/').next().unwrap().to_owned();
        let kept = (
            media_type::OCI_INDEX.to_owned(),
            Bytes::from(theirs.clone()),
        );
        state.manifests.get_mut("a").unwrap().insert(tag, kept);
        Some(answer)
    });
    let ours = push(&repository, manifest("t/one", b"1", Some(&subject))).await;
    let found = repository.referrers(&subject.digest, None).await.unwrap();
    assert_eq!(digests(&found), sorted([ours.digest, stranger.digest]));
}

#[tokio::test]
async fn an_answer_that_is_no_index_means_no_api() {
    let fake = Fake::start().await;
    let repository = repository(&fake, "a");
    let subject = push(&repository, manifest("t/image", b"", None)).await;
    for status in [200, 400, 405] {
        fake.hook(move |asked, _| {
            asked
                .path
                .contains("/referrers/")
                .then(|| answer(status, &[("content-type", "text/html")], "<html>"))
        });
        assert!(
            repository
                .referrers(&subject.digest, None)
                .await
                .unwrap()
                .is_empty()
        );
    }
    fake.hook(|asked, _| {
        asked
            .path
            .contains("/referrers/")
            .then(|| answer(403, &[], ""))
    });
    assert!(
        repository.referrers(&subject.digest, None).await.is_err(),
        "a refusal is not an empty list"
    );
}

#[tokio::test]
async fn evidence_is_complete_but_for_what_fails() {
    let fake = Fake::start().await;
    let repository = repository(&fake, "a");
    let subject = push(&repository, manifest("t/image", b"", None)).await;
    fake.blob("a", b"good");
    let good = push(&repository, manifest("t/good", b"good", Some(&subject))).await;
    // Its payload is missing.
    let hollow = push(&repository, manifest("t/hollow", b"hollow", Some(&subject))).await;
    // Its manifest is not what its digest says.
    let damaged = push(&repository, manifest("t/damaged", b"good", Some(&subject))).await;
    // A signature by tag.
    fake.blob("a", b"tagged");
    let tag = format!("sha256-{}.sig", subject.digest.hex());
    let (tagged, body) = manifest("t/tagged", b"tagged", None);
    repository
        .put_manifest(
            &TagOrDigest::Tag(tag.parse().unwrap()),
            media_type::OCI_MANIFEST,
            body,
        )
        .await
        .unwrap();
    // Listed, but it refers to something else.
    let (alien, alien_body) = manifest("t/alien", b"good", Some(&good));
    push(&repository, (alien.clone(), alien_body)).await;
    let wrong = damaged.digest.clone();
    let listed = serde_json::to_value(&alien).unwrap();
    fake.hook(move |asked, state| {
        if asked.path.ends_with(&wrong.to_string()) && asked.path.contains("/manifests/") {
            return Some(answer(
                200,
                &[("content-type", media_type::OCI_MANIFEST)],
                "{}",
            ));
        }
        if asked.path.contains("/referrers/") && asked.query.is_empty() {
            let answer_parts = state.handle(asked);
            let link = answer_parts.headers()["link"].to_str().unwrap().to_owned();
            let index =
                serde_json::json!({ "schemaVersion": 2, "manifests": [listed, Value::Null] });
            // The first page holds the alien instead of what belongs there, which comes on the next.
            let link = link.replace("page=1", "page=0");
            return Some(answer(
                200,
                &[("content-type", media_type::OCI_INDEX), ("link", &link)],
                &index.to_string(),
            ));
        }
        None
    });
    let mut evidence = repository.evidence(&subject.digest).await.unwrap();
    evidence.sort_by_key(|piece| piece.descriptor.artifact_type.clone());
    let told: Vec<_> = evidence
        .iter()
        .map(|piece| {
            (
                piece.descriptor.digest.clone(),
                piece.source.clone(),
                piece.layers.len(),
            )
        })
        .collect();
    let referrer = || EvidenceSource::Referrer(subject.digest.clone());
    assert_eq!(
        told,
        [
            (good.digest, referrer(), 1),
            (hollow.digest, referrer(), 0),
            (tagged.digest, EvidenceSource::Tag(tag), 1),
        ]
    );
    assert_eq!(evidence[0].layers[0].content, b"good");
}

#[tokio::test]
async fn evidence_that_cannot_be_had_now_is_not_none() {
    let fake = Fake::start().await;
    let repository = repository(&fake, "a");
    let subject = push(&repository, manifest("t/image", b"", None)).await;
    assert!(
        repository
            .evidence(&subject.digest)
            .await
            .unwrap()
            .is_empty()
    );
    fake.blob("a", b"good");
    let good = push(&repository, manifest("t/good", b"good", Some(&subject))).await;
    let path = format!("/v2/a/manifests/{}", good.digest);
    fake.hook(move |asked, _| (asked.path == path).then(|| answer(503, &[], "")));
    assert!(
        repository
            .evidence(&subject.digest)
            .await
            .unwrap_err()
            .is_transient()
    );
}
