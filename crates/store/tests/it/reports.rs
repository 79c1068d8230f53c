//! Pins, attempts, quota, totals and pull statistics on every engine. Called by the contract, because a statement must have
//! run on both.

use std::time::Duration;

use oci::{Digest, RepositoryName};
use store::{
    AttemptFilter, AttemptRecord, Error, Expected, ExpectedPins, Options, Pin, ReportLimits, Store,
    Timestamp, UsageOrder,
};

use crate::engine::{
    actor, assert_sound, content, described, image, index, name, push_blob, push_image, put, tag,
};

pub(crate) async fn keep_the_contract(store: &Store) {
    pins_hold(store).await;
    pins_are_replaced_as_a_whole(store).await;
    pins_end(store).await;
    pins_of_a_user_have_an_end(store).await;
    attempts_are_kept_in_order(store).await;
    attempts_of_a_user_have_an_end(store).await;
    quotas_are_checked(store).await;
    totals_are_the_truth(store).await;
    shared_blobs_are_divided(store).await;
    pulls_are_counted(store).await;
}

/// Small enough to meet.
pub(crate) fn limits() -> ReportLimits {
    ReportLimits {
        holders: 2,
        pins: 3,
        targets: 2,
        bytes: 2200,
        target_bytes: 1000,
    }
}

async fn pins_of_a_user_have_an_end(store: &Store) {
    let repository = name("pins/many");
    let mut digests = Vec::new();
    for seed in 0..4 {
        let view = push_image(store, &repository, 7400 + seed, &[]).await;
        digests.push(described(&view).digest);
    }
    let set = async |holder: &str, pins: &[usize]| {
        let pins = pins
            .iter()
            .map(|at| pin(&repository, &digests[*at]))
            .collect();
        store
            .set_pins(holder, pins, ExpectedPins::Any, &actor())
            .await
    };
    set("host9/a", &[0, 1]).await.unwrap();
    set("host9", &[2]).await.unwrap();
    let refused = set("host9/b", &[]).await;
    assert!(
        matches!(&refused, Err(Error::ReportLimit { user, what, .. }) if user == "host9" && what.contains("holders"))
    );
    // What is refused leaves nothing; what others have does not count, also where its name only looks alike.
    assert!(store.pins("host9/b").await.unwrap().is_none());
    set("host9-b", &[0]).await.unwrap();
    let refused = set("host9", &[2, 3]).await;
    assert!(
        matches!(&refused, Err(Error::ReportLimit { what, .. }) if what.contains("pins")),
        "{refused:?}"
    );
    // At the limit a set may change and shrink.
    set("host9", &[3]).await.unwrap();
    set("host9/a", &[1]).await.unwrap();
    set("host9", &[2, 3]).await.unwrap();
    for holder in ["host9", "host9/a", "host9-b"] {
        store
            .remove_pins(holder, ExpectedPins::Any, &actor())
            .await
            .unwrap();
    }
}

async fn attempts_of_a_user_have_an_end(store: &Store) {
    let long = |previous: u8, own: u8| AttemptRecord {
        body: format!("{{\"n\":{own},\"x\":\"{}\"}}", "é".repeat(140)),
        ..record(previous, own, "note")
    };
    let add = async |holder: &str, target: &str, records: &[AttemptRecord]| {
        store
            .add_attempts(holder, target, records.to_vec(), "user:host8")
            .await
    };
    // About 300 bytes each: what lies wholly beyond the limit goes.
    let many: Vec<_> = (1..6).map(|n| long(n - 1, n)).collect();
    let outcome = add("host8", "web", &many).await.unwrap();
    assert_eq!((outcome.added, outcome.head.unwrap().sequence), (5, 5));
    let of = |holder: &str| AttemptFilter {
        holder: Some(holder.to_owned()),
        ..AttemptFilter::default()
    };
    let kept = store.attempts(&of("host8"), None, 10).await.unwrap();
    assert_eq!(
        kept.iter().map(|kept| kept.hash[0]).collect::<Vec<_>>(),
        [5, 4, 3, 2]
    );
    // What was cut off does not count any more.
    let outcome = add("host8/x", "db", &many[..3]).await.unwrap();
    assert_eq!(outcome.added, 3);
    let refused = add("host8/x", "db", &many[3..]).await;
    assert!(
        matches!(&refused, Err(Error::ReportLimit { user, what, .. }) if user == "host8" && what.contains("bytes")),
        "{refused:?}"
    );
    let refused = add("host8/y", "web", &[record(0, 1, "note")]).await;
    assert!(
        matches!(&refused, Err(Error::ReportLimit { what, .. }) if what.contains("2 targets")),
        "{refused:?}"
    );
    // Little goes on to a target that is there, and others are others.
    add("host8/x", "db", &[record(3, 7, "note")]).await.unwrap();
    for holder in ["host8-b", "host80", "host7"] {
        add(holder, "web", &[record(0, 1, "note")]).await.unwrap();
    }
    store.advance_clock(Duration::from_hours(24 * 401));
    store.maintain_once().await.unwrap();
}

