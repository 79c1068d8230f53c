CREATE TABLE meta (
    key TEXT PRIMARY KEY NOT NULL,
    value TEXT NOT NULL
) WITHOUT ROWID;

CREATE TABLE counter (
    name TEXT PRIMARY KEY NOT NULL,
    value BIGINT NOT NULL
) WITHOUT ROWID;
INSERT INTO counter (name, value) VALUES ('event', 0), ('event_pruned', 0);

CREATE TABLE token_key (
    id TEXT PRIMARY KEY NOT NULL,
    secret BLOB NOT NULL,
    created_at BIGINT NOT NULL
);

CREATE TABLE namespace (
    id INTEGER PRIMARY KEY NOT NULL,
    name TEXT NOT NULL UNIQUE,
    owner TEXT,
    quota BIGINT,
    created_at BIGINT NOT NULL
);

CREATE TABLE repository (
    id INTEGER PRIMARY KEY NOT NULL,
    namespace_id BIGINT NOT NULL REFERENCES namespace (id),
    name TEXT NOT NULL UNIQUE,
    created_at BIGINT NOT NULL
);

CREATE TABLE blob (
    id INTEGER PRIMARY KEY NOT NULL,
    digest BLOB NOT NULL UNIQUE,
    size BIGINT NOT NULL,
    body BLOB,
    storage_key TEXT UNIQUE,
    state TEXT NOT NULL CHECK (state IN ('ok', 'suspect')),
    created_at BIGINT NOT NULL,
    CHECK ((body IS NULL) <> (storage_key IS NULL))
);

CREATE TABLE repository_blob (
    repository_id BIGINT NOT NULL REFERENCES repository (id),
    blob_id BIGINT NOT NULL REFERENCES blob (id),
    id BIGINT NOT NULL,
    lease_until BIGINT NOT NULL,
    added_by TEXT NOT NULL,
    added_at BIGINT NOT NULL,
    PRIMARY KEY (repository_id, blob_id)
) WITHOUT ROWID;
CREATE INDEX repository_blob_blob ON repository_blob (blob_id);

CREATE TABLE manifest (
    id INTEGER PRIMARY KEY NOT NULL,
    repository_id BIGINT NOT NULL REFERENCES repository (id),
    digest BLOB NOT NULL,
    media_type TEXT NOT NULL,
    artifact_type TEXT,
    subject BLOB,
    size BIGINT NOT NULL,
    body BLOB NOT NULL,
    lease_until BIGINT NOT NULL,
    pushed_by TEXT NOT NULL,
    created_at BIGINT NOT NULL,
    UNIQUE (repository_id, digest)
);
CREATE INDEX manifest_subject ON manifest (repository_id, subject) WHERE subject IS NOT NULL;

CREATE TABLE manifest_blob (
    manifest_id BIGINT NOT NULL REFERENCES manifest (id) ON DELETE CASCADE,
    repository_id BIGINT NOT NULL,
    digest BLOB NOT NULL,
    blob_id BIGINT,
    PRIMARY KEY (manifest_id, digest),
    FOREIGN KEY (repository_id, blob_id) REFERENCES repository_blob (repository_id, blob_id)
) WITHOUT ROWID;
CREATE INDEX manifest_blob_digest ON manifest_blob (repository_id, digest);
CREATE INDEX manifest_blob_blob ON manifest_blob (repository_id, blob_id);

CREATE TABLE manifest_child (
    manifest_id BIGINT NOT NULL REFERENCES manifest (id) ON DELETE CASCADE,
    repository_id BIGINT NOT NULL,
    digest BLOB NOT NULL,
    child_id BIGINT REFERENCES manifest (id),
    PRIMARY KEY (manifest_id, digest)
) WITHOUT ROWID;
CREATE INDEX manifest_child_digest ON manifest_child (repository_id, digest);
CREATE INDEX manifest_child_child ON manifest_child (child_id);

CREATE TABLE referrer (
    repository_id BIGINT NOT NULL REFERENCES repository (id),
    subject BLOB NOT NULL,
    digest BLOB NOT NULL,
    id BIGINT NOT NULL,
    source TEXT NOT NULL CHECK (source IN ('subject', 'index', 'tag')),
    artifact_type TEXT,
    descriptor TEXT NOT NULL,
    PRIMARY KEY (repository_id, subject, digest)
) WITHOUT ROWID;
CREATE INDEX referrer_order ON referrer (repository_id, subject, id);
CREATE INDEX referrer_digest ON referrer (repository_id, digest);

