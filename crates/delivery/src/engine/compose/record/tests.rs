use std::collections::BTreeMap;

use super::Record;
use crate::engine::compose::rewrite::tests::wanted;

fn parts(list: &[(&str, &str)]) -> BTreeMap<String, String> {
    list.iter()
        .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
        .collect()
}

#[test]
fn differences_have_names_and_the_file_has_no_values() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("applied.json");
    let mut service = wanted("aa");
    service.parts = parts(&[
        ("environment `A`", "hunter2"),
        ("`command`", "x"),
        ("label `gone`", "y"),
    ]);
    let mut record = Record::new(b"salt");
    record.add(&BTreeMap::from([("web".to_owned(), service)]));
    record.write(&path).unwrap();
    assert!(!std::fs::read_to_string(&path).unwrap().contains("hunter2"));

    let record = Record::read(&path).unwrap().unwrap();
    let now = parts(&[
        ("environment `A`", "other"),
        ("`command`", "x"),
        ("mount `/n`", "z"),
    ]);
    assert_eq!(
        record.changed_parts("aa", &now).unwrap(),
        ["environment `A`", "label `gone`", "mount `/n`"]
    );
    assert_eq!(record.changed_parts("unknown", &now), None);
}

#[test]
fn a_newer_record_is_refused_and_a_damaged_one_is_no_record() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("applied.json");
    assert_eq!(Record::read(&path), Ok(None));
    std::fs::write(&path, "{\"version\": 1, \"sal").unwrap();
    assert_eq!(Record::read(&path), Ok(None));
    std::fs::write(&path, "{\"version\": 2, \"else\": true}").unwrap();
    assert!(Record::read(&path).unwrap_err().contains("version 2"));
}
