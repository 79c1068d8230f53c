//! Who calls, and the one authorizer that says what they may do.

use std::net::IpAddr;
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::header::{AUTHORIZATION, RETRY_AFTER};
use http::{HeaderMap, HeaderValue, StatusCode};
use oci::{Digest, RepositoryName, Tag};
use tokio::sync::watch;

use crate::auth::htpasswd::Htpasswd;
use crate::auth::login::{Login, Logins};
use crate::auth::token::{Grant, Tokens};
use crate::error::{Error, Refusal, UNAUTHORIZED};
use crate::settings::{ANONYMOUS, Access, Action, Rule, Settings};

pub(crate) mod htpasswd;
pub(crate) mod login;
pub(crate) mod token;

/// Someone who calls, as it stands in audit rows: `user:alice` or `anonymous`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Principal {
    /// No credentials.
    Anonymous,
    /// A user of the htpasswd file.
    User(String),
}

impl Principal {
    /// The principal's id.
    pub(crate) fn id(&self) -> String {
        match self {
            Self::Anonymous => ANONYMOUS.to_owned(),
            Self::User(name) => format!("user:{name}"),
        }
    }
}

/// A principal with the credential it came with.
#[derive(Clone, Debug)]
pub(crate) struct Caller {
    pub(crate) principal: Principal,
    pub(crate) credential: Credential,
}

/// How a caller proved who it is.
#[derive(Clone, Debug)]
pub(crate) enum Credential {
    /// Not at all.
    None,
    /// User and password; the fingerprint is that of the stored hash.
    Password {
        /// See [`htpasswd::Users::fingerprint`].
        fingerprint: String,
    },
    /// A token of ours. It allows no more than it was issued for.
    Token {
        /// What it was issued for.
        grants: Vec<Grant>,
        /// That of the user's stored hash when it was issued; `None` for an anonymous token.
        fingerprint: Option<String>,
        /// When it ends, in seconds since the epoch.
        expires: i64,
    },
}

/// What the authorizer says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Decision {
    /// Go on.
    Allowed,
    /// The principal may, but this token was not issued for it.
    Scope,
    /// No.
    Denied,
}

/// The rules: default deny, rights add up.
#[derive(Debug, Default)]
pub(crate) struct Authorizer(Vec<Rule>);

impl Authorizer {
    /// Judges one action. `tag` and `digest` name what is acted on within the repository; a deletion
    /// with neither, or by digest, concerns every tag.
    pub(crate) fn allows(
        &self,
        principal: &Principal,
        action: Action,
        repository: &RepositoryName,
        tag: Option<&Tag>,
        digest: Option<&Digest>,
    ) -> bool {
        // Evidence tags are edges of their subject: no tag pattern names them, to attach is to push.
        let (action, tag) = match (action, tag) {
            (Action::TagCreate | Action::TagOverwrite, Some(tag)) if tag.subject().is_some() => {
                (Action::Push, None)
            }
            (Action::Delete, Some(tag)) if tag.subject().is_some() => (Action::Delete, None),
            other => other,
        };
        let whole = tag.is_none() || digest.is_some();
        self.0.iter().any(|rule| {
            rule.actions.contains(&action)
                && rule.principals.iter().any(|name| match principal {
                    Principal::Anonymous => name == ANONYMOUS,
                    Principal::User(user) => name == user || name == "*" || name == ANONYMOUS,
                })
                && rule
                    .repositories
                    .iter()
                    .any(|glob| glob.matches(repository.as_str()))
                && match action {
                    Action::Pull | Action::Push => true,
                    _ if rule.tags.is_empty() => true,
                    _ if whole => rule.tags.iter().any(oci::Glob::is_everything),
                    _ => tag
                        .is_some_and(|tag| rule.tags.iter().any(|glob| glob.matches(tag.as_str()))),
                }
        })
    }

    /// Tells whether this principal may operate the registry: `admin` for every repository.
    fn operates(&self, principal: &Principal) -> bool {
        let Principal::User(user) = principal else {
            return false;
        };
        self.0.iter().any(|rule| {
            rule.actions.contains(&Action::Admin)
                && rule
                    .principals
                    .iter()
                    .any(|name| name == user || name == "*")
                && rule.repositories.iter().any(oci::Glob::is_all_repositories)
        })
    }

    /// Tells whether this principal may read anything at all.
    fn reads_something(&self, principal: &Principal) -> bool {
        self.0.iter().any(|rule| {
            rule.actions.contains(&Action::Pull)
                && rule.principals.iter().any(|name| match principal {
                    Principal::Anonymous => name == ANONYMOUS,
                    Principal::User(user) => name == user || name == "*" || name == ANONYMOUS,
                })
        })
    }
}

