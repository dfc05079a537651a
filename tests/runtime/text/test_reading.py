"""Long texts in pieces: the ids of the whole text, within a bounded memory."""

from __future__ import annotations

import hashlib
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from alloc_moe.runtime.text import reading
from alloc_moe.runtime.text.reading import Encode, Encoded, TextError, read_ids

ROOT = Path(__file__).parents[3]
HELDOUT = ROOT / "examples" / "tiny-moe" / "heldout.txt"
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def trained(kind: str, text: str) -> Tokenizer:
    """Return a tokenizer of a kind that models have."""
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if kind == "bytes, as Llama 3":
        tokenizer = Tokenizer(models.BPE())
        split = pre_tokenizers.Split(Regex(LLAMA_3), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=1000, initial_alphabet=alphabet)
    elif kind == "whole text, as Llama 2":
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        )
        tokenizer.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
        trainer = trainers.BpeTrainer(vocab_size=1000, special_tokens=["<unk>"])
    elif kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.normalizer = normalizers.NFKC()
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=600, special_tokens=["<unk>"], unk_token="<unk>"
        )
    else:
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=800, special_tokens=["[UNK]"])
    tokenizer.train_from_iterator([text], trainer)
    if kind == "whole text, as Llama 2":
        tokenizer.pre_tokenizer = None
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def encoder(tokenizer: Tokenizer) -> Encode:
    def encode(text: str) -> Encoded:
        found = tokenizer.encode(text, add_special_tokens=False)
        return found.ids, found.offsets

    return encode


@pytest.fixture(scope="module")
def text() -> str:
    """Return text of all sorts."""
    prose = HELDOUT.read_text("utf-8")[:60_000]
    strange = "caf\u00e9 na\u00efve \U0001f469\u200d\U0001f680 e\u0301 \ufb01\r\n\t"
    strange += "\u4f60\u597d\u4e16\u754c"
    code = "def f(x):\n        return {'a': x**2}   # !!\n\n\n\n"
    return "".join(
        prose[i : i + 500] + strange + code + "\n" * (i % 7) for i in range(0, 60_000, 500)
    )


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_PIECE", 4001)
    monkeypatch.setattr(reading, "_OVERLAP", 256)


def ids_of(text: str, encode: Encode, **options: int) -> list[int]:
    found = read_ids(io.BytesIO(text.encode()), encode, **options)  # type: ignore[arg-type]
    return found.ids.tolist()  # type: ignore[no-any-return]


KINDS = ["bytes, as GPT-2", "bytes, as Llama 3", "whole text, as Llama 2", "unigram", "words"]


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("kind", KINDS)
def test_the_ids_of_pieces_are_those_of_the_whole_text(text: str, kind: str) -> None:
    if kind == "bytes, as GPT-2":
        tokenizer = Tokenizer.from_file(str(HELDOUT.with_name("tokenizer.json")))
    else:
        tokenizer = trained(kind, text)
    encode = encoder(tokenizer)
    whole = list(encode(text)[0])
    assert ids_of(text, encode) == whole
    for most in (1, 100, 5000, len(whole), len(whole) + 1):
        assert ids_of(text, encode, most_tokens=most) == whole[:most]


def test_a_text_of_one_piece_is_encoded_once() -> None:
    calls = []

    def encode(text: str) -> Encoded:
        calls.append(text)
        return list(text.encode()), None

    found = read_ids(io.BytesIO(b"The committee"), encode)
    assert calls == ["The committee"]
    assert found.ids.tolist() == list(b"The committee")
    assert found.sha256 == hashlib.sha256(b"The committee").hexdigest()
    assert (found.blank, found.cut) == (False, False)


