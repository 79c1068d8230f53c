//! What the collector keeps and what it takes, on both engines.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use oci::{Algorithm, Descriptor, Digest, Manifest, RepositoryName};
use store::{
    Error, EventKind, Expected, ExpectedPins, GcOptions, Kind, Options, Pin, Reason, Statistics,
    Store, Timestamp,
};

use crate::engine::{
    actor, assert_sound, by_digest, content, described, image, index, name, push_blob, push_image,
    put, put_of, tag,
};

/// Options under which everything goes as soon as its lease is over.
pub(crate) fn options() -> Options {
    Options {
        allow_sparse: true,
        gc: GcOptions {
            rate: 1_000_000,
            read_grace: Duration::ZERO,
            ..GcOptions::default()
        },
        ..Options::default()
    }
}

/// Everything below, on one engine.
pub(crate) async fn keeps_the_contract(store: &Store) {
    tags_and_leases_keep(store).await;
    a_tag_among_many_of_evidence_keeps(store).await;
    damaged_blobs_go_too(store).await;
    indexes_keep_their_children(store).await;
    subjects_keep_their_referrers(store).await;
    cycles_of_subjects_go(store).await;
    evidence_goes_with_its_subject(store).await;
    referrers_wait_for_a_subject_that_never_came(store).await;
    what_is_shared_stays(store).await;
    absent_content_keeps_what_comes(store).await;
    repositories_go_in_steps(store).await;
    pins_keep(store).await;
    reasons_are_told(store).await;
    a_dry_run_tells_what_the_run_does(store).await;
    nothing_is_left(store).await;
}

/// A bit more than a lease.
const LEASE: Duration = Duration::from_hours(25);

async fn lease_over(store: &Store) {
    store.advance_clock(LEASE);
    store.maintain_once().await.unwrap();
    assert_sound(store).await;
}

async fn there(store: &Store, repository: &RepositoryName, view: &Manifest) -> bool {
    store
        .manifest(repository, &by_digest(view))
        .await
        .unwrap()
        .is_some()
}

async fn holds(store: &Store, repository: &RepositoryName, blob: &Descriptor) -> bool {
    store
        .stat_blob(repository, &blob.digest, false)
        .await
        .unwrap()
        .is_some()
}

async fn untag(store: &Store, repository: &RepositoryName, text: &str) {
    store
        .delete_tag(repository, &tag(text), Expected::Any, &actor())
        .await
        .unwrap();
}

fn layers(view: &Manifest) -> &[Descriptor] {
    view.layers.as_deref().unwrap_or_default()
}

/// Whoever may push can make any number of tags that are no roots, and names sort before any other.
async fn a_tag_among_many_of_evidence_keeps(store: &Store) {
    let repository = name("gc/evidence-tags");
    let tags: Vec<_> = (0..250)
        .map(|number| format!("sha256-{number:064x}.sig"))
        .collect();
    let mut names: Vec<_> = tags.iter().map(String::as_str).collect();
    names.push("sha256-fff");
    let view = push_image(store, &repository, 40, &names).await;
    lease_over(store).await;
    lease_over(store).await;
    assert!(there(store, &repository, &view).await);
    untag(store, &repository, "sha256-fff").await;
    // What they are evidence of never came, and is waited for.
    store.advance_clock(GcOptions::default().orphan_referrers);
    lease_over(store).await;
    assert!(!there(store, &repository, &view).await);
}

/// A blob that was found damaged after the collector left it alone goes with the last manifest that names it.
async fn damaged_blobs_go_too(store: &Store) {
    let repository = name("gc/damaged");
    let view = push_image(store, &repository, 41, &["v1"]).await;
    lease_over(store).await;
    let layer = layers(&view)[0].clone();
    store.mark_suspect(&layer.digest).await.unwrap();
    untag(store, &repository, "v1").await;
    for _ in 0..3 {
        lease_over(store).await;
    }
    assert!(!there(store, &repository, &view).await);
    assert_eq!(store.suspect_count().await.unwrap(), 0);
}

