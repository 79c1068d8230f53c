use super::Version;

fn release(major: u64, minor: u64, patch: u64) -> Version {
    Version::Release {
        major,
        minor,
        patch,
    }
}

#[test]
fn versions_are_read_as_programs_print_them() {
    for (text, expected) in [
        ("2.26.1-4", release(2, 26, 1)),
        ("v2.40.3", release(2, 40, 3)),
        ("5.0.2", release(5, 0, 2)),
        ("1.29.2\n", release(1, 29, 2)),
        ("2.29.7-desktop.1", release(2, 29, 7)),
        ("2.8", release(2, 8, 0)),
        ("dev", Version::Development("dev".to_owned())),
        ("", Version::Development(String::new())),
        (
            "99999999999999999999999.1.1",
            Version::Development("99999999999999999999999.1.1".to_owned()),
        ),
    ] {
        assert_eq!(Version::parse(text), expected, "{text}");
    }
    assert_eq!(
        Version::from_json(br#"{"version":"2.26.1-4"}"#),
        Some(release(2, 26, 1))
    );
    assert_eq!(
        Version::from_json(b"docker-compose version 1.29.2, build unknown"),
        None
    );
}

#[test]
fn old_and_broken_versions_are_refused_and_later_majors_are_not() {
    for refused in ["1.29.2", "2.0.0", "2.7.9", "2.30.0"] {
        let refusal = Version::parse(refused).refusal();
        assert!(
            refusal.is_some_and(|text| text.contains("install")),
            "{refused}"
        );
    }
    for accepted in [
        "2.8.0", "2.26.1-4", "2.30.1", "2.40.3", "5.0.2", "6.1", "dev",
    ] {
        assert_eq!(Version::parse(accepted).refusal(), None, "{accepted}");
    }
}
