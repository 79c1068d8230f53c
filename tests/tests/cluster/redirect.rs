//! Presigned redirects on real stores: clients of the named networks fetch blobs from the store itself, others and
//! the repositories under strict audit are served here.

use e2e::http::{self, Response};
use e2e::image::{Image, MANIFEST, push_blob};
use e2e::objects::Kind;
use e2e::wire::{holds, noise};
use e2e::{Cluster, Run, Scratch, Server, digest, tools};

use crate::{healthy, options};

/// A replica that sends clients of this network away, all but those of `strict/**`.
fn redirecting(storage: &e2e::cluster::Storage, network: &str) -> Server {
    Server::with(&options(storage).config(format!(
        "version: 1\nstorage:\n  redirect:\n    networks: [{network}]\n    except: {{strict_audit: [\"strict/**\"]}}\n"
    )))
}

/// Pulls and bytes that were delegated so far.
fn delegated(server: &Server) -> (u64, u64) {
    let text = server.get("/metrics").text();
    let value = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        let number = line.and_then(|rest| rest.trim().parse().ok());
        number.unwrap_or_else(|| panic!("no `{name}` in {text}"))
    };
    (
        value("longshore_delegated_pulls_total "),
        value("longshore_delegated_bytes_total "),
    )
}

/// Wants a redirect and gives back where to.
#[track_caller]
fn elsewhere(answer: &Response, endpoint: &str) -> String {
    assert_eq!(answer.status(), 307, "{}", answer.text());
    assert_eq!(answer.header("cache-control"), Some("no-store"));
    let location = answer.header("location").unwrap();
    assert!(
        location.starts_with(&format!("{endpoint}/")),
        "{location} is not at {endpoint}"
    );
    location.to_owned()
}

/// Pulls with crane, whose client knows nothing of us, wants every layer by its digest, and gives back how many there
/// are and their bytes.
fn crane_pulls(server: &Server, repository: &str) -> (u64, u64) {
    let home = Scratch::new();
    Run::new(tools::tool("crane"))
        .dir(home.path())
        .env("HOME", home.path())
        .args(["pull", "--format", "oci"])
        .arg(format!("{}/{repository}:v1", server.host()))
        .arg(home.join("layout"))
        .ok();
    let target = format!("{}/v2/{repository}/manifests/v1", server.url());
    let manifest = http::request("GET", &target, &[("Accept", MANIFEST)], &[]).json();
    let layers = manifest["layers"].as_array().unwrap();
    let mut sum = 0;
    for layer in layers {
        let wanted = layer["digest"].as_str().unwrap();
        let file = home.join("layout/blobs").join(wanted.replace(':', "/"));
        let bytes = std::fs::read(&file).unwrap();
        assert_eq!(digest(&bytes), wanted);
        sum += bytes.len() as u64;
    }
    (layers.len() as u64, sum)
}

#[test]
fn clients_of_a_named_network_fetch_blobs_from_the_store_itself() {
    for kind in Kind::ALL {
        let cluster = Cluster::start(kind);
        let storage = cluster.storage();
        let mut servers = [
            redirecting(&storage, "127.0.0.0/8"),
            redirecting(&storage, "10.0.0.0/8"),
        ];
        let [near, far] = &servers;
        let endpoint = cluster.objects.endpoint();
        let bytes = noise(91, 9 << 20);
        let length = bytes.len() as u64;
        let blob = push_blob(near.url(), "team/app", &bytes);
        let path = format!("/v2/team/app/blobs/{blob}");

        let location = elsewhere(&near.get(&path), &endpoint);
        assert_eq!(delegated(near), (1, length));
        let whole = http::get(&location);
        assert_eq!(whole.status(), 200, "{}", whole.text());
        assert_eq!(digest(&whole.body), blob, "{kind:?}");

        // A range is asked for here and there alike.
        let range = [("Range", "bytes=5000000-5000099")];
        let location = elsewhere(&near.request("GET", &path, &range, &[]), &endpoint);
        assert_eq!(delegated(near), (2, length + 100));
        let part = http::request("GET", &location, &range, &[]);
        assert_eq!(part.status(), 206, "{}", part.text());
        assert_eq!(part.body, bytes[5_000_000..5_000_100]);

        // The URL is good for that blob alone, and a changed one for none.
        let other = push_blob(near.url(), "team/app", &noise(92, 100_000));
        let there = elsewhere(&near.get(&format!("/v2/team/app/blobs/{other}")), &endpoint);
        let (key, _) = there.split_once('?').unwrap();
        let (_, signature) = location.split_once('?').unwrap();
        let stolen = http::get(&format!("{key}?{signature}"));
        assert_eq!(stolen.status(), 403, "{}", stolen.text());

        // A client outside of the networks, and a repository under strict audit: nothing is sent away.
        let image = Image::shell("true").salt(noise(93, 3 << 20));
        for repository in ["team/image", "strict/image"] {
            image.push(near.url(), repository, "v1");
        }
        push_blob(near.url(), "strict/app", &bytes);
        let before = delegated(near);
        holds(far, "team/app", &blob);
        holds(near, "strict/app", &blob);
        crane_pulls(far, "team/image");
        crane_pulls(near, "strict/image");
        assert_eq!(delegated(near), before);
        assert_eq!(delegated(far), (0, 0));

        // A client that others wrote comes by its layers through the store, and the bytes are counted.
        let (layers, sum) = crane_pulls(near, "team/image");
        assert!(sum > 3 << 20, "{sum}");
        assert_eq!(delegated(near), (before.0 + layers, before.1 + sum));
        healthy(&mut servers);
    }
}
