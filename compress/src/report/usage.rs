//! What a stage cost: wall time, CPU time, peak memory.

use std::time::Instant;

use serde::{Deserialize, Serialize};

/// What something cost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cost {
    /// Seconds on the clock.
    pub wall_seconds: f64,
    /// Seconds of all cores; `None` where the system does not tell.
    pub cpu_seconds: Option<f64>,
    /// Largest resident memory of the process so far, in bytes, mapped files included; `None` where the system does not tell.
    pub peak_bytes: Option<u64>,
}

/// Measures from its creation on.
pub struct Meter {
    begun: Instant,
    cpu: Option<f64>,
}

impl Meter {
    /// Begins.
    pub fn start() -> Self {
        Self { begun: Instant::now(), cpu: cpu_seconds() }
    }

    /// The cost since the beginning.
    pub fn read(&self) -> Cost {
        Cost {
            wall_seconds: self.begun.elapsed().as_secs_f64(),
            cpu_seconds: cpu_seconds().zip(self.cpu).map(|(now, then)| now - then),
            peak_bytes: peak_bytes(),
        }
    }
}

/// User and system time of this process. Linux counts it there in hundredths of a second, whatever the kernel's own clock.
fn cpu_seconds() -> Option<f64> {
    let stat = fs_err::read_to_string("/proc/self/stat").ok()?;
    // The second field is the program's name in parentheses and may hold spaces; user and system time are fields 14 and 15.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let ticks: f64 = fields.get(11)?.parse::<f64>().ok()? + fields.get(12)?.parse::<f64>().ok()?;
    Some(ticks / 100.0)
}

fn peak_bytes() -> Option<u64> {
    let status = fs_err::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn work_takes_time_and_memory() {
        let meter = Meter::start();
        let mut x = 1.0_f64;
        while meter.read().cpu_seconds.unwrap() < 0.05 {
            x = std::hint::black_box(x.sqrt() + 1.0);
        }
        let cost = meter.read();
        assert!(cost.wall_seconds > 0.0, "{cost:?}");
        assert!(cost.peak_bytes.unwrap() > 1 << 20, "{cost:?}");
    }
}
