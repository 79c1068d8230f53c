//! Refusals: each with its status, its code and what to do, and nothing lost or half-done after it.

use e2e::http::Response;
use e2e::{Run, Scratch, Server, digest, image, tools};
use serde_json::json;

use crate::{
    connect, finish, healthy, holds, noise, offset_of, open_upload, patch, refused, server, verify,
};

fn put(server: &Server, reference: &str, body: &[u8]) -> Response {
    server.request(
        "PUT",
        &format!("/v2/refused/app/manifests/{reference}"),
        &[("Content-Type", image::MANIFEST)],
        body,
    )
}

fn manifest(config: &str, layers: &[(&str, usize)]) -> Vec<u8> {
    let layers: Vec<_> = layers
        .iter()
        .map(|(digest, size)| image::descriptor("application/octet-stream", digest, *size))
        .collect();
    json!({
        "schemaVersion": 2,
        "mediaType": image::MANIFEST,
        "config": image::descriptor("application/vnd.example", config, 2),
        "layers": layers,
    })
    .to_string()
    .into_bytes()
}

#[test]
fn a_wrong_digest_ends_the_upload_and_stores_nothing() {
    let mut server = Server::start();
    for length in [100, 3_000_000] {
        let (bytes, other) = (noise(1, length), noise(2, length));
        let wrong = digest(&other);
        let upload = open_upload(&server, "refused/app");
        assert_eq!(patch(&server, &upload, 0, &bytes).status(), 202);
        let answer = finish(&server, &upload, &wrong, &[]);
        refused(&answer, 400, "DIGEST_INVALID", &digest(&bytes));
        let single = server.request(
            "POST",
            &format!("/v2/refused/app/blobs/uploads/?digest={wrong}"),
            &[],
            &bytes,
        );
        refused(&single, 400, "DIGEST_INVALID", &wrong);
        refused(
            &server.get(&upload),
            404,
            "BLOB_UPLOAD_UNKNOWN",
            "start it again with a POST",
        );
        for digest in [&wrong, &digest(&bytes)] {
            let answer = server.get(&format!("/v2/refused/app/blobs/{digest}"));
            refused(&answer, 404, "BLOB_UNKNOWN", digest);
        }
    }
    healthy(&mut server);
    server.stop();
    verify(server.data());
}

#[test]
fn a_truncated_last_chunk_keeps_what_came() {
    let mut server = Server::start();
    let whole = noise(3, 500_000);
    let wanted = digest(&whole);
    let upload = open_upload(&server, "refused/app");
    let mut connection = connect(&server);
    connection
        .send_head(
            "PUT",
            &format!("{upload}?digest={wanted}"),
            &[("Content-Range", "0-499999")],
            Some(500_000),
        )
        .unwrap();
    connection.send_body(&whole[..200_000]).unwrap();
    // The end of our half: the body can only be short now.
    connection
        .stream()
        .shutdown(std::net::Shutdown::Write)
        .unwrap();
    drop(connection);
    crate::wait_for("the record of what came", || {
        (offset_of(&server.get(&upload)) == 200_000).then_some(())
    });
    assert_eq!(
        server
            .get(&format!("/v2/refused/app/blobs/{wanted}"))
            .status(),
        404
    );
    // The digest of what came so far is no way to make a blob of half an upload unasked.
    let done = finish(&server, &upload, &wanted, &whole[200_000..]);
    assert_eq!(done.status(), 201, "{}", done.text());
    holds(&server, "refused/app", &wanted);
    healthy(&mut server);
    server.stop();
    verify(server.data());
}

