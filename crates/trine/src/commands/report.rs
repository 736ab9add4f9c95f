//! `trine report`: training runs as a page to look at.

use std::path::{Path, PathBuf};

use trine_format::AtomicFile;
use trine_report::{Run, page, summary};

use crate::output::{self, note};

/// Options of `trine report`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Run directories; several are compared
    #[arg(required = true, value_name = "RUN")]
    runs: Vec<PathBuf>,
    /// The page; report.html in the run's directory by default, or here for several runs
    #[arg(short, long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Print the summary as JSON instead of writing a page
    #[arg(long, conflicts_with = "out")]
    json: bool,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let runs = Run::read_all(&args.runs)?;
    if args.json {
        return output::print_line(&format!("{:#}", summary::to_json(&runs)));
    }
    let path = match (&args.out, args.runs.as_slice()) {
        (Some(path), _) => path.clone(),
        (None, [run]) => run.join("report.html"),
        (None, _) => Path::new("report.html").to_owned(),
    };
    let page = page(&runs);
    AtomicFile::replace(&path, page.as_bytes())?;
    note!("wrote {}, {}", path.display(), output::bytes(page.len() as u64));
    Ok(())
}
