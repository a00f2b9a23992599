//! Every kind of damage and mix-up is an error that names file and tensor; none is a panic.

use std::os::unix::fs::FileExt;

use proptest::prelude::*;
use safetensors::SafeTensors;

use super::*;

#[test]
fn a_weight_that_is_not_finite_is_not_saved_and_not_loaded() {
    let (root, dir) = temp();
    save_full(&dir, 1).unwrap();
    let bad = Toy::new(&config(), |i, j| if (i, j) == (4, 3) { f32::NAN } else { 1.0 });
    let message = save(&dir, &config(), &bad, None).unwrap_err().to_string();
    assert!(
        message.contains("element 3 of tensor transformer.h.0.attn.c_attn.weight"),
        "{message}"
    );
    assert_eq!(load(&dir).unwrap().state.step, 1);
    assert_eq!(names(root.path()), ["run"]);

    foreign(&dir, Dtype::F32, |i| if i == 0 { f32::INFINITY } else { 1.0 });
    let message =
        load_weights(&dir, &infos(&config()), &mut |_, _| Ok(())).unwrap_err().to_string();
    assert!(message.contains("element 0 of tensor h.0.attn.c_attn.bias"), "{message}");
}

#[test]
fn another_shape_is_a_mismatch_that_names_the_tensor() {
    let (_root, dir) = temp();
    save_full(&dir, 1).unwrap();
    for (change, part) in [
        (
            ModelConfig { vocab_size: 12, ..config() },
            "wte.weight: expected shape [12, 4], found [11",
        ),
        (ModelConfig { layers: 1, ..config() }, "holds the tensor transformer.h.1."),
        (ModelConfig { layers: 3, ..config() }, "tensor transformer.h.2.ln_1.weight: missing"),
    ] {
        for error in [
            load_weights(&dir, &infos(&change), &mut |_, _| Ok(())).unwrap_err(),
            load_states(&dir, &infos(&change), &mut |_, _, _| Ok(())).unwrap_err(),
        ] {
            let message = error.to_string().replace("m.transformer", "transformer");
            assert!(message.contains(part), "{message}");
        }
    }
    // No tensor's shape tells the number of heads.
    let heads = ModelConfig { heads: 4, ..config() };
    fs::write(dir.join(CONFIG), config::to_json(&heads, None, StoredWeights::F32)).unwrap();
    let error = load(&dir).unwrap_err();
    assert!(matches!(error, Error::Mismatch { .. }), "{error}");
    assert!(error.to_string().contains("n_head=2 ") && error.to_string().contains("n_head=4 "));
}

#[test]
fn mixed_up_files_are_a_mismatch() {
    let (root, dir) = temp();
    save_full(&dir, 1).unwrap();
    let other = root.path().join("other");
    let toy = Toy::new(&config(), |_, _| 0.5);
    let part = TrainerPart { state: &state(1), states: &[&toy, &toy], others: &[] };
    save(&other, &config(), &toy, Some(part)).unwrap();
    for name in [MODEL, MOMENTS] {
        let own = fs::read(dir.join(name)).unwrap();
        fs::copy(other.join(name), dir.join(name)).unwrap();
        let error = load_state(&dir).unwrap_err();
        assert!(matches!(error, Error::Mismatch { .. }), "{error}");
        assert!(error.to_string().contains(&format!("belongs to another {name}")), "{error}");
        fs::write(dir.join(name), own).unwrap();
    }
    load(&dir).unwrap();
}

