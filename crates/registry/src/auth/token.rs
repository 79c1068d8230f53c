//! The token service: `GET /v2/token` gives short-lived tokens to those who log in, in the form that
//! docker's clients ask for them, and anonymous ones to the rest.

use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use http::header::CACHE_CONTROL;
use http::{HeaderValue, Method, Response, StatusCode};
use jsonwebtoken::{
    Algorithm, DecodingKey, EncodingKey, Header, Validation, decode, decode_header, encode,
};
use oci::RepositoryName;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::auth::{Auth, Caller, Credential, Decision, Principal, Rejected, now};
use crate::error::{Error, Refusal, UNAUTHORIZED, UNSUPPORTED};
use crate::serve::body::Body;
use crate::serve::call::{Call, json_response};
use crate::settings::Action;
use crate::v2::query::Query;

/// The name of this service in challenges and the audience of its tokens.
pub(crate) const SERVICE: &str = "longshore";

/// One thing that a token was issued for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Grant {
    #[serde(rename = "type")]
    kind: String,
    name: String,
    actions: Vec<String>,
}

impl Grant {
    /// Tells whether this is a grant for `action` on a repository.
    pub(crate) fn covers(&self, action: Action, repository: &RepositoryName) -> bool {
        // Clients know three words; setting tags is part of what they call push.
        let word = match action {
            Action::Pull => "pull",
            Action::Push | Action::TagCreate | Action::TagOverwrite => "push",
            Action::Delete => "delete",
            Action::Admin => "*",
        };
        self.kind == "repository"
            && self.name == repository.as_str()
            && self.actions.iter().any(|a| a == word || a == "*")
    }

    /// Tells whether this is a grant for a question about the whole registry.
    pub(crate) fn is_registry(&self, what: &str) -> bool {
        self.kind == "registry" && self.name == what && self.actions.iter().any(|a| a == "*")
    }

    /// Parses one scope, `type:name:action,…`. The name may hold a colon.
    fn parse(scope: &str) -> Option<Self> {
        let (kind, rest) = scope.split_once(':')?;
        let (name, actions) = rest.rsplit_once(':')?;
        // `repository(plugin)` is an old form of docker's.
        let kind = kind.split('(').next().unwrap_or(kind);
        Some(Self {
            kind: kind.to_owned(),
            name: name.to_owned(),
            actions: actions
                .split(',')
                .filter(|action| !action.is_empty())
                .map(str::to_owned)
                .collect(),
        })
    }
}

/// What a token says.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Claims {
    iss: String,
    aud: String,
    pub(crate) sub: String,
    iat: i64,
    pub(crate) exp: i64,
    pub(crate) access: Vec<Grant>,
    /// The fingerprint of the user's stored hash: a changed password ends the token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) fingerprint: Option<String>,
}

/// Signs and verifies tokens with the keys of the store, so that every replica knows them.
pub(crate) struct Tokens {
    store: store::Store,
    lifetime: Duration,
    keys: RwLock<Keys>,
}

#[derive(Clone)]
struct Keys {
    read: Instant,
    keys: Arc<Vec<store::TokenKey>>,
}

impl Tokens {
    /// Reads the keys for the first time.
    pub(crate) async fn new(store: store::Store, lifetime: Duration) -> Result<Self, Error> {
        let keys = Arc::new(store.token_keys().await?);
        Ok(Self {
            store,
            lifetime: lifetime.max(MIN_LIFETIME),
            keys: RwLock::new(Keys {
                read: Instant::now(),
                keys,
            }),
        })
    }

    /// Verifies signature, times and audience. `None` for everything that is not right.
    pub(crate) async fn verify(&self, token: &str) -> Option<Claims> {
        if token.len() > MAX_TOKEN {
            return None;
        }
        let kid = decode_header(token).ok()?.kid?;
        let find = |keys: &[store::TokenKey]| {
            keys.iter()
                .find(|key| key.id == kid)
                .map(|key| DecodingKey::from_secret(&key.secret))
        };
        let key = match find(&self.keys(MAX_AGE).await) {
            Some(key) => key,
            // Another replica may have made a key since.
            None => find(&self.keys(MIN_AGE).await)?,
        };
        let mut validation = Validation::new(Algorithm::HS256);
        validation.leeway = 0;
        validation.set_audience(&[SERVICE]);
        validation.set_issuer(&[SERVICE]);
        validation.set_required_spec_claims(&["exp", "aud", "iss", "sub"]);
        decode::<Claims>(token, &key, &validation)
            .ok()
            .map(|data| data.claims)
    }

