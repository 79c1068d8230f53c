use proptest::prelude::*;

use super::files::within;
use super::*;

#[test]
fn locations() {
    let layout = |path: &str, tag: Option<&str>, digest: Option<&Digest>| Location::Layout {
        path: PathBuf::from(path),
        tag: tag.map(|tag| tag.parse().unwrap()),
        digest: digest.cloned(),
    };
    let digest = Digest::sha256(b"x");
    let check = |text: &str, expected: Location| {
        let location: Location = text.parse().unwrap();
        assert_eq!(location, expected);
        assert_eq!(location.to_string(), text);
    };
    check("oci:dir", layout("dir", None, None));
    check("oci:/a/b:v1", layout("/a/b", Some("v1"), None));
    check("oci:/a:b/c", layout("/a:b/c", None, None));
    check("oci:user@host", layout("user@host", None, None));
    check(&format!("oci:d@{digest}"), layout("d", None, Some(&digest)));
    check(
        &format!("oci:d:v1@{digest}"),
        layout("d", Some("v1"), Some(&digest)),
    );
    let reference: Reference = "h:1/a/b:v1".parse().unwrap();
    check("h:1/a/b:v1", Location::Registry(reference));
    for text in ["oci:", "oci::v1", "oci:d:", "oci:d@sha256:00", "nginx", ""] {
        assert!(text.parse::<Location>().is_err(), "{text}");
    }
}

#[test]
fn arguments() {
    let check = |argument: &str, path: &str, title: &str, kind: &str| {
        let layer = FileLayer::from_argument(argument).unwrap();
        assert_eq!(
            (
                layer.path.to_str().unwrap(),
                layer.title.as_str(),
                layer.media_type.as_str()
            ),
            (path, title, kind)
        );
    };
    let tar = "application/vnd.oci.image.layer.v1.tar";
    check("a.txt", "a.txt", "a.txt", tar);
    check("./d/a.txt:text/plain", "./d/a.txt", "d/a.txt", "text/plain");
    check("/etc/hosts", "/etc/hosts", "hosts", tar);
    check("../a:b", "../a:b", "a:b", tar);
    assert!(FileLayer::from_argument("..").is_err());
}

#[test]
fn names_that_leave_are_refused() {
    for name in [
        "",
        ".",
        "/",
        "/a",
        "..",
        "a/../../b",
        "../a",
        "a/..",
        "a\0b",
        "a\nb",
        "a/",
    ] {
        assert_eq!(within(name), None, "{name:?}");
    }
    assert_eq!(within("./a//b"), Some(PathBuf::from("a/b")));
}

proptest! {
    #[test]
    fn a_name_stays_within(name in "(\\.|\\.\\.|/|a|b c|\\\\|\\u{0}){0,12}") {
        if let Some(path) = within(&name) {
            prop_assert!(path.is_relative());
            prop_assert!(path.components().all(|part| matches!(part, std::path::Component::Normal(_))));
        }
    }

    #[test]
    fn locations_never_panic(text in ".{0,60}") {
        let _ = text.parse::<Location>();
        let _ = format!("oci:{text}").parse::<Location>();
    }
}
