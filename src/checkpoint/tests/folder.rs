//! Saving replaces the folder whole: what stays, what is refused, and what a kill leaves behind.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::*;

/// Set for a child process: the folder that it saves to until it is killed.
const SAVE_TO: &str = "MXT_TEST_SAVE_TO";

/// Set for a child process: the way of the folder.
const WAY: &str = "MXT_TEST_WAY";

/// Set for a child process: the operation before which it is killed.
const KILL_AT: &str = "MXT_TEST_KILL_AT";

#[test]
fn files_of_others_survive_and_folders_are_not_lost() {
    let (root, dir) = temp();
    save_full(&dir, 1).unwrap();
    fs::write(dir.join("tokenizer.json"), "{}").unwrap();
    fs::write(root.path().join("shared"), "s").unwrap();
    std::os::unix::fs::symlink("../shared", dir.join("link")).unwrap();
    std::os::unix::fs::symlink("nowhere", dir.join("dangling")).unwrap();
    let mut log = fs::OpenOptions::new().append(true).create(true).open(dir.join("log")).unwrap();
    for step in 2..5 {
        save_full(&dir, step).unwrap();
        io::Write::write_all(&mut log, b"line\n").unwrap();
    }
    assert_eq!(fs::read_to_string(dir.join("tokenizer.json")).unwrap(), "{}");
    assert_eq!(fs::read_to_string(dir.join("link")).unwrap(), "s");
    assert_eq!(fs::read_to_string(dir.join("log")).unwrap(), "line\nline\nline\n");
    assert!(fs::symlink_metadata(dir.join("dangling")).unwrap().is_symlink());

    // Of folders, pipes and sockets none is moved, or waited for.
    fs::create_dir(dir.join("samples")).unwrap();
    let inside = File::open(dir.join("samples")).unwrap();
    fs::write(dir.join("samples/1.txt"), "once").unwrap();
    make_pipe(&dir.join("pipe"));
    let _socket = std::os::unix::net::UnixListener::bind(dir.join("socket")).unwrap();
    for step in 5..7 {
        save_full(&dir, step).unwrap();
        io::Write::write_all(&mut log, b"line\n").unwrap();
    }
    assert_eq!(load(&dir).unwrap().state.step, 6);
    assert_eq!(fs::read_to_string(dir.join("samples/1.txt")).unwrap(), "once");
    let inode = |m: fs::Metadata| std::os::unix::fs::MetadataExt::ino(&m);
    assert_eq!(
        inode(inside.metadata().unwrap()),
        inode(fs::metadata(dir.join("samples")).unwrap())
    );
    assert_eq!(fs::read_to_string(dir.join("log")).unwrap().lines().count(), 5);
    assert_eq!(
        names(&dir),
        [
            CONFIG,
            "dangling",
            "link",
            "log",
            MODEL,
            "pipe",
            "samples",
            "socket",
            "tokenizer.json",
            STATE,
            MOMENTS
        ]
    );
    assert_eq!(names(root.path()), ["run", "shared"]);
}

fn make_pipe(path: &Path) {
    rustix::fs::mknodat(CWD, path, rustix::fs::FileType::Fifo, Mode::RWXU, 0).unwrap();
}

/// What others have put beside a checkpoint under names that look like ours is not touched or
/// waited for.
#[test]
fn names_like_ours_do_not_confuse() {
    let (root, dir) = temp();
    save_full(&dir, 1).unwrap();
    make_pipe(&root.path().join(".run.mxt-tmp-9-9"));
    for name in [".run.mxt-old", ".run.mxt-tmp-mine"] {
        fs::create_dir(root.path().join(name)).unwrap();
        fs::write(root.path().join(name).join("thesis.tex"), "x").unwrap();
    }
    fs::write(dir.join(".mxt-new"), "").unwrap();
    fs::create_dir(dir.join(".mxt-tmp-1-0")).unwrap();
    fs::write(dir.join(".mxt-tmp-1-0").join(MODEL), "half").unwrap();
    for (step, no_exchange) in [(2, false), (3, true)] {
        let _without = no_exchange.then(faults::without_exchange);
        save_full(&dir, step).unwrap();
        assert_eq!(load(&dir).unwrap().state.step, step);
        assert_eq!(names(&dir), [CONFIG, MODEL, STATE, MOMENTS]);
    }
    for name in [".run.mxt-old", ".run.mxt-tmp-mine"] {
        assert_eq!(names(&root.path().join(name)), ["thesis.tex"]);
    }

    // A checkpoint in the top folder of a volume, which a host has locked.
    let volume = root.path().join("volume");
    fs::create_dir_all(volume.join("lost+found")).unwrap();
    fs::write(volume.join(".mxt-lock"), "").unwrap();
    save_full(&volume, 1).unwrap();
    assert_eq!(names(&volume)[..2], [".mxt-lock", CONFIG]);
}

