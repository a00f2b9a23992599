//! Saving replaces the folder whole: what stays, what is refused, and what a kill leaves behind.

use std::fs::Permissions;
use std::os::unix::fs::{PermissionsExt, chown};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::*;

/// Set for a child process: the folder that it saves to until it is killed.
const SAVE_TO: &str = "MXT_TEST_SAVE_TO";

/// Set for a child process: the way of the folder.
const WAY: &str = "MXT_TEST_WAY";

/// Set for a child process: the operation before which it is killed.
const KILL_AT: &str = "MXT_TEST_KILL_AT";

/// Processes of two containers may have one number, and so one name for their folders.
#[test]
fn a_folder_that_has_the_name_of_one_that_was_moved_stays() {
    let (_root, dir) = temp();
    save_full(&dir, 1).unwrap();
    fs::write(dir.join("of others"), "").unwrap();
    let name = std::rc::Rc::new(std::cell::RefCell::new(None));
    let at_each = |operation| {
        let (dir, name) = (dir.clone(), name.clone());
        faults::at(operation, move || {
            let is_temporary = |name: &String| name.starts_with(".mxt-tmp-");
            match (names(&dir).into_iter().find(is_temporary), &mut *name.borrow_mut()) {
                (None, Some(name)) => fs::create_dir_all(dir.join(name).join("theirs")),
                (Some(found), name) => {
                    *name = Some(found);
                    Ok(())
                }
                _ => Ok(()),
            }
        })
    };
    let _faults: Vec<_> = (1..400).map(at_each).collect();
    save_full(&dir, 2).unwrap();
    assert_eq!(load(&dir).unwrap().state.step, 2);
    let name = name.borrow().clone().expect("a temporary folder was there");
    assert!(dir.join(name).join("theirs").is_dir());
}

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

/// What others have put beside a checkpoint under names that look like ours is not touched or
/// waited for, and never taken for ours.
#[test]
fn names_like_ours_do_not_confuse() {
    let (root, dir) = temp();
    let beside = |name: &str| root.path().join(name);
    // A stranger's checkpoint, and a link to it under each name.
    let strangers = beside("strangers");
    save_full(&strangers, 77).unwrap();
    for name in [".run.mxt-old", ".run.mxt-tmp-9-8"] {
        std::os::unix::fs::symlink(&strangers, beside(name)).unwrap();
    }
    assert!(matches!(load(&dir).unwrap_err(), Error::Io { action: "open", .. }));
    folder::put_back(&dir).unwrap();
    for name in [".run.mxt-tmp-9", ".run.mxt-tmp-9-9"] {
        make_pipe(&beside(name));
    }
    save_full(&dir, 1).unwrap();
    fs::remove_file(beside(".run.mxt-old")).unwrap();
    for name in [".run.mxt-old", ".run.mxt-tmp-mine"] {
        fs::create_dir(beside(name)).unwrap();
        fs::write(beside(name).join("thesis.tex"), "x").unwrap();
    }
    fs::create_dir(dir.join(".mxt-tmp-1-0")).unwrap();
    fs::write(dir.join(".mxt-tmp-1-0").join(MODEL), "half").unwrap();
    for (step, no_exchange) in [(2, false), (3, true)] {
        let _without = no_exchange.then(faults::without_exchange);
        save_full(&dir, step).unwrap();
        assert_eq!(load(&dir).unwrap().state.step, step);
        assert_eq!(names(&dir), [CONFIG, MODEL, STATE, MOMENTS]);
    }
    for name in [".run.mxt-old", ".run.mxt-tmp-mine"] {
        assert_eq!(names(&beside(name)), ["thesis.tex"]);
    }
    assert_eq!(load(&strangers).unwrap().state.step, 77);
    assert_eq!(names(root.path()).len(), 7);

    // In the folder, what has the name of a save that was committed.
    let commit = dir.join(in_place::COMMIT);
    let check_refused = |part: &str| {
        let message = save_full(&dir, 4).unwrap_err().to_string();
        assert!(message.contains(".mxt-commit") && message.contains(part), "{message}");
        assert_eq!(load(&dir).unwrap().state.step, 3);
    };
    make_pipe(&commit);
    check_refused("found something else");
    fs::remove_file(&commit).unwrap();
    std::os::unix::fs::symlink(&strangers, &commit).unwrap();
    check_refused("found something else");
    fs::remove_file(&commit).unwrap();
    fs::create_dir(&commit).unwrap();
    fs::write(commit.join("thesis.tex"), "x").unwrap();
    check_refused("found one without a list");
    fs::remove_dir_all(&commit).unwrap();
    save_full(&dir, 4).unwrap();

    // A checkpoint in the top folder of a volume, which a host has locked.
    let volume = root.path().join("volume");
    fs::create_dir_all(volume.join("lost+found")).unwrap();
    fs::write(volume.join(".mxt-lock"), "").unwrap();
    save_full(&volume, 1).unwrap();
    assert_eq!(names(&volume)[..2], [".mxt-lock", CONFIG]);
}

