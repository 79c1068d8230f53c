use super::super::fixture::{Archive, fetched, layer};
use super::*;

#[test]
fn captures_what_was_asked_for_from_the_layer_that_wins() {
    let staging = tempfile::tempdir().unwrap();
    let tar = |archive: Archive| layer(oci::media_type::OCI_LAYER, &[], archive.end());
    let release = fetched(
        staging.path(),
        "tar",
        vec![
            tar(Archive::new()
                .file("a", "old")
                .file("b", "b")
                .file("gone", "x")),
            tar(Archive::new().file("a", "new").file(".wh.gone", "")),
        ],
    );
    let layers = Layers::read("tar", &release.layers, &Limits::default(), &|name| {
        name != "b"
    })
    .unwrap();
    assert_eq!(
        layers.captured,
        BTreeMap::from([("a".to_owned(), b"new".to_vec())])
    );
    assert_eq!(layers.items.keys().collect::<Vec<_>>(), ["a", "b"]);
}

/// Applies entries one after another to a plain map, with the rules written out anew.
fn model(layers: &[Vec<(&'static str, bool)>]) -> BTreeMap<String, bool> {
    let mut tree: BTreeMap<String, bool> = BTreeMap::new();
    for layer in layers {
        for (name, directory) in layer {
            let parts: Vec<&str> = name.split('/').collect();
            for end in 1..parts.len() {
                tree.insert(parts[..end].join("/"), true);
            }
            if *directory {
                tree.insert((*name).to_owned(), true);
            } else {
                let below = format!("{name}/");
                tree.retain(|other, _| !other.starts_with(&below));
                tree.insert((*name).to_owned(), false);
            }
        }
    }
    tree
}

proptest::proptest! {
    #[test]
    fn a_tree_stays_a_tree(layers in proptest::collection::vec(
        proptest::collection::vec((proptest::sample::select(vec!["a", "a/b", "a/b/c", "b", "b/a", "c"]), proptest::bool::ANY), 0..5),
        1..4,
    )) {
        let mut all = Layers::default();
        for (index, layer) in layers.iter().enumerate() {
            for (name, directory) in layer {
                let item = if *directory {
                    Item::Directory { layer: index }
                } else {
                    Item::Entry { layer: index, executable: false }
                };
                all.put(name, item);
            }
        }
        let found: BTreeMap<String, bool> = all
            .items
            .iter()
            .map(|(name, item)| (name.clone(), matches!(item, Item::Directory { .. })))
            .collect();
        proptest::prop_assert_eq!(found, model(&layers));
    }
}
