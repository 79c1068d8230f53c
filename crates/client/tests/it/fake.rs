//! A small registry in this process. A test looks at what it was asked, and puts answers of its own in
//! the way of its answers.

use std::collections::{BTreeMap, HashMap};
use std::convert::Infallible;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use bytes::Bytes;
use futures_util::StreamExt as _;
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use oci::{Digest, Manifest};
use serde_json::json;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::TlsAcceptor;

pub(crate) type Answer = Response<BoxBody<Bytes, io::Error>>;

/// What came, body and all.
#[derive(Clone, Debug)]
pub(crate) struct Asked {
    pub(crate) method: Method,
    pub(crate) path: String,
    pub(crate) query: String,
    pub(crate) headers: hyper::HeaderMap,
    pub(crate) body: Bytes,
}

impl Asked {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }

    pub(crate) fn line(&self) -> String {
        format!("{} {}", self.method, self.path)
    }

    fn parameter(&self, name: &str) -> Option<String> {
        self.query
            .split('&')
            .filter_map(|pair| pair.split_once('='))
            .find(|(key, _)| *key == name)
            .map(|(_, value)| value.replace("%3A", ":").replace("%2F", "/"))
    }
}

type Hook = Box<dyn FnMut(&Asked, &mut State) -> Option<Answer> + Send>;

#[derive(Default)]
pub(crate) struct State {
    pub(crate) blobs: HashMap<String, BTreeMap<String, Bytes>>,
    pub(crate) manifests: HashMap<String, BTreeMap<String, (String, Bytes)>>,
    pub(crate) uploads: HashMap<String, Vec<u8>>,
    pub(crate) log: Vec<Asked>,
    pub(crate) referrers_api: bool,
    pub(crate) single_post: bool,
    pub(crate) absolute_locations: bool,
    host: String,
    hook: Option<Hook>,
    next: u32,
}

#[derive(Clone)]
pub(crate) struct Fake {
    pub(crate) host: String,
    state: Arc<Mutex<State>>,
}

impl Fake {
    pub(crate) async fn start() -> Self {
        Self::listen(None).await
    }

    /// Speaks TLS alone.
    pub(crate) async fn start_tls(config: rustls::ServerConfig) -> Self {
        Self::listen(Some(TlsAcceptor::from(Arc::new(config)))).await
    }

    async fn listen(tls: Option<TlsAcceptor>) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let host = listener.local_addr().unwrap().to_string();
        let state = Arc::new(Mutex::new(State {
            referrers_api: true,
            single_post: true,
            host: host.clone(),
            ..State::default()
        }));
        let fake = Self { host, state };
        let serving = fake.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let fake = serving.clone();
                let tls = tls.clone();
                tokio::spawn(async move {
                    match tls {
                        None => fake.connection(stream).await,
                        Some(tls) => {
                            if let Ok(stream) = tls.accept(stream).await {
                                fake.connection(stream).await;
                            }
                        }
                    }
                });
            }
        });
        fake
    }

    async fn connection(self, stream: impl AsyncRead + AsyncWrite + Unpin) {
        let service = service_fn(move |request| {
            let fake = self.clone();
            async move { Ok::<_, Infallible>(fake.serve(request).await) }
        });
        // A connection that a test breaks ends with an error.
        let _ = hyper::server::conn::http1::Builder::new()
            .serve_connection(TokioIo::new(stream), service)
            .await;
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// Puts answers before the registry's own.
    pub(crate) fn hook(
        &self,
        hook: impl FnMut(&Asked, &mut State) -> Option<Answer> + Send + 'static,
    ) {
        self.state().hook = Some(Box::new(hook));
    }

    /// What was asked with this method, and a path that holds `part`.
    pub(crate) fn asked(&self, method: &str, part: &str) -> Vec<Asked> {
        self.state()
            .log
            .iter()
            .filter(|asked| asked.method == method && asked.path.contains(part))
            .cloned()
            .collect()
    }

    pub(crate) fn blob(&self, repository: &str, content: &[u8]) -> Digest {
        let digest = Digest::sha256(content);
        self.state()
            .blobs
            .entry(repository.to_owned())
            .or_default()
            .insert(digest.to_string(), Bytes::copy_from_slice(content));
        digest
    }

    pub(crate) fn has_blob(&self, repository: &str, content: &[u8]) -> bool {
        let digest = Digest::sha256(content).to_string();
        self.state()
            .blobs
            .get(repository)
            .and_then(|all| all.get(&digest))
            .is_some_and(|kept| kept == content)
    }

    pub(crate) fn manifest(&self, repository: &str, reference: &str) -> Option<Bytes> {
        let state = self.state();
        let (_, body) = state.manifests.get(repository)?.get(reference)?;
        Some(body.clone())
    }

    async fn serve(&self, request: Request<Incoming>) -> Answer {
        let (head, body) = request.into_parts();
        let Ok(body) = body.collect().await else {
            return answer(400, &[], "");
        };
        let asked = Asked {
            method: head.method,
            path: head.uri.path().to_owned(),
            query: head.uri.query().unwrap_or_default().to_owned(),
            headers: head.headers,
            body: body.to_bytes(),
        };
        let mut state = self.state();
        state.log.push(asked.clone());
        if let Some(mut hook) = state.hook.take() {
            let own = hook(&asked, &mut state);
            state.hook = Some(hook);
            if let Some(own) = own {
                return own;
            }
        }
        state.handle(&asked)
    }
}

