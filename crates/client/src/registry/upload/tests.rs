use std::sync::Mutex;

use proptest::prelude::*;

use super::*;

#[test]
fn locations() {
    let check = |asked: &str, location: &str, expected: Option<&str>| {
        let url = resolve(&Url::parse(asked).unwrap(), location);
        assert_eq!(url.as_ref().map(Url::as_str), expected, "{location}");
    };
    let asked = "https://r.example.com:5000/v2/a/blobs/uploads/";
    check(
        asked,
        "/v2/a/blobs/uploads/1?_state=x%3D",
        Some("https://r.example.com:5000/v2/a/blobs/uploads/1?_state=x%3D"),
    );
    check(
        asked,
        "1",
        Some("https://r.example.com:5000/v2/a/blobs/uploads/1"),
    );
    check(
        asked,
        "https://up.example.com/1",
        Some("https://up.example.com/1"),
    );
    check(
        asked,
        "http://r.example.com/1",
        Some("https://r.example.com:5000/1"),
    );
    check(
        asked,
        "http://other.example.com/1",
        Some("http://other.example.com/1"),
    );
    check(asked, "file:///etc/passwd", None);
    check(
        "http://127.0.0.1:1/",
        "http://127.0.0.1:1/x",
        Some("http://127.0.0.1:1/x"),
    );
}

#[test]
fn the_digest_joins_the_query() {
    let digest = Digest::sha256(b"x");
    let url = with_digest(&Url::parse("http://h/u?_state=a%2Bb").unwrap(), &digest);
    assert_eq!(
        url.query(),
        Some(format!("_state=a%2Bb&digest=sha256%3A{}", digest.hex()).as_str())
    );
}

#[test]
fn ranges_of_uploads() {
    assert_eq!(next_offset("0-499"), Some(500));
    assert_eq!(next_offset("bytes=0-499"), Some(500));
    assert_eq!(next_offset("0-0"), Some(0));
    assert_eq!(next_offset("0--1"), Some(0));
    assert_eq!(next_offset("5-9"), None);
    assert_eq!(next_offset("0-18446744073709551615"), None);
    assert_eq!(next_offset(""), None);
}

#[test]
fn bytes_sent_again_count_once() {
    let total = Mutex::new(0);
    let report = |bytes| *total.lock().unwrap() += bytes;
    let mark = Watermark::new(&report);
    mark.report(0, 10);
    mark.report(5, 10);
    mark.report(0, 3);
    mark.report(15, 1);
    assert_eq!(*total.lock().unwrap(), 16);
}

proptest! {
    #[test]
    fn ranges_never_panic(text in ".{0,40}") {
        next_offset(&text);
    }

    #[test]
    fn ranges_read_back(end in 1_u64..u64::MAX - 1) {
        prop_assert_eq!(next_offset(&format!("0-{end}")), Some(end + 1));
    }

    #[test]
    fn locations_never_leave_the_web(location in ".{0,60}") {
        if let Some(url) = resolve(&Url::parse("https://h:1/v2/").unwrap(), &location) {
            prop_assert!(matches!(url.scheme(), "http" | "https"));
        }
    }
}