#[test]
fn every_region_of_damage_has_its_message() {
    let (_root, dir) = temp();
    save_full(&dir, 1).unwrap();
    let header = |bytes: &[u8]| 8 + u64::from_le_bytes(*bytes.first_chunk().unwrap()) as usize;
    let replace = |from: &'static str, to: &'static str| {
        move |bytes: &[u8]| String::from_utf8_lossy(bytes).replacen(from, to, 1).into_bytes()
    };
    type Change = Box<dyn Fn(&[u8]) -> Vec<u8>>;
    let cases: Vec<(&str, Change, &str)> = vec![
        (MODEL, Box::new(|_| vec![]), "found an empty one"),
        (MODEL, Box::new(|b| b[..5].to_vec()), "found only 5 bytes"),
        (MODEL, Box::new(|b| [&[255; 8], &b[8..]].concat()), "a header of 18446744073709551615"),
        (
            MODEL,
            Box::new(|b| [&[0, 0, 0, 1, 0, 0, 0, 0], &b[8..]].concat()),
            "is announced, the fil",
        ),
        (
            MODEL,
            Box::new(|b| [&b[..8], b"]", &b[9..]].concat()),
            "invalid JSON in header: expected",
        ),
        (MODEL, Box::new(|b| [&b[..9], &[255], &b[10..]].concat()), "invalid UTF-8 in header"),
        (
            MODEL,
            Box::new(|b| b[..b.len() - 1].to_vec()),
            "tensor transformer.ln_f.bias is the first",
        ),
        (
            MODEL,
            Box::new(move |b| b[..header(b) + 7].to_vec()),
            "tensor transformer.wte.weight is the first that is cut",
        ),
        (MODEL, Box::new(|b| [b, &[0]].concat()), "bytes, found"),
        (
            MODEL,
            Box::new(move |b| {
                let mut b = b.to_vec();
                let at = header(&b) + 44 * 4 + 1;
                b[at] ^= 4;
                b
            }),
            "tensor transformer.wpe.weight: damaged: expected CRC-32",
        ),
        (CONFIG, Box::new(|b| b[..b.len() / 2].to_vec()), "EOF while parsing"),
        (CONFIG, Box::new(replace("\"n_head\"", "\"n_hat\"")), "n_head: expected a whole number"),
        (STATE, Box::new(|b| b[..b.len() / 2].to_vec()), "EOF while parsing a"),
        (STATE, Box::new(replace("\"seed\"", "\"sled\"")), "unknown field `sled`"),
        (STATE, Box::new(replace("\"step\": 1,", "")), "missing field `step` at line"),
        (STATE, Box::new(replace("\"step\": 1", "\"step\": 2")), "damaged or edited: expected CRC"),
        (STATE, Box::new(replace("\"version\": 1", "\"version\": 9")), "a newer library wrote it"),
        (STATE, Box::new(replace("\"version\": 1", "\"version\": 0")), "found version 0"),
        (MOMENTS, Box::new(|b| b[..b.len() - 1].to_vec()), "v.transformer.ln_f.bias is the first"),
    ];
    for (name, change, part) in cases {
        let sound = fs::read(dir.join(name)).unwrap();
        fs::write(dir.join(name), change(&sound)).unwrap();
        let message = failure(&dir, name);
        assert!(message.contains(part), "{name}: {message}");
        fs::write(dir.join(name), sound).unwrap();
    }
    for (name, part) in [
        (CONFIG, "found no config.json"),
        (MODEL, "found no model.safetensors"),
        (STATE, "without its training state"),
    ] {
        let sound = fs::read(dir.join(name)).unwrap();
        fs::remove_file(dir.join(name)).unwrap();
        let message = load(&dir).unwrap_err().to_string();
        assert!(message.contains(part), "{name}: {message}");
        fs::create_dir(dir.join(name)).unwrap();
        assert!(failure(&dir, name).contains("found a folder"));
        fs::remove_dir(dir.join(name)).unwrap();
        fs::write(dir.join(name), sound).unwrap();
    }
    load(&dir).unwrap();
    let missing = load(&dir.join("missing")).unwrap_err();
    assert!(matches!(missing, Error::Io { action: "open", .. }), "{missing}");
}

