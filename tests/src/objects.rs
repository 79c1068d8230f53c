//! S3-compatible object stores of our own, on free ports: two implementations that know nothing of each other.

use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::{Duration, Instant};

use crate::http::{Connection, Response};
use crate::server::free_port;
use crate::sigv4::{self, Keys};
use crate::{Run, Scratch, digest, tools};

/// How long a store may take to start.
const PATIENCE: Duration = Duration::from_mins(1);

/// Which implementation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// MinIO.
    Minio,
    /// Versity's gateway over a file system.
    Versitygw,
}

impl Kind {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Minio, Self::Versitygw];

    /// The name of its program, which is how people call it.
    pub fn program(self) -> &'static str {
        match self {
            Self::Minio => "minio",
            Self::Versitygw => "versitygw",
        }
    }
}

/// A running store. It is killed when this value goes.
#[derive(Debug)]
pub struct ObjectStore {
    kind: Kind,
    program: PathBuf,
    child: Option<Child>,
    port: u16,
    data: PathBuf,
    scratch: Scratch,
}

impl ObjectStore {
    /// Starts a store without buckets.
    ///
    /// # Panics
    /// When its program is not there or does not start.
    pub fn start(kind: Kind) -> Self {
        Self::with(kind, tools::tool(kind.program()))
    }

    /// Starts a store of this program.
    ///
    /// # Panics
    /// When it does not start.
    pub fn with(kind: Kind, program: PathBuf) -> Self {
        let scratch = Scratch::new();
        let mut store = Self {
            kind,
            program,
            child: None,
            port: 0,
            data: scratch.dir("objects"),
            scratch,
        };
        store.launch();
        store
    }

    /// Its address, as `http://127.0.0.1:PORT`.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.host())
    }

    /// Its address, as `127.0.0.1:PORT`.
    pub fn host(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// Which implementation it is.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The keys of its owner.
    pub fn keys() -> Keys {
        Keys {
            id: "longshore-test".to_owned(),
            secret: "longshore-test-secret".to_owned(),
        }
    }

    /// Makes a bucket.
    ///
    /// # Panics
    /// When the store refuses.
    pub fn create_bucket(&self, name: &str) {
        let answer = self.request("PUT", &format!("/{name}"), "", &[], &[]);
        assert_eq!(answer.status(), 200, "{}", answer.text());
    }

    /// The keys of all objects whose key begins with `prefix`, with their sizes.
    ///
    /// # Panics
    /// When the store refuses.
    pub fn list(&self, bucket: &str, prefix: &str) -> Vec<(String, u64)> {
        list(&self.endpoint(), bucket, prefix)
    }

    /// The multipart uploads that are open, as `KEY ID`.
    ///
    /// # Panics
    /// When the store refuses.
    pub fn open_uploads(&self, bucket: &str) -> Vec<String> {
        let answer = self.request("GET", &format!("/{bucket}"), "uploads=", &[], &[]);
        assert_eq!(answer.status(), 200, "{}", answer.text());
        let text = answer.text();
        elements(&text, "Upload")
            .iter()
            .map(|upload| format!("{} {}", element(upload, "Key"), element(upload, "UploadId")))
            .collect()
    }

    /// Reads an object.
    ///
    /// # Panics
    /// When the store refuses.
    pub fn get(&self, bucket: &str, key: &str) -> Vec<u8> {
        let answer = self.request("GET", &format!("/{bucket}/{key}"), "", &[], &[]);
        assert_eq!(answer.status(), 200, "{}", answer.text());
        answer.body
    }

    /// Writes an object.
    ///
    /// # Panics
    /// When the store refuses.
    pub fn put(&self, bucket: &str, key: &str, bytes: &[u8]) {
        let answer = self.request("PUT", &format!("/{bucket}/{key}"), "", &[], bytes);
        assert_eq!(answer.status(), 200, "{}", answer.text());
    }

    /// Deletes an object.
    ///
    /// # Panics
    /// When the store refuses.
    pub fn delete(&self, bucket: &str, key: &str) {
        let answer = self.request("DELETE", &format!("/{bucket}/{key}"), "", &[], &[]);
        assert_eq!(answer.status(), 204, "{}", answer.text());
    }

    /// Sends a signed request of its owner.
    ///
    /// # Panics
    /// When the store cannot be reached.
    pub fn request(
        &self,
        method: &str,
        path: &str,
        query: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> Response {
        request(&self.endpoint(), method, path, query, headers, body)
            .unwrap_or_else(|error| panic!("{method} {path}: {error}\n{}", self.logged()))
    }

    /// Its process id.
    ///
    /// # Panics
    /// When it does not run.
    pub fn pid(&self) -> u32 {
        self.child.as_ref().expect("the store runs").id()
    }

    /// Stops it at once.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            drop(child.kill());
            drop(child.wait());
        }
    }

    /// Starts it again where it was.
    ///
    /// # Panics
    /// When it does not start.
    pub fn restart(&mut self) {
        self.kill();
        self.launch();
    }

    /// What it has logged so far.
    pub fn logged(&self) -> String {
        std::fs::read_to_string(self.scratch.join("objects.log")).unwrap_or_default()
    }

    fn launch(&mut self) {
        let fixed = self.port;
        for attempt in 0.. {
            if fixed == 0 {
                self.port = free_port();
            }
            let mut child = self.command().spawn(&self.scratch.join("objects.log"));
            let start = Instant::now();
            loop {
                let answer = request(&self.endpoint(), "GET", "/", "", &[], &[]);
                if answer.is_ok_and(|answer| answer.status() == 200) {
                    self.child = Some(child);
                    return;
                }
                let ended = matches!(child.try_wait(), Ok(Some(_)));
                // Somebody may have taken the port meanwhile.
                if ended && fixed == 0 && attempt < 3 {
                    break;
                }
                assert!(
                    !ended && start.elapsed() < PATIENCE,
                    "`{}` did not start:\n{}",
                    self.program.display(),
                    self.logged()
                );
                std::thread::sleep(Duration::from_millis(20));
            }
        }
    }

    fn command(&self) -> Run {
        let keys = Self::keys();
        let home = self.scratch.path();
        let run = Run::new(&self.program).dir(home).env("HOME", home);
        match self.kind {
            Kind::Minio => run
                .env("MINIO_ROOT_USER", keys.id)
                .env("MINIO_ROOT_PASSWORD", keys.secret)
                .env("MINIO_BROWSER", "off")
                .env("MINIO_UPDATE", "off")
                .args(["server", "--quiet", "--address"])
                .arg(self.host())
                .arg(&self.data),
            Kind::Versitygw => run
                .env("ROOT_ACCESS_KEY", keys.id)
                .env("ROOT_SECRET_KEY", keys.secret)
                .args(["--quiet", "--port"])
                .arg(self.host())
                .arg("posix")
                .arg(&self.data),
        }
    }

    /// Where it keeps its files.
    pub fn data(&self) -> &Path {
        &self.data
    }
}

