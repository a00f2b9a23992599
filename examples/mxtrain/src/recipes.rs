//! `mxtrain recipes`: what recipes are made of, as a table that Markdown readers take, too.

use std::process::ExitCode;

use mxfp4train::Recipe;

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
        let linear = recipe.linear(0);
        let [y, dx, dw] = linear.gemms().map(|gemm| {
            let (a, b) = (gemm.a().to_string(), gemm.b().to_string());
            if a == b { a } else { format!("{a}, {b}") }
        });
        rows.push([format!("`{recipe}`"), y, dx, dw, recipe.excepted()]);
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