async fn tags_and_leases_keep(store: &Store) {
    let repository = name("gc/tags");
    let stray = push_blob(store, &repository, &content(1, 50_000)).await;
    let view = push_image(store, &repository, 2, &["v1", "latest"]).await;
    let untagged = push_image(store, &repository, 3, &[]).await;
    store.maintain_once().await.unwrap();
    assert!(holds(store, &repository, &stray).await && there(store, &repository, &untagged).await);
    lease_over(store).await;
    assert!(
        !holds(store, &repository, &stray).await,
        "its lease is over"
    );
    assert!(!there(store, &repository, &untagged).await);
    assert!(there(store, &repository, &view).await);
    for layer in layers(&view) {
        assert!(holds(store, &repository, layer).await);
    }
    // What an untagged manifest named is kept for a lease after it.
    assert!(holds(store, &repository, &layers(&untagged)[1]).await);
    store.seal().await.unwrap();
    let event = store.event_bounds().await.unwrap().newest;
    let events = store.events_after(event - 1, 10).await.unwrap();
    assert_eq!(events[0].kind, EventKind::ManifestDeleted);
    assert_eq!(events[0].digest, described(&untagged).digest);
    assert_eq!(events[0].actor, "system:collector");
    lease_over(store).await;
    assert!(!holds(store, &repository, &layers(&untagged)[1]).await);

    untag(store, &repository, "v1").await;
    lease_over(store).await;
    assert!(
        there(store, &repository, &view).await,
        "another tag is left"
    );
    // A tag that moves away and back, with a run of the collector between.
    let other = push_image(store, &repository, 4, &["latest"]).await;
    store.maintain_once().await.unwrap();
    put(store, &repository, &view, &["latest"]).await.unwrap();
    lease_over(store).await;
    lease_over(store).await;
    assert!(there(store, &repository, &view).await);
    assert!(!there(store, &repository, &other).await);
    untag(store, &repository, "latest").await;
    store.maintain_once().await.unwrap();
    assert!(there(store, &repository, &view).await, "kept by its lease");
    // A HEAD of somebody who may push keeps it for longer.
    store.advance_clock(Duration::from_hours(13));
    assert!(
        store
            .renew_manifest(&repository, &described(&view).digest)
            .await
            .unwrap()
    );
    store.advance_clock(Duration::from_hours(13));
    store.maintain_once().await.unwrap();
    assert!(there(store, &repository, &view).await);
    lease_over(store).await;
    assert!(!there(store, &repository, &view).await);
    assert!(holds(store, &repository, &layers(&view)[0]).await);
    lease_over(store).await;
    assert!(!holds(store, &repository, &layers(&view)[0]).await);
    let gone = store
        .renew_manifest(&repository, &described(&view).digest)
        .await;
    assert!(!gone.unwrap());
}

async fn indexes_keep_their_children(store: &Store) {
    let repository = name("gc/index");
    let child = push_image(store, &repository, 10, &[]).await;
    let parent = index(&[described(&child)]);
    put(store, &repository, &parent, &["multi"]).await.unwrap();
    lease_over(store).await;
    assert!(there(store, &repository, &child).await);
    untag(store, &repository, "multi").await;
    lease_over(store).await;
    assert!(!there(store, &repository, &parent).await);
    assert!(there(store, &repository, &child).await, "kept by its lease");
    lease_over(store).await;
    assert!(!there(store, &repository, &child).await);
    lease_over(store).await;
}

fn referring(config: &Descriptor, subject: &Descriptor, number: u8) -> Manifest {
    let mut view = image(config, &[]);
    view.subject = Some(subject.clone());
    view.artifact_type = Some(format!("application/vnd.example.{number}"));
    view
}

async fn subjects_keep_their_referrers(store: &Store) {
    let repository = name("gc/subject");
    let config = push_blob(store, &repository, &Bytes::from_static(b"{}")).await;
    let subject = push_image(store, &repository, 20, &["v1"]).await;
    let signature = referring(&config, &described(&subject), 1);
    put(store, &repository, &signature, &[]).await.unwrap();
    // A signature of the signature.
    let second = referring(&config, &described(&signature), 2);
    put(store, &repository, &second, &[]).await.unwrap();
    for _ in 0..9 {
        lease_over(store).await;
    }
    assert!(
        there(store, &repository, &signature).await && there(store, &repository, &second).await
    );
    untag(store, &repository, "v1").await;
    lease_over(store).await;
    assert!(!there(store, &repository, &subject).await);
    assert!(
        there(store, &repository, &signature).await,
        "kept by its lease"
    );
    // The subject comes back: what was attached to it is attached again.
    push_image(store, &repository, 20, &["v1"]).await;
    for _ in 0..3 {
        lease_over(store).await;
    }
    assert!(
        there(store, &repository, &signature).await && there(store, &repository, &second).await
    );
    untag(store, &repository, "v1").await;
    lease_over(store).await;
    lease_over(store).await;
    assert!(!there(store, &repository, &signature).await);
    lease_over(store).await;
    assert!(!there(store, &repository, &second).await);
    lease_over(store).await;
}

