use super::*;

fn values(text: &str) -> Vec<(usize, String, String)> {
    parse(text)
        .unwrap()
        .into_iter()
        .map(|a| (a.line, a.key, a.value))
        .collect()
}

fn expected(list: &[(usize, &str, &str)]) -> Vec<(usize, String, String)> {
    list.iter()
        .map(|(line, key, value)| (*line, (*key).to_owned(), (*value).to_owned()))
        .collect()
}

#[test]
fn reads_what_compose_reads() {
    let text = "# comment\nA=1\n\nexport B = two words # comment\nC=\"x\\ny\\$z\" # c\nD='raw $X'\nE=\nF\nG: yaml\nH=a#b\nI=\"two\nlines\"\nJ=last";
    assert_eq!(
        values(text),
        expected(&[
            (2, "A", "1"),
            (4, "B", "two words"),
            (5, "C", "x\ny$$z"),
            (6, "D", "raw $X"),
            (7, "E", ""),
            (9, "G", "yaml"),
            (10, "H", "a#b"),
            (11, "I", "two\nlines"),
            (13, "J", "last"),
        ])
    );
    assert!(!parse("D='$X'").unwrap()[0].interpolated);
    assert!(parse("D=$X").unwrap()[0].interpolated);
    assert_eq!(
        values("A=1\r\nB=2\r\n"),
        expected(&[(1, "A", "1"), (2, "B", "2")])
    );
}

#[test]
fn faults_have_lines() {
    assert_eq!(parse("A=1\nB=\"open\n").unwrap_err().0, 2);
    assert_eq!(parse("A=1\n\n=2\n").unwrap_err().0, 3);
    assert_eq!(parse("two words=1").unwrap_err().0, 1);
}

proptest::proptest! {
    #[test]
    fn foreign_text_never_panics(text in "[A-Bü=:\"'\\\\ \t\r\n#$.-]{0,60}") {
        let _ = parse(&text);
    }

    #[test]
    fn plain_values_survive(value in "[a-zA-Z0-9/:.,@-]{0,20}") {
        let parsed = parse(&format!("KEY={value}\nB=1\n")).unwrap();
        proptest::prop_assert_eq!(&parsed[0].value, &value);
        proptest::prop_assert_eq!(parsed[1].line, 2);
    }
}