    async fn sign(&self, claims: &Claims) -> Result<String, Refusal> {
        let keys = self.keys(MAX_AGE).await;
        let key = keys
            .first()
            .ok_or_else(|| Refusal::internal("the store has no token key"))?;
        let mut header = Header::new(Algorithm::HS256);
        header.kid = Some(key.id.clone());
        encode(&header, claims, &EncodingKey::from_secret(&key.secret))
            .map_err(|error| Refusal::internal(error.to_string()))
    }

    /// The keys, not older than `age`. When the store does not answer, the known ones stay.
    async fn keys(&self, age: Duration) -> Arc<Vec<store::TokenKey>> {
        let known = self
            .keys
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        if known.read.elapsed() < age {
            return known.keys;
        }
        match self.store.token_keys().await {
            Ok(keys) => {
                let keys = Arc::new(keys);
                *self.keys.write().unwrap_or_else(PoisonError::into_inner) = Keys {
                    read: Instant::now(),
                    keys: Arc::clone(&keys),
                };
                keys
            }
            Err(error) => {
                tracing::warn!(%error, "the token keys could not be read again");
                known.keys
            }
        }
    }
}

/// Answers `/v2/token`: GET with Basic credentials, or POST with an OAuth2 password form.
pub(crate) async fn serve(call: &mut Call) -> Result<Response<Body>, Refusal> {
    let context = Arc::clone(&call.context);
    let Auth::Users(users) = &context.auth else {
        return Err(Refusal::new(
            StatusCode::NOT_FOUND,
            UNSUPPORTED,
            "this server has no users, it needs no token",
        ));
    };
    let (caller, scopes) = match *call.method() {
        Method::GET | Method::HEAD => {
            let query = call.query()?;
            let scopes = query.all("scope").map(str::to_owned).collect::<Vec<_>>();
            (call.caller.clone(), scopes)
        }
        Method::POST => {
            let form = call.whole_body(MAX_FORM).await?;
            let form = std::str::from_utf8(&form)
                .map_err(|_| Refusal::bad_request(UNSUPPORTED, "the form is not UTF-8 text"))?;
            let form = Query::parse(form)?;
            if form.get("grant_type") != Some("password") {
                return Err(Refusal::bad_request(
                    UNSUPPORTED,
                    "`grant_type` must be `password`, refresh tokens are not issued",
                ));
            }
            let user = form.get("username").unwrap_or_default();
            let password = form.get("password").unwrap_or_default();
            let caller = match users.login(user, password, call.peer.ip()).await {
                Ok(caller) => caller,
                Err(rejected) => return Err(call.rejected(rejected).await),
            };
            (caller, form.all("scope").map(str::to_owned).collect())
        }
        _ => return Err(Refusal::method("GET, HEAD, POST")),
    };
    if let Credential::Token { .. } = caller.credential {
        return Err(Refusal::new(
            StatusCode::UNAUTHORIZED,
            UNAUTHORIZED,
            "a token cannot get another token, use user and password",
        ));
    }
    let access: Vec<Grant> = scopes
        .iter()
        .flat_map(|scope| scope.split(' '))
        .filter(|scope| !scope.is_empty())
        .take(MAX_SCOPES)
        .filter_map(Grant::parse)
        .filter_map(|grant| allowed(&context.auth, &caller, grant))
        .collect();
    let issued = jiff::Timestamp::now();
    let lifetime = users.tokens.lifetime.as_secs();
    let fingerprint = match &caller.credential {
        Credential::Password { fingerprint } => Some(fingerprint.clone()),
        _ => None,
    };
    let token = users
        .tokens
        .sign(&Claims {
            iss: SERVICE.to_owned(),
            aud: SERVICE.to_owned(),
            sub: caller.principal.id(),
            iat: issued.as_second(),
            exp: now().saturating_add(lifetime as i64),
            access,
            fingerprint,
        })
        .await?;
    let mut response = json_response(
        StatusCode::OK,
        &json!({
            "token": token,
            "access_token": token,
            "expires_in": lifetime,
            "issued_at": issued.to_string(),
        }),
    );
    response
        .headers_mut()
        .insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    Ok(response)
}