#[test]
fn what_must_not_be_replaced_is_refused() {
    let (root, dir) = temp();
    fs::create_dir(&dir).unwrap();
    save_full(&dir, 1).expect("an empty folder may be replaced");

    let home = root.path().join("home");
    fs::create_dir(&home).unwrap();
    fs::write(home.join("thesis.tex"), "x").unwrap();
    let file = home.join("thesis.tex");
    for (target, part) in [
        (home.as_path(), "found \"thesis.tex\" and no model.safetensors"),
        (&file, "found a file"),
        (Path::new("."), "and no model.safetensors"),
        (Path::new("/proc"), "and no model.safetensors"),
        (Path::new("/"), "and no model.safetensors"),
        (&file.join("below"), "Not a directory"),
        (&file.join("far/below"), "Not a directory"),
        (Path::new("/proc/checkpoint"), "cannot create"),
        (Path::new(""), "expected the name of a folder"),
    ] {
        let message = save_full(target, 1).unwrap_err().to_string();
        assert!(message.contains(part), "{}: {message}", target.display());
    }
    assert_eq!(names(&home), ["thesis.tex"]);
    assert_eq!(names(root.path()), ["home", "run"]);
}

#[test]
fn links_are_followed_and_parents_created() {
    let (root, dir) = temp();
    let deep = dir.join("a/b/");
    save_full(&deep, 1).unwrap();
    let link = root.path().join("latest");
    std::os::unix::fs::symlink(&deep, &link).unwrap();
    save_full(&link, 2).unwrap();
    assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
    assert_eq!(load(&deep).unwrap().state.step, 2);
    assert_eq!(load(&link).unwrap().state.step, 2);
    assert_eq!(names(&dir.join("a")), ["b"]);

    let dangling = root.path().join("dangling");
    std::os::unix::fs::symlink("nowhere", &dangling).unwrap();
    assert!(matches!(save_full(&dangling, 1), Err(Error::Io { action: "follow", .. })));

    // A link to what a save without exchange has left.
    fs::rename(&deep, dir.join("a/.b.mxt-old")).unwrap();
    assert_eq!(load(&link).unwrap().state.step, 2);
    save_full(&link, 3).unwrap();
    assert_eq!(load(&deep).unwrap().state.step, 3);
    assert_eq!(names(&dir.join("a")), ["b"]);
}

#[test]
fn mapped_weights_stay_while_the_folder_is_replaced() {
    let (_root, dir) = temp();
    save_full(&dir, 1).unwrap();
    let before = load(&dir).unwrap();
    let checkpoint = Checkpoint::open(&dir).unwrap();
    let mapped = checkpoint.tensors(1).unwrap();
    let toy = Toy::new(&config(), |_, _| 0.25);
    save(&dir, &config(), &toy, None).unwrap();

    // One save's parts belong together, even those not yet mapped.
    assert_eq!(checkpoint.state().unwrap(), state(1));
    assert_eq!(load_model(&checkpoint).unwrap(), (before.config, before.weights.clone()));
    let mut values = Vec::new();
    mapped.read("transformer.wte.weight", &[11, 4], &mut values).unwrap();
    assert_eq!(bits(&values), before.weights[0]);
    let (_, after) = load_model(&Checkpoint::open(&dir).unwrap()).unwrap();
    assert_eq!(after[0], vec![0.25f32.to_bits(); 44]);
}

