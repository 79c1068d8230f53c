//! Requests that want more than they should get: memory stays bounded, nothing panics, others are served.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::thread;
use std::time::Duration;

use e2e::server::Options;
use e2e::{Server, digest, image, tools};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::json;

use crate::{
    PATIENCE, connect, finish, healthy, holds, memory, noise, open_upload, patch, refused, server,
    verify,
};

/// KiB that no attack here may make a server take.
const MEMORY: u64 = 400 * 1024;

/// Lets this process and the servers that it starts from now on open many files.
fn open_many_files() {
    let limit = getrlimit(Resource::Nofile);
    let wanted = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    setrlimit(Resource::Nofile, wanted).unwrap();
}

/// Waits until the server closes this connection; what it says before is given back.
fn until_closed(stream: &mut TcpStream) -> String {
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut said = Vec::new();
    match stream.read_to_end(&mut said) {
        Ok(_) => {}
        Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "{error}"),
    }
    String::from_utf8_lossy(&said).into_owned()
}

#[test]
fn a_head_that_drips_or_never_comes_is_cut_off() {
    let mut server = server("server: {limits: {header_timeout: 1s}}");
    let mut streams: Vec<_> = ["", "G", "GET /v2/ HTTP/1.1\r\nHost: localhost\r\nX-Slow: a"]
        .into_iter()
        .map(|begun| {
            let mut stream = TcpStream::connect(server.host()).unwrap();
            stream.write_all(begun.as_bytes()).unwrap();
            stream
        })
        .collect();
    let mut drip = TcpStream::connect(server.host()).unwrap();
    drip.write_all(b"GET /v2/ HTTP/1.1\r\nX-Slow: ").unwrap();
    let start = std::time::Instant::now();
    // It closes at some byte: then writing fails.
    while drip.write_all(b"a").is_ok() {
        assert!(start.elapsed() < PATIENCE, "it goes on for ever");
        thread::sleep(Duration::from_millis(50));
    }
    for stream in &mut streams {
        until_closed(stream);
    }
    // A connection that was used and then stays idle goes as well.
    let mut used = connect(&server);
    assert_eq!(used.request("GET", "/v2/", &[], &[]).unwrap().status(), 200);
    until_closed(used.stream());
    healthy(&mut server);
}

#[test]
fn five_thousand_idle_connections_delay_and_do_not_stop_the_service() {
    open_many_files();
    let mut server = server("server: {limits: {header_timeout: 3s}}");
    let blob = image::push_blob(server.url(), "idle/app", &noise(1, 300_000));
    let idle: Vec<_> = (0..5000)
        .map(|_| TcpStream::connect(server.host()).unwrap())
        .collect();
    // More than the limit of connections: this one is served when the idle ones are cut off.
    holds(&server, "idle/app", &blob);
    eprintln!("5 000 idle connections: {} KiB", memory(&server, "VmHWM"));
    assert!(memory(&server, "VmHWM") < MEMORY);
    drop(idle);
    healthy(&mut server);
}

#[test]
fn a_low_limit_of_open_files_does_not_stop_the_service() {
    open_many_files();
    // They stay for as long as this test runs.
    let config = "version: 1\nserver: {limits: {header_timeout: 10m}}";
    let mut options = Options::new(tools::program()).config(config);
    // As many systems start a service: few files at first, more for those who ask.
    options.wrapper = vec!["prlimit".to_owned(), "--nofile=256:8192".to_owned()];
    let mut server = Server::with(&options);
    let blob = image::push_blob(server.url(), "files/app", &noise(1, 300_000));
    let idle: Vec<_> = (0..600)
        .map(|_| {
            let mut connection = connect(&server);
            let answer = connection.request("GET", "/v2/", &[], &[]).unwrap();
            assert_eq!(answer.status(), 200);
            connection
        })
        .collect();
    holds(&server, "files/app", &blob);
    drop(idle);
    healthy(&mut server);
}

#[test]
fn bodies_that_are_announced_and_never_come_cost_nothing() {
    let mut server = server("");
    let blob = image::push_blob(server.url(), "huge/app", &noise(1, 300_000));
    let length = 10u64 << 30;
    let mut waiting = Vec::new();
    for round in 0..20 {
        let upload = open_upload(&server, "huge/app");
        let mut connection = connect(&server);
        let (method, target) = match round % 3 {
            0 => ("PATCH", upload.clone()),
            1 => ("PUT", format!("{upload}?digest={blob}")),
            _ => ("POST", format!("/v2/huge/app/blobs/uploads/?digest={blob}")),
        };
        connection
            .send_head(method, &target, &[], Some(length))
            .unwrap();
        waiting.push((connection, upload));
    }
    let mut manifest = connect(&server);
    manifest
        .send_head(
            "PUT",
            "/v2/huge/app/manifests/v1",
            &[
                ("Content-Type", image::MANIFEST),
                ("Expect", "100-continue"),
            ],
            Some(length),
        )
        .unwrap();
    assert_eq!(manifest.receive_head("PUT").unwrap().status, 413);
    holds(&server, "huge/app", &blob);
    assert!(memory(&server, "VmHWM") < MEMORY);
    // Each is told in the end that nothing came.
    for (round, (mut connection, upload)) in waiting.into_iter().enumerate() {
        let head = connection.receive_head("PATCH").unwrap();
        assert_eq!(head.status, 408, "{round}");
        assert_eq!(server.get(&upload).status(), 204);
    }
    healthy(&mut server);
    server.stop();
    verify(server.data());
}

