//! What must be there.

use crate::Error;
use crate::key::PublicKey;

/// What must be there: n of these keys must have signed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// A name for messages, such as the target's.
    pub name: String,
    /// The trusted keys with a label for people (file name).
    pub keys: Vec<TrustedKey>,
    /// How many distinct keys are needed; at least 1, at most the number of distinct keys.
    pub threshold: usize,
}

impl Policy {
    /// Checks that the policy can be satisfied and asks for something. A policy that fails here
    /// allows nothing.
    ///
    /// # Errors
    /// [`Error::Invalid`] with what to change.
    pub fn check(&self) -> Result<(), Error> {
        let distinct = self.distinct_keys();
        if self.threshold == 0 {
            return Err(Error::invalid(format!(
                "policy `{}` asks for 0 signatures, ask for at least 1",
                self.name
            )));
        }
        if self.threshold > distinct {
            return Err(Error::invalid(format!(
                "policy `{}` asks for {} distinct keys but names {distinct}",
                self.name, self.threshold
            )));
        }
        Ok(())
    }

    /// How many different keys the policy names; one key under two labels is one.
    fn distinct_keys(&self) -> usize {
        let mut seen: Vec<&PublicKey> = Vec::new();
        for trusted in &self.keys {
            if !seen.contains(&&trusted.key) {
                seen.push(&trusted.key);
            }
        }
        seen.len()
    }
}

/// A trusted key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TrustedKey {
    /// For people.
    pub label: String,
    /// The key.
    pub key: PublicKey,
}