#[test]
fn a_folder_left_between_two_renames_is_found_and_put_back() {
    let (root, dir) = temp();
    save_full(&dir, 1).unwrap();
    fs::write(dir.join("tokenizer.json"), "{}").unwrap();
    let old = root.path().join(".run.mxt-old");
    fs::rename(&dir, &old).unwrap();
    assert_eq!(load(&dir).unwrap().state.step, 1);
    assert_eq!(folder::existing(&dir), old);
    folder::put_back(&dir).unwrap();
    assert!(folder::existing(&dir) == dir && dir.join("tokenizer.json").exists());
    fs::rename(&dir, &old).unwrap();
    save_full(&dir, 2).unwrap();
    assert_eq!(load(&dir).unwrap().state.step, 2);
    assert!(dir.join("tokenizer.json").exists());

    // And one left after both.
    fs::create_dir(&old).unwrap();
    fs::write(old.join(CONFIG), "{}").unwrap();
    save_full(&dir, 3).unwrap();
    assert_eq!(load(&dir).unwrap().state.step, 3);
    assert_eq!(names(root.path()), ["run"]);
}

/// Runs a test that asks for locks of its own thread to be gone in a process of its own, and says whether
/// this is that process: one that another test starts or forks meanwhile has our open files and their
/// locks until it is another program or ends.
fn is_alone(test: &str) -> bool {
    const ALONE: &str = "MXT_TEST_ALONE";
    if std::env::var_os(ALONE).is_some() {
        return true;
    }
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", &format!("checkpoint::tests::folder::{test}")])
        .env(ALONE, "")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
    false
}

#[test]
fn leftovers_of_the_dead_are_removed_and_those_of_the_living_are_not() {
    if !is_alone("leftovers_of_the_dead_are_removed_and_those_of_the_living_are_not") {
        return;
    }
    let (root, dir) = temp();
    let dead = root.path().join(".run.mxt-tmp-1-0");
    let living = root.path().join(".run.mxt-tmp-1-1");
    for folder in [&dead, &living] {
        fs::create_dir(folder).unwrap();
        fs::write(folder.join(MODEL), "half").unwrap();
    }
    let lock = File::open(&living).unwrap();
    lock.try_lock().unwrap();
    save_full(&dir, 1).unwrap();
    assert_eq!(names(root.path()), [".run.mxt-tmp-1-1", "run"]);
    drop(lock);
    save_full(&dir, 2).unwrap();
    assert_eq!(names(root.path()), ["run"]);
}

/// All values are `step`, large enough that a kill often falls into the writing.
fn save_uniform(dir: &Path, step: u64) -> Result<()> {
    let config = ModelConfig { channels: 64, ..config() };
    let toy = Toy::new(&config, |_, _| step as f32);
    let part = TrainerPart { state: &state(step), moments: [&toy, &toy] };
    save(dir, &config, &toy, Some(part))
}

/// No test of its own: the child process of the next one.
#[test]
fn saves_until_killed() {
    let Some(dir) = std::env::var_os(SAVE_TO) else { return };
    let dir = PathBuf::from(dir);
    let _without = (std::env::var_os(WAY).unwrap() == "NoExchange").then(faults::without_exchange);
    for step in load(&dir).unwrap().state.step + 1.. {
        save_uniform(&dir, step).unwrap();
    }
}

