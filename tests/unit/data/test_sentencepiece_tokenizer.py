"""A damaged SentencePiece model ends in one line where it is opened, or works."""

import random

import pytest

from moe.data.readers import DataError
from moe.data.sentencepiece_tokenizer import SentencePieceTokenizer
from moe.data.stdlib import arithmetic
from moe.data.tokenizer_training import train_sentencepiece

TEXTS = [text for text, _ in zip(arithmetic(), range(100), strict=False)]


def damaged(model: bytes, random_: random.Random) -> bytes:
    """One to five bytes of the model changed, or a part of it taken out or doubled."""
    data = bytearray(model)
    for _ in range(random_.choice([1, 1, 2, 5])):
        data[random_.randrange(len(data))] = random_.randrange(256)
    if random_.random() < 0.2:
        at = random_.randrange(len(data))
        part = data[at : at + random_.choice([1, 64, 1000])]
        data[at : at + len(part) * random_.randrange(2)] = part * random_.randrange(3)
    return bytes(data)


def test_a_damaged_model_is_one_line_or_works() -> None:
    trained = train_sentencepiece([*TEXTS, "def f(x):\n\treturn 'é'\n"], 320, lambda line: None)
    model = trained.files()["tokenizer.model"]
    text = TEXTS[0] + " é ▁ 日本\n"
    messages = []
    for seed in range(300):
        try:
            opened = SentencePieceTokenizer(damaged(model, random.Random(seed)), f"seed {seed}")
        except DataError as error:
            messages.append(str(error))
            continue
        ids = opened.encode_many([text])[0]
        assert [*opened.encode_long("".join(TEXTS))]
        assert isinstance(opened.decode(ids), str)
        assert all(isinstance(opened.piece(token), str) for token in range(opened.vocab_size))
        assert opened.token_bytes().shape == (opened.vocab_size,)
    assert 50 < len(messages) < 290
    assert not any("\n" in message for message in messages)


@pytest.mark.parametrize(("piece", "wrong"), [(b"<0x41>", b"<0x\xff1>"), (b"\xe2\x96\x81t", b"\xe2\x96\x20t")])
def test_bytes_that_are_no_utf8_are_one_line(piece: bytes, wrong: bytes) -> None:
    model = train_sentencepiece(TEXTS, 320, lambda line: None).files()["tokenizer.model"]
    assert piece in model
    with pytest.raises(DataError, match="not a SentencePiece model, or a damaged one"):
        SentencePieceTokenizer(model.replace(piece, wrong, 1), "x.model")
