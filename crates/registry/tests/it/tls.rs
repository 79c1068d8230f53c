use std::path::Path;
use std::sync::{Arc, Mutex};

use registry::TlsFiles;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use tokio::io::{AsyncWriteExt as _, BufReader};
use tokio_rustls::TlsConnector;

use crate::harness::{Registry, Reply, read_reply, request};
use crate::place::Place;

const ONE: (&str, &str) = (include_str!("data/one.crt"), include_str!("data/one.key"));
const TWO: (&str, &str) = (include_str!("data/two.crt"), include_str!("data/two.key"));

/// Takes every certificate and remembers it.
#[derive(Debug, Default)]
struct Seen(Mutex<Vec<u8>>);

impl ServerCertVerifier for Seen {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        *self.0.lock().unwrap() = end_entity.to_vec();
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        rustls::crypto::aws_lc_rs::default_provider()
            .signature_verification_algorithms
            .supported_schemes()
    }
}

/// One request over TLS: the answer and the certificate.
async fn over_tls(registry: &Registry, bytes: &[u8]) -> (Reply, Vec<u8>) {
    let seen = Arc::new(Seen::default());
    let verifier: Arc<dyn ServerCertVerifier> = Arc::clone(&seen) as _;
    let mut config = rustls::ClientConfig::builder_with_provider(Arc::new(
        rustls::crypto::aws_lc_rs::default_provider(),
    ))
    .with_safe_default_protocol_versions()
    .unwrap()
    .dangerous()
    .with_custom_certificate_verifier(verifier)
    .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    let name = ServerName::try_from("localhost").unwrap();
    let mut stream = TlsConnector::from(Arc::new(config))
        .connect(name, registry.connect().await)
        .await
        .unwrap();
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"http/1.1"[..]));
    stream.write_all(bytes).await.unwrap();
    let reply = read_reply(&mut BufReader::new(stream), false).await;
    let certificate = seen.0.lock().unwrap().clone();
    (reply, certificate)
}

fn write(dir: &Path, (certificate, key): (&str, &str)) {
    std::fs::write(dir.join("crt"), certificate).unwrap();
    std::fs::write(dir.join("key"), key).unwrap();
}

#[tokio::test]
async fn certificates_are_read_again_and_broken_ones_are_not_used() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), ONE);
    let files = TlsFiles {
        certificate: dir.path().join("crt"),
        key: dir.path().join("key"),
    };
    let registry = Registry::users(|settings| settings.tls = Some(files)).await;
    let ping = request("GET /v2/", &[], b"");
    let (reply, first) = over_tls(&registry, &ping).await;
    let realm = reply
        .refused(401, "UNAUTHORIZED")
        .header("www-authenticate")
        .to_owned();
    assert!(
        realm.contains("realm=\"https://localhost/v2/token\""),
        "{realm}"
    );
    std::fs::write(dir.path().join("crt"), TWO.0).unwrap();
    assert_eq!(
        over_tls(&registry, &ping).await.1,
        first,
        "the key does not fit yet"
    );
    write(dir.path(), TWO);
    let second = over_tls(&registry, &ping).await.1;
    assert_ne!(second, first);
    std::fs::write(dir.path().join("key"), "broken").unwrap();
    assert_eq!(over_tls(&registry, &ping).await.1, second);
}

#[tokio::test]
async fn a_large_blob_over_tls() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), ONE);
    let files = TlsFiles {
        certificate: dir.path().join("crt"),
        key: dir.path().join("key"),
    };
    let registry = Registry::set(|settings| settings.tls = Some(files)).await;
    let content: Vec<u8> = (0..3_000_000u32).map(|n| (n % 253) as u8).collect();
    let digest = oci::Digest::sha256(&content);
    let line = format!("POST /v2/a/blobs/uploads/?digest={digest}");
    over_tls(&registry, &request(&line, &[], &content))
        .await
        .0
        .expect(201);
    let reply = over_tls(
        &registry,
        &request(&format!("GET /v2/a/blobs/{digest}"), &[], b""),
    )
    .await
    .0
    .expect(200);
    assert_eq!(reply.body, content);
}

#[tokio::test]
async fn bad_files_are_named_at_start() {
    let dir = tempfile::tempdir().unwrap();
    let place = Place::new(dir.path());
    let store = place.open(store::Options::default()).await;
    let files = TlsFiles {
        certificate: dir.path().join("crt"),
        key: dir.path().join("key"),
    };
    for (certificate, key) in [("", ONE.1), (ONE.0, ""), (ONE.0, TWO.1)] {
        write(dir.path(), (certificate, key));
        let settings = registry::Settings {
            listen: vec![([127, 0, 0, 1], 0).into()],
            tls: Some(files.clone()),
            ..registry::Settings::default()
        };
        let error = registry::Server::bind(settings, store.clone())
            .await
            .unwrap_err();
        assert!(
            matches!(error, registry::Error::Certificate { .. }),
            "{error}"
        );
    }
}