#[test]
fn chunks_in_the_wrong_place_change_nothing() {
    let mut server = Server::start();
    let whole = noise(4, 100_000);
    let wanted = digest(&whole);
    let upload = open_upload(&server, "refused/app");
    assert_eq!(patch(&server, &upload, 0, &whole[..40_000]).status(), 202);
    for first in [0, 39_999, 40_001, 90_000] {
        let answer = patch(&server, &upload, first, &whole[50_000..60_000]);
        refused(
            &answer,
            416,
            "BLOB_UPLOAD_INVALID",
            "go on after the last byte",
        );
        assert_eq!(answer.header("range"), Some("0-39999"));
        assert_eq!(answer.header("location"), Some(upload.as_str()));
    }
    for (text, status) in [
        ("nonsense", 400),
        ("40000-39000", 416),
        ("40000-18446744073709551615", 400),
        ("40000-40000", 400),
        ("-1-5", 400),
    ] {
        let answer = server.request("PATCH", &upload, &[("Content-Range", text)], &whole[..10]);
        refused(&answer, status, "BLOB_UPLOAD_INVALID", "");
    }
    let late = format!("{upload}?digest={wanted}");
    let answer = server.request(
        "PUT",
        &late,
        &[("Content-Range", "50000-99999")],
        &whole[50_000..],
    );
    refused(
        &answer,
        416,
        "BLOB_UPLOAD_INVALID",
        "go on after the last byte",
    );
    for bad in [
        "",
        "?digest=",
        "?digest=sha256:abc",
        "?digest=md5:d41d8cd98f00b204e9800998ecf8427e",
    ] {
        let answer = server.request("PUT", &format!("{upload}{bad}"), &[], &[]);
        refused(&answer, 400, "DIGEST_INVALID", "");
    }
    let done = finish(&server, &upload, &wanted, &whole[40_000..]);
    assert_eq!(done.status(), 201, "{}", done.text());
    // It is finished: nothing can be added, ended or cancelled any more.
    for method in ["GET", "PATCH", "DELETE"] {
        let answer = server.request(method, &upload, &[], &[]);
        refused(
            &answer,
            404,
            "BLOB_UPLOAD_UNKNOWN",
            "start it again with a POST",
        );
    }
    refused(
        &finish(&server, &upload, &wanted, &[]),
        404,
        "BLOB_UPLOAD_UNKNOWN",
        "POST",
    );
    // An upload of one repository is none of another.
    let upload = open_upload(&server, "refused/app");
    let elsewhere = upload.replace("refused/app", "refused/other");
    refused(
        &patch(&server, &elsewhere, 0, &whole),
        404,
        "BLOB_UPLOAD_UNKNOWN",
        "POST",
    );
    assert_eq!(patch(&server, &upload, 0, &whole).status(), 202);
    healthy(&mut server);
    server.stop();
    verify(server.data());
}

#[test]
fn a_manifest_whose_parts_are_missing_stores_nothing() {
    let mut server = server("");
    let config = image::push_blob(server.url(), "refused/app", b"{}");
    let layer = noise(5, 30_000);
    let missing = digest(&layer);
    let bytes = manifest(&config, &[(&missing, layer.len())]);
    let answer = put(&server, "v1", &bytes);
    refused(&answer, 404, "MANIFEST_BLOB_UNKNOWN", "push it first");
    assert_eq!(
        answer.json()["errors"][0]["detail"]["digests"],
        json!([missing])
    );
    // It is in another repository, which is not this one.
    image::push_blob(server.url(), "refused/other", &layer);
    refused(
        &put(&server, "v1", &bytes),
        404,
        "MANIFEST_BLOB_UNKNOWN",
        &missing,
    );
    for reference in ["v1", &digest(&bytes)] {
        let answer = server.get(&format!("/v2/refused/app/manifests/{reference}"));
        refused(&answer, 404, "MANIFEST_UNKNOWN", reference);
    }
    image::push_blob(server.url(), "refused/app", &layer);
    assert_eq!(put(&server, "v1", &bytes).status(), 201);
    // What a manifest is made of stays.
    let blob = format!("/v2/refused/app/blobs/{missing}");
    refused(
        &server.request("DELETE", &blob, &[], &[]),
        409,
        "DENIED",
        "delete the manifest first",
    );
    holds(&server, "refused/app", &missing);
    // By another digest than its own.
    let answer = put(&server, &digest(b"other"), &bytes);
    refused(&answer, 400, "DIGEST_INVALID", &digest(&bytes));
    healthy(&mut server);
    server.stop();
    verify(server.data());
}

