//! A server on a free port over a store of its own, and a client that writes bytes.

use std::fmt::Write as _;
use std::net::{Ipv4Addr, SocketAddr};

use registry::{Access, Action, Rule, Server, Settings};
use store::{Options, Store};
use tempfile::TempDir;
use tokio::io::{
    AsyncBufReadExt as _, AsyncRead, AsyncReadExt as _, AsyncWriteExt as _, BufReader,
};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::place::Place;

pub(crate) const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub(crate) const INDEX: &str = "application/vnd.oci.image.index.v1+json";
pub(crate) const EMPTY: &str =
    "sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a";

/// A running server.
pub(crate) struct Registry {
    pub(crate) address: SocketAddr,
    /// For what nobody does by itself here, such as folding totals.
    pub(crate) store: Store,
    pub(crate) dir: TempDir,
    stop: Option<oneshot::Sender<()>>,
    pub(crate) task: JoinHandle<Result<(), registry::Error>>,
    _place: Place,
}

/// What came back.
#[derive(Clone, Debug)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
}

impl Registry {
    /// Open access.
    pub(crate) async fn open() -> Self {
        Self::with(|_, _| Access::Open, Options::default(), |_| {}).await
    }

    /// Open access, missing references are taken.
    pub(crate) async fn sparse() -> Self {
        let options = Options {
            allow_sparse: true,
            ..Options::default()
        };
        Self::with(|_, _| Access::Open, options, |_| {}).await
    }

    /// Open access with other settings.
    pub(crate) async fn set(change: impl FnOnce(&mut Settings)) -> Self {
        Self::with(|_, _| Access::Open, Options::default(), change).await
    }

    /// Users `alice` (all of `shop/**`, pull of `public/**`), `bob` (pulls `shop/**`), `root` (all, and operates),
    /// `robot` (pushes `shop/**` without reading); everybody pulls `public/**`.
    pub(crate) async fn users(change: impl FnOnce(&mut Settings)) -> Self {
        let access = |dir: &std::path::Path, path: &str| {
            let path = dir.join(path);
            std::fs::write(&path, passwords(&["alice", "bob", "root", "robot"])).unwrap();
            Access::users(&path, rules()).unwrap()
        };
        Self::with(access, Options::default(), change).await
    }

