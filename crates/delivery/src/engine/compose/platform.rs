//! Whether an image runs on a host.

use oci::Platform;

use super::rewrite::Wanted;

/// Why the image of a service does not run on `host`.
pub(super) fn platform_refusal(service: &str, wanted: &Wanted, host: &Platform) -> Option<String> {
    if wanted.platforms.is_empty() {
        return None;
    }
    let host = match &wanted.platform {
        Some(asked) => parse_platform(asked),
        None => host.clone(),
    };
    if wanted
        .platforms
        .iter()
        .any(|platform| runs_on(platform, &host))
    {
        return None;
    }
    let there: Vec<String> = wanted.platforms.iter().map(ToString::to_string).collect();
    let who = if wanted.platform.is_some() {
        "the service asks for"
    } else {
        "this host is"
    };
    Some(format!(
        "the image of service `{service}` does not exist for {host}, which {who}; it exists for {}",
        there.join(", ")
    ))
}

/// Whether an image for `image` runs on `host`. An older ARM variant runs on a later one.
pub(super) fn runs_on(image: &Platform, host: &Platform) -> bool {
    if image.os == host.os && image.architecture == "arm" && host.architecture == "arm" {
        let number = |platform: &Platform| {
            platform
                .variant
                .as_deref()
                .unwrap_or("v7")
                .trim_start_matches('v')
                .parse::<u32>()
                .unwrap_or(7)
        };
        return number(image) <= number(host);
    }
    image.runs_on(host)
}

pub(super) fn parse_platform(text: &str) -> Platform {
    let mut words = text.split('/').map(str::to_owned);
    let first = words.next().unwrap_or_default();
    match words.next() {
        Some(architecture) => Platform {
            os: first,
            architecture,
            variant: words.next(),
            os_version: None,
        },
        // Docker takes an architecture alone as well.
        None => Platform {
            os: "linux".to_owned(),
            architecture: first,
            variant: None,
            os_version: None,
        },
    }
}
