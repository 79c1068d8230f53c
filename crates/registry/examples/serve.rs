//! Serves a data directory on one address: `serve DIR ADDRESS [sparse] [users=HTPASSWD]`. With a
//! htpasswd file its users may do everything; without one, everybody on this machine.
//!
//! The conformance program and benchmarks run against it; people run the `longshore` binary.

use std::error::Error;
use std::path::{Path, PathBuf};

use registry::{Access, Action, Rule, Server, Settings};
use store::{Options, Store};

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let (Some(dir), Some(address)) = (arguments.next(), arguments.next()) else {
        return Err("usage: serve DIR ADDRESS [sparse] [users=HTPASSWD]".into());
    };
    let mut options = Options::default();
    let mut settings = Settings {
        listen: vec![address.parse()?],
        ..Settings::default()
    };
    for argument in arguments {
        match argument.split_once('=') {
            None if argument == "sparse" => options.allow_sparse = true,
            Some(("users", path)) => settings.access = everything(Path::new(path))?,
            _ => return Err(format!("unknown argument `{argument}`").into()),
        }
    }
    let store = Store::open(&PathBuf::from(dir), options).await?;
    let server = Server::bind(settings, store.clone()).await?;
    let background = store.clone();
    let maintenance = tokio::spawn(async move { background.maintain().await });
    server
        .run(async {
            // A failure to listen for the signal leaves the process to be killed.
            let _ = tokio::signal::ctrl_c().await;
        })
        .await?;
    maintenance.abort();
    store.close().await?;
    Ok(())
}

/// Access for every user of the file to everything.
fn everything(htpasswd: &Path) -> Result<Access, Box<dyn Error>> {
    let rule = Rule {
        principals: vec!["*".to_owned()],
        repositories: vec!["**".parse()?],
        tags: Vec::new(),
        actions: vec![
            Action::Pull,
            Action::Push,
            Action::TagCreate,
            Action::TagOverwrite,
            Action::Delete,
        ],
    };
    Ok(Access::users(htpasswd, vec![rule])?)
}
