//! How the GPUs of a group are linked: where they are of one host and reach each other's memory, by that;
//! else by NCCL where all have it.

use std::sync::Arc;

use bytemuck::Zeroable;

use super::LogLevel;
use crate::backend::Device;
use crate::backend::cpu::Cpu;
use crate::backend::cuda::{Cuda, Exported};
use crate::comm::{Ranks, Transport, Wire};
use crate::reserve::{collect, zeros};
use crate::{Error, Result};

/// Bytes by which NCCL starts.
const ID: usize = 128;

/// Links the device with those of the other ranks, as they want it, and what there is to say of that.
/// Every rank decides alike, by what all of them say.
pub(super) fn link(
    device: &mut Device<Arc<Cpu>, Arc<Cuda>>,
    ranks: &Ranks,
) -> Result<Option<(LogLevel, String)>> {
    let wanted = ranks.transport;
    let unsupported = |why: &str| {
        let (what, remedy) =
            (format!("transport {wanted}"), format!("{why}; use transport auto or host"));
        Err(Error::Unsupported { what, remedy })
    };
    let Device::Cuda(cuda) = device else {
        return match wanted {
            Transport::Auto | Transport::Host => Ok(None),
            _ => unsupported("processors exchange through the memory of the host"),
        };
    };
    if wanted == Transport::Host {
        return Ok(None);
    }
    let cuda = Arc::get_mut(cuda).expect("nobody else has it yet");
    let (uuid, nccl) = cuda.reaches();
    let all = ranks.gather(&match nccl {
        Ok(version) => format!("{uuid}\n{version}\n"),
        Err(why) => format!("{uuid}\n\n{why}"),
    })?;
    let all: Vec<_> = all.iter().map(|text| Said::new(text)).collect();
    let shared = shared(ranks, &all);
    let rounds = ranks.wire != Wire::F32;
    if rounds && wanted == Transport::Peer {
        return unsupported(
            "GPUs that add up in each other's memory send f32 alone, and no other wire",
        );
    }
    // Why one way and the next cannot be.
    let mut hindrances = Vec::new();
    if wanted != Transport::Nccl && !rounds {
        match shared.clone() {
            Some(why) => hindrances.push(why),
            None => hindrances.extend(by_memory(cuda, ranks)?),
        }
        if hindrances.is_empty() {
            let line = "GPUs add gradients up in each other's memory".to_owned();
            return Ok(Some((LogLevel::Info, line)));
        }
    }
    if wanted != Transport::Peer {
        match shared.or_else(|| without_nccl(ranks, &all)) {
            Some(why) => hindrances.push(why),
            None => hindrances.extend(by_nccl(cuda, ranks)?),
        }
        if hindrances.len() == usize::from(wanted == Transport::Auto && !rounds) {
            let line = format!("gradients go from GPU to GPU by NCCL {}", all[0].nccl);
            return Ok(Some((LogLevel::Info, line)));
        }
    }
    hindrances.dedup();
    let why = hindrances.join("; and ");
    if wanted != Transport::Auto {
        return unsupported(&why);
    }
    let line = format!("gradients go from GPU to GPU through the host's memory: {why}");
    Ok(Some((LogLevel::Warning, line)))
}

/// What a rank says of its GPU.
struct Said<'a> {
    uuid: &'a str,
    /// Its release; empty where there is none.
    nccl: &'a str,
    /// Why there is none.
    why: &'a str,
}

impl<'a> Said<'a> {
    fn new(text: &'a str) -> Self {
        let mut lines = text.splitn(3, '\n');
        let [uuid, nccl, why] = [(); 3].map(|()| lines.next().unwrap_or_default());
        Self { uuid, nccl, why }
    }
}

fn name(ranks: &Ranks, rank: usize) -> String {
    format!("rank {rank} on {}", ranks.host(rank))
}

/// Which rank shares its GPU.
fn shared(ranks: &Ranks, all: &[Said<'_>]) -> Option<String> {
    let pairs = (0..all.len()).flat_map(|rank| (0..rank).map(move |other| (other, rank)));
    let (other, rank) = pairs.into_iter().find(|(a, b)| all[*a].uuid == all[*b].uuid)?;
    Some(format!("{} is on the GPU of rank {other}; give each its own", name(ranks, rank)))
}

/// Why not all can use NCCL.
fn without_nccl(ranks: &Ranks, all: &[Said<'_>]) -> Option<String> {
    if let Some(rank) = all.iter().position(|said| said.nccl.is_empty()) {
        return Some(format!(
            "{} has no NCCL ({}); `pip install nvidia-nccl-cu13`, and put the folder of the library \
             into LD_LIBRARY_PATH",
            name(ranks, rank),
            all[rank].why
        ));
    }
    let rank = all.iter().position(|said| said.nccl != all[0].nccl)?;
    let (first, other) = (all[0].nccl, all[rank].nccl);
    Some(format!("rank 0 has NCCL {first}, {} {other}; use one release", name(ranks, rank)))
}

/// Why GPUs do not reach each other's memory; None where they are linked so.
fn by_memory(cuda: &mut Cuda, ranks: &Ranks) -> Result<Option<String>> {
    if ranks.on_this_host() < ranks.size() {
        // On all ranks, for none then has all of them on its host.
        return Ok(Some("they are on several hosts".to_owned()));
    }
    let words = cuda.words(ranks.size());
    if let Some(why) = hindrance(ranks, words.as_ref().err().map_or("", String::as_str))? {
        return Ok(Some(why));
    }
    let Ok((words, mine)) = words else { unreachable!("said to all") };
    let all = (0..ranks.size()).map(|_| Ok(Exported::zeroed()));
    let mut all = collect("what ranks are linked by", all)?;
    ranks.all_gather(bytemuck::bytes_of(&mine), bytemuck::cast_slice_mut(&mut all))?;
    let linked = cuda.link_by_memory(words, &all, ranks.rank(), ranks.timeout);
    let why = hindrance(ranks, linked.err().as_deref().unwrap_or_default())?;
    if why.is_some() {
        cuda.unlink();
    }
    Ok(why)
}

/// Why NCCL does not link GPUs; None where it does.
fn by_nccl(cuda: &mut Cuda, ranks: &Ranks) -> Result<Option<String>> {
    // Rank 0 makes the id; whether it could, all learn from what it sends.
    let made = (ranks.rank() == 0).then(|| cuda.link_id());
    let mut mine = [0; 1 + ID];
    if let Some(Ok(id)) = &made {
        mine[0] = 1;
        mine[1..].copy_from_slice(id);
    }
    let mut all = zeros("what ranks are linked by", ranks.size() * mine.len())?;
    ranks.all_gather(&mine, &mut all)?;
    let place = (ranks.rank(), ranks.size());
    let linked = match (made, all[..1 + ID].split_first_chunk()) {
        (Some(Err(error)), _) => Err(error),
        (_, Some(([1], id))) => {
            cuda.link_by_nccl(id.try_into().expect("ID bytes"), place, ranks.timeout)
        }
        _ => Err(Error::Peer { message: "rank 0 cannot start NCCL".into() }),
    };
    let why = linked.err().map(|error| error.to_string());
    let why = hindrance(ranks, why.as_deref().unwrap_or_default())?;
    if why.is_some() {
        cuda.unlink();
    }
    Ok(why)
}

/// The first reason that a rank says, and who says it.
fn hindrance(ranks: &Ranks, why: &str) -> Result<Option<String>> {
    let all = ranks.gather(why)?;
    let first = all.iter().enumerate().find(|(_, why)| !why.is_empty());
    Ok(first.map(|(rank, why)| format!("{}: {why}", name(ranks, rank))))
}
