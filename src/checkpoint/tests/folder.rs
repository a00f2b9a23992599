//! Saving replaces the folder whole: what stays, what is refused, and what a kill leaves behind.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::*;

/// Set for a child process: the folder that it saves to until it is killed.
const SAVE_TO: &str = "MXT_TEST_SAVE_TO";

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

    fs::create_dir(dir.join("samples")).unwrap();
    let message = save_full(&dir, 9).unwrap_err().to_string();
    assert!(message.contains("found the folder \"samples\""), "{message}");
    assert_eq!(load(&dir).unwrap().state.step, 4);
    assert_eq!(names(root.path()), ["run", "shared"]);
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
        (Path::new("."), "this is the current folder"),
        (Path::new("/proc"), "this is a mount point"),
        (Path::new("/"), "this is a mount point"),
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

#[test]
fn leftovers_of_the_dead_are_removed_and_those_of_the_living_are_not() {
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
    for step in load(&dir).unwrap().state.step + 1.. {
        save_uniform(&dir, step).unwrap();
    }
}

#[test]
fn a_kill_at_any_instant_leaves_a_whole_checkpoint() {
    for exchange in [true, false] {
        let (root, dir) = temp();
        save_uniform(&dir, 0).unwrap();
        fs::write(dir.join("tokenizer.json"), "{}").unwrap();
        let mut last = 0;
        for round in 0..30u64 {
            let mut child = Command::new(std::env::current_exe().unwrap());
            child
                .args(["--exact", "checkpoint::tests::folder::saves_until_killed"])
                .env(SAVE_TO, &dir);
            if !exchange {
                child.env(NO_EXCHANGE, "1");
            }
            let mut child = child.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
            // Readers see whole checkpoints all the while.
            let end = Instant::now() + Duration::from_micros(10_000 + round * 7919 % 50_000);
            while Instant::now() < end {
                if exchange {
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
        assert_eq!(fs::read_to_string(dir.join("tokenizer.json")).unwrap(), "{}");
        assert_eq!(names(root.path()), ["run"]);
        println!("exchange {exchange}: {last} saves and 30 kills");
    }
}
