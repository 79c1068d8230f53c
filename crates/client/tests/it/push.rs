use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use client::Error;
use oci::Descriptor;

use crate::fake::{Fake, answer};
use crate::support::{noise, repository};

const CHUNK: usize = 16 * 1024 * 1024;

struct File {
    _directory: tempfile::TempDir,
    path: std::path::PathBuf,
    content: Vec<u8>,
    descriptor: Descriptor,
}

fn file(length: usize) -> File {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("blob");
    let content = noise(length);
    fs::write(&path, &content).unwrap();
    let descriptor = Descriptor::of("x/y", &content);
    File {
        _directory: directory,
        path,
        content,
        descriptor,
    }
}

fn verbs(fake: &Fake) -> Vec<String> {
    let state = fake.state();
    state
        .log
        .iter()
        .map(|asked| asked.method.to_string())
        .collect()
}

#[tokio::test]
async fn small_blobs_take_one_post_or_fall_back() {
    let fake = Fake::start().await;
    let repository = repository(&fake, "a");
    let put = |content: &'static [u8]| {
        let repository = repository.clone();
        async move {
            repository
                .put_blob(&Descriptor::of("x/y", content), Bytes::from_static(content))
                .await
                .unwrap();
        }
    };
    put(b"one").await;
    assert_eq!(verbs(&fake), ["HEAD", "POST"]);
    put(b"one").await;
    assert_eq!(
        verbs(&fake),
        ["HEAD", "POST", "HEAD"],
        "what is there is not sent"
    );

    fake.state().single_post = false;
    fake.state().log.clear();
    put(b"two").await;
    put(b"three").await;
    assert_eq!(verbs(&fake), ["HEAD", "POST", "PUT", "HEAD", "POST", "PUT"]);
    assert!(
        fake.asked("POST", "")[1].query.is_empty(),
        "what it does not know is not tried again"
    );
    for content in ["one", "two", "three"] {
        assert!(fake.has_blob("a", content.as_bytes()));
    }
    let error = repository
        .put_blob(&Descriptor::of("x/y", b"four"), Bytes::from_static(b"five"))
        .await
        .unwrap_err();
    assert!(matches!(error, Error::DigestMismatch { .. }), "{error}");
}

#[tokio::test]
async fn a_large_file_goes_in_chunks() {
    for absolute in [false, true] {
        let fake = Fake::start().await;
        fake.state().absolute_locations = absolute;
        let file = file(2 * CHUNK + 5);
        repository(&fake, "a")
            .put_blob_file(&file.descriptor, &file.path)
            .await
            .unwrap();
        assert!(fake.has_blob("a", &file.content));
        let ranges: Vec<_> = fake
            .asked("PATCH", "")
            .iter()
            .map(|asked| asked.header("content-range").unwrap().to_owned())
            .collect();
        assert_eq!(
            ranges,
            ["0-16777215", "16777216-33554431", "33554432-33554436"]
        );
        assert_eq!(fake.asked("PUT", "").len(), 1);
    }
}

#[tokio::test]
async fn the_registry_may_want_longer_chunks() {
    let fake = Fake::start().await;
    let file = file(CHUNK + 5);
    fake.hook(|asked, state| {
        (asked.method == "POST").then(|| {
            let mut answer = state.handle(asked);
            answer
                .headers_mut()
                .insert("oci-chunk-min-length", "20000000".parse().unwrap());
            answer
        })
    });
    repository(&fake, "a")
        .put_blob_file(&file.descriptor, &file.path)
        .await
        .unwrap();
    assert!(fake.has_blob("a", &file.content));
    assert_eq!(
        fake.asked("PATCH", "").len(),
        0,
        "it fits one chunk of that length"
    );
}

#[tokio::test]
async fn a_broken_chunk_goes_on_where_the_registry_says() {
    let fake = Fake::start().await;
    let file = file(CHUNK + 100);
    let mut broken = false;
    fake.hook(move |asked, state| {
        if asked.method != "PATCH" || broken {
            return None;
        }
        broken = true;
        // It kept 1000 bytes when something broke.
        state
            .uploads
            .values_mut()
            .next()
            .unwrap()
            .extend_from_slice(&asked.body[..1000]);
        Some(answer(500, &[], ""))
    });
    repository(&fake, "a")
        .put_blob_file(&file.descriptor, &file.path)
        .await
        .unwrap();
    assert!(fake.has_blob("a", &file.content));
    let ranges: Vec<_> = fake
        .asked("PATCH", "")
        .iter()
        .map(|asked| asked.header("content-range").unwrap().to_owned())
        .collect();
    assert_eq!(ranges, ["0-16777215", "1000-16777315"]);
    assert_eq!(
        fake.asked("GET", "/uploads/").len(),
        1,
        "it is asked what it has"
    );
}