#[test]
fn a_header_entry_that_describes_no_tensor_is_named() {
    let (_root, dir) = temp();
    save_full(&dir, 1).unwrap();
    let sound = fs::read(dir.join(MODEL)).unwrap();
    let (length, rest) = sound.split_first_chunk().unwrap();
    let (header, data) = rest.split_at(u64::from_le_bytes(*length) as usize);
    let header = std::str::from_utf8(header).unwrap();
    let entry = header.find("\"transformer.wpe.weight\":").unwrap();
    for (from, to, part) in [
        ("\"F32\"", "\"F64\"", "F64 of shape ["),
        ("\"F32\"", "\"F4\"", "F4 of shape ["),
        ("\"F32\"", "\"G32\"", "unknown variant `G32`"),
        ("\"shape\":[", "\"shape\":[3,", "of shape [3, "),
        ("\"shape\":[", "\"shape\":[18446744073709551615,", "of shape [18446744073709551615, "),
        ("\"shape\":[", "\"shape\":[-1,", "invalid value: integer `-1`"),
        ("\"shape\"", "\"shade\"", "missing field `shape`"),
    ] {
        let text = header[..entry].to_owned() + &header[entry..].replacen(from, to, 1);
        let bytes = [&(text.len() as u64).to_le_bytes(), text.as_bytes(), data].concat();
        fs::write(dir.join(MODEL), bytes).unwrap();
        let message = failure(&dir, MODEL);
        assert!(message.contains("damaged header: tensor transformer.wpe.weight: "), "{message}");
        assert!(message.contains(part), "{message}");
    }
}

#[test]
fn an_edit_that_was_meant_is_accepted_once_the_checksum_is_removed() {
    let (_root, dir) = temp();
    save_full(&dir, 1).unwrap();
    let text = fs::read_to_string(dir.join(STATE)).unwrap();
    let mut lines: Vec<_> = text.lines().filter(|line| !line.contains("\"crc32\"")).collect();
    let last = lines.len() - 2;
    assert_eq!(lines[last], "  },");
    lines[last] = "  }";
    let text = lines.join("\n").replace("\"step\": 1", "\"step\": 40");
    fs::write(dir.join(STATE), &text).unwrap();
    assert_eq!(load(&dir).unwrap().state, state(40));
    fs::write(dir.join(STATE), text.replace("\"batch_size\": 3", "\"batch_size\": 0")).unwrap();
    assert!(failure(&dir, STATE).contains("batch_size: expected a number from 1"));
    let ahead = text.replace("\"schedule_start\": 1", "\"schedule_start\": 41");
    fs::write(dir.join(STATE), ahead).unwrap();
    assert!(failure(&dir, STATE).contains("schedule_start: expected at most the step, 40"));
    // A step after which the arithmetic of the next one would overflow.
    for step in [u64::MAX, 1 << 61] {
        fs::write(dir.join(STATE), text.replace("\"step\": 40", &format!("\"step\": {step}")))
            .unwrap();
        assert!(failure(&dir, STATE).contains("step: expected a number that a run can reach"));
    }
}

/// Without its checksums a file is that of another program, and is not checked.
#[test]
fn checksums_do_not_get_lost() {
    let (_root, dir) = temp();
    save_full(&dir, 1).unwrap();
    let mut bytes = fs::read(dir.join(MODEL)).unwrap();
    let key = b"mxfp4train.crc32";
    let at = bytes.windows(key.len()).position(|part| part == key).unwrap();
    for i in 0..key.len() {
        bytes[at + i] ^= 1;
        fs::write(dir.join(MODEL), &bytes).unwrap();
        let result = Checkpoint::open(&dir).and_then(|c| load_model(&c));
        let message = result.map(drop).unwrap_err().to_string();
        assert!(message.contains("the checksums of its tensors stand under"), "{message}");
        bytes[at + i] ^= 1;
    }
}

