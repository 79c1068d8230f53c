use super::*;
use crate::testing::Fake;

fn digest(number: u8) -> Digest {
    Digest::sha256(&[number])
}

fn said(
    reference: &str,
    repository: &str,
    tag: Option<&str>,
    subject: Option<&Digest>,
) -> Option<Message> {
    message(
        &reference.parse().unwrap(),
        &repository.parse().unwrap(),
        tag.map(|tag| tag.parse().unwrap()).as_ref(),
        &digest(1),
        subject,
    )
}

#[test]
fn an_event_says_nothing_to_a_target_that_does_not_name_its_repository_and_tag() {
    let reference = "registry.example/shop/web:production";
    assert!(matches!(
        said(reference, "shop/web", Some("production"), None),
        Some(Message::Hint(Trigger::Event))
    ));
    assert!(said(reference, "shop/web", Some("staging"), None).is_none());
    assert!(said(reference, "shop/other", Some("production"), None).is_none());
    assert!(said(reference, "shop/web", None, None).is_none());
}

#[test]
fn evidence_is_heard_as_a_referrer_and_as_a_tag() {
    let reference = "registry.example/shop/web:production";
    let subject = digest(7);
    let heard = |message: Option<Message>| matches!(message, Some(Message::Evidence(digest)) if digest == subject);
    assert!(heard(said(reference, "shop/web", None, Some(&subject))));
    let tag = format!("sha256-{}.sig", subject.hex());
    assert!(heard(said(reference, "shop/web", Some(&tag), None)));
    assert!(!heard(said(reference, "shop/other", Some(&tag), None)));
}

#[tokio::test(start_paused = true)]
async fn a_stream_wakes_its_targets_and_says_when_it_is_down() {
    let fake = Fake::default();
    let events = fake.stream();
    let (mailbox, mut heard) = mpsc::channel(8);
    let (up, mut is_up) = watch::channel(false);
    let follower = Follower {
        sources: Arc::new(fake.clone()),
        config: client::Config::default(),
        host: "registry.example".to_owned(),
        subscribers: vec![Subscriber {
            reference: "registry.example/shop/web:production".parse().unwrap(),
            mailbox,
        }],
        up,
        clock: Arc::new(fake.clone()),
    };
    let changed = |number: u8, tag: &str| StreamEvent::Changed {
        id: format!("e.{number}"),
        kind: "dev.longshore.tag.updated".to_owned(),
        repository: "shop/web".parse().unwrap(),
        tag: Some(tag.parse().unwrap()),
        digest: digest(number),
        subject: None,
    };
    let test = async {
        is_up.wait_for(|up| *up).await.unwrap();
        assert!(
            matches!(heard.recv().await, Some(Message::Hint(_))),
            "whatever happened before"
        );
        events.send(changed(1, "staging")).unwrap();
        events.send(changed(2, "production")).unwrap();
        assert!(matches!(
            heard.recv().await,
            Some(Message::Hint(Trigger::Event))
        ));
        events.send(StreamEvent::Reset("f.0".to_owned())).unwrap();
        assert!(matches!(
            heard.recv().await,
            Some(Message::Hint(Trigger::Event))
        ));
        assert!(
            heard.try_recv().is_err(),
            "the tag that nobody follows wakes nobody"
        );
        // The server is gone; a while later it is back.
        let _again = fake.stream();
        drop(events);
        is_up.wait_for(|up| !*up).await.unwrap();
        is_up.wait_for(|up| *up).await.unwrap();
        assert!(matches!(heard.recv().await, Some(Message::Hint(_))));
    };
    tokio::select! {
        () = follower.run(CancellationToken::new()) => unreachable!(),
        () = test => {}
    }
}