fn pin(repository: &RepositoryName, digest: &Digest) -> Pin {
    Pin {
        repository: repository.clone(),
        digest: digest.clone(),
        reason: "runs".to_owned(),
        expires: None,
    }
}

async fn pins_hold(store: &Store) {
    let repository = name("pins/app");
    let view = push_image(store, &repository, 7000, &["v1"]).await;
    let child = described(&view);
    let parent = index(std::slice::from_ref(&child));
    put(store, &repository, &parent, &["all"]).await.unwrap();
    let parent = described(&parent).digest;
    let absent = Digest::sha256(b"not here");
    let outcome = store
        .set_pins(
            "host1/web",
            vec![
                pin(&repository, &parent),
                pin(&repository, &absent),
                pin(&name("pins/nobody"), &parent),
            ],
            ExpectedPins::Any,
            &actor(),
        )
        .await
        .unwrap();
    assert!(outcome.created);
    assert_eq!(outcome.held, [(repository.clone(), parent.clone())]);
    assert_eq!(
        outcome.missing,
        [
            (repository.clone(), absent),
            (name("pins/nobody"), parent.clone())
        ]
    );
    // The tag may go, what it pointed to stays; what the pinned index names stays too.
    store
        .delete_tag(&repository, &tag("all"), Expected::Any, &actor())
        .await
        .unwrap();
    match store.delete_manifest(&repository, &parent, &actor()).await {
        Err(Error::Pinned { digest, holders }) => {
            assert_eq!(digest, parent);
            assert_eq!(holders, ["host1/web"]);
        }
        other => panic!("{other:?}"),
    }
    let in_use = store
        .delete_manifest(&repository, &child.digest, &actor())
        .await;
    assert!(matches!(in_use, Err(Error::ManifestInUse(_))));
    let of = store.pins_of(&repository, &parent, None, 10).await.unwrap();
    assert_eq!(of.len(), 1);
    assert_eq!(of[0].holder, "host1/web");
    assert_eq!(of[0].created_by, actor().principal);
    assert!(
        store
            .remove_pins("host1/web", ExpectedPins::Any, &actor())
            .await
            .unwrap()
    );
    assert!(
        !store
            .remove_pins("host1/web", ExpectedPins::Any, &actor())
            .await
            .unwrap()
    );
    assert!(store.pins("host1/web").await.unwrap().is_none());
    store
        .delete_manifest(&repository, &parent, &actor())
        .await
        .unwrap();
}

