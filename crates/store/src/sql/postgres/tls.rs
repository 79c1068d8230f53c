//! TLS to the database with the modes of libpq.
//!
//! `require` takes any certificate, as libpq does; what then protects the password is channel binding, which ties the
//! SCRAM exchange to the certificate that was seen.

use std::future::Future;
use std::io;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{verify_server_cert_signed_by_trust_anchor, verify_server_name};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::server::ParsedCertificate;
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use sha2::{Digest as _, Sha256, Sha384, Sha512};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_postgres::Socket;
use tokio_postgres::tls::{ChannelBinding, MakeTlsConnect, TlsConnect};

use super::settings::{Roots, Settings, Verify};
use crate::error::Error;

/// Makes TLS sessions as the connection string asks for.
#[derive(Clone)]
pub(super) struct Connector(Option<Arc<ClientConfig>>);

impl Connector {
    /// Reads the certificates that the settings name.
    pub(super) fn new(settings: &Settings) -> Result<Self, Error> {
        if settings.verify == Verify::Disable {
            return Ok(Self(None));
        }
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let verifier = Arc::new(Verifier {
            trust: match settings.verify {
                Verify::Ca => Some(Trust::read(&settings.roots, false)?),
                Verify::Full => Some(Trust::read(&settings.roots, true)?),
                Verify::Disable | Verify::Prefer | Verify::Require => None,
            },
            provider: Arc::clone(&provider),
        });
        let builder = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| unusable(&error))?
            .dangerous()
            .with_custom_certificate_verifier(verifier);
        let mut config = match &settings.identity {
            None => builder.with_no_client_auth(),
            Some((certificate, key)) => {
                let key = PrivateKeyDer::from_pem_file(key)
                    .map_err(|error| unreadable("sslkey", key, &error))?;
                builder
                    .with_client_auth_cert(certificates("sslcert", certificate)?, key)
                    .map_err(|error| unusable(&error))?
            }
        };
        // What a server that begins with TLS at once asks for.
        config.alpn_protocols = vec![b"postgresql".to_vec()];
        Ok(Self(Some(Arc::new(config))))
    }
}

impl MakeTlsConnect<Socket> for Connector {
    type Stream = Stream;
    type TlsConnect = Handshake;
    type Error = io::Error;

    fn make_tls_connect(&mut self, domain: &str) -> io::Result<Handshake> {
        Ok(Handshake {
            config: self.0.clone(),
            name: ServerName::try_from(domain.to_owned()).ok(),
        })
    }
}

/// One handshake to come.
pub(super) struct Handshake {
    config: Option<Arc<ClientConfig>>,
    name: Option<ServerName<'static>>,
}

impl TlsConnect<Socket> for Handshake {
    type Stream = Stream;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Stream>> + Send>>;

    fn connect(self, socket: Socket) -> Self::Future {
        Box::pin(async move {
            let config = self
                .config
                .ok_or_else(|| io::Error::other("TLS is switched off"))?;
            let name = self
                .name
                .ok_or_else(|| io::Error::other("the host's name cannot be checked"))?;
            let stream = tokio_rustls::TlsConnector::from(config)
                .connect(name, socket)
                .await?;
            Ok(Stream(Box::new(stream)))
        })
    }
}

/// A connection in TLS.
pub(super) struct Stream(Box<tokio_rustls::client::TlsStream<Socket>>);

