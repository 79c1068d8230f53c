//! The bytes of blobs on their way from one place to another.
//!
//! A blob's row stands at the destination before the first byte of its object (`I6`), as a suspect one. When the whole
//! object was read, had the digest of its row, and is durable at the destination, the row becomes a sound one, so a
//! run that goes on asks for nothing that is there. Keys stay: none was ever used twice, at no place (`I5`).
//!
//! A blob that is sound by its row at the source and cannot be read there is looked at again when all others are
//! through, and then it is a problem: the transfer does not come to its end, and the source stays in use. Only who says
//! so ([`super::Settings::accept_damaged`]) lets it go. A failure that may pass ends the run.

use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream::{self, StreamExt as _};
use oci::{Digest, Hasher};

use super::tables::{Insert, Pages, TABLES, Table, columns, discard_statement};
use super::{Report, Settings, Verify};
use crate::blob::StorageKey;
use crate::blob::objects::Objects;
use crate::blob::s3::{Completed, Failure, S3, pause, transfer};
use crate::blocking::blocking;
use crate::error::Error;
use crate::failpoint::failpoint;
use crate::model::BlobContent;
use crate::sql::{Body, Db, Row, Statement, Tx, Value, WriteKind};

/// What the pass over the blobs needs to know.
pub(crate) struct Moving<'a> {
    pub(crate) from: &'a Objects,
    pub(crate) to: &'a Objects,
    pub(crate) db: &'a Db,
    /// The objects stay where they are: only rows are carried.
    pub(crate) objects_stay: bool,
    pub(crate) parallel: usize,
    /// What is missing or damaged at the source is let go.
    pub(crate) accept_damaged: bool,
}

/// Where the columns of a blob's row stand.
struct Columns {
    names: Vec<String>,
    id: usize,
    digest: usize,
    size: usize,
    body: usize,
    key: usize,
    state: usize,
}

impl Columns {
    async fn of(tx: &mut Tx) -> Result<Self, Error> {
        let names = columns(tx, "blob").await?;
        let at = |name: &str| {
            names
                .iter()
                .position(|column| column == name)
                .ok_or_else(|| Error::Database(format!("blobs have no column `{name}`")))
        };
        Ok(Self {
            id: at("id")?,
            digest: at("digest")?,
            size: at("size")?,
            body: at("body")?,
            key: at("storage_key")?,
            state: at("state")?,
            names,
        })
    }
}

/// An object to bring.
struct Wanted {
    id: i64,
    digest: Digest,
    size: u64,
    key: StorageKey,
    /// It is sound by its row at the source.
    sound: bool,
}

