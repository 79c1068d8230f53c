//! The users of a htpasswd file: bcrypt and argon2, read again when the file changes.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use argon2::password_hash::PasswordVerifier as _;
use argon2::password_hash::phc::PasswordHash;
use sha2::{Digest as _, Sha256};
use tokio::sync::watch;

use crate::error::Error;
use crate::serve::stamp::Stamp;

/// A htpasswd file that is watched by looking at it whenever it is used.
pub(crate) struct Htpasswd {
    path: PathBuf,
    current: Mutex<Current>,
    changed: watch::Sender<u64>,
}

struct Current {
    seen: Option<Stamp>,
    users: Arc<Users>,
}

/// The users of one version of the file.
#[derive(Debug, Default)]
pub(crate) struct Users(HashMap<String, Hash>);

/// How one user's password was hashed.
#[derive(Clone, Debug)]
pub(crate) struct Hash {
    kind: Kind,
    text: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Bcrypt,
    Argon2,
}

impl Htpasswd {
    /// Reads the file for the first time; here a mistake is an error.
    pub(crate) fn load(path: &Path) -> Result<Self, Error> {
        let seen = Stamp::of(path);
        let users = Users::read(path)?;
        Ok(Self {
            path: path.to_owned(),
            current: Mutex::new(Current {
                seen,
                users: Arc::new(users),
            }),
            changed: watch::Sender::new(0),
        })
    }

    /// The users now. A file that changed is read; when it cannot be used, the users before stay and
    /// the log says so once.
    pub(crate) fn users(&self) -> Arc<Users> {
        let seen = Stamp::of(&self.path);
        {
            let current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
            if current.seen == seen {
                return Arc::clone(&current.users);
            }
        }
        let result = Users::read(&self.path);
        let users = {
            let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
            current.seen = seen;
            match result {
                Ok(users) => {
                    tracing::info!(path = %self.path.display(), users = users.0.len(), "users read again");
                    current.users = Arc::new(users);
                }
                Err(error) => {
                    tracing::warn!(%error, "the changed htpasswd file is not used, the users before stay");
                }
            }
            Arc::clone(&current.users)
        };
        self.changed.send_modify(|count| *count += 1);
        users
    }

    /// Changes when the users may have changed.
    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }
}

impl Users {
    fn read(path: &Path) -> Result<Self, Error> {
        let failed = |problem: String| Error::Htpasswd {
            path: path.to_owned(),
            problem,
        };
        let text = std::fs::read(path).map_err(|error| {
            failed(format!(
                "{error}, make it with `htpasswd -B -c {} USER`",
                path.display()
            ))
        })?;
        let text =
            String::from_utf8(text).map_err(|_| failed("it is not UTF-8 text".to_owned()))?;
        Self::parse(&text).map_err(failed)
    }

    /// Reads `user:hash` lines. Blank lines and lines that begin with `#` are skipped.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let mut users = HashMap::new();
        for (index, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let number = index + 1;
            let (user, hash) = line
                .split_once(':')
                .ok_or_else(|| format!("line {number} is not `user:hash`"))?;
            if user.is_empty() || RESERVED.contains(&user) {
                return Err(format!("line {number}: `{user}` cannot be a user name"));
            }
            let hash = Hash::parse(hash).map_err(|problem| format!("line {number}: {problem}"))?;
            if users.insert(user.to_owned(), hash).is_some() {
                return Err(format!("line {number}: user `{user}` is there twice"));
            }
        }
        Ok(Self(users))
    }

    /// The hash of a user's password.
    pub(crate) fn hash(&self, user: &str) -> Option<&Hash> {
        self.0.get(user)
    }

    /// What tells two passwords of one user apart without telling either.
    pub(crate) fn fingerprint(&self, user: &str) -> Option<String> {
        self.hash(user).map(Hash::fingerprint)
    }
}

impl Hash {
    fn parse(text: &str) -> Result<Self, String> {
        let kind = if text.starts_with("$2") {
            let parts: bcrypt::HashParts = text.parse().map_err(|_| {
                "the bcrypt hash is malformed, make it with `htpasswd -B`".to_owned()
            })?;
            if parts.get_cost() > MAX_BCRYPT_COST {
                return Err(format!("the bcrypt cost is above {MAX_BCRYPT_COST}"));
            }
            Kind::Bcrypt
        } else if text.starts_with("$argon2") {
            let hash =
                PasswordHash::new(text).map_err(|_| "the argon2 hash is malformed".to_owned())?;
            let params = argon2::Params::try_from(&hash)
                .map_err(|_| "the parameters of the argon2 hash are malformed".to_owned())?;
            if params.m_cost() > MAX_ARGON2_MEMORY || params.t_cost() > MAX_ARGON2_PASSES {
                return Err("the argon2 hash takes more than 256 MiB or 16 passes".to_owned());
            }
            Kind::Argon2
        } else {
            return Err("the password is not hashed with bcrypt or argon2, make the line with `htpasswd -B`".to_owned());
        };
        Ok(Self {
            kind,
            text: text.to_owned(),
        })
    }

