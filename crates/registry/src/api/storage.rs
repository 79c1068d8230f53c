//! `/api/v1/storage`: what is stored, for whom, and quotas.
//!
//! All of it comes from totals that are kept as things change, or that are counted now and then: nothing here walks the
//! content.

use http::{Method, Response, StatusCode};
use oci::RepositoryName;
use serde::Deserialize;
use serde_json::{Value, json};
use store::{NamespaceUsage, RepositoryUsage, Statistics, StoredUsage, UsageOrder};

use super::{allow, page, time};
use crate::auth::Decision;
use crate::auth::Principal;
use crate::error::{Refusal, UNSUPPORTED};
use crate::serve::body::Body;
use crate::serve::call::{Call, json_response};
use crate::v2::query::Query;

/// Answers a request; `words` is what follows `storage`.
pub(super) async fn serve(call: &mut Call, words: &[&str]) -> Result<Response<Body>, Refusal> {
    match words {
        [] => {
            allow(call, "GET, HEAD")?;
            totals(call).await
        }
        ["namespaces"] => {
            allow(call, "GET, HEAD")?;
            namespaces(call).await
        }
        ["namespaces", name] => {
            allow(call, "GET, HEAD, PUT")?;
            call.require_operator().await?;
            // A namespace is named as a repository of one component.
            let name: RepositoryName = name.parse()?;
            if *call.method() == Method::PUT {
                set_quota(call, &name).await
            } else {
                namespace(call, &name).await
            }
        }
        ["repositories"] => {
            allow(call, "GET, HEAD")?;
            repositories(call).await
        }
        _ => Err(Refusal::no_such_path()),
    }
}

async fn totals(call: &Call) -> Result<Response<Body>, Refusal> {
    call.require_operator().await?;
    let figures = call.context.store.recent_statistics().await?;
    Ok(json_response(
        StatusCode::OK,
        &json!({
            "logicalBytes": figures.logical_bytes,
            "logicalObjects": figures.logical_objects,
            "storedBytes": figures.stored_bytes(),
            "blobs": figures.blobs,
            "blobBytes": figures.blob_bytes,
            "manifests": figures.manifests,
            "manifestBytes": figures.manifest_bytes,
            "tags": figures.tags,
            "repositories": figures.repositories,
            "uploads": figures.uploads,
            "deduplication": deduplication(&figures),
            "waiting": {
                "blobs": figures.waiting_blobs,
                "bytes": figures.waiting_bytes,
                "objects": figures.pending_deletions,
            },
            "defaultQuota": call.context.store.default_quota(),
            "ageSeconds": figures.age.as_secs(),
        }),
    ))
}

/// How many logical bytes there are for one that is stored and wanted; `null` where nothing is stored.
pub(crate) fn deduplication(figures: &Statistics) -> Option<f64> {
    let stored = figures.stored_bytes().saturating_sub(figures.waiting_bytes);
    ratio(figures.logical_bytes, stored)
}

/// Logical bytes for one that is stored; `None` where nothing is.
pub(crate) fn ratio(logical: u64, stored: u64) -> Option<f64> {
    (stored > 0).then(|| {
        let ratio = logical as f64 / stored as f64;
        (ratio * 1000.0).round() / 1000.0
    })
}

/// Adds what something has of the disk; `null` while it has not been counted.
fn add_stored(shown: &mut Value, logical: u64, stored: Option<StoredUsage>) {
    shown["storedBytes"] = json!(stored.map(|stored| stored.bytes));
    shown["exclusiveBytes"] = json!(stored.map(|stored| stored.exclusive));
    shown["deduplication"] = json!(stored.and_then(|stored| ratio(logical, stored.bytes)));
}