#[tokio::test]
async fn a_range_behind_what_was_sent_counts() {
    let fake = Fake::start().await;
    let file = file(CHUNK + 100);
    let mut short = false;
    fake.hook(move |asked, state| {
        if asked.method != "PATCH" || short {
            return None;
        }
        short = true;
        let (id, held) = state.uploads.iter_mut().next().unwrap();
        held.extend_from_slice(&asked.body[..5000]);
        let location = format!("/v2/a/blobs/uploads/{id}?_state=a%2Bb");
        Some(answer(
            202,
            &[("location", &location), ("range", "0-4999")],
            "",
        ))
    });
    repository(&fake, "a")
        .put_blob_file(&file.descriptor, &file.path)
        .await
        .unwrap();
    assert!(fake.has_blob("a", &file.content));
    assert!(
        fake.asked("PATCH", "")[1]
            .header("content-range")
            .unwrap()
            .starts_with("5000-")
    );
}

#[tokio::test]
async fn a_lost_session_is_begun_anew() {
    let fake = Fake::start().await;
    let file = file(CHUNK + 100);
    let mut lost = false;
    fake.hook(move |asked, state| {
        if asked.method == "PATCH" && !lost && asked.header("content-range") != Some("0-16777215") {
            lost = true;
            state.uploads.clear();
        }
        None
    });
    repository(&fake, "a")
        .put_blob_file(&file.descriptor, &file.path)
        .await
        .unwrap();
    assert!(fake.has_blob("a", &file.content));
    assert_eq!(fake.asked("POST", "").len(), 2);
}

#[tokio::test]
async fn a_registry_without_chunks_gets_one_put() {
    let fake = Fake::start().await;
    let file = file(CHUNK + 100);
    fake.hook(|asked, _| (asked.method == "PATCH").then(|| answer(405, &[], "")));
    let repository = repository(&fake, "a");
    repository
        .put_blob_file(&file.descriptor, &file.path)
        .await
        .unwrap();
    assert!(fake.has_blob("a", &file.content));
    assert_eq!(fake.asked("PATCH", "").len(), 1);
    assert_eq!(fake.asked("PUT", "")[0].body.len(), file.content.len());
    repository
        .delete_blob(&file.descriptor.digest)
        .await
        .unwrap();
    repository
        .put_blob_file(&file.descriptor, &file.path)
        .await
        .unwrap();
    assert_eq!(fake.asked("PATCH", "").len(), 1, "it is not tried again");
}

#[tokio::test]
async fn a_lost_answer_to_the_last_put_is_found_out() {
    let fake = Fake::start().await;
    fake.state().single_post = false;
    fake.hook(|asked, state| {
        (asked.method == "PUT").then(|| {
            assert_eq!(state.handle(asked).status(), 201);
            answer(504, &[], "")
        })
    });
    let descriptor = Descriptor::of("x/y", b"content");
    repository(&fake, "a")
        .put_blob(&descriptor, Bytes::from_static(b"content"))
        .await
        .unwrap();
    assert!(fake.has_blob("a", b"content"));
    assert_eq!(fake.asked("PUT", "").len(), 1);
}

#[tokio::test]
async fn a_put_that_is_only_accepted_is_not_done() {
    let fake = Fake::start().await;
    fake.state().single_post = false;
    fake.hook(|asked, _| (asked.method == "PUT").then(|| answer(202, &[], "")));
    let descriptor = Descriptor::of("x/y", b"content");
    let error = repository(&fake, "a")
        .put_blob(&descriptor, Bytes::from_static(b"content"))
        .await
        .unwrap_err();
    assert!(error.to_string().contains("did not finish"), "{error}");
    assert!(
        !fake.asked("DELETE", "/uploads/").is_empty(),
        "it is cancelled"
    );
}

#[tokio::test]
async fn another_content_than_said_is_refused() {
    let fake = Fake::start().await;
    let file = file(100);
    let repository = repository(&fake, "a");
    let wrong = Descriptor::new("x/y", oci::Digest::sha256(b"else"), 100);
    let error = repository
        .put_blob_file(&wrong, &file.path)
        .await
        .unwrap_err();
    assert!(
        matches!(&error, Error::Status { code, .. } if code == "DIGEST_INVALID"),
        "{error:?}"
    );
    let wrong = Descriptor::new("x/y", file.descriptor.digest.clone(), 99);
    let error = repository
        .put_blob_file(&wrong, &file.path)
        .await
        .unwrap_err();
    assert!(
        matches!(error, Error::SizeMismatch { actual: 100, .. }),
        "{error}"
    );
}

#[tokio::test]
async fn a_busy_registry_is_waited_for() {
    let fake = Fake::start().await;
    let file = file(CHUNK + 100);
    let asked_to_wait = std::sync::Arc::new(AtomicBool::new(false));
    let flag = asked_to_wait.clone();
    fake.hook(move |asked, _| {
        (asked.method == "PATCH" && !flag.swap(true, Ordering::SeqCst))
            .then(|| answer(429, &[("retry-after", "0")], ""))
    });
    repository(&fake, "a")
        .put_blob_file(&file.descriptor, &file.path)
        .await
        .unwrap();
    assert!(asked_to_wait.load(Ordering::SeqCst));
    assert!(fake.has_blob("a", &file.content));
}