/// What a load of damaged files may give: an error, or exactly what was saved.
fn check_damage(dir: &Path, sound: &Loaded) {
    if let Ok(loaded) = load(dir) {
        assert_eq!(&loaded, sound);
    }
    if let Ok((config, weights)) = Checkpoint::open(dir).and_then(|c| load_model(&c)) {
        assert_eq!((&config, &weights), (&sound.config, &sound.weights));
    }
}

#[test]
fn no_single_flipped_bit_goes_unnoticed() {
    let (_root, dir) = temp();
    save_full(&dir, 1).unwrap();
    let sound = load(&dir).unwrap();
    for name in FILES {
        let bytes = fs::read(dir.join(name)).unwrap();
        let file = fs::OpenOptions::new().write(true).open(dir.join(name)).unwrap();
        for (i, byte) in bytes.iter().enumerate() {
            file.write_all_at(&[byte ^ 1 << (i % 8)], i as u64).unwrap();
            check_damage(&dir, &sound);
            file.write_all_at(&[*byte], i as u64).unwrap();
        }
    }
}

proptest! {
    #[test]
    fn no_damage_panics_or_goes_unnoticed(
        file in 0usize..4,
        flips in prop::collection::vec((any::<prop::sample::Index>(), 1u8..), 0..4),
        length in prop::option::of(any::<prop::sample::Index>()),
        tail in prop::collection::vec(any::<u8>(), 0..20),
    ) {
        let (_root, dir) = temp();
        save_full(&dir, 1).unwrap();
        let sound = load(&dir).unwrap();
        let path = dir.join(FILES[file]);
        let mut bytes = fs::read(&path).unwrap();
        for (at, mask) in flips {
            let at = at.index(bytes.len());
            bytes[at] ^= mask;
        }
        if let Some(length) = length {
            bytes.truncate(length.index(bytes.len()));
            bytes.extend(tail);
        }
        fs::write(&path, &bytes).unwrap();
        check_damage(&dir, &sound);
    }
}

