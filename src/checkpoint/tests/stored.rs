//! Weights that are stored as other numbers than f32.

use safetensors::SafeTensors;

use super::*;
use crate::formats::{BLOCK, decode_e2m1, decode_e8m0, quantize_closest};

/// The tensors of a file: type, shape, bytes.
type Tensors = HashMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

/// A head of its own, and widths that no block divides.
fn odd() -> ModelConfig {
    ModelConfig { channels: 34, mlp_channels: 7, tied_head: false, ..config() }
}

/// Numbers of both signs and of several binades.
fn spread(config: &ModelConfig) -> Toy {
    Toy::new(config, |i, j| ((i * 31 + j * 17) as f32 * 0.7).sin() * 2f32.powi(j as i32 % 9 - 5))
}

fn save_as(dir: &Path, config: &ModelConfig, weights: &Toy, stored: StoredWeights) -> Result<()> {
    super::super::save(Place::Folder(dir), ModelPart { config, found: None, weights, stored }, None)
}

fn loaded(dir: &Path, config: &ModelConfig) -> Vec<Vec<f32>> {
    let mut all = Vec::new();
    let mut take = |_: usize, values: &[f32]| {
        all.push(values.to_vec());
        Ok(())
    };
    load_weights(dir, &infos(config), &mut take).unwrap();
    all
}

/// The weight of a linear layer, (outputs, inputs).
fn turned(values: &[f32], [inputs, outputs]: [usize; 2]) -> Vec<f32> {
    (0..outputs).flat_map(|o| (0..inputs).map(move |i| values[i * outputs + o])).collect()
}

/// In MXFP4 the weights of layers and of a head of its own are those of the closest blocks along
/// inputs; the rest is as it was. Saved again, the file is the same.
#[test]
fn weights_of_layers_become_the_closest_blocks() {
    let dir = TempDir::new().unwrap();
    let [first, second] = ["first", "second"].map(|name| dir.path().join(name));
    let (config, weights) = (odd(), spread(&odd()));
    save_as(&first, &config, &weights, StoredWeights::Mxfp4).unwrap();
    assert_eq!(load_config(&first).unwrap(), config);
    let found = loaded(&first, &config);
    let mut linears = 0;
    for ((info, values), found) in weights.infos.iter().zip(&weights.values).zip(&found) {
        let (is_linear, is_head) = (info.name.contains(".h."), info.name == HEAD);
        if info.shape.len() < 2 || !(is_linear || is_head) {
            assert_eq!(values, found, "{}", info.name);
            continue;
        }
        linears += 1;
        let shape = [info.shape[0], info.shape[1]];
        let ([values, found], inputs) = match is_head {
            true => ([values.clone(), found.clone()], shape[1]),
            false => ([values, found].map(|values| turned(values, shape)), shape[0]),
        };
        for (values, found) in values.chunks(inputs).zip(found.chunks(inputs)) {
            for (values, found) in values.chunks(BLOCK).zip(found.chunks(BLOCK)) {
                let mut block = [0.0; BLOCK];
                block[..values.len()].copy_from_slice(values);
                let (scale, codes) = quantize_closest(&block);
                for (code, found) in codes.iter().zip(found) {
                    assert_eq!(decode_e2m1(*code) * decode_e8m0(scale), *found, "{}", info.name);
                }
            }
        }
    }
    assert_eq!(linears, 4 * config.layers + 1);
    let again = Toy { infos: infos(&config), values: found };
    save_as(&second, &config, &again, StoredWeights::Mxfp4).unwrap();
    let [first, second] = [first, second].map(|dir| fs::read(dir.join(MODEL)).unwrap());
    assert!(first == second);
}

/// By hand: 7.9 and -4 of output 0 by the scale 2, which 7.9 asks for, are 8 and -4, the codes 6 and
/// 4 with a sign; 0.5 and 1 of output 1 by the scale 1/4 are 2 and 4 of these, the codes 4 and 6.
#[test]
fn codes_and_scales_are_as_the_form_says() {
    let dir = TempDir::new().unwrap();
    let config = ModelConfig { layers: 1, heads: 1, channels: 2, ..config() };
    let projection = "transformer.h.0.attn.c_proj.weight";
    let mut weights = Toy::new(&config, |_, _| 1.0);
    let at = weights.infos.iter().position(|info| info.name == projection).unwrap();
    // (inputs, outputs)
    weights.values[at] = vec![7.9, 0.5, -4.0, 1.0];
    save_as(dir.path(), &config, &weights, StoredWeights::Mxfp4).unwrap();
    let bytes = fs::read(dir.path().join(MODEL)).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let codes = file.tensor(projection).unwrap();
    assert_eq!((codes.dtype(), codes.shape()), (Dtype::F4, &[2, BLOCK][..]));
    let mut expected = [0; BLOCK];
    (expected[0], expected[16]) = (0x06 | 0x0c << 4, 0x04 | 0x06 << 4);
    assert_eq!(codes.data(), expected);
    let scales = file.tensor(&format!("{projection}.scales")).unwrap();
    assert_eq!((scales.dtype(), scales.shape()), (Dtype::F8_E8M0, &[2, 1][..]));
    assert_eq!(scales.data(), [128, 125]);
    assert_eq!(file.tensor("transformer.wte.weight").unwrap().dtype(), Dtype::F32);
    assert!(file.tensor("transformer.wte.weight.scales").is_err());
    assert_eq!(loaded(dir.path(), &config)[at], [8.0, 0.5, -4.0, 1.0]);
}