async fn namespaces(call: &Call) -> Result<Response<Body>, Refusal> {
    call.require_operator().await?;
    let query = call.query()?;
    let limit = page(&query)?;
    let order = order(&query)?;
    let age = call.context.store.refresh_sharing().await;
    let mut found = call
        .context
        .store
        .usage_of_namespaces(&order, limit + 1)
        .await?;
    let more = found.len() > limit;
    found.truncate(limit);
    let next = found
        .last()
        .filter(|_| more)
        .map(|last| position(&order, &last.name, last.bytes, &last.name));
    let default = call.context.store.default_quota();
    let items: Vec<_> = found.iter().map(|usage| shown(usage, default)).collect();
    Ok(json_response(
        StatusCode::OK,
        &json!({ "items": items, "next": next, "storedAgeSeconds": age.map(|age| age.as_secs()) }),
    ))
}

fn shown(usage: &NamespaceUsage, default: Option<u64>) -> Value {
    let mut shown = json!({
        "name": usage.name,
        "bytes": usage.bytes,
        "objects": usage.objects,
        "quota": usage.quota.or(default),
        "quotaIsDefault": usage.quota.is_none(),
    });
    add_stored(&mut shown, usage.bytes, usage.stored);
    shown
}

async fn namespace(call: &Call, name: &RepositoryName) -> Result<Response<Body>, Refusal> {
    let name = name.namespace();
    let store = &call.context.store;
    store.refresh_sharing().await;
    let usage = store.usage_of_namespace(name).await?.ok_or_else(|| {
        Refusal::new(
            StatusCode::NOT_FOUND,
            "NAME_UNKNOWN",
            format!("no such namespace: `{name}`"),
        )
    })?;
    Ok(json_response(
        StatusCode::OK,
        &shown(&usage, store.default_quota()),
    ))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Wanted {
    quota: Option<u64>,
}

async fn set_quota(call: &mut Call, name: &RepositoryName) -> Result<Response<Body>, Refusal> {
    let namespace = name.namespace();
    let body: Value = call.json(LONGEST_BODY).await?;
    // Left out is not null: a body that says nothing must not lift a quota.
    if body.get("quota").is_none() {
        return Err(Refusal::bad_request(
            UNSUPPORTED,
            "the body lacks `quota`, in bytes, or `null` for the default",
        ));
    }
    let wanted: Wanted = serde_json::from_value(body).map_err(|error| {
        Refusal::bad_request(UNSUPPORTED, format!("the body is not as expected: {error}"))
    })?;
    call.context
        .store
        .set_quota(namespace, wanted.quota, &call.actor())
        .await?;
    self::namespace(call, name).await
}

/// Repositories that the caller may pull; all for an operator.
async fn repositories(call: &Call) -> Result<Response<Body>, Refusal> {
    let auth = &call.context.auth;
    let sees_all = auth.decide_operator(&call.caller) == Decision::Allowed;
    if !sees_all && call.caller.principal == Principal::Anonymous {
        call.require_operator().await?;
    }
    let query = call.query()?;
    let limit = page(&query)?;
    let namespace = query.get("namespace");
    let mut order = order(&query)?;
    // Whether somebody else holds the same content is not for those who may not see everything.
    let age = if sees_all {
        call.context.store.refresh_sharing().await
    } else {
        None
    };
    let (mut items, mut looked_at) = (Vec::new(), 0);
    let more = loop {
        let found = call
            .context
            .store
            .usage_of_repositories(namespace, &order, STEP)
            .await?;
        let last = found.len() < STEP;
        let mut full = false;
        for usage in &found {
            if items.len() == limit {
                full = true;
                break;
            }
            looked_at += 1;
            order = after(&order, usage);
            if sees_all || auth.may_list(&call.caller, &usage.name) {
                let mut item = json!({
                    "name": usage.name.as_str(),
                    "bytes": usage.bytes,
                    "objects": usage.objects,
                    "at": time(usage.at),
                });
                if sees_all {
                    add_stored(&mut item, usage.bytes, usage.stored);
                }
                items.push(item);
            }
        }
        if full || (!last && looked_at >= MOST_LOOKED_AT) {
            break true;
        }
        if last {
            break false;
        }
    };
    let next = match order {
        UsageOrder::Name(name) => Some(name),
        UsageOrder::Size(last) => last.map(|(bytes, position)| format!("{bytes},{position}")),
    }
    .filter(|_| more);
    let mut page = json!({ "items": items, "next": next });
    if sees_all {
        page["storedAgeSeconds"] = json!(age.map(|age| age.as_secs()));
    }
    Ok(json_response(StatusCode::OK, &page))
}

fn after(order: &UsageOrder, usage: &RepositoryUsage) -> UsageOrder {
    match order {
        UsageOrder::Name(_) => UsageOrder::Name(usage.name.to_string()),
        UsageOrder::Size(_) => UsageOrder::Size(Some((usage.bytes, usage.position.to_string()))),
    }
}

fn position(order: &UsageOrder, name: &str, bytes: u64, place: &str) -> String {
    match order {
        UsageOrder::Name(_) => name.to_owned(),
        UsageOrder::Size(_) => format!("{bytes},{place}"),
    }
}

/// `sort` and `cursor`.
fn order(query: &Query) -> Result<UsageOrder, Refusal> {
    let cursor = query.get("cursor");
    match query.get("sort").unwrap_or("name") {
        "name" => Ok(UsageOrder::Name(cursor.unwrap_or_default().to_owned())),
        "size" => {
            let last = cursor
                .map(|cursor| {
                    let (bytes, place) = cursor.split_once(',')?;
                    Some((bytes.parse().ok()?, place.to_owned()))
                })
                .map(|last| {
                    last.ok_or_else(|| {
                        Refusal::bad_request(
                            UNSUPPORTED,
                            "`cursor` must be the `next` of the page before",
                        )
                    })
                })
                .transpose()?;
            Ok(UsageOrder::Size(last))
        }
        other => Err(Refusal::bad_request(
            UNSUPPORTED,
            format!("`sort` is `name` or `size`, not `{other}`"),
        )),
    }
}

/// The paths of this module for the OpenAPI document.
pub(super) fn paths() -> Value {
    let error = || json!({ "$ref": "#/components/responses/Error" });
    let list = || {
        json!([
            { "name": "sort", "in": "query", "description": "`size`: the largest first", "schema": { "enum": ["name", "size"], "default": "name" } },
            { "name": "limit", "in": "query", "schema": { "type": "integer", "minimum": 1, "maximum": 1000, "default": 100 } },
            { "name": "cursor", "in": "query", "description": "`next` of the page before", "schema": { "type": "string" } }
        ])
    };
    let page = |item: Value| {
        json!({ "description": "One page", "content": { "application/json": { "schema": {
            "type": "object",
            "required": ["items", "next"],
            "properties": {
                "items": { "type": "array", "items": item },
                "next": { "type": ["string", "null"] },
                "storedAgeSeconds": { "type": ["integer", "null"], "description": "How old `storedBytes`, `exclusiveBytes` and `deduplication` are; null: not counted yet" }
            }
        } } } })
    };
    let stored = json!({ "type": ["integer", "null"], "description": "Its part of the bytes on the disk: of a blob that n repositories hold, each has an n-th. For operators; null: not counted yet" });
    let exclusive = json!({ "type": ["integer", "null"], "description": "Bytes on the disk that nobody else holds. For operators; null: not counted yet" });
    let deduplication = json!({ "type": ["number", "null"], "description": "`bytes` for one of `storedBytes`. For operators" });
    let namespace = json!({
        "type": "object",
        "required": ["name", "bytes", "objects", "quota", "quotaIsDefault"],
        "properties": {
            "name": { "type": "string" },
            "bytes": { "type": "integer", "description": "Distinct blobs and manifests of each of its repositories" },
            "objects": { "type": "integer" },
            "quota": { "type": ["integer", "null"], "description": "null: no limit" },
            "quotaIsDefault": { "type": "boolean" },
            "storedBytes": stored, "exclusiveBytes": exclusive, "deduplication": deduplication
        }
    });
    let mut repositories = list();
    if let Some(list) = repositories.as_array_mut() {
        list.push(json!({ "name": "namespace", "in": "query", "schema": { "type": "string" } }));
    }
    let name = json!([{ "name": "name", "in": "path", "required": true, "description": "The first component of repository names", "schema": { "type": "string" } }]);
    json!({
        "/api/v1/storage": {
            "get": {
                "operationId": "storage",
                "summary": "What is stored",
                "description": "For operators. Figures are as old as `ageSeconds` says: at most a hundred times as old as it takes to count them.",
                "responses": {
                    "200": { "description": "Totals", "content": { "application/json": { "schema": {
                        "type": "object",
                        "properties": {
                            "logicalBytes": { "type": "integer", "description": "Distinct blobs and manifests of each repository" },
                            "logicalObjects": { "type": "integer" },
                            "storedBytes": { "type": "integer", "description": "Distinct blobs over all repositories, and manifests" },
                            "blobs": { "type": "integer" },
                            "blobBytes": { "type": "integer" },
                            "manifests": { "type": "integer" },
                            "manifestBytes": { "type": "integer" },
                            "tags": { "type": "integer" },
                            "repositories": { "type": "integer" },
                            "uploads": { "type": "integer" },
                            "deduplication": { "type": ["number", "null"], "description": "Logical bytes for one that is stored and wanted" },
                            "waiting": { "type": "object", "properties": {
                                "blobs": { "type": "integer", "description": "Blobs that no repository holds any more" },
                                "bytes": { "type": "integer", "description": "Their bytes, still stored" },
                                "objects": { "type": "integer", "description": "Objects to be deleted" }
                            } },
                            "defaultQuota": { "type": ["integer", "null"] },
                            "ageSeconds": { "type": "integer" }
                        }
                    } } } },
                    "401": error(), "403": error()
                }
            }
        },
        "/api/v1/storage/namespaces": {
            "get": {
                "operationId": "storageOfNamespaces",
                "summary": "What namespaces use, and their quotas",
                "parameters": list(),
                "responses": { "200": page(namespace.clone()), "401": error(), "403": error() }
            }
        },
        "/api/v1/storage/namespaces/{name}": {
            "parameters": name,
            "get": {
                "operationId": "storageOfNamespace",
                "summary": "What one namespace uses",
                "responses": { "200": { "description": "The namespace", "content": { "application/json": { "schema": namespace } } }, "401": error(), "403": error(), "404": error() }
            },
            "put": {
                "operationId": "setQuota",
                "summary": "Set the quota of a namespace",
                "description": "In bytes; `null` gives it the default. What is there stays; what would go beyond is refused with 403 `DENIED`.",
                "requestBody": { "required": true, "content": { "application/json": { "schema": {
                    "type": "object", "required": ["quota"], "additionalProperties": false,
                    "properties": { "quota": { "type": ["integer", "null"], "minimum": 0 } }
                } } } },
                "responses": { "200": { "description": "The namespace", "content": { "application/json": { "schema": namespace } } }, "400": error(), "401": error(), "403": error() }
            }
        },
        "/api/v1/storage/repositories": {
            "get": {
                "operationId": "storageOfRepositories",
                "summary": "What repositories use",
                "description": "Operators see all, others those that they may pull. Empty repositories are left out. A page may have fewer entries than asked for and still have a `next`.",
                "parameters": repositories,
                "responses": {
                    "200": page(json!({
                        "type": "object",
                        "required": ["name", "bytes", "objects", "at"],
                        "properties": {
                            "name": { "type": "string" },
                            "bytes": { "type": "integer" },
                            "objects": { "type": "integer" },
                            "at": { "type": "string", "format": "date-time" },
                            "storedBytes": stored, "exclusiveBytes": exclusive, "deduplication": deduplication
                        }
                    })),
                    "401": error()
                }
            }
        }
    })
}

const LONGEST_BODY: usize = 1024;
/// Repositories that are looked at at once, and at most for one page.
const STEP: usize = 200;
const MOST_LOOKED_AT: usize = 20_000;
