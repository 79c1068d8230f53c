//! Server-sent events out of pieces of bytes
//! ([HTML § 9.2.6](https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation)).

/// One event as it was written.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Event {
    /// `event:`, empty when there was none.
    pub(super) name: String,
    /// The last `id:` of the stream so far.
    pub(super) id: Option<String>,
    /// All `data:` lines, joined by newlines.
    pub(super) data: String,
}

/// Takes in pieces of any size and gives out events. Lines and events are bounded.
///
/// Unlike a browser it also gives out an event without data: a heartbeat may carry its id alone.
#[derive(Debug, Default)]
pub(super) struct Parser {
    line: Vec<u8>,
    /// The last byte was a carriage return, so a newline now ends no line of its own.
    after_return: bool,
    started: bool,
    event: Event,
    id: Option<String>,
    touched: bool,
}

impl Parser {
    /// Takes in a piece; complete events go to `out`.
    pub(super) fn feed(&mut self, piece: &[u8], out: &mut Vec<Event>) -> Result<(), TooLong> {
        for &byte in piece {
            match byte {
                b'\n' if self.after_return => self.after_return = false,
                b'\n' | b'\r' => {
                    self.after_return = byte == b'\r';
                    self.end_line(out)?;
                }
                _ => {
                    self.after_return = false;
                    if self.line.len() >= MAX_LINE {
                        return Err(TooLong);
                    }
                    self.line.push(byte);
                }
            }
        }
        Ok(())
    }

    fn end_line(&mut self, out: &mut Vec<Event>) -> Result<(), TooLong> {
        let line = std::mem::take(&mut self.line);
        let mut line = line.as_slice();
        if !self.started {
            self.started = true;
            line = line.strip_prefix("\u{feff}".as_bytes()).unwrap_or(line);
        }
        if line.is_empty() {
            if self.touched {
                let mut event = std::mem::take(&mut self.event);
                event.id.clone_from(&self.id);
                // The last newline ends the last line of data, it is not part of it.
                if event.data.ends_with('\n') {
                    event.data.pop();
                }
                out.push(event);
            }
            self.touched = false;
            return Ok(());
        }
        let text = String::from_utf8_lossy(line);
        let (field, value) = text.split_once(':').unwrap_or((&text, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match field {
            "event" => value.clone_into(&mut self.event.name),
            "data" => {
                if self.event.data.len() + value.len() >= MAX_EVENT {
                    return Err(TooLong);
                }
                self.event.data.push_str(value);
                self.event.data.push('\n');
            }
            "id" if !value.contains('\0') => {
                self.id = (!value.is_empty()).then(|| value.to_owned());
            }
            // A comment, `retry`, or a field of later days.
            _ => return Ok(()),
        }
        self.touched = true;
        Ok(())
    }
}

/// A line or an event without end.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("the event stream holds a line or an event that is too long")]
pub(super) struct TooLong;

/// The longest line, in bytes.
pub(super) const MAX_LINE: usize = 256 * 1024;
const MAX_EVENT: usize = 1024 * 1024;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(pieces: &[&[u8]]) -> Vec<Event> {
        let mut parser = Parser::default();
        let mut out = Vec::new();
        for piece in pieces {
            parser.feed(piece, &mut out).unwrap();
        }
        out
    }

    fn event(name: &str, id: Option<&str>, data: &str) -> Event {
        Event {
            name: name.to_owned(),
            id: id.map(str::to_owned),
            data: data.to_owned(),
        }
    }

    #[test]
    fn reads_the_forms_of_the_specification() {
        assert_eq!(
            parse(&[b"\xef\xbb\xbfdata: a\ndata:b\nid: e.1\n\n: comment\n\nevent: heartbeat\nid: e.2\n\nretry: 5\n\ndata\n\n"]),
            [
                event("", Some("e.1"), "a\nb"),
                event("heartbeat", Some("e.2"), ""),
                event("", Some("e.2"), ""),
            ]
        );
        assert_eq!(
            parse(&[b"data: x\r", b"\n\r", b"\n"]),
            [event("", None, "x")]
        );
        assert_eq!(parse(&[b"data: x\r\r"]), [event("", None, "x")]);
        assert_eq!(
            parse(&[b"id: a\0b\ndata:  two\n\n"]),
            [event("", None, " two")]
        );
        // What has not ended does not count.
        assert_eq!(parse(&[b"data: x\n"]), []);
    }

    #[test]
    fn a_line_without_end_is_refused() {
        let mut parser = Parser::default();
        let piece = vec![b'x'; MAX_LINE];
        let mut out = Vec::new();
        assert_eq!(parser.feed(&piece, &mut out), Ok(()));
        assert_eq!(parser.feed(b"x", &mut out), Err(TooLong));
        let mut parser = Parser::default();
        let line = [b"data:".as_slice(), &vec![b'x'; MAX_LINE - 5], b"\n"].concat();
        let refused = (0..100).any(|_| parser.feed(&line, &mut out).is_err());
        assert!(refused);
    }

    proptest! {
        #[test]
        fn pieces_do_not_matter(
            text in "(data|event|id|:|retry|x| |\r|\n|\r\n|\n\n|é){0,60}",
            cuts in proptest::collection::vec(0_usize..100, 0..10),
        ) {
            let bytes = text.as_bytes();
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(bytes.len())).collect();
            cuts.push(0);
            cuts.push(bytes.len());
            cuts.sort_unstable();
            let pieces: Vec<&[u8]> = cuts.windows(2).map(|pair| &bytes[pair[0]..pair[1]]).collect();
            prop_assert_eq!(parse(&pieces), parse(&[bytes]));
        }

        #[test]
        fn what_was_written_is_read(events in proptest::collection::vec(("[a-z]{0,8}", "[a-z0-9.]{1,8}", "[^\r\n]{0,20}(\n[^\r\n]{0,20}){0,2}"), 0..6)) {
            let mut text = String::new();
            for (name, id, data) in &events {
                text.extend(["event: ", name, "\nid: ", id, "\n"]);
                for line in data.split('\n') {
                    text.extend(["data: ", line, "\n"]);
                }
                text.push('\n');
            }
            let expected: Vec<Event> = events.iter().map(|(name, id, data)| event(name, Some(id), data)).collect();
            prop_assert_eq!(parse(&[text.as_bytes()]), expected);
        }

        #[test]
        fn never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            parse(&[&bytes]);
        }
    }
}
