use std::io::{Cursor, Read, Write as _};

use proptest::collection::{btree_map, vec};
use proptest::prelude::*;

use super::*;
use crate::Digest;

/// The bytes of an archive decide the digest of a release, so they can never change.
#[test]
fn golden_digest() {
    let deep = format!("{}/file", "directory".repeat(20));
    let split = format!("{}/{}", "p".repeat(120), "n".repeat(90));
    let mut writer = Writer::new(Vec::new());
    writer
        .file("compose.yaml", false, 14, &mut &b"services: {}\n\n"[..])
        .unwrap();
    writer.directory("conf").unwrap();
    writer
        .file("conf/empty", false, 0, &mut io::empty())
        .unwrap();
    writer
        .file("conf/run.sh", true, 512, &mut io::repeat(b'x').take(512))
        .unwrap();
    writer.file(&deep, false, 1, &mut &b"d"[..]).unwrap();
    writer.file(&split, false, 1, &mut &b"s"[..]).unwrap();
    writer.file("ünïcode", false, 1, &mut &b"u"[..]).unwrap();
    let archive = writer.finish().unwrap();
    assert_eq!(archive.len() % BLOCK, 0);
    assert_eq!(
        Digest::sha256(&archive).to_string(),
        "sha256:31e85a2bb72f045402b4ad44a0960ab2e430184b9e4a012655cf1d47e99d4326"
    );

    let seen = list(&archive, &Limits::default()).unwrap();
    let names: Vec<&str> = seen.iter().map(|entry| entry.0.as_str()).collect();
    assert_eq!(
        names,
        [
            "compose.yaml",
            "conf",
            "conf/empty",
            "conf/run.sh",
            &deep,
            &split,
            "ünïcode"
        ]
    );
    assert_eq!(seen[1].1, Kind::Directory);
    assert_eq!(seen[2].1, Kind::File { executable: false });
    assert_eq!(seen[3].1, Kind::File { executable: true });
    assert_eq!(seen[3].2, vec![b'x'; 512]);
    // Another implementation reads the same.
    assert_eq!(
        foreign_list(&archive),
        seen.iter().map(plain).collect::<Vec<_>>()
    );
}

#[test]
fn sizes_beyond_octal_use_pax() {
    struct Stop;
    impl Read for Stop {
        fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
            Err(io::ErrorKind::TimedOut.into())
        }
    }
    let size = 9 << 30;
    let mut writer = Writer::new(Vec::new());
    assert!(matches!(
        writer.file("big", false, size, &mut Stop),
        Err(TarError::Read(_))
    ));
    let archive = writer.finish().unwrap();
    let mut limits = Limits {
        file_bytes: 1 << 40,
        total_bytes: 1 << 40,
        ..Limits::default()
    };
    // The size was understood: the archive is too short for it.
    assert!(matches!(
        check(&*archive, &limits),
        Err(TarError::Truncated(_))
    ));
    limits.file_bytes = size - 1;
    assert!(matches!(
        check(&*archive, &limits),
        Err(TarError::Limit {
            what: "bytes in a file",
            ..
        })
    ));
}

#[test]
fn the_writer_refuses_disorder_and_false_sizes() {
    let mut writer = Writer::new(Vec::new());
    writer.directory("b").unwrap();
    for name in ["a", "b"] {
        assert!(matches!(
            writer.directory(name),
            Err(TarError::Order { .. })
        ));
    }
    for name in ["", ".", "./c", "c/", "/c", "c//d", "c/../d", "c\nd"] {
        assert!(
            matches!(writer.directory(name), Err(TarError::Name { .. })),
            "{name:?}"
        );
    }
    for size in [1, 3] {
        let mut writer = Writer::new(Vec::new());
        let result = writer.file("c", false, size, &mut &b"12"[..]);
        assert!(matches!(result, Err(TarError::Size { .. })), "{size}");
    }
}

