//! `mxtrain recipes`: what recipes are made of, as a table that Markdown readers take, too.

use std::process::ExitCode;

use mxfp4train::Recipe;
use mxfp4train::formats::{LINEAR_NAMES, LINEARS, LinearRecipe};

use crate::cli::RecipesArgs;
use crate::console;
use crate::failure::Outcome;

pub(crate) fn run(args: &RecipesArgs) -> Outcome<ExitCode> {
    let all =
        || Recipe::NAMES.map(|name| name.parse().expect("a recipe's name is a recipe")).into();
    let recipes = if args.recipes.is_empty() { all() } else { args.recipes.clone() };
    console::print(&table(&recipes))?;
    Ok(ExitCode::SUCCESS)
}

/// A row for each, columns as wide as their widest cell. Where linear layers differ, a row for each
/// kind of them.
fn table(recipes: &[Recipe]) -> String {
    let head = ["recipe", "y: x, W", "dx: dy, W", "dW: dy, x", "in bf16"];
    let mut rows = vec![head.map(str::to_owned), head.map(|_| String::new())];
    for recipe in recipes {
        for (linear, names) in kinds(recipe) {
            let [mut y, dx, dw] = linear.gemms().map(|gemm| {
                let (a, b) = (gemm.a().to_string(), gemm.b().to_string());
                if a == b { a } else { format!("{a}, {b}") }
            });
            if let Some(bits) = recipe.haste() {
                y.push_str(&format!(" haste {bits}"));
            }
            let of = if names.len() == LINEARS { "" } else { &format!(" {}", names.join(", ")) };
            rows.push([format!("`{recipe}`{of}"), y, dx, dw, recipe.excepted()]);
        }
    }
    let width = |column: usize| rows.iter().map(|row| row[column].len()).max().unwrap_or(0);
    let widths: [usize; 5] = std::array::from_fn(width);
    rows[1] = widths.map(|width| "-".repeat(width));
    let line = |row: &[String; 5]| {
        let cells = row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}"));
        format!("| {} |\n", cells.collect::<Vec<_>>().join(" | "))
    };
    rows.iter().map(line).collect()
}

/// The linear layers of a recipe that differ, each with the names of those that are alike.
fn kinds(recipe: &Recipe) -> Vec<(&LinearRecipe, Vec<&'static str>)> {
    let mut kinds: Vec<(&LinearRecipe, Vec<&str>)> = Vec::new();
    for (number, name) in LINEAR_NAMES.into_iter().enumerate() {
        let linear = recipe.linear(number);
        match kinds.iter_mut().find(|(kind, _)| *kind == linear) {
            Some((_, names)) => names.push(name),
            None => kinds.push((linear, vec![name])),
        }
    }
    kinds
}
