//! Which rank this process is, as whoever started it says in the environment: torchrun, an MPI's
//! mpirun, or Slurm's srun.

use crate::failure::{Failure, Outcome};

/// What a launcher says.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Launched {
    pub(crate) rank: usize,
    pub(crate) size: usize,
    /// Which rank of those on its host.
    pub(crate) local: usize,
}

/// A launcher: its name, and its variables for rank, number of ranks, and rank on the host.
struct Launcher {
    name: &'static str,
    rank: &'static str,
    size: &'static str,
    local: &'static str,
}

/// The more particular first: mpirun within a job of Slurm sets both.
const LAUNCHERS: [Launcher; 4] = [
    Launcher { name: "torchrun", rank: "RANK", size: "WORLD_SIZE", local: "LOCAL_RANK" },
    Launcher {
        name: "Open MPI",
        rank: "OMPI_COMM_WORLD_RANK",
        size: "OMPI_COMM_WORLD_SIZE",
        local: "OMPI_COMM_WORLD_LOCAL_RANK",
    },
    Launcher {
        name: "MPICH or Intel MPI",
        rank: "PMI_RANK",
        size: "PMI_SIZE",
        local: "MPI_LOCALRANKID",
    },
    Launcher { name: SLURM, rank: "SLURM_PROCID", size: "SLURM_NTASKS", local: "SLURM_LOCALID" },
];
const SLURM: &str = "srun";

impl Launched {
    /// What `variable(name)` says.
    ///
    /// # Errors
    /// Where none of them has started this process, or one says nonsense.
    pub(crate) fn find(variable: impl Fn(&str) -> Option<String>) -> Outcome<Self> {
        // The script of a job has these variables, too, and is no rank: it has no step of a number.
        let in_step = variable("SLURM_STEP_ID").is_some_and(|id| id.parse::<u64>().is_ok());
        let found = LAUNCHERS.iter().find(|launcher| {
            let has_both = [launcher.rank, launcher.size].iter().all(|n| variable(n).is_some());
            has_both && (launcher.name != SLURM || in_step)
        });
        let Some(launcher) = found else {
            let names: Vec<_> =
                LAUNCHERS.iter().map(|l| format!("{} ({}, {})", l.name, l.rank, l.size)).collect();
            return Err(Failure::usage(format!(
                "--group env: expected to be started by one of {}; none of their variables is set",
                names.join(", ")
            )));
        };
        let number = |name: &str| {
            let text = variable(name).unwrap_or_default();
            text.parse::<usize>().map_err(|_| {
                Failure::usage(format!("--group env: expected a number in {name}, got {text:?}"))
            })
        };
        let (rank, size) = (number(launcher.rank)?, number(launcher.size)?);
        if size == 0 || rank >= size {
            return Err(Failure::usage(format!(
                "--group env: expected {} below {}, got {rank} of {size}",
                launcher.rank, launcher.size
            )));
        }
        let local = match variable(launcher.local) {
            Some(_) => number(launcher.local)?,
            None => 0,
        };
        Ok(Self { rank, size, local })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find(variables: &[(&str, &str)]) -> Result<(usize, usize, usize), String> {
        let get = |name: &str| {
            variables.iter().find(|(n, _)| *n == name).map(|(_, value)| (*value).to_owned())
        };
        let found = Launched::find(get).map_err(|failure| failure.message)?;
        Ok((found.rank, found.size, found.local))
    }

    #[test]
    fn launchers_say_who_is_who() {
        let torchrun = [("RANK", "5"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "1")];
        assert_eq!(find(&torchrun), Ok((5, 8, 1)));
        let of_mpi = [
            ("OMPI_COMM_WORLD_RANK", "1"),
            ("OMPI_COMM_WORLD_SIZE", "2"),
            ("OMPI_COMM_WORLD_LOCAL_RANK", "0"),
            // The job's script, within which mpirun was called.
            ("SLURM_PROCID", "0"),
            ("SLURM_NTASKS", "2"),
        ];
        assert_eq!(find(&of_mpi), Ok((1, 2, 0)));
        assert_eq!(find(&[("PMI_RANK", "0"), ("PMI_SIZE", "3")]), Ok((0, 3, 0)));
        let slurm = [("SLURM_PROCID", "3"), ("SLURM_NTASKS", "4"), ("SLURM_LOCALID", "1")];
        assert!(find(&slurm).unwrap_err().contains("none of their variables"));
        for (step, is_one) in [("0", true), ("12", true), ("batch", false), ("4294967291", true)] {
            let with = [&slurm[..], &[("SLURM_STEP_ID", step)]].concat();
            assert_eq!(find(&with).is_ok(), is_one, "{step}");
        }
        let wrong = find(&[("RANK", "x"), ("WORLD_SIZE", "2")]).unwrap_err();
        assert_eq!(wrong, "--group env: expected a number in RANK, got \"x\"");
        let wrong = find(&[("RANK", "2"), ("WORLD_SIZE", "2")]).unwrap_err();
        assert_eq!(wrong, "--group env: expected RANK below WORLD_SIZE, got 2 of 2");
        assert!(find(&[("RANK", "1")]).is_err());
    }
}
