//! The kernel files: what each begins with, and which kernels of it a chip has.
//!
//! NOTE: kernels are compiled that are listed here, under the names that launches use. A template
//! that is launched with other arguments has no kernel then; a test looks for that.

use super::device::compile::File;

/// A file by its name: the headers that it begins with, and the function that lists its kernels.
macro_rules! file {
    ($name:literal, [$($header:literal),*], $kernels:expr) => {
        File {
            name: $name,
            texts: &[
                include_str!("../../../kernels/ptx.cuh"),
                include_str!("../../../kernels/prelude.cuh"),
                $(include_str!(concat!("../../../kernels/", $header)),)*
                include_str!(concat!("../../../kernels/", $name, ".cu")),
            ],
            kernels: $kernels,
        }
    };
}

/// All files.
pub(super) static FILES: [File; 36] = [
    file!("optimize", ["optimize.cuh"], |_| {
        of("square_gradients sum_losses sum_squares square_ratios find_rates adamw stable_adamw \
            scale_gradients<T> copy_to_bf16 split_master join_master")
    }),
    file!("optimize_moments", ["random.cuh", "optimize.cuh", "moments.cuh"], |_| {
        of("update_stored<F32,WHOLE> update_stored<F32,HALVES> \
            update_stored<BF16,WHOLE> update_stored<BF16,HALVES> \
            update_stored<INT8,WHOLE> update_stored<INT8,HALVES> \
            update_stored<E4M3,WHOLE> update_stored<E4M3,HALVES> update_stored<ANY,EITHER> \
            largest_moments choose_scales square_stored_ratios")
    }),
    file!("optimize_muon", ["random.cuh", "optimize.cuh", "moments.cuh"], |_| {
        of("update_momentum normalize_momentum add_multiples move_matrix")
    }),
    file!("optimize_ramping", ["optimize.cuh"], |_| of("update_ramping")),
    file!("optimize_spam", ["optimize.cuh"], |_| {
        of("largest_of_pieces find_limits squares_of_clipped find_scales keep_statistics")
    }),
    file!("optimize_watch", ["random.cuh", "optimize.cuh", "moments.cuh"], |_| of("watch_update")),
    file!("attend_plain", ["heads.cuh"], |_| {
        of("attention_forward<T> attention_delta<T> attention_dq<T> attention_dkdv<T> \
            attention_forward<T,PackedHeads> attention_dq<T,PackedHeads> \
            attention_dkdv<T,PackedHeads>")
    }),
    file!("attend_sm80", ["heads.cuh", "attend.cuh"], |_| {
        and_packed(
            "flash_forward<64,4,2,64> flash_dkdv<64,4,64> flash_dq<64,4,64> \
             flash_forward<128,8,1,64> flash_dkdv<128,4,32> flash_dq<128,4,32>",
        )
    }),
    file!("attend_sm90", ["heads.cuh", "attend.cuh"], |chip| match chip {
        (9, 0) => and_packed(
            "wgmma_forward<64,2,64,2> wgmma_dkdv<64,2> wgmma_dq<64,2,64> \
             wgmma_forward<128,2,64,1> wgmma_dkdv<128,2> wgmma_dq<128,2,64>",
        ),
        _ => Vec::new(),
    }),
    file!("attend_behind", ["heads.cuh"], |_| {
        of("keep_rows<T> attend_behind<64,16> attend_behind<128,8> attend_behind_plain<T>")
    }),
    file!("correct", [], |_| of("correct_factors")),
    file!("decode", ["gelu.cuh", "numbers.cuh"], |_| {
        let products = "few_rows<OfBf16,bf16,1,1,4> few_rows<OfBf16,float,1,1,4> \
                        few_rows<OfBf16,bf16,1,1,8> few_rows<OfBf16,float,1,1,8> \
                        few_rows<OfBf16,bf16,1,1,12> \
                        few_rows<OfBf16,bf16,2,8,1> few_rows<OfBf16,float,2,8,1> \
                        few_rows<OfMxfp4,bf16,1,1,4> few_rows<OfMxfp4,float,1,1,4> \
                        few_rows<OfMxfp4,bf16,1,1,8> \
                        few_rows<OfMxfp4,bf16,2,8,1> few_rows<OfMxfp4,float,2,8,1> \
                        few_rows_f32<1,1,1,8> few_rows_f32<1,8,1,4> few_rows_f32<4,8,2,1> \
                        lay_out<OfBf16> many_rows<true,2,4,4,2,2> \
                        lay_out<OfMxfp4> many_rows<false,4,2,8,2,2>";
        of(&[
            products,
            " few_rows_plain<T,float> few_rows_plain<bf16,bf16> embed_rows<T> pack_mxfp4<T>",
        ]
        .concat())
    }),
    file!("embed", [], |_| {
        of("embedding_forward<T> embedding_backward_tokens<T> embedding_backward_positions<T> \
            embedding_backward_documents<T>")
    }),
    file!("estimate", ["numbers.cuh"], |_| of("estimate")),
    file!("exchange", ["random.cuh", "numbers.cuh"], |_| {
        of("join_gradients sum_parts<0> sum_parts<2> sum_parts<4> sum_parts<8> sum_peers<2> \
            sum_peers<3> sum_peers<4> sum_peers<5> sum_peers<6> sum_peers<7> sum_peers<8> \
            pack_wire<BF16> pack_wire<FP8> pack_wire<MXFP4> sum_wire<BF16> sum_wire<FP8> \
            sum_wire<MXFP4> unpack_wire<BF16> unpack_wire<FP8> unpack_wire<MXFP4>")
    }),
    file!("follow", ["numbers.cuh"], |_| {
        of("update_mean begin_track observe add_observations find_intervals reset_oscillating")
    }),
    file!("fp8", ["numbers.cuh", "tiles.cuh"], |chip| {
        let bytes = " convert_to_fp8<T,B> turn_to_fp8<T,B> convert_both_to_fp8<T,B>";
        of(&["find_amax<T> round_to_fp8<T>", if chip >= FP8 { bytes } else { "" }].concat())
    }),
    file!("gelu", ["gelu.cuh"], |_| of("gelu_of_all<T,B,B> sample_gelu_gradient")),
    file!("head", [], |_| of("softmax_loss<T> worst_loss<T>")),
    file!("int8", ["random.cuh", "numbers.cuh", "values.cuh", "tiles.cuh"], |_| {
        of("round_int8_rows<T,bf16> round_int8_tensor<T,bf16> \
            round_int8_rows<T,u8> round_int8_tensor<T,u8> turn_int8<T>")
    }),
    file!("merge", ["random.cuh"], |_| {
        of("draw_projections hash_channels<T> link_channels average_channels<T>")
    }),
    file!("norm", ["groups.cuh"], |_| of("normalize<T,B,B> norm_backward<T,B>")),
    file!("normal", ["random.cuh"], |_| of("fill_normal")),
    file!("outliers", [], |_| of("find_bounds<T>")),
    file!("product_sm120", [], |chip| match chip {
        (12, 0 | 1) => of("product_mxfp4<T>"),
        _ => Vec::new(),
    }),
    file!("quantize_blocks", ["random.cuh", "quantize.cuh"], |chip| {
        let mxfp8 = "quantize_rows<T,MXFP8,B> quantize_columns<T,MXFP8,B> quantize_both<MXFP8,B>";
        let all = "quantize_rows<T,VALUES,B> quantize_columns<T,VALUES,B> \
                   quantize_rows<T,CODES,B> quantize_columns<T,CODES,B> quantize_both<CODES,B> ";
        of(&[all, if chip >= FP8 { mxfp8 } else { "" }].concat())
    }),
    file!("quantize_fp8", ["random.cuh", "quantize.cuh", "quantize_fp8.cuh"], |chip| {
        // Of a forward pass in MXFP4, and from what that made.
        let forward = "quantize_fp8_rows<0,bf16,E4M3,false> quantize_fp8_rows<0,float,E4M3,false> \
                       quantize_fp8_columns<0,bf16,E4M3,AS_MXFP4,B> \
                       quantize_fp8_columns<0,float,E4M3,AS_MXFP4,B>";
        of_fp8(chip, "<0", forward)
    }),
    file!(
        "quantize_fp8_groups",
        ["random.cuh", "quantize.cuh", "quantize_fp8.cuh", "gelu.cuh", "swiglu.cuh"],
        |chip| {
            let behind = "quantize_fp8_behind<64,Gelu,B,B> quantize_fp8_behind<64,SwiGlu,B,B>";
            of_fp8(chip, "<64", behind)
        }
    ),
    file!("quantize_nvfp4", ["random.cuh", "numbers.cuh", "values.cuh", "nvfp4.cuh"], |_| {
        of("find_nvfp4_amax<T,B> round_nvfp4<T,B,TO_NEAREST> round_nvfp4<T,B,UNBIASED> \
            round_nvfp4<T,B,EDEN>")
    }),
    file!("quantize_values", ["random.cuh", "deviation.cuh", "numbers.cuh", "values.cuh"], |_| {
        of("find_value_amax<T> round_values<T> scale_result<T,B>")
    }),
    file!("requantize_nvfp4", ["random.cuh", "numbers.cuh", "values.cuh", "nvfp4.cuh"], |_| {
        of("keep_nvfp4<T> requantize_nvfp4<T,TO_NEAREST> requantize_nvfp4<T,UNBIASED>")
    }),
    file!("restore", ["deviation.cuh"], |_| of("restore<T>")),
    file!("rotary", [], |_| {
        of("find_rotations rotate<T,B> norm_heads<T> norm_heads_backward<T>")
    }),
    file!("select", ["random.cuh", "groups.cuh"], |_| {
        of("select_positions gather_rows<T> scatter_rows<T> scatter_sum<T>")
    }),
    file!("sums", [], |_| of("bias_gradient<T> add_partials")),
    file!("swiglu", ["groups.cuh", "swiglu.cuh"], |_| {
        of("swiglu_forward<T> swiglu_backward<T> sample_swiglu_gradient")
    }),
];