async fn pins_are_replaced_as_a_whole(store: &Store) {
    let repository = name("pins/set");
    let mut digests = Vec::new();
    for seed in 0..3 {
        let view = push_image(store, &repository, 7100 + seed, &[]).await;
        digests.push(described(&view).digest);
    }
    let set = async |pins: &[usize], expected| {
        let pins = pins
            .iter()
            .map(|at| pin(&repository, &digests[*at]))
            .collect();
        store.set_pins("host2", pins, expected, &actor()).await
    };
    let first = set(&[0, 1], ExpectedPins::Absent).await.unwrap();
    let again = set(&[1, 0, 1], ExpectedPins::Any).await.unwrap();
    assert_eq!(again.version, first.version, "the same set changes nothing");
    assert!(!again.created && again.held.len() == 2);
    assert!(matches!(
        set(&[2], ExpectedPins::Absent).await,
        Err(Error::PinsChanged { .. })
    ));
    let second = set(&[1, 2], ExpectedPins::Version(vec![first.version]))
        .await
        .unwrap();
    match set(&[0], ExpectedPins::Version(vec![first.version])).await {
        Err(Error::PinsChanged { version, .. }) => assert_eq!(version, Some(second.version)),
        other => panic!("{other:?}"),
    }
    let kept = store.pins("host2").await.unwrap().unwrap();
    let mut pinned: Vec<_> = kept
        .pins
        .iter()
        .map(|held| held.pin.digest.clone())
        .collect();
    let mut wanted = vec![digests[1].clone(), digests[2].clone()];
    pinned.sort_unstable();
    wanted.sort_unstable();
    assert_eq!(pinned, wanted);
    // What is no longer pinned may be deleted, and its reason to stay was a lease.
    store
        .delete_manifest(&repository, &digests[0], &actor())
        .await
        .unwrap();
    // A changed reason is a change.
    let mut changed = pin(&repository, &digests[1]);
    "last good".clone_into(&mut changed.reason);
    let third = store
        .set_pins("host2", vec![changed], ExpectedPins::Present, &actor())
        .await
        .unwrap();
    assert_ne!(third.version, second.version);
    let holders = store.pin_holders(Some("host1"), 10).await.unwrap();
    let alone = store.find_pin_holder("host2").await.unwrap();
    assert_eq!(
        holders.iter().find(|held| held.holder == "host2"),
        alone.as_ref()
    );
    let host2 = holders.iter().find(|held| held.holder == "host2").unwrap();
    assert_eq!((host2.pins, host2.version), (1, third.version));

    // Two replacements at once leave one of the two sets, whole.
    for _ in 0..8 {
        let (a, b) = tokio::join!(set(&[1], ExpectedPins::Any), set(&[2], ExpectedPins::Any));
        let (a, b) = (a.unwrap(), b.unwrap());
        let kept = store.pins("host2").await.unwrap().unwrap();
        assert_eq!(kept.pins.len(), 1, "{a:?} {b:?}");
    }
    // An empty set is a set.
    set(&[], ExpectedPins::Any).await.unwrap();
    assert!(store.pins("host2").await.unwrap().unwrap().pins.is_empty());
}

async fn pins_end(store: &Store) {
    let repository = name("pins/ending");
    let view = push_image(store, &repository, 7200, &[]).await;
    let other = push_image(store, &repository, 7201, &[]).await;
    let (digest, other) = (described(&view).digest, described(&other).digest);
    let now = store.pins("host2").await.unwrap().unwrap().updated_at;
    let ending = |digest: &Digest, seconds| Pin {
        expires: Some(now.plus(Duration::from_secs(seconds))),
        ..pin(&repository, digest)
    };
    let past = Pin {
        expires: Some(Timestamp(1)),
        ..pin(&repository, &other)
    };
    let outcome = store
        .set_pins(
            "host3",
            vec![ending(&digest, 3600), past],
            ExpectedPins::Any,
            &actor(),
        )
        .await
        .unwrap();
    assert_eq!(outcome.expired, [(repository.clone(), other.clone())]);
    let pinned = store.delete_manifest(&repository, &digest, &actor()).await;
    assert!(matches!(pinned, Err(Error::Pinned { .. })));
    store.advance_clock(Duration::from_secs(3601));
    // Its time is over, whether or not somebody has swept yet.
    store
        .delete_manifest(&repository, &digest, &actor())
        .await
        .unwrap();
    store
        .set_pins(
            "host3",
            vec![ending(&other, 7200)],
            ExpectedPins::Any,
            &actor(),
        )
        .await
        .unwrap();
    store.advance_clock(Duration::from_secs(3601));
    store.maintain_once().await.unwrap();
    let set = store.pins("host3").await.unwrap().unwrap();
    assert!(set.pins.is_empty() && set.version != outcome.version);
}

