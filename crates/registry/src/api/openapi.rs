//! The OpenAPI document of `/api/v1/`.

use serde_json::{Value, json};

/// The document, OpenAPI 3.1.
pub(crate) fn document() -> Value {
    let mut document = base();
    let modules = [
        super::attempts::paths(),
        super::collection::paths(),
        super::mode::paths(),
        super::pins::paths(),
        super::repositories::paths(),
        super::retention::paths(),
        super::scrub::paths(),
        super::storage::paths(),
    ];
    if let Some(paths) = document["paths"].as_object_mut() {
        for module in modules {
            if let Value::Object(module) = module {
                paths.extend(module);
            }
        }
    }
    document
}

fn base() -> Value {
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Longshore management API",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "Beside the OCI distribution API under `/v2/`.",
            "license": { "name": "Apache-2.0", "identifier": "Apache-2.0" }
        },
        "security": [{ "basic": [] }, { "bearer": [] }, {}],
        "paths": {
            "/api/v1/openapi.json": {
                "get": {
                    "operationId": "openapi",
                    "summary": "This document",
                    "responses": { "200": { "description": "This document", "content": { "application/json": {} } } }
                }
            },
            "/api/v1/repositories/{name}/tags/{tag}/history": {
                "get": {
                    "operationId": "tagHistory",
                    "summary": "Every move of a tag, the newest first",
                    "parameters": [
                        { "name": "name", "in": "path", "required": true, "description": "The repository; it may contain slashes", "schema": { "type": "string" } },
                        { "name": "tag", "in": "path", "required": true, "schema": { "type": "string" } },
                        { "name": "limit", "in": "query", "schema": { "type": "integer", "minimum": 1, "maximum": 1000, "default": 100 } },
                        { "name": "cursor", "in": "query", "description": "`next` of the page before", "schema": { "type": "string" } }
                    ],
                    "responses": {
                        "200": { "description": "One page", "content": { "application/json": { "schema": { "$ref": "#/components/schemas/TagHistory" } } } },
                        "401": { "$ref": "#/components/responses/Error" },
                        "404": { "$ref": "#/components/responses/Error" }
                    }
                }
            },
            "/api/v1/events": {
                "get": {
                    "operationId": "events",
                    "summary": "Changes as they are committed (server-sent events)",
                    "description": "Each event is a CloudEvents 1.0 JSON document whose id, `<epoch>.<number>`, is also the id of the server-sent event. Only repositories that the caller may pull from are shown, so numbers may have gaps. A `heartbeat` carries the position alone. A `reset` says that the position asked for is not known any more: look at everything anew. Without a position the stream begins now. It ends when the credential does.",
                    "parameters": [
                        { "name": "Last-Event-ID", "in": "header", "description": "Resume after this event", "schema": { "type": "string" } },
                        { "name": "after", "in": "query", "description": "As `Last-Event-ID`, which wins", "schema": { "type": "string" } }
                    ],
                    "responses": {
                        "200": { "description": "The stream", "content": { "text/event-stream": { "schema": { "$ref": "#/components/schemas/Event" } } } },
                        "401": { "$ref": "#/components/responses/Error" }
                    }
                }
            }
        },
        "components": {
            "securitySchemes": {
                "basic": { "type": "http", "scheme": "basic" },
                "bearer": { "type": "http", "scheme": "bearer", "description": "From `/v2/token`" }
            },
            "responses": {
                "Error": { "description": "Refused", "content": { "application/json": { "schema": { "$ref": "#/components/schemas/Errors" } } } }
            },
            "schemas": {
                "Errors": {
                    "type": "object",
                    "required": ["errors"],
                    "properties": { "errors": { "type": "array", "items": {
                        "type": "object",
                        "required": ["code", "message"],
                        "properties": { "code": { "type": "string" }, "message": { "type": "string" }, "detail": {} }
                    } } }
                },
                "TagHistory": {
                    "type": "object",
                    "required": ["items", "next"],
                    "properties": {
                        "items": { "type": "array", "items": {
                            "type": "object",
                            "required": ["generation", "digest", "actor", "at"],
                            "properties": {
                                "generation": { "type": "integer" },
                                "digest": { "type": ["string", "null"], "description": "null: the tag was deleted" },
                                "actor": { "type": "string" },
                                "at": { "type": "string", "format": "date-time" }
                            }
                        } },
                        "next": { "type": ["string", "null"], "description": "`cursor` of the next page" }
                    }
                },
                "Event": {
                    "type": "object",
                    "required": ["specversion", "id", "source", "type", "subject", "time", "datacontenttype", "data"],
                    "properties": {
                        "specversion": { "const": "1.0" },
                        "id": { "type": "string" },
                        "source": { "type": "string", "format": "uri-reference" },
                        "type": { "enum": [
                            "dev.longshore.tag.updated", "dev.longshore.tag.deleted",
                            "dev.longshore.manifest.pushed", "dev.longshore.manifest.deleted",
                            "dev.longshore.repository.deleted"
                        ] },
                        "subject": { "type": "string", "description": "`repository:tag`, `repository@digest`, or `repository` when it was deleted as a whole" },
                        "time": { "type": "string", "format": "date-time" },
                        "datacontenttype": { "const": "application/json" },
                        "data": {
                            "type": "object",
                            "required": ["repository", "digest", "mediaType", "actor"],
                            "properties": {
                                "repository": { "type": "string" },
                                "tag": { "type": ["string", "null"] },
                                "digest": { "type": ["string", "null"], "description": "null: the repository was deleted as a whole" },
                                "previous": { "type": ["string", "null"] },
                                "mediaType": { "type": ["string", "null"] },
                                "artifactType": { "type": ["string", "null"] },
                                "subject": { "type": ["string", "null"] },
                                "actor": { "type": "string" }
                            }
                        }
                    }
                }
            }
        }
    })
}