#[test]
fn many_large_uploads_share_bounded_memory() {
    let mut server = server("");
    let whole = noise(3, 48 << 20);
    let wanted = digest(&whole);
    thread::scope(|scope| {
        for number in 0..10 {
            let (server, whole, wanted) = (&server, &whole, &wanted);
            scope.spawn(move || {
                let repository = format!("many/app{number}");
                let upload = open_upload(server, &repository);
                assert_eq!(patch(server, &upload, 0, whole).status(), 202);
                let done = finish(server, &upload, wanted, &[]);
                assert_eq!(done.status(), 201, "{}", done.text());
            });
        }
    });
    eprintln!("480 MiB at once: {} KiB", memory(&server, "VmHWM"));
    assert!(memory(&server, "VmHWM") < MEMORY);
    holds(&server, "many/app3", &wanted);
    healthy(&mut server);
    server.stop();
    verify(server.data());
}

fn put(server: &Server, reference: &str, media_type: &str, body: &[u8]) -> e2e::http::Response {
    server.request(
        "PUT",
        &format!("/v2/deep/app/manifests/{reference}"),
        &[("Content-Type", media_type)],
        body,
    )
}

#[test]
fn manifests_that_are_deep_wide_or_long_are_refused_or_kept_whole() {
    const LIMIT: usize = 4 << 20;
    const INDEX: &str = "application/vnd.oci.image.index.v1+json";
    let mut server = server("");
    let config = image::push_blob(server.url(), "deep/app", b"{}");
    let config = image::descriptor("application/vnd.example", &config, 2).to_string();

    // Deep.
    let nested = format!("{}{}", "[".repeat(LIMIT / 2), "]".repeat(LIMIT / 2));
    let answer = put(&server, "deep", image::MANIFEST, nested.as_bytes());
    refused(&answer, 400, "MANIFEST_INVALID", "not valid JSON");
    let open = "{\"a\":".repeat(LIMIT / 5);
    let answer = put(&server, "deep", image::MANIFEST, open.as_bytes());
    refused(&answer, 400, "MANIFEST_INVALID", "not valid JSON");
    // Deep where nobody looks.
    let half = LIMIT / 2 - 200;
    let extra = format!(
        "{{\"schemaVersion\":2,\"config\":{config},\"layers\":[],\"x\":{}{}}}",
        "[".repeat(half),
        "]".repeat(half)
    );
    let answer = put(&server, "extra", image::MANIFEST, extra.as_bytes());
    assert!(matches!(answer.status(), 201 | 400), "{}", answer.status());
    if answer.status() == 201 {
        let answer = server.get("/v2/deep/app/manifests/extra");
        assert_eq!(answer.body, extra.as_bytes());
    }

    // Long: a byte over the limit, and exactly at it.
    let frame = format!("{{\"schemaVersion\":2,\"config\":{config},\"layers\":[],\"x\":\"\"}}");
    for (over, status) in [(1, 413), (0, 201)] {
        let filling = "x".repeat(LIMIT - frame.len() + over);
        let long = frame.replace("\"\"", &format!("\"{filling}\""));
        assert_eq!(long.len(), LIMIT + over);
        let answer = put(&server, "long", image::MANIFEST, long.as_bytes());
        if status == 413 {
            refused(&answer, 413, "SIZE_INVALID", "4194304");
            assert_eq!(server.get("/v2/deep/app/manifests/long").status(), 404);
        } else {
            assert_eq!(answer.status(), 201, "{}", answer.text());
        }
    }

    // Wide.
    for elements in ["{}", "[]", "0", "null"] {
        let many = vec![elements; 100_000].join(",");
        let wide = format!("{{\"schemaVersion\":2,\"config\":{config},\"layers\":[{many}]}}");
        let answer = put(&server, "wide", image::MANIFEST, wide.as_bytes());
        refused(&answer, 400, "MANIFEST_INVALID", "not valid JSON");
    }
    let same = vec![config.as_str(); 30_000].join(",");
    let wide = format!("{{\"schemaVersion\":2,\"config\":{config},\"layers\":[{same}]}}");
    let answer = put(&server, "same", image::MANIFEST, wide.as_bytes());
    assert_eq!(answer.status(), 201, "{}", answer.text());
    for (field, media_type, kind) in [
        ("layers", image::MANIFEST, "application/octet-stream"),
        ("manifests", INDEX, image::MANIFEST),
        ("manifests", INDEX, "a/b"),
    ] {
        let missing: Vec<_> = (0..25_000u64)
            .map(|n| image::descriptor(kind, &digest(&n.to_le_bytes()), 1))
            .collect();
        let mut wide = json!({"schemaVersion": 2, "mediaType": media_type, field: missing});
        if field == "layers" {
            wide["config"] = image::descriptor("application/vnd.example", &digest(b"{}"), 2);
        }
        let start = std::time::Instant::now();
        let answer = put(&server, "wide", media_type, wide.to_string().as_bytes());
        eprintln!(
            "25 000 missing {field} of type {kind}: {:?}",
            start.elapsed()
        );
        refused(&answer, 404, "MANIFEST_BLOB_UNKNOWN", "push it first");
        let json = answer.json();
        let message = json["errors"][0]["message"].as_str().unwrap();
        assert!(message.len() < 2000, "a message of {} bytes", message.len());
    }
    assert_eq!(server.get("/v2/deep/app/manifests/wide").status(), 404);
    assert!(memory(&server, "VmHWM") < MEMORY);
    healthy(&mut server);
    server.stop();
    verify(server.data());
}