#[test]
fn compression_is_told_by_magic_bytes() {
    let archive = simple();
    let summary = check(&*archive, &Limits::default()).unwrap();
    assert_eq!(summary.compression, Compression::None);
    assert_eq!(summary.files, 1);
    assert_eq!(summary.file_bytes, 5);
    assert_eq!(summary.archive_bytes, archive.len() as u64);
    let zipped = gzip(&archive);
    assert_eq!(
        check(&*zipped, &Limits::default()).unwrap().compression,
        Compression::Gzip
    );
    let packed = zstd::encode_all(&*archive, 3).unwrap();
    assert_eq!(
        check(&*packed, &Limits::default()).unwrap().compression,
        Compression::Zstd
    );
    // Two members are one stream.
    let (head, tail) = archive.split_at(700);
    let members = [gzip(head), gzip(tail)].concat();
    assert_eq!(check(&*members, &Limits::default()).unwrap().files, 1);
}

#[test]
fn damaged_compression_is_a_refusal_and_a_failing_source_is_not() {
    for compressed in [gzip(&simple()), zstd::encode_all(&*simple(), 3).unwrap()] {
        let cut = check(&compressed[..compressed.len() - 5], &Limits::default()).unwrap_err();
        assert!(cut.is_refusal(), "{cut:?}");
        let garbage = [compressed.as_slice(), b"garbage"].concat();
        let error = check(&*garbage, &Limits::default()).unwrap_err();
        assert!(matches!(error, TarError::Corrupt(_)), "{error:?}");
        let failing = Cursor::new(&compressed[..20]).chain(Failing);
        let error = check(failing, &Limits::default()).unwrap_err();
        assert!(matches!(error, TarError::Read(_)), "{error:?}");
        assert!(!error.is_refusal());
    }
}

#[test]
fn names_that_leave_the_tree_are_refused() {
    for name in [
        &b"/etc/passwd"[..],
        b"../x",
        b"a/../../x",
        b"a/..",
        b"..",
        b"",
        b"a//b",
        b"a/./b",
        b"a/.",
        b"././a",
        b".//",
        b"a\nb",
        b"a\x7fb",
        b"\xff\xfe",
    ] {
        let archive = Raw::new().file(name, b"x").end();
        let error = check(&*archive, &Limits::default()).unwrap_err();
        assert!(
            matches!(error, TarError::Name { .. }),
            "{name:?}: {error:?}"
        );
        let pax = Raw::new()
            .pax(&[("path", name)])
            .file(b"harmless", b"x")
            .end();
        let error = check(&*pax, &Limits::default()).unwrap_err();
        assert!(
            matches!(error, TarError::Name { .. }),
            "PAX {name:?}: {error:?}"
        );
        let gnu = Raw::new().entry(b"././@LongLink", b'L', &[name, b"\0"].concat(), b"");
        let gnu = gnu.file(b"harmless", b"x").end();
        let error = check(&*gnu, &Limits::default()).unwrap_err();
        assert!(
            matches!(error, TarError::Name { .. }),
            "GNU {name:?}: {error:?}"
        );
    }
    // A NUL in a PAX name: other programs stop there.
    let archive = Raw::new().pax(&[("path", b"a\0b")]).file(b"x", b"").end();
    assert!(matches!(
        check(&*archive, &Limits::default()),
        Err(TarError::Name { .. })
    ));
    let long = Raw::new().file(&[b'n'; 300], b"");
    assert!(matches!(
        check(&*long.end(), &Limits::default()),
        Err(TarError::Name { .. })
    ));
}

