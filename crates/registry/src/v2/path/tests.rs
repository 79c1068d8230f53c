use super::*;
use proptest::prelude::*;

const HEX: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

fn name(text: &str) -> RepositoryName {
    text.parse().unwrap()
}

#[test]
fn every_endpoint() {
    let digest: Digest = format!("sha256:{HEX}").parse().unwrap();
    let cases = [
        ("/v2".to_owned(), Route::Base),
        ("/v2/".to_owned(), Route::Base),
        ("/v2/token".to_owned(), Route::Token),
        ("/v2/_catalog".to_owned(), Route::Catalog),
        ("/v2/a/tags/list".to_owned(), Route::Tags(name("a"))),
        (
            "/v2/a/b/c/manifests/v1".to_owned(),
            Route::Manifest(name("a/b/c"), "v1".parse().unwrap()),
        ),
        (
            format!("/v2/a/manifests/sha256:{HEX}"),
            Route::Manifest(name("a"), TagOrDigest::Digest(digest.clone())),
        ),
        (
            format!("/v2/a/blobs/sha256:{HEX}"),
            Route::Blob(name("a"), digest.clone()),
        ),
        (
            format!("/v2/a/blobs/sha256%3A{HEX}"),
            Route::Blob(name("a"), digest.clone()),
        ),
        ("/v2/a/blobs/uploads/".to_owned(), Route::Uploads(name("a"))),
        ("/v2/a/blobs/uploads".to_owned(), Route::Uploads(name("a"))),
        (
            "/v2/a/blobs/uploads/1f-2".to_owned(),
            Route::Upload(name("a"), "1f-2".to_owned()),
        ),
        (
            format!("/v2/a/b/referrers/sha256:{HEX}"),
            Route::Referrers(name("a/b"), digest),
        ),
        // Names made of the words of the grammar.
        (
            "/v2/blobs/uploads/tags/list".to_owned(),
            Route::Tags(name("blobs/uploads")),
        ),
        (
            "/v2/tags/list/manifests/list".to_owned(),
            Route::Manifest(name("tags/list"), "list".parse().unwrap()),
        ),
        (
            "/v2/manifests/tags/list".to_owned(),
            Route::Tags(name("manifests")),
        ),
        (
            "/v2/token/blobs/uploads/".to_owned(),
            Route::Uploads(name("token")),
        ),
    ];
    for (path, expected) in cases {
        assert_eq!(Route::parse(&path), Ok(expected), "{path}");
    }
}

#[test]
fn what_is_refused() {
    for path in [
        "/v2x",
        "/v2/a",
        "/v2/a/b",
        "/v2/a/tags",
        "/v2/a/tags/list/",
        "/v2//",
        "/v2/tags/list",
        "/v2/blobs/uploads/",
        "/v2/_catalog/",
        "/v2/a%2Fb/tags/list",
        "/v2/a%zz/tags/list",
        "/v2/a%/tags/list",
        "/v2/a%ff/tags/list",
        "/v1/",
    ] {
        assert_eq!(Route::parse(path), Err(PathError::Unknown), "{path}");
    }
    for path in [
        "/v2/A/tags/list",
        "/v2/a//b/tags/list",
        "/v2/../tags/list",
        "/v2/a/manifests/.x",
        "/v2/a/manifests/",
    ] {
        assert!(
            matches!(Route::parse(path), Err(PathError::Reference(_))),
            "{path}"
        );
    }
    for path in [
        "/v2/a/blobs/sha256:12",
        "/v2/a/blobs/",
        "/v2/a/referrers/x",
        "/v2/a/blobs/md5:12",
    ] {
        assert!(
            matches!(Route::parse(path), Err(PathError::Digest(_))),
            "{path}"
        );
    }
}

proptest! {
    #[test]
    fn foreign_text_never_panics(path in "\\PC{0,80}") {
        let _ = Route::parse(&path);
        let _ = Route::parse(&format!("/v2/{path}"));
    }

    #[test]
    fn any_name_is_found_again(parts in prop::collection::vec("[a-z0-9]{1,6}|blobs|uploads|tags|list|manifests|referrers", 1..6), tag in "[a-zA-Z0-9_][a-zA-Z0-9._-]{0,20}") {
        let text = parts.join("/");
        let repository = name(&text);
        prop_assert_eq!(Route::parse(&format!("/v2/{text}/manifests/{tag}")), Ok(Route::Manifest(repository.clone(), tag.parse().unwrap())));
        prop_assert_eq!(Route::parse(&format!("/v2/{text}/blobs/sha256:{HEX}")), Ok(Route::Blob(repository.clone(), format!("sha256:{HEX}").parse().unwrap())));
        prop_assert_eq!(Route::parse(&format!("/v2/{text}/blobs/uploads/")), Ok(Route::Uploads(repository.clone())));
        prop_assert_eq!(Route::parse(&format!("/v2/{text}/tags/list")), Ok(Route::Tags(repository)));
    }
}