/// Authentication and authorization of one server.
pub(crate) enum Auth {
    /// Everyone on this machine may do everything.
    Open,
    /// Users and rules.
    Users(Box<UserAuth>),
}

/// What [`Auth::Users`] holds.
pub(crate) struct UserAuth {
    pub(crate) htpasswd: Htpasswd,
    pub(crate) authorizer: Authorizer,
    pub(crate) tokens: Tokens,
    logins: Logins,
}

/// Credentials that were refused.
pub(crate) enum Rejected {
    /// Wrong ones: answer 401 with a challenge. `checked` tells that a password was compared.
    Wrong {
        /// What to say.
        message: &'static str,
        /// A password was compared just now, with this user's (unknown ones included).
        checked: Option<String>,
    },
    /// Too many: answer this.
    Refused(Refusal),
}

impl Auth {
    /// Reads the users and prepares the token keys.
    pub(crate) async fn new(settings: &Settings, store: &store::Store) -> Result<Self, Error> {
        let Access::Users { htpasswd, rules } = &settings.access else {
            return Ok(Self::Open);
        };
        let mut key = [0; 32];
        getrandom::fill(&mut key).map_err(|error| Error::Bind {
            address: settings
                .listen
                .first()
                .copied()
                .unwrap_or(([0, 0, 0, 0], 0).into()),
            source: std::io::Error::other(error.to_string()),
        })?;
        Ok(Self::Users(Box::new(UserAuth {
            htpasswd: Htpasswd::load(htpasswd)?,
            authorizer: Authorizer(rules.clone()),
            tokens: Tokens::new(store.clone(), settings.limits.token_lifetime).await?,
            logins: Logins::new(&settings.limits, key),
        })))
    }

    /// Turns the credentials of a request into a caller.
    pub(crate) async fn identify(
        &self,
        headers: &HeaderMap,
        address: IpAddr,
    ) -> Result<Caller, Rejected> {
        let anonymous = Caller {
            principal: Principal::Anonymous,
            credential: Credential::None,
        };
        let Self::Users(users) = self else {
            return Ok(anonymous);
        };
        let Some(header) = headers.get(AUTHORIZATION) else {
            return Ok(anonymous);
        };
        let wrong = |message| Rejected::Wrong {
            message,
            checked: None,
        };
        let header = header
            .to_str()
            .map_err(|_| wrong("the `Authorization` header is not text"))?;
        let (scheme, value) = header.split_once(' ').unwrap_or((header, ""));
        if scheme.eq_ignore_ascii_case("basic") {
            let (user, password) =
                basic(value).ok_or_else(|| wrong("the Basic credentials are malformed"))?;
            users.login(&user, &password, address).await
        } else if scheme.eq_ignore_ascii_case("bearer") {
            users
                .bearer(value.trim())
                .await
                .ok_or_else(|| wrong("the token is not valid or has ended, get a new one"))
        } else {
            Err(wrong("use Basic or Bearer credentials"))
        }
    }

    /// Judges one action of a caller.
    pub(crate) fn decide(
        &self,
        caller: &Caller,
        action: Action,
        repository: &RepositoryName,
        tag: Option<&Tag>,
        digest: Option<&Digest>,
    ) -> Decision {
        let Self::Users(users) = self else {
            return Decision::Allowed;
        };
        if !users
            .authorizer
            .allows(&caller.principal, action, repository, tag, digest)
        {
            return Decision::Denied;
        }
        match &caller.credential {
            Credential::Token { grants, .. }
                if !grants.iter().any(|g| g.covers(action, repository)) =>
            {
                Decision::Scope
            }
            _ => Decision::Allowed,
        }
    }

    /// Judges a question about the whole registry, such as `catalog`. What is listed is judged per
    /// repository besides, by [`Auth::may_list`].
    pub(crate) fn decide_registry(&self, caller: &Caller, what: &str) -> Decision {
        if let Self::Open = self {
            return Decision::Allowed;
        }
        match &caller.credential {
            // Even where anonymous reading is on: a client that is never asked never logs in.
            Credential::None => Decision::Denied,
            Credential::Password { .. } => Decision::Allowed,
            Credential::Token { grants, .. } if grants.iter().any(|g| g.is_registry(what)) => {
                Decision::Allowed
            }
            Credential::Token { .. } => Decision::Scope,
        }
    }

    /// Judges whether a caller may operate the registry as a whole.
    pub(crate) fn decide_operator(&self, caller: &Caller) -> Decision {
        let Self::Users(users) = self else {
            return Decision::Allowed;
        };
        if !users.authorizer.operates(&caller.principal) {
            return Decision::Denied;
        }
        match &caller.credential {
            Credential::Token { grants, .. } if !grants.iter().any(|g| g.is_registry("admin")) => {
                Decision::Scope
            }
            _ => Decision::Allowed,
        }
    }

