//! An object store in the process that does what a test tells it to do wrong. What a right one does is tested with
//! real ones (`object_store.rs`); this one knows only what the store asks.

use std::collections::{BTreeMap, VecDeque};
use std::fmt::Write as _;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use oci::Digest;
use store::{
    DatabaseLocation, Location, ObjectLocation, Options, S3Credentials, S3Location, Store,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};

/// The requests, as faults name them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Request {
    Put,
    Get,
    Head,
    Create,
    Part,
    Complete,
    Abort,
    Delete,
    DeleteOne,
    ListUploads,
    List,
}

/// What goes wrong with one request.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Fault {
    /// It is answered with this status and nothing is done.
    Status(u16),
    /// It is answered with 404 and this code, and nothing is done.
    NoSuch(&'static str),
    /// It is answered with 404 and a page of somebody else, and nothing is done.
    NotFound,
    /// It is done, and then the connection is closed without an answer.
    LostAnswer,
    /// It is answered with 200 and an error in the body, and nothing is done.
    ErrorWithin200,
    /// The body of the answer ends after so many bytes.
    Short(usize),
    /// The answer is as long as it says, and shorter than the object.
    WrongLength,
    /// One byte of the body of the answer is another one.
    Flipped,
    /// Nothing is answered for longer than anybody waits.
    Silence,
}

#[derive(Default)]
struct State {
    objects: BTreeMap<String, Bytes>,
    /// Key and parts by upload id.
    uploads: BTreeMap<String, (String, BTreeMap<usize, Bytes>)>,
    created: usize,
    faults: VecDeque<(Request, Fault)>,
    requests: Vec<Request>,
}

/// The running stand-in.
#[derive(Clone)]
pub(crate) struct StandIn {
    state: Arc<Mutex<State>>,
    pub(crate) endpoint: String,
}

impl StandIn {
    pub(crate) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let state = Arc::<Mutex<State>>::default();
        let served = Arc::clone(&state);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(stream, Arc::clone(&served)));
            }
        });
        Self { state, endpoint }
    }

    /// A store over this object store.
    pub(crate) async fn open(&self, database: DatabaseLocation, options: Options) -> Store {
        Store::open_at(&self.location(database), options)
            .await
            .unwrap()
    }

    /// Where that store is.
    pub(crate) fn location(&self, database: DatabaseLocation) -> Location {
        let objects = ObjectLocation::S3(S3Location {
            bucket: "bucket".to_owned(),
            endpoint: Some(self.endpoint.clone()),
            path_style: true,
            credentials: Some(S3Credentials {
                key_id: "key".to_owned(),
                secret: "secret".to_owned(),
            }),
            ..S3Location::default()
        });
        Location { database, objects }
    }

    /// The next `times` requests of this kind go wrong.
    pub(crate) fn fail(&self, request: Request, fault: Fault, times: usize) {
        let mut state = self.state.lock().unwrap();
        for _ in 0..times {
            state.faults.push_back((request, fault));
        }
    }

    /// All is well again. Tells how many faults nobody met.
    pub(crate) fn heal(&self) -> usize {
        let mut state = self.state.lock().unwrap();
        std::mem::take(&mut state.faults).len()
    }

    /// How many requests of this kind came.
    pub(crate) fn count(&self, request: Request) -> usize {
        let state = self.state.lock().unwrap();
        state.requests.iter().filter(|one| **one == request).count()
    }

    /// How many objects of blobs there are.
    pub(crate) fn objects(&self) -> usize {
        let state = self.state.lock().unwrap();
        let keys = state.objects.keys();
        keys.filter(|key| key.split('/').any(|part| part == "o"))
            .count()
    }

    pub(crate) fn uploads(&self) -> usize {
        self.state.lock().unwrap().uploads.len()
    }

    /// Writes over a part of the one open upload, as a writer would that lost its claim long ago.
    pub(crate) fn overwrite_part(&self, number: usize, bytes: Bytes) {
        let mut state = self.state.lock().unwrap();
        let (_, parts) = state.uploads.values_mut().next().unwrap();
        parts.insert(number, bytes);
    }

    /// Takes the object out that has these bytes, as an accident would.
    pub(crate) fn lose(&self, bytes: &Bytes) {
        let mut state = self.state.lock().unwrap();
        state.objects.retain(|_, object| object != bytes);
    }

    /// Changes every object.
    pub(crate) fn damage(&self) {
        let mut state = self.state.lock().unwrap();
        for bytes in state.objects.values_mut() {
            let mut changed = bytes.to_vec();
            changed[0] ^= 1;
            *bytes = changed.into();
        }
    }
}

