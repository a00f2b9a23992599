//! How the GPUs of a group are linked: by NCCL where it reaches all of them.

use std::sync::Arc;

use super::LogLevel;
use crate::backend::Device;
use crate::backend::cpu::Cpu;
use crate::backend::cuda::Cuda;
use crate::comm::{Call, Ranks, Transport};
use crate::reserve::zeros;
use crate::{Error, Result};

/// Bytes by which NCCL starts.
const ID: usize = 128;

/// Links the device with those of the other ranks, as they want it, and what there is to say of that.
/// Every rank decides alike, by what all of them say.
pub(super) fn link(
    device: &mut Device<Arc<Cpu>, Arc<Cuda>>,
    ranks: &Ranks,
) -> Result<Option<(LogLevel, String)>> {
    let is_wanted = ranks.transport == Transport::Nccl;
    let Device::Cuda(cuda) = device else {
        return match is_wanted {
            true => Err(unsupported("processors exchange through the host; use transport host")),
            false => Ok(None),
        };
    };
    if ranks.transport == Transport::Host {
        return Ok(None);
    }
    let cuda = Arc::get_mut(cuda).expect("nobody else has it yet");
    let (uuid, nccl) = cuda.reaches();
    let all = ranks.gather(&match nccl {
        Ok(version) => format!("{uuid}\n{version}\n"),
        Err(why) => format!("{uuid}\n\n{why}"),
    })?;
    if let Some(why) = hindrance(ranks, &all) {
        if is_wanted {
            return Err(unsupported(&why));
        }
        let line = format!("gradients go from GPU to GPU through the host's memory: {why}");
        return Ok(Some((LogLevel::Warning, line)));
    }
    // Rank 0 makes the id; whether it could, all learn from what it sends.
    let made = (ranks.rank() == 0).then(|| cuda.link_id());
    let mut mine = [0; 1 + ID];
    if let Some(Ok(id)) = &made {
        mine[0] = 1;
        mine[1..].copy_from_slice(id);
    }
    let mut all = zeros("what ranks are linked by", ranks.size() * mine.len())?;
    ranks.all_gather(&mine, &mut all)?;
    if let Some(Err(error)) = made {
        return Err(error);
    }
    let place = (ranks.rank(), ranks.size());
    let linked = match all[..1 + ID].split_first_chunk() {
        Some(([1], id)) => cuda.link(id.try_into().expect("ID bytes"), place, ranks.timeout),
        _ => Err(Error::Peer { message: "rank 0 cannot start NCCL".into() }),
    };
    let agreed = ranks.agree(Call::Link, linked.as_ref().copied());
    linked.and(agreed)?;
    let version = cuda.reaches().1.unwrap_or_default();
    Ok(Some((LogLevel::Info, format!("gradients go from GPU to GPU by NCCL {version}"))))
}

fn unsupported(why: &str) -> Error {
    Error::Unsupported {
        what: "transport nccl".into(),
        remedy: format!("{why}; or use transport host"),
    }
}

/// Why not all of them can use NCCL.
fn hindrance(ranks: &Ranks, all: &[String]) -> Option<String> {
    let parts = |rank: usize| {
        let mut lines = all[rank].splitn(3, '\n');
        [(); 3].map(|()| lines.next().unwrap_or_default())
    };
    let name = |rank: usize| format!("rank {rank} on {}", ranks.host(rank));
    let first = parts(0)[1];
    for rank in 0..all.len() {
        let [uuid, version, why] = parts(rank);
        if version.is_empty() {
            let name = name(rank);
            return Some(format!(
                "{name} has no NCCL ({why}); `pip install nvidia-nccl-cu13`, and put the folder of \
                 the library into LD_LIBRARY_PATH"
            ));
        }
        if version != first {
            let name = name(rank);
            return Some(format!("rank 0 has NCCL {first}, {name} {version}; use one release"));
        }
        if let Some(other) = (0..rank).find(|other| parts(*other)[0] == uuid) {
            let name = name(rank);
            return Some(format!("{name} is on the GPU of rank {other}; give each its own"));
        }
    }
    None
}
