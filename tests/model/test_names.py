"""A model by its id, by the address of its page, with a slash at the end."""

import pytest

from train.common.errors import UserError
from train.model.architecture import published
from train.model.folder import is_hub_id
from train.model.names import hub_name, page_revision


@pytest.mark.parametrize(
    ("typed", "name", "revision"),
    [
        ("Qwen/X", "Qwen/X", ""),
        ("Qwen/X/", "Qwen/X", ""),
        (" Qwen/X// ", "Qwen/X", ""),
        ("https://huggingface.co/Qwen/X", "Qwen/X", ""),
        ("http://huggingface.co/Qwen/X/", "Qwen/X", ""),
        ("huggingface.co/Qwen/X", "Qwen/X", ""),
        ("https://huggingface.co/Qwen/X/tree/main", "Qwen/X", ""),
        ("https://huggingface.co/Qwen/X/tree/v1.0/", "Qwen/X", "v1.0"),
        ("https://huggingface.co/Qwen/X/blob/abc123/config.json?download=true", "Qwen/X", "abc123"),
        ("https://hf.co/Qwen/X.git", "Qwen/X", ""),
        ("https://hf-mirror.com/Qwen/X#model", "Qwen/X", ""),
        ("https://modelscope.cn/models/Qwen/X/files", "Qwen/X", ""),
        ("https://hub.example.org:8080/Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B", ""),
        ("models/mine/", "models/mine", ""),
        ("../mine/", "../mine", ""),
        ("/", "/", ""),
    ],
)
def test_a_name_is_understood(typed: str, name: str, revision: str) -> None:
    assert (hub_name(typed), page_revision(typed)) == (name, revision)


@pytest.mark.parametrize(
    "typed",
    ["https://huggingface.co/Qwen", "https://huggingface.co/datasets/a/b", "https://huggingface.co/", "https://"],
)
def test_the_page_of_something_else_is_refused(typed: str) -> None:
    with pytest.raises(UserError, match=r"not the page of a model.*owner/name"):
        hub_name(typed)


def test_every_form_is_a_hub_id_and_has_the_published_shape() -> None:
    for typed in ("Qwen/Qwen-7B-Chat-Int4/", "https://huggingface.co/Qwen/Qwen-7B-Chat-Int4/tree/main"):
        assert is_hub_id(typed)
        assert published(typed).bits == 4
    assert not is_hub_id("./a/b") and not is_hub_id("a/b/c") and not is_hub_id("a")
