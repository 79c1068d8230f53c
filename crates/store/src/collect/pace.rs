//! The pace: small steps with rests between them, so that pulls and pushes hardly notice the collector.
//!
//! A step is short beside a pull, and the rest after it is a multiple of the time it took. So on a machine where everything
//! waits for a core the step takes longer and the rest does as well. How long a rest is depends on what else this process does:
//! the CPU time that passes in it during a rest is that of everybody but the collector. With nothing else to do the
//! collector rests as long as it works; with cores busy it has a twentieth of the machine.

use std::num::NonZero;
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};
use tokio::time::Instant;

/// How often and how long the collector rests.
#[derive(Debug)]
pub(super) struct Pace {
    /// Never, because somebody waits for the end.
    full: bool,
    /// Candidates in a second, at most.
    rate: f64,
    /// Rest for each second of work: with nothing else to do, and with the machine busy.
    rests: (f64, f64),
    cores: f64,
    /// How busy this process is without the collector: from 0 (idle) to 1.
    busy: f64,
    /// Rests since `busy` was last computed: CPU time of the process and real time.
    seen: (Duration, Duration),
}

impl Pace {
    /// Without rests.
    pub(super) fn full() -> Self {
        Self {
            full: true,
            ..Self::giving(1, true)
        }
    }

    /// Gives way. `one_writer`: each step holds up every push.
    pub(super) fn giving(rate: u32, one_writer: bool) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, NonZero::get) as f64;
        Self {
            full: false,
            rate: f64::from(rate.max(1)),
            rests: rests(cores, one_writer),
            cores,
            // Until it is known.
            busy: 1.0,
            seen: (Duration::ZERO, Duration::ZERO),
        }
    }

    /// Rests after a step that looked at so many candidates.
    pub(super) async fn after_step(&mut self, began: Instant, candidates: usize) {
        let (idle, busy) = self.rests;
        let worked = began.elapsed();
        let share = worked.mul_f64(idle + (busy - idle) * self.busy);
        let evenly = Duration::from_secs_f64(candidates as f64 / self.rate);
        self.rest(share.max(evenly.saturating_sub(worked))).await;
    }

    /// Rests after files were removed, which is waiting for the disk: for as long as that took.
    pub(super) async fn after_removal(&mut self, began: Instant) {
        self.rest(began.elapsed()).await;
    }

    async fn rest(&mut self, rest: Duration) {
        if self.full || rest.is_zero() {
            return;
        }
        let (cpu, start) = (cpu(), Instant::now());
        tokio::time::sleep(rest).await;
        self.saw(self::cpu().saturating_sub(cpu), start.elapsed());
    }

    /// Learns from a rest. One alone may be shorter than a request.
    fn saw(&mut self, cpu: Duration, time: Duration) {
        self.seen = (self.seen.0 + cpu, self.seen.1 + time);
        let (cpu, time) = self.seen;
        if time >= LOOK {
            let used = cpu.as_secs_f64() / time.as_secs_f64() / self.cores;
            self.busy = (used / BUSY).min(1.0);
            self.seen = (Duration::ZERO, Duration::ZERO);
        }
    }
}

/// Rest for each second of work, idle and busy.
fn rests(cores: f64, one_writer: bool) -> (f64, f64) {
    if !one_writer {
        // The work is done elsewhere, and other replicas push there.
        return (0.0, 1.0);
    }
    // A step keeps one core busy at most.
    let share = (SHARE * cores).min(0.5);
    (1.0, 1.0 / share - 1.0)
}

/// CPU time of this process.
fn cpu() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(
        u64::try_from(time.tv_sec).unwrap_or(0),
        u32::try_from(time.tv_nsec).unwrap_or(0),
    )
}

/// The part of the machine that the collector takes when all of it is wanted.
const SHARE: f64 = 0.05;
/// The part of the machine that this process uses when it counts as busy: whoever asks it may run here as well.
const BUSY: f64 = 0.25;
/// Rests that are looked at together.
const LOOK: Duration = Duration::from_millis(10);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_has_a_twentieth_of_a_busy_machine_and_half_of_an_idle_one() {
        let (idle, busy) = rests(2.0, true);
        assert!((idle - 1.0).abs() < 1e-9 && (busy - 9.0).abs() < 1e-9);
        let (idle, busy) = rests(64.0, true);
        assert!((idle - 1.0).abs() < 1e-9 && (busy - 1.0).abs() < 1e-9);
        assert!(rests(2.0, false).0.abs() < 1e-9);
    }

    #[test]
    fn it_learns_from_what_others_do() {
        let mut pace = Pace::giving(1000, true);
        pace.cores = 2.0;
        assert!((pace.busy - 1.0).abs() < 1e-9);
        pace.saw(Duration::ZERO, LOOK / 2);
        assert!((pace.busy - 1.0).abs() < 1e-9, "too short to tell");
        pace.saw(Duration::ZERO, LOOK / 2);
        assert!(pace.busy.abs() < 1e-9);
        // A quarter of a core out of two is half of what counts as busy.
        pace.saw(LOOK / 4, LOOK);
        assert!((pace.busy - 0.5).abs() < 1e-9);
        pace.saw(LOOK * 2, LOOK);
        assert!((pace.busy - 1.0).abs() < 1e-9);
    }

    #[tokio::test(start_paused = true)]
    async fn a_rest_is_as_long_as_the_rate_asks() {
        let mut pace = Pace::giving(100, true);
        let began = Instant::now();
        pace.after_step(began, 8).await;
        assert_eq!(began.elapsed().as_millis(), 80);
        let mut full = Pace::full();
        let began = Instant::now();
        full.after_step(began, 8).await;
        full.after_removal(began).await;
        assert_eq!(began.elapsed(), Duration::ZERO);
    }

    #[test]
    fn cpu_time_passes() {
        let before = cpu();
        let mut sum = 0_u64;
        while cpu() == before {
            sum = std::hint::black_box(sum.wrapping_add(1));
        }
        assert!(cpu() > before);
    }
}
