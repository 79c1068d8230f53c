CREATE TABLE meta (
    key TEXT COLLATE "C" PRIMARY KEY NOT NULL,
    value TEXT COLLATE "C" NOT NULL
);

CREATE TABLE counter (
    name TEXT COLLATE "C" PRIMARY KEY NOT NULL,
    value BIGINT NOT NULL
);
INSERT INTO counter (name, value) VALUES ('event', 0), ('event_pruned', 0);

CREATE TABLE token_key (
    id TEXT COLLATE "C" PRIMARY KEY NOT NULL,
    secret BYTEA NOT NULL,
    created_at BIGINT NOT NULL
);

CREATE TABLE namespace (
    id BIGINT PRIMARY KEY NOT NULL,
    name TEXT COLLATE "C" NOT NULL UNIQUE,
    owner TEXT COLLATE "C",
    quota BIGINT,
    created_at BIGINT NOT NULL
);

CREATE TABLE repository (
    id BIGINT PRIMARY KEY NOT NULL,
    namespace_id BIGINT NOT NULL REFERENCES namespace (id),
    name TEXT COLLATE "C" NOT NULL UNIQUE,
    created_at BIGINT NOT NULL
);

CREATE TABLE blob (
    id BIGINT PRIMARY KEY NOT NULL,
    digest BYTEA NOT NULL UNIQUE,
    size BIGINT NOT NULL,
    body BYTEA,
    storage_key TEXT COLLATE "C" UNIQUE,
    state TEXT COLLATE "C" NOT NULL CHECK (state IN ('ok', 'suspect')),
    created_at BIGINT NOT NULL,
    CHECK ((body IS NULL) <> (storage_key IS NULL))
);

CREATE TABLE repository_blob (
    repository_id BIGINT NOT NULL REFERENCES repository (id),
    blob_id BIGINT NOT NULL REFERENCES blob (id),
    id BIGINT NOT NULL,
    lease_until BIGINT NOT NULL,
    added_by TEXT COLLATE "C" NOT NULL,
    added_at BIGINT NOT NULL,
    PRIMARY KEY (repository_id, blob_id)
);
CREATE INDEX repository_blob_blob ON repository_blob (blob_id);

CREATE TABLE manifest (
    id BIGINT PRIMARY KEY NOT NULL,
    repository_id BIGINT NOT NULL REFERENCES repository (id),
    digest BYTEA NOT NULL,
    media_type TEXT COLLATE "C" NOT NULL,
    artifact_type TEXT COLLATE "C",
    subject BYTEA,
    size BIGINT NOT NULL,
    body BYTEA NOT NULL,
    lease_until BIGINT NOT NULL,
    pushed_by TEXT COLLATE "C" NOT NULL,
    created_at BIGINT NOT NULL,
    UNIQUE (repository_id, digest)
);
CREATE INDEX manifest_subject ON manifest (repository_id, subject) WHERE subject IS NOT NULL;

CREATE TABLE manifest_blob (
    manifest_id BIGINT NOT NULL REFERENCES manifest (id) ON DELETE CASCADE,
    repository_id BIGINT NOT NULL,
    digest BYTEA NOT NULL,
    blob_id BIGINT,
    PRIMARY KEY (manifest_id, digest),
    FOREIGN KEY (repository_id, blob_id) REFERENCES repository_blob (repository_id, blob_id)
);
CREATE INDEX manifest_blob_digest ON manifest_blob (repository_id, digest);
CREATE INDEX manifest_blob_blob ON manifest_blob (repository_id, blob_id);

CREATE TABLE manifest_child (
    manifest_id BIGINT NOT NULL REFERENCES manifest (id) ON DELETE CASCADE,
    repository_id BIGINT NOT NULL,
    digest BYTEA NOT NULL,
    child_id BIGINT REFERENCES manifest (id),
    PRIMARY KEY (manifest_id, digest)
);
CREATE INDEX manifest_child_digest ON manifest_child (repository_id, digest);
CREATE INDEX manifest_child_child ON manifest_child (child_id);

CREATE TABLE referrer (
    repository_id BIGINT NOT NULL REFERENCES repository (id),
    subject BYTEA NOT NULL,
    digest BYTEA NOT NULL,
    id BIGINT NOT NULL,
    source TEXT COLLATE "C" NOT NULL CHECK (source IN ('subject', 'index', 'tag')),
    artifact_type TEXT COLLATE "C",
    descriptor TEXT COLLATE "C" NOT NULL,
    PRIMARY KEY (repository_id, subject, digest)
);
CREATE INDEX referrer_order ON referrer (repository_id, subject, id);
CREATE INDEX referrer_digest ON referrer (repository_id, digest);

