//! How much memory there is: the machine's, the limits of the process's control groups, a GPU's.
//!
//! NOTE: Linux hands out addresses freely and ends a process when it touches more than there is, so
//! a plan that cannot fit has to be refused before the allocation. What can never fit is an error;
//! what does not fit at the moment is a warning, as other programs may end.
//!
//! A limit of version 2 is `memory.max` of the group and of every group above it, plus the swap
//! that the group may use; of version 1, `memory.limit_in_bytes` likewise.

use std::fs;
use std::path::{Component, Path, PathBuf};

use crate::{Error, Result};

/// The memory that a device gives, in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryRoom {
    /// Most bytes that a plan may have; more can never be had.
    pub limit: u64,
    /// What sets the limit, in words.
    pub limited_by: String,
    /// Bytes that can be had at the moment.
    pub available: u64,
}

impl MemoryRoom {
    /// The host's memory as the files below `root` say, which is "/" except in tests; `None` where
    /// there are no such files.
    pub(crate) fn of_host(root: &Path) -> Option<Self> {
        let text = fs::read_to_string(root.join("proc/meminfo")).ok()?;
        let kib = |field: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))?;
            line.trim().trim_end_matches(" kB").parse::<u64>().ok()?.checked_mul(1024)
        };
        let (total, swap) = (kib("MemTotal")?, kib("SwapTotal").unwrap_or(0));
        let free = kib("MemAvailable").or_else(|| kib("MemFree")).unwrap_or(total);
        let mut room = Self {
            limit: total.saturating_add(swap),
            limited_by: "the machine's memory and swap".into(),
            available: free.saturating_add(kib("SwapFree").unwrap_or(0)),
        };
        for group in groups(root) {
            room.narrow(&group, swap);
        }
        Some(room)
    }

    /// An error if `bytes` for `what` can never be had; a warning if the part of them that is not
    /// taken yet, `fresh`, cannot be had now.
    pub(crate) fn check(
        &self,
        what: &'static str,
        bytes: u64,
        fresh: u64,
    ) -> Result<Option<String>> {
        if bytes > self.limit {
            return Err(Error::OutOfMemory {
                what,
                needed: bytes,
                limit: format!(
                    "and the limit is {} ({}); use a smaller batch, sequence length or model, or \
                     recompute activations",
                    self.limit, self.limited_by
                ),
            });
        }
        Ok((fresh > self.available).then(|| {
            format!(
                "{what} will take {fresh} bytes, and {} are available at the moment; the system may \
                 end the process: use a smaller batch or model, or end other programs",
                self.available
            )
        }))
    }

    /// Takes the limits of a group into account, on a machine with `swap` bytes of swap.
    fn narrow(&mut self, group: &Group, swap: u64) {
        let number = |file: &str| {
            let text = fs::read_to_string(group.path.join(file)).ok()?;
            match text.trim() {
                "max" => Some(u64::MAX),
                number => number.parse::<u64>().ok(),
            }
        };
        let names = if group.is_v2 { &V2 } else { &V1 };
        let Some(memory) = number(names.limit) else { return };
        let swap = match number(names.swap) {
            Some(limit) if group.is_v2 => limit.min(swap),
            // Version 1 counts both together.
            Some(both) => both.saturating_sub(memory).min(swap),
            None if group.is_v2 => 0,
            None => swap,
        };
        let limit = memory.saturating_add(swap);
        if limit < self.limit {
            self.limit = limit;
            self.limited_by = format!("{} of the control group {}", names.limit, group.name);
        }
        // Pages of files make way.
        let stat = fs::read_to_string(group.path.join("memory.stat")).unwrap_or_default();
        let cached = |field: &str| {
            let line = stat.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(' '));
            line.and_then(|number| number.trim().parse::<u64>().ok()).unwrap_or(0)
        };
        let files: u64 = names.files.iter().map(|field| cached(field)).sum();
        let used = number(names.used).unwrap_or(0).saturating_sub(files);
        self.available = self.available.min(limit.saturating_sub(used));
    }
}