async fn cycles_of_subjects_go(store: &Store) {
    let repository = name("gc/cycle");
    // An index whose subject is its own child: each keeps the other, and neither is rooted.
    let child = push_image(store, &repository, 30, &["v1"]).await;
    let mut parent = index(&[described(&child)]);
    parent.subject = Some(described(&child));
    put(store, &repository, &parent, &[]).await.unwrap();
    lease_over(store).await;
    lease_over(store).await;
    assert!(there(store, &repository, &parent).await && there(store, &repository, &child).await);
    untag(store, &repository, "v1").await;
    for _ in 0..3 {
        lease_over(store).await;
    }
    assert!(!there(store, &repository, &parent).await);
    assert!(!there(store, &repository, &child).await);
    // Two manifests that are each other's evidence, and one that is its own.
    let one = push_image(store, &repository, 31, &[]).await;
    let two = push_image(store, &repository, 32, &[]).await;
    let own = push_image(store, &repository, 33, &[]).await;
    for (view, subject) in [(&one, &two), (&two, &one), (&own, &own)] {
        let signature = format!("sha256-{}.sig", described(subject).digest.hex());
        put(store, &repository, view, &[&signature]).await.unwrap();
    }
    for _ in 0..3 {
        lease_over(store).await;
    }
    for view in [&one, &two, &own] {
        assert!(!there(store, &repository, view).await);
    }
    assert!(
        store.tags(&repository, None, 10).await.is_err(),
        "the tags went with them"
    );
    lease_over(store).await;
}

async fn evidence_goes_with_its_subject(store: &Store) {
    let repository = name("gc/evidence");
    let subject = push_image(store, &repository, 40, &["v1"]).await;
    let hex = described(&subject).digest.hex();
    let signature = format!("sha256-{hex}.sig");
    let evidence = push_image(store, &repository, 41, &[&signature]).await;
    let listed = push_image(store, &repository, 42, &[]).await;
    let schema = index(&[described(&listed)]);
    put(store, &repository, &schema, &[&format!("sha256-{hex}")])
        .await
        .unwrap();
    for _ in 0..9 {
        lease_over(store).await;
    }
    for view in [&subject, &evidence, &schema, &listed] {
        assert!(there(store, &repository, view).await);
    }
    untag(store, &repository, "v1").await;
    lease_over(store).await;
    assert!(!there(store, &repository, &subject).await);
    assert!(
        there(store, &repository, &evidence).await,
        "kept by its lease"
    );
    lease_over(store).await;
    for view in [&evidence, &schema] {
        assert!(!there(store, &repository, view).await);
    }
    assert!(store.tags(&repository, None, 10).await.unwrap().is_empty());
    let history = store
        .tag_history(&repository, &tag(&signature), None, 10)
        .await
        .unwrap();
    assert_eq!(history[0].digest, None);
    assert_eq!(history[0].actor, "system:collector");
    lease_over(store).await;
    assert!(!there(store, &repository, &listed).await);
    lease_over(store).await;

    // Evidence whose tag was deleted is no evidence any more, while its subject stays.
    let subject = push_image(store, &repository, 43, &["v1"]).await;
    let signature = format!("sha256-{}.sig", described(&subject).digest.hex());
    let evidence = push_image(store, &repository, 44, &[&signature]).await;
    untag(store, &repository, &signature).await;
    lease_over(store).await;
    assert!(
        !there(store, &repository, &evidence).await && there(store, &repository, &subject).await
    );
    untag(store, &repository, "v1").await;
    lease_over(store).await;
    lease_over(store).await;
    // A tag that only begins like evidence is a tag.
    let plain = push_image(store, &repository, 45, &["sha256-of-what"]).await;
    lease_over(store).await;
    assert!(there(store, &repository, &plain).await);
    untag(store, &repository, "sha256-of-what").await;
    lease_over(store).await;
    lease_over(store).await;
}

