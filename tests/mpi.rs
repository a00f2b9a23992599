//! `examples/c/train_mpi.c` under a real MPI: the same numbers and files on any number of processes.

mod common;

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use common::{has_tool, library, root, succeed};

fn mpirun(program: &Path, dir: &Path, processes: usize) -> Output {
    let mut command = Command::new("mpirun");
    // Open MPI refuses root and more processes than cores unless it is told.
    command.env("OMPI_ALLOW_RUN_AS_ROOT", "1").env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1");
    command.args(["--oversubscribe", "-np", &processes.to_string()]).arg(program);
    command.current_dir(dir).output().expect("mpirun starts")
}

#[test]
fn any_number_of_processes_prints_the_same() {
    let found =
        |tool| Command::new(tool).arg("--version").output().is_ok_and(|o| o.status.success());
    if !has_tool("an MPI (mpicc, mpirun)", found("mpicc") && found("mpirun")) {
        return;
    }
    let dir = tempfile::tempdir().expect("a temporary folder");
    let (program, installed) = (dir.path().join("train"), dir.path().join("libmxfp4train.so.0"));
    std::os::unix::fs::symlink(library("so"), &installed).expect("a link can be made");
    let mut compile = Command::new("mpicc");
    compile.args(["-std=c99", "-Wall", "-Wextra", "-Werror", "-O1"]);
    compile.arg(root().join("examples/c/train_mpi.c")).arg("-I").arg(root().join("include"));
    compile.arg(&installed).arg(format!("-Wl,-rpath,{}", dir.path().display()));
    succeed(compile.arg("-o").arg(&program));
    let all = [1, 2, 4].map(|processes| {
        let folder = dir.path().join(processes.to_string());
        fs::create_dir(&folder).expect("a folder");
        let output = mpirun(&program, &folder, processes);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert!(text.contains("step 20") && text.contains("evaluation"), "{text}");
        let files = ["model.safetensors", "trainer.safetensors", "trainer.json"];
        let read = |name| fs::read(folder.join("checkpoint").join(name)).expect("a file");
        (text, files.map(read))
    });
    assert!(all[0] == all[1] && all[0] == all[2], "{}\n{}\n{}", all[0].0, all[1].0, all[2].0);
    let output = mpirun(&program, dir.path(), 3);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && error.contains("ranks may be 1, 2, 4"), "{error}");
}
