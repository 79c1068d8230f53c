//! Where a store keeps what it has. Database and objects are chosen each for itself; everything else is one
//! code path.

use std::path::PathBuf;

/// Where a store keeps what it has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Location {
    /// The metadata.
    pub database: DatabaseLocation,
    /// The bytes of blobs.
    pub objects: ObjectLocation,
}

impl Location {
    /// The embedded store: everything in one data directory.
    pub fn embedded(directory: impl Into<PathBuf>) -> Self {
        let directory = directory.into();
        Self {
            database: DatabaseLocation::Sqlite(directory.clone()),
            objects: ObjectLocation::Directory(directory),
        }
    }
}

/// Where the metadata is.
#[derive(Clone, PartialEq, Eq)]
pub enum DatabaseLocation {
    /// `meta.db` in this data directory.
    Sqlite(PathBuf),
    /// A connection string (`postgres://user:password@host[,host2]/database?…`). It may hold a password, so it is
    /// never printed.
    Postgres(String),
}

impl DatabaseLocation {
    /// A PostgreSQL database by its connection string.
    ///
    /// # Errors
    /// What is wrong with it, in a sentence without the string itself.
    pub fn postgres(text: &str) -> Result<Self, String> {
        if !is_postgres(text) {
            return Err(
                "it is no connection string, write for example `postgres://user@host/database`"
                    .to_owned(),
            );
        }
        crate::sql::check_postgres(text)?;
        Ok(Self::Postgres(text.to_owned()))
    }
}

/// Whether a text is meant as the connection string of a PostgreSQL database.
pub fn is_postgres(text: &str) -> bool {
    text.starts_with("postgres://") || text.starts_with("postgresql://")
}

impl std::fmt::Debug for DatabaseLocation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Sqlite(directory) => f.debug_tuple("Sqlite").field(directory).finish(),
            Self::Postgres(_) => f.write_str("Postgres(…)"),
        }
    }
}

/// Where the bytes of blobs are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ObjectLocation {
    /// Files below `o/` of this data directory.
    Directory(PathBuf),
    /// Objects of an S3-compatible store.
    S3(S3Location),
}

/// A bucket of an S3-compatible store. Credentials come from the `AWS_*` variables, the shared credentials file, or
/// the identity of the instance, where none are given here.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct S3Location {
    /// The bucket.
    pub bucket: String,
    /// Put before every key, without slashes at its ends; may be empty.
    pub prefix: String,
    /// The URL of the store; `None` is that of AWS for the region.
    pub endpoint: Option<String>,
    /// The region; `us-east-1` when nothing names one.
    pub region: Option<String>,
    /// Address the bucket in the path, not in the host name.
    pub path_style: bool,
    /// Credentials of this store alone.
    pub credentials: Option<S3Credentials>,
}

/// A pair of keys for an S3-compatible store.
#[derive(Clone, PartialEq, Eq)]
pub struct S3Credentials {
    /// The access key id.
    pub key_id: String,
    /// The secret access key.
    pub secret: String,
}

impl std::fmt::Debug for S3Credentials {
    /// Never shows the secret.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("S3Credentials")
            .field("key_id", &self.key_id)
            .finish_non_exhaustive()
    }
}

impl S3Location {
    /// A bucket and prefix by `s3://bucket/prefix`; endpoint, region and style stay at their defaults.
    ///
    /// # Errors
    /// What is wrong with it, in a sentence.
    pub fn parse(text: &str) -> Result<Self, String> {
        let rest = text
            .strip_prefix("s3://")
            .ok_or("it does not begin with `s3://`")?;
        // Neither belongs into a name. It may be a pair of keys, so nothing of it is shown.
        if rest.contains(['@', ':']) {
            return Err(
                "it holds `@` or `:`: write `s3://bucket/prefix`, credentials come from `AWS_ACCESS_KEY_ID` and \
                 `AWS_SECRET_ACCESS_KEY`, files or the instance, a host from `storage.s3.endpoint`"
                    .to_owned(),
            );
        }
        let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        let prefix = prefix.trim_matches('/');
        let plain = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
        if !(3..=63).contains(&bucket.len()) || !bucket.chars().all(plain) {
            return Err(format!(
                "`{bucket}` is no bucket name (3 to 63 letters, digits, `-`, `.`), write `s3://bucket/prefix`"
            ));
        }
        let well_formed = |part: &str| !part.is_empty() && part != "." && part != "..";
        if !prefix.is_empty()
            && (!prefix.chars().all(|c| plain(c) || c == '/')
                || !prefix.split('/').all(well_formed))
        {
            return Err(format!(
                "`{prefix}` is no prefix, use letters, digits, `-`, `.`, `_` and single slashes"
            ));
        }
        Ok(Self {
            bucket: bucket.to_owned(),
            prefix: prefix.to_owned(),
            ..Self::default()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_and_prefixes() {
        let whole = S3Location::parse("s3://team-registry/a/b/").unwrap();
        assert_eq!(
            (whole.bucket.as_str(), whole.prefix.as_str()),
            ("team-registry", "a/b")
        );
        assert_eq!(S3Location::parse("s3://bucket").unwrap().prefix, "");
        for bad in [
            "s3:/bucket",
            "s3://",
            "s3://ab",
            "s3://bu cket",
            "s3://bucket/a//b",
            "s3://bucket/../x",
        ] {
            assert!(S3Location::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn keys_in_the_name_of_a_bucket_are_refused_and_not_shown() {
        for bad in [
            "s3://AKIA:hidden@bucket/x",
            "s3://AKIA:hid/hidden@bucket/x",
            "s3://AKIA:hidden",
        ] {
            let problem = S3Location::parse(bad).unwrap_err();
            assert!(problem.contains("AWS_SECRET_ACCESS_KEY"), "{problem}");
            assert!(
                !problem.contains("hid") && !problem.contains("AKIA"),
                "{problem}"
            );
        }
    }

    #[test]
    fn a_connection_string_is_checked_and_never_printed() {
        let found = DatabaseLocation::postgres("postgres://u:secret@h/d").unwrap();
        assert_eq!(format!("{found:?}"), "Postgres(…)");
        for bad in ["mysql://h/d", "postgres://u:secret@h/d?colour=blue"] {
            assert!(
                !DatabaseLocation::postgres(bad)
                    .unwrap_err()
                    .contains("secret")
            );
        }
    }
}
