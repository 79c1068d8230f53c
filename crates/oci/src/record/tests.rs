use proptest::collection::{btree_map, vec};
use proptest::prelude::*;
use serde_json::json;

use super::*;

#[test]
fn canonical_form_is_fixed() {
    let value = json!({
        "b": [1, -2, u64::MAX, i64::MIN, true, null],
        "a": {"z": "\u{1}\t\"\\/é\u{10348}\u{7f}", "": ""},
        "A": {},
    });
    assert_eq!(
        String::from_utf8(canonical(&value).unwrap()).unwrap(),
        "{\"A\":{},\"a\":{\"\":\"\",\"z\":\"\\u0001\\t\\\"\\\\/é\u{10348}\u{7f}\"},\
         \"b\":[1,-2,18446744073709551615,-9223372036854775808,true,null]}"
    );
}

#[test]
fn fractions_are_refused() {
    for value in [json!(1.5), json!(1.0), json!({"a": [0.1]})] {
        assert!(matches!(canonical(&value), Err(RecordError::Number(_))));
    }
}

#[test]
fn deep_values_are_refused_and_allowed_ones_can_be_read() {
    let nest = |levels| (0..levels).fold(json!(1), |inner, _| json!([inner]));
    assert_eq!(canonical(&nest(101)), Err(RecordError::Depth));
    let bytes = canonical(&nest(100)).unwrap();
    assert_eq!(serde_json::from_slice::<Value>(&bytes).unwrap(), nest(100));
}

#[test]
fn golden_ledger() {
    let mut chain = Chain::new();
    let first = chain.append(&json!({"kind": "start", "at": 1})).unwrap();
    let second = chain.append(&json!({"v": 1, "kind": "end"})).unwrap();
    assert_eq!(
        first,
        "{\"at\":1,\"hash\":\"7816702e4327649cc90505fc2ee44839abe40c9444750ff5b38132fa64f69611\",\
         \"kind\":\"start\",\"v\":1}\n"
    );
    assert_eq!(
        chain.head(),
        "df813c32e58608f1aa121d10566e240f81e924d18443ed365d5afa7c97ee2317"
    );
    let mut check = Chain::new();
    assert_eq!(
        check.verify_line(first.as_bytes()).unwrap(),
        json!({"at": 1, "kind": "start", "v": 1})
    );
    check.verify_line(second.as_bytes()).unwrap();
    assert_eq!(check, chain);
    assert_eq!(Chain::resume(&chain.head()), Ok(chain));
}

#[test]
fn refused_records_do_not_move_the_chain() {
    let mut chain = Chain::new();
    for record in [
        json!([]),
        json!({"hash": "x"}),
        json!({"v": 2}),
        json!({"v": "1"}),
        json!({"n": 0.5}),
        json!({"long": "x".repeat(MAX_LINE)}),
    ] {
        assert!(chain.append(&record).is_err());
        assert_eq!(chain, Chain::new());
    }
}

#[test]
fn a_newer_version_is_named() {
    let error = Chain::new()
        .verify_line(b"{\"hash\":\"\",\"v\":2}")
        .unwrap_err();
    assert_eq!(error, RecordError::Version("2".to_owned()));
}

#[test]
fn only_the_canonical_bytes_of_a_line_count() {
    let line = Chain::new().append(&json!({"a": 1})).unwrap();
    let spaced = line.replace(":1,", ": 1,");
    assert_eq!(
        Chain::new().verify_line(spaced.as_bytes()),
        Err(RecordError::Form)
    );
    let doubled = line.replace("{\"a\":1", "{\"a\":2,\"a\":1");
    assert_eq!(
        Chain::new().verify_line(doubled.as_bytes()),
        Err(RecordError::Form)
    );
}

#[test]
fn heads_are_lower_case_hexadecimal() {
    assert!(Chain::resume(&"A".repeat(64)).is_err());
    assert!(Chain::resume("00").is_err());
}

#[test]
fn a_line_without_end_is_not_read_without_end() {
    let endless = io::BufReader::new(io::repeat(b'x'));
    let error = verify(endless, Chain::new(), &mut |_| ()).unwrap_err();
    assert!(matches!(
        error,
        LedgerError::Line {
            number: 1,
            source: RecordError::Length
        }
    ));
}