#[test]
fn usual_names_are_brought_to_one_form() {
    let archive = Raw::new()
        .entry(b"./", b'5', b"", b"")
        .entry(b"./a/", b'5', b"", b"")
        .file(b"./a/b", b"1")
        .entry(b"old/", 0, b"", b"")
        .file(br"a/dev-disk-by\x2duuid.mount", b"2")
        .end();
    let seen = list(&archive, &Limits::default()).unwrap();
    let names: Vec<&str> = seen.iter().map(|entry| entry.0.as_str()).collect();
    assert_eq!(names, ["a", "a/b", "old", r"a/dev-disk-by\x2duuid.mount"]);
    assert_eq!(seen[2].1, Kind::Directory);
    let file_as_root = Raw::new().file(b".", b"x").end();
    assert!(matches!(
        check(&*file_as_root, &Limits::default()),
        Err(TarError::Name { .. })
    ));
}

#[test]
fn what_is_no_file_is_refused() {
    for kind in [b'3', b'4', b'6', b'S', b'M', b'V', b'D', b'?'] {
        let archive = Raw::new().entry(b"x", kind, b"", b"").end();
        let error = check(&*archive, &Limits::default()).unwrap_err();
        assert!(matches!(error, TarError::Kind { .. }), "{kind}: {error:?}");
    }
    let sparse = Raw::new()
        .pax(&[("GNU.sparse.major", b"1")])
        .file(b"x", b"")
        .end();
    assert!(matches!(
        check(&*sparse, &Limits::default()),
        Err(TarError::Header { .. })
    ));
}

#[test]
fn links_follow_the_policy() {
    let inside = Limits {
        links: Links::InsideTree,
        ..Limits::default()
    };
    let symlink = |name: &[u8], target: &[u8]| Raw::new().entry(name, b'2', b"", target).end();
    for (name, target) in [
        (&b"a"[..], &b"b"[..]),
        (b"a/b", b"../c"),
        (b"a/b/c", b"../../d/e"),
        (b"a", b"."),
    ] {
        let archive = symlink(name, target);
        assert!(matches!(
            check(&*archive, &Limits::default()),
            Err(TarError::Link { .. })
        ));
        assert_eq!(check(&*archive, &inside).unwrap().links, 1, "{target:?}");
    }
    for (name, target) in [
        (&b"a"[..], &b"/etc/passwd"[..]),
        (b"a", b".."),
        (b"a", b"../x"),
        (b"a/b", b"../../x"),
        (b"a/b", b"c/../../.."),
        (b"a", b"b/.."),
        (b"a", b""),
        (b"a", b"b\nc"),
    ] {
        let archive = symlink(name, target);
        let error = check(&*archive, &inside).unwrap_err();
        assert!(
            matches!(error, TarError::Link { .. }),
            "{name:?} {target:?}: {error:?}"
        );
    }
    // Nothing lies below a link, whichever came first.
    let below = Raw::new()
        .entry(b"l", b'2', b"", b"d")
        .file(b"l/x", b"1")
        .end();
    assert!(matches!(
        check(&*below, &inside),
        Err(TarError::Duplicate { .. })
    ));
    let above = Raw::new()
        .file(b"l/x", b"1")
        .entry(b"l", b'2', b"", b"d")
        .end();
    assert!(matches!(
        check(&*above, &inside),
        Err(TarError::Duplicate { .. })
    ));

    let hard = Raw::new()
        .file(b"f", b"1")
        .entry(b"h", b'1', b"", b"./f")
        .end();
    assert!(matches!(
        check(&*hard, &Limits::default()),
        Err(TarError::Link { .. })
    ));
    let seen = list(&hard, &inside).unwrap();
    assert_eq!(
        seen[1].1,
        Kind::HardLink {
            target: "f".to_owned()
        }
    );
    for target in [&b"/etc/passwd"[..], b"../f", b"later", b"", b"d", b"l"] {
        let archive = Raw::new()
            .entry(b"d/", b'5', b"", b"")
            .entry(b"l", b'2', b"", b"d")
            .entry(b"h", b'1', b"", target)
            .file(b"later", b"")
            .end();
        let error = check(&*archive, &inside).unwrap_err();
        assert!(
            matches!(error, TarError::Link { .. }),
            "{target:?}: {error:?}"
        );
    }
}

