//! Whether answers in LaTeX are the same but for how they are written: JSON lines in, a line each out.
//!
//! ```sh
//! echo '{"answer": "0.5", "target": "\\frac12"}' |
//!     cargo run --release -p trine-eval --example equivalent
//! ```
//!
//! `scripts/interop/math_agreement.py` compares them with what lm-evaluation-harness says.

use std::error::Error;
use std::io::{BufRead, Write, stdin, stdout};

use trine_eval::{Doc, equivalent};

fn main() -> Result<(), Box<dyn Error>> {
    let mut out = stdout().lock();
    for line in stdin().lock().lines() {
        let asked: Doc = serde_json::from_str(&line?)?;
        let text = |name: &str| asked[name].as_str().unwrap_or_default();
        writeln!(out, "{}", equivalent(text("answer"), text("target")))?;
    }
    Ok(())
}
