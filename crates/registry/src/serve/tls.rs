//! Certificates from files, read again when they change.

use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock};

use rustls::ServerConfig;
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};

use crate::error::{Error, chain};
use crate::serve::stamp::Stamp;
use crate::settings::TlsFiles;

/// The TLS configuration that new connections get.
pub(crate) struct Tls {
    files: TlsFiles,
    current: RwLock<Current>,
}

struct Current {
    /// The files that were looked at last, also when they could not be used.
    seen: Seen,
    config: Arc<ServerConfig>,
}

type Seen = (Option<Stamp>, Option<Stamp>);

impl Tls {
    /// Reads the files for the first time; here a mistake is an error.
    pub(crate) fn load(files: TlsFiles) -> Result<Self, Error> {
        let seen = look(&files);
        let config = read(&files)?;
        Ok(Self {
            files,
            current: RwLock::new(Current { seen, config }),
        })
    }

    /// The configuration for a new connection. Files that changed are read; when they cannot be used
    /// (a renewal is half done), the one before stays and the log says so once.
    pub(crate) fn config(&self) -> Arc<ServerConfig> {
        let seen = look(&self.files);
        {
            let current = self.current.read().unwrap_or_else(PoisonError::into_inner);
            if current.seen == seen {
                return Arc::clone(&current.config);
            }
        }
        let result = read(&self.files);
        let mut current = self.current.write().unwrap_or_else(PoisonError::into_inner);
        current.seen = seen;
        match result {
            Ok(config) => {
                tracing::info!(certificate = %self.files.certificate.display(), "certificate read again");
                current.config = config;
            }
            Err(error) => {
                tracing::warn!(
                    error = chain(&error),
                    "the changed certificate is not used, the one before stays"
                );
            }
        }
        Arc::clone(&current.config)
    }
}

fn look(files: &TlsFiles) -> Seen {
    (Stamp::of(&files.certificate), Stamp::of(&files.key))
}

fn read(files: &TlsFiles) -> Result<Arc<ServerConfig>, Error> {
    let failed = |path: &Path, problem: String| Error::Certificate {
        path: path.to_owned(),
        problem,
    };
    let load = |path: &Path| std::fs::read(path).map_err(|error| failed(path, format!("{error}")));
    let certificates: Vec<CertificateDer<'static>> =
        CertificateDer::pem_slice_iter(&load(&files.certificate)?)
            .collect::<Result<_, _>>()
            .map_err(|error| failed(&files.certificate, error.to_string()))?;
    if certificates.is_empty() {
        return Err(failed(
            &files.certificate,
            "it holds no `CERTIFICATE` in PEM".to_owned(),
        ));
    }
    let key = PrivateKeyDer::from_pem_slice(&load(&files.key)?).map_err(|error| {
        failed(
            &files.key,
            format!("it holds no private key in PEM ({error})"),
        )
    })?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .and_then(|builder| {
            builder
                .with_no_client_auth()
                .with_single_cert(certificates, key)
        })
        .map_err(|error| failed(&files.certificate, error.to_string()))?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}
