//! The installed tree, as programs outside of this repository see it: every project of
//! `tests/consumers` is copied away, built against a temporary prefix, and run.

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::{functions, has_program, root, succeed};

/// One test, because all of it needs the same release build.
#[test]
fn an_installed_tree_serves_every_kind_of_program() {
    let tools = ["make", "pkg-config", "cmake", "cc", "c++", "python3"];
    if !tools.iter().all(|tool| has_program(tool)) {
        return;
    }
    let dir = tempfile::tempdir().expect("a temporary folder");
    // Installed with a blank in its name, then moved: from here on nothing is where make put it.
    let first = dir.path().join("first prefix");
    succeed(make("install").arg(format!("PREFIX={}", first.display())));
    let prefix = dir.path().join("second prefix");
    fs::rename(&first, &prefix).expect("the tree can be moved");
    let work = Workplace { prefix, dir: dir.path().to_owned() };

    the_tree_is_what_a_packager_expects(&work);
    the_licences_of_what_is_linked_in_are_there(&work);
    nothing_names_the_place(&work, &first);
    the_shared_library_needs_and_exports_little(&work);
    with_pkg_config(&work);
    with_cmake(&work);
    under_valgrind(&work);
    loaded_by_threads(&work);
    beside_another_rust_library(&work);
    mxtrain_runs(&work);

    // A packager's way: the tree is staged, and the files find each other where it will be.
    let stage = dir.path().join("a stage");
    let destdir = format!("DESTDIR={}", stage.display());
    let place = ["PREFIX=/usr", "LIBDIR=/usr/lib/x86_64-linux-gnu"];
    succeed(make("install").args(place).arg(&destdir));
    let lib = stage.join("usr/lib/x86_64-linux-gnu");
    let ask = |flag: &str| {
        let mut ask = Command::new("pkg-config");
        ask.env("PKG_CONFIG_PATH", lib.join("pkgconfig"));
        succeed(ask.args([flag, "mxfp4train"])).trim().to_owned()
    };
    let pc = lib.join("pkgconfig").display().to_string().replace(' ', "\\ ");
    assert_eq!(ask("--variable=includedir"), format!("{pc}/../../../include"));
    assert_eq!(ask("--variable=libdir"), format!("{pc}/.."));
    assert_eq!(ask("--variable=prefix"), format!("{pc}/../../.."));
    let cmake = fs::read_to_string(lib.join("cmake/mxfp4train/mxfp4train-config.cmake"));
    assert!(cmake.expect("the file").contains("{_mxfp4train_lib}/../../include\""));
    succeed(make("uninstall").args(place).arg(&destdir));
    assert_eq!(files(&stage), Vec::<PathBuf>::new(), "uninstall leaves files");
    assert!(!stage.join("usr/share/mxfp4train").exists() && !lib.join("cmake/mxfp4train").exists());
}

struct Workplace {
    prefix: PathBuf,
    dir: PathBuf,
}

impl Workplace {
    /// A copy of a consumer outside of the source tree.
    fn copy(&self, name: &str) -> PathBuf {
        let to = self.dir.join(name);
        fs::create_dir(&to).expect("the folder can be made");
        let from = root().join("tests/consumers").join(name);
        for entry in fs::read_dir(from).expect("the folder is there") {
            let path = entry.expect("the entry can be read").path();
            fs::copy(&path, to.join(path.file_name().expect("a name"))).expect("a copy");
        }
        to
    }

    fn lib(&self) -> PathBuf {
        self.prefix.join("lib")
    }

    /// A program that finds the shared library.
    fn program(&self, path: PathBuf) -> Command {
        let mut command = Command::new(path);
        command.env("LD_LIBRARY_PATH", self.lib());
        command
    }
}

fn the_tree_is_what_a_packager_expects(work: &Workplace) {
    let version = env!("CARGO_PKG_VERSION");
    let mut expected: Vec<PathBuf> = [
        "bin/mxtrain",
        "include/mxfp4train.h",
        "lib/cmake/mxfp4train/mxfp4train-config-version.cmake",
        "lib/cmake/mxfp4train/mxfp4train-config.cmake",
        "lib/libmxfp4train.a",
        "lib/libmxfp4train.so",
        "lib/libmxfp4train.so.0",
        "lib/pkgconfig/mxfp4train.pc",
        "include/mxfp4train.hpp",
        "share/mxfp4train/LICENSE-APACHE",
        "share/mxfp4train/LICENSE-MIT",
        "share/mxfp4train/THIRD-PARTY.txt",
        "share/mxfp4train/tsan.supp",
        "share/mxfp4train/valgrind.supp",
    ]
    .map(PathBuf::from)
    .into();
    expected.push(format!("lib/libmxfp4train.so.{version}").into());
    expected.sort();
    assert_eq!(files(&work.prefix), expected);
    let link = |name: &str| fs::read_link(work.lib().join(name)).expect("a link");
    assert_eq!(link("libmxfp4train.so"), Path::new("libmxfp4train.so.0"));
    assert_eq!(link("libmxfp4train.so.0"), Path::new(&format!("libmxfp4train.so.{version}")));
}