/// Where anybody may put files, a save that another user has committed in the folder is none. Only
/// root can try.
#[test]
fn a_commit_of_another_user_is_not_believed() {
    let (_root, dir) = temp();
    let commit = dir.join(in_place::COMMIT);
    save_full(&dir, 1).unwrap();
    save_full(&commit, 66).unwrap();
    fs::write(commit.join(in_place::NAMES), format!("{}\n", super::super::FILES.join("\n")))
        .unwrap();
    if chown(&commit, Some(12345), None).is_err() {
        println!("skipped: not root");
        return;
    }
    // As in /tmp.
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o1777)).unwrap();
    assert_eq!(load(&dir).unwrap().state.step, 1);
    let message = save_full(&dir, 2).unwrap_err().to_string();
    assert!(message.contains("of user 12345, who may not replace"), "{message}");
    assert_eq!(names(&commit).len(), 5);
    // Who may replace the files themselves may save.
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o777)).unwrap();
    assert_eq!(load(&dir).unwrap().state.step, 66);
    save_full(&dir, 67).unwrap();
    assert_eq!(names(&dir), [CONFIG, MODEL, STATE, MOMENTS]);
}

/// Folders that another user made where both may are neither loaded nor emptied. Only root can try.
#[test]
fn leftovers_of_another_user_are_left_alone() {
    let (root, dir) = temp();
    let (old, tmp) = (root.path().join(".run.mxt-old"), root.path().join(".run.mxt-tmp-1-0"));
    for folder in [&old, &tmp] {
        save_full(folder, 66).unwrap();
        fs::write(folder.join("tokenizer.json"), "theirs").unwrap();
        if chown(folder, Some(12345), None).is_err() {
            println!("skipped: not root");
            return;
        }
    }
    assert!(matches!(load(&dir).unwrap_err(), Error::Io { action: "open", .. }));
    for step in 1..3 {
        save_full(&dir, step).unwrap();
        assert_eq!(names(&dir), [CONFIG, MODEL, STATE, MOMENTS]);
        assert_eq!(load(&dir).unwrap().state.step, step);
    }
    for folder in [&old, &tmp] {
        assert_eq!(names(folder).len(), 5);
    }
}

/// A name that leaves no room for anything of ours beside it.
#[test]
fn the_longest_name_will_do() {
    for length in [100, 101, 255] {
        let (root, _) = temp();
        let dir = root.path().join("n".repeat(length));
        let stale = crate::checkpoint::folder::sibling(&dir, "tmp-1-0");
        assert!(stale.file_name().unwrap().len() < 130);
        fs::create_dir(&stale).unwrap();
        fs::write(stale.join(MODEL), "half").unwrap();
        for (step, no_exchange) in [(1, false), (2, false), (3, true)] {
            let _without = no_exchange.then(faults::without_exchange);
            save_full(&dir, step).unwrap();
            assert_eq!(load(&dir).unwrap().state.step, step);
            assert_eq!(names(root.path()).len(), 1);
        }
    }
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
fn open_weights_stay_while_the_folder_is_replaced() {
    let (_root, dir) = temp();
    save_full(&dir, 1).unwrap();
    let before = load(&dir).unwrap();
    let checkpoint = Checkpoint::open(&dir).unwrap();
    let opened = checkpoint.tensors(1).unwrap();
    let toy = Toy::new(&config(), |_, _| 0.25);
    save(&dir, &config(), &toy, None).unwrap();

    // One save's parts belong together, even those not yet read.
    assert_eq!(checkpoint.state().unwrap(), state(1));
    assert_eq!(load_model(&checkpoint).unwrap(), (before.config, before.weights.clone()));
    let mut values = Vec::new();
    opened.read("transformer.wte.weight", &[11, 4], &FLOATS, &mut values).unwrap();
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

/// Runs a test that asks for locks of its own thread to be gone in a process of its own, and says
/// whether this is that process: one that another test starts or forks meanwhile has our open files
/// and their locks until it is another program or ends.
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
    let part = TrainerPart { state: &state(step), states: &[&toy, &toy], others: &[] };
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
        check_kills(way, root.path(), &dir);
    }
}

