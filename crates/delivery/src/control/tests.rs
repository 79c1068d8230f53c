use super::*;

#[test]
fn requests_and_responses_survive_their_line() {
    let requests = [
        r#"{"request":"status","target":null}"#,
        r#"{"request":"history","target":"shop","limit":5}"#,
        r#"{"request":"deploy","target":"shop","reference":"v2","wait":true}"#,
        r#"{"request":"reload"}"#,
    ];
    for line in requests {
        let request: Request = serde_json::from_str(line).unwrap();
        assert_eq!(serde_json::to_string(&request).unwrap(), line);
    }
    assert!(serde_json::from_str::<Request>(r#"{"request":"status"}"#).is_ok());
    assert!(serde_json::from_str::<Request>(r#"{"request":"reboot"}"#).is_err());
    let refusal = Response::Error(Refusal {
        kind: RefusalKind::UnknownTarget,
        message: "there is none".to_owned(),
    });
    let line = serde_json::to_string(&refusal).unwrap();
    assert_eq!(
        line,
        r#"{"response":"error","value":{"kind":"unknown-target","message":"there is none"}}"#
    );
    assert_eq!(serde_json::from_str::<Response>(&line).unwrap(), refusal);
}

#[tokio::test]
async fn no_agent_is_said_so() {
    let directory = tempfile::tempdir().unwrap();
    let error = call(&directory.path().join("agent.sock"), &Request::Reload)
        .await
        .unwrap_err();
    assert!(error.to_string().contains("no agent answers"), "{error}");
}
