//! Sources that somebody or something broke: what is broken is listed, the rest comes, and nothing outside the source
//! is read.

use std::os::unix::fs::symlink;

use e2e::image;
use e2e::{Scratch, digest};
use serde_json::json;

use crate::zot::Handmade;
use crate::{Distribution, import, problems, serve, tags_of, verify};

#[test]
fn a_broken_distribution_directory() {
    let scratch = Scratch::new();
    let registry = Distribution::start(&scratch);
    let url = registry.url.clone();
    let large = |seed: u8| vec![seed; 100_000];
    for (name, seed) in [
        ("good", 1),
        ("missing", 2),
        ("changed", 3),
        ("outside", 4),
        ("small", 5),
    ] {
        image::push_artifact(
            &url,
            &format!("team/{name}"),
            "v1",
            "application/vnd.example",
            &large(seed),
        );
    }
    image::push_artifact(
        &url,
        "team/links",
        "good",
        "application/vnd.example",
        b"good",
    );
    image::push_artifact(
        &url,
        "team/links",
        "unreadable",
        "application/vnd.example",
        b"unreadable",
    );
    image::push_artifact(
        &url,
        "team/links",
        "escape",
        "application/vnd.example",
        b"escape",
    );
    image::push_artifact(
        &url,
        "team/links",
        "nowhere",
        "application/vnd.example",
        b"nowhere",
    );
    let manifest =
        image::push_artifact(&url, "team/manifest", "v1", "application/vnd.example", b"m");
    let from = registry.stop();
    let data_of = |digest: &str| {
        let hex = digest.replace("sha256:", "");
        from.join(format!(
            "docker/registry/v2/blobs/sha256/{}/{hex}/data",
            &hex[..2]
        ))
    };
    let repositories = from.join("docker/registry/v2/repositories");
    let tag =
        |name: &str| repositories.join(format!("team/links/_manifests/tags/{name}/current/link"));

    std::fs::remove_file(data_of(&digest(&large(2)))).expect("the blob is there");
    std::fs::write(data_of(&digest(&large(3))), large(9)).expect("a file can be written");
    // The right bytes, but outside of the directory.
    let outside = scratch.write("outside", large(4));
    std::fs::remove_file(data_of(&digest(&large(4)))).expect("the blob is there");
    symlink(&outside, data_of(&digest(&large(4)))).expect("a link can be made");
    std::fs::write(data_of(&digest(&large(5))), b"short").expect("a file can be written");
    std::fs::write(tag("unreadable"), b"sha256:zz").expect("a file can be written");
    std::fs::write(tag("escape"), b"sha256:../../../../../../outside")
        .expect("a file can be written");
    std::fs::write(tag("nowhere"), format!("sha256:{}", "0".repeat(64)))
        .expect("a file can be written");
    std::fs::write(data_of(&manifest), b"{}").expect("a file can be written");
    // A repository behind a link, and a loop.
    symlink(scratch.dir("elsewhere"), repositories.join("team/linked"))
        .expect("a link can be made");
    symlink("..", repositories.join("team/loop")).expect("a link can be made");

    let data = scratch.join("data");
    let source = format!("distribution:{}", from.display());
    for more in [&["--copy"][..], &["--link"], &[]] {
        let report = import(&scratch, &source, &data, more).fails();
        assert_eq!(report.code, Some(1), "{report}");
        let report = report.json();
        assert_eq!(report["complete"], false);
        let said = problems(&report).join("\n");
        for wanted in [
            format!("blob `{}` is missing", digest(&large(2))),
            format!("not `{}`", digest(&large(3))),
            "symbolic link".to_owned(),
            format!("not `{}`", digest(&large(5))),
            "tag `unreadable`".to_owned(),
            "tag `escape`".to_owned(),
            format!("manifest `sha256:{}` is missing", "0".repeat(64)),
            format!("not `{manifest}`"),
            "team/linked".to_owned(),
        ] {
            assert!(said.contains(&wanted), "no `{wanted}` in\n{said}");
        }
        verify(&data);
        let server = serve(&data);
        assert_eq!(tags_of(server.url(), &["team/good"]).len(), 1);
        assert_eq!(tags_of(server.url(), &["team/links"]).len(), 1);
        for name in ["missing", "changed", "outside", "small", "manifest"] {
            let answer = server.get(&format!("/v2/team/{name}/manifests/v1"));
            assert_eq!(answer.status(), 404, "{name}");
        }
    }
}

#[test]
fn a_broken_tree_of_layouts() {
    let scratch = Scratch::new();
    let root = scratch.dir("tree");
    let good = root.join("good");
    let mut layout = Handmade::new(&good);
    let image = layout.manifest(b"good", None);
    layout.list(image::MANIFEST, &image, Some("v1"));
    // An index without one of its children, and two manifests for one tag.
    let child = layout.manifest(b"child", None);
    let index = layout.index(&[child, (format!("sha256:{}", "1".repeat(64)), 10)]);
    layout.list(crate::INDEX, &index, Some("sparse"));
    layout.list(
        image::MANIFEST,
        &layout.manifest(b"twice", None),
        Some("twice"),
    );
    layout.list(
        image::MANIFEST,
        &layout.manifest(b"again", None),
        Some("twice"),
    );
    layout.finish();
    for (name, index) in [
        ("no-json", "{"),
        ("no-list", "{}"),
        (
            "odd",
            r#"{"manifests":[{"digest":"sha256:../../x","size":1,"mediaType":"a"},7]}"#,
        ),
    ] {
        let directory = root.join(name);
        Handmade::new(&directory).finish();
        std::fs::write(directory.join("index.json"), index).expect("a file can be written");
    }
    Handmade::new(&root.join("UPPER")).finish();
    std::fs::write(
        root.join("UPPER/index.json"),
        json!({"manifests": []}).to_string(),
    )
    .expect("written");
    let data = scratch.join("data");
    let report = import(&scratch, &format!("layout:{}", root.display()), &data, &[])
        .fails()
        .json();
    let said = problems(&report).join("\n");
    for wanted in [
        "no-json/index.json",
        "lists no manifests",
        "an entry of `index.json`",
        "`UPPER`",
        "tag `twice`",
        "is missing at the source",
    ] {
        assert!(said.contains(wanted), "no `{wanted}` in\n{said}");
    }
    verify(&data);
    let server = serve(&data);
    let tags = tags_of(server.url(), &["good"]);
    assert_eq!(tags.keys().collect::<Vec<_>>(), ["good:twice", "good:v1"]);
}

#[test]
fn what_is_no_source_is_refused_and_leaves_nothing() {
    let scratch = Scratch::new();
    let empty = scratch.dir("empty");
    let data = scratch.join("data");
    import(
        &scratch,
        &format!("distribution:{}", empty.display()),
        &data,
        &[],
    )
    .fails()
    .says("no storage directory of distribution");
    for shape in ["zot", "layout"] {
        let from = format!("{shape}:{}", empty.display());
        import(&scratch, &from, &data, &[])
            .fails()
            .says("holds no repository to bring")
            .says("oci-layout");
    }
    for wrong in ["--parallel=0", "--rate=0"] {
        let from = format!("layout:{}", empty.display());
        let run = import(&scratch, &from, &data, &[wrong]).fails();
        assert_eq!(run.code, Some(64), "{run}");
    }
    import(&scratch, "zot:/does/not/exist", &data, &[]).fails();
    let run = import(&scratch, "ftp:somewhere", &data, &[]).fails();
    assert_eq!(run.code, Some(64), "{run}");
    import(&scratch, "registry:127.0.0.1:1", &data, &[]).fails();
    assert!(!data.exists());
}
