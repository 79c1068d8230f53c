//! TLS and passwords on the way to a real PostgreSQL.

use std::path::{Path, PathBuf};

use e2e::cluster::Storage;
use e2e::command::Output;
use e2e::objects::Kind;
use e2e::postgres::{Setup, open_to_all, own_file};
use e2e::{Cluster, ObjectStore, Postgres, Run, Scratch, tools};

use crate::{Pushers, Site, healthy, keepsake, verify};

/// Of a user who must come in TLS with it.
const PASSWORD: &str = "pa55/w@rd";

/// A certificate authority with one server certificate, for `localhost` and no address.
struct Authority {
    /// The root.
    root: PathBuf,
    certificate: PathBuf,
    key: PathBuf,
}

impl Authority {
    fn new(scratch: &Scratch, name: &str) -> Self {
        let file = |what: &str| scratch.join(&format!("{name}-{what}"));
        let (root, root_key) = (file("ca.pem"), file("ca.key"));
        let new_key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"];
        Run::new("openssl")
            .args(["req", "-x509", "-nodes", "-days", "2"])
            .args(new_key)
            .args(["-subj", &format!("/CN={name}"), "-keyout"])
            .arg(&root_key)
            .arg("-out")
            .arg(&root)
            .ok();
        let (request, key) = (file("request.pem"), file("server.key"));
        Run::new("openssl")
            .args(["req", "-nodes"])
            .args(new_key)
            .args(["-subj", "/CN=db", "-keyout"])
            .arg(&key)
            .arg("-out")
            .arg(&request)
            .ok();
        let certificate = file("server.pem");
        let names = scratch.write("names", "subjectAltName=DNS:localhost\n");
        Run::new("openssl")
            .args(["x509", "-req", "-days", "2", "-CAcreateserial", "-in"])
            .arg(&request)
            .arg("-CA")
            .arg(&root)
            .arg("-CAkey")
            .arg(&root_key)
            .arg("-extfile")
            .arg(&names)
            .arg("-out")
            .arg(&certificate)
            .ok();
        for path in [&certificate, &key] {
            own_file(path);
        }
        Self {
            root,
            certificate,
            key,
        }
    }
}

/// A PostgreSQL that lets one user in with TLS and a password alone.
fn secured(scratch: &Scratch, authority: &Authority) -> Postgres {
    open_to_all(scratch.path());
    let postgres = Postgres::with(Setup {
        settings: vec![
            "ssl=on".to_owned(),
            format!("ssl_cert_file={}", authority.certificate.display()),
            format!("ssl_key_file={}", authority.key.display()),
            "password_encryption=scram-sha-256".to_owned(),
        ],
        access: vec![
            "hostssl all secured 127.0.0.1/32 scram-sha-256".to_owned(),
            "hostnossl all secured 127.0.0.1/32 reject".to_owned(),
        ],
        ..Setup::default()
    });
    let user = format!("CREATE ROLE secured LOGIN SUPERUSER PASSWORD '{PASSWORD}'");
    postgres.sql("postgres", &user);
    postgres
}

/// The database of this storage as the user who must come in TLS.
fn url(postgres: &Postgres, storage: &Storage, host: &str, password: &str, query: &str) -> Storage {
    let name = storage.database.rsplit('/').next().unwrap();
    let password = password.replace('/', "%2F").replace('@', "%40");
    let port = postgres.port();
    Storage {
        database: format!("postgres://secured:{password}@{host}:{port}/{name}?{query}"),
        ..storage.clone()
    }
}

/// Looks at a storage with a program that does not wait for better times.
fn look(storage: &Storage) -> Output {
    let mut run = Run::new(tools::program()).args(["--json", "verify-store", "--config"]);
    let scratch = Scratch::new();
    run = run.arg(scratch.write("look.yaml", "version: 1\n"));
    for (key, value) in storage.environment() {
        run = run.env(key, value);
    }
    run.run()
}

/// Wants a refusal that says why, without the password.
#[track_caller]
fn refused(storage: &Storage, hints: &[&str]) {
    let output = look(storage);
    let said = output.both();
    assert!(
        output.code.is_some_and(|code| code != 0 && code != 101),
        "{output}"
    );
    for hint in hints {
        assert!(said.contains(hint), "expected `{hint}`: {output}");
    }
    assert!(
        !said.contains(PASSWORD) && !said.contains("pa55"),
        "{output}"
    );
}

fn root(path: &Path) -> String {
    format!("sslrootcert={}", path.display())
}

