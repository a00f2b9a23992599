//! The programs that README.md shows are files of `examples`, word for word, and those of C and C++
//! compile and train. `tests/julia.rs` runs the one of Julia.
//!
//! A block belongs to a file when its first line is a comment with nothing but the file's path, such
//! as `// examples/cpp/ten_lines.cpp`.

mod common;

use std::fs;
use std::path::Path;
use std::process::Command;

use common::{Compiler, root, succeed_quietly, write_tokens};

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
    for path in
        ["examples/c/ten_lines.c", "examples/cpp/ten_lines.cpp", "examples/julia/ten_lines.jl"]
    {
        if !shown.iter().any(|(shown, _)| *shown == path) {
            eprintln!("skipped: README.md does not show {path}");
        }
    }
}

#[test]
fn ten_lines_of_c_train() {
    for standard in ["-std=c99", "-std=c11"] {
        trains("examples/c/ten_lines.c", "cc", standard);
    }
}

#[test]
fn ten_lines_of_cpp_train() {
    trains("examples/cpp/ten_lines.cpp", "c++", "-std=c++17");
}

/// Compiles the file, lets it train and looks whether it learned and saved.
fn trains(path: &str, command: &str, standard: &str) {
    let source = root().join(path);
    let text = fs::read_to_string(&source).expect("the example is there");
    let body = text.lines().skip_while(|line| !line.contains("int main(")).skip(1);
    let lines = body.take_while(|line| *line != "}").count();
    assert!(lines <= 10, "{path}: expected ten lines in main, got {lines}");

    let dir = tempfile::tempdir().expect("a temporary folder");
    write_tokens(&dir.path().join("train.bin"));
    let program = Compiler { command, standard, flags: &[] }.program(&[source], dir.path());
    let text = succeed_quietly(Command::new(program).current_dir(dir.path()));
    let losses: Vec<f32> = text
        .lines()
        .map(|line| line.trim_start_matches("loss ").parse().expect("a line is a loss"))
        .collect();
    assert_eq!(losses.len(), 100, "{text}");
    assert!(losses[99] < 0.5 * losses[0], "it did not learn:\n{text}");
    assert!(dir.path().join("out/model.safetensors").exists(), "nothing was saved");
    println!("{path}: loss {} to {}", losses[0], losses[99]);
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
