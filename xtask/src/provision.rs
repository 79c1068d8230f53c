//! Brings what the end-to-end tests need: real clients, an engine's programs, PostgreSQL.
//!
//! Everything ends as a link or a file under `target/tools`, by the name that the tests use, so
//! that a second run finds it. On Debian as root, missing packages are installed; clients that the
//! machine's own release lacks are downloaded as packages of a later release, with sources
//! derived from the machine's own, and unpacked beside (never installed); those that no release has are
//! built with Go where Go is there. Elsewhere a tool is taken from `PATH`, or it is missing.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};

use crate::shell;

/// Where a tool can come from.
enum Source {
    /// A package of this release, and the program in it.
    Package(&'static str),
    /// A package of a later release: suite, package, path in it.
    Later(&'static str, &'static str, &'static str),
    /// A Go module at a version, and what its program is called there.
    Go(&'static str, &'static str),
}

struct Need {
    /// Where it goes under `target/tools`.
    place: &'static str,
    /// The program's name on `PATH`, when any version will do.
    program: Option<&'static str>,
    source: Source,
}

const NEEDS: &[Need] = &[
    Need {
        place: "bin/docker",
        program: Some("docker"),
        source: Source::Package("docker.io"),
    },
    Need {
        place: "bin/dockerd",
        program: Some("dockerd"),
        source: Source::Package("docker.io"),
    },
    Need {
        place: "bin/ip",
        program: Some("ip"),
        source: Source::Package("iproute2"),
    },
    Need {
        place: "bin/skopeo",
        program: Some("skopeo"),
        source: Source::Package("skopeo"),
    },
    Need {
        place: "bin/strace",
        program: Some("strace"),
        source: Source::Package("strace"),
    },
    Need {
        place: "bin/busybox",
        program: Some("busybox"),
        source: Source::Package("busybox-static"),
    },
    Need {
        place: "bin/docker-registry",
        program: Some("docker-registry"),
        source: Source::Package("docker-registry"),
    },
    Need {
        place: "bin/oras",
        program: Some("oras"),
        source: Source::Later("sid", "oras", "usr/bin/oras"),
    },
    Need {
        place: "bin/crane",
        program: Some("crane"),
        source: Source::Later("sid", "crane", "usr/bin/crane"),
    },
    Need {
        place: "bin/cosign2",
        program: None,
        source: Source::Later("trixie", "cosign", "usr/bin/cosign"),
    },
    Need {
        place: "bin/cosign3",
        program: None,
        source: Source::Later("sid", "cosign", "usr/bin/cosign"),
    },
    Need {
        place: "compose-2/cli-plugins/docker-compose",
        program: None,
        source: Source::Later(
            "trixie",
            "docker-compose",
            "usr/libexec/docker/cli-plugins/docker-compose",
        ),
    },
    Need {
        place: "bin/helm",
        program: Some("helm"),
        source: Source::Go("helm.sh/helm/v3/cmd/helm@v3.22.0", "helm"),
    },
    Need {
        place: "compose-5/cli-plugins/docker-compose",
        program: None,
        // The one release of this line without `exclude` directives, which `go install` refuses.
        source: Source::Go("github.com/docker/compose/v5/cmd@v5.0.2", "cmd"),
    },
    Need {
        place: "bin/minio",
        program: Some("minio"),
        source: Source::Go(
            "github.com/minio/minio@v0.0.0-20260212201848-7aac2a2c5b7c",
            "minio",
        ),
    },
    Need {
        place: "bin/versitygw",
        program: Some("versitygw"),
        source: Source::Go(
            "github.com/versity/versitygw/cmd/versitygw@v1.8.0",
            "versitygw",
        ),
    },
];

/// What was found or brought.
pub(crate) struct Tools {
    /// The directory.
    pub(crate) dir: PathBuf,
    /// What is missing, with what to do about it.
    pub(crate) missing: Vec<String>,
    /// Parts of test names whose tests cannot run here, with the reason. They are named in the summary.
    pub(crate) not_run: Vec<(&'static str, String)>,
    /// PostgreSQL's programs.
    pub(crate) postgres: Option<PathBuf>,
}

impl Tools {
    /// Prints what is there.
    pub(crate) fn print(&self) {
        for need in NEEDS {
            let path = self.dir.join(need.place);
            let real = std::fs::canonicalize(&path).ok();
            println!(
                "{:<40} {}",
                need.place,
                real.map_or_else(|| "missing".to_owned(), |path| path.display().to_string())
            );
        }
        let postgres = self
            .postgres
            .as_ref()
            .map_or_else(|| "missing".to_owned(), |dir| dir.display().to_string());
        println!("{:<40} {postgres}", "postgresql");
        for (name, reason) in &self.not_run {
            println!("tests named `{name}` cannot run here: {reason}");
        }
        for line in &self.missing {
            println!("missing: {line}");
        }
    }
}

/// Finds or brings everything.
pub(crate) fn tools() -> anyhow::Result<Tools> {
    let dir = shell::target().join("tools");
    std::fs::create_dir_all(dir.join("bin"))
        .with_context(|| format!("cannot make {}", dir.display()))?;
    let debian = Path::new("/etc/debian_version").exists()
        && shell::is_root()
        && shell::find("apt-get").is_some();
    let mut tools = Tools {
        dir: dir.clone(),
        missing: Vec::new(),
        not_run: Vec::new(),
        postgres: postgres(),
    };

    if debian {
        let mut packages: Vec<&str> = NEEDS
            .iter()
            .filter_map(|need| match need.source {
                Source::Package(package) if usable(need).is_none() => Some(package),
                _ => None,
            })
            .collect();
        if tools.postgres.is_none() {
            packages.push("postgresql");
        }
        if shell::find("containerd").is_none() || shell::find("runc").is_none() {
            packages.push("docker.io");
        }
        packages.sort_unstable();
        packages.dedup();
        if !packages.is_empty() {
            install(&packages)?;
            tools.postgres = postgres();
        }
    }
    if tools.postgres.is_none() {
        tools
            .missing
            .push("PostgreSQL's server programs (package `postgresql`)".to_owned());
    }

    for need in NEEDS {
        let place = dir.join(need.place);
        if place.exists() {
            continue;
        }
        if let Some(found) = usable(need) {
            link(&found, &place)?;
            continue;
        }
        match need.source {
            Source::Later(suite, package, inside) if debian => {
                let unpacked = later(&dir, suite, package)?;
                link(&unpacked.join(inside), &place)?;
            }
            Source::Go(module, program) => {
                let absent = shell::find("go").is_none().then(|| {
                    format!(
                        "`{}` is built with Go 1.24 or later, which is not here",
                        need.place
                    )
                });
                match (absent, need.place) {
                    (None, _) => link(&go_install(&dir, module, program)?, &place)?,
                    (Some(why), "bin/helm") => tools.not_run.push(("helm", why)),
                    (Some(why), place) if place.contains("compose-5") => {
                        tools.not_run.push(("compose5", why));
                    }
                    // Half of the run modes stands on it.
                    (Some(why), _) => tools.missing.push(why),
                }
            }
            Source::Package(package) | Source::Later(_, package, _) => {
                tools.missing.push(format!(
                    "`{}` (Debian has it in `{package}`); or put it at {}",
                    need.place,
                    place.display()
                ));
            }
        }
    }
    Ok(tools)
}

/// The program of an S3 store, found or brought; for programs that need nothing else.
pub(crate) fn object_store(kind: e2e::objects::Kind) -> anyhow::Result<PathBuf> {
    let place = format!("bin/{}", kind.program());
    let need = NEEDS
        .iter()
        .find(|need| need.place == place)
        .with_context(|| format!("nobody knows where `{place}` comes from"))?;
    let dir = shell::target().join("tools");
    let path = dir.join(&place);
    if path.exists() {
        return Ok(path);
    }
    match (usable(need), &need.source) {
        (Some(found), _) => link(&found, &path)?,
        (None, Source::Go(module, program)) if shell::find("go").is_some() => {
            std::fs::create_dir_all(&dir)?;
            link(&go_install(&dir, module, program)?, &path)?;
        }
        _ => bail!("`{place}` is built with Go 1.24 or later, which is not here"),
    }
    Ok(path)
}

/// The tool on this machine, when any version of it will do.
fn usable(need: &Need) -> Option<PathBuf> {
    let path = shell::find(need.program?)?;
    // Images made of busybox hold nothing else, so it must be the static one.
    if need.program == Some("busybox") && !is_static(&path) {
        return None;
    }
    Some(path)
}

fn is_static(path: &Path) -> bool {
    std::fs::read(path).is_ok_and(|bytes| {
        let head = bytes.get(..4096).unwrap_or(&bytes);
        bytes.starts_with(b"\x7fELF")
            && !head
                .windows(4)
                .any(|part| part == b"/ld-" || part == b"ld-l")
    })
}

fn postgres() -> Option<PathBuf> {
    let mut found: Vec<PathBuf> = std::fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path().join("bin")))
        .filter(|dir| dir.join("initdb").exists())
        .collect();
    found.sort();
    found.pop().or_else(|| {
        let initdb = shell::find("initdb")?;
        initdb.parent().map(Path::to_owned)
    })
}

fn install(packages: &[&str]) -> anyhow::Result<()> {
    println!("installing packages: {}", packages.join(" "));
    let apt = |args: &[&str]| {
        shell::read(
            shell::command("apt-get")
                .args(["-q", "-y", "-o", "DPkg::Lock::Timeout=300"])
                .args(args)
                .env("DEBIAN_FRONTEND", "noninteractive"),
        )
    };
    apt(&["update"])?;
    let mut args = vec!["install", "--no-install-recommends"];
    args.extend(packages);
    apt(&args)?;
    Ok(())
}

/// Downloads a package of a later release and unpacks it; touches nothing of the system's.
fn later(dir: &Path, suite: &str, package: &str) -> anyhow::Result<PathBuf> {
    println!("downloading {package} of {suite}");
    let apt = dir.join(format!("apt-{suite}"));
    let config = apt.join("apt.conf");
    let with_config = |program: &str| {
        let mut command = shell::command(program);
        command.env("APT_CONFIG", &config);
        command
    };
    if !config.exists() {
        for part in ["lists/partial", "cache/archives/partial", "parts"] {
            std::fs::create_dir_all(apt.join(part))?;
        }
        std::fs::write(apt.join("parts/later.sources"), later_sources(suite)?)?;
        let at = apt.display();
        let text = format!(
            "Dir::Etc::sourcelist \"/dev/null\";\nDir::Etc::sourceparts \"{at}/parts\";\n\
             Dir::State::lists \"{at}/lists\";\nDir::Cache \"{at}/cache\";\n"
        );
        std::fs::write(apt.join("apt.conf.new"), text)?;
        shell::read(
            with_config("apt-get")
                .env("APT_CONFIG", apt.join("apt.conf.new"))
                .args(["-qq", "update"]),
        )?;
        // Only now, so that a broken update is tried again.
        std::fs::rename(apt.join("apt.conf.new"), &config)?;
    }
    let unpacked = dir.join(format!("{package}-{suite}"));
    let downloads = dir.join(format!("{package}-{suite}-download"));
    std::fs::create_dir_all(&downloads)?;
    shell::read(with_config("apt-get").current_dir(&downloads).args([
        "-qq",
        "download",
        &format!("{package}/{suite}"),
    ]))?;
    let file = std::fs::read_dir(&downloads)?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.extension().is_some_and(|ending| ending == "deb"))
        .with_context(|| format!("no package file of {package} in {}", downloads.display()))?;
    shell::read(
        shell::command("dpkg-deb")
            .arg("-x")
            .arg(&file)
            .arg(&unpacked),
    )?;
    std::fs::remove_dir_all(&downloads)?;
    Ok(unpacked)
}