#[test]
fn halves_are_to_nearest_and_what_they_lack_is_refused() {
    let dir = TempDir::new().unwrap();
    let dir = dir.path().join("model");
    for (stored, dtype, name) in [
        (StoredWeights::F16, Dtype::F16, "float16"),
        (StoredWeights::Bf16, Dtype::BF16, "bfloat16"),
        (StoredWeights::F32, Dtype::F32, "float32"),
    ] {
        let weights = spread(&odd());
        save_as(&dir, &odd(), &weights, stored).unwrap();
        let text = fs::read_to_string(dir.join(CONFIG)).unwrap();
        assert!(text.contains(&format!("\"dtype\": \"{name}\"")), "{text}");
        let bytes = fs::read(dir.join(MODEL)).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        assert!(file.tensors().iter().all(|(_, tensor)| tensor.dtype() == dtype));
        let half = |v: f32| match stored {
            StoredWeights::F16 => half::f16::from_f32(v).to_f32(),
            StoredWeights::Bf16 => half::bf16::from_f32(v).to_f32(),
            _ => v,
        };
        for (values, found) in weights.values.iter().zip(loaded(&dir, &odd())) {
            assert!(values.iter().zip(&found).all(|(v, found)| half(*v) == *found));
        }
    }
    for (stored, value) in [
        (StoredWeights::F16, 65_520.0),
        (StoredWeights::Bf16, f32::MAX),
        // The codes of all others stand for what f32 has.
        (StoredWeights::Mxfp4, 1.8 * 2f32.powi(127)),
    ] {
        let before = fs::read(dir.join(MODEL)).unwrap();
        let weights = Toy::new(&odd(), |i, j| if (i, j) == (4, 5) { -value } else { 1.0 });
        let message = save_as(&dir, &odd(), &weights, stored).unwrap_err().to_string();
        let expected = format!(
            "weights: tensor transformer.h.0.attn.c_attn.weight has the number {:e}, which {stored} \
             does not have; choose f32",
            -value
        );
        assert_eq!(message, expected);
        let weights = Toy::new(&odd(), |i, j| if (i, j) == (4, 5) { f32::NAN } else { 1.0 });
        let error = save_as(&dir, &odd(), &weights, stored).unwrap_err();
        assert!(matches!(error, Error::NotFinite { .. }), "{error}");
        assert!(fs::read(dir.join(MODEL)).unwrap() == before);
    }
    let largest = Toy::new(&odd(), |_, _| 1.74 * 2f32.powi(127));
    save_as(&dir, &odd(), &largest, StoredWeights::Mxfp4).unwrap();
    assert!(loaded(&dir, &odd())[4].iter().all(|v| *v == 1.5 * 2f32.powi(127)));
}

/// A file with one tensor left out, or replaced.
#[test]
fn what_is_wrong_with_codes_is_said() {
    let dir = TempDir::new().unwrap();
    let dir = dir.path();
    let weights = spread(&odd());
    save_as(dir, &odd(), &weights, StoredWeights::Mxfp4).unwrap();
    let bytes = fs::read(dir.join(MODEL)).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let name = "transformer.h.0.attn.c_proj.weight";
    let scales = format!("{name}.scales");
    let message = |change: &dyn Fn(&mut Tensors)| {
        let mut tensors: Tensors = file
            .tensors()
            .into_iter()
            .map(|(name, view)| (name, (view.dtype(), view.shape().to_vec(), view.data().to_vec())))
            .collect();
        change(&mut tensors);
        let views = tensors.iter().map(|(name, (dtype, shape, data))| {
            (name, TensorView::new(*dtype, shape.clone(), data).unwrap())
        });
        fs::write(dir.join(MODEL), serialize(views, None).unwrap()).unwrap();
        load_weights(dir, &infos(&odd()), &mut |_, _| Ok(())).unwrap_err().to_string()
    };
    let missing = message(&|tensors| {
        tensors.remove(&scales);
    });
    assert!(missing.ends_with(&format!("tensor {scales}: missing")), "{missing}");
    let wrong = message(&|tensors| tensors.get_mut(&scales).unwrap().0 = Dtype::U8);
    assert!(wrong.contains(&format!("{scales}: expected F8_E8M0, found U8")), "{wrong}");
    let infinite = message(&|tensors| tensors.get_mut(&scales).unwrap().2[0] = 255);
    assert!(
        infinite.contains(&format!("element 0 of tensor {scales} is not finite")),
        "{infinite}"
    );
    let beyond = message(&|tensors| {
        tensors.get_mut(name).unwrap().2.fill(0x77);
        tensors.get_mut(&scales).unwrap().2.fill(254);
    });
    assert!(beyond.contains(&format!("element 0 of tensor {name} is not finite")), "{beyond}");
    let alone = message(&|tensors| {
        let scales = tensors[&scales].clone();
        tensors.insert("transformer.wpe.weight.scales".into(), scales);
    });
    assert!(alone.contains("holds the tensor transformer.wpe.weight.scales"), "{alone}");
    let table = message(&|tensors| {
        tensors.get_mut("transformer.wpe.weight").unwrap().0 = Dtype::F4;
        let (_, shape, data) = tensors.get_mut("transformer.wpe.weight").unwrap();
        data.truncate(shape.iter().product::<usize>() / 2);
    });
    assert!(table.contains("expected F32, F16, BF16 or F64, found F4"), "{table}");
}
