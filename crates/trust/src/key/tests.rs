use proptest::prelude::*;

use super::*;

const KEY: &str = include_str!("../../testdata/cosign.key");
const PUB: &str = include_str!("../../testdata/cosign.pub");

/// Counts up, so that a test has other bytes each time and the same in every run.
fn counter(start: u8) -> impl FnMut(&mut [u8]) {
    let mut next = start;
    move |buffer| {
        for byte in buffer {
            *byte = next;
            next = next.wrapping_add(1);
        }
    }
}

#[test]
fn reads_what_cosign_wrote() {
    let private = PrivateKey::from_encrypted_pem(KEY, b"secret").unwrap();
    let public = PublicKey::from_pem(PUB).unwrap();
    assert_eq!(private.public(), public);
    assert_eq!(public.to_pem(), PUB);
    assert_eq!(
        public.hint(),
        "gp8LkrgB+NOf1WAI9U08jgk66TElwz+1nuKSVNfO9Zc="
    );
    assert_eq!(
        public.id(),
        "sha256:829f0b92b801f8d39fd56008f54d3c8e093ae93125c33fb59ee29254d7cef597"
    );
    let signature = private.sign(b"message").unwrap();
    assert!(public.verifies(b"message", &signature));
    assert!(!public.verifies(b"massage", &signature));
    assert!(!public.verifies(b"message", &signature[1..]));
}

#[test]
fn writes_what_cosign_reads() {
    let key = PrivateKey::generate(&mut counter(1));
    let text = key.to_encrypted_pem(b"pass", &mut counter(7));
    assert!(text.starts_with("-----BEGIN ENCRYPTED SIGSTORE PRIVATE KEY-----\n"));
    assert!(text.lines().all(|line| line.len() <= 64));
    let json: serde_json::Value = serde_json::from_slice(&pem::decode(&text).unwrap().1).unwrap();
    assert_eq!(
        json["kdf"]["params"],
        serde_json::json!({"N": 65536, "r": 8, "p": 1})
    );
    let back = PrivateKey::from_encrypted_pem(&text, b"pass").unwrap();
    assert_eq!(back.public(), key.public());
    assert!(matches!(
        PrivateKey::from_encrypted_pem(&text, b"word"),
        Err(Error::WrongPassword)
    ));
    let old = text.replace("SIGSTORE", "COSIGN");
    assert!(PrivateKey::from_encrypted_pem(&old, b"pass").is_ok());
}

#[test]
fn generating_draws_again_until_the_bytes_fit() {
    let mut calls = 0;
    let key = PrivateKey::generate(&mut |buffer| {
        calls += 1;
        // Zero and values beyond the order are no scalars.
        buffer.fill([0, 0xff, 1][calls - 1]);
    });
    assert_eq!(calls, 3);
    assert!(!format!("{key:?}").contains("0101"));
}

#[test]
fn other_files_are_refused_by_name() {
    let public = |text: &str| PublicKey::from_pem(text).unwrap_err().to_string();
    assert!(public(KEY).contains("ENCRYPTED SIGSTORE PRIVATE KEY"));
    assert!(public("hello").contains("not a PEM file"));
    assert!(public(&"x".repeat(100_000)).contains("too large"));
    // Ed25519.
    let ed25519 = "-----BEGIN PUBLIC KEY-----\n\
        MCowBQYDK2VwAyEAGb9ECWmEzf6FQbrBZ9w7lshQhqowtrbLDFw4rXAxZuE=\n\
        -----END PUBLIC KEY-----\n";
    assert!(public(ed25519).contains("P-256"));
    let private = |text: &str| {
        PrivateKey::from_encrypted_pem(text, b"secret")
            .unwrap_err()
            .to_string()
    };
    assert!(private(PUB).contains("PUBLIC KEY"));
    let plain = pem::encode("PRIVATE KEY", b"x");
    assert!(private(&plain).contains("not encrypted"));
    assert!(private(&pem::encode(ENCRYPTED, b"{}")).contains("damaged"));
}

#[test]
fn a_file_cannot_ask_for_more_work_than_cosign_does() {
    let (_, json) = pem::decode(KEY).unwrap();
    let json = String::from_utf8(json.to_vec()).unwrap();
    for (from, to) in [
        ("\"N\":65536", "\"N\":1073741824"),
        ("\"N\":65536", "\"N\":16384"),
        ("\"N\":65536", "\"N\":65537"),
        ("\"r\":8", "\"r\":8000"),
        ("\"p\":1", "\"p\":1000"),
        ("\"scrypt\"", "\"argon2\""),
        ("nacl/secretbox", "aes"),
    ] {
        assert!(json.contains(from));
        let changed = pem::encode(ENCRYPTED, json.replace(from, to).as_bytes());
        let error = PrivateKey::from_encrypted_pem(&changed, b"secret").unwrap_err();
        assert!(error.to_string().contains("other settings"), "{error}");
    }
}

proptest! {
    #[test]
    fn foreign_text_never_panics(text in "\\PC*", label in "[A-Z ]{0,20}", body: Vec<u8>) {
        let _ = PublicKey::from_pem(&text);
        let _ = PrivateKey::from_encrypted_pem(&text, b"");
        let _ = PublicKey::from_pem(&pem::encode(&label, &body));
        let _ = PublicKey::from_pem(&pem::encode(PUBLIC, &body));
        let _ = PrivateKey::from_encrypted_pem(&pem::encode(ENCRYPTED, &body), b"");
    }

    #[test]
    fn foreign_signatures_never_panic(message: Vec<u8>, signature: Vec<u8>) {
        let key = PublicKey::from_pem(PUB).unwrap();
        assert!(!key.verifies(&message, &signature));
    }
}
