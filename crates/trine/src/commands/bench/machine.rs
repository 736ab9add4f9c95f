//! What the operating system knows: memory of this process, the processor, energy.
//!
//! All of it comes from files of Linux; elsewhere, and where a file cannot be read, it is not
//! available, and said to be so.

use std::fs;
use std::path::{Path, PathBuf};

pub(crate) use trine_train::machine::processor;

/// Memory of this process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Memory {
    /// Resident now, in bytes.
    pub(crate) now: u64,
    /// Most that was resident since [`forget_peak`], or since the start.
    pub(crate) peak: u64,
}

/// Memory of this process, where the system says.
pub(crate) fn memory() -> Option<Memory> {
    memory_in(&fs::read_to_string("/proc/self/status").ok()?)
}

fn memory_in(status: &str) -> Option<Memory> {
    let bytes = |key| {
        let line = status.lines().find_map(|line| line.strip_prefix(key))?;
        Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
    };
    Some(Memory { now: bytes("VmRSS:")?, peak: bytes("VmHWM:")? })
}

/// Lets the peak begin anew; whether the system does so.
pub(crate) fn forget_peak() -> bool {
    fs::write("/proc/self/clear_refs", "5").is_ok()
}

/// Bytes that could be allocated without another process noticing, where the system says.
pub(crate) fn available_memory() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

/// Time that the processors spent, all together, in ticks of a hundredth of a second.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Busy {
    /// Running anything, or held by the host of a virtual machine.
    all: u64,
    /// Running this process.
    own: u64,
    /// Passed, on each of them.
    total: u64,
}

impl Busy {
    /// The time so far, where the system says.
    pub(crate) fn now() -> Option<Self> {
        let (all, own) = ("/proc/stat", "/proc/self/stat");
        Self::parse(&fs::read_to_string(all).ok()?, &fs::read_to_string(own).ok()?)
    }

    fn parse(stat: &str, own: &str) -> Option<Self> {
        // user, nice, system, idle, iowait, irq, softirq, steal; the first two hold the guests.
        let line = stat.lines().next()?.strip_prefix("cpu ")?;
        let ticks: Vec<u64> = line.split_whitespace().take(8).flat_map(str::parse).collect();
        let total = ticks.iter().sum::<u64>();
        let idle = ticks.get(3)? + ticks.get(4)?;
        // After the name, which may hold spaces, the eleventh is user, the next system.
        let own = own.rsplit_once(')')?.1.split_whitespace().skip(11).take(2);
        Some(Self { all: total - idle, own: own.flat_map(str::parse::<u64>).sum(), total })
    }

    /// The share of all processors' time since `begin` that went to others than this process.
    pub(crate) fn others_since(self, begin: Self) -> Option<f64> {
        let since = |now: u64, begin: u64| now.checked_sub(begin);
        let (all, own) = (since(self.all, begin.all)?, since(self.own, begin.own)?);
        let total = since(self.total, begin.total).filter(|total| *total > 0)?;
        Some(all.saturating_sub(own) as f64 / total as f64)
    }
}

/// Counters of the energy that the processor's packages use (RAPL, of Intel and AMD).
#[derive(Debug)]
pub(crate) struct Energy {
    packages: Vec<Package>,
}

#[derive(Debug)]
struct Package {
    /// Holds microjoules, modulo `range`.
    counter: PathBuf,
    range: u64,
}

/// What the counters said at some moment, in microjoules.
#[derive(Clone, Debug)]
pub(crate) struct Reading(Vec<u64>);

impl Energy {
    /// The counters of this machine, or why there are none.
    pub(crate) fn open() -> Result<Self, String> {
        Self::open_in(Path::new("/sys/class/powercap"))
    }

    fn open_in(dir: &Path) -> Result<Self, String> {
        let entries = fs::read_dir(dir)
            .map_err(|_| format!("this machine shows no energy counters ({})", dir.display()))?;
        let mut packages = Vec::new();
        for entry in entries.flatten() {
            let path = entry.path();
            let text = |name| fs::read_to_string(path.join(name)).unwrap_or_default();
            // The domains inside a package, such as its cores, are counted in it.
            if !text("name").starts_with("package") {
                continue;
            }
            let counter = path.join("energy_uj");
            let range = text("max_energy_range_uj").trim().parse().unwrap_or(u64::MAX);
            read(&counter)?;
            packages.push(Package { counter, range });
        }
        if packages.is_empty() {
            return Err(format!("{} has no counter of a processor", dir.display()));
        }
        Ok(Self { packages })
    }

