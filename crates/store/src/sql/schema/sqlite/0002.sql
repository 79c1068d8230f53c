-- Expand only: programs of schema 1 go on working on it.

-- An upload whose object is in an object store: the multipart upload, the parts recorded (JSON), the object that holds
-- the bytes after the last part, and the name of the next such object, recorded before it is written.
ALTER TABLE upload ADD COLUMN multipart TEXT;
ALTER TABLE upload ADD COLUMN parts TEXT;
ALTER TABLE upload ADD COLUMN tail_key TEXT;
ALTER TABLE upload ADD COLUMN next_tail_key TEXT;
-- The one writer of an upload, among replicas.
ALTER TABLE upload ADD COLUMN claimed_by TEXT;
ALTER TABLE upload ADD COLUMN claimed_until BIGINT;

-- A multipart upload to abort before the object of this key is deleted.
ALTER TABLE deletion ADD COLUMN multipart TEXT;

-- The bytes of the object, where they are known.
ALTER TABLE deletion ADD COLUMN size BIGINT;

-- The order in which events were inserted. SQLite numbers them at once and has no use for it.
ALTER TABLE event ADD COLUMN ordinal BIGINT;

-- When the bytes of a blob were last read and found right.
ALTER TABLE blob ADD COLUMN checked_at BIGINT;
-- Until when somebody reads it.
ALTER TABLE blob ADD COLUMN checking_until BIGINT;
CREATE INDEX blob_checked ON blob (checked_at, id);
CREATE INDEX blob_suspect ON blob (id) WHERE state = 'suspect';

-- Manifests whose bytes in their row are not those of their digest.
CREATE TABLE damaged_manifest (
    manifest_id INTEGER PRIMARY KEY NOT NULL REFERENCES manifest (id) ON DELETE CASCADE,
    found_at BIGINT NOT NULL
);

-- A repository that is being deleted has lost its name; its content goes in the background.
ALTER TABLE repository ADD COLUMN deleted_name TEXT;
ALTER TABLE repository ADD COLUMN deleted_at BIGINT;
CREATE INDEX upload_repository ON upload (repository_id);

CREATE TABLE collection_queue_2 (
    kind TEXT NOT NULL CHECK (kind IN ('manifest', 'repository_blob', 'blob', 'upload', 'repository')),
    repository_id BIGINT NOT NULL,
    target_id BIGINT NOT NULL,
    due_at BIGINT NOT NULL,
    attempts BIGINT NOT NULL,
    PRIMARY KEY (kind, repository_id, target_id)
) WITHOUT ROWID;
INSERT INTO collection_queue_2 SELECT kind, repository_id, target_id, due_at, attempts FROM collection_queue;
DROP TABLE collection_queue;
ALTER TABLE collection_queue_2 RENAME TO collection_queue;
CREATE INDEX collection_queue_due ON collection_queue (kind, due_at);

CREATE INDEX collection_queue_failed ON collection_queue (kind) WHERE attempts > 1;

-- Since when the subject of this row is gone; NULL while it is there, and where it never was.
ALTER TABLE referrer ADD COLUMN subject_gone_at BIGINT;

CREATE INDEX manifest_blob_unfilled ON manifest_blob (repository_id, digest, blob_id) WHERE blob_id IS NULL;
CREATE INDEX manifest_child_unfilled ON manifest_child (repository_id, digest, child_id) WHERE child_id IS NULL;

-- A set of pins is replaced as a whole; its version changes with it.
CREATE TABLE pin_holder (
    holder TEXT PRIMARY KEY NOT NULL,
    version BIGINT NOT NULL,
    updated_at BIGINT NOT NULL,
    updated_by TEXT NOT NULL
) WITHOUT ROWID;

CREATE TABLE pin (
    holder TEXT NOT NULL REFERENCES pin_holder (holder),
    repository_id BIGINT NOT NULL REFERENCES repository (id),
    digest BLOB NOT NULL,
    manifest_id BIGINT NOT NULL REFERENCES manifest (id),
    reason TEXT NOT NULL,
    created_at BIGINT NOT NULL,
    created_by TEXT NOT NULL,
    expires_at BIGINT,
    PRIMARY KEY (holder, repository_id, digest)
) WITHOUT ROWID;
CREATE INDEX pin_repository ON pin (repository_id);
CREATE INDEX pin_manifest ON pin (manifest_id);
CREATE INDEX pin_expires ON pin (expires_at) WHERE expires_at IS NOT NULL;

