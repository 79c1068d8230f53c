//! Manifests: reading, pushing with tags, deleting
//! ([distribution-spec § Pulling manifests](https://github.com/opencontainers/distribution-spec/blob/main/spec.md#pulling-manifests),
//! [§ Pushing manifests](https://github.com/opencontainers/distribution-spec/blob/main/spec.md#pushing-manifests)).

use http::header::{CACHE_CONTROL, CONTENT_LENGTH, CONTENT_TYPE, ETAG, LOCATION, WARNING};
use http::{HeaderName, HeaderValue, Method, Response, StatusCode};
use oci::reference::TagOrDigest;
use oci::{Digest, RepositoryName, Tag};
use store::{PutManifest, TagWrite};

use crate::error::{DIGEST_INVALID, Refusal, etag};
use crate::serve::body::Body;
use crate::serve::call::Call;
use crate::settings::Action;
use crate::v2::blob::immutable;
use crate::v2::condition::{self, Wanted};
use crate::v2::{CONTENT_DIGEST, header};

/// `GET` and `HEAD /v2/<name>/manifests/<reference>` (end-3): the bytes and the media type as they
/// were pushed (`I11`).
pub(crate) async fn get(
    call: &Call,
    name: &RepositoryName,
    reference: &TagOrDigest,
) -> Result<Response<Body>, Refusal> {
    let (tag, digest) = match reference {
        TagOrDigest::Tag(tag) => (Some(tag), None),
        TagOrDigest::Digest(digest) => (None, Some(digest)),
    };
    let store = &call.context.store;
    if call.method() == Method::HEAD {
        call.require_head(name, tag).await?;
        // Told to a principal with push right, "exists" keeps the manifest (`I7`).
        if let Some(digest) = digest
            && call.may(Action::Push, name, None)
            && !store.renew_manifest(name, digest).await?
        {
            return Err(Refusal::manifest_unknown(digest));
        }
    } else {
        call.require(Action::Pull, name, tag, digest).await?;
    }
    let manifest = store
        .manifest(name, reference)
        .await?
        .ok_or_else(|| Refusal::manifest_unknown(reference))?;
    let mut response = Response::new(Body::empty());
    let headers = response.headers_mut();
    headers.insert(CONTENT_DIGEST, header(&manifest.digest.to_string())?);
    headers.insert(ETAG, etag(&manifest.digest)?);
    headers.insert(
        CACHE_CONTROL,
        match tag {
            None => immutable(call),
            Some(_) => HeaderValue::from_static("no-cache"),
        },
    );
    // A media type is foreign text; what cannot stand in a header is served as plain bytes.
    headers.insert(
        CONTENT_TYPE,
        HeaderValue::from_str(&manifest.media_type)
            .unwrap_or(HeaderValue::from_static("application/octet-stream")),
    );
    if call.method() == Method::GET {
        store.note_pull(name, &manifest.digest, &call.caller.principal.id());
    }
    if condition::has(&call.head.headers, &manifest.digest) {
        *response.status_mut() = StatusCode::NOT_MODIFIED;
        return Ok(response);
    }
    headers.insert(CONTENT_LENGTH, HeaderValue::from(manifest.body.len()));
    *response.body_mut() = Body::full(manifest.body);
    Ok(response)
}

/// `PUT /v2/<name>/manifests/<reference>` (end-7a, end-7b).
pub(crate) async fn put(
    call: &mut Call,
    name: &RepositoryName,
    reference: TagOrDigest,
) -> Result<Response<Body>, Refusal> {
    let context = std::sync::Arc::clone(&call.context);
    let limits = &context.settings.limits;
    call.require(Action::Push, name, None, None).await?;
    let wanted = Wanted::of(&call.head.headers)?;
    let (tags, named) = match &reference {
        TagOrDigest::Tag(tag) => (vec![tag.clone()], None),
        TagOrDigest::Digest(digest) => (tag_parameters(call, limits.tag_parameters)?, Some(digest)),
    };
    let content_type = call.header(CONTENT_TYPE).unwrap_or_default().to_owned();
    let body = call.whole_body(limits.manifest_bytes).await?;
    let digest = match named {
        Some(digest) if !digest.matches(&body) => {
            let actual = Digest::of(digest.algorithm(), &body);
            return Err(Refusal::bad_request(
                DIGEST_INVALID,
                format!("the manifest has digest `{actual}`, not `{digest}`"),
            ));
        }
        Some(digest) => digest.clone(),
        None => Digest::sha256(&body),
    };
    let view = oci::Manifest::parse(&body, &content_type)?;
    check_types(&view)?;
    let mut writes = Vec::with_capacity(tags.len());
    for tag in &tags {
        writes.push(TagWrite {
            tag: tag.clone(),
            expected: wanted.expected(&context.store, name, tag).await?,
            may_create: call.may(Action::TagCreate, name, Some(tag)),
            may_overwrite: call.may(Action::TagOverwrite, name, Some(tag)),
        });
    }
    let warnings = warnings(&view);
    let outcome = context
        .store
        .put_manifest(PutManifest {
            repository: name.clone(),
            digest: digest.clone(),
            body,
            view,
            tags: writes,
            actor: call.actor(),
        })
        .await;
    let outcome = match outcome {
        Err(error @ (store::Error::TagImmutable { .. } | store::Error::TagCreateDenied { .. })) => {
            return Err(denied_tag(call, name, &error).await);
        }
        other => other?,
    };
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::CREATED;
    let headers = response.headers_mut();
    headers.insert(LOCATION, header(&format!("/v2/{name}/manifests/{digest}"))?);
    headers.insert(CONTENT_DIGEST, header(&digest.to_string())?);
    headers.insert(ETAG, etag(&digest)?);
    if let Some(subject) = &outcome.subject {
        headers.insert(OCI_SUBJECT, header(&subject.to_string())?);
    }
    if let TagOrDigest::Digest(_) = reference {
        for tag in &tags {
            headers.append(OCI_TAG, header(tag.as_str())?);
        }
    }
    for warning in warnings {
        headers.append(WARNING, header(&format!("299 - \"{warning}\""))?);
    }
    Ok(response)
}