CREATE TABLE tag (
    repository_id BIGINT NOT NULL REFERENCES repository (id),
    name TEXT COLLATE "C" NOT NULL,
    manifest_id BIGINT NOT NULL REFERENCES manifest (id),
    generation BIGINT NOT NULL,
    updated_at BIGINT NOT NULL,
    updated_by TEXT COLLATE "C" NOT NULL,
    PRIMARY KEY (repository_id, name)
);
CREATE INDEX tag_manifest ON tag (manifest_id);

CREATE TABLE tag_event (
    repository_id BIGINT NOT NULL REFERENCES repository (id),
    name TEXT COLLATE "C" NOT NULL,
    generation BIGINT NOT NULL,
    digest BYTEA,
    actor TEXT COLLATE "C" NOT NULL,
    request TEXT COLLATE "C" NOT NULL,
    at BIGINT NOT NULL,
    PRIMARY KEY (repository_id, name, generation)
);

CREATE TABLE upload (
    id BIGINT PRIMARY KEY NOT NULL,
    name TEXT COLLATE "C" NOT NULL UNIQUE,
    repository_id BIGINT NOT NULL REFERENCES repository (id),
    algorithm TEXT COLLATE "C" NOT NULL,
    storage_key TEXT COLLATE "C" UNIQUE,
    body BYTEA,
    size BIGINT NOT NULL,
    hash_state BYTEA NOT NULL,
    state_version BIGINT NOT NULL,
    version BIGINT NOT NULL,
    created_by TEXT COLLATE "C" NOT NULL,
    created_at BIGINT NOT NULL,
    expires_at BIGINT NOT NULL
);

CREATE TABLE collection_queue (
    kind TEXT COLLATE "C" NOT NULL CHECK (kind IN ('manifest', 'repository_blob', 'blob', 'upload')),
    repository_id BIGINT NOT NULL,
    target_id BIGINT NOT NULL,
    due_at BIGINT NOT NULL,
    attempts BIGINT NOT NULL,
    PRIMARY KEY (kind, repository_id, target_id)
);
CREATE INDEX collection_queue_due ON collection_queue (kind, due_at);

CREATE TABLE deletion (
    storage_key TEXT COLLATE "C" PRIMARY KEY NOT NULL,
    due_at BIGINT NOT NULL,
    attempts BIGINT NOT NULL
);
CREATE INDEX deletion_due ON deletion (due_at);

CREATE TABLE event (
    number BIGINT PRIMARY KEY NOT NULL,
    kind TEXT COLLATE "C" NOT NULL,
    repository TEXT COLLATE "C" NOT NULL,
    tag TEXT COLLATE "C",
    digest BYTEA NOT NULL,
    previous BYTEA,
    media_type TEXT COLLATE "C" NOT NULL,
    artifact_type TEXT COLLATE "C",
    subject BYTEA,
    actor TEXT COLLATE "C" NOT NULL,
    request TEXT COLLATE "C" NOT NULL,
    at BIGINT NOT NULL
);
CREATE INDEX event_at ON event (at);

CREATE TABLE usage_delta (
    id BIGINT PRIMARY KEY NOT NULL,
    namespace_id BIGINT NOT NULL REFERENCES namespace (id),
    bytes BIGINT NOT NULL,
    objects BIGINT NOT NULL,
    at BIGINT NOT NULL
);

CREATE TABLE usage_total (
    namespace_id BIGINT PRIMARY KEY NOT NULL REFERENCES namespace (id),
    bytes BIGINT NOT NULL,
    objects BIGINT NOT NULL,
    folded_at BIGINT NOT NULL
);

CREATE TABLE audit (
    id BIGINT PRIMARY KEY NOT NULL,
    at BIGINT NOT NULL,
    principal TEXT COLLATE "C" NOT NULL,
    action TEXT COLLATE "C" NOT NULL,
    target TEXT COLLATE "C" NOT NULL,
    outcome TEXT COLLATE "C" NOT NULL,
    address TEXT COLLATE "C" NOT NULL,
    request TEXT COLLATE "C" NOT NULL,
    sequence BIGINT UNIQUE,
    hash BYTEA,
    CHECK ((sequence IS NULL) = (hash IS NULL))
);
CREATE INDEX audit_unsealed ON audit (id) WHERE sequence IS NULL;

CREATE TABLE chain (
    name TEXT COLLATE "C" PRIMARY KEY NOT NULL,
    sequence BIGINT NOT NULL,
    hash BYTEA NOT NULL
);
INSERT INTO chain (name, sequence, hash)
VALUES ('audit', 0, '\x0000000000000000000000000000000000000000000000000000000000000000');
