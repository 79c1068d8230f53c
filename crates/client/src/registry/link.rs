//! `Link` headers and the pages they lead through ([RFC 8288 § 3](https://www.rfc-editor.org/rfc/rfc8288#section-3)).

use http::header::LINK;
use reqwest::Url;

use crate::Error;
use crate::transport::{Answer, same_origin};

/// Where the next page is; `None` on the last.
///
/// # Errors
/// When it is not on the registry itself: the list would then be somebody else's.
pub(super) fn next_page(answer: &Answer) -> Result<Option<Url>, Error> {
    let target = answer
        .headers()
        .get_all(LINK)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .find_map(next);
    let Some(target) = target else {
        return Ok(None);
    };
    let mut url = answer.url().join(&target).map_err(|_| {
        Error::Other("the registry answered with a `Link` that is not a URL".to_owned())
    })?;
    // A registry behind a proxy that ends TLS may name itself by the scheme it sees.
    if answer.url().scheme() == "https"
        && url.scheme() == "http"
        && url.host_str() == answer.url().host_str()
    {
        let _ = url.set_scheme("https");
        let _ = url.set_port(answer.url().port());
    }
    if !same_origin(&url, answer.url()) {
        return Err(Error::Other(format!(
            "the registry answered with a `Link` to another host, `{}`",
            url.host_str().unwrap_or_default()
        )));
    }
    Ok((&url != answer.url()).then_some(url))
}

/// The target of the first link with `rel=next`.
pub(super) fn next(header: &str) -> Option<String> {
    let mut rest = header;
    while let Some(begin) = rest.find('<') {
        let (target, after) = rest[begin + 1..].split_once('>')?;
        let (parameters, left) = parameters(after);
        let is_next = parameters.iter().any(|(name, value)| {
            name.eq_ignore_ascii_case("rel")
                && value
                    .split_ascii_whitespace()
                    .any(|word| word.eq_ignore_ascii_case("next"))
        });
        if is_next {
            return Some(target.trim().to_owned());
        }
        rest = left;
    }
    None
}

/// `; name=value; name="quoted"` up to the comma before the next link.
fn parameters(text: &str) -> (Vec<(String, String)>, &str) {
    let mut found = Vec::new();
    let mut name = String::new();
    let mut value: Option<String> = None;
    let mut quoted = false;
    let mut chars = text.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => quoted = !quoted,
            '\\' if quoted => {
                if let (Some((_, escaped)), Some(value)) = (chars.next(), &mut value) {
                    value.push(escaped);
                }
            }
            ',' | ';' if !quoted => {
                if let Some(value) = value.take() {
                    found.push((name.trim().to_owned(), value.trim().to_owned()));
                }
                name.clear();
                if c == ',' {
                    return (found, &text[at + 1..]);
                }
            }
            '=' if !quoted && value.is_none() => value = Some(String::new()),
            other => match &mut value {
                Some(value) => value.push(other),
                None => name.push(other),
            },
        }
    }
    if let Some(value) = value {
        found.push((name.trim().to_owned(), value.trim().to_owned()));
    }
    (found, "")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn finds_next_among_others() {
        let check = |header: &str, expected: Option<&str>| {
            assert_eq!(next(header).as_deref(), expected, "{header}");
        };
        check(
            r#"</v2/a/tags/list?n=2&last=b>; rel="next""#,
            Some("/v2/a/tags/list?n=2&last=b"),
        );
        check("</a>; REL=Next", Some("/a"));
        check(r#"</a>; rel="prev", </b>; rel="next""#, Some("/b"));
        check(
            r#"</a>; title="x, <y>; rel=next"; rel=prev, </b>;rel="last next""#,
            Some("/b"),
        );
        check(r#"</a>; title="\"; rel=next""#, None);
        check("</a>", None);
        check("nothing", None);
        check("</open", None);
    }

    proptest! {
        #[test]
        fn never_panics(header in ".{0,200}") {
            next(&header);
        }

        #[test]
        fn finds_what_was_written(target in "[^<>\"]{0,40}", title in "[^\"\\\\]{0,20}") {
            let header = format!("<x>; rel=prev, <{target}>; title=\"{title}\"; rel=\"next\"");
            let found = next(&header);
            prop_assert_eq!(found.as_deref(), Some(target.trim()));
        }
    }
}