/// The machine's own sources with another suite in them, so that no host is named here.
fn later_sources(suite: &str) -> anyhow::Result<String> {
    let mut files: Vec<PathBuf> = std::fs::read_dir("/etc/apt/sources.list.d")
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|ending| ending == "sources"))
        .collect();
    files.sort();
    for file in &files {
        if let Some(stanza) = deb822(&std::fs::read_to_string(file)?, suite) {
            return Ok(stanza);
        }
    }
    let list = std::fs::read_to_string("/etc/apt/sources.list").unwrap_or_default();
    one_line(&list, suite)
        .context("no source of Debian packages in /etc/apt to derive a later release's from")
}

/// The stanza of Debian's main archive in a `.sources` file, with its suites replaced.
fn deb822(text: &str, suite: &str) -> Option<String> {
    let stanza = text.split("\n\n").find(|stanza| {
        let debian = stanza.lines().any(|line| {
            line.strip_prefix("URIs:").is_some_and(|uris| {
                uris.split_whitespace()
                    .any(|uri| uri.trim_end_matches('/').ends_with("/debian"))
            })
        });
        debian && stanza.contains("Suites:") && !stanza.contains("-security")
    })?;
    let lines = stanza.lines().map(|line| {
        if line.starts_with("Suites:") {
            format!("Suites: {suite}")
        } else {
            line.to_owned()
        }
    });
    Some(lines.collect::<Vec<_>>().join("\n") + "\n")
}

