//! Every transaction takes its locks in one order, so PostgreSQL never has to break a deadlock.

use std::sync::Arc;
use std::time::Duration;

use oci::{Descriptor, Manifest};
use store::{Error, Expected, ExpectedPins, GcOptions, Options, Pin, Store, Timestamp};

use crate::cluster::same_place;
use crate::engine::{
    actor, assert_sound, content, described, image, index, name, push_blob, put, tag,
};
use crate::postgres::{Server, connect};

const WRITERS: u64 = 8;
const ROUNDS: u64 = 60;
/// So short that the collector finds something between two pushes.
const LEASE: Duration = Duration::from_millis(100);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_deadlock_comes_of_moves_deletions_pins_and_collection() {
    // A deadlock is only counted once it was waited for.
    let server = Server::start_with(|_| vec!["deadlock_timeout=30ms".to_owned()]).await;
    let url = server.database("longshore").await;
    let options = Options {
        lease: LEASE,
        gc: GcOptions {
            rate: 100_000,
            read_grace: Duration::ZERO,
            orphan_referrers: Duration::ZERO,
            ..GcOptions::default()
        },
        ..Options::default()
    };
    let directory = tempfile::tempdir().unwrap();
    let mut stores = Vec::new();
    for replica in ["one", "two"] {
        let path = directory.path().join(replica);
        if replica == "two" {
            same_place(&directory.path().join("one"), &path);
        }
        let store = Store::open_on_postgres(&path, &url, options.clone()).await;
        stores.push(store.unwrap());
    }
    let collectors: Vec<_> = stores
        .iter()
        .map(|store| {
            let store = store.clone();
            tokio::spawn(async move { store.maintain().await })
        })
        .collect();
    let world = Arc::new(World::new(&stores[0]).await);
    let writers: Vec<_> = (0..WRITERS)
        .zip(stores.iter().cycle())
        .map(|(writer, store)| {
            let world = Arc::clone(&world);
            tokio::spawn(write(store.clone(), world, writer))
        })
        .collect();
    for writer in writers {
        writer.await.unwrap();
    }
    for collector in collectors {
        collector.abort();
        let _ = collector.await;
    }
    assert_sound(&stores[0]).await;
    for store in stores {
        store.close().await.unwrap();
    }
    // What a session counted is seen for certain once it has ended.
    let client = connect(&url).await;
    let begun = tokio::time::Instant::now();
    loop {
        let others = "SELECT COUNT(*) FROM pg_stat_activity WHERE datname = current_database() \
                      AND backend_type = 'client backend' AND pid <> pg_backend_pid()";
        if client
            .query_one(others, &[])
            .await
            .unwrap()
            .get::<_, i64>(0)
            == 0
        {
            break;
        }
        assert!(begun.elapsed() < Duration::from_mins(1), "sessions stay");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let counted = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()";
    let deadlocks: i64 = client.query_one(counted, &[]).await.unwrap().get(0);
    assert_eq!(deadlocks, 0);
}

/// The pin waits for a deletion that is under way, and then finds nothing: it is never said to hold what goes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pin_that_comes_during_the_deletion_of_its_repository_is_missing() {
    let engine = crate::engine::postgres(Options::default()).await;
    let (store, repository) = (engine.store.clone(), name("team/app"));
    let view = crate::engine::push_image(&store, &repository, 1, &["v1"]).await;
    let deletion = connect(&engine.url).await;
    // What `delete_repository` does, held open.
    deletion
        .batch_execute(
            "BEGIN; SELECT id FROM repository WHERE name = 'team/app' FOR UPDATE; \
             UPDATE repository SET name = '/deleted/' || id, deleted_name = name, deleted_at = 1",
        )
        .await
        .unwrap();
    let pin = Pin {
        repository: repository.clone(),
        digest: described(&view).digest,
        reason: String::new(),
        expires: None,
    };
    let pinning = {
        let (store, pin) = (store.clone(), pin.clone());
        tokio::spawn(async move {
            store
                .set_pins("agent:one", vec![pin], ExpectedPins::Any, &actor())
                .await
        })
    };
    let client = connect(&engine.url).await;
    crate::cluster::waiting(&client, "transactionid").await;
    deletion.batch_execute("COMMIT").await.unwrap();
    let outcome = pinning.await.unwrap().unwrap();
    assert_eq!(outcome.held, []);
    assert_eq!(outcome.missing, [(pin.repository, pin.digest)]);
    assert_eq!(store.pins("agent:one").await.unwrap().unwrap().pins, []);
    store.close().await.unwrap();
}

