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

/// User and system time of a process, of its children that run, and of all that have ended.
pub(crate) fn family_cpu(pid: u32) -> anyhow::Result<Duration> {
    let read = |pid: u32| std::fs::read_to_string(format!("/proc/{pid}/stat")).ok();
    let own = read(pid).with_context(|| format!("process {pid} is gone"))?;
    let mut sum = ticks_from(&own, 4).context("its state is not understood")?;
    for entry in std::fs::read_dir("/proc")? {
        let name = entry?.file_name();
        // One that ends meanwhile is counted with the ended ones next time.
        let stat = name.to_str().and_then(|name| read(name.parse().ok()?));
        if let Some(stat) = stat
            && parent(&stat) == Some(pid)
        {
            sum += ticks_from(&stat, 4).unwrap_or(0);
        }
    }
    Ok(Duration::from_secs(sum) / TICKS)
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

/// Fields 14 and 15.
fn ticks(stat: &str) -> Option<u64> {
    ticks_from(stat, 2)
}

/// The sum of so many fields from the 14th on; 16 and 17 are those of children that have ended.
fn ticks_from(stat: &str, count: usize) -> Option<u64> {
    let fields = fields(stat)?.skip(11).take(count);
    fields.map(|field| field.parse::<u64>().ok()).sum()
}

fn parent(stat: &str) -> Option<u32> {
    fields(stat)?.nth(1)?.parse().ok()
}

/// From the third field on. The second is a name in parentheses, in which anything may stand.
fn fields(stat: &str) -> Option<std::str::SplitAsciiWhitespace<'_>> {
    let (_, fields) = stat.rsplit_once(')')?;
    Some(fields.split_ascii_whitespace())
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
        assert_eq!((ticks_from(stat, 4), parent(stat)), (Some(165), Some(1)));
        let status = "Name:\tx\nVmPeak:\t  99 kB\nVmHWM:\t    2048 kB\nVmRSS:\t 1 kB\n";
        assert_eq!(high_water(status), Some(2048 * 1024));
        assert_eq!(high_water("Name:\tx\n"), None);
    }

    #[test]
    fn this_process_uses_memory() {
        assert!(peak(std::process::id()).unwrap() > 1024 * 1024);
        let own = cpu(std::process::id()).unwrap();
        assert!(family_cpu(std::process::id()).unwrap() >= own);
    }
}