CREATE TABLE tag (
    repository_id BIGINT NOT NULL REFERENCES repository (id),
    name TEXT NOT NULL,
    manifest_id BIGINT NOT NULL REFERENCES manifest (id),
    generation BIGINT NOT NULL,
    updated_at BIGINT NOT NULL,
    updated_by TEXT NOT NULL,
    PRIMARY KEY (repository_id, name)
) WITHOUT ROWID;
CREATE INDEX tag_manifest ON tag (manifest_id);

CREATE TABLE tag_event (
    repository_id BIGINT NOT NULL REFERENCES repository (id),
    name TEXT NOT NULL,
    generation BIGINT NOT NULL,
    digest BLOB,
    actor TEXT NOT NULL,
    request TEXT NOT NULL,
    at BIGINT NOT NULL,
    PRIMARY KEY (repository_id, name, generation)
) WITHOUT ROWID;

CREATE TABLE upload (
    id INTEGER PRIMARY KEY NOT NULL,
    name TEXT NOT NULL UNIQUE,
    repository_id BIGINT NOT NULL REFERENCES repository (id),
    algorithm TEXT NOT NULL,
    storage_key TEXT UNIQUE,
    body BLOB,
    size BIGINT NOT NULL,
    hash_state BLOB NOT NULL,
    state_version BIGINT NOT NULL,
    version BIGINT NOT NULL,
    created_by TEXT NOT NULL,
    created_at BIGINT NOT NULL,
    expires_at BIGINT NOT NULL
);

CREATE TABLE collection_queue (
    kind TEXT NOT NULL CHECK (kind IN ('manifest', 'repository_blob', 'blob', 'upload')),
    repository_id BIGINT NOT NULL,
    target_id BIGINT NOT NULL,
    due_at BIGINT NOT NULL,
    attempts BIGINT NOT NULL,
    PRIMARY KEY (kind, repository_id, target_id)
) WITHOUT ROWID;
CREATE INDEX collection_queue_due ON collection_queue (kind, due_at);

CREATE TABLE deletion (
    storage_key TEXT PRIMARY KEY NOT NULL,
    due_at BIGINT NOT NULL,
    attempts BIGINT NOT NULL
) WITHOUT ROWID;
CREATE INDEX deletion_due ON deletion (due_at);

CREATE TABLE event (
    number INTEGER PRIMARY KEY NOT NULL,
    kind TEXT NOT NULL,
    repository TEXT NOT NULL,
    tag TEXT,
    digest BLOB NOT NULL,
    previous BLOB,
    media_type TEXT NOT NULL,
    artifact_type TEXT,
    subject BLOB,
    actor TEXT NOT NULL,
    request TEXT NOT NULL,
    at BIGINT NOT NULL
);
CREATE INDEX event_at ON event (at);

CREATE TABLE usage_delta (
    id INTEGER PRIMARY KEY NOT NULL,
    namespace_id BIGINT NOT NULL REFERENCES namespace (id),
    bytes BIGINT NOT NULL,
    objects BIGINT NOT NULL,
    at BIGINT NOT NULL
);

CREATE TABLE usage_total (
    namespace_id INTEGER PRIMARY KEY NOT NULL REFERENCES namespace (id),
    bytes BIGINT NOT NULL,
    objects BIGINT NOT NULL,
    folded_at BIGINT NOT NULL
);

CREATE TABLE audit (
    id INTEGER PRIMARY KEY NOT NULL,
    at BIGINT NOT NULL,
    principal TEXT NOT NULL,
    action TEXT NOT NULL,
    target TEXT NOT NULL,
    outcome TEXT NOT NULL,
    address TEXT NOT NULL,
    request TEXT NOT NULL,
    sequence BIGINT UNIQUE,
    hash BLOB,
    CHECK ((sequence IS NULL) = (hash IS NULL))
);
CREATE INDEX audit_unsealed ON audit (id) WHERE sequence IS NULL;

CREATE TABLE chain (
    name TEXT PRIMARY KEY NOT NULL,
    sequence BIGINT NOT NULL,
    hash BLOB NOT NULL
) WITHOUT ROWID;
INSERT INTO chain (name, sequence, hash)
VALUES ('audit', 0, X'0000000000000000000000000000000000000000000000000000000000000000');
