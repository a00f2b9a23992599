#!/usr/bin/env python3
"""Shows that transformers opens our checkpoints and computes the same logits.

Usage: python3 dev/check_transformers.py [MODEL_DIR]   (needs torch, transformers, numpy)

Builds the library, makes a model of awkward sizes (or takes MODEL_DIR), saves it through the C API,
loads it with GPT2LMHeadModel.from_pretrained, and compares the logits after random tokens.
"""
import ctypes
import pathlib
import subprocess
import sys
import tempfile

import torch
from transformers import GPT2LMHeadModel

BOUND = 1e-4
ROOT = pathlib.Path(__file__).resolve().parent.parent


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


if __name__ == "__main__":
    main()