async fn serve(stream: TcpStream, state: Arc<Mutex<State>>) {
    let mut stream = BufReader::new(stream);
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        match stream.read_u8().await {
            Ok(byte) => head.push(byte),
            Err(_) => return,
        }
    }
    let head = String::from_utf8(head).unwrap();
    let header = |name: &str| {
        head.lines().find_map(|line| {
            let (key, value) = line.split_once(':')?;
            key.eq_ignore_ascii_case(name)
                .then(|| value.trim().to_owned())
        })
    };
    let length = header("content-length").map_or(0, |text| text.parse().unwrap());
    let mut body = vec![0; length];
    if stream.read_exact(&mut body).await.is_err() {
        return;
    }
    let mut words = head.split(' ');
    let (method, target) = (words.next().unwrap(), words.next().unwrap());
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let query: BTreeMap<&str, &str> = query
        .split('&')
        .map(|pair| pair.split_once('=').unwrap_or((pair, "")))
        .collect();
    let request = kind(method, &query);
    let fault = {
        let mut state = state.lock().unwrap();
        state.requests.push(request);
        let next = state.faults.iter().position(|(of, _)| *of == request);
        next.and_then(|index| state.faults.remove(index))
            .map(|(_, fault)| fault)
    };
    let answer = match fault {
        Some(Fault::Status(status)) => Answer::of(status, "<Error><Code>Broken</Code></Error>"),
        Some(Fault::NoSuch(code)) => Answer::of(404, format!("<Error><Code>{code}</Code></Error>")),
        Some(Fault::NotFound) => Answer::of(404, "<html><h1>404 Not Found</h1></html>"),
        Some(Fault::ErrorWithin200) => Answer::of(
            200,
            "<Error><Code>InternalError</Code><Message>no</Message></Error>",
        ),
        Some(Fault::Silence) => {
            tokio::time::sleep(Duration::from_hours(1)).await;
            return;
        }
        _ => {
            let range = header("range");
            act(
                &mut state.lock().unwrap(),
                request,
                path,
                &query,
                range,
                body.into(),
            )
        }
    };
    let mut answer = answer;
    match fault {
        Some(Fault::LostAnswer) => return,
        Some(Fault::Short(length)) => answer.sent = Some(length),
        Some(Fault::WrongLength) => {
            answer.body.truncate(answer.body.len() / 2);
            answer.headers.clear();
        }
        Some(Fault::Flipped) => {
            let mut changed = answer.body.to_vec();
            changed[0] ^= 1;
            answer.body = changed.into();
        }
        _ => {}
    }
    let length = answer.length.unwrap_or(answer.body.len());
    let mut text = format!(
        "HTTP/1.1 {} x\r\nConnection: close\r\nContent-Length: {length}\r\nLast-Modified: Wed, 21 Oct 2026 07:28:00 GMT\r\n",
        answer.status
    );
    for (name, value) in &answer.headers {
        write!(text, "{name}: {value}\r\n").unwrap();
    }
    text.push_str("\r\n");
    let stream = stream.get_mut();
    let sent = answer
        .sent
        .unwrap_or(answer.body.len())
        .min(answer.body.len());
    let _ = stream.write_all(text.as_bytes()).await;
    let _ = stream.write_all(&answer.body[..sent]).await;
    let _ = stream.shutdown().await;
}

fn kind(method: &str, query: &BTreeMap<&str, &str>) -> Request {
    let has = |name| query.contains_key(name);
    match method {
        "PUT" if has("partNumber") => Request::Part,
        "PUT" => Request::Put,
        "HEAD" => Request::Head,
        "POST" if has("uploads") => Request::Create,
        "POST" if has("delete") => Request::Delete,
        "POST" => Request::Complete,
        "DELETE" if has("uploadId") => Request::Abort,
        "DELETE" => Request::DeleteOne,
        _ if has("uploads") => Request::ListUploads,
        _ if has("list-type") => Request::List,
        _ => Request::Get,
    }
}

struct Answer {
    status: u16,
    headers: Vec<(&'static str, String)>,
    body: Bytes,
    /// What `Content-Length` says when that is not the length of the body.
    length: Option<usize>,
    /// Bytes of the body that are sent.
    sent: Option<usize>,
}

impl Answer {
    fn of(status: u16, body: impl Into<Bytes>) -> Self {
        Self {
            status,
            headers: Vec::new(),
            body: body.into(),
            length: None,
            sent: None,
        }
    }