#[test]
fn a_kill_at_any_instant_leaves_a_whole_checkpoint() {
    for way in Way::ALL {
        let (root, dir) = way.checkpoint();
        save_uniform(&dir, 0).unwrap();
        let mut last = 0;
        for round in 0..20u64 {
            let mut child = Command::new(std::env::current_exe().unwrap());
            child
                .args(["--exact", "checkpoint::tests::folder::saves_until_killed"])
                .env(SAVE_TO, &dir)
                .env(WAY, format!("{way:?}"));
            child.stdout(Stdio::null()).stderr(Stdio::null());
            let mut child = child.spawn().unwrap();
            // Readers see whole checkpoints all the while.
            let end = Instant::now() + Duration::from_micros(10_000 + round * 7919 % 50_000);
            while Instant::now() < end {
                if way != Way::NoExchange {
                    load(&dir).unwrap();
                }
                std::thread::sleep(Duration::from_millis(1));
            }
            assert!(child.try_wait().unwrap().is_none(), "the child failed");
            child.kill().unwrap();
            child.wait().unwrap();

            let loaded = load(&dir).unwrap();
            let step = loaded.state.step;
            assert!(step >= last);
            last = step;
            let expected = (step as f32).to_bits();
            let mut values = loaded.weights.iter().chain(&loaded.moments).flatten();
            assert!(values.all(|&value| value == expected), "step {step}");
        }
        assert!(last > 0, "no save came to its end");
        save_uniform(&dir, last + 1).unwrap();
        assert_eq!(load(&dir).unwrap().state.step, last + 1);
        way.check_all_is_there(root.path(), &dir);
        println!("{way:?}: {last} saves and 20 kills");
    }
}

/// The ways in which a folder is replaced.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Way {
    Exchange,
    NoExchange,
    /// A folder of others is in it.
    InPlace,
}

impl Way {
    const ALL: [Self; 3] = [Self::Exchange, Self::NoExchange, Self::InPlace];

    /// A checkpoint of step 1 in a folder with files of others.
    fn checkpoint(self) -> (TempDir, PathBuf) {
        // Hundreds of saves wait for a disk for minutes.
        let in_memory = Path::new("/dev/shm");
        let root = if in_memory.is_dir() { TempDir::new_in(in_memory) } else { TempDir::new() };
        let root = root.unwrap();
        let dir = root.path().join("run");
        save_full(&dir, 1).unwrap();
        fs::write(dir.join("tokenizer.json"), "{}").unwrap();
        std::os::unix::fs::symlink("nowhere", dir.join("link")).unwrap();
        if self == Self::InPlace {
            fs::create_dir(dir.join("samples")).unwrap();
            fs::write(dir.join("samples/1.txt"), "once").unwrap();
        }
        (root, dir)
    }

    /// The checkpoint and what others had in it, and nothing of ours besides.
    fn check_all_is_there(self, root: &Path, dir: &Path) {
        assert_eq!(names(root), ["run"]);
        let mut all = vec![CONFIG, "link", MODEL, "tokenizer.json", STATE, MOMENTS];
        if self == Self::InPlace {
            all.insert(3, "samples");
            assert_eq!(fs::read_to_string(dir.join("samples/1.txt")).unwrap(), "once");
        }
        assert_eq!(names(dir), all);
        assert_eq!(fs::read_to_string(dir.join("tokenizer.json")).unwrap(), "{}");
        assert_eq!(fs::read_link(dir.join("link")).unwrap(), Path::new("nowhere"));
    }
}

/// Whichever file operation of a save fails: the checkpoint is whole, old or new; a save that says it
/// was done was; and the next one puts everything right.
#[test]
fn a_failure_of_any_operation_leaves_a_whole_checkpoint() {
    if !is_alone("a_failure_of_any_operation_leaves_a_whole_checkpoint") {
        return;
    }
    for way in Way::ALL {
        for kind in [io::ErrorKind::StorageFull, io::ErrorKind::PermissionDenied] {
            let _without = (way == Way::NoExchange).then(faults::without_exchange);
            let (mut failed, mut operations) = (0, 1);
            loop {
                let (root, dir) = way.checkpoint();
                let fault = faults::at(operations, move || Err(kind.into()));
                let result = save_full(&dir, 2);
                let was_reached = fault.end();
                let step = load(&dir).unwrap().state.step;
                assert!(step == 2 || step == 1 && result.is_err(), "{way:?} {operations}");
                failed += u32::from(result.is_err());
                save_full(&dir, 3).unwrap();
                assert_eq!(load(&dir).unwrap().state.step, 3);
                way.check_all_is_there(root.path(), &dir);
                if !was_reached {
                    break;
                }
                operations += 1;
            }
            assert!(failed > 20, "{way:?}: {failed} of {operations} operations failed");
        }
    }
}

