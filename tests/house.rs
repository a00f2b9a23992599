//! Imports run one way. Every room of the library stands in the list below; a file may use what
//! stands in its own room or further down, never what stands above it, so no circle ever leaves a
//! room.
//!
//! Read from the sources: `use` declarations and paths that begin with `crate` or `super`. What
//! only tests see may look anywhere. Paths within a macro's arguments are not seen.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use syn::visit::{self, Visit};

/// From the top down: a module stands in the room with the longest name that its path begins with.
const ROOMS: [&str; 23] = [
    "capi",
    "trainer",
    "decoder",
    "model",
    "checkpoint",
    "run",
    "gpt",
    "recipe",
    "data",
    "engine",
    "backend::cuda",
    "backend::cuda::device",
    "backend::cpu",
    "backend",
    "comm",
    "optim",
    "formats",
    "signals",
    "thread",
    "room",
    "reserve",
    "emergency",
    "error",
];

/// A module, as `backend::cpu`; the crate's root is empty.
type Module = Vec<String>;

/// What a source file uses, and the files of its modules.
#[derive(Default)]
struct Uses {
    /// Paths as they are written.
    paths: Vec<Vec<String>>,
    /// Modules in files of their own, but for those of tests.
    files: Vec<String>,
}

fn is_for_tests(attributes: &[syn::Attribute]) -> bool {
    attributes.iter().any(|attribute| match &attribute.meta {
        syn::Meta::List(list) if list.path.is_ident("cfg") => list.tokens.to_string() == "test",
        _ => false,
    })
}

impl Uses {
    fn add_tree(&mut self, tree: &syn::UseTree, before: &[String]) {
        let with = |ident: &syn::Ident| [before, &[ident.to_string()]].concat();
        match tree {
            syn::UseTree::Path(path) => self.add_tree(&path.tree, &with(&path.ident)),
            syn::UseTree::Name(name) => self.paths.push(with(&name.ident)),
            syn::UseTree::Rename(name) => self.paths.push(with(&name.ident)),
            syn::UseTree::Group(group) => {
                group.items.iter().for_each(|tree| self.add_tree(tree, before));
            }
            syn::UseTree::Glob(_) => self.paths.push(before.to_vec()),
        }
    }
}

impl<'a> Visit<'a> for Uses {
    fn visit_item(&mut self, item: &'a syn::Item) {
        let attributes = match item {
            syn::Item::Mod(module) => &module.attrs,
            syn::Item::Fn(function) => &function.attrs,
            syn::Item::Use(item) => &item.attrs,
            syn::Item::Impl(item) => &item.attrs,
            _ => &[][..],
        };
        if is_for_tests(attributes) {
            return;
        }
        if let syn::Item::Mod(module) = item
            && module.content.is_none()
        {
            self.files.push(module.ident.to_string());
        }
        visit::visit_item(self, item);
    }

    fn visit_impl_item_fn(&mut self, function: &'a syn::ImplItemFn) {
        if !is_for_tests(&function.attrs) {
            visit::visit_impl_item_fn(self, function);
        }
    }

    fn visit_item_use(&mut self, item: &'a syn::ItemUse) {
        self.add_tree(&item.tree, &[]);
    }

    fn visit_path(&mut self, path: &'a syn::Path) {
        let names: Vec<_> = path.segments.iter().map(|s| s.ident.to_string()).collect();
        if matches!(names[0].as_str(), "crate" | "super") && names.len() > 1 {
            self.paths.push(names);
        }
        visit::visit_path(self, path);
    }
}

/// All source files of a module and below it, with what they use.
fn read(file: &Path, module: Module, all: &mut Vec<(PathBuf, Module, Uses)>) {
    let text = fs::read_to_string(file).unwrap();
    let mut uses = Uses::default();
    uses.visit_file(&syn::parse_file(&text).unwrap_or_else(|e| panic!("{}: {e}", file.display())));
    let stem = file.file_stem().unwrap().to_str().unwrap();
    let folder = match stem {
        "lib" | "mod" => file.parent().unwrap().to_owned(),
        _ => file.with_extension(""),
    };
    for name in uses.files.clone() {
        let [flat, deep] = [format!("{name}.rs"), format!("{name}/mod.rs")].map(|f| folder.join(f));
        let file = if flat.exists() { flat } else { deep };
        read(&file, [&module[..], &[name]].concat(), all);
    }
    all.push((file.to_owned(), module, uses));
}

/// The number of the room that a module, or something in one, stands in.
fn room_of(path: &[String]) -> Option<usize> {
    let begins = |room: &&str| {
        let names: Vec<_> = room.split("::").collect();
        path.len() >= names.len() && names.iter().zip(path).all(|(a, b)| a == b)
    };
    let rooms = ROOMS.iter().enumerate().filter(|(_, room)| begins(room));
    rooms.max_by_key(|(_, room)| room.len()).map(|(number, _)| number)
}

#[test]
fn imports_run_one_way() {
    let mut files = Vec::new();
    read(Path::new("src/lib.rs"), Vec::new(), &mut files);
    // Names that the crate's root gives again: where they come from.
    let (_, _, root) = files.iter().find(|(_, module, _)| module.is_empty()).unwrap();
    let given: HashMap<_, _> = root
        .paths
        .iter()
        .filter(|path| path.len() > 1 && path[0] != "crate")
        .map(|path| (path.last().unwrap().clone(), path.clone()))
        .collect();
    let (mut looked_at, mut wrong) = (0, Vec::new());
    for (file, module, uses) in files.iter().filter(|(_, module, _)| !module.is_empty()) {
        let own = room_of(module).unwrap_or_else(|| {
            panic!("{}: in no room of tests/house.rs; put it where it belongs", file.display())
        });
        for path in &uses.paths {
            let mut names = &path[..];
            let mut from = module.clone();
            let absolute = match names[0].as_str() {
                "crate" => names[1..].to_vec(),
                "super" => {
                    while names[0] == "super" {
                        // Out of a module within the file, which does not count.
                        if from.is_empty() {
                            break;
                        }
                        from.pop();
                        names = &names[1..];
                        if names.is_empty() {
                            break;
                        }
                    }
                    [&from[..], names].concat()
                }
                _ => continue,
            };
            let absolute = match absolute.first().and_then(|name| given.get(name)) {
                Some(origin) => [&origin[..], &absolute[1..]].concat(),
                None => absolute,
            };
            let Some(room) = room_of(&absolute) else { continue };
            looked_at += 1;
            if ROOMS[own] == "gpt" && ["backend::cpu", "backend::cuda"].contains(&ROOMS[room]) {
                wrong.push(format!("{}: names a backend", file.display()));
            }
            if room < own {
                wrong.push(format!(
                    "{}: {} uses {}, which stands above it",
                    file.display(),
                    ROOMS[own],
                    absolute.join("::"),
                ));
            }
        }
    }
    assert!(looked_at > 500, "only {looked_at} imports were found");
    assert!(wrong.is_empty(), "imports that run up:\n{}", wrong.join("\n"));
}