    fn with(mut self, name: &'static str, value: String) -> Self {
        self.headers.push((name, value));
        self
    }
}

fn act(
    state: &mut State,
    request: Request,
    path: &str,
    query: &BTreeMap<&str, &str>,
    range: Option<String>,
    body: Bytes,
) -> Answer {
    let key = path.strip_prefix("/bucket/").unwrap_or_default().to_owned();
    let id = query.get("uploadId").map(|id| (*id).to_owned());
    match request {
        Request::Put => {
            let etag = etag(&body);
            state.objects.insert(key, body);
            Answer::of(200, "").with("ETag", etag)
        }
        Request::Get | Request::Head => match state.objects.get(&key) {
            None => Answer::of(404, "<Error><Code>NoSuchKey</Code></Error>"),
            Some(bytes) => {
                let total = bytes.len();
                let range = range.and_then(|text| {
                    let (first, last) = text.strip_prefix("bytes=")?.split_once('-')?;
                    Some((first.parse::<usize>().ok()?, last.parse::<usize>().ok()?))
                });
                let mut answer = match range {
                    Some((first, last)) => Answer::of(206, bytes.slice(first..=last))
                        .with("Content-Range", format!("bytes {first}-{last}/{total}")),
                    None => Answer::of(200, bytes.clone()),
                };
                if request == Request::Head {
                    (answer.length, answer.body) = (Some(total), Bytes::new());
                }
                answer.with("ETag", etag(bytes))
            }
        },
        Request::Create => {
            state.created += 1;
            let id = format!("upload-{}", state.created);
            state.uploads.insert(id.clone(), (key, BTreeMap::new()));
            Answer::of(
                200,
                format!(
                    "<InitiateMultipartUploadResult><UploadId>{id}</UploadId></InitiateMultipartUploadResult>"
                ),
            )
        }
        Request::Part => match id.and_then(|id| state.uploads.get_mut(&id)) {
            None => no_upload(),
            Some((_, parts)) => {
                let etag = etag(&body);
                parts.insert(query["partNumber"].parse().unwrap(), body);
                Answer::of(200, "").with("ETag", etag)
            }
        },
        Request::Complete => {
            let Some(id) = id.filter(|id| state.uploads.contains_key(id)) else {
                return no_upload();
            };
            let text = String::from_utf8_lossy(&body).replace("&quot;", "\"");
            let parts = &state.uploads[&id].1;
            let mut whole = Vec::new();
            for part in text.split("<Part>").skip(1) {
                let number: usize = between(part, "PartNumber").parse().unwrap();
                match parts.get(&number) {
                    Some(bytes) if etag(bytes) == between(part, "ETag") => {
                        whole.extend_from_slice(bytes);
                    }
                    _ => return Answer::of(400, "<Error><Code>InvalidPart</Code></Error>"),
                }
            }
            state.uploads.remove(&id);
            state.objects.insert(key, whole.into());
            Answer::of(
                200,
                "<CompleteMultipartUploadResult><ETag>\"whole\"</ETag></CompleteMultipartUploadResult>",
            )
        }
        Request::Abort => match id.and_then(|id| state.uploads.remove(&id)) {
            None => no_upload(),
            Some(_) => Answer::of(204, ""),
        },
        Request::DeleteOne => {
            state.objects.remove(&key);
            Answer::of(204, "")
        }
        Request::Delete => {
            let text = String::from_utf8_lossy(&body).into_owned();
            for object in text.split("<Key>").skip(1) {
                state.objects.remove(object.split("</Key>").next().unwrap());
            }
            Answer::of(
                200,
                "<DeleteResult><Deleted><Key>x</Key></Deleted></DeleteResult>",
            )
        }
        Request::ListUploads => {
            let mut uploads = String::new();
            for (id, (key, _)) in &state.uploads {
                write!(
                    uploads,
                    "<Upload><Key>{key}</Key><UploadId>{id}</UploadId></Upload>"
                )
                .unwrap();
            }
            Answer::of(
                200,
                format!("<ListMultipartUploadsResult>{uploads}</ListMultipartUploadsResult>"),
            )
        }
        Request::List => {
            let prefix = query.get("prefix").copied().unwrap_or_default();
            let prefix = prefix.replace("%2F", "/");
            let mut objects = String::new();
            let found = state.objects.iter();
            for (key, bytes) in found.filter(|(key, _)| key.starts_with(&prefix)) {
                let size = bytes.len();
                write!(objects, "<Contents><Key>{key}</Key><Size>{size}</Size><LastModified>2026-10-21T07:28:00.000Z</LastModified></Contents>").unwrap();
            }
            Answer::of(
                200,
                format!("<ListBucketResult>{objects}</ListBucketResult>"),
            )
        }
    }
}

fn no_upload() -> Answer {
    Answer::of(404, "<Error><Code>NoSuchUpload</Code></Error>")
}

fn between<'a>(text: &'a str, name: &str) -> &'a str {
    let (_, rest) = text.split_once(&format!("<{name}>")).unwrap();
    rest.split_once(&format!("</{name}>")).unwrap().0
}

fn etag(bytes: &[u8]) -> String {
    format!("\"{}\"", &Digest::sha256(bytes).to_string()[7..39])
}
