use std::fs;

use bytes::Bytes;
use client::Error;
use oci::reference::TagOrDigest;
use oci::{Descriptor, Digest};

use crate::fake::{Fake, answer, bytes, cut};
use crate::support::{noise, repository};

fn names(directory: &tempfile::TempDir) -> Vec<String> {
    fs::read_dir(directory.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect()
}

#[tokio::test]
async fn a_broken_download_goes_on_by_range() {
    let fake = Fake::start().await;
    let content = noise(300_000);
    let descriptor = Descriptor::of("x/y", &content);
    fake.blob("a/b", &content);
    let mut breaks = 2;
    fake.hook(move |asked, state| {
        if asked.method != "GET" || breaks == 0 {
            return None;
        }
        breaks -= 1;
        let content = state.blobs["a/b"].values().next().unwrap().clone();
        let end = content.len();
        Some(match breaks {
            1 => cut(200, &[], end, content.slice(..100_000)),
            _ => cut(
                206,
                &[("content-range", &format!("bytes 100000-{}/{end}", end - 1))],
                end - 100_000,
                content.slice(100_000..170_000),
            ),
        })
    });
    let directory = tempfile::tempdir().unwrap();
    let target = directory.path().join("blob");
    repository(&fake, "a/b")
        .blob_to_file(&descriptor, &target)
        .await
        .unwrap();
    assert_eq!(fs::read(&target).unwrap(), content);
    assert_eq!(names(&directory), ["blob"]);
    let ranges: Vec<_> = fake
        .asked("GET", "/blobs/")
        .iter()
        .map(|a| a.header("range").map(str::to_owned))
        .collect();
    assert_eq!(
        ranges,
        [
            None,
            Some("bytes=100000-".to_owned()),
            Some("bytes=170000-".to_owned())
        ]
    );
}

#[tokio::test]
async fn a_range_that_is_ignored_or_out_of_step_does_no_harm() {
    for out_of_step in [false, true] {
        let fake = Fake::start().await;
        let content = noise(200_000);
        let descriptor = Descriptor::of("x/y", &content);
        fake.blob("a", &content);
        let mut count = 0;
        fake.hook(move |asked, state| {
            if asked.method != "GET" {
                return None;
            }
            count += 1;
            let content = state.blobs["a"].values().next().unwrap().clone();
            match (count, out_of_step) {
                (1, _) => Some(cut(200, &[], content.len(), content.slice(..150_000))),
                (2, false) => Some(bytes(200, &[], content)),
                (2, true) => Some(bytes(
                    206,
                    &[("content-range", "bytes 149000-199999/200000")],
                    content.slice(149_000..),
                )),
                _ => {
                    assert_eq!(asked.header("range"), None);
                    None
                }
            }
        });
        let got = repository(&fake, "a")
            .blob(&descriptor, 1 << 20)
            .await
            .unwrap();
        assert!(got == content);
        assert_eq!(
            fake.asked("GET", "/blobs/").len(),
            if out_of_step { 3 } else { 2 }
        );
    }
}

#[tokio::test]
async fn wrong_content_is_refused_and_leaves_nothing() {
    let fake = Fake::start().await;
    let descriptor = Descriptor::of("x/y", b"right");
    fake.hook(|asked, _| {
        (asked.method == "GET").then(|| bytes(200, &[], Bytes::from_static(b"wrong")))
    });
    let directory = tempfile::tempdir().unwrap();
    let target = directory.path().join("blob");
    fs::write(&target, "before").unwrap();
    let error = repository(&fake, "a")
        .blob_to_file(&descriptor, &target)
        .await
        .unwrap_err();
    assert!(matches!(error, Error::DigestMismatch { .. }), "{error}");
    assert_eq!(fs::read(&target).unwrap(), b"before");
    assert_eq!(names(&directory), ["blob"]);
}

#[tokio::test]
async fn another_length_is_refused_early() {
    let fake = Fake::start().await;
    let descriptor = Descriptor::of("x/y", b"right");
    let stated = |status, length: usize| {
        fake.hook(move |asked, _| {
            (asked.method == "GET").then(|| cut(status, &[], length, Bytes::from_static(b"ri")))
        });
    };
    let repository = repository(&fake, "a");
    for length in [4, 1 << 40] {
        stated(200, length);
        let error = repository.blob(&descriptor, 100).await.unwrap_err();
        assert!(
            matches!(error, Error::SizeMismatch { actual, .. } if actual == length as u64),
            "{error}"
        );
    }
    assert_eq!(
        fake.asked("GET", "/blobs/").len(),
        2,
        "nothing is tried again"
    );
    // Without a stated length it is found out on the way.
    fake.hook(|_, _| {
        let frames = (0..1000).map(|_| Ok(hyper::body::Frame::data(Bytes::from_static(b"right"))));
        let body = http_body_util::StreamBody::new(futures_util::stream::iter(frames));
        Some(hyper::Response::new(http_body_util::BodyExt::boxed(body)))
    });
    let error = repository.blob(&descriptor, 100).await.unwrap_err();
    assert!(matches!(error, Error::SizeMismatch { .. }), "{error}");
    let error = repository.blob(&descriptor, 4).await.unwrap_err();
    assert!(error.to_string().contains("more than the 4"), "{error}");
}

#[tokio::test]
async fn a_registry_that_never_ends_a_blob_is_given_up() {
    let fake = Fake::start().await;
    let descriptor = Descriptor::of("x/y", b"right");
    fake.hook(|asked, _| (asked.method == "GET").then(|| cut(200, &[], 5, Bytes::new())));
    let error = repository(&fake, "a")
        .blob(&descriptor, 100)
        .await
        .unwrap_err();
    assert!(error.is_transient(), "{error}");
    assert_eq!(fake.asked("GET", "/blobs/").len(), 4);
}

#[tokio::test]
async fn passing_failures_are_repeated() {
    let fake = Fake::start().await;
    fake.blob("a", b"x");
    let digest = Digest::sha256(b"x");
    let mut answers = vec![
        answer(500, &[], ""),
        answer(429, &[("retry-after", "0")], ""),
        answer(503, &[], ""),
    ];
    fake.hook(move |_, _| answers.pop());
    let repository = repository(&fake, "a");
    assert_eq!(repository.head_blob(&digest).await.unwrap(), Some(1));
    assert_eq!(fake.asked("HEAD", "").len(), 4);

    fake.hook(|_, _| {
        Some(answer(
            429,
            &[("retry-after", "3600")],
            r#"{"errors":[{"code":"TOOMANYREQUESTS","message":"slow down"}]}"#,
        ))
    });
    let error = repository.tags().await.unwrap_err();
    assert!(error.is_transient());
    assert!(
        matches!(&error, Error::Status { status: 429, code, .. } if code == "TOOMANYREQUESTS"),
        "{error:?}"
    );
    assert_eq!(
        error.to_string(),
        format!("`{}` answered 429 to GET of `a`: slow down", fake.host)
    );
    assert_eq!(
        fake.asked("GET", "/tags/").len(),
        1,
        "an hour is not waited"
    );

    fake.hook(|_, _| Some(answer(400, &[], "no")));
    assert!(!repository.tags().await.unwrap_err().is_transient());
    assert_eq!(fake.asked("GET", "/tags/").len(), 2);
}

#[tokio::test]
async fn nobody_there() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let host = listener.local_addr().unwrap().to_string();
    drop(listener);
    let error = crate::support::client().ping(&host).await.unwrap_err();
    assert!(matches!(error, Error::Unreachable { .. }), "{error}");
    assert!(error.is_transient());
}