/// Kills a process that saves to `dir`, the only thing in `root`, again and again.
fn check_kills(way: Way, root: &Path, dir: &Path) {
    let kills = std::env::var("MXT_TEST_KILLS").map_or(20, |kills| kills.parse().unwrap());
    save_uniform(dir, 0).unwrap();
    let mut last = 0;
    for round in 0..kills {
        let mut child = Command::new(std::env::current_exe().unwrap());
        child
            .args(["--exact", "checkpoint::tests::folder::saves_until_killed"])
            .env(SAVE_TO, dir)
            .env(WAY, format!("{way:?}"));
        child.stdout(Stdio::null()).stderr(Stdio::null());
        let mut child = child.spawn().unwrap();
        // Readers see whole checkpoints all the while. The end comes some time after a save that is
        // done.
        let mut end = None;
        while end.is_none_or(|end| Instant::now() < end) {
            assert!(child.try_wait().unwrap().is_none(), "the child failed");
            if load(dir).unwrap().state.step > last && end.is_none() {
                end = Some(Instant::now() + Duration::from_micros(round * 7919 % 20_000));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        child.kill().unwrap();
        child.wait().unwrap();

        let loaded = load(dir).unwrap();
        let step = loaded.state.step;
        assert!(step > last);
        last = step;
        let expected = (step as f32).to_bits();
        let mut values = loaded.weights.iter().chain(&loaded.states).flatten();
        assert!(values.all(|&value| value == expected), "step {step}");
    }
    save_uniform(dir, last + 1).unwrap();
    assert_eq!(load(dir).unwrap().state.step, last + 1);
    way.check_all_is_there(root, dir);
    println!("{way:?}: {last} saves and {kills} kills");
}

/// Where a folder of a lower layer can be neither exchanged nor renamed. In a mount namespace of
/// its own, which goes with its process, so that nothing stays mounted.
#[test]
fn a_checkpoint_of_a_lower_layer_is_replaced() {
    const NAME: &str = "checkpoint::tests::folder::a_checkpoint_of_a_lower_layer_is_replaced";
    const LAYERS: &str = "MXT_TEST_LAYERS";
    if let Some(root) = std::env::var_os(LAYERS) {
        for way in [Way::Exchange, Way::Files, Way::InPlace] {
            let layers = TempDir::new_in(&root).unwrap();
            if !check_layers(way, layers.path()) {
                println!("skipped: no overlay that renames folders can be mounted here");
                return;
            }
        }
        println!("done");
        return;
    }
    let (root, dir) = Way::Exchange.checkpoint();
    fs::remove_dir_all(dir).unwrap();
    // Anyone is root among users of one's own, where the system lets one.
    for options in [&["--mount"][..], &["--mount", "--map-root-user"]] {
        let child = Command::new("unshare")
            .args(options)
            .arg(std::env::current_exe().unwrap())
            .args(["--nocapture", "--exact", NAME])
            .env(LAYERS, root.path())
            .output();
        let Ok(child) = child else { break };
        let text = String::from_utf8_lossy(&child.stdout);
        if text.contains("running 1 test") {
            let errors = String::from_utf8_lossy(&child.stderr);
            assert!(child.status.success(), "{text}{errors}");
            println!("{text}");
            return;
        }
    }
    println!("skipped: no mount namespace can be made here");
}

/// False where no overlay can be made of what is in `root`.
fn check_layers(way: Way, root: &Path) -> bool {
    let below = |name: &str| root.join(name).into_os_string().into_string().unwrap();
    for name in ["lower", "upper", "work", "merged"] {
        fs::create_dir(below(name)).unwrap();
    }
    way.checkpoint_in(&root.join("lower"));
    let layers = ["lower", "upper", "work"].map(|name| format!("{name}dir={}", below(name)));
    let layers = layers.join(",");
    let (merged, dir) = (root.join("merged"), root.join("merged/run"));
    let is_mounted = [layers.clone(), layers + ",userxattr"].into_iter().any(|options| {
        let mut mount = Command::new("mount");
        mount.args(["-t", "overlay", "overlay", "-o", &options, &below("merged")]);
        if !mount.stderr(Stdio::null()).status().is_ok_and(|status| status.success()) {
            return false;
        }
        // Without attributes of its own an overlay renames no folder, and nothing is saved.
        let (probe, renamed) = (dir.join("probe"), dir.join("renamed"));
        fs::create_dir(&probe).unwrap();
        let is_renamed = fs::rename(&probe, &renamed).is_ok();
        fs::remove_dir(if is_renamed { renamed } else { probe }).unwrap();
        is_renamed || !unmount(&merged)
    });
    if !is_mounted {
        return false;
    }
    check_kills(way, &merged, &dir);
    assert_eq!(load(&root.join("lower/run")).unwrap().state.step, 1);
    assert!(unmount(&merged));
    true
}

fn unmount(path: &Path) -> bool {
    Command::new("umount").arg(path).status().is_ok_and(|status| status.success())
}

/// The ways in which a folder is replaced.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Way {
    Exchange,
    NoExchange,
    /// Files of others are in it.
    Files,
    /// A folder of others is in it, which never was elsewhere.
    InPlace,
}

impl Way {
    const ALL: [Self; 4] = [Self::Exchange, Self::NoExchange, Self::Files, Self::InPlace];

    /// A checkpoint of step 1 in memory, as hundreds of saves wait for a disk for minutes.
    fn checkpoint(self) -> (TempDir, PathBuf) {
        let in_memory = Path::new("/dev/shm");
        let root = if in_memory.is_dir() { TempDir::new_in(in_memory) } else { TempDir::new() };
        let root = root.unwrap();
        let dir = self.checkpoint_in(root.path());
        (root, dir)
    }

    fn checkpoint_in(self, root: &Path) -> PathBuf {
        let dir = root.join("run");
        save_full(&dir, 1).unwrap();
        if self.has_files() {
            fs::write(dir.join("tokenizer.json"), "{}").unwrap();
            std::os::unix::fs::symlink("nowhere", dir.join("link")).unwrap();
        }
        if self == Self::InPlace {
            fs::create_dir(dir.join("samples")).unwrap();
            fs::write(dir.join("samples/1.txt"), "once").unwrap();
        }
        dir
    }

    fn has_files(self) -> bool {
        matches!(self, Self::Files | Self::InPlace)
    }

    /// The checkpoint and what others had in it, and nothing of ours besides.
    fn check_all_is_there(self, root: &Path, dir: &Path) {
        assert_eq!(names(root), ["run"]);
        let mut all = vec![CONFIG, MODEL, STATE, MOMENTS];
        if self.has_files() {
            all.extend(["link", "tokenizer.json"]);
            assert_eq!(fs::read_to_string(dir.join("tokenizer.json")).unwrap(), "{}");
            assert_eq!(fs::read_link(dir.join("link")).unwrap(), Path::new("nowhere"));
        }
        if self == Self::InPlace {
            all.push("samples");
            assert_eq!(fs::read_to_string(dir.join("samples/1.txt")).unwrap(), "once");
        }
        all.sort_unstable();
        assert_eq!(names(dir), all);
    }
}

/// Whichever file operation of a save fails, and in whatever way: the checkpoint is whole, old or
/// new; a save that says it was done was, one that was done but for its end says so; and the next
/// one puts everything right.
#[test]
fn a_failure_of_any_operation_leaves_a_whole_checkpoint() {
    if !is_alone("a_failure_of_any_operation_leaves_a_whole_checkpoint") {
        return;
    }
    use libc::{EACCES, EINTR, EINVAL, EIO, ENOSPC, ENOSYS, EROFS, EXDEV};
    let all = [ENOSPC, EXDEV, EINTR, EIO, EACCES, EROFS, ENOSYS, EINVAL];
    for way in Way::ALL {
        // Most of what they do is the same.
        let codes = if way == Way::Exchange || way == Way::Files { &all[..] } else { &all[..3] };
        for &code in codes {
            let _without = (way == Way::NoExchange).then(faults::without_exchange);
            let (mut failed, mut operations) = (0, 1);
            loop {
                let (root, dir) = way.checkpoint();
                let error = move || Err(io::Error::from_raw_os_error(code));
                let fault = faults::at(operations, error);
                let result = save_full(&dir, 2);
                let was_reached = fault.end();
                let step = load(&dir).unwrap().state.step;
                let what = format!("{way:?} {code} {operations}");
                match &result {
                    Ok(()) => assert_eq!(step, 2, "{what}"),
                    Err(error) => {
                        let says_new =
                            error.to_string().contains("the new checkpoint is in its pl");
                        assert_eq!(says_new, step == 2, "{what}: {error}");
                    }
                }
                failed += u32::from(result.is_err());
                save_full(&dir, 3).unwrap();
                assert_eq!(load(&dir).unwrap().state.step, 3);
                way.check_all_is_there(root.path(), &dir);
                if !was_reached {
                    break;
                }
                operations += 1;
            }
            // A signal that comes is no failure at all.
            let is_right = if code == EINTR { failed == 0 } else { failed > 15 };
            assert!(is_right, "{way:?} {code}: {failed} of {operations} operations failed");
        }
    }
}

/// A file that others put into the folder by renaming it, whatever a save is doing just then, is
/// there afterwards and holds what they wrote: one of a name that was there, and a new one.
#[test]
fn what_others_write_at_any_moment_stays() {
    for way in Way::ALL {
        let _without = (way == Way::NoExchange).then(faults::without_exchange);
        for name in ["tokenizer.json", "late"] {
            for operation in 1.. {
                let (root, dir) = way.checkpoint();
                let (new, place) = (root.path().join("new"), dir.join(name));
                let replace = {
                    let place = place.clone();
                    move || {
                        fs::write(&new, "theirs").unwrap();
                        fs::rename(&new, &place)
                    }
                };
                let fault = faults::at(operation, replace);
                save_full(&dir, 2).unwrap();
                if !fault.end() {
                    assert!(operation > 30, "{operation}");
                    break;
                }
                let what = format!("{way:?} {name} {operation}");
                assert_eq!(fs::read_to_string(&place).unwrap(), "theirs", "{what}");
                assert_eq!(load(&dir).unwrap().state.step, 2);
                assert_eq!(names(root.path()), ["run"]);
                let others = names(&dir).len() - FILES.len();
                let expected = match way {
                    Way::Exchange | Way::NoExchange => 1,
                    Way::Files => 2 + usize::from(name == "late"),
                    Way::InPlace => 3 + usize::from(name == "late"),
                };
                assert_eq!(others, expected, "{what}: {:?}", names(&dir));
            }
        }
    }
}

/// As above, without an order: a thread saves while this one replaces files and reads each at once.
#[test]
fn files_of_others_are_never_put_back() {
    let (root, dir) = Way::Exchange.checkpoint();
    let end = std::sync::atomic::AtomicBool::new(false);
    let relaxed = std::sync::atomic::Ordering::Relaxed;
    std::thread::scope(|scope| {
        let saving = scope.spawn(|| {
            let mut step = 1;
            while !end.load(relaxed) || step < 20 {
                step += 1;
                save_full(&dir, step).unwrap();
            }
            step
        });
        for round in 0..200 {
            for file in 0..10 {
                let (new, place) = (root.path().join("new"), dir.join(format!("f{file}")));
                fs::write(&new, round.to_string()).unwrap();
                fs::rename(&new, &place).unwrap();
                // The very first one may come with an exchange, which moves it at once.
                let found = (0..1000).find_map(|_| fs::read_to_string(&place).ok());
                assert_eq!(found, Some(round.to_string()), "f{file}");
            }
            // Now and then there is nothing of others again.
            if round % 20 == 19 {
                (0..10).for_each(|file| fs::remove_file(dir.join(format!("f{file}"))).unwrap());
            }
        }
        end.store(true, relaxed);
        let step = saving.join().unwrap();
        assert_eq!(load(&dir).unwrap().state.step, step);
    });
    save_full(&dir, 1).unwrap();
    assert_eq!(names(&dir), [CONFIG, MODEL, STATE, MOMENTS]);
    assert_eq!(names(root.path()), ["run"]);
}

/// Whenever another save to the same folder comes and goes, which is new or holds a checkpoint,
/// both are done, and one of them is there.
#[test]
fn two_saves_at_once_are_both_done() {
    for is_new in [true, false] {
        for operation in 1.. {
            let (root, dir) = temp();
            if !is_new {
                save_full(&dir, 1).unwrap();
            }
            let other = {
                let dir = dir.clone();
                move || {
                    // Plans of this thread do not concern that one.
                    std::thread::spawn(move || save_full(&dir, 3)).join().unwrap().unwrap();
                    Ok(())
                }
            };
            let fault = faults::at(operation, other);
            save_full(&dir, 2).unwrap();
            if !fault.end() {
                assert!(operation > 20, "{operation}");
                break;
            }
            let step = load(&dir).unwrap().state.step;
            assert!(step == 2 || step == 3, "{is_new} {operation}");
            save_full(&dir, 4).unwrap();
            assert_eq!(names(&dir), [CONFIG, MODEL, STATE, MOMENTS]);
            assert_eq!(names(root.path()), ["run"], "{is_new} {operation}");
        }
    }
    // And where each waits for the other.
    let (root, dir) = Way::Files.checkpoint();
    std::thread::scope(|scope| {
        for first in [10, 1000] {
            let dir = &dir;
            scope.spawn(move || (first..first + 30).for_each(|step| save_full(dir, step).unwrap()));
        }
    });
    let step = load(&dir).unwrap().state.step;
    assert!(step == 39 || step == 1029, "{step}");
    save_full(&dir, 2).unwrap();
    Way::Files.check_all_is_there(root.path(), &dir);
}

/// Modes, and owners where one may give files away, are those of the files that are replaced.
#[test]
fn modes_and_owners_are_kept() {
    for way in Way::ALL {
        let _without = (way == Way::NoExchange).then(faults::without_exchange);
        let (_root, dir) = way.checkpoint();
        let set = |name: &str, mode: u32| {
            fs::set_permissions(dir.join(name), Permissions::from_mode(mode)).unwrap();
        };
        set(MODEL, 0o600);
        set(CONFIG, 0o664);
        set("", 0o2750);
        let given = chown(dir.join(MODEL), Some(12345), Some(54321)).is_ok();
        chown(dir.join(STATE), None, Some(54321)).ok();
        let seen = || {
            [MODEL, CONFIG, STATE, ""].map(|name| {
                let metadata = fs::metadata(dir.join(name)).unwrap();
                (metadata.mode(), metadata.uid(), metadata.gid())
            })
        };
        let before = seen();
        save_full(&dir, 2).unwrap();
        assert_eq!(seen(), before, "{way:?}");
        if !given {
            println!("modes only: not root");
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
                        fs::create_dir(&latecomer).unwrap();
                        fs::write(latecomer.join("note"), "late")
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
                    assert!(late == 0, "{way:?} {late} {operations}");
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
    let (root, dir) = temp();
    save_full(&dir, 1).unwrap();
    if chown(&dir, Some(12345), Some(54321)).is_err() {
        println!("skipped: not root");
        return;
    }
    save_full(&dir, 2).unwrap();
    let metadata = fs::metadata(&dir).unwrap();
    assert_eq!((metadata.uid(), metadata.gid()), (12345, 54321));
    assert_eq!(load(&dir).unwrap().state.step, 2);
    assert_eq!(names(root.path()), ["run"]);
}