    /// The counters now.
    pub(crate) fn read(&self) -> Result<Reading, String> {
        self.packages.iter().map(|p| read(&p.counter)).collect::<Result<_, _>>().map(Reading)
    }

    /// Joules used since `begin`.
    pub(crate) fn joules_since(&self, begin: &Reading) -> Result<f64, String> {
        let now = self.read()?;
        let used = |((package, begin), now): ((&Package, &u64), &u64)| {
            now.checked_sub(*begin).unwrap_or_else(|| package.range.saturating_sub(*begin) + now)
        };
        let all = self.packages.iter().zip(&begin.0).zip(&now.0);
        Ok(all.map(used).sum::<u64>() as f64 / 1e6)
    }
}

fn read(counter: &Path) -> Result<u64, String> {
    let text = fs::read_to_string(counter).map_err(|e| format!("{}: {e}", counter.display()))?;
    let number = text.trim().parse();
    number.map_err(|_| format!("{}: expected a number, found {text:?}", counter.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_read_in_kibibytes() {
        let status = "Name:\ttrine\nVmHWM:\t    2048 kB\nVmRSS:\t     100 kB\nThreads:\t1\n";
        assert_eq!(memory_in(status), Some(Memory { now: 102_400, peak: 2_097_152 }));
        assert_eq!(memory_in("Name:\ttrine\n"), None);
    }

    #[test]
    fn others_are_what_the_processors_did_besides() {
        let stat = |user, idle| format!("cpu  {user} 0 100 {idle} 50 0 0 50 0 0\ncpu0 1 1 1 1\n");
        let own = |user| format!("7 (a) b) R 1 1 1 0 -1 4 1 1 1 1 {user} 20 0 0 20 0 9 0 1 1\n");
        let begin = Busy::parse(&stat(1000, 700), &own(200)).unwrap();
        assert_eq!(begin, Busy { all: 1150, own: 220, total: 1900 });
        let end = Busy::parse(&stat(1100, 800), &own(250)).unwrap();
        // 200 ticks passed, 100 of them idle; 50 were this process.
        assert_eq!(end.others_since(begin), Some(0.25));
        assert_eq!(begin.others_since(begin), None);
        assert_eq!(Busy::parse("cpu0 1 1 1 1\n", &own(1)), None);
    }

    #[test]
    fn energy_is_that_of_the_packages_and_survives_the_end_of_a_counter() {
        let dir = tempfile::tempdir().unwrap();
        let domain = |name: &str, label: &str, uj: u64| {
            let path = dir.path().join(name);
            fs::create_dir_all(&path).unwrap();
            fs::write(path.join("name"), format!("{label}\n")).unwrap();
            fs::write(path.join("energy_uj"), format!("{uj}\n")).unwrap();
            fs::write(path.join("max_energy_range_uj"), "10000000\n").unwrap();
        };
        domain("intel-rapl:0", "package-0", 1_000_000);
        domain("intel-rapl:1", "package-1", 9_000_000);
        domain("intel-rapl:0:0", "core", 5);
        let energy = Energy::open_in(dir.path()).unwrap();
        let begin = energy.read().unwrap();
        domain("intel-rapl:0", "package-0", 1_500_000);
        domain("intel-rapl:1", "package-1", 2_000_000);
        domain("intel-rapl:0:0", "core", 9_000_000);
        assert_eq!(energy.joules_since(&begin), Ok(0.5 + 3.0));
    }

    #[test]
    fn no_counters_are_a_reason() {
        let dir = tempfile::tempdir().unwrap();
        assert!(Energy::open_in(dir.path()).unwrap_err().contains("no counter"));
        let missing = Energy::open_in(&dir.path().join("none")).unwrap_err();
        assert!(missing.contains("no energy counters"), "{missing}");
    }
}