#[tokio::test]
async fn manifests_are_what_they_were_asked_by() {
    let fake = Fake::start().await;
    let repository = repository(&fake, "a");
    let body = Bytes::from_static(br#"{"schemaVersion":2,  "config":{"mediaType":"x","digest":"sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a","size":2},"layers":[]}"#);
    let tag = TagOrDigest::Tag("v1".parse().unwrap());
    let digest = repository
        .put_manifest(&tag, oci::media_type::OCI_MANIFEST, body.clone())
        .await
        .unwrap();
    assert_eq!(digest, Digest::sha256(&body));
    let fetched = repository.manifest(&tag).await.unwrap().unwrap();
    assert_eq!(fetched.body, body);
    assert_eq!(
        repository.head_manifest(&tag).await.unwrap(),
        Some(fetched.descriptor.clone())
    );
    let other = TagOrDigest::Tag("other".parse().unwrap());
    assert!(repository.manifest(&other).await.unwrap().is_none());
    assert!(repository.head_manifest(&other).await.unwrap().is_none());
    repository
        .tag(&tag, &"other".parse().unwrap())
        .await
        .unwrap();
    assert_eq!(repository.tags().await.unwrap(), ["other", "v1"]);
    assert_eq!(fake.manifest("a", "other"), Some(body.clone()));

    let wrong = TagOrDigest::Digest(Digest::sha256(b"else"));
    let error = repository
        .put_manifest(&wrong, oci::media_type::OCI_MANIFEST, body.clone())
        .await
        .unwrap_err();
    assert!(matches!(error, Error::DigestMismatch { .. }), "{error}");
    fake.hook(|_, _| {
        Some(answer(
            200,
            &[("content-type", oci::media_type::OCI_MANIFEST)],
            "{}",
        ))
    });
    let error = repository
        .manifest(&TagOrDigest::Digest(digest.clone()))
        .await
        .unwrap_err();
    assert!(matches!(error, Error::DigestMismatch { .. }), "{error}");
    fake.hook(move |_, _| {
        Some(answer(
            200,
            &[("docker-content-digest", &digest.to_string())],
            "{}",
        ))
    });
    let error = repository.manifest(&tag).await.unwrap_err();
    assert!(matches!(error, Error::DigestMismatch { .. }), "{error}");
}

#[tokio::test]
async fn a_head_without_digest_asks_for_the_manifest() {
    let fake = Fake::start().await;
    let body = br#"{"schemaVersion":2,"manifests":[]}"#;
    fake.hook(|asked, _| {
        Some(match asked.method.as_str() {
            "HEAD" => answer(200, &[], ""),
            _ => answer(
                200,
                &[("content-type", "application/json")],
                r#"{"schemaVersion":2,"manifests":[]}"#,
            ),
        })
    });
    let head = repository(&fake, "a")
        .head_manifest(&TagOrDigest::Tag("v1".parse().unwrap()))
        .await
        .unwrap();
    assert_eq!(head, Some(Descriptor::of(oci::media_type::OCI_INDEX, body)));
}

#[tokio::test]
async fn lists_have_pages_on_their_own_host() {
    let fake = Fake::start().await;
    fake.hook(|asked, _| {
        Some(match asked.query.as_str() {
            "n=1000" => answer(
                200,
                &[("link", "</v2/a/tags/list?last=b&n=2>; rel=\"next\"")],
                r#"{"tags":["a","b"]}"#,
            ),
            "last=b&n=2" => answer(200, &[], r#"{"tags":null}"#),
            other => panic!("{other}"),
        })
    });
    let repository = repository(&fake, "a");
    assert_eq!(repository.tags().await.unwrap(), ["a", "b"]);
    fake.hook(|_, _| {
        Some(answer(
            200,
            &[("link", "<http://evil.example.com/>; rel=next")],
            r#"{"repositories":["a"]}"#,
        ))
    });
    let error = repository
        .client()
        .catalog(&fake.host)
        .await
        .unwrap_err()
        .to_string();
    assert!(error.contains("another host"), "{error}");
    fake.hook(|_, _| Some(crate::fake::missing()));
    let error = repository.client().catalog(&fake.host).await.unwrap_err();
    assert!(matches!(error, Error::Unsupported(_)), "{error}");
}
