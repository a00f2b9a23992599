#!/usr/bin/env python3
"""Shows that transformers opens our checkpoints, computes the same logits and has the same tokens.

Usage: python3 dev/check_transformers.py [MODEL_DIR]   (needs torch, transformers, numpy)

Builds the library, makes a model of awkward sizes (or takes MODEL_DIR), saves it through the C API,
loads it with GPT2LMHeadModel.from_pretrained, and compares the logits after random tokens.

Of a MODEL_DIR that mxtrain made it also compares tokens, AutoTokenizer's with those of `mxtrain prepare`, and
greedy texts, and has transformers open what `mxtrain export` makes of it: in bf16 and f16 the weights have to
be those of the model rounded by PyTorch, and in MXFP4 transformers has to refuse the folder. MXTRAIN names a
built program; cargo builds one otherwise.
"""
import ctypes
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import numpy
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel

BOUND = 1e-4
ROOT = pathlib.Path(__file__).resolve().parent.parent
TEXTS = ["The kernel", "A step allocates", "I've  na\u00efve \u8a9e \U0001f980\n\n\n x , . !", "\t 3.14 'tis"]
HEADER = 1024  # bytes of a token file before its tokens


class ModelConfig(ctypes.Structure):
    """mxt_model_config."""

    _fields_ = [("struct_size", ctypes.c_size_t)] + [
        (name, ctypes.c_size_t)
        for name in ("vocab_size", "context_length", "layers", "heads", "channels")
    ] + [("layer_norm_epsilon", ctypes.c_float), ("architecture", ctypes.c_int32)]


def library():
    subprocess.run(["cargo", "build", "--release", "--lib"], cwd=ROOT, check=True)
    lib = ctypes.CDLL(str(ROOT / "target/release/libmxfp4train.so"))
    lib.mxt_last_error.restype = ctypes.c_char_p
    return lib