/// The same out of a `sources.list` in the one-line form.
fn one_line(text: &str, suite: &str) -> Option<String> {
    let line = text.lines().find(|line| {
        line.starts_with("deb ") && line.contains("/debian ") && !line.contains("-security")
    })?;
    let mut words: Vec<&str> = line.split_whitespace().collect();
    let (mut options, mut at) = (String::new(), 1);
    if words.get(1).is_some_and(|word| word.starts_with('[')) {
        let end = words.iter().position(|word| word.ends_with(']'))?;
        options = words.get(1..=end)?.join(" ");
        at = end + 1;
    }
    let key = options
        .trim_matches(['[', ']'])
        .split_whitespace()
        .find_map(|option| option.strip_prefix("signed-by="));
    let uri = words.drain(at..).next()?.to_owned();
    let signed = key
        .map(|key| format!("Signed-By: {key}\n"))
        .unwrap_or_default();
    Some(format!(
        "Types: deb\nURIs: {uri}\nSuites: {suite}\nComponents: main\n{signed}"
    ))
}

/// Builds a Go program, with caches of its own that are deleted afterwards.
fn go_install(dir: &Path, module: &str, program: &str) -> anyhow::Result<PathBuf> {
    println!("building {module} (a minute or three)");
    let name = module.replace(['/', '@', '.'], "-");
    let (bin, work) = (dir.join("go-bin").join(name), dir.join("go-work"));
    std::fs::create_dir_all(&bin)?;
    shell::read(
        shell::command("go")
            .current_dir(dir)
            .args(["install", "-trimpath", "-ldflags=-s -w", module])
            .env("CGO_ENABLED", "0")
            .env("GOBIN", &bin)
            .env("GOFLAGS", "-buildvcs=false -modcacherw")
            .env("GOPATH", work.join("path"))
            .env("GOCACHE", work.join("cache")),
    )?;
    std::fs::remove_dir_all(&work)?;
    Ok(bin.join(program))
}

