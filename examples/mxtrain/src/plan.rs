//! `mxtrain plan`: the memory of a training run, before anything is allocated.

use std::io;
use std::process::ExitCode;

use indicatif::HumanBytes;
use mxfp4train::{
    Collectives, Engine, Group, MemoryRoom, ModelConfig, Plan, TrainerOptions, Transport,
};
use serde::Serialize;

use crate::cli::{MachineArgs, PlanArgs};
use crate::console;
use crate::failure::Outcome;
use crate::fit::{Fit, Setting};
use crate::machine;
use crate::prepared::Meta;
use crate::train::{
    Weights, check_lora, model_config, trainer_options, vocabulary, vocabulary_of_shape,
};

/// Runs the command.
pub(crate) fn run(args: &PlanArgs) -> Outcome<ExitCode> {
    let of_data = args.data.as_deref().map(Meta::read).transpose()?.map(|meta| meta.vocab_size);
    let given = args.vocab_size.or(vocabulary_of_shape(&args.model)?);
    let given = given.or_else(|| of_data.is_none().then_some(256));
    let config = model_config(&args.model, &args.variant, vocabulary(given, of_data)?)?;
    check_lora(&args.lora)?;
    let config = ModelConfig { lora: args.lora.wanted(), ..config };
    config.validate()?;
    let ranks = args.ranks.unwrap_or(1);
    let mut options = trainer_options(&args.batch, &args.recipe.recipe, None, Weights::New, ranks)?;
    options.optimizer = args.optimizer;
    // Which steps are the last does not matter here, but that there are such.
    options.schedule.total_steps = 1;
    args.seed.say_if_drawn();
    let (engine, plan) = match ranks {
        1 => {
            let (engine, _) = machine::open(&args.machine, args.seed.number())?;
            let plan = mxfp4train::plan(&engine, &config, &options)?;
            (engine, plan)
        }
        _ => of_largest_rank(args, ranks, &config, &options)?,
    };
    let room = engine.memory_room();
    let fit = |bytes| Fit::new(&engine, &config, &options, bytes);
    let fit = args.fit.map(fit).transpose()?;
    let wanted = args.batch.batch_size;
    if args.json {
        let bytes = Bytes {
            parameters: config.parameter_count(),
            weights: plan.weights,
            gradients: plan.gradients,
            optimizer: plan.optimizer,
            activations: plan.activations,
            workspace: plan.workspace,
            exchange: plan.exchange,
            total: plan.total(),
            limit: room.as_ref().map(|room| room.limit),
            available: room.as_ref().map(|room| room.available),
            recommended: fit.as_ref().and_then(|fit| fit.recommended(wanted)),
            fit: fit.as_ref(),
        };
        console::print_json(&bytes)?;
    } else {
        let parameters = console::scaled(config.parameter_count());
        // What processors have is shared; a GPU is one rank's.
        let shared = if engine.device().starts_with("cpu") { ranks as u64 } else { 1 };
        let limit = room.map_or_else(String::new, |room| limit(plan.total() * shared, &room));
        let of_ranks = match ranks {
            1 => String::new(),
            _ => format!("ranks       {ranks}; memory is that of the one that takes most\n"),
        };
        let fit = fit.map_or_else(String::new, |fit| fit.in_words(wanted));
        let table = table(&plan);
        console::print(&format!("parameters  {parameters}\n{of_ranks}{table}{limit}{fit}"))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The rank of a group that takes most, and its plan.
fn of_largest_rank(
    args: &PlanArgs,
    ranks: usize,
    config: &ModelConfig,
    options: &TrainerOptions,
) -> Outcome<(Engine, Plan)> {
    let mut largest: Option<(Engine, Plan)> = None;
    for rank in 0..ranks {
        let group = Group::new(rank, ranks, Box::new(Mirror));
        let group = group.with_transport(Transport::Host).with_sharded_states(args.shard_states);
        let MachineArgs { device, threads, .. } = &args.machine;
        let seed = args.seed.number();
        let (engine, _) = machine::open_as(device.clone(), *threads, seed, Some(group))?;
        let plan = mxfp4train::plan(&engine, config, options)?;
        if largest.as_ref().is_none_or(|(_, most)| plan.total() > most.total()) {
            largest = Some((engine, plan));
        }
        if !args.shard_states {
            break;
        }
    }
    Ok(largest.expect("a group has ranks"))
}

/// A group of ranks that all say what this one says: enough to plan one.
struct Mirror;

impl Collectives for Mirror {
    fn all_to_all(&mut self, send: &[u8], receive: &mut [u8]) -> io::Result<()> {
        receive.copy_from_slice(send);
        Ok(())
    }

    fn all_gather(&mut self, mine: &[u8], all: &mut [u8]) -> io::Result<()> {
        all.chunks_exact_mut(mine.len().max(1)).for_each(|of_one| of_one.copy_from_slice(mine));
        Ok(())
    }
}

/// The plan for people.
pub(crate) fn table(plan: &Plan) -> String {
    let exchange = match plan.exchange {
        0 => String::new(),
        bytes => format!(", exchange {}", HumanBytes(bytes)),
    };
    format!(
        "memory      {}: weights {}, gradients {}, optimizer {}, activations {}, workspace \
         {}{exchange}\n",
        HumanBytes(plan.total()),
        HumanBytes(plan.weights),
        HumanBytes(plan.gradients),
        HumanBytes(plan.optimizer),
        HumanBytes(plan.activations),
        HumanBytes(plan.workspace),
    )
}

/// What there is, for people.
fn limit(total: u64, room: &MemoryRoom) -> String {
    let verdict = match total {
        total if total > room.limit => "; the plan does not fit",
        total if total > room.available => "; the plan does not fit at the moment",
        _ => "",
    };
    format!(
        "limit       {}, {}; {} available{verdict}\n",
        HumanBytes(room.limit),
        room.limited_by,
        HumanBytes(room.available),
    )
}

/// The plan for programs, in bytes.
#[derive(Serialize)]
struct Bytes<'a> {
    parameters: u64,
    weights: u64,
    gradients: u64,
    optimizer: u64,
    activations: u64,
    workspace: u64,
    exchange: u64,
    total: u64,
    /// Most that the device can ever give.
    #[serde(skip_serializing_if = "Option::is_none")]
    limit: Option<u64>,
    /// What it can give at the moment.
    #[serde(skip_serializing_if = "Option::is_none")]
    available: Option<u64>,
    /// What fits into the bytes of --fit.
    #[serde(skip_serializing_if = "Option::is_none")]
    fit: Option<&'a Fit>,
    /// What to take of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    recommended: Option<&'a Setting>,
}
