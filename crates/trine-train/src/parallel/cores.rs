//! Which cores a process may run on.

use std::fs;

/// The numbers of the cores that this process may run on, where the system says.
pub(super) fn allowed_cores() -> Option<Vec<usize>> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let list = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?;
    parse_cores(list.trim())
}

/// A list such as `0-3,8`.
fn parse_cores(list: &str) -> Option<Vec<usize>> {
    let mut cores = Vec::new();
    for part in list.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        cores.extend(first.parse().ok()?..=last.parse::<usize>().ok()?);
    }
    Some(cores)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_cores_are_read() {
        assert_eq!(parse_cores("0-2,5,7-8"), Some(vec![0, 1, 2, 5, 7, 8]));
        assert_eq!(parse_cores("3"), Some(vec![3]));
        assert_eq!(parse_cores("x"), None);
        // Where the system says, what it says is as much as the standard library finds, or more.
        if let Some(cores) = allowed_cores() {
            assert!(cores.len() >= std::thread::available_parallelism().unwrap().get());
        }
    }
}