fn record(previous: u8, own: u8, kind: &str) -> AttemptRecord {
    AttemptRecord {
        previous: [previous; 32],
        hash: [own; 32],
        kind: kind.to_owned(),
        attempt: Some(1),
        repository: (kind == "attempt").then(|| name("shop/web")),
        digest: (kind == "attempt").then(|| Digest::sha256(b"release")),
        outcome: (kind == "outcome").then(|| "good".to_owned()),
        body: format!("{{\"n\":{own}}}"),
    }
}

async fn attempts_are_kept_in_order(store: &Store) {
    let add = async |records: &[AttemptRecord]| {
        store
            .add_attempts("host1", "web", records.to_vec(), "user:host1")
            .await
            .unwrap()
    };
    assert_eq!(add(&[]).await.head, None);
    let first = [
        record(0, 1, "attempt"),
        record(1, 2, "step"),
        record(2, 3, "outcome"),
    ];
    let outcome = add(&first[..2]).await;
    assert_eq!((outcome.added, outcome.repeated, outcome.seams), (2, 0, 0));
    let outcome = add(&first).await;
    assert_eq!((outcome.added, outcome.repeated, outcome.seams), (1, 2, 0));
    let head = outcome.head.unwrap();
    assert_eq!((head.sequence, head.hash), (3, [3; 32]));
    assert_eq!(add(&[]).await.head, Some(head));
    // Records between are not known; then one that follows an older one; then a ledger that begins anew.
    assert_eq!(add(&[record(8, 9, "note")]).await.seams, 1);
    assert_eq!(add(&[record(2, 10, "note")]).await.seams, 1);
    assert_eq!(add(&[record(0, 11, "note")]).await.seams, 0);
    let all = store
        .attempts(&AttemptFilter::default(), None, 10)
        .await
        .unwrap();
    let told: Vec<_> = all
        .iter()
        .map(|kept| (kept.sequence, kept.hash[0], kept.link.as_str()))
        .collect();
    assert_eq!(
        told,
        [
            (6, 11, "start"),
            (5, 10, "fork"),
            (4, 9, "gap"),
            (3, 3, "next"),
            (2, 2, "next"),
            (1, 1, "start")
        ]
    );
    let filter = |holder: &str, target: &str, kind: &str, digest: Option<&[u8]>| {
        let part = |text: &str| (!text.is_empty()).then(|| text.to_owned());
        AttemptFilter {
            holder: part(holder),
            target: part(target),
            kind: part(kind),
            digest: digest.map(Digest::sha256),
        }
    };
    // What a record does not say itself is known from the beginning of its attempt.
    let outcomes = store
        .attempts(&filter("", "", "outcome", Some(b"release")), None, 10)
        .await
        .unwrap();
    assert_eq!(outcomes.len(), 1);
    assert_eq!(outcomes[0].repository, Some(name("shop/web")));
    let cursor = Some(all[2].cursor);
    let page = store
        .attempts(&filter("host1", "web", "", None), cursor, 2)
        .await
        .unwrap();
    assert_eq!(page.iter().map(|a| a.hash[0]).collect::<Vec<_>>(), [3, 2]);
    for nothing in [
        filter("host1", "db", "", None),
        filter("host2", "", "", None),
        filter("", "", "", Some(b"other")),
        filter("host2", "", "", Some(b"release")),
    ] {
        let found = store.attempts(&nothing, None, 10).await.unwrap();
        assert!(found.is_empty(), "{nothing:?}");
    }

    // Two replicas that get the same batch at once keep it once.
    let batch: Vec<_> = (1..40)
        .map(|n| record(n - 1, n, if n == 1 { "attempt" } else { "step" }))
        .collect();
    let both = tokio::join!(
        store.add_attempts("host4", "web", batch.clone(), "user:host4"),
        store.add_attempts("host4", "web", batch, "user:host4")
    );
    let (a, b) = (both.0.unwrap(), both.1.unwrap());
    assert_eq!((a.added + b.added, a.repeated + b.repeated), (39, 39));
    let kept = store
        .attempts(&filter("host4", "", "", None), None, 100)
        .await
        .unwrap();
    assert!(
        kept.iter()
            .rev()
            .map(|kept| (kept.sequence, kept.hash[0]))
            .eq((1..40_u8).map(|n| (u64::from(n), n)))
    );

    // What is old goes, the last one of each target stays.
    store.advance_clock(Duration::from_hours(24 * 401));
    store.maintain_once().await.unwrap();
    let left = store
        .attempts(&AttemptFilter::default(), None, 100)
        .await
        .unwrap();
    assert_eq!(
        left.iter().map(|kept| kept.hash[0]).collect::<Vec<_>>(),
        [39, 11]
    );
    assert_eq!(add(&[record(11, 12, "note")]).await.seams, 0);
}