fn link(from: &Path, to: &Path) -> anyhow::Result<()> {
    if !from.exists() {
        bail!("{} is not where it should be", from.display());
    }
    if let Some(parent) = to.parent() {
        std::fs::create_dir_all(parent)?;
    }
    // A link that points nowhere (the tool was removed since) is replaced.
    drop(std::fs::remove_file(to));
    std::os::unix::fs::symlink(from, to).with_context(|| format!("cannot link {}", to.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_later_release_is_derived_from_the_machines_own_source() {
        let text = "Types: deb\n# a remark\nURIs: http://mirror.example/debian\nSuites: bookworm bookworm-updates\n\
                    Components: main\nSigned-By: /k.gpg\n\nTypes: deb\nURIs: http://mirror.example/debian-security\n\
                    Suites: bookworm-security\nComponents: main\n";
        let got = deb822(text, "sid").expect("there is one");
        assert_eq!(
            got,
            "Types: deb\n# a remark\nURIs: http://mirror.example/debian\nSuites: sid\nComponents: main\nSigned-By: /k.gpg\n"
        );
        assert!(
            deb822(
                "Types: deb\nURIs: https://other.example/node\nSuites: x\n",
                "sid"
            )
            .is_none()
        );
        let line = "deb [arch=amd64 signed-by=/k.gpg] http://mirror.example/debian bookworm main\n";
        let got = one_line(line, "sid").expect("there is one");
        assert_eq!(
            got,
            "Types: deb\nURIs: http://mirror.example/debian\nSuites: sid\nComponents: main\nSigned-By: /k.gpg\n"
        );
    }
}
