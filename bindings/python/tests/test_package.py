"""The package against the header, the project and its own README."""

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mxfp4train as mxt
from mxfp4train import _generate, _library, _model, _mxtrain, _stats, _trainer
from mxfp4train._library import ffi, lib

PACKAGE = Path(__file__).resolve().parents[1]
PROJECT = PACKAGE.parents[1]
SOURCES = PACKAGE / "src" / "mxfp4train"


def fields(struct):
    return [
        name for name, _ in ffi.typeof(struct).fields if name not in ("struct_size", "reserved")
    ]


def test_the_declarations_are_the_headers():
    generator = PACKAGE / "gen" / "cdef.py"
    subprocess.run([sys.executable, str(generator), "--check"], check=True)


def test_every_function_is_there_and_used():
    header = (PROJECT / "include" / "mxfp4train.h").read_text(encoding="utf-8")
    code = re.sub(r"//.*", "", header)
    functions = set(re.findall(r"\b(mxt_\w+)\(", code))
    assert len(functions) > 90
    text = "".join(path.read_text(encoding="utf-8") for path in SOURCES.glob("*.py"))
    text = re.sub(r'CDEF = """.*?"""', "", text, flags=re.DOTALL)
    used = set(re.findall(r"\b_?lib(?:rary)?\.(mxt_\w+)", text))
    # Made of the struct's or the kind's name.
    used |= {f"{struct}_init" for struct in re.findall(r'options\(\s*"(mxt_\w+)"', text)}
    kinds = ("engine", "model", "dataset", "decoder", "trainer", "snapshot", "files")
    used |= {f"mxt_{kind}_free" for kind in kinds}
    for name in functions:
        assert getattr(lib, name), name
    # The messages of handles are those of the thread; others are there with options.
    left_out = {f"mxt_{kind}_last_error" for kind in kinds}
    left_out |= {"mxt_status_string", "mxt_version_number", "mxt_model_save"}
    left_out |= {"mxt_dataset_open", "mxt_dataset_open_files"}
    assert functions - used == left_out


def test_tuples_have_the_fields_of_the_structs():
    for kind, struct in (
        (mxt.StepStats, "mxt_step_stats"),
        (mxt.EvalStats, "mxt_eval_stats"),
        (mxt.RunResult, "mxt_run_result"),
        (mxt.MemoryPlan, "mxt_memory_plan"),
        (mxt.MemoryUse, "mxt_memory_use"),
        (mxt.ModelConfig, "mxt_model_config"),
        (mxt.TrainerOptions, "mxt_trainer_options"),
        (mxt.Coverage, "mxt_coverage"),
        (mxt.TensorUpdate, "mxt_tensor_update"),
        (mxt.WeightMetrics, "mxt_weight_metrics"),
    ):
        # What None says in Python.
        named = [name for name in fields(struct) if name != "has_document_end"]
        assert list(kind._fields) == named, struct
    assert len([it for it in vars(_stats).values() if hasattr(it, "_fields")]) == 10


def test_functions_have_the_options_of_the_structs():
    for function, struct, others in (
        (mxt.Trainer.__init__, "mxt_trainer_options", {"self", "model"}),
        (_trainer.options_struct, "mxt_trainer_options", {"keep"}),
        (mxt.Model.__init__, "mxt_model_config", {"self", "engine"}),
        (_model.config_struct, "mxt_model_config", set()),
        (mxt.Decoder.__init__, "mxt_decoder_options", {"self", "model"}),
        (mxt.Group.__init__, "mxt_group", {"self"}),
        (mxt.Model.generate, "mxt_generate_options", {"self", "prompt"}),
        (_generate.generate_struct, "mxt_generate_options", {"keep"}),
        (mxt.Decoder.generate, "mxt_generate_options", {"self", "sequence"}),
        (mxt.Trainer.run, "mxt_run_options", {"self", "dataset"}),
        (mxt.Trainer.forward_backward, "mxt_batch", {"self"}),
        (mxt.Trainer.forward, "mxt_batch", {"self"}),
        (mxt.Engine.__init__, "mxt_engine_options", {"self"}),
    ):
        given = set(inspect.signature(function).parameters) - others
        # What the package fills in by itself.
        managed = {"user_data", "user_data_free", "log_user_data", "log_user_data_free"}
        managed |= {"allocator_user_data", "allocator_user_data_free", "has_document_end"}
        managed |= {"stop_token_count", "count", "drafted", "accepted"}
        if function == mxt.Decoder.generate:
            managed |= {"weights"}
        assert given == set(fields(struct)) - managed, function


