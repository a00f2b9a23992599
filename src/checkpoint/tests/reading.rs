//! Files are read, not mapped: what is cut short, or is no file, is an error and is not waited for.

use std::os::unix::net::UnixListener;

use super::*;
use crate::checkpoint::tensors::TensorFile;

/// More than two pieces of every type, and no whole number of them.
const ELEMENTS: usize = 200_003;

/// A number that all four types hold.
fn number(i: usize) -> f32 {
    (i % 251) as f32 - 125.0
}

fn bytes_of(dtype: Dtype) -> Vec<u8> {
    let values = (0..ELEMENTS).map(number);
    match dtype {
        Dtype::F32 => values.flat_map(f32::to_le_bytes).collect(),
        Dtype::F16 => values.flat_map(|v| half::f16::from_f32(v).to_le_bytes()).collect(),
        Dtype::BF16 => values.flat_map(|v| half::bf16::from_f32(v).to_le_bytes()).collect(),
        _ => values.flat_map(|v| f64::from(v).to_le_bytes()).collect(),
    }
}

#[test]
fn tensors_of_many_pieces_are_read_whole() {
    let (root, _) = temp();
    let path = root.path().join(MODEL);
    let types = [Dtype::F32, Dtype::F16, Dtype::BF16, Dtype::F64];
    let bytes = types.map(bytes_of);
    let mut other = bytes[1].clone();
    *other.last_mut().unwrap() ^= 1;
    let names = types.map(|dtype| dtype.to_string());
    let mut tensors: Vec<_> = (0..4).map(|i| (&*names[i], types[i], &bytes[i])).collect();
    tensors.push(("other", Dtype::F16, &other));
    let views = tensors.iter().map(|(name, dtype, bytes)| {
        (*name, TensorView::new(*dtype, vec![ELEMENTS], bytes).unwrap())
    });
    fs::write(&path, serialize(views, None).unwrap()).unwrap();

    let file = OpenFile::Disk(File::open(&path).unwrap());
    let file = TensorFile::open(&path, &file).unwrap();
    let mut values = Vec::new();
    for name in &names {
        file.read(name, &[ELEMENTS], &FLOATS, &mut values).unwrap();
        assert_eq!(values.len(), ELEMENTS, "{name}");
        assert!(values.iter().enumerate().all(|(i, &v)| v == number(i)), "{name}");
        for another in &names {
            assert!(file.holds_same(name, &file, another).unwrap(), "{name} {another}");
        }
        assert!(!file.holds_same(name, &file, "other").unwrap(), "{name}");
    }
}

#[test]
fn a_file_that_is_cut_while_it_is_read_is_an_error() {
    let (_root, dir) = temp();
    let config = ModelConfig { vocab_size: 40_000, ..config() };
    let toy = Toy::new(&config, |i, j| i as f32 + (j % 100) as f32);
    let part = TrainerPart { state: &state(1), states: &[&toy, &toy], others: &[] };
    save(&dir, &config, &toy, Some(part)).unwrap();
    let infos = infos(&config);
    for (index, name, first) in [(1, MODEL, ""), (3, MOMENTS, "m.")] {
        let path = dir.join(name);
        let sound = fs::read(&path).unwrap();
        let cut = || File::options().write(true).open(&path).unwrap().set_len(9000).unwrap();
        let check_cut = |error: Error| {
            assert!(matches!(error, Error::Io { action: "read", .. }), "{error}");
            let message = error.to_string();
            assert!(message.contains(&*path.to_string_lossy()), "{message}");
            assert!(message.contains(": expected ") && message.contains("it ends"), "{message}");
        };
        // Between its header and a tensor.
        let checkpoint = Checkpoint::open(&dir).unwrap();
        let file = checkpoint.tensors(index).unwrap();
        cut();
        let first = format!("{first}{}", infos[0].name);
        check_cut(file.read(&first, &infos[0].shape, &FLOATS, &mut Vec::new()).unwrap_err());
        check_cut(file.holds_same(&first, &file, &first).unwrap_err());
        assert!(failure(&dir, name).contains("truncated: expected"));
        fs::write(&path, &sound).unwrap();
        // Between two tensors of a load.
        let checkpoint = Checkpoint::open(&dir).unwrap();
        let write = || {
            cut();
            Ok(())
        };
        let result = match index {
            1 => checkpoint.weights(&config, &infos, &mut |_, _| write()),
            _ => checkpoint.states(&kept(&state(1).options, &infos), &mut |_, _, _| write()),
        };
        check_cut(result.unwrap_err());
        fs::write(&path, &sound).unwrap();
    }
    load(&dir).unwrap();
}

/// What has the name of a file of a checkpoint and is none: the reason is said at once.
#[test]
fn what_is_no_file_is_refused_with_the_reason() {
    let (_root, dir) = temp();
    save_full(&dir, 1).unwrap();
    fs::copy(dir.join(CONFIG), dir.join(INDEX)).unwrap();
    for name in [CONFIG, MODEL, STATE, MOMENTS] {
        let path = dir.join(name);
        let sound = fs::read(&path).unwrap();
        for kind in ["folder", "pipe", "socket", "device"] {
            fs::remove_file(&path).unwrap();
            match kind {
                "folder" => fs::create_dir(&path).unwrap(),
                "pipe" => make_pipe(&path),
                "socket" => drop(UnixListener::bind(&path).unwrap()),
                _ => std::os::unix::fs::symlink("/dev/zero", &path).unwrap(),
            }
            let message = failure(&dir, name);
            assert!(message.contains(&format!("expected a file, found a {kind}")), "{message}");
            if kind == "folder" {
                fs::remove_dir(&path).unwrap();
                fs::write(&path, "").unwrap();
            }
        }
        fs::remove_file(&path).unwrap();
        fs::write(&path, sound).unwrap();
    }
    load(&dir).unwrap();

    // Nor is anything waited for that only makes a message better.
    fs::remove_file(dir.join(MODEL)).unwrap();
    fs::remove_file(dir.join(INDEX)).unwrap();
    make_pipe(&dir.join("adapter_config.json"));
    assert!(load(&dir).unwrap_err().to_string().contains("as PEFT has them"));
    make_pipe(&dir.join(INDEX));
    assert!(failure(&dir, INDEX).contains("found a pipe"));
}

/// Sizes that a small file announces, or that a file without content has, are not believed.
#[test]
fn what_is_too_large_is_refused_unread() {
    let (_root, dir) = temp();
    save_full(&dir, 1).unwrap();
    for name in [CONFIG, STATE] {
        let sound = fs::read(dir.join(name)).unwrap();
        File::options().write(true).open(dir.join(name)).unwrap().set_len(1 << 40).unwrap();
        assert!(failure(&dir, name).contains("expected JSON of at most"));
        fs::write(dir.join(name), sound).unwrap();
    }
    let mut bytes = fs::read(dir.join(MODEL)).unwrap();
    bytes[..8].copy_from_slice(&(MAX_JSON + 1).to_le_bytes());
    fs::write(dir.join(MODEL), bytes).unwrap();
    File::options().write(true).open(dir.join(MODEL)).unwrap().set_len(1 << 40).unwrap();
    assert!(failure(&dir, MODEL).contains("a header of 16777217 bytes is announced"));
}
