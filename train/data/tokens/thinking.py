"""The <think> blocks of an answer, as Qwen3's published template writes them, and that template as Jinja.

qwen3           the prompt ends with an empty block, so the model answers at once (enable_thinking=False)
qwen3_thinking  the prompt ends where the block may begin, so the model thinks first (enable_thinking=True)

Both write the same conversation. The last answer has a block: with the reasoning of its text (<think>…</think> in front),
or an empty one. Answers before the last question lose theirs, as the published template drops them.
"""

from collections.abc import Sequence

from train.data.rows.formats import Turn

OPEN, CLOSE = "<think>", "</think>"
TEMPLATES = ("qwen3", "qwen3_thinking")

_ANSWER = (  # of an assistant's message: `text` without its block, `thought` from it
    "{% set text = message['content'] %}{% set thought = message['reasoning_content'] or '' %}"
    "{% if not thought and '</think>' in text %}"
    "{% set thought = text.split('</think>')[0].split('<think>')[-1] %}{% set text = text.split('</think>')[-1] %}"
    "{% set text = text.lstrip('\\n') %}{% endif %}{% set thought = thought.strip('\\n') %}"
    "{% if loop.index0 > ns.question and (loop.last or thought) %}"
    "<think>\n{{ thought }}\n</think>\n\n{{ text.lstrip('\\n') }}{% else %}{{ text }}{% endif %}"
)
JINJA = (  # THINKING: what the template does where the caller does not say enable_thinking
    "{% set ns = namespace(question=messages|length - 1) %}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{% set ns.question = loop.index0 %}{% endif %}{% endfor %}"
    "{% if messages[0]['role'] != 'system' and SYSTEM %}<|im_start|>system\n{{ SYSTEM }}<|im_end|>\n{% endif %}"
    "{% for message in messages %}{% if message['role'] != 'system' or message['content'] %}"
    "<|im_start|>{{ message['role'] }}\n{% if message['role'] == 'assistant' %}" + _ANSWER + "{% else %}"
    "{{ message['content'] }}{% endif %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if not (enable_thinking if enable_thinking is defined else THINKING) %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def jinja(template: str) -> str:
    """The Jinja of one of TEMPLATES; SYSTEM is set before it."""
    return "{% set THINKING = " + str(template == "qwen3_thinking").lower() + " %}" + JINJA


def split(text: str) -> tuple[str, str]:
    """(reasoning, answer) of an assistant's text; the reasoning is empty without a block. As the published template does."""
    if CLOSE not in text:
        return "", text
    thought = text.split(CLOSE)[0].split(OPEN)[-1]
    return thought.strip("\n"), text.split(CLOSE)[-1].lstrip("\n")


def last_question(turns: Sequence[Turn]) -> int:
    """The index of the last turn of the user; without one the last index, so that no answer comes after it."""
    return max((n for n, turn in enumerate(turns) if turn.role == "user"), default=len(turns) - 1)


def has_block(turns: Sequence[Turn], index: int) -> bool:
    """Whether the answer at `index` is written with a block."""
    return index > last_question(turns) and (index == len(turns) - 1 or bool(split(turns[index].text)[0]))


def block(thought: str, open_id: str | int, close_id: str | int) -> tuple[str | int, ...]:
    """Texts and ids of a block with the ids of its two marks, or the marks themselves where a tokenizer has none."""
    return open_id, f"\n{thought}\n", close_id, "\n\n"