#[test]
fn a_name_is_one_thing() {
    let directory = |raw: Raw, name: &[u8]| raw.entry(name, b'5', b"", b"");
    for archive in [
        directory(Raw::new().file(b"x", b"1"), b"x/").end(),
        directory(Raw::new(), b"x/").file(b"x", b"1").end(),
        Raw::new().file(b"x", b"1").file(b"x", b"2").end(),
        Raw::new().file(b"x", b"1").file(b"x/y", b"2").end(),
        Raw::new().file(b"x/y", b"1").file(b"x", b"2").end(),
        Raw::new().file(b"x", b"1").file(b"./x", b"2").end(),
    ] {
        let error = check(&*archive, &Limits::default()).unwrap_err();
        assert!(matches!(error, TarError::Duplicate { .. }), "{error:?}");
    }
    let twice = directory(directory(Raw::new().file(b"x/y", b""), b"x/"), b"x").end();
    assert_eq!(check(&*twice, &Limits::default()).unwrap().directories, 2);
}

#[test]
fn contradictory_headers_are_refused() {
    let header = |archive: Vec<u8>| {
        let error = check(&*archive, &Limits::default()).unwrap_err();
        assert!(matches!(error, TarError::Header { .. }), "{error:?}");
    };
    // The size in PAX hides an archive in a file, or the other way round.
    header(
        Raw::new()
            .pax(&[("size", b"0")])
            .file(b"x", &[b'y'; 600])
            .end(),
    );
    header(Raw::new().pax(&[("size", b"512")]).file(b"x", b"1").end());
    header(Raw::new().pax(&[("size", b"+1")]).file(b"x", b"1").end());
    header(
        Raw::new()
            .pax(&[("path", b"a"), ("path", b"b")])
            .file(b"x", b"")
            .end(),
    );
    header(
        Raw::new()
            .pax(&[("path", b"a")])
            .pax(&[("path", b"b")])
            .file(b"x", b"")
            .end(),
    );
    header(
        Raw::new()
            .entry(b"x", b'L', b"a\0", b"")
            .pax(&[("path", b"b")])
            .file(b"x", b"")
            .end(),
    );
    header(Raw::new().pax(&[("path", b"a")]).end());
    header(
        Raw::new()
            .entry(b"x", b'x', b"999 path=a\n", b"")
            .file(b"x", b"")
            .end(),
    );
    header(
        Raw::new()
            .entry(b"x", b'x', b"nonsense", b"")
            .file(b"x", b"")
            .end(),
    );
    header(
        Raw::new()
            .entry(b"x", b'g', b"10 path=a\n", b"")
            .file(b"x", b"")
            .end(),
    );
    header(Raw::new().entry(b"d/", b'5', b"content", b"").end());
    header(Raw::new().file(b"slash/", b"content").end());
    header(b"not a tar archive ".repeat(100));
    header([&simple()[..256], &[1_u8; 256], &[0; 1024]].concat());
    let commit = Raw::new().entry(
        b"pax_global_header",
        b'g',
        b"52 comment=0123456789012345678901234567890123456789\n",
        b"",
    );
    assert_eq!(
        check(&*commit.file(b"x", b"").end(), &Limits::default())
            .unwrap()
            .files,
        1
    );
    let equal = Raw::new().pax(&[("size", b"1")]).file(b"x", b"1").end();
    assert_eq!(check(&*equal, &Limits::default()).unwrap().file_bytes, 1);
}

#[test]
fn only_zeros_follow_the_end() {
    let mut archive = simple();
    archive.extend([0; 10_240]);
    check(&*archive, &Limits::default()).unwrap();
    archive.push(1);
    assert!(matches!(
        check(&*archive, &Limits::default()),
        Err(TarError::Trailing)
    ));
    // One zero block is an end: what stands behind it is invisible to some and an entry to others.
    let hidden = [Raw::new().file(b"x", b"1").0, vec![0; 512], simple()].concat();
    assert!(matches!(
        check(&*hidden, &Limits::default()),
        Err(TarError::Trailing)
    ));
}

