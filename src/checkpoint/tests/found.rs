//! Folders as other programs leave them: which are read as what, and what is said of the others.

use super::*;
const WTE: &str = "transformer.wte.weight";

/// A tensor of a file: its name, type, shape and bytes.
type Tensor = (String, Dtype, Vec<usize>, Vec<u8>);

fn f32s(name: &str, shape: &[usize], value: impl Fn(usize) -> f32) -> Tensor {
    let count = shape.iter().product();
    let bytes = (0..count).flat_map(|i: usize| value(i).to_le_bytes()).collect();
    (name.into(), Dtype::F32, shape.to_vec(), bytes)
}

fn named(name: &str, (_, dtype, shape, bytes): &Tensor) -> Tensor {
    (name.into(), *dtype, shape.clone(), bytes.clone())
}

/// A value for every element of every tensor.
fn value_of(tensor: usize, element: usize) -> f32 {
    tensor as f32 + element as f32 / 1024.0
}

/// All tensors of [`config`]'s model.
fn all() -> Vec<Tensor> {
    let named = |(i, info): (usize, &TensorInfo)| f32s(&info.name, &info.shape, |j| value_of(i, j));
    infos(&config()).iter().enumerate().map(named).collect()
}

fn write_file(path: &Path, tensors: &[Tensor]) {
    let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
        (name, TensorView::new(*dtype, shape.clone(), bytes).unwrap())
    });
    fs::write(path, serialize(views, None).unwrap()).unwrap();
}

/// A folder with one file of weights and this configuration.
fn write_folder(dir: &Path, tensors: &[Tensor], config: &ModelConfig) {
    fs::create_dir_all(dir).unwrap();
    fs::write(dir.join(CONFIG), config::to_json(config, None, StoredWeights::F32)).unwrap();
    write_file(&dir.join(MODEL), tensors);
}

/// The folder's weights in three files and an index, which `change` may change.
fn shard(dir: &Path, tensors: &[Tensor], change: impl Fn(&mut serde_json::Value)) {
    fs::create_dir_all(dir).unwrap();
    let _ = fs::remove_file(dir.join(MODEL));
    fs::write(dir.join(CONFIG), config::to_json(&config(), None, StoredWeights::F32)).unwrap();
    let mut places = serde_json::Map::new();
    for (i, part) in tensors.chunks(tensors.len().div_ceil(3)).enumerate() {
        let file = format!("model-0000{}-of-00003.safetensors", i + 1);
        write_file(&dir.join(&file), part);
        places.extend(part.iter().map(|(name, ..)| (name.clone(), file.clone().into())));
    }
    let mut index = serde_json::json!({"metadata": {"total_size": 1}, "weight_map": places});
    change(&mut index);
    fs::write(dir.join(INDEX), index.to_string()).unwrap();
}

fn model_of(dir: &Path) -> (ModelConfig, Vec<Vec<u32>>) {
    load_model(&Checkpoint::open(dir).unwrap()).unwrap()
}

fn error_of(dir: &Path) -> String {
    let error = Checkpoint::open(dir).and_then(|checkpoint| load_model(&checkpoint));
    let error = error.unwrap_err();
    assert!(matches!(error, Error::Format { .. } | Error::Mismatch { .. }), "{error:?}");
    error.to_string()
}

#[test]
fn several_files_and_an_index_are_one_model() {
    let (_root, dir) = temp();
    write_folder(&dir, &all(), &config());
    let expected = model_of(&dir);
    shard(&dir, &all(), |_| {});
    assert!(model_of(&dir) == expected);
    // Without the prefix, as well.
    let mut short = all();
    short.iter_mut().for_each(|tensor| tensor.0 = tensor.0.replace("transformer.", ""));
    shard(&dir, &short, |_| {});
    assert!(model_of(&dir) == expected);
    // One whole file is what counts where there are both.
    let other: Vec<_> = all().into_iter().map(|t| f32s(&t.0, &t.2, |_| 0.5)).collect();
    write_file(&dir.join(MODEL), &other);
    assert!(model_of(&dir).1.iter().flatten().all(|bits| *bits == 0.5f32.to_bits()));
}

