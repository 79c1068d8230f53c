use super::*;

fn health() -> Health {
    Health {
        stability: Duration::from_secs(10),
        timeout: Duration::from_mins(1),
        interval: Duration::from_secs(1),
        http: Vec::new(),
        command: Vec::new(),
    }
}

fn sample(state: SampleState, fingerprint: &str) -> Sample {
    Sample {
        state,
        fingerprint: fingerprint.to_owned(),
        services: vec![ServiceSample {
            service: "web".to_owned(),
            state,
            detail: "exited with 1".to_owned(),
        }],
    }
}

/// One look a second; the first judgment that is not to wait, and when.
fn watch(look: impl Fn(u64) -> Result<Sample, EngineError>) -> (u64, Judgment) {
    let start = Instant::now();
    let mut watch = Watch::new(&health());
    for second in 0..1000 {
        let look = look(second);
        let judgment = watch.look(start + Duration::from_secs(second), look.as_ref());
        if judgment != Judgment::Waiting {
            return (second, judgment);
        }
    }
    (1000, Judgment::Waiting)
}

#[tokio::test]
async fn healthy_for_the_whole_window_is_healthy() {
    let (second, judgment) = watch(|second| {
        let state = if second < 5 {
            SampleState::Pending
        } else {
            SampleState::Healthy
        };
        Ok(sample(state, "a"))
    });
    assert_eq!((second, judgment), (15, Judgment::Healthy));
}

#[tokio::test]
async fn a_restart_starts_the_window_anew() {
    let (second, _) = watch(|second| {
        Ok(sample(
            SampleState::Healthy,
            if second < 4 { "a" } else { "b" },
        ))
    });
    assert_eq!(second, 14);
    let (second, judgment) =
        watch(|second| Ok(sample(SampleState::Healthy, &(second / 5).to_string())));
    assert_eq!(second, 60);
    assert!(matches!(judgment, Judgment::Unhealthy(reason) if reason.contains("restarted")));
}

#[tokio::test]
async fn a_failure_is_believed_the_second_time() {
    let (second, judgment) = watch(|second| {
        let state = if second == 3 || second > 5 {
            SampleState::Failed
        } else {
            SampleState::Healthy
        };
        Ok(sample(state, "a"))
    });
    assert_eq!(second, 7);
    assert_eq!(
        judgment,
        Judgment::Unhealthy("`web`: exited with 1".to_owned())
    );
}

#[tokio::test]
async fn an_engine_that_is_silent_neither_fails_nor_runs_the_clock() {
    let (second, judgment) = watch(|second| match second {
        5..200 => Err(EngineError::Unavailable("away".to_owned())),
        _ => Ok(sample(SampleState::Healthy, "a")),
    });
    assert_eq!((second, judgment), (210, Judgment::Healthy));
    let (second, judgment) = watch(|second| match second {
        5..200 => Err(EngineError::Unavailable("away".to_owned())),
        _ => Ok(sample(SampleState::Pending, "a")),
    });
    assert_eq!(second, 255);
    assert!(matches!(judgment, Judgment::Unhealthy(_)));
}

#[tokio::test]
async fn health_urls_are_asked() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let base = format!("http://{}", listener.local_addr().unwrap());
    let serving = async {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = vec![0; 1024];
            let length = stream.read(&mut request).await.unwrap();
            let ok = request[..length].starts_with(b"GET /good HTTP/1.1\r\n");
            let status = if ok {
                "204 No Content"
            } else {
                "503 Service Unavailable"
            };
            let answer = format!("HTTP/1.1 {status}\r\ncontent-length: 0\r\n\r\n");
            stream.write_all(answer.as_bytes()).await.unwrap();
        }
    };
    let closed = tokio::net::TcpListener::bind("127.0.0.1:0")
        .await
        .unwrap()
        .local_addr()
        .unwrap();
    let urls = [
        format!("{base}/good"),
        format!("{base}/bad"),
        format!("http://{closed}/"),
    ];
    let found = tokio::select! {
        () = serving => unreachable!(),
        found = http::check(&urls) => found,
    };
    assert_eq!(found[0].1, Ok(()));
    assert_eq!(
        found[1].1,
        Err("answers 503 Service Unavailable".to_owned())
    );
    assert!(
        found[2]
            .1
            .as_ref()
            .unwrap_err()
            .starts_with("cannot connect")
    );
    let joined = with_http(sample(SampleState::Healthy, "a"), &found);
    assert_eq!(
        joined.state,
        SampleState::Pending,
        "healthy only when all answer"
    );
}
