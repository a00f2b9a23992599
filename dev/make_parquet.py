#!/usr/bin/env python3
"""Makes the Parquet files of examples/mxtrain/tests/texts/parquet with pyarrow (26.0 made them).

Usage: python3 dev/make_parquet.py OUT

Each holds the documents "row 0: ..." to "row 39: ..." in the column `text`, rows 7 and 21 without one,
written as its name says.
"""
import pathlib
import sys

import pyarrow
import pyarrow.parquet


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    out = pathlib.Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    texts = [f"row {i}: naïve 語 🦀 {'ha ' * (i % 5)}\n" for i in range(40)]
    texts[7] = texts[21] = None
    table = pyarrow.table({"id": list(range(40)), "text": texts, "tags": [["a", "b"]] * 40})
    large = table.set_column(1, "text", pyarrow.array(texts, pyarrow.large_string()))
    coded = table.set_column(1, "text", pyarrow.array(texts).dictionary_encode())
    for name, written, options in [
        ("snappy", table, dict(compression="snappy")),
        ("zstd-large-strings", large, dict(compression="zstd", use_dictionary=False)),
        ("gzip-groups", table, dict(compression="gzip", row_group_size=7)),
        ("plain-pages", table, dict(compression="none", data_page_size=200, write_batch_size=4)),
        ("pages-v2", table, dict(compression="zstd", data_page_version="2.0")),
        ("dictionary", coded, dict(compression="snappy")),
        ("delta", table, dict(use_dictionary=False, column_encoding={"text": "DELTA_BYTE_ARRAY"})),
        ("lz4", table, dict(compression="lz4")),
    ]:
        pyarrow.parquet.write_table(written, out / f"{name}.parquet", **options)


if __name__ == "__main__":
    main()
