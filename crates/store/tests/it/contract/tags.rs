//! What every engine must do with tags, and with the evidence that hangs on what they stand for.

use std::collections::BTreeSet;

use bytes::Bytes;
use oci::{Descriptor, Digest, Manifest};
use store::{Error, Expected, Store, TagWrite};

use crate::engine::{
    actor, content, described, image, index, name, push_blob, push_image, put, put_of, tag,
};

pub(super) async fn tags_have_one_door(store: &Store) {
    let repository = name("team/tags");
    let one = push_image(store, &repository, 50, &["prod"]).await;
    let two = push_image(store, &repository, 51, &[]).await;
    let (first, second) = (described(&one).digest, described(&two).digest);
    let write = |expected, may_create, may_overwrite| TagWrite {
        tag: tag("prod"),
        expected,
        may_create,
        may_overwrite,
    };
    let attempt = |write: TagWrite| {
        let mut put = put_of(&repository, &two, &[]);
        put.tags = vec![write];
        store.put_manifest(put)
    };
    let refused = attempt(write(Expected::Absent, true, true)).await;
    assert!(
        matches!(refused, Err(Error::Precondition { actual: Some(actual), .. }) if actual == first)
    );
    let refused = attempt(write(Expected::Digest(vec![second.clone()]), true, true)).await;
    assert!(matches!(refused, Err(Error::Precondition { .. })));
    let refused = attempt(write(Expected::Any, true, false)).await;
    assert!(matches!(refused, Err(Error::TagImmutable { .. })));
    let mut new = write(Expected::Any, false, true);
    new.tag = tag("new");
    assert!(matches!(
        attempt(new).await,
        Err(Error::TagCreateDenied { .. })
    ));
    let state = store.tag(&repository, &tag("prod")).await.unwrap().unwrap();
    assert_eq!((&state.digest, state.generation), (&first, 1));

    attempt(write(Expected::Digest(vec![first.clone()]), false, true))
        .await
        .unwrap();
    // To the same digest no right is needed, and nothing happens.
    let same = attempt(write(Expected::Any, false, false)).await.unwrap();
    assert_eq!(same.event, 0);
    let delete = |expected| store.delete_tag(&repository, &TAG_PROD, expected, &ACTOR);
    let refused = delete(Expected::Digest(vec![first.clone()])).await;
    assert!(matches!(refused, Err(Error::Precondition { .. })));
    delete(Expected::Any).await.unwrap();
    assert!(matches!(
        delete(Expected::Any).await,
        Err(Error::ManifestUnknown(_))
    ));
    attempt(write(Expected::Absent, true, false)).await.unwrap();
    let history = store
        .tag_history(&repository, &tag("prod"), None, 10)
        .await
        .unwrap();
    let moves: Vec<_> = history
        .iter()
        .map(|m| (m.generation, m.digest.clone()))
        .collect();
    assert_eq!(
        moves,
        [
            (4, Some(second.clone())),
            (3, None),
            (2, Some(second)),
            (1, Some(first))
        ]
    );
    let page = store
        .tag_history(&repository, &tag("prod"), Some(3), 1)
        .await
        .unwrap();
    assert_eq!(page[0].generation, 2);
}

static TAG_PROD: std::sync::LazyLock<oci::Tag> = std::sync::LazyLock::new(|| tag("prod"));
static ACTOR: std::sync::LazyLock<store::Actor> = std::sync::LazyLock::new(actor);

pub(super) async fn evidence_is_an_edge_of_its_subject(store: &Store) {
    let repository = name("team/evidence");
    let subject = push_image(store, &repository, 60, &["v1"]).await;
    let subject_digest = described(&subject).digest;
    let signature = format!("sha256-{}.sig", subject_digest.hex());
    let config = push_blob(store, &repository, &content(61, 10)).await;
    let a = push_blob(store, &repository, &content(62, 10)).await;
    let b = push_blob(store, &repository, &content(63, 10)).await;
    let push_only = |view: &Manifest| {
        let mut put = put_of(&repository, view, &[]);
        put.tags = vec![TagWrite {
            tag: tag(&signature),
            expected: Expected::Any,
            may_create: false,
            may_overwrite: false,
        }];
        store.put_manifest(put)
    };
    push_only(&image(&config, std::slice::from_ref(&a)))
        .await
        .unwrap();
    push_only(&image(&config, &[a.clone(), b.clone()]))
        .await
        .unwrap();
    // Smaller than before: one signature would be gone.
    let refused = push_only(&image(&config, &[b])).await;
    assert!(matches!(refused, Err(Error::TagImmutable { .. })));
    let listed = store
        .referrers(&repository, &subject_digest, None, None, 10)
        .await
        .unwrap();
    assert!(
        listed.is_empty(),
        "evidence tags are edges, not listed referrers"
    );
    store
        .delete_manifest(&repository, &subject_digest, &actor())
        .await
        .unwrap();
}