@pytest.mark.usefixtures("small_pieces")
def test_only_as_much_is_read_as_is_asked_for() -> None:
    file = io.BytesIO(b"word " * 100_000)

    def encode(text: str) -> Encoded:
        return list(text.encode()), [(i, i + 1) for i in range(len(text))]

    found = read_ids(file, encode, most_tokens=5000)
    assert len(found.ids) == 5000
    assert file.tell() < 20_000
    file.seek(0)
    found = read_ids(file, encode, most_tokens=5000, digest_all=True)
    assert found.sha256 == hashlib.sha256(file.getvalue()).hexdigest()
    file.seek(0)
    found = read_ids(file, encode, most_bytes=10_000)
    assert (len(found.ids), found.cut) == (10_000, True)
    assert found.sha256 == hashlib.sha256(file.getvalue()[:10_000]).hexdigest()
    file.seek(0)
    assert not read_ids(file, encode, most_bytes=500_000).cut


@pytest.mark.usefixtures("small_pieces")
def test_line_ends_become_newlines_if_asked_for() -> None:
    text = "one\r\ntwo\rthree\n" * 1000

    def encode(text: str) -> Encoded:
        return list(text.encode()), [(i, i + 1) for i in range(len(text))]

    file = io.BytesIO(text.encode())
    found = bytes(read_ids(file, encode, newlines=True).ids.tolist())
    assert found == b"one\ntwo\nthree\n" * 1000
    assert bytes(ids_of(text, encode)) == text.encode()


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"x" * 9000 + b"\xff", "is not UTF-8: byte 9000 is 0xff. Convert"),
        (b"x" * 4000 + "\u00e9".encode() + b"\xc3", "is not UTF-8: byte 4002 is 0xc3. Convert"),
        (b"MZ\x00\x00" * 10, "has zero bytes, so it is no text"),
    ],
)
def test_what_is_no_text_is_refused(content: bytes, message: str) -> None:
    tokenizer = Tokenizer.from_file(str(HELDOUT.with_name("tokenizer.json")))
    with pytest.raises(TextError, match=re.escape(message)):
        read_ids(io.BytesIO(content), encoder(tokenizer))


@pytest.mark.usefixtures("small_pieces")
def test_a_text_without_a_place_to_cut_is_refused() -> None:
    def encode(text: str) -> Encoded:  # three characters a token, counted from the start
        return [0] * (len(text) // 3), [(i, i + 3) for i in range(0, len(text) // 3 * 3, 3)]

    with pytest.raises(TextError, match=r"around character \d+ there is no place to cut\. Break"):
        ids_of("a" * 20_000, encode)


@pytest.mark.usefixtures("small_pieces")
def test_a_tokenizer_that_tells_no_places_gets_the_whole_text_up_to_a_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def encode(text: str) -> Encoded:
        return list(text.encode()), None

    assert ids_of("word " * 2000, encode) == list(b"word " * 2000)
    monkeypatch.setattr(reading, "_MOST_WITHOUT_PLACES", 9000)
    with pytest.raises(TextError, match="tokenizer can't be given pieces of it"):
        ids_of("word " * 2000, encode)


MEMORY = """
import resource, sys
from tokenizers import Tokenizer
from alloc_moe.runtime.text.reading import read_ids
from alloc_moe.runtime.text.sources import open_text
from pathlib import Path

tokenizer = Tokenizer.from_file(sys.argv[1])
def encode(text):
    found = tokenizer.encode(text, add_special_tokens=False)
    return found.ids, found.offsets
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
start = peak()
with open_text(Path(sys.argv[2])) as file:
    found = read_ids(file, encode, **eval(sys.argv[3]))
print(len(found.ids), peak() - start)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs ru_maxrss in KiB")
def test_memory_is_for_a_piece_and_not_for_the_text(tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    with path.open("wb") as file:
        for _ in range(10):  # 4 MB, which took 520 MB
            file.write(HELDOUT.read_bytes())
        file.truncate(1 << 30)  # zeros, which are never reached
    tokenizer = HELDOUT.with_name("tokenizer.json")

    def run(options: str) -> tuple[int, int]:
        command = [sys.executable, "-c", MEMORY, str(tokenizer), str(path), options]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        count, mebibytes = map(int, done.stdout.split())
        return count, mebibytes

    count, mebibytes = run("{'most_bytes': 3_900_000}")
    assert count > 800_000
    assert mebibytes < 220
    assert run("{'most_tokens': 10_000}")[0] == 10_000