impl Moving<'_> {
    /// Brings every blob that the snapshot `from` knows, and takes out what it does not know.
    pub(crate) async fn run(&self, from: &mut Tx, report: &mut Report) -> Result<(), Error> {
        let at = Columns::of(from).await?;
        let table = blob_table()?;
        let mut pages = Pages::new(table, table.key, &at.names);
        let insert = Insert::new(table, &at.names);
        let mut last = i64::MIN;
        let mut doubtful = Vec::new();
        loop {
            let rows = pages.next(from).await?;
            let end = match rows.last() {
                Some(row) => row.i64(at.id)?,
                None => i64::MAX,
            };
            let ended = rows.is_empty();
            let wanted = self.rows(&at, &insert, rows, (last, end)).await?;
            failpoint("carry.after_blob_rows");
            let broken = self.objects(wanted, report).await?;
            doubtful.extend(broken);
            if doubtful.len() > MAX_DOUBTFUL {
                return Err(Error::Moving(format!(
                    "more than {MAX_DOUBTFUL} objects of the source are missing or damaged; look whether it names the right \
                     place, and run `verify-store` there"
                )));
            }
            if ended {
                break;
            }
            last = end;
        }
        self.doubtful(doubtful, report).await
    }

    /// Looks again, later, at what was not as its row says, and tells what is so still.
    async fn doubtful(
        &self,
        mut doubtful: Vec<(Wanted, String)>,
        report: &mut Report,
    ) -> Result<(), Error> {
        for wait in LOOKS {
            if doubtful.is_empty() {
                return Ok(());
            }
            tokio::time::sleep(wait).await;
            let again = doubtful.into_iter().map(|(object, _)| object).collect();
            doubtful = self.objects(again, report).await?;
        }
        for (object, problem) in doubtful {
            let digest = &object.digest;
            if !object.sound || self.accept_damaged {
                report.damaged.push(format!(
                    "blob `{digest}` is damaged at the source and stays so: {problem}"
                ));
            } else {
                report.problems.push(format!(
                    "blob `{digest}` cannot be read at the source: {problem}; push it again or restore it there, or let \
                     it go with `--accept-damaged`"
                ));
            }
        }
        Ok(())
    }

    /// Makes the destination's rows after `range.0` up to `range.1` those of the source; the objects that it lacks.
    async fn rows(
        &self,
        at: &Columns,
        insert: &Insert,
        rows: Vec<Row>,
        range: (i64, i64),
    ) -> Result<Vec<Wanted>, Error> {
        let mut wanted = Vec::new();
        let mut incoming = Vec::with_capacity(rows.len());
        for row in rows {
            let moves = !self.objects_stay && row.opt_text(at.key)?.is_some();
            let sound = row.text(at.state)? == "ok";
            if moves {
                wanted.push(Wanted {
                    id: row.i64(at.id)?,
                    digest: row.digest(at.digest)?,
                    size: row.u64(at.size)?,
                    key: StorageKey::parse(&row.text(at.key)?)?,
                    sound,
                });
            }
            let digest = row.digest(at.digest)?;
            let id = row.i64(at.id)?;
            let key = row.opt_text(at.key)?;
            let mut values = row.into_values();
            if moves && let Some(state) = values.get_mut(at.state) {
                *state = Value::Text("suspect".to_owned());
            }
            incoming.push(Incoming {
                id,
                digest,
                key,
                moves,
                sound,
                values,
            });
        }
        let present = self
            .db
            .write(Replace {
                insert: *insert,
                rows: Arc::new(incoming),
                range,
            })
            .await?;
        wanted.retain(|object| !present.contains(&object.id));
        Ok(wanted)
    }

    /// Brings objects, several at one time. Those that are missing or damaged at the source come back, each with what is
    /// wrong; their rows stay suspect.
    async fn objects(
        &self,
        wanted: Vec<Wanted>,
        report: &mut Report,
    ) -> Result<Vec<(Wanted, String)>, Error> {
        let mut broken = Vec::new();
        let mut moving = stream::iter(wanted)
            .map(|object| async move {
                let moved = self.object(&object).await;
                (object, moved)
            })
            .buffer_unordered(self.parallel.max(1));
        while let Some((object, moved)) = moving.next().await {
            match moved {
                Ok(()) => {
                    report.objects_moved += 1;
                    report.bytes_moved += object.size;
                    self.db.write(Sound(object.id)).await?;
                    failpoint("carry.after_object");
                }
                Err(Broken::Source(problem)) => broken.push((object, problem)),
                Err(Broken::Fatal(error)) => return Err(error),
            }
        }
        Ok(broken)
    }

    async fn object(&self, object: &Wanted) -> Result<(), Broken> {
        let mut reader = Reader::open(self.from, object).await?;
        match self.to {
            Objects::Directory(files) => {
                let (files, key) = (Arc::clone(files), object.key.clone());
                let file = {
                    let (files, key) = (Arc::clone(&files), key.clone());
                    blocking(move || files.create(&key, &[]).map(Arc::new))
                        .await
                        .map_err(Broken::Fatal)?
                };
                let mut at = 0;
                while let Some(chunk) = reader.next().await? {
                    let (file, files, key) = (Arc::clone(&file), Arc::clone(&files), key.clone());
                    let length = chunk.len() as u64;
                    blocking(move || {
                        file.write_all_at(&chunk, at)
                            .map_err(|error| Error::io("write", &files.path(&key), error))
                    })
                    .await
                    .map_err(Broken::Fatal)?;
                    at += length;
                }
                reader.finish(object)?;
                blocking(move || {
                    file.sync_data()
                        .map_err(|error| Error::io("sync", &files.path(&key), error))?;
                    files.sync_entry(&key)
                })
                .await
                .map_err(Broken::Fatal)?;
            }
            Objects::S3(s3) => send(s3, object, &mut reader).await?,
        }
        Ok(())
    }
}

