use proptest::prelude::*;

use super::*;

#[test]
fn repository_names() {
    for good in ["a", "a/b", "a__b", "a--b/c.d_e", "library/nginx", "0/1"] {
        assert!(good.parse::<RepositoryName>().is_ok(), "{good}");
    }
    let long = "a".repeat(256);
    for bad in [
        "", "/", "a/", "/a", "a//b", "A", "a_", "-a", "a..b", "a___b", "a._b", "a b", "ä", "../a",
        &long,
    ] {
        assert!(bad.parse::<RepositoryName>().is_err(), "{bad}");
    }
}

#[test]
fn tags() {
    for good in ["latest", "_", "1.0-rc.1", "A"] {
        assert!(good.parse::<Tag>().is_ok(), "{good}");
    }
    let long = "a".repeat(129);
    for bad in ["", ".a", "-a", "a/b", "a+b", "a:b", "ü", &long] {
        assert!(bad.parse::<Tag>().is_err(), "{bad}");
    }
}

#[test]
fn evidence_tags_name_their_subject() {
    let hex = "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a";
    for suffix in ["", ".sig", ".att", ".sbom"] {
        let tag: Tag = format!("sha256-{hex}{suffix}").parse().unwrap();
        assert_eq!(tag.subject().unwrap().hex(), hex);
    }
    for other in ["latest", "sha256-abc", "sha256-abc.sig"] {
        assert_eq!(other.parse::<Tag>().unwrap().subject(), None);
    }
    assert_eq!(
        format!("sha256-{hex}.txt")
            .parse::<Tag>()
            .unwrap()
            .subject(),
        None
    );
}

#[test]
fn whole_references() {
    let r: Reference = "127.0.0.1:5050/shop/web:v1".parse().unwrap();
    assert_eq!(
        (r.host.as_str(), r.repository.as_str()),
        ("127.0.0.1:5050", "shop/web")
    );
    assert_eq!(r.to_string(), "127.0.0.1:5050/shop/web:v1");
    let r: Reference = "[::1]:5050/a".parse().unwrap();
    assert_eq!(r.tag_or_digest().to_string(), "latest");
    for bad in [
        "nginx",
        "/a",
        "host:0/a",
        "host:99999/a",
        "-h/a",
        "h/A",
        "h/a:b:c",
        "h/a@sha256:1",
    ] {
        assert!(bad.parse::<Reference>().is_err(), "{bad}");
    }
}

#[test]
fn familiar_names() {
    let of = |text: &str| Reference::parse_familiar(text).unwrap().to_string();
    assert_eq!(of("nginx"), "docker.io/library/nginx:latest");
    assert_eq!(of("nginx:1"), "docker.io/library/nginx:1");
    assert_eq!(of("acme/web"), "docker.io/acme/web:latest");
    assert_eq!(of("localhost/web:2"), "localhost/web:2");
    assert_eq!(of("127.0.0.1:5000/web"), "127.0.0.1:5000/web:latest");
}

proptest! {
    #[test]
    fn parsers_never_panic_and_round_trip(text in "\\PC{0,60}") {
        if let Ok(reference) = text.parse::<Reference>() {
            prop_assert_eq!(reference.to_string().parse::<Reference>().unwrap(), reference);
        }
        let _ = Reference::parse_familiar(&text);
        let _ = text.parse::<TagOrDigest>();
    }
}
