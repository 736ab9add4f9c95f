//! Continues ids with a model: `generate MODEL ID,ID,.. [MAX_TOKENS]`.
//!
//! MODEL is a GGUF file or a Hugging Face directory. Prints the ids as they come, then what they took.

use std::error::Error;
use std::time::Instant;

use trine_format::ModelFile;
use trine_runtime::{GeneratorConfig, Model, Sampler, SamplerConfig, Session};

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let (Some(path), Some(ids)) = (args.next(), args.next()) else {
        return Err("usage: generate MODEL ID,ID,.. [MAX_TOKENS]".into());
    };
    let prompt = ids.split(',').map(str::parse).collect::<Result<Vec<u32>, _>>()?;
    let max_tokens = args.next().map_or(Ok(64), |count| count.parse())?;

    let model = Model::load(&ModelFile::open(path.as_ref())?)?;
    let config = GeneratorConfig {
        max_tokens,
        stop: model.config().eos_token_ids.clone(),
        ..Default::default()
    };
    let mut session = Session::new(&model);
    let mut sampler = Sampler::new(SamplerConfig::default())?;
    let mut ids = session.generate(&prompt, &mut sampler, config)?;
    let begin = Instant::now();
    for id in &mut ids {
        println!("{}", id?);
    }
    let (stats, seconds) = (ids.stats(), begin.elapsed().as_secs_f64());
    println!("{:?} after {stats:?} in {seconds:.3} s", ids.finish());
    Ok(())
}
