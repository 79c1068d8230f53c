//! Keys: ECDSA P-256, in the files that cosign writes and reads.

use std::fmt;

use crypto_secretbox::aead::{Aead as _, KeyInit as _};
use crypto_secretbox::{Nonce, XSalsa20Poly1305};
use p256::SecretKey;
use p256::ecdsa::signature::{Signer as _, Verifier as _};
use p256::ecdsa::{DerSignature, SigningKey, VerifyingKey};
use p256::pkcs8::{
    DecodePrivateKey as _, DecodePublicKey as _, EncodePrivateKey as _, EncodePublicKey as _,
};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use zeroize::Zeroizing;

use crate::sign::Signer;
use crate::{Error, base64, pem};

/// A public key (P-256).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PublicKey {
    key: VerifyingKey,
    /// SubjectPublicKeyInfo in DER, made once so that it cannot fail later.
    spki: Vec<u8>,
}

impl PublicKey {
    /// Reads an SPKI PEM file (`cosign.pub`).
    ///
    /// # Errors
    /// [`Error::Invalid`] when it is another file or a key of another kind.
    pub fn from_pem(text: &str) -> Result<Self, Error> {
        let (label, der) = pem::decode(text)?;
        if label != PUBLIC {
            return Err(Error::invalid(format!(
                "this file holds `{}`, a public key file holds `{PUBLIC}`",
                printable(label)
            )));
        }
        let key = VerifyingKey::from_public_key_der(&der).map_err(|_| {
            Error::invalid("this is not an ECDSA P-256 public key, the one kind that is supported")
        })?;
        Self::new(key)
    }

    /// Gives it as SPKI PEM.
    pub fn to_pem(&self) -> String {
        pem::encode(PUBLIC, &self.spki)
    }

    /// base64(SHA-256(SPKI DER)), the hint by which a bundle names its key.
    pub fn hint(&self) -> String {
        base64::encode(&Sha256::digest(&self.spki))
    }

    /// `sha256:` and the hexadecimal SHA-256 of the SPKI DER, which names the key in verdicts and
    /// messages.
    pub fn id(&self) -> String {
        format!("sha256:{}", hex::encode(Sha256::digest(&self.spki)))
    }

    /// Tells whether `signature` (ASN.1 DER, ECDSA with SHA-256) is of this key over `message`.
    /// A signature that cannot be read is not.
    pub fn verifies(&self, message: &[u8], signature: &[u8]) -> bool {
        DerSignature::from_bytes(signature)
            .is_ok_and(|signature| self.key.verify(message, &signature).is_ok())
    }

    fn new(key: VerifyingKey) -> Result<Self, Error> {
        let spki = key
            .to_public_key_der()
            .map_err(|_| Error::invalid("the public key cannot be encoded"))?
            .into_vec();
        Ok(Self { key, spki })
    }
}

/// A private key in memory, wiped when dropped.
pub struct PrivateKey {
    secret: SecretKey,
    public: PublicKey,
}

impl PrivateKey {
    /// Makes a key out of random bytes; `random` fills a buffer and is called again until the bytes
    /// fit the curve, which is all but always at once.
    pub fn generate(random: &mut dyn FnMut(&mut [u8])) -> Self {
        loop {
            let mut bytes = Zeroizing::new([0; 32]);
            random(bytes.as_mut_slice());
            if let Ok(secret) = SecretKey::from_slice(bytes.as_slice())
                && let Ok(key) = Self::new(secret)
            {
                return key;
            }
        }
    }

    /// Decrypts a `cosign.key` file.
    ///
    /// # Errors
    /// [`Error::WrongPassword`]; [`Error::Invalid`] when it is another file, an unencrypted key, a
    /// key of another kind, or asks for more work than cosign's own settings.
    pub fn from_encrypted_pem(text: &str, password: &[u8]) -> Result<Self, Error> {
        let (label, content) = pem::decode(text)?;
        match label {
            ENCRYPTED | ENCRYPTED_OLD => {}
            "PRIVATE KEY" | "EC PRIVATE KEY" => {
                return Err(Error::invalid(
                    "this private key is not encrypted, make one with `longshore key generate`",
                ));
            }
            other => {
                return Err(Error::invalid(format!(
                    "this file holds `{}`, a private key file holds `{ENCRYPTED}`",
                    printable(other)
                )));
            }
        }
        let file: Encrypted = serde_json::from_slice(&content)
            .map_err(|_| Error::invalid("the encrypted private key is damaged"))?;
        let log_n = LOG_N
            .clone()
            .find(|log_n| 1_u64 << log_n == file.kdf.params.n)
            .filter(|_| file.kdf.params.r == R && file.kdf.params.p == P)
            .filter(|_| file.kdf.name == KDF && file.cipher.name == CIPHER)
            .ok_or_else(|| {
                Error::invalid(
                    "the private key is encrypted with other settings than cosign's \
                     (scrypt N 32768, 65536 or 131072, r 8, p 1; nacl/secretbox)",
                )
            })?;
        let damaged = || Error::invalid("the encrypted private key is damaged");
        let salt = base64::decode(&file.kdf.salt).ok_or_else(damaged)?;
        let nonce = base64::decode(&file.cipher.nonce).ok_or_else(damaged)?;
        let nonce: [u8; 24] = nonce.try_into().map_err(|_| damaged())?;
        let ciphertext = base64::decode(&file.ciphertext).ok_or_else(damaged)?;
        let der = secretbox(password, &salt, log_n)?
            .decrypt(&Nonce::from(nonce), ciphertext.as_slice())
            .map_err(|_| Error::WrongPassword)?;
        let der = Zeroizing::new(der);
        let secret = SecretKey::from_pkcs8_der(&der).map_err(|_| {
            Error::invalid("this is not an ECDSA P-256 private key, the one kind that is supported")
        })?;
        Self::new(secret)
    }

