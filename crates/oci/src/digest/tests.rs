use proptest::prelude::*;

use super::*;

#[test]
fn well_known_digest_of_the_empty_descriptor() {
    assert_eq!(
        Digest::sha256(b"{}").to_string(),
        "sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
    );
}

#[test]
fn refuses_what_is_not_a_digest() {
    for text in [
        "",
        "sha256",
        "sha256:",
        "sha256:abc",
        "md5:d41d8cd98f00b204e9800998ecf8427e",
        "sha256:44136FA355B3678A1146AD16F7E8649E94FB4FC21FE77E8310C060F61CAAFF8A",
        "sha256:zz136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a",
        "sha512:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a",
    ] {
        assert!(text.parse::<Digest>().is_err(), "{text}");
    }
}

proptest! {
    #[test]
    fn text_round_trips(content: Vec<u8>, long: bool) {
        let algorithm = if long { Algorithm::Sha512 } else { Algorithm::Sha256 };
        let digest = Digest::of(algorithm, &content);
        prop_assert_eq!(digest.to_string().parse::<Digest>().unwrap(), digest);
    }

    #[test]
    fn a_stored_state_continues(head: Vec<u8>, tail: Vec<u8>, long: bool) {
        let algorithm = if long { Algorithm::Sha512 } else { Algorithm::Sha256 };
        let mut first = Hasher::new(algorithm);
        first.update(&head);
        let mut second = Hasher::resume(algorithm, &first.state()).unwrap();
        second.update(&tail);
        prop_assert_eq!(second.finish(), Digest::of(algorithm, &[head, tail].concat()));
    }

    #[test]
    fn parser_never_panics(text in "\\PC*") {
        let _ = text.parse::<Digest>();
    }
}