#[test]
fn what_is_wrong_with_an_index_is_said() {
    let (_root, dir) = temp();
    let error = |change: &dyn Fn(&mut serde_json::Value)| {
        shard(&dir, &all(), change);
        error_of(&dir)
    };
    let third = "model-00003-of-00003.safetensors";
    let message = error(&|index| index["weight_map"][WTE] = "gone.safetensors".into());
    assert!(message.contains("names the file gone.safetensors") && message.contains(INDEX));
    assert!(message.contains("get all 4 files"), "{message}");
    for name in ["../model.safetensors", "/etc/passwd", "", "..", "a\0b"] {
        let message = error(&|index| index["weight_map"][WTE] = name.into());
        assert!(message.contains("names of files in its own folder"), "{message}");
    }
    let message = error(&|index| index["weight_map"][WTE] = third.into());
    assert!(message.contains(&format!("tensor {WTE}")) || message.contains("which the index"));
    let message = error(&|index| {
        index["weight_map"].as_object_mut().unwrap().remove("transformer.ln_f.bias");
    });
    assert!(message.contains("transformer.ln_f.bias"), "{message}");
    let message = error(&|index| index["weight_map"] = serde_json::json!({}));
    assert!(message.contains("expected 1 to 512 files, found 0"), "{message}");
    let message = error(&|index| index["weight_map"] = 3.into());
    assert!(message.contains("expected an index of tensors in JSON"), "{message}");

    shard(&dir, &all()[..20], |_| {});
    let message = error_of(&dir);
    assert!(message.contains("tensor transformer.h.1.ln_2.weight: missing"), "{message}");
    let mut more = all();
    more.push(f32s("transformer.h.9.ln_1.weight", &[4], |_| 1.0));
    shard(&dir, &more, |_| {});
    assert!(error_of(&dir).contains("holds the tensor transformer.h.9.ln_1.weight"));
    // A training state belongs to a file that a save has written.
    shard(&dir, &all(), |_| {});
    let error = load_state(&dir).unwrap_err().to_string();
    assert!(error.contains("without its training state"), "{error}");
    fs::write(dir.join(third), b"version https://git-lfs.github.com/spec/v1\nsize 9\n").unwrap();
    assert!(error_of(&dir).contains("Git LFS pointer, not the file of 9 bytes"));
}

#[test]
fn of_tied_weights_either_name_will_do() {
    let (_root, dir) = temp();
    write_folder(&dir, &all(), &config());
    let expected = model_of(&dir);
    let mut tensors = all();
    tensors[0].0 = HEAD.into();
    write_folder(&dir, &tensors, &config());
    assert!(model_of(&dir) == expected);
    shard(&dir, &tensors, |_| {});
    assert!(model_of(&dir) == expected);
    // Both, and the same: in one type, or in two that hold these values.
    let mut tensors = all();
    tensors.push(named(HEAD, &tensors[0]));
    write_folder(&dir, &tensors, &config());
    assert!(model_of(&dir) == expected);
    let wide = (0..44).flat_map(|j| f64::from(value_of(0, j)).to_le_bytes()).collect();
    *tensors.last_mut().unwrap() = (HEAD.into(), Dtype::F64, vec![11, 4], wide);
    write_folder(&dir, &tensors, &config());
    assert!(model_of(&dir) == expected);
}

#[test]
fn a_head_of_its_own_is_kept() {
    let (_root, dir) = temp();
    let mut tensors = all();
    tensors.push(f32s(HEAD, &[11, 4], |j| value_of(99, j)));
    let untied = ModelConfig { tied_head: false, ..config() };
    // Whatever the configuration says: transformers 4 wrote true, whether or not it was.
    for configured in [&config(), &untied] {
        write_folder(&dir, &tensors, configured);
        let (found, weights) = model_of(&dir);
        assert_eq!(found, untied);
        assert_eq!(weights.len(), tensors.len());
        assert_eq!(weights.last().unwrap()[5], value_of(99, 5).to_bits());
    }
    // One that is equal at first is one of its own where the configuration says so.
    tensors.pop();
    tensors.push(named(HEAD, &tensors[0]));
    write_folder(&dir, &tensors, &untied);
    assert_eq!(model_of(&dir).0, untied);
    tensors.pop();
    write_folder(&dir, &tensors, &untied);
    let message = error_of(&dir);
    assert!(message.contains("tensor lm_head.weight: missing; config.json says"), "{message}");
    // Neither of the two.
    write_folder(&dir, &tensors[1..], &config());
    assert!(error_of(&dir).contains(&format!("tensor {WTE}: missing")));
    tensors[0].0 = HEAD.into();
    write_folder(&dir, &tensors, &untied);
    assert!(error_of(&dir).contains(&format!("tensor {WTE}: missing")));
}

#[test]
fn numbers_beyond_f32_are_no_weights() {
    let (_root, dir) = temp();
    let mut tensors = all();
    let last = tensors.last_mut().unwrap();
    last.1 = Dtype::F64;
    last.3 = [1.0, -1e300, 0.5, 0.25].into_iter().flat_map(f64::to_le_bytes).collect();
    write_folder(&dir, &tensors, &config());
    let error = load_model(&Checkpoint::open(&dir).unwrap()).unwrap_err();
    assert!(matches!(error, Error::NotFinite { .. }), "{error:?}");
    assert!(error.to_string().contains("element 1 of tensor transformer.ln_f.bias"), "{error}");
    let last = tensors.last_mut().unwrap();
    (last.1, last.3) = (Dtype::I8, vec![0; 4]);
    write_folder(&dir, &tensors, &config());
    let message = error_of(&dir);
    assert!(message.contains("expected F32, F16, BF16 or F64, found I8"), "{message}");
}