#[test]
fn long_annotations_and_types_do_not_fill_the_memory_of_listings() {
    let mut server = server("");
    let config = image::push_blob(server.url(), "deep/app", b"{}");
    let config = image::descriptor("application/vnd.example", &config, 2);
    let subject = image::descriptor(image::MANIFEST, &digest(b"subject"), 7);
    let long = "x".repeat(3_500_000);
    for (media_type, artifact_type) in [(long.as_str(), "a/b"), (image::MANIFEST, long.as_str())] {
        let body = json!({
            "schemaVersion": 2, "mediaType": media_type, "config": config, "layers": [],
            "artifactType": artifact_type,
        });
        let answer = put(&server, "long", "", body.to_string().as_bytes());
        refused(&answer, 400, "MANIFEST_INVALID", "longer than");
    }
    let before = memory(&server, "VmHWM");
    let mut pushed = Vec::new();
    for number in 0..40 {
        let body = json!({
            "schemaVersion": 2, "mediaType": image::MANIFEST, "config": config, "layers": [],
            "subject": subject, "annotations": {"long": long, "number": number.to_string()},
        })
        .to_string();
        let wanted = digest(body.as_bytes());
        assert_eq!(
            put(&server, &wanted, image::MANIFEST, body.as_bytes()).status(),
            201
        );
        pushed.push(wanted);
    }
    let mut next = Some(format!("/v2/deep/app/referrers/{}", digest(b"subject")));
    let mut listed = Vec::new();
    while let Some(path) = next.filter(|_| listed.len() < 2) {
        let answer = server.get(&path);
        assert_eq!(answer.status(), 200);
        assert!(
            answer.body.len() < 4 << 20,
            "a page of {}",
            answer.body.len()
        );
        for entry in answer.json()["manifests"].as_array().unwrap() {
            listed.push(entry["digest"].as_str().unwrap().to_owned());
        }
        next = answer.header("link").map(|link| {
            let end = link.find('>').unwrap();
            link[1..end].to_owned()
        });
    }
    assert_eq!(listed, pushed[..2]);
    let after = memory(&server, "VmHWM");
    eprintln!("40 long referrers: {before} KiB before, {after} KiB after");
    assert!(after < before + MEMORY / 2);
    healthy(&mut server);
    server.stop();
    verify(server.data());
}

#[test]
fn huge_heads_are_refused() {
    let mut server = server("");
    let long = "x".repeat(64 * 1024);
    let mut heads = vec![
        format!(
            "GET /v2/ HTTP/1.1\r\nHost: localhost\r\n{}",
            "X-Many: 1\r\n".repeat(5000)
        ),
        format!(
            "GET /v2/{} HTTP/1.1\r\nHost: localhost\r\n",
            "a/".repeat(500_000)
        ),
        format!(
            "GET /v2/?{} HTTP/1.1\r\nHost: localhost\r\n",
            "tag=a&".repeat(200_000)
        ),
    ];
    heads.push(format!(
        "GET /v2/ HTTP/1.1\r\nHost: localhost\r\n{}",
        (0..160)
            .map(|n| format!("X-{n}: {long}\r\n"))
            .collect::<Vec<_>>()
            .concat()
    ));
    for head in heads {
        let mut stream = TcpStream::connect(server.host()).unwrap();
        // It may be cut off in the middle of it.
        let sent = stream.write_all(format!("{head}\r\n").as_bytes());
        let said = until_closed(&mut stream);
        assert!(
            said.is_empty() && sent.is_err() || said.starts_with("HTTP/1.1 4"),
            "{sent:?} {said}"
        );
    }
    assert!(memory(&server, "VmHWM") < MEMORY);
    healthy(&mut server);
}