def test_names_have_the_numbers_of_the_header():
    for prefix, names in (
        ("MXT_SCHEDULE_", _trainer.SCHEDULES),
        ("MXT_RUN_END_", _trainer.RUN_ENDS),
        ("MXT_ACTIVATION_", _model.ACTIVATIONS),
        ("MXT_ARCHITECTURE_", _model.ARCHITECTURES),
        ("MXT_ROPE_SCALING_", _model.ROPE_SCALINGS),
        ("MXT_STORED_WEIGHTS_", _model.STORED_WEIGHTS),
        ("MXT_DECODER_WEIGHTS_", _generate.DECODER_WEIGHTS),
        ("MXT_DRAFT_", _generate.DRAFTS),
        ("MXT_TOKEN_TYPE_", mxt._dataset.TOKEN_TYPES),
        ("MXT_TRANSPORT_", mxt._engine.TRANSPORTS),
        ("MXT_WIRE_", mxt._engine.WIRES),
    ):
        numbers = {name: getattr(lib, name) for name in dir(lib) if name.startswith(prefix)}
        expected = {prefix + name.upper(): number for number, name in enumerate(names)}
        assert numbers == expected, prefix


def test_every_status_has_an_error():
    statuses = [name for name in dir(lib) if re.match(r"MXT_(ERROR_|STOPPED)", name)]
    plain = {"MXT_ERROR_NULL", "MXT_ERROR_UTF8", "MXT_ERROR_STRUCT_SIZE"}
    plain |= {"MXT_ERROR_BUFFER_TOO_SMALL"}
    for name in statuses:
        error = mxt._errors.error_of(getattr(lib, name), "words")
        assert error.status == getattr(lib, name) and str(error) == "words"
        assert (type(error) is mxt.MxtError) == (name in plain), name


def test_versions_are_one():
    cargo = (PROJECT / "Cargo.toml").read_text(encoding="utf-8")
    version = re.search(r'^version = "(.*)"', cargo, re.MULTILINE)[1]
    text = (PACKAGE / "pyproject.toml").read_text(encoding="utf-8")
    assert re.search(r'^version = "(.*)"', text, re.MULTILINE)[1] == version == mxt.version()
    assert json.loads(mxt.build_info())["abi"] == lib.MXT_ABI_VERSION


def test_the_package_has_the_terms():
    for name in ("LICENSE-APACHE", "LICENSE-MIT"):
        assert (PACKAGE / name).read_bytes() == (PROJECT / name).read_bytes(), name


def test_the_example_of_the_readme_runs(tmp_path):
    text = (PACKAGE / "README.md").read_text(encoding="utf-8")
    programs = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(programs) == 2
    out = run_python("\n".join(programs), cwd=tmp_path)
    losses = [float(line.split()[-1]) for line in out.splitlines() if line.startswith("loss ")]
    assert len(losses) == 10 and losses[-1] < 0.7 * losses[0], out
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_the_program_is_the_wheels():
    script = (
        "import sys; from mxfp4train._mxtrain import main; sys.argv[1:] = ['--version']; main()"
    )
    environment = {**os.environ, "PYTHONPATH": python_path()}
    command = [sys.executable, "-c", script]
    output = subprocess.run(command, env=environment, capture_output=True, text=True)
    if _mxtrain.PROGRAM.exists():
        assert output.stdout.split() == ["mxtrain", mxt.version()]
    else:
        assert "which a wheel of mxfp4train has" in output.stderr


def test_a_library_that_is_not_there_is_an_import_error(tmp_path):
    if _library.BUNDLED.exists():
        pytest.skip("this package carries its library")
    script = "try:\n import mxfp4train\nexcept ImportError as error:\n print(error)"
    for path, words in (
        ("", "set MXFP4TRAIN_LIBRARY to the path"),
        (str(tmp_path / "none.so"), "none.so"),
        ("/lib/x86_64-linux-gnu/libc.so.6", "expected the mxfp4train library"),
    ):
        assert words in run_python(script, MXFP4TRAIN_LIBRARY=path)


def run_python(script, cwd=None, **environment):
    environment = {**os.environ, "PYTHONPATH": python_path(), **environment}
    command = [sys.executable, "-c", script]
    result = subprocess.run(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return result.stdout


def python_path():
    """Where another Python finds the package that is tested here, in whatever folder."""
    return str(Path(mxt.__file__).resolve().parents[1])