/// Writes an object into an object store. It exists when its last request was answered, and has the bytes whose digest
/// was compared before that.
async fn send(s3: &S3, object: &Wanted, reader: &mut Reader) -> Result<(), Broken> {
    if object.size <= PART {
        let mut chunks = Vec::new();
        while let Some(chunk) = reader.next().await? {
            chunks.push(chunk);
        }
        reader.finish(object)?;
        return s3.put(&object.key, &chunks).await.map_err(Broken::Fatal);
    }
    // What a run that was killed left open under this key.
    s3.abort_all(&object.key).await.map_err(Broken::Fatal)?;
    let fatal = |failure: Failure| Broken::Fatal(failure.into());
    let id = s3.create_multipart(&object.key).await.map_err(fatal)?;
    let sent = send_parts(s3, object, &id, reader).await;
    if sent.is_err() {
        s3.abort(&object.key, &id).await.map_err(Broken::Fatal)?;
    }
    sent
}

async fn send_parts(s3: &S3, object: &Wanted, id: &str, reader: &mut Reader) -> Result<(), Broken> {
    // No object may have more than 10 000 parts.
    let part = PART.max(object.size.div_ceil(9_000));
    let mut etags = Vec::new();
    let mut ended = false;
    while !ended {
        let (mut chunks, mut length) = (Vec::new(), 0);
        while length < part {
            let Some(chunk) = reader.next().await? else {
                ended = true;
                break;
            };
            length += chunk.len() as u64;
            chunks.push(chunk);
        }
        if chunks.is_empty() {
            break;
        }
        let mut attempt = 0;
        loop {
            let limit: Duration = transfer(length);
            match s3
                .put_part(&object.key, id, etags.len(), &chunks, limit)
                .await
            {
                Ok(etag) => {
                    etags.push(etag);
                    break;
                }
                Err(failure) => {
                    let again = matches!(failure, Failure::Again(_)) && pause(attempt).await;
                    if !again {
                        return Err(Broken::Fatal(failure.into()));
                    }
                    attempt += 1;
                }
            }
        }
    }
    reader.finish(object)?;
    match s3
        .complete(&object.key, id, &etags)
        .await
        .map_err(Broken::Fatal)?
    {
        Completed::Yes(size) if size == object.size => Ok(()),
        other => Err(Broken::Fatal(Error::Unavailable {
            what: "the object store",
            problem: format!("an object did not become what was sent: {other:?}"),
        })),
    }
}

/// Why an object was not brought.
enum Broken {
    Source(String),
    Fatal(Error),
}

/// An object of the source, hashed as it is read.
struct Reader {
    content: Source,
    hasher: Hasher,
}

enum Source {
    File {
        file: Arc<std::fs::File>,
        at: u64,
        size: u64,
    },
    Remote(Box<crate::blob::s3::RemoteStream>),
}

impl Reader {
    async fn open(objects: &Objects, object: &Wanted) -> Result<Self, Broken> {
        let content = match objects.read(&object.key, object.size).map_err(of_source)? {
            BlobContent::File(file) => Source::File {
                file: Arc::new(file),
                at: 0,
                size: object.size,
            },
            BlobContent::Remote(blob) => {
                let stream = blob.stream(0..object.size).await.map_err(of_source)?;
                Source::Remote(Box::new(stream))
            }
            // Objects are never in a row.
            BlobContent::Inline(_) => return Err(Broken::Fatal(Error::Stopped)),
        };
        Ok(Self {
            content,
            hasher: Hasher::new(object.digest.algorithm()),
        })
    }

