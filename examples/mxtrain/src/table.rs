//! A table as aligned text and as Markdown.

/// Columns with a name, and rows of cells.
#[derive(Clone, Debug)]
pub(crate) struct Table {
    /// Columns of words, which stand on the left; numbers stand on the right.
    words: usize,
    header: Vec<String>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table without rows, whose first columns are words.
    pub(crate) fn new<S: Into<String>>(words: usize, header: impl IntoIterator<Item = S>) -> Self {
        Self { words, header: header.into_iter().map(Into::into).collect(), rows: Vec::new() }
    }

    /// Adds a row.
    pub(crate) fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().collect());
    }

    /// For a terminal.
    pub(crate) fn text(&self) -> String {
        let widths: Vec<usize> = (0..self.header.len())
            .map(|i| self.lines().map(|row| row[i].chars().count()).max().unwrap_or(0))
            .collect();
        let mut text = String::new();
        for row in self.lines() {
            let cells = row.iter().zip(&widths).enumerate().map(|(i, (cell, &width))| {
                if i < self.words { format!("{cell:width$}") } else { format!("{cell:>width$}") }
            });
            text.push_str(cells.collect::<Vec<_>>().join("  ").trim_end());
            text.push('\n');
        }
        text
    }

    /// For a document.
    pub(crate) fn markdown(&self) -> String {
        let escaped = |(i, cell): (usize, &String)| match i < self.words {
            true => cell.replace('|', "\\|").replace('<', "&lt;"),
            false => cell.clone(),
        };
        let line = |cells: &[String]| {
            let cells = cells.iter().enumerate().map(escaped);
            format!("| {} |\n", cells.collect::<Vec<_>>().join(" | "))
        };
        let mut text = line(&self.header);
        let numbers = self.header.len() - self.words;
        text.push_str(&format!("|{}{}\n", " --- |".repeat(self.words), " ---: |".repeat(numbers)));
        self.rows.iter().for_each(|row| text.push_str(&line(row)));
        text
    }

    fn lines(&self) -> impl Iterator<Item = &Vec<String>> {
        [&self.header].into_iter().chain(&self.rows)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_aligned_and_markdown_has_a_rule() {
        let mut table = Table::new(1, ["name", "loss"]);
        table.row(["a".into(), "1.5".into()]);
        table.row(["longer".into(), "12.25".into()]);
        assert_eq!(table.text(), "name     loss\na         1.5\nlonger  12.25\n");
        assert_eq!(
            table.markdown(),
            "| name | loss |\n| --- | ---: |\n| a | 1.5 |\n| longer | 12.25 |\n"
        );
        table.row(["a|<b>".into(), "< 1".into()]);
        assert!(table.markdown().ends_with("| a\\|&lt;b> | < 1 |\n"), "{}", table.markdown());
    }
}
