//! Asks a health URL.

use std::time::Duration;

use http_body_util::Empty;
use hyper::Uri;
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

/// Asks every URL at once; 2xx and 3xx are good answers.
pub async fn check(urls: &[String]) -> Vec<(String, Result<(), String>)> {
    let asked = urls.iter().map(|url| async {
        let answer = match tokio::time::timeout(TIMEOUT, ask(url)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(problem)) => Err(problem),
            Err(_) => Err(format!("no answer within {} s", TIMEOUT.as_secs())),
        };
        (url.clone(), answer)
    });
    futures_util::future::join_all(asked).await
}

async fn ask(url: &str) -> Result<(), String> {
    let uri: Uri = url.parse().map_err(|error| format!("no URL: {error}"))?;
    let host = uri
        .host()
        .ok_or("no host in the URL")?
        .trim_matches(['[', ']']);
    let port = uri.port_u16().unwrap_or(80);
    let stream = TcpStream::connect((host, port))
        .await
        .map_err(|error| format!("cannot connect: {error}"))?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|error| format!("cannot speak HTTP: {error}"))?;
    let target = uri.path_and_query().map_or("/", |path| path.as_str());
    let authority = uri.authority().map_or(host, |authority| authority.as_str());
    let request = hyper::Request::get(target)
        .header(hyper::header::HOST, authority)
        .header(hyper::header::USER_AGENT, "longshore-agent")
        .header(hyper::header::CONNECTION, "close")
        .body(Empty::<Bytes>::new())
        .map_err(|error| format!("no URL: {error}"))?;
    // The connection is driven here and dropped with this call: no task outlives a look.
    let answer = sender.send_request(request);
    tokio::pin!(answer, connection);
    let answer = tokio::select! {
        biased;
        answer = &mut answer => answer,
        // A server that closes right behind its answer has answered.
        _ = &mut connection => answer.await,
    };
    let status = answer
        .map_err(|error| format!("no answer: {error}"))?
        .status();
    if status.is_success() || status.is_redirection() {
        Ok(())
    } else {
        Err(format!("answers {status}"))
    }
}

const TIMEOUT: Duration = Duration::from_secs(5);