#[test]
fn bad_names_tags_and_digests_are_told_apart() {
    let mut server = server("server: {limits: {manifest_bytes: 64KiB}}");
    for (name, code) in [
        ("Upper/app", "NAME_INVALID"),
        ("a//b", "NAME_INVALID"),
        ("-a", "NAME_INVALID"),
        ("a..b", "NAME_INVALID"),
        (&"a/".repeat(200), "NAME_INVALID"),
    ] {
        let answer = server.request("POST", &format!("/v2/{name}/blobs/uploads/"), &[], &[]);
        refused(&answer, 400, code, "");
    }
    let long = "t".repeat(129);
    for (reference, code) in [
        (".hidden", "TAG_INVALID"),
        ("a%20b", "TAG_INVALID"),
        (long.as_str(), "TAG_INVALID"),
        ("sha256:abc", "DIGEST_INVALID"),
        ("md5:d41d8cd98f00b204e9800998ecf8427e", "DIGEST_INVALID"),
    ] {
        refused(&put(&server, reference, b"{}"), 400, code, "");
    }
    // A hidden slash or NUL is no name at all, whatever stands in front of us makes of it.
    for path in [
        "/v2/a%2F..%2Fb/tags/list",
        "/v2/a/manifests/%00",
        "/v2/../healthz",
        "/v2/a/%ff/tags/list",
    ] {
        refused(&server.get(path), 404, "UNSUPPORTED", "no such path");
    }
    let answer = server.get("/v2/refused/app/blobs/sha256:XYZ");
    refused(&answer, 400, "DIGEST_INVALID", "64 lower-case hexadecimal");
    for body in [
        &b""[..],
        b"{}",
        b"\xff\xfe",
        b"{\"schemaVersion\":1}",
        b"null",
        b"\"a\"",
    ] {
        refused(&put(&server, "v1", body), 400, "MANIFEST_INVALID", "");
    }
    let large = vec![b' '; 65 * 1024];
    refused(&put(&server, "v1", &large), 413, "SIZE_INVALID", "65536");
    assert_eq!(server.get("/v2/refused/app/tags/list").status(), 404);
    healthy(&mut server);
    server.stop();
    verify(server.data());
}

/// Runs `serve` where it must refuse to start, and gives back what it says.
fn start(data: &std::path::Path, config: Option<&std::path::Path>) -> e2e::command::Output {
    let mut run = Run::new(tools::program())
        .args(["serve", "--listen", "127.0.0.1:0", "--data"])
        .arg(data);
    if let Some(config) = config {
        run = run.arg("--config").arg(config);
    }
    run.fails()
}

#[test]
fn a_data_directory_in_use_newer_or_foreign_is_left_alone() {
    let mut server = Server::start();
    let kept = image::push_blob(server.url(), "refused/app", &noise(6, 40_000));
    let output = start(server.data(), None);
    output
        .says("in use by another process")
        .says("stop it or choose another directory");
    holds(&server, "refused/app", &kept);
    server.stop();

    let format = server.data().join("format");
    let ours = std::fs::read_to_string(&format).unwrap();
    std::fs::write(&format, "longshore store 99\n").unwrap();
    start(server.data(), None)
        .says("99")
        .says("use a newer program");
    Run::new(tools::program())
        .arg("verify-store")
        .arg(server.data())
        .fails()
        .says("use a newer program");
    std::fs::write(&format, "something else\n").unwrap();
    start(server.data(), None).says("restore it from a backup");
    std::fs::write(&format, ours).unwrap();
    server.restart();
    holds(&server, "refused/app", &kept);
    server.stop();
    verify(server.data());

    let scratch = Scratch::new();
    scratch.write("home/thesis.txt", "years of work");
    start(&scratch.join("home"), None)
        .says("thesis.txt")
        .says("choose an empty directory");
    let left: Vec<_> = std::fs::read_dir(scratch.join("home")).unwrap().collect();
    assert_eq!(left.len(), 1, "{left:?}");
    let file = scratch.write("file", "");
    start(&file, None);
}

#[test]
fn an_unknown_configuration_key_names_itself_and_the_nearest() {
    let scratch = Scratch::new();
    for (text, key, nearest) in [
        (
            "version: 1\nstorage: {alow_sparse: true}\n",
            "alow_sparse",
            "allow_sparse",
        ),
        ("version: 1\nservr: {}\n", "servr", "server"),
        (
            "version: 1\nserver: {limits: {header_timout: 1s}}\n",
            "header_timout",
            "header_timeout",
        ),
    ] {
        let config = scratch.write("config.yaml", text);
        start(&scratch.join("data"), Some(&config))
            .says("config.yaml")
            .says(key)
            .says(&format!("did you mean `{nearest}`"));
    }
    assert!(!scratch.join("data").exists());
}