    /// Encrypts it in cosign's format: scrypt with N 65536, r 8, p 1 and nacl/secretbox.
    #[expect(
        clippy::expect_used,
        reason = "no input of the caller can make these encoders fail"
    )]
    pub fn to_encrypted_pem(&self, password: &[u8], random: &mut dyn FnMut(&mut [u8])) -> String {
        let mut salt = [0; 32];
        let mut nonce = [0; 24];
        random(&mut salt);
        random(&mut nonce);
        // Invariant: a P-256 key has a PKCS#8 form, and a box of 138 bytes fits in memory.
        let der = self.secret.to_pkcs8_der().expect("a P-256 key encodes");
        let ciphertext = secretbox(password, &salt, DEFAULT_LOG_N)
            .expect("cosign's own settings are valid")
            .encrypt(&Nonce::from(nonce), der.as_bytes())
            .expect("a short message is encrypted");
        let file = Encrypted {
            kdf: Kdf {
                name: KDF.to_owned(),
                params: Params {
                    n: 1 << DEFAULT_LOG_N,
                    r: R,
                    p: P,
                },
                salt: base64::encode(&salt),
            },
            cipher: Cipher {
                name: CIPHER.to_owned(),
                nonce: base64::encode(&nonce),
            },
            ciphertext: base64::encode(&ciphertext),
        };
        // Invariant: a struct of text and numbers always serialises.
        let json = serde_json::to_vec(&file).expect("plain data serialises");
        pem::encode(ENCRYPTED, &json)
    }

    /// The public half.
    pub fn public(&self) -> PublicKey {
        self.public.clone()
    }

    fn new(secret: SecretKey) -> Result<Self, Error> {
        let public = PublicKey::new(*SigningKey::from(&secret).verifying_key())?;
        Ok(Self { secret, public })
    }
}

impl Signer for PrivateKey {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, Error> {
        let key = SigningKey::from(&self.secret);
        let signature: DerSignature = key
            .try_sign(message)
            .map_err(|_| Error::invalid("the private key cannot sign"))?;
        Ok(signature.as_bytes().to_vec())
    }

    fn public_key(&self) -> PublicKey {
        self.public()
    }
}

impl fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PrivateKey")
            .field("public", &self.public.id())
            .finish_non_exhaustive()
    }
}

/// The file's content, fields in the order in which cosign writes them.
#[derive(Serialize, Deserialize)]
struct Encrypted {
    kdf: Kdf,
    cipher: Cipher,
    ciphertext: String,
}

#[derive(Serialize, Deserialize)]
struct Kdf {
    name: String,
    params: Params,
    salt: String,
}

#[derive(Serialize, Deserialize)]
struct Params {
    #[serde(rename = "N")]
    n: u64,
    r: u32,
    p: u32,
}

#[derive(Serialize, Deserialize)]
struct Cipher {
    name: String,
    nonce: String,
}

fn secretbox(password: &[u8], salt: &[u8], log_n: u8) -> Result<XSalsa20Poly1305, Error> {
    let failed = || Error::invalid("the key cannot be derived from the password");
    let params = scrypt::Params::new(log_n, R, P).map_err(|_| failed())?;
    let mut key = Zeroizing::new([0; 32]);
    scrypt::scrypt(password, salt, &params, key.as_mut_slice()).map_err(|_| failed())?;
    XSalsa20Poly1305::new_from_slice(key.as_slice()).map_err(|_| failed())
}

fn printable(label: &str) -> String {
    label.chars().take(60).filter(|c| !c.is_control()).collect()
}

const PUBLIC: &str = "PUBLIC KEY";
const ENCRYPTED: &str = "ENCRYPTED SIGSTORE PRIVATE KEY";
const ENCRYPTED_OLD: &str = "ENCRYPTED COSIGN PRIVATE KEY";
const KDF: &str = "scrypt";
const CIPHER: &str = "nacl/secretbox";
/// What cosign writes (16) and reads. More would let a file ask for any amount of memory.
const LOG_N: std::ops::RangeInclusive<u8> = 15..=17;
const DEFAULT_LOG_N: u8 = 16;
const R: u32 = 8;
const P: u32 = 1;

#[cfg(test)]
mod tests;