    async fn next(&mut self) -> Result<Option<Bytes>, Broken> {
        let chunk = match &mut self.content {
            Source::File { file, at, size } => {
                if at == size {
                    None
                } else {
                    let (file, start) = (Arc::clone(file), *at);
                    let length = usize::try_from((*size - start).min(CHUNK)).unwrap_or_default();
                    let chunk = tokio::task::spawn_blocking(move || {
                        let mut buffer = vec![0; length];
                        file.read_exact_at(&mut buffer, start)
                            .map(|()| Bytes::from(buffer))
                    })
                    .await
                    .map_err(|_| Broken::Fatal(Error::Stopped))?
                    .map_err(|error| Broken::Source(error.to_string()))?;
                    *at += chunk.len() as u64;
                    Some(chunk)
                }
            }
            Source::Remote(stream) => stream.next().await.map_err(of_source)?,
        };
        if let Some(chunk) = &chunk {
            self.hasher.update(chunk);
        }
        Ok(chunk)
    }

    fn finish(&self, object: &Wanted) -> Result<(), Broken> {
        let actual = self.hasher.clone().finish();
        if actual == object.digest {
            Ok(())
        } else {
            Err(Broken::Source(format!("its object has digest `{actual}`")))
        }
    }
}

/// What the source's objects say. One that is not there or has another length is a matter of that object.
fn of_source(error: Error) -> Broken {
    if error.is_missing() {
        return Broken::Source("its object is missing".to_owned());
    }
    match error {
        Error::Damaged { .. } => Broken::Source(error.to_string()),
        other => Broken::Fatal(other),
    }
}

/// Reads every object of the destination again, or asks for its size alone.
///
/// `accept_damaged`: the objects stay where they are, and what is damaged among them is told and let go.
pub(crate) async fn verify(
    tx: &mut Tx,
    objects: &Objects,
    settings: &Settings,
    accept_damaged: bool,
    report: &mut Report,
) -> Result<(), Error> {
    let (whole, parallel) = (settings.verify == Verify::Full, settings.parallel);
    let at = Columns::of(tx).await?;
    let table = blob_table()?;
    let mut pages = Pages::new(table, table.key, &at.names);
    loop {
        let rows = pages.next(tx).await?;
        if rows.is_empty() {
            return Ok(());
        }
        let mut wanted = Vec::new();
        for row in &rows {
            // What was damaged at the source is told already.
            if row.text(at.state)? != "ok" {
                continue;
            }
            let digest = row.digest(at.digest)?;
            if let Some(key) = row.opt_text(at.key)? {
                wanted.push(Wanted {
                    id: row.i64(at.id)?,
                    digest,
                    size: row.u64(at.size)?,
                    key: StorageKey::parse(&key)?,
                    sound: true,
                });
            } else {
                let body = row.opt_bytes(at.body)?.unwrap_or_default();
                if !digest.matches(&body) {
                    report
                        .problems
                        .push(format!("the bytes of blob `{digest}` are damaged"));
                }
            }
        }
        let mut looking = stream::iter(wanted)
            .map(|object| async move {
                let mut found = look(objects, &object, whole).await;
                for wait in LOOKS {
                    if !matches!(found, Ok(Some(_)) | Err(Broken::Source(_))) {
                        break;
                    }
                    tokio::time::sleep(wait).await;
                    found = look(objects, &object, whole).await;
                }
                (object, found)
            })
            .buffer_unordered(parallel.max(1));
        while let Some((object, found)) = looking.next().await {
            match found {
                Ok(None) => report.objects_verified += 1,
                Ok(Some(problem)) | Err(Broken::Source(problem)) if accept_damaged => {
                    report.damaged.push(format!(
                        "blob `{}` is damaged and stays so: {problem}",
                        object.digest
                    ));
                }
                Ok(Some(problem)) | Err(Broken::Source(problem)) => report.problems.push(format!(
                    "blob `{}` at the destination: {problem}",
                    object.digest
                )),
                Err(Broken::Fatal(error)) => return Err(error),
            }
        }
    }
}

/// What is wrong with an object.
async fn look(objects: &Objects, object: &Wanted, whole: bool) -> Result<Option<String>, Broken> {
    if whole {
        let actual = objects
            .digest(&object.key, object.size, object.digest.algorithm())
            .await
            .map_err(of_source)?;
        return Ok((actual != object.digest).then(|| format!("it has digest `{actual}`")));
    }
    let size = match objects {
        Objects::Directory(files) => {
            let (files, key, size) = (Arc::clone(files), object.key.clone(), object.size);
            // Its length is compared as it is opened.
            blocking(move || files.read(&key, size).map(|_| size))
                .await
                .map(Some)
                .map_err(of_source)?
        }
        Objects::S3(s3) => s3.size(&object.key).await.map_err(Broken::Fatal)?,
    };
    Ok(match size {
        Some(size) if size == object.size => None,
        Some(size) => Some(format!("it has {size} bytes, not {}", object.size)),
        None => Some("its object is missing".to_owned()),
    })
}