-- What agents reported, in the order of their ledgers. `link` tells how a record follows the one before it here;
-- `reach` is the bytes of all that came for the target up to this record.
CREATE TABLE attempt (
    id INTEGER PRIMARY KEY NOT NULL,
    holder TEXT NOT NULL,
    target TEXT NOT NULL,
    sequence BIGINT NOT NULL,
    hash BLOB NOT NULL,
    link TEXT NOT NULL CHECK (link IN ('start', 'next', 'gap', 'fork')),
    kind TEXT NOT NULL,
    attempt BIGINT,
    repository TEXT,
    digest BLOB,
    outcome TEXT,
    body TEXT NOT NULL,
    reach BIGINT NOT NULL,
    received_by TEXT NOT NULL,
    received_at BIGINT NOT NULL,
    UNIQUE (holder, target, hash),
    UNIQUE (holder, target, sequence)
);
CREATE INDEX attempt_holder ON attempt (holder, id);
CREATE INDEX attempt_digest ON attempt (digest, id) WHERE digest IS NOT NULL;
CREATE INDEX attempt_received ON attempt (received_at);

-- Logical bytes per repository, folded as those of namespaces are.
ALTER TABLE usage_delta ADD COLUMN repository_id BIGINT;
CREATE INDEX usage_delta_namespace ON usage_delta (namespace_id);
CREATE TABLE repository_total (
    repository_id INTEGER PRIMARY KEY NOT NULL,
    namespace_id BIGINT NOT NULL,
    bytes BIGINT NOT NULL,
    objects BIGINT NOT NULL,
    folded_at BIGINT NOT NULL
);
CREATE INDEX repository_total_bytes ON repository_total (bytes, repository_id);
CREATE INDEX repository_total_namespace ON repository_total (namespace_id, bytes, repository_id);
-- Repositories begin with what their rows say. Deltas of programs of schema 1 have no repository; each makes those of its
-- namespace be counted again.
INSERT INTO repository_total (repository_id, namespace_id, bytes, objects, folded_at)
    SELECT c.repository_id, r.namespace_id, SUM(c.size), COUNT(*), 0 FROM (
        SELECT m.repository_id, m.size FROM manifest m
        UNION ALL
        SELECT rb.repository_id, b.size FROM repository_blob rb JOIN blob b ON b.id = rb.blob_id
    ) c JOIN repository r ON r.id = c.repository_id GROUP BY c.repository_id, r.namespace_id;
-- What is counted from time to time is counted in these, not in the tables.
CREATE INDEX blob_size ON blob (size);
CREATE INDEX manifest_size ON manifest (size);

-- Pulls merged by principal, digest and hour. They may outlive their repository.
CREATE TABLE pull (
    repository_id BIGINT NOT NULL,
    digest BLOB NOT NULL,
    principal TEXT NOT NULL,
    hour BIGINT NOT NULL,
    pulls BIGINT NOT NULL,
    PRIMARY KEY (repository_id, digest, principal, hour)
) WITHOUT ROWID;
CREATE INDEX pull_hour ON pull (hour);

CREATE TABLE retention_run (
    id INTEGER PRIMARY KEY NOT NULL,
    started_at BIGINT NOT NULL,
    finished_at BIGINT,
    policy TEXT NOT NULL,
    dry_run BIGINT NOT NULL,
    actor TEXT NOT NULL,
    kept BIGINT NOT NULL,
    removed BIGINT NOT NULL
);

CREATE TABLE retention_decision (
    run_id BIGINT NOT NULL REFERENCES retention_run (id) ON DELETE CASCADE,
    repository TEXT NOT NULL,
    tag TEXT NOT NULL,
    digest BLOB NOT NULL,
    generation BIGINT NOT NULL,
    action TEXT NOT NULL CHECK (action IN ('keep', 'remove')),
    reason TEXT NOT NULL,
    undone_at BIGINT,
    PRIMARY KEY (run_id, repository, tag)
) WITHOUT ROWID;

-- The number of the last transaction that each session to the database committed, so that the outcome of a COMMIT whose
-- answer was lost can be found out; below zero it is a fence. SQLite has no use for it.
CREATE TABLE commit_mark (
    session INTEGER PRIMARY KEY NOT NULL,
    last BIGINT NOT NULL,
    at BIGINT NOT NULL
);
