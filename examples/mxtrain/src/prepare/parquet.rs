//! The texts of a Parquet file's column, page by page.

use std::fs::File;
use std::path::Path;

use parquet::basic::{Compression, Type};
use parquet::column::reader::ColumnReader;
use parquet::data_type::ByteArray;
use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::schema::types::SchemaDescriptor;

use super::content;
use crate::failure::{Failure, Outcome};

/// Rows read at a time.
const ROWS: usize = 64;

/// Texts that were read; `None` where a row has none.
pub(super) type Texts = Vec<Option<String>>;

/// Gives the texts of column `field` in groups of about `chunk` bytes, each with the part of the
/// file that is done.
pub(super) fn read(
    path: &Path,
    field: &str,
    chunk: usize,
    mut give: impl FnMut(Texts, f64) -> Outcome,
) -> Outcome {
    let damaged = |error: ParquetError| {
        Failure::usage(format!(
            "{}: cannot be read as a Parquet file ({error}); fetch or make it again",
            path.display()
        ))
    };
    let file = File::open(path).map_err(Failure::io("open", path))?;
    content::check_parquet(&file, path)?;
    let reader = SerializedFileReader::new(file).map_err(damaged)?;
    let metadata = reader.metadata();
    let column = column(metadata.file_metadata().schema_descr(), field)
        .map_err(|message| Failure::usage(format!("{}: {message}", path.display())))?;
    let all = metadata.file_metadata().num_rows().max(1) as f64;

    let (mut texts, mut bytes, mut done) = (Texts::new(), 0, 0_u64);
    let (mut values, mut levels) = (Vec::<ByteArray>::new(), Vec::<i16>::new());
    for group in 0..reader.num_row_groups() {
        let compression = metadata.row_group(group).column(column).compression();
        if !matches!(
            compression,
            Compression::UNCOMPRESSED
                | Compression::SNAPPY
                | Compression::GZIP(_)
                | Compression::ZSTD(_)
        ) {
            return Err(Failure::usage(format!(
                "{}: expected a column compressed with snappy, zstd, gzip or not at all, found \
                 {compression}; write the table again with one of those",
                path.display()
            )));
        }
        let group = reader.get_row_group(group).map_err(damaged)?;
        let ColumnReader::ByteArrayColumnReader(mut rows) =
            group.get_column_reader(column).map_err(damaged)?
        else {
            unreachable!("the column's type was checked");
        };
        let filled = group.metadata().column(column).column_descr().max_def_level();
        loop {
            values.clear();
            levels.clear();
            let (read, ..) =
                rows.read_records(ROWS, Some(&mut levels), None, &mut values).map_err(damaged)?;
            if read == 0 {
                break;
            }
            // Only rows that have a value take one.
            let mut present = values.drain(..);
            for row in 0..read {
                done += 1;
                let is_null = filled > 0 && levels.get(row).is_none_or(|&l| l < filled);
                let value = if is_null { None } else { present.next() };
                let text = value.map(|value| {
                    String::from_utf8(value.data().to_vec()).map_err(|error| {
                        Failure::usage(format!(
                            "{}: expected UTF-8 text in column {field:?}, found byte 0x{:02x} in \
                             row {done}",
                            path.display(),
                            error.as_bytes()[error.utf8_error().valid_up_to()],
                        ))
                    })
                });
                let text = text.transpose()?;
                bytes += text.as_ref().map_or(0, String::len);
                texts.push(text);
                if bytes >= chunk {
                    give(std::mem::take(&mut texts), done as f64 / all)?;
                    bytes = 0;
                }
            }
        }
    }
    give(texts, 1.0)
}

/// The place of the column with the texts.
fn column(schema: &SchemaDescriptor, field: &str) -> Result<usize, String> {
    let columns = schema.columns();
    let Some(place) = columns.iter().position(|column| column.path().parts()[0] == field) else {
        // Columns within a column cannot be named, so only the outer one is.
        let mut names: Vec<String> =
            columns.iter().map(|c| format!("{:?}", c.path().parts()[0])).collect();
        names.dedup();
        return Err(format!(
            "expected a column {field:?} with documents, found {}; name another with --text-field",
            names.join(", ")
        ));
    };
    let found = &columns[place];
    if found.physical_type() != Type::BYTE_ARRAY
        || found.max_rep_level() > 0
        || found.path().parts().len() > 1
    {
        return Err(format!(
            "expected strings in column {field:?}, found {}; name another with --text-field, or \
             write its texts to a column of their own",
            match found.path().parts().len() {
                _ if found.max_rep_level() > 0 => format!("lists of {}", found.physical_type()),
                1 => found.physical_type().to_string(),
                _ => "records of several columns".to_owned(),
            },
        ));
    }
    Ok(place)
}