/// The first chips with FP8 numbers.
const FP8: (i32, i32) = (8, 9);

/// These kernels: T is either type of activations, B is true or false.
fn of(kernels: &str) -> Vec<String> {
    let mut names: Vec<_> = kernels.split_whitespace().map(String::from).collect();
    for (letter, meanings) in [("<T", ["<bf16", "<float"]), (",B", [",false", ",true"])] {
        while names.iter().any(|name| name.contains(letter)) {
            let expand = |name: &String| match name.contains(letter) {
                true => meanings.map(|meaning| name.replacen(letter, meaning, 1)).to_vec(),
                false => vec![name.clone()],
            };
            names = names.iter().flat_map(expand).collect();
        }
    }
    names
}

/// These kernels of attention, and the same of sequences that are packed with documents.
fn and_packed(kernels: &str) -> Vec<String> {
    of(&[kernels, " ", &kernels.replace('>', ",PackedHeads>")].concat())
}

/// Kernels of FP8 numbers for groups of one kind, and others, where the chip has them.
fn of_fp8(chip: (i32, i32), group: &str, others: &str) -> Vec<String> {
    if chip < FP8 {
        return Vec::new();
    }
    let all = "quantize_fp8_rows<G,bf16,E5M2,B> quantize_fp8_both<G,B> \
               quantize_fp8_columns<G,bf16,E4M3,AS_STORED,B> \
               quantize_fp8_columns<G,bf16,E4M3,AS_E4M3,B> \
               quantize_fp8_columns<G,bf16,E5M2,AS_STORED,B> \
               quantize_fp8_columns<G,float,E4M3,AS_STORED,B> ";
    of(&[&all.replace("<G", group), others].concat())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::super::device::cache::Cache;
    use super::super::device::compile::all;
    use super::super::device::folders::Folders;
    use super::*;

    const CHIPS: [(i32, i32); 4] = [(8, 0), (9, 0), (10, 0), (12, 0)];

    /// Every kernel compiles for every chip that the library knows, with the compiler that users
    /// have.
    #[test]
    fn kernels_compile_for_every_chip() {
        if let Err(error) = Folders::from_environment(&|_| ()).open_nvrtc() {
            println!("skipped: {error}");
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::open(folder.path()).unwrap();
        for chip in CHIPS {
            // NOTE: the sources tell no chips from 9.0 on apart but by names of kernels, so that for
            // 10.0 other files than for 9.0 are the only news.
            let is_news =
                |file: &&File| chip != (10, 0) || (file.kernels)(chip) != (file.kernels)((9, 0));
            let files: Vec<_> = FILES.iter().filter(is_news).copied().collect();
            let get = || all(&files, Some(&cache), chip, 13_000).unwrap_or_else(|e| panic!("{e}"));
            let codes = get();
            let mut names = BTreeSet::new();
            for code in &codes {
                let (cubin, kernels) = (&code.compiled.cubin, &code.compiled.names);
                println!("{chip:?}: {} bytes, {} kernels", cubin.len(), kernels.len());
                assert!(cubin.starts_with(b"\x7fELF") && !code.cached);
                for (name, symbol) in kernels {
                    let symbol = symbol.as_bytes();
                    assert!(cubin.windows(symbol.len()).any(|window| window == symbol), "{name}");
                    assert!(names.insert(name.clone()), "two kernels are named {name}");
                }
            }
            assert_eq!(names.contains("product_mxfp4<float>"), chip == (12, 0));
            assert_eq!(names.contains("wgmma_dkdv<64,2>"), chip == (9, 0));
            for (again, code) in get().iter().zip(&codes) {
                assert!(
                    again.cached && again.compiled == code.compiled,
                    "the cache has other code"
                );
            }
        }
    }

    /// A kernel that did not wait would read what the one before it has not written yet.
    #[test]
    fn every_kernel_waits_for_those_before_it() {
        // These do not begin with it, as `begin` says.
        let mut later =
            BTreeSet::from([" few_rows(", " few_rows_f32(", " attend_behind(", " normalize("]);
        let mut kernels = 0;
        for File { name, texts, .. } in &FILES {
            for kernel in texts.concat().split("__global__").skip(1) {
                let (head, body) = kernel.split_once('{').unwrap();
                let waits = body.split_once("begin();").map(|(before, _)| before.trim());
                let waits = waits.unwrap_or_else(|| panic!("{name}.cu: {kernel:.80}"));
                let known = later.iter().find(|of| head.contains(**of)).copied();
                let known = known.is_some_and(|of| later.remove(of));
                assert_eq!(waits.is_empty(), !known, "{name}.cu: {kernel:.80}");
                // What the one before may still write is not touched, and nothing is written.
                let late =
                    ["p.x", "p.y", "qkv", "n.x", "n.y", "n.out", "n.sum", "store_", "return;"];
                let late = late.into_iter().find(|what| waits.contains(what));
                assert_eq!(late, None, "{name}.cu: {kernel:.80}");
                kernels += 1;
            }
        }
        assert!(later.is_empty(), "{later:?}");
        assert!(kernels > 40, "{kernels}");
    }

    /// Without a GPU nobody would notice that a launch names a kernel that nobody compiles. Those
    /// that quantize are named by `Quantization::kernel`, `Behind::kernel`, `Keeping::kernel`
    /// and `values::Quantization::kernels`, by which the emulator's tests ask for them.
    #[test]
    fn every_kernel_that_is_launched_is_listed() {
        let sources = [
            include_str!("optimize.rs"),
            include_str!("attend.rs"),
            include_str!("decode.rs"),
            include_str!("embed.rs"),
            include_str!("follow.rs"),
            include_str!("gelu.rs"),
            include_str!("head.rs"),
            include_str!("linear.rs"),
            include_str!("memory.rs"),
            include_str!("merge.rs"),
            include_str!("muon.rs"),
            include_str!("norm.rs"),
            include_str!("rotary.rs"),
            include_str!("select.rs"),
            include_str!("swiglu.rs"),
            include_str!("quantize/carrier.rs"),
            include_str!("quantize/fp8.rs"),
            include_str!("quantize/sums.rs"),
            include_str!("quantize/values.rs"),
        ];
        let listed: BTreeSet<_> = CHIPS
            .iter()
            .flat_map(|chip| FILES.iter().flat_map(|file| (file.kernels)(*chip)))
            .collect();
        let mut launched = BTreeSet::new();
        for source in sources {
            let source: String = source.split_whitespace().collect();
            for call in source.split("kernel!(").skip(1) {
                let (call, _) = call.split_once(')').unwrap();
                let mut arguments = call.split(',').skip(1);
                let name = arguments.next().unwrap().trim_matches('"');
                let rest: String =
                    arguments.map(|argument| format!(",{}", argument.trim_matches('"'))).collect();
                launched.extend(["bf16", "float"].map(|number| format!("{name}<{number}{rest}>")));
            }
            for before in [
                "launch!(cuda.gpu,\"",
                "launch!(self.gpu,\"",
                "launch_drawn(\"",
                "Few::plain(\"",
                "Type::Bf16=>\"product",
                "Type::F32=>\"product",
            ] {
                for call in source.split(before).skip(1) {
                    let (_, begun) = before.split_once('"').unwrap();
                    launched.insert(format!("{begun}{}", call.split_once('"').unwrap().0));
                }
            }
        }
        for call in include_str!("attend.rs").split("names!(\"").skip(1) {
            let begun = call.split_once('"').unwrap().0;
            launched.extend([format!("{begun}>"), format!("{begun},PackedHeads>")]);
        }
        assert!(launched.len() > 40 && launched.contains("adamw"), "{launched:?}");
        for name in launched {
            assert!(listed.contains(&name), "{name} is launched and not compiled");
        }
    }
}
