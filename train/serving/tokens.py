"""What serving needs of a tokenizer."""

from typing import Protocol


class Tokens(Protocol):
    """model/tokenizer.py has one; the engine and the forms of answers know no more of it than this."""

    im_start: int
    im_end: int
    endoftext: int
    control: dict[str, int]

    @property
    def stop_ids(self) -> tuple[int, ...]: ...

    @property
    def vocab_size(self) -> int: ...

    def encode(self, text: str) -> list[int]: ...

    def bytes_of(self, token_id: int) -> bytes: ...

    def is_control(self, token_id: int) -> bool: ...