async fn referrers_wait_for_a_subject_that_never_came(store: &Store) {
    let repository = name("gc/orphan");
    let config = push_blob(store, &repository, &Bytes::from_static(b"{}")).await;
    let subject = image(&config, std::slice::from_ref(&config));
    let orphan = referring(&config, &described(&subject), 1);
    put(store, &repository, &orphan, &[]).await.unwrap();
    // What is below it waits with it.
    let child = push_image(store, &repository, 50, &[]).await;
    let mut index = index(&[described(&child)]);
    index.subject = Some(described(&subject));
    put(store, &repository, &index, &[]).await.unwrap();
    store.advance_clock(Duration::from_hours(6 * 24));
    store.maintain_once().await.unwrap();
    for view in [&orphan, &index, &child] {
        assert!(there(store, &repository, view).await);
    }
    // A HEAD of evidence whose subject is missing renews it: the subject may be given up soon.
    let evidence = format!("sha256-{}.sig", described(&subject).digest.hex());
    let signature = push_image(store, &repository, 51, &[&evidence]).await;
    store.advance_clock(Duration::from_hours(7 * 24 - 1));
    let digest = described(&signature).digest;
    assert!(store.renew_manifest(&repository, &digest).await.unwrap());
    lease_over(store).await;
    store.advance_clock(Duration::from_hours(24 * 7));
    for _ in 0..3 {
        lease_over(store).await;
    }
    for view in [&orphan, &index, &child, &signature] {
        assert!(!there(store, &repository, view).await);
    }
}

async fn what_is_shared_stays(store: &Store) {
    let (from, into) = (name("gc/from"), name("elsewhere/into"));
    let bytes = content(60, 70_000);
    let blob = push_blob(store, &from, &bytes).await;
    put(store, &from, &image(&blob, &[]), &["v1"])
        .await
        .unwrap();
    store.advance_clock(Duration::from_hours(20));
    let sources = std::slice::from_ref(&from);
    assert!(
        store
            .mount_blob(&into, &blob.digest, sources, &actor())
            .await
            .unwrap()
    );
    store
        .delete_manifest(&from, &described(&image(&blob, &[])).digest, &actor())
        .await
        .unwrap();
    store
        .delete_blob(&from, &blob.digest, &actor())
        .await
        .unwrap();
    store.maintain_once().await.unwrap();
    assert!(!holds(store, &from, &blob).await && holds(store, &into, &blob).await);
    let read = crate::engine::read_blob(store, &into, &blob.digest).await;
    assert_eq!(read.unwrap(), bytes);
    lease_over(store).await;
    assert!(!holds(store, &into, &blob).await);
    // The same content comes back under a new key.
    push_blob(store, &into, &bytes).await;
    let read = crate::engine::read_blob(store, &into, &blob.digest).await;
    assert_eq!(read.unwrap(), bytes);
    lease_over(store).await;
    assert_eq!(store.namespace_usage("elsewhere").await.unwrap(), (0, 0));
}

async fn absent_content_keeps_what_comes(store: &Store) {
    let repository = name("gc/absent");
    let config = push_blob(store, &repository, &content(70, 10)).await;
    let bytes = content(71, 40_000);
    let foreign = Descriptor {
        urls: vec!["https://example.com/layer".to_owned()],
        ..Descriptor::of("application/octet-stream", &bytes)
    };
    let child = image(&config, std::slice::from_ref(&foreign));
    let parent = index(&[described(&child)]);
    // The index comes before its child, the image before its layer.
    put(store, &repository, &parent, &["sparse"]).await.unwrap();
    put(store, &repository, &child, &[]).await.unwrap();
    push_blob(store, &repository, &bytes).await;
    for _ in 0..2 {
        lease_over(store).await;
    }
    assert!(there(store, &repository, &child).await && holds(store, &repository, &foreign).await);
    untag(store, &repository, "sparse").await;
    for _ in 0..3 {
        lease_over(store).await;
    }
    assert!(!holds(store, &repository, &foreign).await);
}