fn the_licences_of_what_is_linked_in_are_there(work: &Workplace) {
    let file = work.prefix.join("share/mxfp4train/THIRD-PARTY.txt");
    let text = fs::read_to_string(file).expect("the file");
    let lists = |name: &str| text.lines().any(|line| line.starts_with(&format!("{name} ")));
    // Of the library, of mxtrain, and what a crate has from others.
    for name in ["rayon", "safetensors", "sha2", "clap", "parquet", "zstd-sys"] {
        assert!(lists(name), "{name} is missing");
    }
    // Only tests and the compiler use these.
    for name in ["proptest", "cbindgen", "gemm", "serde_derive", "cc", "mxtrain"] {
        assert!(!lists(name), "{name} is linked into nothing");
    }
    for terms in ["Apache License", "Permission is hereby granted", "Meta Platforms, Inc."] {
        assert!(text.contains(terms), "{terms}");
    }
}

/// So that it can be moved. What was compiled names no folder of its user either.
fn nothing_names_the_place(work: &Workplace, first: &Path) {
    let place = first.to_str().expect("UTF-8").as_bytes();
    for file in files(&work.prefix) {
        let bytes = fs::read(work.prefix.join(&file)).expect("the file can be read");
        let found = bytes.windows(place.len()).any(|window| window == place);
        assert!(!found, "{} names {}", file.display(), first.display());
    }
}

fn the_shared_library_needs_and_exports_little(work: &Workplace) {
    let library = work.lib().join("libmxfp4train.so");
    let text = succeed(Command::new("readelf").arg("-d").arg(&library));
    assert!(text.contains("soname: [libmxfp4train.so.0]"), "{text}");
    for line in text.lines().filter(|line| line.contains("(NEEDED)")) {
        // The loader itself gives thread-local storage its address.
        let known = ["[libc.so.6]", "[libm.so.6]", "[libgcc_s.so.1]", "[ld-linux"];
        assert!(known.iter().any(|name| line.contains(name)), "needs more than libc: {line}");
        println!("{}", line.trim());
    }
    let names = |flags: &[&str], library: &Path| -> Vec<String> {
        let text = succeed(Command::new("nm").args(flags).arg("--defined-only").arg(library));
        let names = text.lines().filter(|line| line.split_whitespace().count() == 3);
        let mut names: Vec<String> =
            names.filter_map(|l| l.split_whitespace().last()).map(str::to_owned).collect();
        names.sort();
        names
    };
    let mut declared = functions();
    declared.sort();
    assert_eq!(names(&["-D"], &library), declared);
    // How exception tables find the personality routine; a weak symbol, the same in every library.
    declared.insert(0, "DW.ref.rust_eh_personality".into());
    assert_eq!(names(&["-g"], &work.lib().join("libmxfp4train.a")), declared);
}

fn with_pkg_config(work: &Workplace) {
    let dir = work.copy("pkg-config");
    for (arguments, needed) in
        [(&["STATIC=full"][..], None), (&["STATIC=1"], Some(false)), (&[], Some(true))]
    {
        let mut build = Command::new("make");
        build.args(["-B", "-C"]).arg(&dir).args(arguments);
        succeed(build.env("PKG_CONFIG_PATH", work.lib().join("pkgconfig")));
        let program = dir.join("program");
        println!("{arguments:?}: {}", succeed(&mut work.program(program.clone())).trim());
        let dynamic = succeed(Command::new("readelf").arg("-d").arg(&program));
        let is_needed = dynamic.contains("[libmxfp4train.so.0]");
        match needed {
            Some(needed) => assert_eq!(is_needed, needed, "{dynamic}"),
            None => assert!(!dynamic.contains("(NEEDED)"), "{dynamic}"),
        }
    }
    let version = succeed(
        Command::new("pkg-config")
            .args(["--modversion", "mxfp4train"])
            .env("PKG_CONFIG_PATH", work.lib().join("pkgconfig")),
    );
    assert_eq!(version.trim(), env!("CARGO_PKG_VERSION"));
}

