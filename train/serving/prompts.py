"""Messages to the ids of a prompt, by the template that the model was trained in.

What users write never becomes a control token. The roles of tools exist where the checkpoint's template has them.
"""

from collections.abc import Sequence
from typing import Any, cast

from train.data.rows.formats import Turn
from train.data.tokens import thinking
from train.data.tokens.chat_template import answer_start, prompt
from train.serving import tools
from train.serving.errors import bad
from train.serving.schema import Message, Tool
from train.serving.tokens import Tokens


def text_of(message: Message, place: int) -> str:
    """The text of a message's content.

    Raises:
        ApiError: a part that is no text.
    """
    if message.content is None or isinstance(message.content, str):
        return message.content or ""
    for n, part in enumerate(message.content):
        if part.type != "text" or part.text is None:
            where = f"messages[{place}].content[{n}]"
            raise bad(f"{where}: {part.type[:40]!r}: the model reads text alone.", where, "unsupported_content")
    return "".join(part.text or "" for part in message.content)


def chat_ids(
    messages: Sequence[Message],
    tokens: Tokens,
    system: str,
    template: str,
    offered: Sequence[Tool] = (),
    has_tools: bool = False,
) -> list[int]:
    """The ids of a conversation up to where the answer begins.

    Args:
        system: the system message where the conversation has none. offered: tools that may be called. has_tools:
            whether the checkpoint's template has a place for them.
    Raises:
        ApiError: parts that are no text, or tools without a place.
    """
    with_tools = bool(offered) or any(m.tool_calls or m.role == "tool" for m in messages)
    if with_tools and (not has_tools or template == "plain"):
        raise bad("this model was not trained to call tools: its template has no place for them.", "tools")
    texts = [text_of(message, n) for n, message in enumerate(messages)]
    rest = list(zip(messages, texts))
    if messages[0].role in ("system", "developer"):
        system, rest = texts[0], rest[1:]
    if not with_tools:
        turns = [Turn(cast(Any, "system" if m.role == "developer" else m.role), text) for m, text in rest]
        return prompt(turns, tokens, system, template)
    return _with_tools(rest, tokens, system, template, [tool.model_dump(exclude_none=True) for tool in offered])


def _with_tools(
    rest: Sequence[tuple[Message, str]], tokens: Tokens, system: str, template: str, offered: Sequence[dict[str, Any]]
) -> list[int]:
    """ChatML with the tools behind the system message, calls in answers, and results in turns of the user."""
    ids = _turn(tokens, "system", system, tools.instructions(offered) if offered else "")
    results: list[str] = []
    for message, text in rest:
        if message.role == "tool":
            results.append(tools.response(text))
            continue
        if results:
            ids += _turn(tokens, "user", "\n".join(results))
            results = []
        calls = [tools.written_call(c.function.name, c.function.arguments) for c in message.tool_calls or ()]
        if template in thinking.TEMPLATES and message.role == "assistant":
            text = thinking.split(text)[1]
        before = "\n" if text and calls else ""
        ids += _turn(tokens, message.role.replace("developer", "system"), text, before + "\n".join(calls))
    if results:
        ids += _turn(tokens, "user", "\n".join(results))
    return [*ids, *answer_start(tokens, template)]


def _turn(tokens: Tokens, role: str, text: str, program: str = "") -> list[int]:
    """One turn: `text` of the user, then what the program writes, in which <tool_call> is a control token."""
    inner = _marked(tokens, text, program)
    return [tokens.im_start, *tokens.encode(role), *tokens.encode("\n"), *inner, tokens.im_end, *tokens.encode("\n")]


def _marked(tokens: Tokens, text: str, program: str) -> list[int]:
    """The ids of `text` and `program` together, as the published tokenizer splits them."""
    ids: list[int] = []
    while text or program:
        places = [(place, mark) for mark in (tools.OPEN, tools.CLOSE) if (place := program.find(mark)) >= 0]
        place, mark = min(places, default=(len(program), ""))
        ids += tokens.encode(text + program[:place]) if text or place else []
        if mark:
            ids += [tokens.control[mark]] if mark in tokens.control else tokens.encode(mark)
        text, program = "", program[place + len(mark) :]
    return ids
