//! Whether texts follow instructions: JSON lines in, JSON lines out.
//!
//! ```sh
//! echo '{"instruction": "punctuation:no_comma", "arguments": {}, "text": "So, no."}' |
//!     cargo run --release -p trine-eval --example follow
//! ```
//!
//! Every line of the output is a pair: strictly, loosely. `scripts/interop/ifeval_agreement.py`
//! compares them with those of lm-evaluation-harness.

use std::error::Error;
use std::io::{BufRead, Write, stdin, stdout};

use trine_eval::{Doc, Instruction};

fn main() -> Result<(), Box<dyn Error>> {
    let mut out = stdout().lock();
    for line in stdin().lock().lines() {
        let asked: Doc = serde_json::from_str(&line?)?;
        let text = |name: &str| asked[name].as_str().unwrap_or_default();
        let arguments = asked["arguments"].as_object().cloned().unwrap_or_default();
        let instruction = Instruction::new(text("instruction"), &arguments)?;
        let answer = text("text");
        let pair = [instruction.followed(answer), instruction.followed_loosely(answer)];
        writeln!(out, "{pair:?}")?;
    }
    Ok(())
}