fn with_cmake(work: &Workplace) {
    let dir = work.copy("cmake");
    let build = |name: &str, options: &[&str]| {
        let build = dir.join(name);
        let mut configure = Command::new("cmake");
        configure.arg("-S").arg(&dir).arg("-B").arg(&build).args(options);
        succeed(configure.arg(format!("-DCMAKE_PREFIX_PATH={}", work.prefix.display())));
        succeed(Command::new("cmake").arg("--build").arg(&build));
        build
    };
    let needs_library = |program: &Path| {
        succeed(Command::new("readelf").arg("-d").arg(program)).contains("[libmxfp4train.so.0]")
    };
    let both = build("both", &["-DKINDS=mxfp4train;shared;static"]);
    for (kind, needed) in [("mxfp4train", true), ("shared", true), ("static", false)] {
        let program = both.join(kind);
        // CMake writes the folder of the shared library into the program.
        println!("{kind}: {}", succeed(&mut Command::new(&program)).trim());
        assert_eq!(needs_library(&program), needed, "{kind}");
    }
    let chosen = build("chosen", &["-DKINDS=mxfp4train", "-Dmxfp4train_USE_STATIC_LIBS=ON"]);
    assert!(!needs_library(&chosen.join("mxfp4train")));

    // A packager may leave one kind out.
    let version = env!("CARGO_PKG_VERSION");
    let shared = work.lib().join(format!("libmxfp4train.so.{version}"));
    let aside = work.dir.join("aside");
    fs::rename(&shared, &aside).expect("the library can be moved");
    let left = build("left", &["-DKINDS=mxfp4train"]);
    assert!(!needs_library(&left.join("mxfp4train")));
    fs::rename(&aside, &shared).expect("the library can be moved back");
}

/// The suppressions that are installed fit the library that is installed.
fn under_valgrind(work: &Workplace) {
    if !has_program("valgrind") {
        return;
    }
    let program = work.dir.join("pkg-config/program");
    let suppressions = work.prefix.join("share/mxfp4train/valgrind.supp");
    let mut command = work.program("valgrind".into());
    command.args(["--quiet", "--error-exitcode=99", "--leak-check=full", "--fair-sched=yes"]);
    command.arg(format!("--suppressions={}", suppressions.display()));
    succeed(command.arg(program));
}

fn loaded_by_threads(work: &Workplace) {
    let dir = work.copy("dlopen");
    let program = dir.join("program");
    let mut build = Command::new("cc");
    build.args(["-std=c99", "-Wall", "-Wextra", "-pedantic", "-Werror"]);
    build.arg("-I").arg(work.prefix.join("include")).arg(dir.join("main.c")).arg("-o");
    succeed(build.arg(&program).args(["-lpthread", "-ldl"]));
    succeed(Command::new(program).arg(work.lib().join("libmxfp4train.so.0")));
}

fn beside_another_rust_library(work: &Workplace) {
    let dir = work.copy("two-libraries");
    let mut other = Command::new("rustc");
    other.args(["--edition=2024", "--crate-type=staticlib", "-O"]).arg(dir.join("other.rs"));
    succeed(other.arg("-o").arg(dir.join("libother.a")));
    // Either order: the first library's runtime must not stand in for the second's.
    for order in [["libother.a", "libmxfp4train.a"], ["libmxfp4train.a", "libother.a"]] {
        let program = dir.join("program");
        let mut build = Command::new("cc");
        build.args(["-std=c99", "-Wall", "-Wextra", "-pedantic", "-Werror", "-I"]);
        build.arg(work.prefix.join("include")).arg(dir.join("main.c")).arg("-o").arg(&program);
        build.arg("-L").arg(&dir).arg("-L").arg(work.lib());
        build.args(order.map(|name| format!("-l:{name}"))).args(["-lm", "-lpthread", "-ldl"]);
        succeed(&mut build);
        succeed(&mut Command::new(program));
    }
}

fn mxtrain_runs(work: &Workplace) {
    let version = succeed(Command::new(work.prefix.join("bin/mxtrain")).arg("--version"));
    assert!(version.contains(env!("CARGO_PKG_VERSION")), "{version}");
}

fn make(target: &str) -> Command {
    let mut command = Command::new("make");
    command.arg("-C").arg(root()).arg(target);
    command
}

/// All files below a folder, sorted.
fn files(folder: &Path) -> Vec<PathBuf> {
    fn walk(folder: &Path, base: &Path, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(folder).expect("the folder is there") {
            let path = entry.expect("the entry can be read").path();
            if path.is_dir() {
                walk(&path, base, found);
            } else {
                found.push(path.strip_prefix(base).expect("below").to_owned());
            }
        }
    }
    let mut found = Vec::new();
    walk(folder, folder, &mut found);
    found.sort();
    found
}