/// Pins manifests of a repository, each for as many hours, and lets go of all others.
async fn pin(store: &Store, repository: &RepositoryName, wanted: &[(&Manifest, u64)]) {
    let now = store_now(store).await;
    let pins = wanted.iter().map(|(view, hours)| Pin {
        repository: repository.clone(),
        digest: described(view).digest,
        reason: "runs".to_owned(),
        expires: (*hours > 0).then(|| now.plus(Duration::from_hours(*hours))),
    });
    let outcome = store
        .set_pins(HOLDER, pins.collect(), ExpectedPins::Any, &actor())
        .await
        .unwrap();
    assert_eq!(outcome.held.len(), wanted.len());
}

const HOLDER: &str = "agent:host1";

/// The time of a store whose clock was moved: that of a tag that moves now.
async fn store_now(store: &Store) -> Timestamp {
    static MOVES: AtomicU64 = AtomicU64::new(1000);
    let repository = name("gc/clock");
    let seed = MOVES.fetch_add(1, Ordering::Relaxed);
    push_image(store, &repository, seed, &["now"]).await;
    let state = store.tag(&repository, &tag("now")).await.unwrap();
    state.unwrap().updated_at
}

async fn pins_keep(store: &Store) {
    let repository = name("gc/pins");
    let view = push_image(store, &repository, 80, &[]).await;
    let child = push_image(store, &repository, 81, &[]).await;
    let parent = index(&[described(&child)]);
    put(store, &repository, &parent, &[]).await.unwrap();
    pin(store, &repository, &[(&view, 0), (&parent, 50)]).await;
    lease_over(store).await;
    for view in [&view, &parent, &child] {
        assert!(there(store, &repository, view).await);
    }
    let refused = store.delete_repository(&repository, &actor()).await;
    assert!(
        matches!(&refused, Err(Error::Pinned { holders, .. }) if holders == &["agent:host1"]),
        "{refused:?}"
    );
    lease_over(store).await;
    lease_over(store).await;
    assert!(there(store, &repository, &view).await);
    assert!(!there(store, &repository, &parent).await, "its pin is over");
    pin(store, &repository, &[]).await;
    lease_over(store).await;
    assert!(!there(store, &repository, &view).await);
    assert!(!there(store, &repository, &child).await);
    lease_over(store).await;
}

async fn reasons_are_told(store: &Store) {
    let repository = name("gc/reasons");
    let child = push_image(store, &repository, 100, &[]).await;
    let parent = index(&[described(&child)]);
    put(store, &repository, &parent, &["v1"]).await.unwrap();
    let config = push_blob(store, &repository, &Bytes::from_static(b"{}")).await;
    let signature = referring(&config, &described(&child), 1);
    put(store, &repository, &signature, &[]).await.unwrap();
    let orphan = referring(&config, &Descriptor::of("text/plain", b"not yet"), 1);
    put(store, &repository, &orphan, &[]).await.unwrap();
    let kept = |view: &Manifest| {
        let digest = described(view).digest;
        let (store, repository) = (store.clone(), repository.clone());
        async move { store.kept(&repository, &digest).await.unwrap() }
    };
    let fresh = kept(&child).await.unwrap();
    assert!(matches!(
        &fresh.reasons[..],
        [Reason::Lease { .. }, Reason::Index { .. }]
    ));
    lease_over(store).await;
    pin(store, &repository, &[(&parent, 50)]).await;
    let above = kept(&parent).await.unwrap();
    let [
        Reason::Tag { tag: v1, by, .. },
        Reason::Pin {
            holder,
            reason,
            until: Some(_),
            ..
        },
    ] = &above.reasons[..]
    else {
        panic!("{above:?}");
    };
    assert_eq!((v1.as_str(), by.as_str()), ("v1", "user:alice"));
    assert_eq!((holder.as_str(), reason.as_str()), ("agent:host1", "runs"));
    assert_eq!(above.until, None);
    // From the signature to its subject, to the index that names it, to the tag.
    let chain = kept(&signature).await.unwrap();
    let [Reason::Subject { digest, because }] = &chain.reasons[..] else {
        panic!("{chain:?}");
    };
    assert_eq!(*digest, described(&child).digest);
    let [Reason::Index { digest, because }] = &because[..] else {
        panic!("{chain:?}");
    };
    assert_eq!(*digest, described(&parent).digest);
    assert_eq!(*because, above.reasons);
    let waiting = kept(&orphan).await.unwrap();
    assert!(
        matches!(&waiting.reasons[..], [Reason::Waits { until, .. }] if waiting.until == Some(*until))
    );
    assert!(
        store
            .kept(&repository, &Digest::sha256(b"x"))
            .await
            .unwrap()
            .is_none()
    );
    assert!(
        store
            .kept(&name("no/such"), &config.digest)
            .await
            .unwrap()
            .is_none()
    );
    untag(store, &repository, "v1").await;
    let ending = kept(&parent).await.unwrap();
    assert!(ending.until.is_some() && ending.reasons.len() == 2);
    // Nothing keeps it, and the collector has not come yet.
    pin(store, &repository, &[]).await;
    store.advance_clock(LEASE);
    let nothing = kept(&parent).await.unwrap();
    assert!(nothing.reasons.is_empty() && nothing.until.is_some());
    store
        .delete_repository(&repository, &actor())
        .await
        .unwrap();
    lease_over(store).await;
}

