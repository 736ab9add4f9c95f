//! `trine finetune`: a run that begins with a trained model.

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::bail;
use serde_json::json;
use trine_hub::SCHEME;
use trine_kernels::limits::Limits;
use trine_train::config::{DeviceConfig, FinetuneConfig, Method};
use trine_train::parallel::Group;
use trine_train::plan::Plan;
use trine_train::{Base, RunConfig, Trainer};

use super::bench::machine::available_memory;
use super::bench::measure_limits;
use super::train::{self, Run};
use crate::output::{self, note};
use crate::{data, launch, model};

/// Options of `trine finetune`.
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    run: train::Args,
    /// The model to begin with; overrides finetune.base
    #[arg(long, value_name = "MODEL", conflicts_with = "resume")]
    base: Option<String>,
    /// Print what the run will need (parameters, memory, time of a step) and stop
    #[arg(long)]
    dry_run: bool,
    /// Print the plan as JSON
    #[arg(long, requires = "dry_run")]
    json: bool,
    /// Begin even where memory seems too small
    #[arg(long)]
    force: bool,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    launch::together(|group| run_in(args, group))
}

fn run_in(args: &Args, group: &Arc<dyn Group>) -> anyhow::Result<ExitCode> {
    let run = match &args.base {
        None => args.run.clone(),
        Some(base) => args.run.with(&format!("finetune.base={base:?}")),
    };
    let Run { mut config, dir } = Run::new(&run, "finetune")?;
    let Some(finetune) = &mut config.finetune else {
        bail!("the configuration has no section [finetune]: use `trine train`");
    };
    // A run, and its adapters, are found from wherever they are used.
    let FinetuneConfig { base, adapter, chat_template, distill, .. } = finetune;
    let others = distill.iter_mut().flat_map(|d| [&mut d.teacher, &mut d.cache]);
    for path in [base, adapter, chat_template].into_iter().chain(others) {
        if !path.is_empty() && !path.starts_with(SCHEME) {
            *path = std::path::absolute(&path)?.to_string_lossy().into_owned();
        }
    }
    let finetune = finetune.clone();
    // What is downloaded is downloaded once; and nobody writes before all have seen that there is no run in
    // the way.
    group.barrier()?;
    let base = launch::in_turn(&**group, || {
        let mut base = Base::open(&model::resolve_model(Path::new(&finetune.base))?, &config)?;
        if let Some(distill) = finetune.distill.as_ref().filter(|d| !d.teacher.is_empty()) {
            base = base.with_teacher(&model::resolve_model(Path::new(&distill.teacher))?)?;
        }
        if !finetune.adapter.is_empty() {
            base = base.with_adapter(&model::resolve(Path::new(&finetune.adapter))?)?;
        }
        Ok(base)
    })?;
    let plan = Plan::new(&config, base.config(), base.beside()?.as_ref())?;
    if args.dry_run {
        if !group.leads() {
            return Ok(ExitCode::SUCCESS);
        }
        let limits = measure_limits(trine_kernels::threads());
        return print(&plan, &limits, config.train.device, args.json).map(|()| ExitCode::SUCCESS);
    }
    check_memory(&plan, &config, args.force)?;
    if group.leads() && finetune.method == Method::Full && !base.has_masters() {
        note!(
            "{} has trits without masters: those that are made of them begin far from where trits flip. \
             A checkpoint with masters learns sooner",
            finetune.base
        );
    }
    let trainer = Trainer::builder().group(group.clone());
    let mut trainer = if run.resume {
        let data = data::of_run(&config, &dir)?;
        trainer.resume_finetune(config, data, base, &dir)?
    } else {
        let data = launch::in_turn(&**group, || match group.leads() {
            true => data::of_finetuning(&config, &base, &dir),
            false => data::of_run(&config, &dir),
        })?;
        trainer.finetune(config, data, base, &dir)?
    };
    train::describe(&trainer, &dir);
    let (code, checkpoint) = train::finish(&mut trainer, &dir, "finetune")?;
    if let Some(checkpoint) = checkpoint {
        next(&finetune.base, finetune.method, &checkpoint);
    }
    Ok(code)
}

/// Says what can be done with the result.
fn next(base: &str, method: Method, checkpoint: &Path) {
    let checkpoint = checkpoint.display();
    match method {
        Method::Lora => note!(
            "next: trine chat {base} --adapter {checkpoint}  or  trine serve {base} --adapter \
             NAME={checkpoint}"
        ),
        Method::Full => {
            note!("next: trine chat {checkpoint}  or  trine convert {checkpoint} model.gguf");
        }
    }
}

/// Refuses a run that memory has no room for, before anything is written.
fn check_memory(plan: &Plan, config: &RunConfig, force: bool) -> anyhow::Result<()> {
    let (needed, available) = (plan.memory.total(), available_memory());
    let Some(available) = available.filter(|available| needed > *available) else {
        return Ok(());
    };
    let (needed, available) = (output::bytes(needed), output::bytes(available));
    if force {
        note!("this run needs about {needed}, {available} are free");
        return Ok(());
    }
    let full = config.finetune.as_ref().is_some_and(|f| f.method == Method::Full);
    let mut advice = Vec::new();
    if !config.train.recompute_activations {
        advice.push("train.recompute_activations = true");
    }
    if full {
        advice.push("optimizer.moments = \"int8\"");
        advice.push("finetune.method = \"lora\"");
    }
    advice.push("a smaller data.seq_len or more of train.accumulate");
    bail!(
        "this run needs about {needed}, {available} are free: see `--dry-run`; what makes it smaller: \
         {}; --force begins all the same",
        advice.join(", ")
    )
}

/// Prints a plan.
fn print(plan: &Plan, limits: &Limits, device: DeviceConfig, as_json: bool) -> anyhow::Result<()> {
    let (seconds, available) = (plan.seconds(limits), available_memory());
    if as_json {
        let mut all = json!(plan);
        all["memory"]["total"] = plan.memory.total().into();
        all["available_bytes"] = json!(available);
        all["seconds_at_the_limit"] = json!(seconds);
        return output::print_line(&all.to_string());
    }
    let (p, m) = (&plan.parameters, &plan.memory);
    let mut lines = vec![
        format!("trained        {} parameters", output::count(p.trained)),
        format!(
            "frozen         {} trits, {} other parameters",
            output::count(p.frozen_trits),
            output::count(p.frozen)
        ),
    ];
    for (name, bytes) in [
        ("parameters", m.parameters),
        ("gradients", m.gradients),
        ("moments", m.moments),
        ("activations", m.activations),
        ("buffers", m.buffers),
        ("other model", m.beside),
        ("memory", m.total()),
    ] {
        lines.push(format!("{name:<14} {}", output::bytes(bytes)));
    }
    if let Some(available) = available {
        lines.push(format!("free           {}", output::bytes(available)));
    }
    let tokens = output::count(plan.tokens as u64);
    lines.push(match plan.device_memory {
        None => format!(
            "step           {tokens} tokens, at least {seconds:.2} s at this machine's limits if all are \
             learned"
        ),
        Some(memory) => format!(
            "step           {tokens} tokens on {device}, of whose memory {} are needed, besides what CUDA \
             has there",
            output::bytes(memory)
        ),
    });
    output::print_line(&lines.join("\n"))
}
