//! Printing results, errors and numbers.

use std::io::{self, Write};

use anyhow::Context;

/// Prints a line for people to stderr. Unlike `eprintln!`, a stderr that went away or is full
/// (`trine train .. 2>&1 | head`) ends nothing: a run does not die because nobody watches it.
macro_rules! note {
    ($($arg:tt)*) => {{
        let _unwatched = std::io::Write::write_fmt(
            &mut std::io::stderr().lock(),
            format_args!("{}\n", format_args!($($arg)*)),
        );
    }};
}
pub(crate) use note;

/// Prints a result to stdout. Unlike `print!`, a closed pipe (`trine run .. | head`) is an error
/// that `main` recognizes and not a panic.
pub(crate) fn print(text: &str) -> anyhow::Result<()> {
    print_bytes(text.as_bytes())
}

/// As [`print()`], with a newline.
pub(crate) fn print_line(text: &str) -> anyhow::Result<()> {
    print_bytes(format!("{text}\n").as_bytes())
}

pub(crate) fn print_bytes(bytes: &[u8]) -> anyhow::Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(bytes).and_then(|()| stdout.flush()).context("cannot write to standard output")
}

/// Whether whoever read our output went away.
pub(crate) fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let kind = |e: &io::Error| e.kind() == io::ErrorKind::BrokenPipe;
    error.downcast_ref::<io::Error>().is_some_and(kind)
}

/// An error and its causes in one line. A cause that its parent already quotes is left out.
pub(crate) fn one_line(error: &anyhow::Error) -> String {
    let mut line = String::new();
    for cause in error.chain().map(|cause| cause.to_string()) {
        if line.contains(&cause) {
            continue;
        }
        if !line.is_empty() {
            line.push_str(": ");
        }
        line.push_str(&cause);
    }
    line.split('\n').map(str::trim).filter(|part| !part.is_empty()).collect::<Vec<_>>().join(" ")
}

/// A size for people, in the decimal units of disks.
pub(crate) fn bytes(n: u64) -> String {
    let (value, unit) = match n {
        0..1_000 => return format!("{n} B"),
        1_000..1_000_000 => (n as f64 / 1e3, "kB"),
        1_000_000..1_000_000_000 => (n as f64 / 1e6, "MB"),
        _ => (n as f64 / 1e9, "GB"),
    };
    format!("{value:.2} {unit}")
}

/// A count for people: 1,234,567.
pub(crate) fn count(n: u64) -> String {
    indicatif::HumanCount(n).to_string()
}

/// A text that cannot steer a terminal: control characters are left out.
pub(crate) fn printable(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_well() {
        assert_eq!(count(1_234_567), "1,234,567");
        assert_eq!(count(123), "123");
        assert_eq!(bytes(999), "999 B");
        assert_eq!(bytes(417_352), "417.35 kB");
    }

    #[test]
    fn texts_of_a_model_cannot_steer_a_terminal() {
        assert_eq!(printable("a\u{1b}[2Jb\u{9b}"), "a[2Jb");
    }

    #[test]
    fn errors_fit_one_line() {
        let error = anyhow::anyhow!("disk full\n  on /x").context("cannot save");
        assert_eq!(one_line(&error), "cannot save: disk full on /x");
    }
}