async fn a_dry_run_tells_what_the_run_does(store: &Store) {
    let repository = name("gc/dry");
    for seed in 110..114 {
        push_image(store, &repository, seed, &[]).await;
    }
    let kept = push_image(store, &repository, 114, &["v1"]).await;
    for seed in 120..124 {
        push_blob(store, &repository, &content(seed, 20_000)).await;
    }
    // A blob that another repository holds as well frees nothing.
    let shared = push_blob(store, &repository, &content(124, 20_000)).await;
    let other = name("gc/shares");
    push_blob(store, &other, &content(124, 20_000)).await;
    put(store, &other, &image(&shared, &[]), &["v1"])
        .await
        .unwrap();
    store.advance_clock(LEASE);
    let before = store.statistics().await.unwrap();
    let whole = store.collection_dry_run(None, 200).await.unwrap();
    assert_eq!(whole.next, None);
    // In pages it is the same.
    let (mut items, mut cursor) = (Vec::new(), None);
    loop {
        let page = store
            .collection_dry_run(cursor.as_deref(), 3)
            .await
            .unwrap();
        assert!(page.looked_at <= 3);
        items.extend(page.items);
        cursor = page.next;
        if cursor.is_none() {
            break;
        }
    }
    assert_eq!(items, whole.items);
    assert!(store.collection_dry_run(Some("?"), 3).await.is_err());
    let after = store.statistics().await.unwrap();
    assert_eq!(after.manifests, before.manifests, "nothing was done");

    let collected = |store: &Store| store.collection_totals().collected;
    let begin = collected(store);
    store.maintain_once().await.unwrap();
    for ((kind, number, bytes), (_, number_before, bytes_before)) in
        collected(store).into_iter().zip(begin)
    {
        let told: Vec<_> = whole
            .items
            .iter()
            .filter(|item| item.kind == kind)
            .collect();
        let told_bytes = |kind| {
            let of = whole.items.iter().filter(|item| item.kind == kind);
            of.map(|item| item.bytes).sum::<u64>()
        };
        match kind {
            // What a hold was the last one of is told with the hold.
            Kind::RepositoryBlob => assert_eq!(number - number_before, told.len() as u64),
            Kind::Blob => assert_eq!(
                bytes - bytes_before,
                told_bytes(Kind::RepositoryBlob) + told_bytes(Kind::Blob)
            ),
            _ => {
                assert_eq!(number - number_before, told.len() as u64, "{kind:?}");
                assert_eq!(bytes - bytes_before, told_bytes(kind), "{kind:?}");
            }
        }
    }
    assert_eq!(
        whole
            .items
            .iter()
            .filter(|item| item.kind == Kind::Manifest)
            .count(),
        4
    );
    assert!(whole.items.iter().any(|item| item.bytes == 20_000));
    for item in &whole.items {
        let digest = item.digest.as_ref().unwrap();
        assert!(store.kept(&repository, digest).await.unwrap().is_none());
    }
    assert!(there(store, &repository, &kept).await);
    for repository in ["gc/dry", "gc/shares", "gc/clock"] {
        store
            .delete_repository(&name(repository), &actor())
            .await
            .unwrap();
    }
    lease_over(store).await;
}