#[test]
fn a_pointer_of_git_lfs_is_named() {
    let (_root, dir) = temp();
    save_full(&dir, 1).unwrap();
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 548105171\n";
    for name in FILES {
        let sound = fs::read(dir.join(name)).unwrap();
        fs::write(dir.join(name), pointer).unwrap();
        let message = failure(&dir, name);
        assert!(message.contains("pointer, not the file of 548105171 bytes"), "{message}");
        assert!(message.contains("`git lfs pull`"), "{message}");
        fs::write(dir.join(name), sound).unwrap();
    }
    fs::remove_file(dir.join(MODEL)).unwrap();
    fs::write(dir.join(INDEX), pointer).unwrap();
    assert!(failure(&dir, INDEX).contains("`git lfs pull`"));
    // Converting it would be the second thing to do.
    fs::remove_file(dir.join(INDEX)).unwrap();
    fs::write(dir.join("pytorch_model.bin"), pointer).unwrap();
    let message = error_of(&dir);
    assert!(message.contains("pytorch_model.bin: a Git LFS pointer"), "{message}");
}

/// As in a copy of Hugging Face's cache without the files that its links stand for.
#[test]
fn a_link_that_leads_nowhere_is_named() {
    let (_root, dir) = temp();
    let link = |name: &str| {
        let _ = fs::remove_file(dir.join(name));
        std::os::unix::fs::symlink("../../blobs/0af3", dir.join(name)).unwrap();
        let message = error_of(&dir);
        let expected = format!("{name}: a link to ../../blobs/0af3, which is not there");
        assert!(message.contains(&expected) && message.contains("cp -L"), "{message}");
    };
    write_folder(&dir, &all(), &config());
    link(MODEL);
    shard(&dir, &all(), |_| {});
    link("model-00002-of-00003.safetensors");
    link(INDEX);
    link(CONFIG);
}

#[test]
fn weights_in_other_formats_come_with_the_command_that_converts_them() {
    let (_root, dir) = temp();
    for (files, parts) in [
        (
            &["pytorch_model.bin", "optimizer.pt"][..],
            ["it has pytorch_model.bin", "AutoModelForCausalLM"],
        ),
        (
            &["pytorch_model.bin.index.json", "pytorch_model-00001-of-00002.bin"],
            ["convert it: run", "it has pytorch_model.bin.index.json"],
        ),
        (&["tf_model.h5"], ["from_tf=True", "below 5"]),
        (&["flax_model.msgpack"], ["from_flax=True", "below 5"]),
        (&["weights.pt"], ["torch.load('weights.pt'", "save_file"]),
        (&["it's $(x).pt"], ["it has it's $(x).pt", "torch.load('FILE'"]),
        (&["gpt2.safetensors"], ["it has gpt2.safetensors", "rename it to model.safetensors"]),
        (&["gpt2.gguf", "README.md"], ["it has gpt2.gguf", "as safetensors"]),
        (
            &["model-00001-of-00003.safetensors"],
            ["one of 3 files", "get model.safetensors.index.json, which"],
        ),
        (
            &["pytorch_model-00001-of-00002.bin"],
            ["one of 2 files", "get pytorch_model.bin.index.json, which"],
        ),
        (&["training_args.bin", "README.md"], ["found no model.safetensors", "get the files"]),
        (&[], ["found no model.safetensors", "get the files of the weights"]),
    ] {
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir(&dir).unwrap();
        fs::write(dir.join(CONFIG), config::to_json(&config(), None, StoredWeights::F32)).unwrap();
        for name in files {
            fs::write(dir.join(name), "x").unwrap();
        }
        let message = error_of(&dir);
        assert!(parts.iter().all(|part| message.contains(part)), "{files:?}: {message}");
    }
    // A model of another kind is told so, whatever its format.
    fs::write(dir.join("pytorch_model.bin"), "x").unwrap();
    fs::write(dir.join(CONFIG), r#"{"model_type": "opt"}"#).unwrap();
    assert!(error_of(&dir).contains("found \"opt\""));
    fs::remove_file(dir.join(CONFIG)).unwrap();
    assert!(error_of(&dir).contains("found no config.json"));
    let adapter = r#"{"base_model_name_or_path": "gpt2", "peft_type": "LORA"}"#;
    fs::write(dir.join("adapter_config.json"), adapter).unwrap();
    let message = error_of(&dir);
    assert!(
        message.contains("adapters for \"gpt2\" as PEFT has them")
            && message.contains("mxtrain export MODEL MERGED --lora")
    );
}