/// Names of a version's files.
struct Names {
    limit: &'static str,
    swap: &'static str,
    used: &'static str,
    /// Fields of `memory.stat`.
    files: [&'static str; 2],
}

const V2: Names = Names {
    limit: "memory.max",
    swap: "memory.swap.max",
    used: "memory.current",
    files: ["inactive_file", "active_file"],
};

const V1: Names = Names {
    limit: "memory.limit_in_bytes",
    swap: "memory.memsw.limit_in_bytes",
    used: "memory.usage_in_bytes",
    files: ["total_inactive_file", "total_active_file"],
};

/// A control group, in which the process or a group of it is.
struct Group {
    path: PathBuf,
    /// For people.
    name: String,
    is_v2: bool,
}

/// The process's groups and all above them.
///
/// In a container the names of /proc/self/cgroup may be those of the host, of which nothing is
/// mounted but the container's own group, in the place of the top. So folders that are not there
/// are passed over, and the top is looked at, too.
fn groups(root: &Path) -> Vec<Group> {
    let text = fs::read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
    let mut groups = Vec::new();
    for line in text.lines() {
        // NUMBER:CONTROLLERS:PATH; of version 2, number 0 and no controllers.
        let mut parts = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (parts.next(), parts.next(), parts.next())
        else {
            continue;
        };
        let is_v2 = controllers.is_empty();
        if !is_v2 && !controllers.split(',').any(|controller| controller == "memory") {
            continue;
        }
        let mounts: &[&str] = if is_v2 {
            &["sys/fs/cgroup", "sys/fs/cgroup/unified"]
        } else {
            &["sys/fs/cgroup/memory"]
        };
        let names = Path::new(path).components();
        let names: PathBuf = names.filter(|part| matches!(part, Component::Normal(_))).collect();
        for mount in mounts {
            for name in names.ancestors() {
                let path = root.join(mount).join(name);
                groups.push(Group { path, name: format!("/{}", name.display()), is_v2 });
            }
        }
    }
    groups
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    /// A machine of 64 GiB with 8 GiB of swap, 40 GiB and 4 GiB of which are free, and the given
    /// files.
    fn machine(files: &[(&str, &str)]) -> (tempfile::TempDir, MemoryRoom) {
        let root = tempfile::TempDir::new().unwrap();
        let memory = "MemTotal:       67108864 kB\nMemFree: 1 kB\nMemAvailable:   41943040 kB\n\
                      SwapTotal:       8388608 kB\nSwapFree:        4194304 kB\n";
        for (name, text) in [("proc/meminfo", memory)].iter().chain(files) {
            let path = root.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let room = MemoryRoom::of_host(root.path()).unwrap();
        (root, room)
    }

    #[test]
    fn without_groups_the_machine_is_the_limit() {
        let (_root, room) = machine(&[]);
        let by = "the machine's memory and swap";
        let expected = MemoryRoom { limit: 72 * GIB, limited_by: by.into(), available: 44 * GIB };
        assert_eq!(room, expected);
        assert_eq!(MemoryRoom::of_host(Path::new("/nowhere")), None);
    }

    #[test]
    fn the_lowest_group_up_the_hierarchy_is_the_limit() {
        let (_root, room) = machine(&[
            ("proc/self/cgroup", "0::/jobs/job-7/step\n"),
            ("sys/fs/cgroup/jobs/job-7/step/memory.max", "max\n"),
            ("sys/fs/cgroup/jobs/job-7/step/memory.swap.max", "max\n"),
            ("sys/fs/cgroup/jobs/job-7/memory.max", "17179869184\n"),
            ("sys/fs/cgroup/jobs/job-7/memory.swap.max", "1073741824\n"),
            ("sys/fs/cgroup/jobs/job-7/memory.current", "8589934592\n"),
            (
                "sys/fs/cgroup/jobs/job-7/memory.stat",
                "anon 1\ninactive_file 1073741824\nactive_file 0\n",
            ),
            ("sys/fs/cgroup/jobs/memory.max", "34359738368\n"),
        ]);
        assert_eq!((room.limit, room.available), (17 * GIB, 10 * GIB));
        assert_eq!(room.limited_by, "memory.max of the control group /jobs/job-7");
    }

    #[test]
    fn a_container_sees_its_own_group_at_the_top() {
        let (_root, room) = machine(&[
            ("proc/self/cgroup", "12:cpu,cpuacct:/docker/ab\n5:memory:/docker/ab\n0::/docker/ab\n"),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "2147483648\n"),
            ("sys/fs/cgroup/memory/memory.memsw.limit_in_bytes", "2147483648\n"),
            ("sys/fs/cgroup/memory/memory.usage_in_bytes", "1073741824\n"),
        ]);
        assert_eq!((room.limit, room.available), (2 * GIB, GIB));
        assert_eq!(room.limited_by, "memory.limit_in_bytes of the control group /");

        let (_root, room) = machine(&[
            ("proc/self/cgroup", "5:memory:/\n0::/../../other\n"),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n"),
            ("sys/fs/cgroup/other/memory.max", "garbage\n"),
        ]);
        assert_eq!(room.limit, 72 * GIB);
    }

    #[test]
    fn what_cannot_fit_is_an_error_and_what_does_not_fit_now_a_warning() {
        let (_root, room) = machine(&[]);
        assert_eq!(room.check("x", 44 * GIB, 44 * GIB).unwrap(), None);
        assert_eq!(room.check("x", 50 * GIB, 44 * GIB).unwrap(), None);
        let warning = room.check("the weights", 50 * GIB, 50 * GIB).unwrap().unwrap();
        assert!(warning.starts_with("the weights will take 53687091200 bytes"), "{warning}");
        let error = room.check("the weights", 73 * GIB, 1).unwrap_err().to_string();
        assert!(error.contains("78383153152 bytes are needed for the weights, and the limit is 77309411328 (the machine's memory and swap); use a smaller"), "{error}");
    }
}