impl State {
    pub(crate) fn handle(&mut self, asked: &Asked) -> Answer {
        let Some(path) = asked.path.strip_prefix("/v2/") else {
            return answer(404, &[], "");
        };
        if path.is_empty() {
            return answer(200, &[], "{}");
        }
        for (verb, handle) in [
            (
                "/blobs/uploads/",
                Self::upload as fn(&mut Self, &Asked, &str, &str) -> Answer,
            ),
            ("/blobs/", Self::blob),
            ("/manifests/", Self::manifest),
            ("/referrers/", Self::referrers),
            ("/tags/", Self::tags),
        ] {
            if let Some((name, rest)) = path.split_once(verb) {
                return handle(self, asked, name, rest);
            }
        }
        answer(404, &[], "")
    }

    fn blob(&mut self, asked: &Asked, name: &str, digest: &str) -> Answer {
        let Some(content) = self
            .blobs
            .get(name)
            .and_then(|all| all.get(digest))
            .cloned()
        else {
            return missing();
        };
        if asked.method == Method::DELETE {
            self.blobs.get_mut(name).unwrap().remove(digest);
            return answer(202, &[], "");
        }
        let range = asked.header("range").and_then(|range| {
            range
                .strip_prefix("bytes=")?
                .strip_suffix('-')?
                .parse::<usize>()
                .ok()
        });
        match range {
            Some(start) => {
                let end = content.len() - 1;
                let range = format!("bytes {start}-{end}/{}", content.len());
                bytes(206, &[("content-range", &range)], content.slice(start..))
            }
            None if asked.method == Method::HEAD => {
                answer(200, &[("content-length", &content.len().to_string())], "")
            }
            None => bytes(200, &[], content),
        }
    }

    fn location(&self, name: &str, id: &str) -> String {
        let path = format!("/v2/{name}/blobs/uploads/{id}?_state=a%2Bb");
        if self.absolute_locations {
            format!("http://{}{path}", self.host)
        } else {
            path
        }
    }

    fn upload(&mut self, asked: &Asked, name: &str, id: &str) -> Answer {
        let commit = |state: &mut Self, digest: &str, content: Vec<u8>| {
            if Digest::sha256(&content).to_string() != digest {
                return answer(
                    400,
                    &[],
                    r#"{"errors":[{"code":"DIGEST_INVALID","message":"no"}]}"#,
                );
            }
            state
                .blobs
                .entry(name.to_owned())
                .or_default()
                .insert(digest.to_owned(), content.into());
            answer(201, &[], "")
        };
        if asked.method == Method::POST {
            if let (Some(digest), Some(from)) = (asked.parameter("mount"), asked.parameter("from"))
                && let Some(content) = self
                    .blobs
                    .get(&from)
                    .and_then(|all| all.get(&digest))
                    .cloned()
            {
                return commit(self, &digest, content.to_vec());
            }
            if self.single_post
                && let Some(digest) = asked.parameter("digest")
            {
                return commit(self, &digest, asked.body.to_vec());
            }
            self.next += 1;
            let id = self.next.to_string();
            self.uploads.insert(id.clone(), Vec::new());
            return answer(202, &[("location", &self.location(name, &id))], "");
        }
        assert_eq!(
            asked.parameter("_state").as_deref(),
            Some("a%2Bb"),
            "the query of the location is kept"
        );
        let Some(mut held) = self.uploads.remove(id) else {
            return missing();
        };
        let location = self.location(name, id);
        match asked.method.as_str() {
            "DELETE" => answer(204, &[], ""),
            "PUT" => {
                held.extend_from_slice(&asked.body);
                commit(self, &asked.parameter("digest").unwrap(), held)
            }
            verb => {
                let mut status = 204;
                if verb == "PATCH" {
                    let range = asked.header("content-range").unwrap();
                    let (start, end) = range.split_once('-').unwrap();
                    let (start, end): (usize, usize) =
                        (start.parse().unwrap(), end.parse().unwrap());
                    if start == held.len() && end + 1 - start == asked.body.len() {
                        held.extend_from_slice(&asked.body);
                        status = 202;
                    } else {
                        status = 416;
                    }
                }
                let range = format!("0-{}", held.len().saturating_sub(1));
                self.uploads.insert(id.to_owned(), held);
                answer(status, &[("location", &location), ("range", &range)], "")
            }
        }
    }