async fn quotas_are_checked(store: &Store) {
    let (one, two) = (name("limited/one"), name("limited/two"));
    store
        .set_quota("limited", Some(10_000), &actor())
        .await
        .unwrap();
    let config = push_blob(store, &one, &content(7300, 6000)).await;
    store.admit(&one).await.unwrap();
    // The same content again adds nothing.
    push_blob(store, &one, &content(7300, 6000)).await;
    let over = |result: Result<_, Error>| match result {
        Err(Error::QuotaExceeded {
            namespace,
            quota,
            used,
        }) => {
            assert_eq!((namespace.as_str(), quota, used), ("limited", 10_000, 6000));
        }
        other => panic!("{other:?}"),
    };
    // Folded or not, all of it counts, in every repository of the namespace: a mount of 6000 bytes too.
    for _ in 0..2 {
        let sources = [one.clone()];
        over(
            store
                .mount_blob(&two, &config.digest, &sources, &actor())
                .await
                .map(drop),
        );
        let bytes = content(7301, 4001);
        let digest = Digest::sha256(&bytes);
        let mut writer = store.put_blob(&two, &digest, &actor()).await.unwrap();
        writer.write(bytes).await.unwrap();
        over(writer.commit(&digest, &actor()).await.map(drop));
        store.maintain_once().await.unwrap();
    }
    // A manifest counts as well.
    store
        .set_quota("limited", Some(6010), &actor())
        .await
        .unwrap();
    let refused = put(store, &one, &image(&config, &[]), &["v1"]).await;
    assert!(matches!(refused, Err(Error::QuotaExceeded { .. })));
    assert!(store.tag(&one, &tag("v1")).await.unwrap().is_none());
    store
        .set_quota("limited", Some(6000), &actor())
        .await
        .unwrap();
    assert!(matches!(
        store.admit(&one).await,
        Err(Error::QuotaExceeded { .. })
    ));
    let usage = store.usage_of_namespace("limited").await.unwrap().unwrap();
    assert_eq!(
        (usage.bytes, usage.objects, usage.quota),
        (6000, 1, Some(6000))
    );
    // Reading and deleting always go.
    assert!(
        store
            .open_blob(&one, &config.digest)
            .await
            .unwrap()
            .is_some()
    );
    store
        .delete_blob(&one, &config.digest, &actor())
        .await
        .unwrap();
    push_blob(store, &two, &content(7302, 5000)).await;
    store.set_quota("limited", None, &actor()).await.unwrap();
    push_blob(store, &two, &content(7303, 50_000)).await;
    assert_eq!(store.usage_of_namespace("nobody").await.unwrap(), None);
}

