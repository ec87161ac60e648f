"""The form of a chat, for the answer to a completion whose prompt a chat was rendered as."""

from haltwise.proxy.wire import REASONING_FIELDS, Json, StreamEvent, may_become
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
        self._start, self._end, self._tells_usage = rules.think_start, rules.think_end, tells_usage
        self._place = "thought" if opened and self._start else "before"
        self._held = ""  # what is not known to be shown
        self._has_begun = self._has_text = False

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
        delta: Json = {} if self._has_begun else {"role": "assistant"}
        self._has_begun = True
        finish = choice.get("finish_reason")
        thought, text = self._apart(str(choice.get("text") or ""), bool(finish))
        delta |= {REASONING_FIELDS[0]: thought} if thought else {}
        delta |= {"content": text} if text else {}
        rest = {name: value for name, value in choice.items() if name not in ("text", "logprobs")}
        return rest | {"delta": delta, "finish_reason": finish}

    def _apart(self, text: str, is_last: bool) -> tuple[str, str]:
        """What the next text adds to the thought, and to the answer."""
        self._held += text
        thought = ""
        if self._place == "before":
            begun = self._held.lstrip()
            if may_become(begun, self._start) and not is_last:
                return "", ""
            is_thought = bool(self._start) and begun.startswith(self._start)
            self._place = "thought" if is_thought else "answer"
            self._has_text = not is_thought  # what nobody has begun is shown as it is
            self._held = begun.removeprefix(self._start) if is_thought else self._held
        if self._place == "thought":
            thought, marker, rest = self._held.partition(self._end)
            if marker:
                thought = thought.rstrip("\n")
                self._place, self._held = "answer", rest
            else:
                num = 0 if is_last else len(self._held) - self._num_open(self._held)
                thought, self._held = (thought, "") if is_last else (thought[:num], thought[num:])
            thought = self._shown(thought)
            self._has_text &= not marker
        if self._place == "answer":
            text, self._held = self._shown(self._held), ""
            return thought, text
        return thought, ""

    def _shown(self, text: str) -> str:
        """A text less the line breaks before the first of its part."""
        text = text if self._has_text else text.lstrip("\n")
        self._has_text |= bool(text)
        return text

    def _num_open(self, text: str) -> int:
        """Characters at the end of a text that may belong to the marker that ends the thought."""
        for num in range(min(len(self._end) - 1, len(text)), 0, -1):
            if self._end.startswith(text[-num:]):
                return num + _num_breaks(text[:-num])
        return _num_breaks(text)


def _num_breaks(text: str) -> int:
    return len(text) - len(text.rstrip("\n"))
