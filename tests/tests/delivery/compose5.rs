//! The chain in short on the next line of the Compose plugin.

use e2e::image::Image;

use crate::deploy::file_changes;
use crate::world::{Settings, World, service};

fn settings() -> Settings {
    Settings {
        compose: "5",
        ..Settings::default()
    }
}

#[test]
fn a_release_is_deployed_and_a_broken_one_rolled_back() {
    let (mut world, v1) = World::with_version_1("five", settings());
    let image = world.web("2");
    let v2 = world.push("2", &service(&image), &[]);
    world.wait_good(&v2);
    assert_eq!(world.answer(), "2");
    let image = world.image("loop", &Image::shell("exit 3"));
    let v3 = world.push(
        "3",
        &format!("{}    restart: always\n", service(&image)),
        &[],
    );
    world.wait_rolled_back(&v3, &v2);
    assert_eq!(world.answer(), "2");
    assert_ne!(v1, v2);
}

#[test]
fn only_the_service_whose_file_changed_is_recreated() {
    let mut world = World::new("fivefile", settings());
    file_changes(&mut world);
}

#[test]
fn what_nobody_signed_is_refused() {
    let (mut world, _) = World::with_version_1("fivesign", settings());
    let ids = world.ids();
    let image = world.web("2");
    let v2 = world.push_unsigned("2", &service(&image));
    world.wait_refused(&v2);
    world.wants_nothing_extracted(&v2);
    assert_eq!(world.ids(), ids);
}