#[test]
fn a_torn_last_line_is_reported_at_every_cut() {
    let (ledger, starts) = ledger(&[json!({"a": 1}), json!({"b": "two"})]);
    for end in 0..=ledger.len() {
        let verified = verify(&ledger[..end], Chain::new(), &mut |_| ()).unwrap();
        let whole = starts.iter().filter(|start| **start <= end).count() - 1;
        assert_eq!(verified.records, whole as u64);
        assert_eq!(verified.bytes, starts[whole] as u64);
        assert_eq!(verified.is_torn, starts[whole] != end);
    }
    // A file that grew by zeros in a power cut.
    let grown = [ledger.as_slice(), &[0; 100]].concat();
    let verified = verify(grown.as_slice(), Chain::new(), &mut |_| ()).unwrap();
    assert!(verified.is_torn && verified.records == 2);
}

/// The bytes of a ledger and where its lines start, its end included.
fn ledger(records: &[Value]) -> (Vec<u8>, Vec<usize>) {
    let mut chain = Chain::new();
    let mut bytes = Vec::new();
    let mut starts = vec![0];
    for record in records {
        bytes.extend(chain.append(record).unwrap().into_bytes());
        starts.push(bytes.len());
    }
    (bytes, starts)
}

fn value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<String>().prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 32, 4, |inner| {
        prop_oneof![
            vec(inner.clone(), 0..4).prop_map(Value::from),
            btree_map(any::<String>(), inner, 0..4)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

fn record() -> impl Strategy<Value = Value> {
    btree_map("[a-g]{1,3}", value(), 0..5).prop_map(|map| Value::Object(map.into_iter().collect()))
}

/// The same value with the keys of every object the other way round.
fn reversed(value: &Value) -> Value {
    match value {
        Value::Array(items) => items.iter().map(reversed).collect(),
        Value::Object(map) => {
            let members: Vec<_> = map.iter().map(|(k, v)| (k.clone(), reversed(v))).collect();
            Value::Object(members.into_iter().rev().collect())
        }
        other => other.clone(),
    }
}

proptest! {
    #[test]
    fn key_order_does_not_matter(value in value()) {
        let bytes = canonical(&value).unwrap();
        prop_assert_eq!(&canonical(&reversed(&value)).unwrap(), &bytes);
        prop_assert_eq!(serde_json::from_slice::<Value>(&bytes).unwrap(), value);
    }

    #[test]
    fn every_changed_byte_is_found(
        records in vec(record(), 1..5),
        at: prop::sample::Index,
        change in 1_u8..,
    ) {
        let (mut ledger, _) = ledger(&records);
        let whole = verify(ledger.as_slice(), Chain::new(), &mut |_| ()).unwrap();
        prop_assert_eq!(whole.records, records.len() as u64);
        prop_assert!(!whole.is_torn);
        let at = at.index(ledger.len());
        ledger[at] ^= change;
        let after = verify(ledger.as_slice(), Chain::new(), &mut |_| ());
        assert!(after.is_err() || after.is_ok_and(|after| after.is_torn && after.chain != whole.chain));
    }

    #[test]
    fn a_missing_or_exchanged_line_is_found(records in vec(record(), 3..6)) {
        let (ledger, starts) = ledger(&records);
        let lines: Vec<&[u8]> = starts.windows(2).map(|w| &ledger[w[0]..w[1]]).collect();
        let missing = [&lines[..1], &lines[2..]].concat().concat();
        prop_assert!(verify(missing.as_slice(), Chain::new(), &mut |_| ()).is_err());
        let mut exchanged = lines.clone();
        exchanged.swap(0, 1);
        prop_assert!(verify(exchanged.concat().as_slice(), Chain::new(), &mut |_| ()).is_err());
    }

    #[test]
    fn foreign_bytes_never_panic(line: Vec<u8>) {
        let _ = Chain::new().verify_line(&line);
        let _ = verify(line.as_slice(), Chain::new(), &mut |_| ());
    }
}
