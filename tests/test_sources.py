"""Which files and records become documents; txt files in pieces; bad input is one sentence."""

import gzip
import io
import json
import random
import re

import gigatoken
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import fineweb
from test_shards import BPE, TEXTS, make, reference, refusal, tokens_of

MARK = "<|endoftext|>"
WITHIN_LINES = f"1 {MARK}\n{MARK} 2\n {MARK}\n"
SPACES = "a" + " " * 1_100_000 + "b"  # of which tiktoken dies


def tree(folder, files):
    """Make files of texts or bytes in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def lines(*values):
    return "".join(json.dumps({"text": value}) + "\n" for value in values)


def ids_of(folder):
    return sum(tokens_of(folder), [])


def ids_of_documents(documents):
    return sum(reference(documents), [])


# Which documents

SOURCES = {  # what lies in a folder; the documents that it holds, in order
    "hidden": ({"a.txt": "1", ".git/x.txt": "no", "._a.txt": "no", "b/.x/a.txt": "no"}, ["1"]),
    "numbers": ({"x10.txt": "4", "x9.txt": "3", "x1/10.txt": "2", "x1/2.txt": "1"}, [*"1234"]),
    "upper case": ({"B.TXT": "1", "a.txt": "2"}, ["1", "2"]),
    "other types": ({"a.txt": "1", "b.md": "#", "c.pdf": "%", "README": "no"}, ["1"]),
    "JSON": ({"a.json": lines("1"), "b.JSON.gz": gzip.compress(lines("2").encode())}, ["1", "2"]),
    "no rows": ({"a.jsonl": "\n\n", "b.jsonl": lines("1"), "c.jsonl": ""}, ["1"]),
    "half a surrogate pair": ({"a.jsonl": lines("\ud800 half")}, ["\ufffd half"]),
    "too much for tiktoken": ({"a.jsonl": lines(SPACES, "next")}, [SPACES, "next"]),
    "byte-order marks": ({"a.txt": "\ufeff1", "b.txt": "\ufeff\ufeff2"}, ["1", "\ufeff2"]),
    "such a mark in JSON": ({"a.jsonl": "\ufeff" + lines("1")}, ["1"]),
    "separators": ({"a.txt": f"1\n{MARK}\n2\n"}, ["1\n", "2\n"]),
    "at both ends": ({"a.txt": f"{MARK}\n1\n{MARK}\n{MARK}\n2\n{MARK}"}, ["1\n", "2\n"]),
    "Windows": ({"a.txt": f"1\r\n{MARK}\r\n2"}, ["1\r\n", "2"]),
    "within lines": ({"a.txt": WITHIN_LINES}, [WITHIN_LINES]),
    "within JSON": ({"a.jsonl": lines(f"1\n{MARK}\n2")}, [f"1\n{MARK}\n2"]),
}


@pytest.mark.parametrize("case", SOURCES)
def test_a_folder_holds_these_documents(tmp_path, case):
    files, documents = SOURCES[case]
    make(tree(tmp_path / "in", files), tmp_path / "out", shard_size=10**7)
    assert ids_of(tmp_path / "out") == ids_of_documents(documents)


def table_file(write, type_=None):
    """The bytes of a file of TEXTS that `write` makes of a table."""
    file = io.BytesIO()
    column = pa.array(TEXTS).cast(type_ or pa.string())
    write(pa.table({"id": range(len(TEXTS)), "text": column}), file)
    return file.getvalue()


def arrow_writer(new):
    def write(table, file):
        with new(file, table.schema) as writer:
            writer.write_table(table)

    return write


LINES = lines(*TEXTS).encode()
MEMBERS = gzip.compress(LINES[:5000]) + gzip.compress(LINES[5000:])
FILES = {f"a/b/{i:03d} [{i}].txt": text for i, text in enumerate(TEXTS)}
WORD_IDS = pa.dictionary(pa.int32(), pa.string())
PARQUET = table_file(pq.write_table)
FORMS = {  # the files of TEXTS, and the --source that finds them
    "jsonl": ({"x.jsonl": LINES}, "[in]/x.jsonl"),
    "two gzip members": ({"x.jsonl.gz": MEMBERS}, "[in]"),
    "zstandard": ({"x.jsonl.zst": pa.Codec("zstd").compress(LINES).to_pybytes()}, "[in]"),
    "lines of Windows": ({"x.jsonl": LINES.replace(b"\n", b"\r\n\r\n")}, "[in]"),
    "a folder of txt": (FILES, "[in]"),
    "a deep pattern": (FILES, "?in?/**"),
    "a pattern": (FILES, "*/a/b/*.txt"),
    "parquet": ({"x.parquet": PARQUET}, "[in]/x.parquet"),
    "large strings": ({"x.parquet": table_file(pq.write_table, pa.large_string())}, "[in]"),
    "a dictionary": ({"x.parquet": table_file(pq.write_table, WORD_IDS)}, "[in]"),
    "an Arrow file": ({"x.arrow": table_file(arrow_writer(pa.ipc.new_file))}, "[in]"),
    "an Arrow stream": ({"x.arrow": table_file(arrow_writer(pa.ipc.new_stream))}, "[in]"),
}


@pytest.mark.parametrize("case", FORMS)
def test_each_form_of_text_gives_the_same_shards(tmp_path, monkeypatch, case):
    files, pattern = FORMS[case]
    tree(tmp_path / "[in]", files)
    monkeypatch.setattr(fineweb, "CHUNK_ROWS", 50)
    monkeypatch.setattr(fineweb, "CHUNK_SIZE", 10_000)
    make(tmp_path / pattern, tmp_path / "out")
    assert tokens_of(tmp_path / "out") == reference(TEXTS, 1000)


def test_shards_within_the_source_are_no_source(tmp_path):
    folder = tree(tmp_path / "in", {"a.txt": "hello", "out/notes.txt": "of the shards"})
    for _ in range(2):  # the second time they lie there
        make(folder, folder / "out")
    assert ids_of(folder / "out") == ids_of_documents(["hello"])


@pytest.mark.parametrize("size", [1, 1 << 22])
def test_values_that_are_not_text_are_skipped_and_counted(tmp_path, monkeypatch, size):
    """In one chunk or in several; their neighbours are as they were."""
    monkeypatch.setattr(fineweb, "CHUNK_SIZE", size)
    values = lines("1", None, 5, "", ["no"], "7") + '{"other": "x"}\n'
    done = make(tree(tmp_path / "in", {"a.jsonl": values}), tmp_path / "out")
    assert ids_of(tmp_path / "out") == ids_of_documents(["1", "7"])
    assert re.search(r"skipped 1 empty.*, 4 without text", done.stdout)


def test_other_tokenizers_get_half_a_surrogate_pair_as_one_character(tmp_path):
    make(tree(tmp_path / "in", {"a.jsonl": lines("\ud800 ab")}), tmp_path / "out", tokenizer="char")
    assert ids_of(tmp_path / "out") == [4, 3, 0, 1, 2]


def test_the_memory_for_words_is_bounded_in_a_folder_of_small_files(tmp_path, monkeypatch):
    made = []
    new = gigatoken.Tokenizer.from_json

    class Tokenizer:
        def from_json(text):
            made.append(text)
            return new(text)

    monkeypatch.setattr(gigatoken, "Tokenizer", Tokenizer)
    fineweb.gpt2_tokenizer.cache_clear()
    make(tree(tmp_path / "in", {f"{i}.txt": "one" for i in range(200)}), tmp_path / "out")
    assert len(made) > 1


# Text in pieces


def ids_in_pieces(folder, text, size, monkeypatch):
    """(the ids of a txt file that is read in chunks of `size` characters, the number of chunks)"""
    chunks = []

    def tokenize(chunk, *args):
        chunks.append(chunk)
        return real(chunk, *args)

    real = fineweb.tokenize
    with monkeypatch.context() as patch:
        patch.setattr(fineweb, "CHUNK_SIZE", size)
        patch.setattr(fineweb, "tokenize", tokenize)
        make(tree(folder / "in", {"a.txt": text}), folder / f"{size}", shard_size=10**5)
    return ids_of(folder / f"{size}"), len(chunks)


WORDS = "the cat's   12345 don't'll  Zürich, naïve…  東京タワー。日本 \n\n\n  \t x+=1;\r\n"
WORDS += " 🙂🙃 ''s it''ll \u3000 \xa0 \u2028 \x85 \x1c e\u0301 क्षि ²½ Ⅷ _a_ a_b ... '"
WORDS = re.findall(r"\s+|\S+", WORDS)
AWKWARD = {
    "words": WORDS,
    "no spaces": [word for word in WORDS if not word.isspace()],
    "one word": ["xxxx"],
    "spaces": [" ", "\n", "    ", "\r\n"],
    "digits": "0123456789 ,.",
    "apostrophes": "''' sdmtlre",
    "Chinese": "日本語の文章、。漢字",
}


@pytest.mark.parametrize("case", AWKWARD)
def test_a_txt_file_in_pieces_has_the_ids_of_the_whole(tmp_path, monkeypatch, case):
    for seed, size in enumerate((16, 64, 1000)):
        text = "a" + "".join(random.Random(seed).choices(AWKWARD[case], k=1000))
        ids, n_chunks = ids_in_pieces(tmp_path, text, size, monkeypatch)
        assert ids == ids_of_documents([text])
        assert size > 64 or case in ("one word", "spaces") or n_chunks > 8


def test_a_cut_is_where_a_word_begins_for_every_character():
    characters = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    some = characters[:256] + characters[256:0x3400:3] + characters[0x3400::200]
    some = [c for c in some if not c.isspace()]
    for text in [f"{c} b" for c in some] + [f"{c}. b" for c in some]:
        end = fineweb.CUT.search(text).end()
        pieces = BPE.encode(text[:end]).ids + BPE.encode(text[end:]).ids
        assert pieces == BPE.encode(text).ids, text


def documents_line_by_line(text):
    documents = [""]
    for line in text.splitlines(keepends=True):
        if re.fullmatch(r"<\|endoftext\|>[ \t]*(\r?\n)?", line):
            documents.append("")
        else:
            documents[-1] += line
    return [document for document in documents if document]


def test_separators_divide_a_txt_file_wherever_it_is_cut(tmp_path, monkeypatch):
    parts = [MARK, f"\n{MARK}\n", f"\n{MARK} \t\r\n", "\n", "\r\n", " ", "word, word", "東京。"]
    for seed in range(60):
        rng = random.Random(seed)
        text = "a" + "".join(rng.choices(parts, k=12))
        size = rng.choice([1, 2, 3, 5, 8, 13, 21, 34, 55])
        ids, _ = ids_in_pieces(tmp_path / f"{seed}", text, size, monkeypatch)
        assert ids == ids_of_documents(documents_line_by_line(text)), (text, size)


# Bad input

BAD_PARQUET = PARQUET[:20] + bytes(1980) + PARQUET[2000:]
NOT_JSON = b'{"text": "a"}\n{"text": "b\n'
BODY = {"text_column": "body"}
NUMBERS = {"text_column": "id"}
PARTS = {"rank": 0, "world_size": 2}
BAD = {  # the files of a folder, settings, what the sentence must say
    "no such column": ({"x.parquet": PARQUET}, BODY, "x.parquet has no column body.*--text_col"),
    "no such key": ({"x.jsonl": LINES}, BODY, "no text.* body.*--text_column"),
    "numbers": ({"x.parquet": PARQUET}, NUMBERS, "no text.* id.*--text_column"),
    "cut parquet": ({"x.parquet": PARQUET[:9999]}, {}, "x.parquet cannot be read"),
    "garbled parquet": ({"x.parquet": BAD_PARQUET}, {}, "x.parquet cannot be read"),
    "no Arrow": ({"x.arrow": "no Arrow"}, {}, "x.arrow cannot be read"),
    "no JSON": ({"x.jsonl": NOT_JSON}, {}, "x.jsonl, line 2 is not a JSON object"),
    "no JSON in a worker": ({"x.jsonl": NOT_JSON}, {"workers": 1}, "x.jsonl, line 2 is not a JSON"),
    "a list": ({"x.jsonl": '\n[{"text": "one"}]'}, {}, "x.jsonl, line 2 is not a JSON object"),
    "a number": ({"x.jsonl": "1\n"}, {}, "x.jsonl, line 1 is not a JSON object"),
    "null": ({"x.jsonl": "null\n"}, {}, "x.jsonl, line 1 is not a JSON object"),
    "no UTF-8": ({"x.txt": b"a\xff"}, {}, "x.txt cannot be read"),
    "no gzip": ({"x.jsonl.gz": "hello"}, {}, "x.jsonl.gz cannot be read"),
    "no files": ({}, {}, "no files of text; choose parquet, arrow, jsonl or txt"),
    "other types": ({"x.csv": "a,b\n"}, {}, "no files of text; choose parquet"),
    "two types": ({"x.txt": "a", "x.jsonl": LINES}, {}, "several types, json, txt; choose"),
    "no text": ({"x.jsonl": lines("", None)}, {}, "no text"),
    "shard size": ({"x.txt": "a"}, {"shard_size": 0}, "--shard_size"),
    "rank": ({"x.txt": "a"}, {"rank": 2, "world_size": 2}, "--rank"),
    "more parts than files": ({"x.txt": "a"}, PARTS, "--world_size"),
    "out is a file": ({"x.txt": "a"}, {"out": __file__}, "cannot be written"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence(tmp_path, monkeypatch, case):
    monkeypatch.setattr(fineweb, "CHUNK_SIZE", 1)  # each line is a chunk, and is still named
    files, settings, words = BAD[case]
    settings = {"out": tmp_path / "out"} | settings
    sentence = refusal(make(tree(tmp_path / "in", files), check=False, **settings))
    assert re.search(words, sentence), sentence
    assert len(sentence.replace(str(tmp_path), "/data")) <= 200
