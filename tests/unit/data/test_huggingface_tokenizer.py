"""A tokenizer.json with a changed value ends in one line where it is opened, or works."""

import random

from moe.config import TokenizerConfig, TokenizerKind
from moe.data.readers import DataError
from moe.data.tokenizer import open_tokenizer
from tests.fuzz.mutate import changed
from tests.unit.data.test_tokenizer import huggingface_folder


def test_a_changed_value_is_one_line_or_works(tmp_path):
    text = "12 + 30 = 42 é ▁\n"
    opened, messages = 0, []
    for byte_level in (True, False):
        folder = huggingface_folder(tmp_path / str(byte_level), [text] * 20, byte_level=byte_level)
        files = {path: path.read_bytes() for path in sorted(folder.iterdir())}
        for seed in range(150):
            dice = random.Random(seed)
            victim = dice.choice([folder / "tokenizer.json"] * 4 + [*files])
            victim.write_bytes(changed(dice, files[victim]))
            try:
                tokenizer = open_tokenizer(TokenizerConfig(kind=TokenizerKind.huggingface, path=str(folder)))
                opened += 1
                ids = tokenizer.encode_many([text], 1)[0]
                tokenizer.decode(ids)
                assert [*tokenizer.encode_long(text * 10, 1)]
                assert all(isinstance(tokenizer.piece(token), str) for token in ids)
                assert tokenizer.token_bytes().shape == (tokenizer.vocab_size,)
            except DataError as error:
                messages.append(str(error))
            victim.write_bytes(files[victim])
    assert opened > 20
    assert not any("\n" in message for message in messages)