async fn repositories_go_in_steps(store: &Store) {
    let repository = name("gc/whole");
    let view = push_image(store, &repository, 90, &["v1"]).await;
    let parent = index(&[described(&view)]);
    let tags: Vec<String> = (0..1200).map(|number| format!("t{number}")).collect();
    let tags: Vec<&str> = tags.iter().map(String::as_str).collect();
    put(store, &repository, &parent, &tags).await.unwrap();
    let config = push_blob(store, &repository, &Bytes::from_static(b"{}")).await;
    let signature = referring(&config, &described(&view), 1);
    put(store, &repository, &signature, &[]).await.unwrap();
    let upload = store
        .start_upload(&repository, Algorithm::Sha256, &actor())
        .await
        .unwrap();
    let mut writer = store.claim_upload(&repository, &upload).await.unwrap();
    writer.write(content(91, 100_000)).await.unwrap();
    writer.record().await.unwrap();

    store.seal().await.unwrap();
    let event = store.event_bounds().await.unwrap().newest;
    store
        .delete_repository(&repository, &actor())
        .await
        .unwrap();
    store.seal().await.unwrap();
    let events = store.events_after(event, 10).await.unwrap();
    assert_eq!(events.len(), 1);
    assert_eq!(events[0].kind, EventKind::RepositoryDeleted);
    assert_eq!(events[0].repository, repository);
    // At once nothing of it is found, and the same name can begin again.
    assert!(!there(store, &repository, &view).await && !holds(store, &repository, &config).await);
    assert!(
        !store
            .repositories(None, 100)
            .await
            .unwrap()
            .contains(&repository)
    );
    assert!(store.tags(&repository, None, 10).await.is_err());
    let gone = store.delete_repository(&repository, &actor()).await;
    assert!(matches!(gone, Err(Error::RepositoryUnknown(_))));
    let ended = store.upload_offset(&repository, &upload).await;
    assert!(matches!(ended, Err(Error::UploadUnknown)));
    let holders = store
        .repositories_with_blob(&config.digest, 10)
        .await
        .unwrap();
    assert!(!holders.contains(&repository));
    let again = push_image(store, &repository, 90, &["v1"]).await;
    store.maintain_once().await.unwrap();
    store.advance_clock(Duration::from_secs(10));
    store.maintain_once().await.unwrap();
    assert_sound(store).await;
    assert!(there(store, &repository, &again).await);
    assert!(holds(store, &repository, &layers(&again)[1]).await);
    assert!(!there(store, &repository, &parent).await);
    let state = store.tag(&repository, &tag("v1")).await.unwrap().unwrap();
    assert_eq!(state.generation, 1, "it is another repository");
    let statistics = store.statistics().await.unwrap();
    assert_eq!((statistics.tags, statistics.uploads), (1, 0));
    store
        .delete_repository(&repository, &actor())
        .await
        .unwrap();
    store.maintain_once().await.unwrap();
}

async fn nothing_is_left(store: &Store) {
    // An upload that nobody ended, and content that nobody named.
    let repository = name("gc/rest");
    store
        .start_upload(&repository, Algorithm::Sha256, &actor())
        .await
        .unwrap();
    push_blob(store, &repository, &content(80, 30_000)).await;
    lease_over(store).await;
    let Statistics {
        blobs,
        blob_bytes,
        manifests,
        tags,
        uploads,
        pending_deletions,
        ..
    } = store.statistics().await.unwrap();
    assert_eq!(
        (
            blobs,
            blob_bytes,
            manifests,
            tags,
            uploads,
            pending_deletions
        ),
        (0, 0, 0, 0, 0, 0)
    );
    assert_eq!(store.namespace_usage("gc").await.unwrap(), (0, 0));
    assert!(store.repositories(None, 10).await.unwrap().is_empty());
    let lags = store.collection_lag().await.unwrap();
    assert!(lags.iter().all(|lag| lag.due == 0 && lag.oldest.is_none()));
    let status = store.collection_status().await.unwrap();
    assert!(
        status.queue.iter().all(|length| length.waiting == 0),
        "{status:#?}"
    );
    let missing = store.put_manifest(put_of(
        &repository,
        &image(&described(&Manifest::default()), &[]),
        &[],
    ));
    // Sparse content is allowed in this store, so only the digest is new.
    assert!(!matches!(missing.await, Err(Error::Database(_))));
    let digest = Digest::sha256(b"nothing");
    assert!(!store.renew_manifest(&repository, &digest).await.unwrap());
}