#[test]
fn replicas_reach_a_database_in_tls_and_know_it_from_another() {
    let scratch = Scratch::new();
    let (ours, other) = (
        Authority::new(&scratch, "ours"),
        Authority::new(&scratch, "other"),
    );
    let postgres = secured(&scratch, &ours);
    let cluster = Cluster::of(postgres, ObjectStore::start(Kind::Minio));
    let plain = cluster.storage();
    let full = format!("sslmode=verify-full&{}", root(&ours.root));
    let storage = url(&cluster.postgres, &plain, "localhost", PASSWORD, &full);
    let mut site = Site::over(cluster, storage, 2);
    let kept = keepsake(&site.servers[0], "tls");
    let pushers = Pushers::start(&site.servers, 3);
    pushers.wait_for_more(20);
    let pushed = pushers.finish();
    assert_eq!(pushed.refused, [""; 0]);
    pushed.all_there(&site.servers);
    for server in &site.servers {
        kept.readable(server);
    }
    let postgres = &site.cluster.postgres;
    let sessions = postgres.sql(
        "postgres",
        "SELECT count(*) > 2 AND bool_and(ssl) FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) \
         WHERE usename = 'secured'",
    );
    assert_eq!(sessions, "t");

    let at = |host: &str, query: &str| url(postgres, &plain, host, PASSWORD, query);
    let (right, wrong) = (root(&ours.root), root(&other.root));
    // What is taken. A name is asked for by `verify-full` alone, and a root by all that verify.
    for (host, query) in [
        ("localhost", "sslmode=prefer".to_owned()),
        ("localhost", String::new()),
        ("localhost", "sslmode=require".to_owned()),
        ("127.0.0.1", "sslmode=require".to_owned()),
        ("127.0.0.1", format!("sslmode=verify-ca&{right}")),
        ("127.0.0.1", format!("sslmode=require&{right}")),
    ] {
        let output = look(&at(host, &query));
        assert_eq!(output.code, Some(0), "{host} {query}: {output}");
    }
    // What is refused.
    for (host, query, hint) in [
        (
            "127.0.0.1",
            format!("sslmode=verify-full&{right}"),
            "certificate",
        ),
        (
            "localhost",
            format!("sslmode=verify-full&{wrong}"),
            "certificate",
        ),
        (
            "localhost",
            format!("sslmode=verify-ca&{wrong}"),
            "certificate",
        ),
        (
            "localhost",
            format!("sslmode=require&{wrong}"),
            "certificate",
        ),
        ("localhost", "sslmode=verify-full".to_owned(), "certificate"),
        ("localhost", "sslmode=verify-ca".to_owned(), "sslrootcert"),
        ("localhost", "sslmode=disable".to_owned(), "pg_hba.conf"),
        (
            "localhost",
            "sslmode=verify-full&sslrootcert=/no/such.pem".to_owned(),
            "/no/such.pem",
        ),
        ("localhost", "sslmode=sometimes".to_owned(), "verify-full"),
    ] {
        refused(&at(host, &query), &[hint]);
    }
    let wrong_password = url(postgres, &plain, "localhost", "pa55-else", &full);
    refused(&wrong_password, &["password authentication failed"]);

    // A server without TLS is taken where it is asked for at most.
    let bare = Postgres::start();
    bare.create_database("plain");
    let of_bare = |query: &str| Storage {
        database: format!("{}?{query}", bare.url("plain")),
        ..plain.clone()
    };
    for query in ["sslmode=require", &full] {
        refused(&of_bare(query), &["TLS"]);
    }
    for query in ["sslmode=disable", "sslmode=prefer"] {
        // It has no tables, which is told over a connection that was made.
        let output = look(&of_bare(query));
        assert!(!output.both().contains("TLS"), "{output}");
        assert!(!output.both().contains("not available"), "{output}");
    }
    healthy(&mut site.servers);
    verify(&site.storage);
}

#[test]
fn a_replica_that_meets_a_foreign_certificate_says_so_while_it_waits() {
    let scratch = Scratch::new();
    let (ours, other) = (
        Authority::new(&scratch, "ours"),
        Authority::new(&scratch, "other"),
    );
    let cluster = Cluster::of(
        secured(&scratch, &ours),
        ObjectStore::start(Kind::Versitygw),
    );
    let query = format!("sslmode=verify-full&{}", root(&other.root));
    let storage = url(
        &cluster.postgres,
        &cluster.storage(),
        "localhost",
        PASSWORD,
        &query,
    );
    let refusal = crate::options(&storage)
        .start()
        .expect_err("no replica starts");
    assert!(refusal.contains("waiting for it to come back"), "{refusal}");
    assert!(refusal.contains("certificate"), "{refusal}");
    assert!(!refusal.contains("pa55"), "{refusal}");
}