/// Cuts a grant down to what the caller may do; `None` when nothing is left.
fn allowed(auth: &Auth, caller: &Caller, mut grant: Grant) -> Option<Grant> {
    match grant.kind.as_str() {
        "registry" if grant.name == "admin" => {
            (auth.decide_operator(caller) == Decision::Allowed).then_some(grant)
        }
        "registry" => {
            // What it lists is filtered by rights, so whoever may read something gets it.
            let known = REGISTRY_SCOPES.contains(&grant.name.as_str());
            let reads = caller.principal != Principal::Anonymous || auth.anonymous_reads();
            (known && reads).then_some(grant)
        }
        "repository" => {
            let repository: RepositoryName = grant.name.parse().ok()?;
            let may =
                |action| auth.decide(caller, action, &repository, None, None) == Decision::Allowed;
            let wanted = |word: &str| grant.actions.iter().any(|a| a == word || a == "*");
            let mut actions = Vec::new();
            for (word, action) in [("pull", Action::Pull), ("push", Action::Push)] {
                if wanted(word) && may(action) {
                    actions.push(word.to_owned());
                }
            }
            // Which tags may be deleted is judged with each request.
            if wanted("delete") {
                actions.push("delete".to_owned());
            }
            if grant.actions.iter().any(|action| action == "*") && may(Action::Admin) {
                actions.push("*".to_owned());
            }
            grant.actions = actions;
            (!grant.actions.is_empty()).then_some(grant)
        }
        _ => None,
    }
}

/// Refusals of credentials, shared by requests and the token form.
impl Call {
    /// Turns rejected credentials into an answer, and writes a failed password down.
    pub(crate) async fn rejected(&self, rejected: Rejected) -> Refusal {
        match rejected {
            Rejected::Refused(refusal) => {
                self.context.metrics.login("refused");
                refusal
            }
            Rejected::Wrong { message, checked } => {
                if let Some(user) = checked {
                    self.context.metrics.login("failed");
                    self.audit("login", &user, "failed").await;
                }
                self.challenge(
                    Refusal::new(StatusCode::UNAUTHORIZED, UNAUTHORIZED, message),
                    None,
                    Some("invalid_token"),
                )
            }
        }
    }
}

/// Names of questions about the whole registry that everybody who reads may ask.
const REGISTRY_SCOPES: [&str; 2] = ["catalog", "events"];
const MIN_LIFETIME: Duration = Duration::from_mins(1);
const MAX_AGE: Duration = Duration::from_mins(1);
const MIN_AGE: Duration = Duration::from_secs(1);
const MAX_TOKEN: usize = 16 * 1024;
const MAX_FORM: usize = 64 * 1024;
const MAX_SCOPES: usize = 32;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scopes() {
        let grant = Grant::parse("repository:shop/web:pull,push").unwrap();
        let repository: RepositoryName = "shop/web".parse().unwrap();
        assert!(grant.covers(Action::Pull, &repository));
        assert!(grant.covers(Action::TagOverwrite, &repository));
        assert!(!grant.covers(Action::Delete, &repository));
        assert!(!grant.covers(Action::Pull, &"shop/other".parse().unwrap()));
        assert!(
            Grant::parse("repository:a:*")
                .unwrap()
                .covers(Action::Delete, &"a".parse().unwrap())
        );
        assert_eq!(
            Grant::parse("repository:host:5000/a:pull").unwrap().name,
            "host:5000/a"
        );
        assert!(
            Grant::parse("registry:catalog:*")
                .unwrap()
                .is_registry("catalog")
        );
        assert!(
            !Grant::parse("registry:catalog:*")
                .unwrap()
                .is_registry("events")
        );
        assert!(
            !Grant::parse("repository:catalog:*")
                .unwrap()
                .is_registry("catalog")
        );
        assert_eq!(Grant::parse("repository"), None);
        assert_eq!(Grant::parse("repository:a"), None);
    }
}