def main():
    lib = library()

    def call(name, *arguments):
        if getattr(lib, name)(*arguments) != 0:
            sys.exit(f"{name}: {lib.mxt_last_error().decode()}")

    engine, model = ctypes.c_void_p(), ctypes.c_void_p()
    call("mxt_engine_new", None, ctypes.byref(engine))
    config = ModelConfig()
    call("mxt_model_config_init", ctypes.byref(config), ctypes.c_size_t(ctypes.sizeof(config)))
    with tempfile.TemporaryDirectory() as folder:
        if len(sys.argv) > 1:
            call("mxt_model_load", engine, sys.argv[1].encode(), ctypes.byref(model))
        else:
            config.vocab_size, config.context_length, config.layers = 1237, 100, 3
            config.heads, config.channels = 3, 129
            call("mxt_model_new", engine, ctypes.byref(config), ctypes.byref(model))
        call("mxt_model_get_config", model, ctypes.byref(config))
        saved = f"{folder}/model"
        call("mxt_model_save", model, saved.encode())
        theirs = GPT2LMHeadModel.from_pretrained(saved).eval()

        worst = 0.0
        for length in (1, 2, config.context_length // 2, config.context_length):
            tokens = torch.randint(config.vocab_size, (1, length))
            with torch.no_grad():
                expected = theirs(tokens).logits[0, -1].float()
            ids = (ctypes.c_uint32 * length)(*tokens[0].tolist())
            logits = (ctypes.c_float * config.vocab_size)()
            count = ctypes.c_size_t(config.vocab_size)
            call("mxt_model_next_logits", model, ids, ctypes.c_size_t(length), logits, count)
            error = (torch.tensor(logits[:]) - expected).abs().max().item()
            print(f"{length:4} tokens: largest difference of a logit {error:.1e}")
            worst = max(worst, error)
    if not worst <= BOUND:
        sys.exit(f"logits differ by {worst:.1e}, more than {BOUND:.0e}")
    print("transformers computes the same logits")
    if len(sys.argv) > 1 and (pathlib.Path(sys.argv[1]) / "mxtrain.json").exists():
        check_texts(pathlib.Path(sys.argv[1]).resolve())


def check_texts(folder):
    """Compares tokens and greedy texts with mxtrain's."""
    program = os.environ.get("MXTRAIN")
    if program is None:
        subprocess.run(["cargo", "build", "--release", "-p", "mxtrain"], cwd=ROOT, check=True)
        program = ROOT / "target/release/mxtrain"

    def mxtrain(*arguments):
        return subprocess.run([program, *arguments], check=True, capture_output=True).stdout.decode()

    kind = json.loads((folder / "mxtrain.json").read_text())["tokenizer"]
    if not isinstance(kind, str):
        kind = str(folder)  # a file in it
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = GPT2LMHeadModel.from_pretrained(folder).eval()
    texts = TEXTS + [(ROOT / name).read_text() for name in ("README.md", "dev/check_transformers.py")]
    with tempfile.TemporaryDirectory() as scratch:
        for text in texts:
            file = pathlib.Path(scratch) / "text.txt"
            file.write_text(text)
            tokens = pathlib.Path(scratch) / "tokens"
            mxtrain("prepare", file, "--out", tokens, "--tokenizer", kind, "--val-fraction", "0")
            # Behind a document stands the separator, where there is one.
            ours = numpy.fromfile(tokens / "train.bin", numpy.uint16, offset=HEADER).tolist()
            theirs = tokenizer(text, verbose=False)["input_ids"]
            if theirs != ours[: len(theirs)] or len(ours) - len(theirs) > 1:
                sys.exit(f"AutoTokenizer has other tokens of {text[:40]!r}")
            if tokenizer.decode(theirs) != text:
                sys.exit(f"AutoTokenizer decodes another text than {text[:40]!r}")
    print("AutoTokenizer has the same tokens")
    for prompt in TEXTS[:2]:
        ids = tokenizer(prompt, return_tensors="pt")
        length = min(40, model.config.n_positions - ids["input_ids"].shape[1])
        out = model.generate(**ids, do_sample=False, max_new_tokens=length, pad_token_id=0)[0]
        theirs = tokenizer.decode(out, skip_special_tokens=True)
        ours = mxtrain("generate", "--device", "cpu", "--checkpoint", folder, "--greedy", "--tokens", str(length),
                       "--prompt", prompt)
        if ours != theirs + "\n":
            sys.exit(f"other greedy texts: {ours!r}, transformers {theirs!r}")
        print(f"the same greedy text: {ours!r}")
    check_exports(folder, mxtrain)


def check_exports(folder, mxtrain):
    """Opens exports, which are as good as the model but for their numbers."""
    model = GPT2LMHeadModel.from_pretrained(folder).eval()
    with tempfile.TemporaryDirectory() as scratch:
        for name, dtype in (("f32", torch.float32), ("f16", torch.float16), ("bf16", torch.bfloat16)):
            out = f"{scratch}/{name}"
            mxtrain("export", folder, out, "--weights", name)
            theirs = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
            if theirs.dtype != dtype:
                sys.exit(f"export in {name}: opened as {theirs.dtype}")
            expected = dict(model.named_parameters())
            found = dict(theirs.named_parameters())
            if found.keys() != expected.keys():
                sys.exit(f"export in {name}: other tensors")
            for tensor, values in found.items():
                if not torch.equal(values, expected[tensor].to(dtype)):
                    sys.exit(f"export in {name}: {tensor} has other numbers")
            if AutoTokenizer.from_pretrained(out)(TEXTS[0]) != AutoTokenizer.from_pretrained(folder)(TEXTS[0]):
                sys.exit(f"export in {name}: another tokenizer")
        print("transformers opens exports in f32, f16 and bf16, with the same numbers, rounded")
        out = f"{scratch}/mxfp4"
        mxtrain("export", folder, out, "--weights", "mxfp4")
        try:
            GPT2LMHeadModel.from_pretrained(out)
        except (ValueError, RuntimeError, KeyError) as error:
            print(f"transformers refuses an export in MXFP4: {error!s:.80}")
        else:
            sys.exit("transformers opens an export in MXFP4, and has random weights for it")


if __name__ == "__main__":
    main()
