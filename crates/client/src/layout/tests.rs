use proptest::prelude::*;

use super::*;

fn tag(text: &str) -> Tag {
    text.parse().unwrap()
}

fn artifact(name: &str, subject: Option<&Descriptor>) -> (Descriptor, Vec<u8>) {
    let body = Manifest {
        schema_version: 2,
        media_type: media_type::OCI_MANIFEST.to_owned(),
        artifact_type: Some(format!("test/{name}")),
        config: Some(Descriptor::empty()),
        layers: Some(vec![Descriptor::empty()]),
        subject: subject.cloned(),
        ..Manifest::default()
    }
    .to_bytes();
    (Descriptor::of(media_type::OCI_MANIFEST, &body), body)
}

#[tokio::test]
async fn tags_move_and_content_stays() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path().join("new/layout");
    let layout = Layout::create(&root).await.unwrap();
    let (one, body_one) = artifact("one", None);
    let (two, body_two) = artifact("two", None);
    layout.put(&one.digest, &body_one).await.unwrap();
    layout.put(&two.digest, &body_two).await.unwrap();
    layout.list(&one, Some(&tag("v1"))).await.unwrap();
    assert_eq!(layout.resolve(None).await.unwrap(), one.digest);
    layout.list(&one, Some(&tag("latest"))).await.unwrap();
    layout.list(&two, Some(&tag("latest"))).await.unwrap();
    layout.list(&two, Some(&tag("latest"))).await.unwrap();
    assert_eq!(layout.tags().await.unwrap(), ["v1", "latest"]);
    assert_eq!(layout.resolve(Some(&tag("v1"))).await.unwrap(), one.digest);
    assert_eq!(
        layout.resolve(Some(&tag("latest"))).await.unwrap(),
        two.digest
    );
    assert!(
        layout
            .resolve(None)
            .await
            .unwrap_err()
            .to_string()
            .contains("`v1`, `latest`")
    );
    assert!(matches!(
        layout.resolve(Some(&tag("x"))).await,
        Err(Error::NotFound(_))
    ));
    assert!(layout.untag(&tag("v1")).await.unwrap());
    assert!(!layout.untag(&tag("v1")).await.unwrap());
    let again = Layout::open(&root).await.unwrap();
    assert_eq!(again.entries().await.unwrap().len(), 2);
    assert_eq!(
        again.manifest(&one.digest).await.unwrap().unwrap().body,
        body_one
    );
    assert_eq!(
        again
            .manifest(&Digest::sha256(b""))
            .await
            .unwrap()
            .map(|m| m.body),
        None
    );
    let left: Vec<_> = fs::read_dir(&root)
        .unwrap()
        .map(|e| e.unwrap().file_name())
        .collect();
    assert_eq!(left.len(), 3, "{left:?}");
}

#[tokio::test]
async fn referrers_are_found_by_subject_and_by_the_tag_schema() {
    let directory = tempfile::tempdir().unwrap();
    let layout = Layout::create(directory.path()).await.unwrap();
    let (image, body) = artifact("image", None);
    layout.put(&image.digest, &body).await.unwrap();
    layout.list(&image, Some(&tag("v1"))).await.unwrap();
    let (signature, body) = artifact("signature", Some(&image));
    layout.put(&signature.digest, &body).await.unwrap();
    layout.list(&signature, None).await.unwrap();
    let other = Descriptor::of("x/y", b"other");
    let schema = Manifest {
        schema_version: 2,
        media_type: media_type::OCI_INDEX.to_owned(),
        manifests: Some(vec![other.clone(), signature.clone()]),
        ..Manifest::default()
    }
    .to_bytes();
    let index = Descriptor::of(media_type::OCI_INDEX, &schema);
    layout.put(&index.digest, &schema).await.unwrap();
    layout
        .list(
            &index,
            Some(&tag(&format!("sha256-{}", image.digest.hex()))),
        )
        .await
        .unwrap();
    let found = layout.referrers(&image.digest).await.unwrap();
    let digests: Vec<_> = found.iter().map(|d| d.digest.clone()).collect();
    assert_eq!(digests, [signature.digest, other.digest]);
    assert_eq!(found[0].artifact_type.as_deref(), Some("test/signature"));
    // Only the image itself is meant when nothing is named.
    assert_eq!(layout.resolve(None).await.unwrap(), image.digest);
}

#[tokio::test]
async fn refuses_what_is_no_layout_and_what_was_changed() {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("letter.txt"), "x").unwrap();
    let error = Layout::create(directory.path())
        .await
        .unwrap_err()
        .to_string();
    assert!(error.contains("holds other files"), "{error}");
    assert!(Layout::open(directory.path()).await.is_err());
    fs::write(
        directory.path().join("oci-layout"),
        r#"{"imageLayoutVersion":"2.0.0"}"#,
    )
    .unwrap();
    let error = Layout::open(directory.path())
        .await
        .unwrap_err()
        .to_string();
    assert!(error.contains("`2.0.0`"), "{error}");

    let directory = tempfile::tempdir().unwrap();
    let layout = Layout::create(directory.path()).await.unwrap();
    let (one, body) = artifact("one", None);
    layout.put(&one.digest, &body).await.unwrap();
    fs::write(layout.blob_path(&one.digest), "{}").unwrap();
    assert!(matches!(
        layout.manifest(&one.digest).await,
        Err(Error::DigestMismatch { .. })
    ));
    assert!(matches!(
        layout.put(&one.digest, b"x").await,
        Err(Error::DigestMismatch { .. })
    ));
}

#[tokio::test]
async fn a_file_given_up_leaves_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let target = directory.path().join("file");
    let mut file = Durable::create(&target).await.unwrap();
    file.write(b"half").await.unwrap();
    drop(file);
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    Durable::write_all(&target, b"whole").await.unwrap();
    assert_eq!(fs::read(&target).unwrap(), b"whole");
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
}

#[test]
fn unknown_fields_of_entries_stay() {
    let (one, _) = artifact("one", None);
    let mut entry = serde_json::to_value(&one).unwrap();
    entry["x-own"] = json!(1);
    entry["annotations"] = json!({ REF_NAME: "v1", "keep": "this" });
    let mut entries = vec![entry];
    let (two, _) = artifact("two", None);
    list(&mut entries, &two, Some(&tag("v1")));
    assert_eq!(entries.len(), 2);
    assert_eq!(entries[0]["x-own"], 1);
    assert_eq!(entries[0]["annotations"], json!({ "keep": "this" }));
}

proptest! {
    /// After any moves, each tag stands for what it was last set to, once.
    #[test]
    fn the_last_move_counts(moves in proptest::collection::vec((0_u8..4, 0_u8..3), 0..20)) {
        let mut entries = Vec::new();
        let mut expected = std::collections::BTreeMap::new();
        for (content, name) in moves {
            let descriptor = Descriptor::of("x", &[content]);
            let name = format!("t{name}");
            list(&mut entries, &descriptor, Some(&tag(&name)));
            expected.insert(name, descriptor.digest.to_string());
        }
        let mut found: Vec<(String, String)> = entries
            .iter()
            .filter_map(|entry| Some((
                entry["annotations"][REF_NAME].as_str()?.to_owned(),
                entry["digest"].as_str()?.to_owned(),
            )))
            .collect();
        found.sort();
        prop_assert_eq!(found, expected.into_iter().collect::<Vec<_>>());
    }
}