    pub(crate) async fn with(
        access: impl FnOnce(&std::path::Path, &str) -> Access,
        options: Options,
        change: impl FnOnce(&mut Settings),
    ) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let place = Place::new(dir.path());
        let store = place.open(options).await;
        let access = access(dir.path(), "htpasswd");
        Self::over(store, place, dir, access, change).await
    }

    /// Over a store that is open, which has something in `place` and whose files may be in `dir`.
    pub(crate) async fn over(
        store: Store,
        place: Place,
        dir: TempDir,
        access: Access,
        change: impl FnOnce(&mut Settings),
    ) -> Self {
        let mut settings = Settings {
            listen: vec![SocketAddr::from((Ipv4Addr::LOCALHOST, 0))],
            access,
            ..Settings::default()
        };
        change(&mut settings);
        let server = Server::bind(settings, store.clone()).await.unwrap();
        let address = server.local_addresses()[0];
        let (stop, stopped) = oneshot::channel::<()>();
        let task = tokio::spawn(server.run(async move {
            let _ = stopped.await;
        }));
        Self {
            address,
            store,
            dir,
            stop: Some(stop),
            task,
            _place: place,
        }
    }

    /// Begins the drain.
    pub(crate) fn stop(&mut self) {
        drop(self.stop.take());
    }

    pub(crate) async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.address).await.unwrap()
    }

    /// Writes these bytes on a new connection and reads one answer.
    pub(crate) async fn raw(&self, bytes: impl AsRef<[u8]>) -> Reply {
        let mut stream = self.connect().await;
        stream.write_all(bytes.as_ref()).await.unwrap();
        let head = bytes.as_ref().starts_with(b"HEAD ");
        read_reply(&mut BufReader::new(stream), head).await
    }

    /// Everything that comes back to one request before the connection ends.
    pub(crate) async fn until_the_end(&self, line: &str) -> Vec<u8> {
        let mut stream = self.connect().await;
        stream
            .write_all(&request(line, &[("Connection", "close")], b""))
            .await
            .unwrap();
        let mut received = Vec::new();
        let _ = stream.read_to_end(&mut received).await;
        received
    }

    /// One request: the head is written as given, with `Host` and `Content-Length` added.
    pub(crate) async fn call(&self, line: &str, headers: &[(&str, &str)], body: &[u8]) -> Reply {
        self.raw(request(line, headers, body)).await
    }

    pub(crate) async fn get(&self, path: &str) -> Reply {
        self.call(&format!("GET {path}"), &[], b"").await
    }

    pub(crate) async fn head(&self, path: &str) -> Reply {
        self.call(&format!("HEAD {path}"), &[], b"").await
    }

    pub(crate) async fn delete(&self, path: &str) -> Reply {
        self.call(&format!("DELETE {path}"), &[], b"").await
    }

    /// Pushes a blob in one POST.
    pub(crate) async fn blob(&self, name: &str, content: &[u8]) -> String {
        self.blob_as(name, content, &[]).await
    }

    pub(crate) async fn blob_as(
        &self,
        name: &str,
        content: &[u8],
        headers: &[(&str, &str)],
    ) -> String {
        let digest = oci::Digest::sha256(content).to_string();
        let line = format!("POST /v2/{name}/blobs/uploads/?digest={digest}");
        self.call(&line, headers, content).await.expect(201);
        digest
    }

    /// Starts an upload and gives its location.
    pub(crate) async fn start(&self, name: &str) -> String {
        let reply = self
            .call(&format!("POST /v2/{name}/blobs/uploads/"), &[], b"")
            .await
            .expect(202);
        reply.header("location").to_owned()
    }

    /// Pushes the smallest image manifest with this annotation, and its `{}` blob.
    pub(crate) async fn image(&self, name: &str, reference: &str, note: &str) -> String {
        self.image_as(name, reference, note, &[]).await
    }

    pub(crate) async fn image_as(
        &self,
        name: &str,
        reference: &str,
        note: &str,
        headers: &[(&str, &str)],
    ) -> String {
        self.blob_as(name, b"{}", headers).await;
        let body = image(note);
        let mut all = vec![("Content-Type", MANIFEST)];
        all.extend_from_slice(headers);
        self.call(
            &format!("PUT /v2/{name}/manifests/{reference}"),
            &all,
            body.as_bytes(),
        )
        .await
        .expect(201);
        oci::Digest::sha256(body.as_bytes()).to_string()
    }

    /// Pushes an artifact that refers to `subject`.
    pub(crate) async fn refer(
        &self,
        name: &str,
        subject: &str,
        kind: &str,
        note: &str,
    ) -> (String, Reply) {
        self.blob(name, b"{}").await;
        let body = format!(
            r#"{{"schemaVersion":2,"mediaType":"{MANIFEST}","artifactType":"{kind}","config":{{"mediaType":"application/vnd.oci.empty.v1+json","digest":"{EMPTY}","size":2}},"layers":[],"subject":{{"mediaType":"{MANIFEST}","digest":"{subject}","size":2}},"annotations":{{"note":"{note}"}}}}"#
        );
        let digest = oci::Digest::sha256(body.as_bytes()).to_string();
        let reply = self
            .call(
                &format!("PUT /v2/{name}/manifests/{digest}"),
                &[("Content-Type", MANIFEST)],
                body.as_bytes(),
            )
            .await
            .expect(201);
        (digest, reply)
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Reply {
    /// The first value of a header; empty when it is absent.
    pub(crate) fn header(&self, name: &str) -> &str {
        self.all(name).first().copied().unwrap_or_default()
    }

    pub(crate) fn all(&self, name: &str) -> Vec<&str> {
        self.headers
            .iter()
            .filter(|(key, _)| key == name)
            .map(|(_, value)| value.as_str())
            .collect()
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|_| panic!("not JSON: {self:?}"))
    }

    /// The code of the first error.
    pub(crate) fn code(&self) -> String {
        let json = self.json();
        assert_eq!(self.header("content-type"), "application/json");
        assert!(!json["errors"][0]["message"].as_str().unwrap().is_empty());
        json["errors"][0]["code"].as_str().unwrap().to_owned()
    }

    #[track_caller]
    pub(crate) fn expect(self, status: u16) -> Self {
        assert_eq!(self.status, status, "{} {:?}", self.text(), self.headers);
        self
    }

    /// Expects a refusal with this code.
    #[track_caller]
    pub(crate) fn refused(self, status: u16, code: &str) -> Self {
        let reply = self.expect(status);
        assert_eq!(reply.code(), code, "{}", reply.text());
        reply
    }

    /// The path of `Link: <path>; rel="next"`.
    pub(crate) fn next(&self) -> Option<String> {
        let link = self.all("link").first()?.to_string();
        assert!(link.ends_with("; rel=\"next\""), "{link}");
        Some(link[1..link.find('>').unwrap()].to_owned())
    }
}

