//! Which pulls are sent to the object store: by the network that the client is in, never by what it says.
//!
//! The client follows a URL that anybody could follow until it ends, so only networks from which the object store can
//! be reached are named, and repositories whose every pull must be on record are left out.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;
use std::time::Duration;

use oci::RepositoryName;
use serde::{Deserialize, Serialize};

use oci::Glob;

/// Sends pulls of blobs to the object store (307).
#[derive(Clone, Debug)]
pub struct Redirect {
    /// The clients that are sent there.
    pub networks: Vec<Network>,
    /// How long the URL can be used.
    pub ttl: Duration,
    /// Repositories whose blobs are always sent by this server.
    pub except: Vec<Glob>,
}

impl Redirect {
    /// Whether a client at this address is sent to the object store for a blob of this repository.
    pub(crate) fn applies(&self, client: IpAddr, repository: &RepositoryName) -> bool {
        self.networks.iter().any(|network| network.contains(client))
            && !self
                .except
                .iter()
                .any(|glob| glob.matches(repository.as_str()))
    }
}

/// A network in CIDR form: `10.0.0.0/8`, `2001:db8::/32`, or one address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Network {
    address: u128,
    bits: u8,
    four: bool,
}

impl Network {
    /// Whether an address is in the network. An IPv4 address that came over IPv6 is the IPv4 address.
    pub fn contains(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        address.is_ipv4() == self.four
            && mask(number(address), self.bits, self.four) == self.address
    }
}

impl FromStr for Network {
    type Err = NetworkError;

    fn from_str(text: &str) -> Result<Self, NetworkError> {
        let refused = || NetworkError(text.chars().take(80).collect());
        let (address, bits) = match text.split_once('/') {
            Some((address, bits)) => (address, Some(bits)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().map_err(|_| refused())?;
        let four = address.is_ipv4();
        let most = if four { 32 } else { 128 };
        let bits = bits.map_or(Ok(most), str::parse).map_err(|_| refused())?;
        let address = number(address);
        // Bits behind the mask are a slip: another network was meant.
        if bits > most || mask(address, bits, four) != address {
            return Err(refused());
        }
        Ok(Self {
            address,
            bits,
            four,
        })
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.four {
            let address = u32::try_from(self.address).unwrap_or_default();
            write!(f, "{}/{}", std::net::Ipv4Addr::from(address), self.bits)
        } else {
            write!(
                f,
                "{}/{}",
                std::net::Ipv6Addr::from(self.address),
                self.bits
            )
        }
    }
}

impl<'de> Deserialize<'de> for Network {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

impl Serialize for Network {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// A text that names no network.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is no network, write for example `10.0.0.0/8` (without bits after the mask) or `2001:db8::/32`"
)]
pub struct NetworkError(String);

fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(four) => u128::from(u32::from(four)),
        IpAddr::V6(six) => u128::from(six),
    }
}

fn mask(address: u128, bits: u8, four: bool) -> u128 {
    let width = if four { 32 } else { 128 };
    let host = u32::from(width - bits);
    address
        .checked_shr(host)
        .unwrap_or(0)
        .checked_shl(host)
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_contain_what_they_say() {
        for (network, inside, outside) in [
            ("10.0.0.0/8", "10.255.0.1", "11.0.0.0"),
            ("0.0.0.0/0", "255.255.255.255", "::1"),
            ("192.0.2.7", "192.0.2.7", "192.0.2.8"),
            ("192.0.2.0/31", "192.0.2.1", "192.0.2.2"),
            ("2001:db8::/32", "2001:db8:ffff::1", "2001:db9::"),
            ("::/0", "::1", "127.0.0.1"),
            ("127.0.0.0/8", "::ffff:127.0.0.1", "::1"),
        ] {
            let parsed: Network = network.parse().unwrap();
            assert!(
                parsed.contains(inside.parse().unwrap()),
                "{network} {inside}"
            );
            assert!(
                !parsed.contains(outside.parse().unwrap()),
                "{network} {outside}"
            );
            assert_eq!(parsed.to_string().parse::<Network>().unwrap(), parsed);
        }
        for bad in [
            "",
            "10.0.0.0/33",
            "10.0.0.1/8",
            "10.0.0/8",
            "::/129",
            "localhost",
            "1.2.3.4/x",
        ] {
            assert!(bad.parse::<Network>().is_err(), "{bad}");
        }
    }

    #[test]
    fn exceptions_are_never_sent_away() {
        let redirect = Redirect {
            networks: vec!["10.0.0.0/8".parse().unwrap()],
            ttl: Duration::from_mins(10),
            except: vec!["secret/**".parse().unwrap()],
        };
        let (near, far) = ("10.1.1.1".parse().unwrap(), "192.0.2.1".parse().unwrap());
        assert!(redirect.applies(near, &"team/app".parse().unwrap()));
        assert!(!redirect.applies(far, &"team/app".parse().unwrap()));
        assert!(!redirect.applies(near, &"secret/app".parse().unwrap()));
    }
}
