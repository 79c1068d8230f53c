//! Credentials out of the shared file (`~/.aws/credentials`), which the library does not read.
//!
//! The variables and the identity of a web token come before the file, the identity of a container or of the instance
//! after it. The file is read again every few minutes, so that keys can be changed under a running server.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use object_store::CredentialProvider;
use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey, AwsCredential, AwsCredentialProvider};
use tokio::time::Instant;

/// The provider over the shared file and the region that the file names, when the file is what to use.
pub(super) fn from_file(
    builder: &AmazonS3Builder,
) -> Result<Option<(AwsCredentialProvider, Option<String>)>, String> {
    let set = |key: AmazonS3ConfigKey| builder.get_config_value(&key).is_some();
    let by_variables =
        set(AmazonS3ConfigKey::AccessKeyId) || set(AmazonS3ConfigKey::SecretAccessKey);
    let by_token = set(AmazonS3ConfigKey::WebIdentityTokenFile) && set(AmazonS3ConfigKey::RoleArn);
    if by_variables || by_token {
        return Ok(None);
    }
    let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty());
    let wanted = variable("AWS_PROFILE").map(|profile| profile.to_string_lossy().into_owned());
    let path = match (variable("AWS_SHARED_CREDENTIALS_FILE"), variable("HOME")) {
        (Some(path), _) => PathBuf::from(path),
        (None, Some(home)) => PathBuf::from(home).join(".aws/credentials"),
        (None, None) => return Ok(None),
    };
    let profile = wanted.clone().unwrap_or_else(|| "default".to_owned());
    match read(&path, &profile) {
        Ok((credential, region)) => {
            tracing::info!(path = %path.display(), profile, "credentials come from a file");
            let file = SharedFile {
                path,
                profile,
                last: Mutex::new((Instant::now(), Arc::new(credential))),
            };
            Ok(Some((Arc::new(file), region)))
        }
        // Somebody asked for this profile by name.
        Err(problem) if wanted.is_some() => Err(problem),
        Err(_) => Ok(None),
    }
}

#[derive(Debug)]
struct SharedFile {
    path: PathBuf,
    profile: String,
    last: Mutex<(Instant, Arc<AwsCredential>)>,
}

impl SharedFile {
    fn current(&self) -> Arc<AwsCredential> {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if last.0.elapsed() > REREAD {
            last.0 = Instant::now();
            match read(&self.path, &self.profile) {
                Ok((credential, _)) => last.1 = Arc::new(credential),
                Err(problem) => {
                    tracing::warn!(
                        problem,
                        "credentials cannot be read again, the old ones are used"
                    );
                }
            }
        }
        Arc::clone(&last.1)
    }
}

type Found<'a> =
    Pin<Box<dyn Future<Output = object_store::Result<Arc<AwsCredential>>> + Send + 'a>>;

impl CredentialProvider for SharedFile {
    type Credential = AwsCredential;

    fn get_credential<'a, 'b>(&'a self) -> Found<'b>
    where
        'a: 'b,
        Self: 'b,
    {
        Box::pin(std::future::ready(Ok(self.current())))
    }
}

/// Reads one profile: its credentials and its region.
fn read(path: &Path, profile: &str) -> Result<(AwsCredential, Option<String>), String> {
    use std::io::Read;
    let mut text = String::new();
    std::fs::File::open(path)
        .and_then(|file| file.take(MAX_FILE).read_to_string(&mut text))
        .map_err(|error| format!("the credentials file `{}`: {error}", path.display()))?;
    parse(&text, profile)
        .ok_or_else(|| {
            format!(
                "the credentials file `{}` has no `aws_access_key_id` and `aws_secret_access_key` in its profile `{profile}`",
                path.display()
            )
        })
}

fn parse(text: &str, profile: &str) -> Option<(AwsCredential, Option<String>)> {
    let mut within = false;
    let mut values = HashMap::new();
    for line in text.lines() {
        let line = line.trim();
        if line.is_empty() || line.starts_with(['#', ';']) {
            continue;
        }
        if let Some(name) = line
            .strip_prefix('[')
            .and_then(|line| line.split(']').next())
        {
            let name = name.trim();
            within = name.strip_prefix("profile ").unwrap_or(name).trim() == profile;
        } else if within && let Some((key, value)) = line.split_once('=') {
            values.insert(key.trim(), value.trim());
        }
    }
    let value = |key| values.get(key).map(|text| (*text).to_owned());
    let credential = AwsCredential {
        key_id: value("aws_access_key_id")?,
        secret_key: value("aws_secret_access_key")?,
        token: value("aws_session_token"),
    };
    Some((credential, value("region")))
}

const REREAD: Duration = Duration::from_mins(5);
const MAX_FILE: u64 = 1 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_profile_is_found_among_others() {
        let text = "# keys\n[default]\naws_access_key_id = A\naws_secret_access_key=b\n\n\
                    [profile two]\naws_access_key_id=C\naws_secret_access_key = d=e\n\
                    aws_session_token = t\nregion = eu-west-1\n[three]\naws_access_key_id = X\n";
        let (one, region) = parse(text, "default").unwrap();
        assert_eq!((one.key_id.as_str(), one.secret_key.as_str()), ("A", "b"));
        assert_eq!((one.token, region), (None, None));
        let (two, region) = parse(text, "two").unwrap();
        assert_eq!((two.key_id.as_str(), two.secret_key.as_str()), ("C", "d=e"));
        assert_eq!(two.token.as_deref(), Some("t"));
        assert_eq!(region.as_deref(), Some("eu-west-1"));
        assert!(parse(text, "three").is_none());
        assert!(parse(text, "four").is_none());
    }

    #[test]
    fn secrets_are_not_shown() {
        let text = "[default]\naws_access_key_id = A\naws_secret_access_key = hunter2\n\
                    aws_session_token = hunter3\n";
        let (credential, _) = parse(text, "default").unwrap();
        let shown = format!("{credential:?}");
        assert!(!shown.contains("hunter"), "{shown}");
    }
}