/// A few manifests that everybody puts, tags, pins and deletes.
struct World {
    config: Descriptor,
    images: Vec<Manifest>,
    indexes: Vec<Manifest>,
    attached: Vec<Manifest>,
}

impl World {
    async fn new(store: &Store) -> Self {
        let repository = name("team/app");
        let config = push_blob(store, &repository, &content(1, 50)).await;
        let images: Vec<_> = (0..4).map(|number| labelled(&config, number)).collect();
        // The config is named by a manifest that nobody deletes, so it stays.
        put(store, &repository, &labelled(&config, 99), &["stays"])
            .await
            .unwrap();
        let children: Vec<_> = images.iter().map(described).collect();
        let indexes = vec![
            index(&children[..2]),
            index(&children[1..]),
            index(&[children[3].clone(), children[0].clone()]),
        ];
        let attached = children
            .iter()
            .chain(&indexes.iter().map(described).collect::<Vec<_>>())
            .map(|subject| Manifest {
                subject: Some(subject.clone()),
                ..labelled(&config, 7)
            })
            .collect();
        Self {
            config,
            images,
            indexes,
            attached,
        }
    }

    fn any(&self, dice: &mut impl FnMut(usize) -> usize) -> Manifest {
        let of = match dice(6) {
            0 | 1 => &self.indexes,
            2 => &self.attached,
            _ => &self.images,
        };
        of[dice(of.len())].clone()
    }
}

fn labelled(config: &Descriptor, number: u64) -> Manifest {
    let mut view = image(config, &[]);
    view.annotations
        .insert("number".to_owned(), number.to_string());
    view
}

fn now() -> Timestamp {
    let since = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap();
    Timestamp(since.as_micros().try_into().unwrap())
}

async fn write(store: Store, world: Arc<World>, writer: u64) {
    let mut random = (writer + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut dice = move |sides: usize| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        usize::try_from(random >> 33).unwrap() % sides
    };
    let repository = name("team/app");
    let evidence = format!("sha256-{}.sig", hex::encode(world.config.digest.as_bytes()));
    let tags = ["a", "b", "c", "d", &evidence];
    for _ in 0..ROUNDS {
        let view = world.any(&mut dice);
        let digest = described(&view).digest;
        let done = match dice(10) {
            0..=4 => {
                let mut own: Vec<_> = tags.into_iter().filter(|_| dice(3) == 0).collect();
                // Not in the order of their names.
                own.reverse();
                put(&store, &repository, &view, &own).await.map(drop)
            }
            5 | 6 => {
                let tag = tag(tags[dice(tags.len())]);
                store
                    .delete_tag(&repository, &tag, Expected::Any, &actor())
                    .await
            }
            7 => store.delete_manifest(&repository, &digest, &actor()).await,
            8 => {
                let expires = (dice(2) == 0).then(|| now().plus(LEASE));
                let mut pins = Vec::new();
                for _ in 0..3 {
                    pins.push(Pin {
                        repository: repository.clone(),
                        digest: described(&world.any(&mut dice)).digest,
                        reason: dice(2).to_string(),
                        expires,
                    });
                }
                let holder = ["agent:one", "agent:two"][dice(2)];
                store
                    .set_pins(holder, pins, ExpectedPins::Any, &actor())
                    .await
                    .map(drop)
            }
            _ => {
                let other = name("team/other");
                let from = std::slice::from_ref(&repository);
                let mounted = store
                    .mount_blob(&other, &world.config.digest, from, &actor())
                    .await;
                assert!(mounted.unwrap());
                match dice(2) {
                    0 => {
                        store
                            .delete_blob(&other, &world.config.digest, &actor())
                            .await
                    }
                    _ => store.delete_repository(&other, &actor()).await,
                }
            }
        };
        match done {
            Ok(())
            | Err(
                Error::BlobUnknown(_)
                | Error::ManifestInUse(_)
                | Error::ManifestUnknown(_)
                | Error::MissingReferences(_)
                | Error::Pinned { .. }
                | Error::RepositoryUnknown(_),
            ) => {}
            Err(error) => panic!("{error}"),
        }
    }
}