async fn totals_are_the_truth(store: &Store) {
    let (small, large) = (name("totals/small"), name("totals/large"));
    let blob = push_blob(store, &small, &content(7400, 1000)).await;
    push_blob(store, &large, &content(7400, 1000)).await;
    push_blob(store, &large, &content(7401, 5000)).await;
    let view = image(&blob, &[]);
    put(store, &small, &view, &["v1"]).await.unwrap();
    let manifest = view.to_bytes().len() as u64;
    store.maintain_once().await.unwrap();
    let sizes = async |namespace, order| {
        store
            .usage_of_repositories(namespace, &order, 10)
            .await
            .unwrap()
            .into_iter()
            .map(|usage| (usage.name.to_string(), usage.bytes, usage.objects))
            .collect::<Vec<_>>()
    };
    let (s, l) = (
        ("totals/small".to_owned(), 1000 + manifest, 2),
        ("totals/large".to_owned(), 6000, 2),
    );
    let by_name = || UsageOrder::Name(String::new());
    assert_eq!(
        sizes(Some("totals"), by_name()).await,
        [l.clone(), s.clone()]
    );
    assert_eq!(
        sizes(Some("totals"), UsageOrder::Size(None)).await,
        [l.clone(), s.clone()]
    );
    let first = store
        .usage_of_repositories(Some("totals"), &UsageOrder::Size(None), 1)
        .await
        .unwrap();
    let next = UsageOrder::Size(Some((first[0].bytes, first[0].position.to_string())));
    assert_eq!(sizes(Some("totals"), next).await, std::slice::from_ref(&s));
    let all = sizes(None, UsageOrder::Size(None)).await;
    assert!(all.is_sorted_by(|a, b| a.1 >= b.1) && all.len() > 3);
    let after = sizes(None, UsageOrder::Name("totals/large".to_owned())).await;
    assert_eq!(after[0], s);

    for order in [
        UsageOrder::Name("totala".to_owned()),
        UsageOrder::Size(Some((u64::MAX, String::new()))),
    ] {
        let namespaces = store.usage_of_namespaces(&order, 100).await.unwrap();
        let totals = namespaces.iter().find(|usage| usage.name == "totals");
        assert_eq!(totals.unwrap().bytes, 7000 + manifest, "{order:?}");
    }
    let sum: u64 = store
        .usage_of_namespaces(&by_name(), 1000)
        .await
        .unwrap()
        .iter()
        .map(|usage| usage.bytes)
        .sum();
    let statistics = store.statistics().await.unwrap();
    assert_eq!(statistics.logical_bytes, sum);
    assert!(statistics.waiting_blobs > 0 && statistics.waiting_bytes > 0);
    assert!(
        statistics.stored_bytes() - statistics.waiting_bytes < sum,
        "something is shared: {statistics:?}"
    );
    let recent = store.recent_statistics().await.unwrap();
    assert_eq!(recent.logical_bytes, sum);
    assert_sound(store).await;

    // A total that is off is found, and corrected by counting.
    store.falsify_usage(&small).await.unwrap();
    let report = store.verify_open().await.unwrap();
    assert!(
        report.problems.len() == 1 && report.problems[0].contains("`totals/small`"),
        "{:#?}",
        report.problems
    );
    push_blob(store, &small, &content(7402, 1)).await;
    store.recount_usage().await.unwrap();
    assert_sound(store).await;
    store.maintain_once().await.unwrap();
    assert_sound(store).await;
    let expected = ("totals/small".to_owned(), 1001 + manifest, 3);
    assert_eq!(sizes(Some("totals"), by_name()).await, [l, expected]);
    // An empty repository has no total.
    let digest = Digest::sha256(&content(7401, 5000));
    store.delete_blob(&large, &digest, &actor()).await.unwrap();
    store
        .delete_blob(&large, &blob.digest, &actor())
        .await
        .unwrap();
    store.maintain_once().await.unwrap();
    assert_eq!(sizes(Some("totals"), by_name()).await.len(), 1);
}

/// What repositories have of the disk adds up to what is stored and wanted.
async fn shared_blobs_are_divided(store: &Store) {
    for repository in ["share/a", "share/b", "shared/c"] {
        push_blob(store, &name(repository), &content(7450, 1001)).await;
    }
    for repository in ["share/a", "share/b"] {
        push_blob(store, &name(repository), &content(7451, 500)).await;
    }
    let own = push_blob(store, &name("share/a"), &content(7452, 70)).await;
    let view = image(&own, &[]);
    put(store, &name("share/a"), &view, &["v1"]).await.unwrap();
    let manifest = view.to_bytes().len() as u64;
    store.maintain_once().await.unwrap();
    store.count_sharing().await.unwrap();
    assert!(store.refresh_sharing().await.is_some());
    let by_name = || UsageOrder::Name(String::new());
    let repositories = store
        .usage_of_repositories(None, &by_name(), 1000)
        .await
        .unwrap();
    let of = |wanted: &str| {
        let usage = repositories
            .iter()
            .find(|usage| usage.name.as_str() == wanted)
            .unwrap();
        let stored = usage.stored.unwrap();
        (usage.bytes, stored.bytes, stored.exclusive)
    };
    let alone = 70 + manifest;
    let (a, b, c) = (of("share/a"), of("share/b"), of("shared/c"));
    assert_eq!(a, (1501 + alone, 334 + 250 + alone, alone));
    assert_eq!(b, (1501, 334 + 250, 0));
    assert_eq!(c, (1001, 333, 0));
    for order in [by_name(), UsageOrder::Size(None)] {
        let namespaces = store.usage_of_namespaces(&order, 1000).await.unwrap();
        let share = namespaces.iter().find(|usage| usage.name == "share");
        let share = share.unwrap();
        assert_eq!(share.bytes, a.0 + b.0);
        let stored = share.stored.unwrap();
        assert_eq!((stored.bytes, stored.exclusive), (a.1 + b.1, 500 + alone));
        let one = store.usage_of_namespace("share").await.unwrap();
        assert_eq!(one.as_ref(), Some(share));
        let parts: u64 = namespaces
            .iter()
            .map(|usage| usage.stored.unwrap().bytes)
            .sum();
        let statistics = store.statistics().await.unwrap();
        let wanted = statistics.stored_bytes() - statistics.waiting_bytes;
        assert_eq!(parts, wanted, "{order:?}");
    }
}

