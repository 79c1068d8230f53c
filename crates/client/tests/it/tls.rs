use std::sync::Arc;

use client::{Client, Config, Error};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use crate::fake::Fake;
use crate::support::{config, quick};

/// A registry on this machine with a certificate for this name, and the authority that made it.
async fn registry(name: &str) -> (Fake, Vec<u8>) {
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority = params.self_signed(&key).unwrap();
    let issuer = Issuer::new(params, key);
    let key = KeyPair::generate().unwrap();
    let certificate = CertificateParams::new([name.to_owned()])
        .unwrap()
        .signed_by(&key, &issuer)
        .unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let server = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(
            vec![CertificateDer::from(certificate)],
            PrivateKeyDer::try_from(key.serialize_der()).unwrap(),
        )
        .unwrap();
    (Fake::start_tls(server).await, authority.pem().into_bytes())
}

fn client(config: Config) -> Client {
    Client::with_retries(config, quick()).unwrap()
}

#[tokio::test]
async fn an_authority_of_our_own() {
    let (fake, authority) = registry("127.0.0.1").await;
    let with_authority = || Config {
        ca_pem: vec![authority.clone()],
        ..config()
    };
    client(with_authority()).ping(&fake.host).await.unwrap();
    client(Config {
        insecure: true,
        ..config()
    })
    .ping(&fake.host)
    .await
    .unwrap();

    // Not trusted, or not its name: nothing is sent, and trying again would not help.
    fake.state().log.clear();
    let error = client(config()).ping(&fake.host).await.unwrap_err();
    assert!(!error.is_transient(), "{error:?}");
    let (other, other_authority) = registry("other.example.com").await;
    let both = Config {
        ca_pem: vec![authority, other_authority],
        ..config()
    };
    assert!(client(both).ping(&other.host).await.is_err());
    assert!(fake.state().log.is_empty() && other.state().log.is_empty());
}

#[tokio::test]
async fn a_certificate_that_is_not_trusted_does_not_pass_by_itself() {
    let (fake, _) = registry("127.0.0.1").await;
    // By a name that is not loopback's plain HTTP from the start.
    let port = fake.host.rsplit(':').next().unwrap();
    let error = client(config())
        .ping(&format!("0.0.0.0:{port}"))
        .await
        .unwrap_err();
    assert!(matches!(error, Error::Unreachable { .. }), "{error}");
    assert!(!error.is_transient(), "{error:?}");
}

#[test]
fn an_authority_must_be_one() {
    for pem in [
        &b"nothing"[..],
        b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
    ] {
        let config = Config {
            ca_pem: vec![pem.to_vec()],
            ..config()
        };
        assert!(Client::new(config).is_err());
    }
}