pub(super) async fn referrers_are_listed(store: &Store) {
    let repository = name("team/referrers");
    let subject = described(&push_image(store, &repository, 70, &[]).await);
    let config = push_blob(store, &repository, &Bytes::from_static(b"{}")).await;
    let mut made = Vec::new();
    for number in 0..5_u8 {
        let mut view = image(&config, &[]);
        view.subject = Some(subject.clone());
        view.artifact_type = Some(format!("application/vnd.example.{}", number % 2));
        view.annotations
            .insert("number".to_owned(), number.to_string());
        let outcome = put(store, &repository, &view, &[]).await.unwrap();
        assert_eq!(outcome.subject.as_ref(), Some(&subject.digest));
        made.push(view);
    }
    // A manifest that only a tag-schema index names, pushed by an older client.
    let mut plain = image(&config, &[]);
    plain
        .annotations
        .insert("number".to_owned(), "old".to_owned());
    put(store, &repository, &plain, &[]).await.unwrap();
    let mut entry = described(&plain);
    entry.artifact_type = Some("application/vnd.example.old".to_owned());
    let schema = format!("sha256-{}", subject.digest.hex());
    put(
        store,
        &repository,
        &index(&[described(&made[0]), entry]),
        &[&schema],
    )
    .await
    .unwrap();

    let all = store
        .referrers(&repository, &subject.digest, None, None, 100)
        .await
        .unwrap();
    let digests: BTreeSet<_> = all.iter().map(|r| r.descriptor.digest.clone()).collect();
    let wanted: BTreeSet<_> = made
        .iter()
        .chain([&plain])
        .map(|v| described(v).digest)
        .collect();
    assert_eq!(digests, wanted);
    let first = all
        .iter()
        .find(|r| r.descriptor.digest == described(&made[0]).digest)
        .unwrap();
    assert_eq!(
        first.descriptor.annotations["number"], "0",
        "the index must not hide what the manifest says"
    );
    let filtered = store
        .referrers(
            &repository,
            &subject.digest,
            Some("application/vnd.example.1"),
            None,
            100,
        )
        .await
        .unwrap();
    assert_eq!(filtered.len(), 2);
    let mut paged = Vec::new();
    let mut after = None;
    loop {
        let page = store
            .referrers(&repository, &subject.digest, None, after, 2)
            .await
            .unwrap();
        let Some(last) = page.last() else { break };
        after = Some(last.cursor);
        paged.extend(page.into_iter().map(|r| r.descriptor.digest));
    }
    assert_eq!(
        paged,
        all.iter()
            .map(|r| r.descriptor.digest.clone())
            .collect::<Vec<_>>()
    );

    // Pages end by bytes too: one at least, and never more than fit.
    let lengths: Vec<_> = all
        .iter()
        .map(|referrer| serde_json::to_string(&referrer.descriptor).unwrap().len())
        .collect();
    for (bytes, wanted) in [
        (1, 1),
        (lengths[0] + lengths[1] - 1, 1),
        (lengths[0] + lengths[1], 2),
        (lengths.iter().sum(), all.len()),
    ] {
        let (page, more) = store
            .referrers_page(&repository, &subject.digest, None, None, 100, bytes)
            .await
            .unwrap();
        assert_eq!((page.len(), more), (wanted, wanted < all.len()), "{bytes}");
    }
    let (page, more) = store
        .referrers_page(&repository, &subject.digest, None, None, all.len(), 1 << 20)
        .await
        .unwrap();
    assert_eq!((page.len(), more), (all.len(), false));

    let digest = described(&made[1]).digest;
    store
        .delete_manifest(&repository, &digest, &actor())
        .await
        .unwrap();
    let left = store
        .referrers(&repository, &subject.digest, None, None, 100)
        .await
        .unwrap();
    assert_eq!(left.len(), 5);

    // A subject that is not there is accepted and linked.
    let mut early = image(&config, &[]);
    early.subject = Some(Descriptor::of(oci::media_type::OCI_MANIFEST, b"later"));
    put(store, &repository, &early, &[]).await.unwrap();
    let listed = store
        .referrers(&repository, &Digest::sha256(b"later"), None, None, 10)
        .await
        .unwrap();
    assert_eq!(listed.len(), 1);
}