/// As above, for a process that ends there; and a folder of others that comes at any moment of such
/// a save is not lost either.
#[test]
fn an_end_at_any_operation_leaves_a_whole_checkpoint() {
    if !is_alone("an_end_at_any_operation_leaves_a_whole_checkpoint") {
        return;
    }
    for way in Way::ALL {
        let _without = (way == Way::NoExchange).then(faults::without_exchange);
        let mut operations = 1u64;
        'all: loop {
            for late in [0].into_iter().chain(operations.saturating_sub(6).max(1)..=operations) {
                let (root, dir) = way.checkpoint();
                let latecomer = dir.join("late");
                let come = {
                    let latecomer = latecomer.clone();
                    move || {
                        // Between two renames there is no folder.
                        let _ = fs::create_dir(&latecomer);
                        let _ = fs::write(latecomer.join("note"), "late");
                        Ok(())
                    }
                };
                let coming = (late > 0).then(|| faults::at(late, come));
                let fault = faults::ending_at(operations);
                let _ = save_full(&dir, 2);
                let was_reached = fault.end();
                drop(coming);
                let step = load(&dir).unwrap().state.step;
                assert!(step == 1 || step == 2, "{way:?} {operations}");
                save_full(&dir, 3).unwrap();
                assert_eq!(load(&dir).unwrap().state.step, 3);
                if late > 0 && latecomer.exists() {
                    let note = fs::read_to_string(latecomer.join("note")).unwrap();
                    assert_eq!(note, "late", "{way:?} {late} {operations}");
                    fs::remove_dir_all(&latecomer).unwrap();
                } else {
                    assert!(late == 0 || way == Way::NoExchange, "{way:?} {late} {operations}");
                }
                way.check_all_is_there(root.path(), &dir);
                if !was_reached {
                    break 'all;
                }
            }
            operations += 1;
        }
        assert!(operations > 20, "{operations}");
    }
}

/// No test of its own: the child process of the next one.
#[test]
fn saves_once_and_is_killed_on_the_way() {
    let (Some(dir), Some(at)) = (std::env::var_os(SAVE_TO), std::env::var(KILL_AT).ok()) else {
        return;
    };
    let _without = (std::env::var_os(WAY).unwrap() == "NoExchange").then(faults::without_exchange);
    let _fault = faults::at(at.parse().unwrap(), || {
        // SAFETY: nothing of the process is left afterwards.
        unsafe { libc::raise(libc::SIGKILL) };
        Ok(())
    });
    save_full(Path::new(&dir), 2).unwrap();
}

#[test]
fn a_kill_at_any_operation_leaves_a_whole_checkpoint() {
    for way in Way::ALL {
        for operation in 1.. {
            let (root, dir) = way.checkpoint();
            let mut child = Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "checkpoint::tests::folder::saves_once_and_is_killed_on_the_way"])
                .env(SAVE_TO, &dir)
                .env(WAY, format!("{way:?}"))
                .env(KILL_AT, operation.to_string())
                .stdout(Stdio::null())
                .spawn()
                .unwrap();
            let status = child.wait().unwrap();
            let step = load(&dir).unwrap().state.step;
            assert!(step == 2 || step == 1 && !status.success(), "{way:?} {operation}");
            save_full(&dir, 3).unwrap();
            assert_eq!(load(&dir).unwrap().state.step, 3);
            way.check_all_is_there(root.path(), &dir);
            if status.success() {
                assert!(operation > 20, "{operation} operations");
                break;
            }
        }
    }
}

/// A folder of another owner stays that owner's, as it does in place. Only root can try.
#[test]
fn the_owner_of_a_folder_keeps_it() {
    use std::os::unix::fs::MetadataExt;
    let (root, dir) = temp();
    save_full(&dir, 1).unwrap();
    if std::os::unix::fs::chown(&dir, Some(12345), Some(54321)).is_err() {
        println!("skipped: not root");
        return;
    }
    save_full(&dir, 2).unwrap();
    let metadata = fs::metadata(&dir).unwrap();
    assert_eq!((metadata.uid(), metadata.gid()), (12345, 54321));
    assert_eq!(load(&dir).unwrap().state.step, 2);
    assert_eq!(names(root.path()), ["run"]);
}
