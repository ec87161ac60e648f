"""The form of a chat, for the answer to a completion whose prompt a chat was rendered as."""

from collections import defaultdict

from haltwise.proxy.wire import REASONING_FIELDS, Json, StreamEvent, index_of, may_become
from haltwise.session.thought import PointRules


class ChatForm:
    """Gives the chunks of a completion the form of a chat's, with its thought in their own field.

    As servers do, it leaves out the markers, and the line breaks around thought and answer.

    Args:
        rules: With the markers.
        opened: Whether the prompt ends inside of a thought.
        tells_usage: Whether the client wants to be told how many tokens it used.
    """

    def __init__(self, rules: PointRules, opened: bool, tells_usage: bool) -> None:
        """Starts before the first chunk."""
        self._tells_usage = tells_usage
        self._parted = defaultdict[int, _PartedText](lambda: _PartedText(rules, opened))

    def shaped(self, event: StreamEvent) -> StreamEvent | None:
        """The event in that form; None if nothing of it is to be shown yet."""
        chunk = event.chunk
        if chunk is None:
            return event
        chunk = chunk | {"object": "chat.completion.chunk"}
        if not self._tells_usage:
            chunk.pop("usage", None)
        choices = [self._choice(choice) for choice in chunk.get("choices") or ()]
        says = any(choice["delta"] or choice["finish_reason"] for choice in choices)
        if choices and not says and "usage" not in chunk:
            return None
        return StreamEvent(chunk=chunk | {"choices": choices})

    def _choice(self, choice: Json) -> Json:
        """A choice with a delta in place of its text."""
        is_first = index_of(choice) not in self._parted
        delta: Json = {"role": "assistant"} if is_first else {}
        finish, parted = choice.get("finish_reason"), self._parted[index_of(choice)]
        thought, text = parted.add(str(choice.get("text") or ""), is_last=bool(finish))
        delta |= {REASONING_FIELDS[0]: thought} if thought else {}
        delta |= {"content": text} if text else {}
        rest = {name: value for name, value in choice.items() if name not in ("text", "logprobs")}
        return rest | {"delta": delta, "finish_reason": finish}


class _PartedText:
    """Tells the thought and the answer in a text apart, as it comes in.

    Args:
        rules: With the markers.
        opened: Whether the text begins inside of a thought.
    """

    def __init__(self, rules: PointRules, opened: bool) -> None:
        """Starts before the text."""
        self._start, self._end = rules.think_start, rules.think_end
        self._place = "thought" if opened and self._start else "before"
        self._held = ""  # what is not known to be shown
        self._has_text = False  # the part that it is in

    def add(self, text: str, is_last: bool) -> tuple[str, str]:
        """What the next text adds to the thought, and to the answer."""
        self._held += text
        if self._place == "before":
            self._find_start(is_last)
        thought = self._thought(is_last) if self._place == "thought" else ""
        answer = ""
        if self._place == "answer":
            answer, self._held = self._shown(self._held), ""
        return thought, answer

    def _find_start(self, is_last: bool) -> None:
        """Finds out whether the text begins with a thought; one without is shown as it is."""
        begun = self._held.lstrip()
        if self._start and begun.startswith(self._start):
            self._place, self._held = "thought", begun.removeprefix(self._start)
        elif is_last or not may_become(begun, self._start):
            self._place, self._has_text = "answer", True

    def _thought(self, is_last: bool) -> str:
        """What is shown of a thought now, less what may belong to the marker that ends it."""
        thought, marker, rest = self._held.partition(self._end)
        if marker:
            shown = self._shown(thought.rstrip("\n"))
            self._place, self._held, self._has_text = "answer", rest, False
            return shown
        num = len(thought) if is_last else len(thought) - self._num_open(thought)
        self._held = thought[num:]
        return self._shown(thought[:num])

    def _shown(self, text: str) -> str:
        """A text less the line breaks before the first of its part."""
        text = text if self._has_text else text.lstrip("\n")
        self._has_text |= bool(text)
        return text

    def _num_open(self, text: str) -> int:
        """Characters at the end of a text that may belong to the marker, or stand before it."""
        sizes = range(min(len(self._end) - 1, len(text)), 0, -1)
        num = next((num for num in sizes if self._end.startswith(text[-num:])), 0)
        return len(text) - len(text[: len(text) - num].rstrip("\n"))