/// The literal bytes of a request.
pub(crate) fn request(line: &str, headers: &[(&str, &str)], body: &[u8]) -> Vec<u8> {
    let mut text = format!("{line} HTTP/1.1\r\n");
    if !headers
        .iter()
        .any(|(name, _)| name.eq_ignore_ascii_case("host"))
    {
        text.push_str("Host: localhost\r\n");
    }
    if !headers
        .iter()
        .any(|(name, _)| *name == "Content-Length" || *name == "Transfer-Encoding")
    {
        let _ = write!(text, "Content-Length: {}\r\n", body.len());
    }
    for (name, value) in headers {
        let _ = write!(text, "{name}: {value}\r\n");
    }
    text.push_str("\r\n");
    let mut bytes = text.into_bytes();
    bytes.extend_from_slice(body);
    bytes
}

pub(crate) async fn read_head<R: AsyncRead + Unpin>(stream: &mut BufReader<R>) -> Reply {
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        let count = stream.read_line(&mut line).await.unwrap();
        assert!(count > 0, "the connection ended within the head: {lines:?}");
        let line = line.trim_end().to_owned();
        if line.is_empty() {
            break;
        }
        lines.push(line);
    }
    let status = lines[0].split(' ').nth(1).unwrap().parse().unwrap();
    let headers = lines[1..]
        .iter()
        .map(|line| {
            let (name, value) = line.split_once(':').unwrap();
            (name.to_ascii_lowercase(), value.trim().to_owned())
        })
        .collect();
    Reply {
        status,
        headers,
        body: Vec::new(),
    }
}

pub(crate) async fn read_reply<R: AsyncRead + Unpin>(
    stream: &mut BufReader<R>,
    head: bool,
) -> Reply {
    let mut reply = read_head(stream).await;
    if reply.status == 100 {
        reply = read_head(stream).await;
    }
    if head || reply.status == 204 || reply.status == 304 {
        return reply;
    }
    let length: usize = reply.header("content-length").parse().unwrap();
    reply.body = vec![0; length];
    stream.read_exact(&mut reply.body).await.unwrap();
    reply
}

pub(crate) fn image(note: &str) -> String {
    format!(
        r#"{{"schemaVersion":2,"mediaType":"{MANIFEST}","config":{{"mediaType":"application/vnd.oci.empty.v1+json","digest":"{EMPTY}","size":2}},"layers":[],"annotations":{{"note":"{note}"}}}}"#
    )
}

/// A htpasswd file where each user's password is `<user>-secret`.
pub(crate) fn passwords(users: &[&str]) -> String {
    let mut text = String::new();
    for user in users {
        let hash = bcrypt::hash(format!("{user}-secret"), 4).unwrap();
        let _ = writeln!(text, "{user}:{hash}");
    }
    text
}

pub(crate) fn rule(
    principals: &[&str],
    repositories: &[&str],
    tags: &[&str],
    actions: &[Action],
) -> Rule {
    Rule {
        principals: principals.iter().map(ToString::to_string).collect(),
        repositories: repositories.iter().map(|g| g.parse().unwrap()).collect(),
        tags: tags.iter().map(|g| g.parse().unwrap()).collect(),
        actions: actions.to_vec(),
    }
}

fn rules() -> Vec<Rule> {
    use Action::{Admin, Delete, Pull, Push, TagCreate, TagOverwrite};
    vec![
        rule(&["anonymous"], &["public/**"], &[], &[Pull]),
        rule(&["alice"], &["shop/**"], &[], &[Pull, Push, TagCreate]),
        rule(
            &["alice"],
            &["shop/**"],
            &["dev-*"],
            &[TagOverwrite, Delete],
        ),
        rule(&["bob"], &["shop/**"], &[], &[Pull]),
        rule(&["robot"], &["shop/**"], &[], &[Push]),
        rule(
            &["root"],
            &["**"],
            &[],
            &[Pull, Push, TagCreate, TagOverwrite, Delete, Admin],
        ),
    ]
}

/// The Basic header of a user of [`passwords`].
pub(crate) fn basic(user: &str) -> String {
    basic_with(user, &format!("{user}-secret"))
}

pub(crate) fn basic_with(user: &str, password: &str) -> String {
    use base64::Engine as _;
    let text = base64::engine::general_purpose::STANDARD.encode(format!("{user}:{password}"));
    format!("Basic {text}")
}
