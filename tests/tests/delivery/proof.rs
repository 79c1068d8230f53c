//! What is not proven is refused before it becomes a file.

use e2e::image::{self, Image};
use serde_json::{Value, json};

use crate::world::{Settings, World, digest_of, service};

#[test]
fn wrong_content_under_a_rightly_signed_manifest_is_refused_before_a_file_is_written() {
    let (mut world, v1) = World::with_version_1(
        "content",
        Settings {
            proxied: true,
            ..Settings::default()
        },
    );
    let ids = world.ids();
    let image = world.web("2");
    type Lie = fn(Vec<u8>) -> Vec<u8>;
    let lies: [(&str, Lie); 5] = [
        ("short", |mut tar| {
            tar.truncate(tar.len() - 512);
            tar
        }),
        ("empty", |_| Vec::new()),
        ("changed", |mut tar| {
            tar[600] ^= 1;
            tar
        }),
        ("long", |mut tar| {
            tar.splice(512..512, [0; 512]);
            tar
        }),
        // A reader of archives stops before this.
        ("after the end", |mut tar| {
            tar.extend([0; 10_240]);
            tar.extend(b"more");
            tar
        }),
    ];
    for (index, (what, lie)) in lies.into_iter().enumerate() {
        let digest = world.push_to(
            "app:candidate",
            &format!("2.{index}"),
            &service(&image),
            &[("a.txt", what)],
        );
        let manifest = world.manifest(&digest);
        let layer = manifest.json()["layers"][0]["digest"]
            .as_str()
            .unwrap()
            .to_owned();
        let tar = world.server.get(&format!("/v2/app/blobs/{layer}"));
        assert_eq!(tar.status(), 200);
        world
            .proxy()
            .replace(&format!("GET /v2/app/blobs/{layer}"), lie(tar.body));
        image::push_manifest(
            world.server.url(),
            "app",
            "production",
            image::MANIFEST,
            &manifest.body,
        );
        let reason = world.wait_refused(&digest);
        assert!(
            reason.contains(&layer) || reason.contains("digest") || reason.contains("size"),
            "{what}: {reason}"
        );
        world.wants_nothing_extracted(&digest);
        let status = world.agent().status();
        assert_eq!(status["running"]["good"], true, "{what}");
        if index == 0 {
            assert_eq!(status["running"]["digest"], v1.as_str());
            assert_eq!(world.ids(), ids, "{what}");
        }
        if what == "changed" {
            // The release is right and the way to it was not: it is not held against it.
            world.proxy().release();
            world.wait_good(&digest);
            assert_eq!(world.answer(), "2");
        }
    }
}

#[test]
fn what_nobody_signed_is_not_extracted() {
    let (mut world, v1) = World::with_version_1("unsigned", Settings::default());
    let ids = world.ids();
    let image = world.web("2");
    let v2 = world.push_unsigned("2", &service(&image));
    let reason = world.wait_refused(&v2);
    assert!(reason.contains("sign"), "{reason}");
    world.wants_nothing_extracted(&v2);
    assert_eq!(world.ids(), ids);
    assert_eq!(world.agent().status()["running"]["digest"], v1.as_str());
    world.agent().command("plan app").fails().says("sign");
    world.wants_nothing_extracted(&v2);

    // A stranger's signature is none.
    let stranger = world.key("stranger");
    world
        .longshore("sign --key")
        .arg(stranger)
        .arg(format!("{}/app@{v2}", world.host()))
        .ok();
    world.agent().command("plan app").fails().says("sign");
    world.wants_nothing_extracted(&v2);
    assert_eq!(world.ids(), ids);
}

#[test]
fn a_signature_that_arrives_later_deploys_without_a_new_push() {
    // The safety poll does not help: only the event about the evidence comes in time.
    let mut world = World::new("latesign", Settings::default());
    let image = world.web("1");
    let v1 = world.push_unsigned("1", &service(&image));
    world.start_agent();
    world.wait_refused(&v1);
    assert!(world.ids().is_empty());
    world.sign(&v1);
    world.wait_good(&v1);
    assert_eq!(world.answer(), "1");
}

#[test]
fn a_signature_of_another_digest_is_refused() {
    let (mut world, v1) = World::with_version_1("copied", Settings::default());
    let ids = world.ids();
    let image = world.web("2");
    let v2 = digest_of(&world.release("2", "app", "app:candidate", &service(&image), &[]));
    let (url, manifest) = (world.server.url().to_owned(), world.manifest(&v2));
    // Both forms of the signature of version 1 are put where those of version 2 would be.
    let tag = |digest: &str| format!("{}.sig", digest.replace(':', "-"));
    let legacy = world.manifest(&tag(&v1));
    image::push_manifest(&url, "app", &tag(&v2), image::MANIFEST, &legacy.body);
    let referrers = world.server.get(&format!("/v2/app/referrers/{v1}")).json();
    let bundles = referrers["manifests"].as_array().unwrap();
    assert!(!bundles.is_empty(), "{referrers:#}");
    for bundle in bundles {
        let mut copy: Value = world.manifest(bundle["digest"].as_str().unwrap()).json();
        copy["subject"] =
            json!({"mediaType": image::MANIFEST, "digest": v2, "size": manifest.body.len()});
        let bytes = copy.to_string();
        image::push_manifest(
            &url,
            "app",
            &e2e::digest(bytes.as_bytes()),
            image::MANIFEST,
            bytes.as_bytes(),
        );
    }
    image::push_manifest(&url, "app", "production", image::MANIFEST, &manifest.body);
    world.wait_refused(&v2);
    world.wants_nothing_extracted(&v2);
    let plan = world.agent().command("plan app").fails();
    plan.says("sign");
    assert_eq!(world.ids(), ids);
    assert_eq!(world.agent().status()["running"]["digest"], v1.as_str());
    // The same copies do not stand in the way of the right signature.
    world.sign(&v2);
    world.wait_good(&v2);
}

#[test]
fn a_signed_release_of_another_name_is_refused() {
    let (mut world, v1) = World::with_version_1("name", Settings::default());
    let ids = world.ids();
    let image = world.web("2");
    let other = digest_of(
        &world
            .release("2", "shop", "app:production", &service(&image), &[])
            .arg("--sign")
            .arg(world.scratch.join("key.key")),
    );
    let reason = world.wait_refused(&other);
    assert!(
        reason.contains("shop") && reason.contains("app"),
        "{reason}"
    );
    world.wants_nothing_extracted(&other);
    assert_eq!(world.ids(), ids);
    assert_eq!(world.agent().status()["running"]["digest"], v1.as_str());
}

#[test]
fn an_image_for_another_platform_is_refused() {
    let (mut world, v1) = World::with_version_1("platform", Settings::default());
    let ids = world.ids();
    let image = world.image("other", &Image::web("2").architecture("s390x"));
    let v2 = world.push("2", &service(&image), &[]);
    let reason = world.wait_refused(&v2);
    assert!(
        reason.contains("linux/s390x") && reason.contains("web"),
        "{reason}"
    );
    assert_eq!(world.ids(), ids);
    assert_eq!(world.agent().status()["running"]["digest"], v1.as_str());
}