#[test]
fn a_cut_archive_is_refused_at_every_block() {
    let archive = simple();
    for end in [0, 100, 512, 600, 1024] {
        let error = check(&archive[..end], &Limits::default()).unwrap_err();
        assert!(matches!(error, TarError::Truncated(_)), "{end}: {error:?}");
    }
}

#[test]
fn limits_hold() {
    let many = (0..20).fold(Raw::new(), |raw, n| {
        raw.file(format!("f{n}").as_bytes(), b"12345")
    });
    let many = many.end();
    let limit = |limits: Limits, expected: &str| {
        let error = check(&*many, &limits).unwrap_err();
        assert!(
            matches!(error, TarError::Limit { what, .. } if what == expected),
            "{error:?}"
        );
    };
    limit(
        Limits {
            entries: 19,
            ..Limits::default()
        },
        "entries",
    );
    limit(
        Limits {
            file_bytes: 4,
            ..Limits::default()
        },
        "bytes in a file",
    );
    limit(
        Limits {
            total_bytes: 5000,
            ..Limits::default()
        },
        "bytes in all",
    );
    limit(
        Limits {
            name_length: 2,
            ..Limits::default()
        },
        "bytes in a name",
    );
    let exact = Limits {
        entries: 20,
        file_bytes: 5,
        total_bytes: many.len() as u64,
        name_length: 3,
        ..Limits::default()
    };
    check(&*many, &exact).unwrap();

    // Many deep names: each names hundreds of directories.
    let mut deep = Raw::new();
    for n in 0..300 {
        let name = format!("{n}{}", "/d".repeat(500));
        deep = deep.pax(&[("path", name.as_bytes())]).file(b"x", b"");
    }
    let error = check(&*deep.end(), &Limits::default()).unwrap_err();
    assert!(
        matches!(
            error,
            TarError::Limit {
                what: "bytes of names",
                ..
            }
        ),
        "{error:?}"
    );
    let extension = Raw::new()
        .entry(b"x", b'x', &vec![b'x'; 2 << 20], b"")
        .end();
    assert!(matches!(
        check(&*extension, &Limits::default()),
        Err(TarError::Header { .. })
    ));
}

#[test]
fn a_bomb_is_refused_by_its_ratio() {
    let size = 17 << 20;
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    let mut writer = Writer::new(&mut encoder);
    writer
        .file("zeros", false, size, &mut io::repeat(0).take(size))
        .unwrap();
    writer.finish().unwrap();
    let bomb = encoder.finish().unwrap();
    let error = check(
        &*bomb,
        &Limits {
            ratio: 50,
            ..Limits::default()
        },
    )
    .unwrap_err();
    assert!(
        matches!(error, TarError::Limit { limit: 50, .. }),
        "{error:?}"
    );
    check(
        &*bomb,
        &Limits {
            ratio: 2000,
            ..Limits::default()
        },
    )
    .unwrap();
}

#[test]
fn a_sink_may_leave_content_and_may_fail() {
    struct First(usize);
    impl Sink for First {
        fn entry(&mut self, entry: Entry<'_>) -> io::Result<()> {
            let wanted = entry.size.min(self.0 as u64);
            let count = io::copy(&mut entry.content.take(wanted), &mut io::sink())?;
            if entry.path == "bad" {
                return Err(io::ErrorKind::StorageFull.into());
            }
            assert_eq!(count, wanted);
            Ok(())
        }
    }
    let raw = Raw::new().file(b"a", &[b'x'; 1000]).file(b"b", b"y");
    let good = raw.end();
    for length in [0, 1, 999, 1000, 4000] {
        assert_eq!(
            read(&*good, &Limits::default(), &mut First(length))
                .unwrap()
                .files,
            2
        );
    }
    let bad = Raw::new().file(b"bad", b"").end();
    let error = read(&*bad, &Limits::default(), &mut First(0)).unwrap_err();
    assert!(
        matches!(error, TarError::Sink { ref source, .. } if source.kind() == io::ErrorKind::StorageFull)
    );
    assert!(!error.is_refusal());
    // The archive's fault stays the archive's fault when a sink hands it on.
    let error = read(&good[..600], &Limits::default(), &mut First(4000)).unwrap_err();
    assert!(matches!(error, TarError::Truncated(_)), "{error:?}");
}