async fn pulls_are_counted(store: &Store) {
    let repository = name("pulled/app");
    let view = push_image(store, &repository, 7500, &["v1"]).await;
    let digest = described(&view).digest;
    assert_eq!(store.pulls_of(&repository, &digest).await.unwrap(), None);
    for who in ["user:a", "user:b", "user:a"] {
        store.note_pull(&repository, &digest, who);
    }
    store.note_pull(&name("pulled/gone"), &digest, "user:a");
    let known = store.pulls_of(&repository, &digest).await.unwrap().unwrap();
    assert_eq!(known.pulls, 3);
    store.flush_pulls().await.unwrap();
    assert_eq!(
        store.pulls_of(&repository, &digest).await.unwrap().unwrap(),
        known
    );
    store.advance_clock(Duration::from_hours(2));
    store.note_pull(&repository, &digest, "user:a");
    let later = store.pulls_of(&repository, &digest).await.unwrap().unwrap();
    assert_eq!(later.pulls, 4);
    assert_eq!(later.last, known.last.plus(Duration::from_hours(2)));
    store.maintain_once().await.unwrap();
    let all = store
        .pulls_of_repository(&repository, None, 10)
        .await
        .unwrap();
    assert_eq!(all, [later]);
    let after = store
        .pulls_of_repository(&repository, Some(&digest), 10)
        .await
        .unwrap();
    assert!(after.is_empty());
    store.advance_clock(Duration::from_hours(24 * 91));
    store.maintain_once().await.unwrap();
    assert_eq!(store.pulls_of(&repository, &digest).await.unwrap(), None);
    assert_eq!(store.dropped_pulls(), 0);
}

/// What was counted is written when the store is closed, and a default quota holds where there is no other.
#[tokio::test]
async fn a_closed_store_has_lost_no_pull_and_a_default_quota_holds() {
    let directory = tempfile::tempdir().unwrap();
    let options = || Options {
        quota: Some(100),
        ..Options::default()
    };
    let store = Store::open(directory.path(), options()).await.unwrap();
    let repository = name("small/app");
    push_blob(&store, &repository, &content(1, 100)).await;
    let refused = store.admit(&repository).await;
    assert!(matches!(
        refused,
        Err(Error::QuotaExceeded { quota: 100, .. })
    ));
    store
        .set_quota("small", Some(5000), &actor())
        .await
        .unwrap();
    let view = push_image_of(&store, &repository).await;
    store.note_pull(&repository, &view, "user:a");
    store.close().await.unwrap();
    let store = Store::open(directory.path(), options()).await.unwrap();
    let pulls = store.pulls_of(&repository, &view).await.unwrap().unwrap();
    assert_eq!(pulls.pulls, 1);
    let statistics = store.recent_statistics().await.unwrap();
    assert_eq!((statistics.blobs, statistics.manifests), (1, 1));
}

async fn push_image_of(store: &Store, repository: &RepositoryName) -> Digest {
    let config = push_blob(store, repository, &content(1, 100)).await;
    let view = image(&config, &[]);
    put(store, repository, &view, &["v1"]).await.unwrap();
    described(&view).digest
}