/// Floats that have one scale are told from codes by their number format; and none is taken that
/// stands for no number.
#[test]
fn states_with_a_scale_are_read_and_bad_ones_refused() {
    let (_root, dir) = temp();
    save_full(&dir, 1).unwrap();
    let path = dir.join(MOMENTS);
    let whole = fs::read(&path).unwrap();
    let wte = "transformer.wte.weight";
    let one = |scale: f32| (Dtype::F32, vec![1], scale.to_le_bytes().to_vec());
    // Read anew from a file without checksums, in which these stand for the state of `wte`.
    let read = |state: &str, dtype: Dtype, codes: Vec<u8>, scales: (Dtype, Vec<usize>, Vec<u8>)| {
        let tensors = SafeTensors::deserialize(&whole).unwrap();
        let name = format!("{state}.{wte}");
        let mut all: Vec<_> = tensors
            .tensors()
            .into_iter()
            .filter(|(known, _)| *known != name)
            .map(|(name, view)| (name, (view.dtype(), view.shape().to_vec(), view.data().to_vec())))
            .collect();
        all.push((format!("{name}{CODES}"), (dtype, vec![11, 4], codes)));
        all.push((format!("{name}{SCALES}"), scales));
        let views = all.iter().map(|(name, (dtype, shape, bytes))| {
            (name, TensorView::new(*dtype, shape.clone(), bytes).unwrap())
        });
        fs::write(&path, serialize(views, None).unwrap()).unwrap();
        let mut found = Vec::new();
        load_states(&dir, &infos(&config()), &mut |_, _, values| {
            if let StateValues::Scaled { numbers, scale } = values {
                found.push((numbers.to_vec(), scale));
            }
            Ok(())
        })?;
        Ok::<_, Error>(found)
    };
    let codes: Vec<u8> = (0..44).map(|i| if i % 2 == 0 { 0x40 + i } else { 0xb0 - i }).collect();
    let found = read("m", Dtype::F8_E4M3, codes.clone(), one(0.25)).unwrap();
    let [(numbers, scale)] = &found[..] else { panic!("{found:?}") };
    assert_eq!((&numbers[..3], *scale), (&[2.0, -0.46875, 2.5][..], 0.25));
    let halves: Vec<u8> = (0..44).flat_map(|i| [i, 0x3c]).collect();
    let found = read("v", Dtype::F16, halves.clone(), one(0.0)).unwrap();
    let [(numbers, scale)] = &found[..] else { panic!("{found:?}") };
    assert_eq!((&numbers[..2], *scale), (&[1.0, 1.0 + 1.0 / 1024.0][..], 0.0));

    let with = |bytes: &[u8], at: usize, bad: u8| {
        let mut bytes = bytes.to_vec();
        bytes[at] = bad;
        bytes
    };
    let two = (Dtype::F32, vec![2], vec![0; 8]);
    let groups = |scales: [f32; 2]| {
        (Dtype::F32, vec![2], scales.into_iter().flat_map(f32::to_le_bytes).collect())
    };
    assert!(read("m", Dtype::I8, vec![0x81; 44], groups([1.0, 2.0])).is_ok());
    for (state, dtype, codes, scales, part) in [
        (
            "m",
            Dtype::F8_E4M3,
            with(&codes, 3, 0x7f),
            one(0.25),
            "element 3 of tensor m.transformer",
        ),
        (
            "m",
            Dtype::F8_E4M3,
            with(&codes, 7, 0xff),
            one(0.25),
            "element 7 of tensor m.transformer",
        ),
        ("v", Dtype::F16, with(&halves, 5, 0x7c), one(1.0), "element 2 of tensor v.transformer"),
        ("m", Dtype::F8_E4M3, codes.clone(), one(0.3), ".scales a power of two, or 0"),
        ("m", Dtype::F8_E4M3, codes.clone(), one(-0.25), "found -2.5e-1; restore the file"),
        ("v", Dtype::F16, halves.clone(), one(1e-40), ".scales a power of two, or 0"),
        ("v", Dtype::F16, halves.clone(), one(f32::NAN), "element 0 of tensor v.transformer"),
        ("v", Dtype::F16, halves.clone(), two, ".scales: expected shape [1], found [2]"),
        ("m", Dtype::F16, halves, one(1.0), "expected I8 or F8_E4M3, found F16"),
        ("v", Dtype::F8_E4M3, codes, one(1.0), "expected U8 or F16, found F8_E4M3"),
        ("m", Dtype::I8, with(&[1; 44], 9, 0x80), groups([1.0, 2.0]), "from -127 on, found -128"),
        ("m", Dtype::I8, vec![1; 44], groups([1.0, -2.0]), ".scales from 0 on, found -2e0"),
        ("v", Dtype::U8, vec![1; 44], groups([-1.0, 2.0]), ".scales from 0 on, found -1e0"),
    ] {
        let message = read(state, dtype, codes, scales).unwrap_err().to_string();
        assert!(message.contains(part), "{part}: {message}");
    }
    // Both forms of one state.
    let tensors = SafeTensors::deserialize(&whole).unwrap();
    let codes = [[1; 44].to_vec(), [0; 8].to_vec()];
    let added = [
        (CODES, TensorView::new(Dtype::I8, vec![11, 4], &codes[0]).unwrap()),
        (SCALES, TensorView::new(Dtype::F32, vec![2], &codes[1]).unwrap()),
    ];
    let added = added.map(|(part, view)| (format!("m.{wte}{part}"), view));
    let all = tensors.tensors().into_iter().chain(added);
    fs::write(&path, serialize(all, None).unwrap()).unwrap();
    let read = load_states(&dir, &infos(&config()), &mut |_, _, _| Ok(()));
    let message = read.unwrap_err().to_string();
    assert!(
        message.contains(&format!("expected m.{wte}.codes or m.{wte}, found both")),
        "{message}"
    );
}
