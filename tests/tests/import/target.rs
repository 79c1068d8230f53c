//! `import --to`: into registries that run, ours and another one, over the wire.

use std::path::Path;

use e2e::image;
use e2e::{Run, Scratch, digest};
use serde_json::Value;

use crate::distribution::{REPOSITORIES, fill};
use crate::zot::Handmade;
use crate::{Distribution, complete, problems, referrers, run, serve, tags_of, verify};

/// `longshore --json import --from FROM --to HOST …`.
fn into(scratch: &Scratch, from: &str, host: &str, more: &[&str]) -> Run {
    run(scratch, "longshore")
        .args(["--json", "import", "--from", from, "--to", host])
        .args(more)
}

/// Wants that a run wrote nothing.
#[track_caller]
fn nothing_moved(report: &Value) {
    for what in ["manifests", "tags", "copied", "bytes"] {
        assert_eq!(report["moved"][what], 0, "{report:#}");
    }
}

#[test]
fn a_directory_and_a_registry_go_into_servers_that_run() {
    let scratch = Scratch::new();
    let registry = Distribution::start(&scratch);
    let filled = fill(&scratch, &registry);
    let live = format!("registry:{}", registry.host());
    let data = scratch.join("data");
    let mut first = serve(&data);
    let second = serve(&scratch.join("second"));

    // From the registry, while it runs; a part of it first, as a run that was broken off leaves it.
    let part = into(&scratch, &live, first.host(), &["--repository", "notes"])
        .ok()
        .json();
    complete(&part);
    let report = into(&scratch, &live, first.host(), &[]).ok().json();
    complete(&report);
    assert_eq!(report["source"]["tags"], filled.tags.len());
    let again = into(&scratch, &live, first.host(), &[]).ok().json();
    complete(&again);
    nothing_moved(&again);
    assert_eq!(tags_of(first.url(), &REPOSITORIES), filled.tags);
    assert_eq!(
        referrers(first.url(), "shop/app", &filled.image),
        [filled.attached.as_str()]
    );

    // From its directory, below a prefix.
    let directory = format!("distribution:{}", registry.stop().display());
    let report = into(&scratch, &directory, second.host(), &["--as", "old"])
        .ok()
        .json();
    complete(&report);
    // What several repositories share is sent once, and mounted.
    assert_eq!(report["moved"]["copied"], report["source"]["blobs"]);
    assert_eq!(
        referrers(second.url(), "old/shop/app", &filled.image),
        [filled.attached.as_str()]
    );
    // And what has been moved goes on from there.
    let ours = format!("registry:{}/old", second.host());
    let report = into(&scratch, &ours, first.host(), &[]).ok().json();
    complete(&report);
    assert!(first.stop().success());
    verify(&data);
}

#[test]
fn a_registry_without_the_referrers_api_gets_its_index() {
    let scratch = Scratch::new();
    let root = scratch.dir("layouts");
    let (subject, notes) = signed(&root.join("team/app"));
    let registry = Distribution::start(&scratch);
    let source = format!("layout:{}", root.display());
    let report = into(&scratch, &source, registry.host(), &[]).ok().json();
    complete(&report);
    assert_eq!(report["destination"]["referrers"], notes.len());
    nothing_moved(&into(&scratch, &source, registry.host(), &[]).ok().json());
    // All of them stand in the index, though several were written at one time.
    let server = serve(&scratch.join("data"));
    let live = format!("registry:{}", registry.host());
    complete(&into(&scratch, &live, server.host(), &[]).ok().json());
    assert_eq!(referrers(server.url(), "team/app", &subject), notes);
}

#[test]
fn what_is_broken_is_told_and_the_rest_comes() {
    let scratch = Scratch::new();
    let root = scratch.dir("layouts");
    let directory = root.join("team/app");
    let mut layout = Handmade::new(&directory);
    let sound = layout.manifest(b"sound", None);
    layout.list(image::MANIFEST, &sound, Some("sound"));
    let large = vec![3_u8; 2 << 20];
    let damaged = layout.manifest(&large, None);
    layout.list(image::MANIFEST, &damaged, Some("damaged"));
    std::fs::write(layout.path(&digest(&large)), vec![4_u8; 2 << 20])
        .expect("a file can be written");
    layout.finish();
    let server = serve(&scratch.join("data"));
    let source = format!("layout:{}", root.display());
    let outcome = into(&scratch, &source, server.host(), &[]).run();
    assert_eq!(outcome.code, Some(1), "{outcome}");
    let report = outcome.json();
    assert_eq!(report["complete"], false);
    assert!(
        problems(&report)
            .iter()
            .any(|problem| problem.contains(&digest(&large)) || problem.contains("digest")),
        "{report:#}"
    );
    let tags = tags_of(server.url(), &["team/app"]);
    assert_eq!(tags.len(), 1, "{tags:?}");
    assert_eq!(tags["team/app:sound"], sound.0);

    // Nobody answers, a name that is none, both places at once: told at once, and no directory is made.
    let silent = format!("127.0.0.1:{}", e2e::server::free_port());
    assert_ne!(into(&scratch, &source, &silent, &[]).run().code, Some(0));
    let slash = format!("{}/team", server.host());
    let refused = into(&scratch, &source, &slash, &[]).run();
    assert!(refused.to_string().contains("--as"), "{refused}");
    let both = into(&scratch, &source, server.host(), &["--data", "made"]).run();
    assert_eq!(both.code, Some(64), "{both}");
    assert!(!scratch.join("made").exists());
}

/// A layout with one image and many notes on it; the image, and the notes sorted.
fn signed(root: &Path) -> (String, Vec<String>) {
    let mut layout = Handmade::new(root);
    let subject = layout.manifest(b"image", None);
    layout.list(image::MANIFEST, &subject, Some("v1"));
    let mut notes = Vec::new();
    for number in 0..12 {
        let note = layout.manifest(
            format!("note {number}").as_bytes(),
            Some((&subject.0, subject.1)),
        );
        layout.list(image::MANIFEST, &note, None);
        notes.push(note.0);
    }
    layout.finish();
    notes.sort();
    (subject.0, notes)
}