fn blob_table() -> Result<&'static Table, Error> {
    TABLES
        .iter()
        .find(|table| table.name == "blob")
        .ok_or(Error::Stopped)
}

/// A row of the source.
struct Incoming {
    id: i64,
    digest: Digest,
    key: Option<String>,
    /// It has an object that must come.
    moves: bool,
    /// It is sound at the source.
    sound: bool,
    values: Vec<Value>,
}

/// Makes the rows of a range of ids those of the source. Answers with the ids whose objects are there already.
struct Replace {
    insert: Insert,
    rows: Arc<Vec<Incoming>>,
    range: (i64, i64),
}

impl Body for Replace {
    type Output = std::collections::BTreeSet<i64>;
    const KIND: WriteKind = WriteKind::Maintenance;

    async fn run(&self, tx: &mut Tx) -> Result<Self::Output, Error> {
        let there = Statement::made(
            "SELECT id, storage_key, state FROM blob WHERE id > $1 AND id <= $2 ORDER BY id"
                .to_owned(),
        );
        let by_digest = Statement::made(
            "SELECT id, storage_key FROM blob WHERE digest = $1 AND id <> $2".to_owned(),
        );
        let remove = Statement::made("DELETE FROM blob WHERE id = $1".to_owned());
        let (from, to) = self.range;
        let mut known = std::collections::BTreeMap::new();
        for row in tx.query(there, &[from.into(), to.into()]).await? {
            known.insert(row.i64(0)?, (row.opt_text(1)?, row.text(2)?));
        }
        let mut present = Self::Output::new();
        let mut fresh = Vec::new();
        for incoming in self.rows.iter() {
            // Content that went and came again has another row.
            for stale in tx
                .query(by_digest, &[(&incoming.digest).into(), incoming.id.into()])
                .await?
            {
                known.remove(&stale.i64(0)?);
                tx.execute(remove, &[stale.i64(0)?.into()]).await?;
                discard(tx, stale.opt_text(1)?).await?;
            }
            if let Some((key, state)) = known.remove(&incoming.id) {
                if key == incoming.key && incoming.moves && incoming.sound && state == "ok" {
                    present.insert(incoming.id);
                    continue;
                }
                tx.execute(remove, &[incoming.id.into()]).await?;
                if key != incoming.key {
                    discard(tx, key).await?;
                }
            }
            fresh.push(incoming.values.clone());
        }
        // What the source has no more.
        for (id, (key, _)) in known {
            tx.execute(remove, &[id.into()]).await?;
            discard(tx, key).await?;
        }
        self.insert.rows(fresh).run(tx).await?;
        Ok(present)
    }
}

async fn discard(tx: &mut Tx, key: Option<String>) -> Result<(), Error> {
    let Some(key) = key else {
        return Ok(());
    };
    let now = tx.now();
    // A multipart upload may be open under it.
    let multipart = Value::Text(String::new());
    tx.execute(discard_statement(), &[key.into(), now.into(), multipart])
        .await
        .map(drop)
}

/// The object of a blob is whole and durable.
struct Sound(i64);

impl Body for Sound {
    type Output = ();
    const KIND: WriteKind = WriteKind::Maintenance;

    async fn run(&self, tx: &mut Tx) -> Result<(), Error> {
        let statement = Statement::made("UPDATE blob SET state = 'ok' WHERE id = $1".to_owned());
        tx.execute(statement, &[self.0.into()]).await.map(drop)
    }
}

/// How long each further look at what was not as its row says waits.
const LOOKS: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(4)];
/// Objects that may be missing or damaged before the source as a whole is in doubt.
const MAX_DOUBTFUL: usize = 10_000;
/// Bytes that move at once.
const CHUNK: u64 = 1 << 20;
/// The size of a part, and of an object that is sent in one request.
const PART: u64 = 16 << 20;