#[test]
fn numbers_are_read_in_both_forms() {
    use super::reader::number;
    assert_eq!(number(b"0000644\0"), Some(0o644));
    assert_eq!(number(b"  644 \0\0"), Some(0o644));
    assert_eq!(number(b"\0\0\0\0"), Some(0));
    assert_eq!(number(b"\x80\0\0\0\0\0\0\0\0\0\x02\x00"), Some(512));
    assert_eq!(number(b"\x80\0\x01\0\0\0\0\0\0\0\0\0"), None);
    assert_eq!(
        number(b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"),
        None
    );
    assert_eq!(number(b"12\x009\0\0\0\0"), None);
    assert_eq!(number(b"-1\0\0"), None);
    assert_eq!(number(b"8"), None);
}

proptest! {
    #[test]
    fn what_is_written_is_read(files in btree_map("[a-c]{1,60}(/[d-fé]{1,80}){0,4}", (any::<bool>(), vec(any::<u8>(), 0..1500)), 0..8)) {
        let mut writer = Writer::new(Vec::new());
        for (name, (executable, content)) in &files {
            writer.file(name, *executable, content.len() as u64, &mut content.as_slice()).unwrap();
        }
        let archive = writer.finish().unwrap();
        match list(&archive, &Limits::default()) {
            Ok(seen) => {
                let expected: Vec<Seen> = files
                    .iter()
                    .map(|(name, (executable, content))| {
                        (name.clone(), Kind::File { executable: *executable }, content.clone())
                    })
                    .collect();
                prop_assert_eq!(&seen, &expected);
                prop_assert_eq!(foreign_list(&archive), seen.iter().map(plain).collect::<Vec<_>>());
            }
            // A drawn name may lie below another drawn name.
            Err(error) => assert!(matches!(error, TarError::Duplicate { .. })),
        }
    }

    #[test]
    fn foreign_archives_are_read_alike(names in vec("[a-b]{1,40}(/[a-b]{1,80}){0,3}", 1..5), gnu: bool) {
        let mut builder = ::tar::Builder::new(Vec::new());
        for name in &names {
            let mut header = if gnu { ::tar::Header::new_gnu() } else { ::tar::Header::new_ustar() };
            header.set_size(3);
            header.set_mode(0o755);
            if builder.append_data(&mut header, name, &b"abc"[..]).is_err() {
                return Ok(());
            }
        }
        let archive = builder.into_inner().unwrap();
        if let Ok(seen) = list(&archive, &Limits::default()) {
            prop_assert_eq!(foreign_list(&archive), seen.iter().map(plain).collect::<Vec<_>>());
        }
    }

    #[test]
    fn foreign_bytes_never_panic(bytes: Vec<u8>) {
        let _ = check(&*bytes, &Limits::default());
    }

    #[test]
    fn damaged_archives_never_panic(at: prop::sample::Index, to: u8, fix: bool) {
        let mut archive = Raw::new()
            .pax(&[("path", b"some/name"), ("size", b"5")])
            .file(b"x", b"12345")
            .entry(b"././@LongLink", b'L', b"long\0", b"")
            .entry(b"d", b'5', b"", b"")
            .end();
        let at = at.index(archive.len());
        archive[at] = to;
        if fix {
            let block = at / BLOCK * BLOCK;
            seal(&mut archive[block..block + BLOCK]);
        }
        let limits = Limits { total_bytes: 1 << 20, ..Limits::default() };
        let ours = list(&archive, &limits);
        // Where both accept, both see the same.
        if let Ok(seen) = ours && let Some(theirs) = try_foreign_list(&archive) {
            prop_assert_eq!(theirs, seen.iter().map(plain).collect::<Vec<_>>());
        }
    }
}

type Seen = (String, Kind, Vec<u8>);

fn list(archive: &[u8], limits: &Limits) -> Result<Vec<Seen>, TarError> {
    struct All(Vec<Seen>);
    impl Sink for All {
        fn entry(&mut self, entry: Entry<'_>) -> io::Result<()> {
            let mut content = Vec::new();
            entry.content.read_to_end(&mut content)?;
            self.0.push((entry.path.to_owned(), entry.kind, content));
            Ok(())
        }
    }
    let mut all = All(Vec::new());
    read(archive, limits, &mut all)?;
    Ok(all.0)
}

fn plain(seen: &Seen) -> (String, Vec<u8>) {
    (seen.0.clone(), seen.2.clone())
}

fn foreign_list(archive: &[u8]) -> Vec<(String, Vec<u8>)> {
    try_foreign_list(archive).unwrap()
}

fn try_foreign_list(archive: &[u8]) -> Option<Vec<(String, Vec<u8>)>> {
    let mut seen = Vec::new();
    for entry in ::tar::Archive::new(archive).entries().ok()? {
        let mut entry = entry.ok()?;
        let path = String::from_utf8(entry.path_bytes().into_owned()).ok()?;
        let mut content = Vec::new();
        entry.read_to_end(&mut content).ok()?;
        let path = path.strip_suffix('/').unwrap_or(&path);
        let path = path.strip_prefix("./").unwrap_or(path);
        if path != "." {
            seen.push((path.to_owned(), content));
        }
    }
    Some(seen)
}

fn simple() -> Vec<u8> {
    Raw::new().file(b"hello", b"world").end()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// Builds archives that no honest program writes.
struct Raw(Vec<u8>);

impl Raw {
    fn new() -> Self {
        Self(Vec::new())
    }

    fn file(self, name: &[u8], content: &[u8]) -> Self {
        if name.len() <= 100 {
            return self.entry(name, b'0', content, b"");
        }
        self.pax(&[("path", name)])
            .entry(b"long", b'0', content, b"")
    }

    fn pax(self, records: &[(&str, &[u8])]) -> Self {
        let mut content = Vec::new();
        for (key, value) in records {
            let rest = key.len() + value.len() + 3;
            let length = (1..5)
                .map(|digits| rest + digits)
                .find(|l| l.to_string().len() + rest == *l);
            content.extend(format!("{} {key}=", length.unwrap()).into_bytes());
            content.extend_from_slice(value);
            content.push(b'\n');
        }
        self.entry(b"pax", b'x', &content, b"")
    }

    fn entry(mut self, name: &[u8], kind: u8, content: &[u8], link: &[u8]) -> Self {
        let mut block = [0; BLOCK];
        block[..name.len()].copy_from_slice(name);
        block[100..107].copy_from_slice(b"0000644");
        block[124..135].copy_from_slice(format!("{:011o}", content.len()).as_bytes());
        block[156] = kind;
        block[157..157 + link.len()].copy_from_slice(link);
        block[257..265].copy_from_slice(b"ustar\x0000");
        seal(&mut block);
        self.0.extend_from_slice(&block);
        self.0.extend_from_slice(content);
        self.0.resize(self.0.len().next_multiple_of(BLOCK), 0);
        self
    }

    fn end(mut self) -> Vec<u8> {
        self.0.extend([0; 2 * BLOCK]);
        self.0
    }
}

fn seal(block: &mut [u8]) {
    block[148..156].copy_from_slice(b"        ");
    let sum: u32 = block.iter().copied().map(u32::from).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
}

struct Failing;

impl Read for Failing {
    fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
        Err(io::ErrorKind::ConnectionReset.into())
    }
}
