//! PostgreSQL restarts, fails over, and stands still.

use std::time::Duration;

use e2e::fault::Wire;
use e2e::objects::Kind;
use e2e::wire::{noise, wait_for};
use e2e::{Cluster, ObjectStore, Postgres, Server, digest};

use crate::{Pushers, Site, healthy, in_trouble, keepsake, verify};

#[test]
fn a_restart_of_the_database_is_told_and_survived() {
    let mut site = Site::start(Kind::Versitygw, 2);
    let kept = keepsake(&site.servers[0], "restart");
    let pushers = Pushers::start(&site.servers, 4);
    for orderly in [true, false] {
        pushers.wait_for_more(20);
        let before = pushers.troubles();
        if orderly {
            site.cluster.postgres.stop();
        } else {
            site.cluster.postgres.kill();
        }
        // Nothing can be told from the database now; what is said must be the truth.
        let answer = wait_for("an answer without a database", || {
            let answer = site.servers[0].get("/v2/kept/restart/manifests/small");
            (answer.status() != 200).then_some(answer)
        });
        in_trouble(&answer);
        let answer = site.servers[1].request("POST", "/v2/kept/restart/blobs/uploads/", &[], &[]);
        in_trouble(&answer);
        // Metrics are wanted most now: the process tells what it knows by itself.
        let metrics = site.servers[1].get("/metrics");
        assert_eq!(metrics.status(), 200, "{}", metrics.text());
        for line in [
            "longshore_store_reachable 0",
            "longshore_http_requests_total{",
        ] {
            assert!(metrics.text().contains(line), "{line}: {}", metrics.text());
        }
        pushers.wait_for_trouble_since(before);
        site.cluster.postgres.restart();
        pushers.wait_for_more(20);
    }
    site.lost_nothing(pushers, &kept);
}

#[test]
fn a_fail_over_to_a_standby_loses_nothing() {
    let cluster = Cluster::of(Postgres::start(), ObjectStore::start(Kind::Minio));
    let mut storage = cluster.storage();
    let name = storage.database.rsplit('/').next().unwrap().to_owned();
    let standby = cluster.postgres.standby();
    storage.database = Postgres::url_of_any(&[&cluster.postgres, &standby], &name);
    let mut site = Site::over(cluster, storage, 2);
    let kept = keepsake(&site.servers[0], "failover");
    let pushers = Pushers::start(&site.servers, 4);
    pushers.wait_for_more(40);
    let before = pushers.troubles();
    site.cluster.postgres.kill();
    pushers.wait_for_trouble_since(before);
    standby.promote();
    pushers.wait_for_more(40);
    site.lost_nothing(pushers, &kept);
    // A replica that starts now finds its way as well.
    let mut late = e2e::cluster::replicas(&crate::options(&site.storage), 1);
    kept.readable(&late[0]);
    healthy(&mut late);
}

#[test]
fn replicas_over_a_standby_are_read_only_until_it_is_promoted() {
    let cluster = Cluster::of(Postgres::start(), ObjectStore::start(Kind::Versitygw));
    let mut storage = cluster.storage();
    let name = storage.database.rsplit('/').next().unwrap().to_owned();
    let standby = cluster.postgres.standby();
    // Without `target_session_attrs`, so that a standby will do for what only reads.
    let any = Postgres::url_of_any(&[&cluster.postgres, &standby], &name);
    storage.database = any.split('?').next().unwrap().to_owned();
    let mut site = Site::over(cluster, storage, 2);
    let kept = keepsake(&site.servers[0], "standby");
    let metric = |server: &Server, wanted: &str| {
        let line = format!("longshore_read_only{{cause=\"recovery\"}} {wanted}");
        let metrics = server.get("/metrics");
        (metrics.status() == 200 && metrics.text().lines().any(|one| one == line)).then_some(())
    };
    for server in &site.servers {
        assert!(metric(server, "0").is_some());
    }
    site.cluster.postgres.kill();
    let layer = noise(11, 50_000);
    let blob = digest(&layer);
    let target = format!("/v2/standby/new/blobs/uploads/?digest={blob}");
    for server in &site.servers {
        wait_for("read-only mode", || metric(server, "1"));
        let refused = server.request("POST", &target, &[], &layer);
        assert_eq!(refused.status(), 503, "{}", refused.text());
        assert_eq!(refused.header("retry-after"), Some("30"));
        assert!(refused.text().contains("in recovery"), "{}", refused.text());
        let mode = server.get("/api/v1/mode").json();
        assert_eq!(mode["mode"], "read-only", "{mode}");
        assert_eq!(mode["databaseInRecovery"], true, "{mode}");
        // Pulls go on, so it is ready, and says why it takes no writes.
        kept.readable(server);
        let ready = server.get("/readyz");
        assert_eq!(ready.status(), 200, "{}", ready.text());
        assert!(ready.text().contains("read-only: "), "{}", ready.text());
        assert!(ready.text().contains("in recovery"), "{}", ready.text());
    }
    standby.promote();
    for server in &site.servers {
        wait_for("the end of the read-only mode", || metric(server, "0"));
        let pushed = server.request("POST", &target, &[], &layer);
        assert_eq!(pushed.status(), 201, "{}", pushed.text());
        kept.readable(server);
    }
    healthy(&mut site.servers);
    verify(&site.storage);
}

#[test]
fn a_database_that_is_out_of_reach_or_stands_still_is_told_and_survived() {
    let cluster = Cluster::start(Kind::Versitygw);
    let wire = Wire::start(&format!("127.0.0.1:{}", cluster.postgres.port()));
    let mut storage = cluster.storage();
    let direct = format!(":{}/", cluster.postgres.port());
    storage.database = storage
        .database
        .replace(&direct, &format!(":{}/", wire.port()));
    let mut site = Site::over(cluster, storage, 2);
    let kept = keepsake(&site.servers[0], "wire");
    let pushers = Pushers::start(&site.servers, 4);
    for round in 0..3 {
        pushers.wait_for_more(10);
        let before = pushers.troubles();
        wire.cut();
        pushers.wait_for_trouble_since(before);
        wire.mend();
        pushers.wait_for_more(10);
        // The net that comes back late: what waited goes on, or is refused.
        wire.stand_still();
        std::thread::sleep(Duration::from_millis(300 * (round + 1)));
        wire.mend();
    }
    pushers.wait_for_more(10);
    site.lost_nothing(pushers, &kept);
}