    fn manifest(&mut self, asked: &Asked, name: &str, reference: &str) -> Answer {
        let all = self.manifests.entry(name.to_owned()).or_default();
        match asked.method.as_str() {
            "PUT" => {
                let digest = Digest::sha256(&asked.body).to_string();
                let kind = asked.header("content-type").unwrap().to_owned();
                let view = Manifest::parse(&asked.body, &kind).unwrap();
                for key in [digest.as_str(), reference] {
                    all.insert(key.to_owned(), (kind.clone(), asked.body.clone()));
                }
                let mut headers = vec![("docker-content-digest", digest)];
                if self.referrers_api
                    && let Some(subject) = view.subject
                {
                    headers.push(("oci-subject", subject.digest.to_string()));
                }
                let headers: Vec<(&str, &str)> =
                    headers.iter().map(|(k, v)| (*k, v.as_str())).collect();
                answer(201, &headers, "")
            }
            "DELETE" => match all.remove(reference) {
                Some(_) => answer(202, &[], ""),
                None => missing(),
            },
            verb => {
                let Some((kind, body)) = all.get(reference).cloned() else {
                    return missing();
                };
                let digest = Digest::sha256(&body).to_string();
                let length = body.len().to_string();
                let headers = [
                    ("content-type", kind.as_str()),
                    ("docker-content-digest", &digest),
                    ("content-length", &length),
                ];
                bytes(
                    200,
                    &headers,
                    if verb == "HEAD" { Bytes::new() } else { body },
                )
            }
        }
    }

    fn referrers(&mut self, asked: &Asked, name: &str, subject: &str) -> Answer {
        if !self.referrers_api {
            return missing();
        }
        let mut found = Vec::new();
        for (key, (kind, body)) in self.manifests.get(name).into_iter().flatten() {
            let view = Manifest::parse(body, kind).unwrap();
            let refers = view
                .subject
                .as_ref()
                .is_some_and(|to| to.digest.to_string() == subject);
            if refers && key.contains(':') {
                found.push(json!({
                    "mediaType": kind, "digest": key, "size": body.len(),
                    "artifactType": view.listed_artifact_type(), "annotations": view.annotations,
                }));
            }
        }
        // One on each page.
        let page: usize = asked
            .parameter("page")
            .map_or(0, |page| page.parse().unwrap());
        let index = json!({
            "schemaVersion": 2, "mediaType": oci::media_type::OCI_INDEX,
            "manifests": found.get(page..(page + 1).min(found.len())).unwrap_or_default(),
        });
        let link = format!("<{}?page={}>; rel=\"next\"", asked.path, page + 1);
        let mut headers = vec![("content-type", oci::media_type::OCI_INDEX)];
        if page + 1 < found.len() {
            headers.push(("link", &link));
        }
        answer(200, &headers, &index.to_string())
    }

    fn tags(&mut self, _asked: &Asked, name: &str, _rest: &str) -> Answer {
        let Some(all) = self.manifests.get(name) else {
            return missing();
        };
        let tags: Vec<&String> = all.keys().filter(|key| !key.contains(':')).collect();
        answer(200, &[], &json!({ "name": name, "tags": tags }).to_string())
    }
}

pub(crate) fn missing() -> Answer {
    answer(
        404,
        &[],
        r#"{"errors":[{"code":"NAME_UNKNOWN","message":"nothing here"}]}"#,
    )
}

pub(crate) fn answer(status: u16, headers: &[(&str, &str)], body: &str) -> Answer {
    bytes(status, headers, Bytes::copy_from_slice(body.as_bytes()))
}

pub(crate) fn bytes(status: u16, headers: &[(&str, &str)], body: Bytes) -> Answer {
    let full = Full::new(body).map_err(|never| match never {}).boxed();
    build(status, headers, full)
}

/// States `length` bytes, sends these and breaks the connection.
pub(crate) fn cut(status: u16, headers: &[(&str, &str)], length: usize, sent: Bytes) -> Answer {
    let broken = async {
        // Lets the server send what it has before it hears of the end.
        tokio::task::yield_now().await;
        Err(io::Error::from(io::ErrorKind::ConnectionAborted))
    };
    let frames = futures_util::stream::iter([Ok(Frame::data(sent))])
        .chain(futures_util::stream::once(broken));
    let body = http_body_util::BodyExt::boxed(StreamBody::new(frames));
    let length = length.to_string();
    let headers = [headers, &[("content-length", length.as_str())]].concat();
    build(status, &headers, body)
}

fn build(status: u16, headers: &[(&str, &str)], body: BoxBody<Bytes, io::Error>) -> Answer {
    let mut builder = Response::builder().status(status);
    for (name, value) in headers {
        builder = builder.header(*name, *value);
    }
    builder.body(body).unwrap()
}
