//! What a process has used, from `/proc`.

use std::time::Duration;

use anyhow::Context as _;

/// Ticks per second as `/proc` shows them. The kernel keeps this number for programs, whatever its own clock.
const TICKS: u32 = 100;

/// User and system time of all threads of a process, those that ended too.
pub(crate) fn cpu(pid: u32) -> anyhow::Result<Duration> {
    let path = format!("/proc/{pid}/stat");
    let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    let ticks = ticks(&text).with_context(|| format!("{path} is not understood"))?;
    Ok(Duration::from_secs(ticks) / TICKS)
}

/// Forgets the peak of a process's memory, so that the next [`peak`] is of what follows. `false`
/// when this is not permitted.
pub(crate) fn forget_peak(pid: u32) -> bool {
    std::fs::write(format!("/proc/{pid}/clear_refs"), "5").is_ok()
}

/// The highest resident memory of a process, in bytes.
pub(crate) fn peak(pid: u32) -> anyhow::Result<u64> {
    let path = format!("/proc/{pid}/status");
    let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    high_water(&text).with_context(|| format!("{path} is not understood"))
}

/// Fields 14 and 15. The second field is a name in parentheses, in which anything may stand.
fn ticks(stat: &str) -> Option<u64> {
    let (_, fields) = stat.rsplit_once(')')?;
    let mut fields = fields.split_ascii_whitespace().skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    Some(user + system)
}

fn high_water(status: &str) -> Option<u64> {
    let value = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))?
        .trim()
        .strip_suffix(" kB")?;
    value.parse::<u64>().ok().map(|kib| kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found() {
        let stat = "42 (a) b) S 1 42 42 0 -1 4194560 1 2 3 4 120 34 5 6 20 0 9 0 1 2 3";
        assert_eq!(ticks(stat), Some(154));
        assert_eq!(ticks("42 (a"), None);
        let status = "Name:\tx\nVmPeak:\t  99 kB\nVmHWM:\t    2048 kB\nVmRSS:\t 1 kB\n";
        assert_eq!(high_water(status), Some(2048 * 1024));
        assert_eq!(high_water("Name:\tx\n"), None);
    }

    #[test]
    fn this_process_uses_memory() {
        assert!(peak(std::process::id()).unwrap() > 1024 * 1024);
        cpu(std::process::id()).unwrap();
    }
}