impl tokio_postgres::tls::TlsStream for Stream {
    fn channel_binding(&self) -> ChannelBinding {
        let certificates = self.0.get_ref().1.peer_certificates();
        match certificates
            .and_then(<[_]>::first)
            .and_then(|first| end_point(first))
        {
            Some(hash) => ChannelBinding::tls_server_end_point(hash),
            None => ChannelBinding::none(),
        }
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

/// Judges the server's certificate. Without trust any certificate will do.
#[derive(Debug)]
struct Verifier {
    trust: Option<Trust>,
    provider: Arc<CryptoProvider>,
}

#[derive(Debug)]
struct Trust {
    roots: RootCertStore,
    /// Certificates of the file itself: a server may show one of them as its own.
    pinned: Vec<CertificateDer<'static>>,
    name_too: bool,
}

impl Trust {
    fn read(roots: &Roots, name_too: bool) -> Result<Self, Error> {
        let mut store = RootCertStore::empty();
        let mut pinned = Vec::new();
        match roots {
            Roots::System => {
                store.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
            }
            Roots::File(path) => {
                pinned = certificates("sslrootcert", path)?;
                store.add_parsable_certificates(pinned.iter().cloned());
            }
        }
        if store.is_empty() && pinned.is_empty() {
            return Err(Error::Database(
                "there are no trusted certificates to check the server's with, set `sslrootcert`"
                    .to_owned(),
            ));
        }
        Ok(Self {
            roots: store,
            pinned,
            name_too,
        })
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let Some(trust) = &self.trust else {
            return Ok(ServerCertVerified::assertion());
        };
        let parsed = ParsedCertificate::try_from(certificate)?;
        if !trust.pinned.contains(certificate) {
            verify_server_cert_signed_by_trust_anchor(
                &parsed,
                &trust.roots,
                intermediates,
                now,
                self.provider.signature_verification_algorithms.all,
            )?;
        }
        if trust.name_too {
            verify_server_name(&parsed, name)?;
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls12_signature(message, certificate, signed, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signed, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider
            .signature_verification_algorithms
            .supported_schemes()
    }
}

/// The channel binding `tls-server-end-point` (RFC 5929 § 4.1): the certificate's hash by the algorithm of its
/// signature, and SHA-256 where that is older. `None` where the signature names no hash.
fn end_point(certificate: &[u8]) -> Option<Vec<u8>> {
    // Certificate ::= SEQUENCE { tbsCertificate, signatureAlgorithm SEQUENCE { OBJECT IDENTIFIER … }, … }
    let (whole, _) = element(certificate, SEQUENCE)?;
    let (_, rest) = element(whole, SEQUENCE)?;
    let (algorithm, _) = element(rest, SEQUENCE)?;
    let (name, _) = element(algorithm, OBJECT_IDENTIFIER)?;
    Some(match hex::encode(name).as_str() {
        // md5, sha1, sha224, sha256 WithRSAEncryption; ecdsa-with-SHA1, SHA224, SHA256.
        "2a864886f70d010104" | "2a864886f70d010105" | "2a864886f70d01010e"
        | "2a864886f70d01010b" | "2a8648ce3d0401" | "2a8648ce3d040301" | "2a8648ce3d040302" => {
            Sha256::digest(certificate).to_vec()
        }
        "2a864886f70d01010c" | "2a8648ce3d040303" => Sha384::digest(certificate).to_vec(),
        "2a864886f70d01010d" | "2a8648ce3d040304" => Sha512::digest(certificate).to_vec(),
        _ => return None,
    })
}

/// The content of the first DER element, which must have this tag, and what follows it.
fn element(bytes: &[u8], tag: u8) -> Option<(&[u8], &[u8])> {
    let (found, rest) = bytes.split_first()?;
    let (first, rest) = rest.split_first()?;
    let (length, rest) = if *first < 0x80 {
        (usize::from(*first), rest)
    } else {
        let (digits, rest) = rest.split_at_checked(usize::from(first & 0x7f))?;
        let length = digits.iter().try_fold(0_usize, |length, byte| {
            length.checked_mul(256)?.checked_add(usize::from(*byte))
        })?;
        (length, rest)
    };
    (*found == tag).then_some(())?;
    rest.split_at_checked(length)
}

fn certificates(key: &str, path: &Path) -> Result<Vec<CertificateDer<'static>>, Error> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect)
        .map_err(|error| unreadable(key, path, &error));
    let found = found?;
    if found.is_empty() {
        return Err(Error::Database(format!(
            "`{key}`: `{}` holds no certificate",
            path.display()
        )));
    }
    Ok(found)
}

fn unreadable(key: &str, path: &Path, error: &rustls_pki_types::pem::Error) -> Error {
    Error::Database(format!(
        "`{key}`: cannot read `{}`: {error}",
        path.display()
    ))
}

fn unusable(error: &rustls::Error) -> Error {
    Error::Database(format!("TLS to the database cannot be set up: {error}"))
}

/// A certificate and its key, by their files.
pub(super) type Identity = (PathBuf, PathBuf);

const SEQUENCE: u8 = 0x30;
const OBJECT_IDENTIFIER: u8 = 0x06;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn foreign_bytes_are_no_certificate() {
        for bytes in [
            &b""[..],
            b"\x30",
            b"\x30\x89\xff\xff\xff\xff\xff\xff\xff\xff\xff",
            b"\x30\x02\x30",
            b"\x02\x01\x00",
            b"\x30\x04\x30\x00\x30\x00",
        ] {
            assert_eq!(end_point(bytes), None);
        }
    }

    #[test]
    fn the_end_point_follows_the_signature() {
        let certificate = |oid: &str| {
            let oid = hex::decode(oid).unwrap();
            let mut algorithm = vec![OBJECT_IDENTIFIER, u8::try_from(oid.len()).unwrap()];
            algorithm.extend(oid);
            let mut inner = vec![
                SEQUENCE,
                0,
                SEQUENCE,
                u8::try_from(algorithm.len()).unwrap(),
            ];
            inner.extend(algorithm);
            let mut whole = vec![SEQUENCE, 0x81, u8::try_from(inner.len()).unwrap()];
            whole.extend(inner);
            whole
        };
        for (oid, length) in [
            ("2a8648ce3d040302", Some(32)),
            ("2a864886f70d010105", Some(32)),
            ("2a864886f70d01010c", Some(48)),
            ("2a864886f70d01010d", Some(64)),
            ("2b6570", None),
        ] {
            assert_eq!(
                end_point(&certificate(oid)).map(|hash| hash.len()),
                length,
                "{oid}"
            );
        }
    }
}
