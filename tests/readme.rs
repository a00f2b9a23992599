//! The programs that README.md shows are files of `examples`, word for word, and the commands that
//! it shows for C and C++, run one after the other as they stand, end with trained models.
//! `tests/julia.rs` runs the program of Julia.
//!
//! A block belongs to a file when its first line is a comment with nothing but the file's path,
//! such as `// examples/cpp/ten_lines.cpp`. Commands are the indented blocks of a section.

mod common;

use std::fs;
use std::path::Path;
use std::process::Command;

use common::{Compiler, has_program, root, succeed};

#[test]
fn blocks_are_the_files() {
    let text = fs::read_to_string(root().join("README.md")).unwrap_or_default();
    let shown: Vec<(&str, String)> = blocks(&text);
    for (path, block) in &shown {
        let file = fs::read_to_string(root().join(path)).unwrap_or_else(|error| {
            panic!("README.md shows {path}, which cannot be read: {error}");
        });
        assert_eq!(block, &file, "README.md and {path} differ: paste the file into the block");
    }
    for path in [
        "examples/c/ten_lines.c",
        "examples/cpp/ten_lines.cpp",
        "examples/julia/ten_lines.jl",
        "examples/python/ten_lines.py",
    ] {
        if !shown.iter().any(|(shown, _)| *shown == path) {
            eprintln!("skipped: README.md does not show {path}");
        }
    }
}

/// One shell for both, as the reader has it.
#[test]
fn commands_for_c_and_cpp_train() {
    if !["cc", "c++"].iter().all(|tool| has_program(tool)) {
        return;
    }
    let readme = fs::read_to_string(root().join("README.md")).expect("README.md");
    let [c, cpp] = ["## From C", "## From C++"].map(|heading| commands(&readme, heading));
    // mktemp makes its folder in ours, which goes away.
    let dir = tempfile::tempdir().expect("a temporary folder");
    let script = format!("set -e\n{c}echo then\n{cpp}pwd\n");
    let mut shell = Command::new("sh");
    shell.args(["-c", &script]).current_dir(root()).env("TMPDIR", dir.path());
    // Cargo's own folders would come before the one that the command names.
    shell.env_remove("LD_LIBRARY_PATH").env("CARGO_TARGET_DIR", root().join("target"));
    let text = succeed(&mut shell);
    let place = Path::new(text.lines().next_back().expect("the folder"));
    assert!(place.starts_with(dir.path()), "{text}");
    assert!(place.join("out/model.safetensors").exists(), "nothing was saved");
    let (first, second) = text.split_once("then\n").expect("two programs");
    for (name, text) in [("C", first), ("C++", second)] {
        let losses: Vec<f32> =
            text.lines().filter_map(|line| line.strip_prefix("loss ")?.parse().ok()).collect();
        assert_eq!(losses.len(), 100, "{text}");
        assert!(losses[99] < 0.7 * losses[0], "it did not learn:\n{text}");
        println!("{name}: loss {} to {}", losses[0], losses[99]);
    }
}

#[test]
fn ten_lines_are_ten_in_every_standard() {
    for (path, command, standards) in [
        ("examples/c/ten_lines.c", "cc", &["-std=c99", "-std=c11"]),
        ("examples/cpp/ten_lines.cpp", "c++", &["-std=c++17", "-std=c++20"]),
    ] {
        let source = root().join(path);
        let text = fs::read_to_string(&source).expect("the example is there");
        let body = text.lines().skip_while(|line| !line.contains("int main(")).skip(1);
        let lines = body.take_while(|line| *line != "}").count();
        assert!(lines <= 10, "{path}: expected ten lines in main, got {lines}");
        for standard in standards {
            let dir = tempfile::tempdir().expect("a temporary folder");
            Compiler { command, standard, flags: &[] }
                .program(std::slice::from_ref(&source), dir.path());
        }
    }
}

/// The indented lines below a heading, without their indentation.
fn commands(markdown: &str, heading: &str) -> String {
    let section = markdown.lines().skip_while(|line| *line != heading).skip(1);
    let section = section.take_while(|line| !line.starts_with("## "));
    // Fenced blocks are indented, too.
    let mut fenced = false;
    let lines = section.filter_map(|line| {
        fenced ^= line.starts_with("```");
        line.strip_prefix("    ").filter(|_| !fenced)
    });
    let text: String = lines.flat_map(|line| [line, "\n"]).collect();
    assert!(!text.is_empty(), "README.md shows no commands under {heading:?}");
    text
}

/// The fenced blocks whose first line names a file of C, C++ or Julia: path and text.
fn blocks(markdown: &str) -> Vec<(&str, String)> {
    let mut found = Vec::new();
    let mut lines = markdown.lines();
    while let Some(line) = lines.next() {
        if !line.starts_with("```") || line == "```" {
            continue;
        }
        let block: Vec<&str> = lines.by_ref().take_while(|line| *line != "```").collect();
        let path = block
            .first()
            .and_then(|first| first.strip_prefix("// ").or_else(|| first.strip_prefix("# ")));
        let is_file = |path: &&str| {
            let extension = Path::new(path).extension().and_then(|extension| extension.to_str());
            matches!(extension, Some("c" | "cpp" | "h" | "hpp" | "jl")) && !path.contains(' ')
        };
        if let Some(path) = path.filter(is_file) {
            found.push((path, block.join("\n") + "\n"));
        }
    }
    found
}

#[test]
fn blocks_are_found_by_their_first_line() {
    let markdown = "text\n```c\n// a/b.c\nint x;\n```\n```sh\n// no file\n```\n```\nplain\n```\n\
                    ```julia\n# b.jl\nx = 1\n```\n```julia\n# No file.\n```\n";
    let expected = [("a/b.c", "// a/b.c\nint x;\n"), ("b.jl", "# b.jl\nx = 1\n")];
    assert_eq!(blocks(markdown), expected.map(|(path, text)| (path, text.to_owned())));
}
