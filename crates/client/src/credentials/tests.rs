use super::*;

fn with_file(text: &str) -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("config.json");
    fs::write(&file, text).unwrap();
    (directory, file)
}

fn password(username: &str, password: &str) -> Credential {
    Credential::Password {
        username: username.to_owned(),
        password: password.to_owned(),
    }
}

#[test]
fn finds_by_each_form_of_the_name() {
    let (_directory, file) = with_file(
        r#"{"auths":{
            "https://index.docker.io/v1/":{"auth":"YTpi"},
            "https://reg.example.com/v2/":{"auth":"YTpiOmM="},
            "127.0.0.1:5050":{"username":"u","password":"p"},
            "id.example.com":{"auth":"YTpi","identitytoken":"refresh"},
            "reg.example.com:5000/team":{"auth":"eDp5"},
            "empty.example.com":{}
        }}"#,
    );
    let find = |host: &str| find(&Source::File(file.clone()), host).unwrap();
    assert_eq!(find("docker.io"), password("a", "b"));
    assert_eq!(find("registry-1.docker.io"), password("a", "b"));
    assert_eq!(find("reg.example.com"), password("a", "b:c"));
    assert_eq!(find("127.0.0.1:5050"), password("u", "p"));
    assert_eq!(
        find("id.example.com"),
        Credential::Identity("refresh".to_owned())
    );
    assert_eq!(find("reg.example.com:5000"), Credential::None);
    assert_eq!(find("empty.example.com"), Credential::None);
    assert_eq!(find("other.example.com"), Credential::None);
}

#[test]
fn stores_keeps_the_rest_and_erases() {
    let (_directory, file) = with_file(
        r#"{"HttpHeaders":{"X":"y"},"auths":{"other":{"auth":"YTpi"},"https://h:1/v2/":{"auth":"YTpi"}},"z":[1]}"#,
    );
    fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
    store_in(&file, "h:1", "user", "pa:ss").unwrap();
    assert_eq!(
        fs::metadata(&file).unwrap().permissions().mode() & 0o777,
        0o600
    );
    assert_eq!(
        find(&Source::File(file.clone()), "h:1").unwrap(),
        password("user", "pa:ss")
    );
    let text: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    assert_eq!(text["HttpHeaders"]["X"], "y");
    assert_eq!(text["z"], json!([1]));
    assert_eq!(text["auths"].as_object().unwrap().len(), 2);
    assert!(erase_in(&file, "h:1").unwrap());
    assert!(!erase_in(&file, "h:1").unwrap());
    assert_eq!(
        find(&Source::File(file.clone()), "other").unwrap(),
        password("a", "b")
    );
    assert_eq!(fs::read_dir(file.parent().unwrap()).unwrap().count(), 1);
}

#[test]
fn a_new_file_and_a_linked_file() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("new/config.json");
    store_in(&file, "h", "u", "p").unwrap();
    assert_eq!(
        find(&Source::File(file.clone()), "h").unwrap(),
        password("u", "p")
    );
    let link = directory.path().join("link.json");
    std::os::unix::fs::symlink(&file, &link).unwrap();
    store_in(&link, "h2", "u", "p").unwrap();
    assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
    assert_eq!(find(&Source::File(file), "h2").unwrap(), password("u", "p"));
}

#[test]
fn broken_files_are_told_without_their_content() {
    let (_directory, file) = with_file("{\"auths\":\n{\"h\":{\"auth\":\"c2VjcmV0\"");
    let error = find(&Source::File(file.clone()), "h")
        .unwrap_err()
        .to_string();
    assert!(error.contains("not valid JSON"), "{error}");
    assert!(!error.contains("c2VjcmV0"), "{error}");
    let (_directory, file) = with_file(r#"{"auths":{"h":{"auth":"!!"}}}"#);
    assert!(
        find(&Source::File(file), "h")
            .unwrap_err()
            .to_string()
            .contains("log in again")
    );
}

#[test]
fn a_helper_that_is_no_program_name_is_never_started() {
    let (_directory, file) = with_file(r#"{"credsStore":"../../bin/sh"}"#);
    let error = find(&Source::File(file), "h").unwrap_err().to_string();
    assert!(
        error.contains("not the name of a credential helper"),
        "{error}"
    );
}

#[test]
fn a_login_is_for_its_host_alone() {
    let source = Source::Basic {
        host: "h:1".to_owned(),
        username: "u".to_owned(),
        password: "p".to_owned(),
    };
    assert_eq!(find(&source, "h:1").unwrap(), password("u", "p"));
    assert_eq!(find(&source, "h:2").unwrap(), Credential::None);
    assert_eq!(find(&Source::Anonymous, "h:1").unwrap(), Credential::None);
}