impl Drop for ObjectStore {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The keys of all objects of the store at `endpoint` whose key begins with `prefix`, with their sizes.
///
/// # Panics
/// When the store refuses.
pub fn list(endpoint: &str, bucket: &str, prefix: &str) -> Vec<(String, u64)> {
    let (mut found, mut more) = (Vec::new(), String::new());
    loop {
        let prefix = encoded(prefix);
        let query = format!("{more}list-type=2&prefix={prefix}");
        let answer = request(endpoint, "GET", &format!("/{bucket}"), &query, &[], &[])
            .unwrap_or_else(|error| panic!("a list of {bucket}: {error}"));
        assert_eq!(answer.status(), 200, "{}", answer.text());
        let text = answer.text();
        found.extend(elements(&text, "Contents").iter().map(|object| {
            let size = element(object, "Size").parse().unwrap_or(0);
            (element(object, "Key").to_owned(), size)
        }));
        if element(&text, "IsTruncated") != "true" {
            return found;
        }
        let token = encoded(element(&text, "NextContinuationToken"));
        more = format!("continuation-token={token}&");
    }
}

/// Sends a signed request.
fn request(
    endpoint: &str,
    method: &str,
    path: &str,
    query: &str,
    headers: &[(&str, &str)],
    body: &[u8],
) -> std::io::Result<Response> {
    let payload = digest(body).trim_start_matches("sha256:").to_owned();
    let date = sigv4::now();
    let host = endpoint.trim_start_matches("http://");
    let mut signed = vec![
        ("host".to_owned(), host.to_owned()),
        ("x-amz-content-sha256".to_owned(), payload.clone()),
        ("x-amz-date".to_owned(), date.clone()),
    ];
    signed.extend(
        headers
            .iter()
            .map(|(name, value)| (name.to_ascii_lowercase(), (*value).to_owned())),
    );
    let authorization = sigv4::authorization(
        &sigv4::Request {
            method,
            path,
            query,
            headers: &signed,
            payload: &payload,
            date: &date,
        },
        &ObjectStore::keys(),
    );
    let mut sent: Vec<(&str, &str)> = signed
        .iter()
        .skip(1)
        .map(|(name, value)| (name.as_str(), value.as_str()))
        .collect();
    sent.push(("authorization", &authorization));
    let target = if query.is_empty() {
        path.to_owned()
    } else {
        format!("{path}?{query}")
    };
    Connection::open(endpoint)?.request(method, &target, &sent, body)
}

/// A query value with everything escaped that the signature wants escaped.
fn encoded(text: &str) -> String {
    text.bytes()
        .map(|byte| match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => {
                char::from(byte).to_string()
            }
            _ => format!("%{byte:02X}"),
        })
        .collect()
}

/// The contents of all elements of this name. (Names of keys in the tests need no unescaping.)
fn elements<'a>(text: &'a str, name: &str) -> Vec<&'a str> {
    let (open, close) = (format!("<{name}>"), format!("</{name}>"));
    text.split(&open)
        .skip(1)
        .filter_map(|rest| rest.split(&close).next())
        .collect()
}

/// The content of the first element of this name, or nothing.
fn element<'a>(text: &'a str, name: &str) -> &'a str {
    elements(text, name).first().copied().unwrap_or("")
}