    /// A hash that no password has, of the usual cost: checking it hides that a user does not exist.
    pub(crate) fn nobody() -> Self {
        Self {
            kind: Kind::Bcrypt,
            text: NOBODY.to_owned(),
        }
    }

    /// Checks a password. Slow by intention: for a blocking thread.
    pub(crate) fn verify(&self, password: &str) -> bool {
        match self.kind {
            Kind::Bcrypt => bcrypt::verify(password, &self.text).unwrap_or(false),
            Kind::Argon2 => PasswordHash::new(&self.text).is_ok_and(|hash| {
                argon2::Argon2::default()
                    .verify_password(password.as_bytes(), &hash)
                    .is_ok()
            }),
        }
    }

    /// See [`Users::fingerprint`].
    pub(crate) fn fingerprint(&self) -> String {
        hex::encode(&Sha256::digest(self.text.as_bytes())[..16])
    }
}

const RESERVED: [&str; 2] = [crate::settings::ANONYMOUS, "*"];
const MAX_BCRYPT_COST: u32 = 16;
const MAX_ARGON2_MEMORY: u32 = 256 * 1024;
const MAX_ARGON2_PASSES: u32 = 16;
const NOBODY: &str = "$2b$10$......................000000000000000000000000000000.";

#[cfg(test)]
mod tests {
    use super::*;

    const ARGON2: &str =
        "$argon2id$v=19$m=65536,t=2,p=1$c29tZXNhbHQ$CTFhFdXPJO1aFaMaO6Mm5c8y7cJHAph8ArZWb2GRPPc";

    #[test]
    fn both_kinds_verify() {
        let bcrypt = bcrypt::hash("secret", 4).unwrap();
        let users = Users::parse(&format!("# people\nalice:{bcrypt}\n\nbob:{ARGON2}\n")).unwrap();
        assert!(users.hash("alice").unwrap().verify("secret"));
        assert!(!users.hash("alice").unwrap().verify("Secret"));
        assert!(users.hash("bob").unwrap().verify("password"));
        assert!(!users.hash("bob").unwrap().verify("sassword"));
        assert!(users.hash("carol").is_none());
        assert_ne!(users.fingerprint("alice"), users.fingerprint("bob"));
    }

    #[test]
    fn nobody_is_a_hash_that_takes_its_time_and_fits_no_password() {
        let parts: bcrypt::HashParts = NOBODY.parse().unwrap();
        assert_eq!(parts.get_cost(), 10);
        assert!(!Hash::nobody().verify(""));
    }

    #[test]
    fn foreign_lines_are_refused_by_number() {
        let bcrypt = bcrypt::hash("x", 4).unwrap();
        for (text, words) in [
            ("alice", "line 1 is not"),
            ("\nalice:plain", "line 2: the password is not hashed"),
            ("alice:{SHA}abc", "not hashed with bcrypt"),
            ("alice:$apr1$x$y", "not hashed with bcrypt"),
            ("alice:$2y$10$ähnlich", "malformed"),
            ("alice:$argon2id$v=19$m=9,t=", "malformed"),
            ("anonymous:x", "cannot be a user name"),
            ("*:x", "cannot be a user name"),
            (":x", "cannot be a user name"),
        ] {
            let error = Users::parse(text).unwrap_err();
            assert!(error.contains(words), "{text}: {error}");
        }
        assert!(
            Users::parse(&format!("a:{bcrypt}\na:{bcrypt}"))
                .unwrap_err()
                .contains("twice")
        );
    }

    #[test]
    fn a_changed_file_is_read_and_a_broken_one_is_not_used() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("users");
        let hash = bcrypt::hash("x", 4).unwrap();
        std::fs::write(&path, format!("alice:{hash}\n")).unwrap();
        let file = Htpasswd::load(&path).unwrap();
        let changes = file.changes();
        assert!(file.users().hash("alice").is_some());
        assert!(!changes.has_changed().unwrap());
        std::fs::write(&path, format!("bobby:{hash}\ncarol:{hash}\n")).unwrap();
        assert!(file.users().hash("alice").is_none());
        assert!(file.users().hash("carol").is_some());
        assert!(changes.has_changed().unwrap());
        std::fs::write(&path, "broken").unwrap();
        assert!(file.users().hash("carol").is_some());
        std::fs::remove_file(&path).unwrap();
        assert!(file.users().hash("carol").is_some());
        assert!(Htpasswd::load(&path).is_err());
    }
}