    /// Tells whether a listing over the whole registry shows this repository. Repository scopes of a
    /// token do not matter here: it holds the scope of the listing.
    pub(crate) fn may_list(&self, caller: &Caller, repository: &RepositoryName) -> bool {
        match self {
            Self::Open => true,
            Self::Users(users) => {
                users
                    .authorizer
                    .allows(&caller.principal, Action::Pull, repository, None, None)
            }
        }
    }

    /// Tells whether the credential still holds: the user is there, the password is the same, the
    /// token has not ended.
    pub(crate) fn still_holds(&self, caller: &Caller) -> bool {
        let Self::Users(users) = self else {
            return true;
        };
        let known = |fingerprint: &str| match &caller.principal {
            Principal::Anonymous => false,
            Principal::User(user) => {
                users.htpasswd.users().fingerprint(user).as_deref() == Some(fingerprint)
            }
        };
        match &caller.credential {
            Credential::None => true,
            Credential::Password { fingerprint } => known(fingerprint),
            Credential::Token {
                fingerprint,
                expires,
                ..
            } => now() < *expires && fingerprint.as_deref().is_none_or(known),
        }
    }

    /// Changes when users may have changed; `None` in open mode.
    pub(crate) fn changes(&self) -> Option<watch::Receiver<u64>> {
        match self {
            Self::Open => None,
            Self::Users(users) => Some(users.htpasswd.changes()),
        }
    }

    /// Looks whether the users changed, for streams that wait.
    pub(crate) fn refresh(&self) {
        if let Self::Users(users) = self {
            let _: Arc<htpasswd::Users> = users.htpasswd.users();
        }
    }

    /// Tells whether anyone may read something without credentials.
    pub(crate) fn anonymous_reads(&self) -> bool {
        match self {
            Self::Open => true,
            Self::Users(users) => users.authorizer.reads_something(&Principal::Anonymous),
        }
    }
}

impl UserAuth {
    /// Checks user and password.
    pub(crate) async fn login(
        &self,
        user: &str,
        password: &str,
        address: IpAddr,
    ) -> Result<Caller, Rejected> {
        let users = self.htpasswd.users();
        match self.logins.check(&users, user, password, address).await {
            Login::Right => Ok(Caller {
                principal: Principal::User(user.to_owned()),
                credential: Credential::Password {
                    fingerprint: users.fingerprint(user).unwrap_or_default(),
                },
            }),
            Login::Wrong(checked) => Err(Rejected::Wrong {
                message: "user or password are wrong",
                checked: checked.then(|| user.chars().take(64).collect()),
            }),
            Login::TooMany(seconds) => Err(Rejected::Refused(
                Refusal::new(
                    StatusCode::TOO_MANY_REQUESTS,
                    "TOOMANYREQUESTS",
                    "too many failed logins, wait and try again",
                )
                .with(RETRY_AFTER, HeaderValue::from(seconds)),
            )),
        }
    }

    async fn bearer(&self, token: &str) -> Option<Caller> {
        let claims = self.tokens.verify(token).await?;
        let principal = match claims.sub.strip_prefix("user:") {
            Some(user) => {
                let now = self.htpasswd.users().fingerprint(user)?;
                if claims.fingerprint.as_deref() != Some(now.as_str()) {
                    return None;
                }
                Principal::User(user.to_owned())
            }
            None if claims.sub == ANONYMOUS => Principal::Anonymous,
            None => return None,
        };
        Some(Caller {
            principal,
            credential: Credential::Token {
                grants: claims.access,
                fingerprint: claims.fingerprint,
                expires: claims.exp,
            },
        })
    }
}

/// Reads the value of a Basic header.
fn basic(value: &str) -> Option<(String, String)> {
    let bytes = STANDARD.decode(value.trim()).ok()?;
    let text = String::from_utf8(bytes).ok()?;
    let (user, password) = text.split_once(':')?;
    (user.len() <= MAX_CREDENTIAL && password.len() <= MAX_CREDENTIAL)
        .then(|| (user.to_owned(), password.to_owned()))
}

/// Seconds since the epoch. The edge reads the clock; what is beneath gets the time passed in.
pub(crate) fn now() -> i64 {
    jiff::Timestamp::now().as_second()
}

/// The message of a 401 without credentials.
pub(crate) fn log_in() -> Refusal {
    Refusal::new(
        StatusCode::UNAUTHORIZED,
        UNAUTHORIZED,
        "log in first, for instance with `docker login`",
    )
}

const MAX_CREDENTIAL: usize = 4096;

#[cfg(test)]
mod tests;