/// `DELETE /v2/<name>/manifests/<reference>` (end-9).
pub(crate) async fn delete(
    call: &Call,
    name: &RepositoryName,
    reference: &TagOrDigest,
) -> Result<Response<Body>, Refusal> {
    let store = &call.context.store;
    match reference {
        TagOrDigest::Tag(tag) => {
            call.require(Action::Delete, name, Some(tag), None).await?;
            let expected = Wanted::of(&call.head.headers)?
                .expected(store, name, tag)
                .await?;
            store.delete_tag(name, tag, expected, &call.actor()).await?;
        }
        TagOrDigest::Digest(digest) => {
            call.require(Action::Delete, name, None, Some(digest))
                .await?;
            store.delete_manifest(name, digest, &call.actor()).await?;
        }
    }
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::ACCEPTED;
    Ok(response)
}

/// Types stand in headers, events and listings, where they must not be as long as a manifest may be.
fn check_types(view: &oci::Manifest) -> Result<(), Refusal> {
    let kinds = [Some(view.media_type.as_str()), view.listed_artifact_type()];
    if kinds
        .into_iter()
        .flatten()
        .any(|kind| kind.len() > MAX_TYPE)
    {
        return Err(Refusal::bad_request(
            "MANIFEST_INVALID",
            format!("a media type or artifact type is longer than {MAX_TYPE} bytes"),
        ));
    }
    Ok(())
}

/// The `tag` parameters of a PUT by digest, each once.
fn tag_parameters(call: &Call, limit: usize) -> Result<Vec<Tag>, Refusal> {
    let query = call.query()?;
    let mut tags: Vec<Tag> = Vec::new();
    for text in query.all("tag") {
        let tag: Tag = text.parse()?;
        if !tags.contains(&tag) {
            if tags.len() == limit {
                return Err(Refusal::new(
                    StatusCode::URI_TOO_LONG,
                    "TAG_INVALID",
                    format!(
                        "at most {limit} `tag` parameters are taken, send the rest with another request"
                    ),
                ));
            }
            tags.push(tag);
        }
    }
    Ok(tags)
}

async fn denied_tag(call: &Call, name: &RepositoryName, error: &store::Error) -> Refusal {
    let (action, tag) = match error {
        store::Error::TagImmutable { tag } => (Action::TagOverwrite, tag),
        store::Error::TagCreateDenied { tag } => (Action::TagCreate, tag),
        _ => return Refusal::internal(error.to_string()),
    };
    call.audit(action.name(), &format!("{name}:{tag}"), "denied")
        .await;
    Refusal::new(
        StatusCode::FORBIDDEN,
        crate::error::DENIED,
        error.to_string(),
    )
}

/// What a client should know of a manifest that was taken all the same. Fixed texts only, far below
/// the 4096 bytes of the specification.
fn warnings(view: &oci::Manifest) -> Vec<&'static str> {
    let mut warnings = Vec::new();
    if view.blobs().any(oci::Descriptor::is_foreign) {
        warnings.push(
            "the manifest names non-distributable layers, which are deprecated and not stored here",
        );
    }
    if view
        .blobs()
        .chain(view.children())
        .any(|d| d.media_type.is_empty())
    {
        warnings.push("a descriptor of the manifest has no media type");
    }
    warnings
}

/// Two names of 127 and a slash ([RFC 6838 § 4.2](https://www.rfc-editor.org/rfc/rfc6838#section-4.2)), with room
/// for parameters.
const MAX_TYPE: usize = 1024;
const OCI_SUBJECT: HeaderName = HeaderName::from_static("oci-subject");
const OCI_TAG: HeaderName = HeaderName::from_static("oci-tag");
