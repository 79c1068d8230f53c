//! The small HTTP service that the demonstration deploys: real enough to be asked for its version, to
//! be unhealthy, and to end on SIGTERM.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use clap::Args;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use crate::output::{self, Exit};

/// Serve `/` (version and greeting) and `/health` out of a directory.
#[derive(Debug, Args)]
pub(crate) struct DemoService {
    /// Where to listen, or with `--check` whom to ask.
    #[arg(long, default_value = "0.0.0.0:8080")]
    listen: SocketAddr,
    /// The directory with `version.txt`, `greeting.txt` and `health.txt`, read at each request.
    #[arg(long, default_value = "/srv")]
    root: PathBuf,
    /// Ask a running service for its health and end with 0 or 1.
    #[arg(long)]
    check: bool,
}

/// Runs the service until SIGTERM, or the check.
pub(crate) async fn run(command: DemoService) -> anyhow::Result<Exit> {
    if command.check {
        let address = SocketAddr::from(([127, 0, 0, 1], command.listen.port()));
        let healthy = get(address, "/health")
            .await
            .is_ok_and(|(status, _)| status == 200);
        return Ok(if healthy { Exit::OK } else { Exit::FAILED });
    }
    let listener = TcpListener::bind(command.listen)
        .await
        .context("cannot listen")?;
    output::note(format!(
        "serving {} on {}",
        command.root.display(),
        command.listen
    ));
    tokio::select! {
        () = serve(listener, command.root) => {}
        () = crate::serve::shutdown_signal()? => output::note("ending"),
    }
    Ok(Exit::OK)
}

/// Answers requests until it is dropped.
pub(crate) async fn serve(listener: TcpListener, root: PathBuf) {
    let root = Arc::new(root);
    let mut connections = JoinSet::new();
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            continue;
        };
        let root = Arc::clone(&root);
        connections.spawn(async move {
            // A caller that says nothing must not keep a task for ever.
            let _ = tokio::time::timeout(PATIENCE, answer(stream, &root)).await;
        });
        while connections.try_join_next().is_some() {}
    }
}

/// Asks for a path; the status and the body.
pub(crate) async fn get(address: SocketAddr, path: &str) -> anyhow::Result<(u16, String)> {
    let exchange = async {
        let mut stream = TcpStream::connect(address).await?;
        let request =
            format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        let mut answer = Vec::new();
        stream.take(LIMIT).read_to_end(&mut answer).await?;
        anyhow::Ok(String::from_utf8_lossy(&answer).into_owned())
    };
    let text = tokio::time::timeout(PATIENCE, exchange)
        .await
        .with_context(|| format!("no answer from {address}"))??;
    let status = text
        .split_whitespace()
        .nth(1)
        .and_then(|status| status.parse().ok())
        .context("no HTTP answer")?;
    let body = text
        .split_once("\r\n\r\n")
        .map(|(_, body)| body.to_owned())
        .unwrap_or_default();
    Ok((status, body))
}

async fn answer(mut stream: TcpStream, root: &Path) -> std::io::Result<()> {
    let mut head = Vec::new();
    let mut buffer = [0; 1024];
    while !head.windows(4).any(|window| window == b"\r\n\r\n") {
        let read = stream.read(&mut buffer).await?;
        if read == 0 || head.len() > 16 * 1024 {
            return Ok(());
        }
        head.extend_from_slice(buffer.get(..read).unwrap_or_default());
    }
    let head = String::from_utf8_lossy(&head);
    let path = head.split_whitespace().nth(1).unwrap_or("/").to_owned();
    let (status, body) = match path.as_str() {
        "/" => {
            let version = text(root, "version.txt")
                .await
                .unwrap_or_else(|| "?".to_owned());
            let greeting = text(root, "greeting.txt").await.unwrap_or_default();
            ("200 OK", format!("version {version}: {greeting}\n"))
        }
        "/health" => match text(root, "health.txt").await.as_deref() {
            Some("ok") => ("200 OK", "ok\n".to_owned()),
            _ => ("503 Service Unavailable", "not healthy\n".to_owned()),
        },
        _ => ("404 Not Found", "no such page\n".to_owned()),
    };
    let answer = format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(answer.as_bytes()).await?;
    stream.shutdown().await
}

async fn text(root: &Path, name: &str) -> Option<String> {
    let text = tokio::fs::read_to_string(root.join(name)).await.ok()?;
    Some(text.trim().to_owned())
}

const LIMIT: u64 = 64 * 1024;
const PATIENCE: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn serves_what_the_directory_holds_now() {
        let root = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(root.path().join(name), text).unwrap();
        write("version.txt", "1\n");
        write("greeting.txt", "hello\n");
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let task = tokio::spawn(serve(listener, root.path().to_owned()));
        assert_eq!(
            get(address, "/").await.unwrap(),
            (200, "version 1: hello\n".to_owned())
        );
        assert_eq!(get(address, "/health").await.unwrap().0, 503);
        write("health.txt", "ok\n");
        assert_eq!(get(address, "/health").await.unwrap().0, 200);
        assert_eq!(get(address, "/other").await.unwrap().0, 404);
        task.abort();
    }
}
