"""The control that audits a share of its own traffic and keeps a promise by what they tell.

    terms (draws the audit, tells the price)  ->  price (an audit's points are replayed)
        ->  finished  ->  told (the answers where prices would have halted), or broken off

What is lost without a label is that the answer differs from the full one. Every failure of the
books, the clock or the record is counted, and the request goes on: in observe mode on the terms
that it asked for, in apply mode unhalted.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any, Literal

import numpy as np

from haltwise.control.answers import GivenAnswer
from haltwise.control.audit_traces import AuditTraces, DenseAudit
from haltwise.control.audited import AuditedRequest
from haltwise.control.betting import Float
from haltwise.control.bookkeeper import Bookkeeper
from haltwise.control.books import Awaited, Entry
from haltwise.control.cascade_replay import replay_of
from haltwise.control.course import Course, halts_of
from haltwise.control.draws import AuditDraw, check_key, draw, draw_audit
from haltwise.control.estimates import LOSSES, Audit
from haltwise.control.governor import GroupState
from haltwise.control.group_names import LONGEST_NAME, Usual, groups_of, usual_price
from haltwise.control.groups import (
    EVERYTHING,
    BrokenOff,
    Drawn,
    Expired,
    Groups,
    Opened,
    Rated,
    Told,
)
from haltwise.control.history import History
from haltwise.control.installation import is_kept_back, name_of, question_id_of
from haltwise.control.library import Note, Shelved
from haltwise.control.raters import Raters
from haltwise.control.record import AnswerRow, LabelRow, Record, RequestRow, digest
from haltwise.control.replay import FULL, Answers, Look, Outcome, Replay, prices_of
from haltwise.control.roster import Roster
from haltwise.control.status import group_status, head_status, price_of, reference_of
from haltwise.control.telemetry import Telemetry
from haltwise.control.verdicts import (
    JUDGES,
    check_verdicts,
    due_until,
    places_due,
    told_by_labels,
)
from haltwise.errors import InputError, reason_of
from haltwise.policy.certificate import Certificate
from haltwise.policy.head import HaltHead
from haltwise.session.request import RunningRequest, Terms, ThoughtReport, ThoughtRequest

log = logging.getLogger("haltwise.control")

#: Today's prices are served and audits only look; or the governor's are served.
Mode = Literal["observe", "apply"]
#: Whether a challenger that is known to be better waits for a person, or begins to serve by itself.
Promotion = Literal["ask", "auto"]
# How OpenTelemetry calls what the proxy's endpoints do.
_OPERATIONS = {"chat": "chat", "completions": "text_completion"}
# Newest requests whose rows may not be written yet.
_MOST_RECENT = 10_000
# Requests that may come before they are counted in the books, if no audit comes first.
_COUNTED_AT = 100
# Audits that are told of those that wait for labels.
_MOST_TOLD = 1_000
# Groups that somebody is told of who has named another one.
_MOST_NAMED = 10
_DISAGREEMENT = LOSSES.index("disagreement")


@dataclass
class Failures:
    """What went wrong without anybody noticing it at a request."""

    num: int = 0
    last: str = ""
    """What it was, the last time."""

    def add(self, what: str, error: BaseException) -> None:
        """Counts and logs a failure."""
        self.num, self.last = self.num + 1, f"{what}: {reason_of(error)}"
        log.warning("control failed (%s)", self.last)


@dataclass(eq=False)
class GovernedControl:
    """Audits, and in apply mode moves prices; see the top of this module. To be closed.

    Requests are in groups, see `groups_of`. One that asks to be off, with `names_price` in its
    `about`, is neither audited nor counted; nor is one that no budget lets a cascade's large LM
    answer, with `unescalated`: its thought is not halted. One that names another price is never
    served a higher one.
    """

    heads: Mapping[str, HaltHead]
    """By digest, those that may serve; one of them is the champion."""
    mode: Mode
    keeper: Bookkeeper
    record: Record
    key: bytes
    """Of the installation: nobody else can tell who is audited."""
    audit: float
    """Share of the requests that is audited in observe mode."""
    usual: Terms
    """Those of requests that ask for no others."""
    history: History
    """What became of the groups since the process began."""
    clock: Callable[[], float] = time.time
    label_seconds: float = 0.0
    """Seconds for which the right answer of an audit whose answers differ is waited for; at 0 it
    counts as lost at once."""
    traces: AuditTraces | None = None
    """Where dense audits are kept; None if there are none."""
    dense_audits: float = 0.0
    """Share of the audits that are dense."""
    telemetry: Telemetry | None = None
    """Is told of every request by the record."""
    explore: float = 0.0
    """Share of the requests that are served the next stricter price, which is drawn and recorded:
    so requests that are served tell what a step of the price changes. In apply mode."""
    replay_all: bool = False
    """Whether every request is replayed at all prices, not audits alone, for `off_policy`."""
    promotion: Promotion = "ask"
    """Whether a challenger that is known to be better begins to serve by itself."""
    asks_answers: bool = False
    """Whether somebody asks for the answers of audits with `taken`; else none tells anything."""
    failures: Failures = field(default_factory=Failures)
    moves_prices: bool = False

    def __post_init__(self) -> None:
        """Starts without a request.

        Raises:
            InputError: If the key is none.
        """
        check_key(self.key)
        self._prices = {name: prices_of(head) for name, head in self.heads.items()}
        self.roster = Roster(self.heads, self.keeper, self.key)
        """Says which head serves a request."""
        self._audits: dict[int, AuditedRequest] = {}
        self._courses: dict[int, Course] = {}
        self._waiting: Counter[str] = Counter()
        self._counting = threading.Lock()
        self._raters = Raters(self.key, self.record)
        # By newest request with which probability its price was drawn, if it was.
        self._probabilities: OrderedDict[str, float] = OrderedDict()
        self.num_refused = 0
        self.num_audit_tokens = 0
        """Tokens that were generated for audits alone, since the process has begun."""
        # Audits whose label is on its way into the books.
        self._labelled: set[str] = set()
        if self._usual_prices() != self.keeper.library.usual:
            self.keeper.put(Note(usual=self._usual_prices()))

    def _usual_prices(self) -> Usual:
        """Returns what the books are told, so that a state tells by itself what is served."""
        return Usual(self.usual.price, dict(self.usual.segment_prices), self.mode == "observe")

    @property
    def champion(self) -> str:
        """The digest of the head that serves."""
        return self.roster.champion

    @property
    def head(self) -> HaltHead:
        """The head that serves here."""
        return self.heads[self.roster.serving]

    def head_for(self, about: Mapping[str, Any]) -> dict[str, Any]:
        """Returns what is to be known of a request that begins: its head, and how that was drawn.

        Args:
            about: What is known of it already.
        """
        try:
            return self.roster.head_for(about, self._raters.unit_of(about))
        except Exception as error:
            self.failures.add("a head is drawn", error)
            return {"head": self.roster.serving}

    @property
    def prices(self) -> Float:
        """(K,) those that the champion is governed by, the strictest first."""
        return np.array(self.keeper.library.shelf[self.champion].prices)

    @property
    def groups(self) -> Groups:
        """The champion's newest state."""
        return self.keeper.books.groups

    @property
    def num_failures(self) -> int:
        """What went wrong, here and in the books."""
        return self.failures.num + self.keeper.num_failed

    def reprice(self, usual: Terms) -> None:
        """Takes in other terms of requests that ask for no others."""
        self.usual = usual
        if self.mode == "observe":
            self.history.usual = usual
        self.keeper.put(Note(usual=self._usual_prices()))

    def price_of(self, step: int) -> float:
        """Returns the price that a step stands for."""
        return price_of(self.prices, step)

    # While requests run

    def terms(self, request: ThoughtRequest) -> Terms:
        """Returns the terms on which a request begins; those of an audit never halt."""
        asked = request.terms
        if _is_apart(request):
            return replace(asked, price=0.0)
        try:
            return self._begun(request, _names_price(request))
        except Exception as error:
            self._audits.pop(id(request), None)
            self._courses.pop(id(request), None)
            self.failures.add("a request begins", error)
            return asked if self.mode == "observe" else replace(asked, price=0.0)

    def _begun(self, request: ThoughtRequest, named: bool) -> Terms:
        self._expire()
        library, head = self.keeper.library, self.roster.head_of(request.about)
        names, asked = groups_of(request), request.terms
        groups, prices = library.shelf[head].books.groups, self._prices[head]
        number = str(request.about.get("id") or uuid.uuid4().hex)
        rates = groups.rates(names)
        if self.mode == "observe":
            rates = dict.fromkeys(rates, self.audit) if self.audit else {}
        rater = self._raters.rater_of(request.about)
        session = self._raters.session_dial(request.about)
        if request.about.get("doubted") and session:
            doubt = Rated(session, 0.0)
            groups = groups.after(doubt)
            self._put(Entry(doubt))
        users = (rater.user, session)
        step, served = self._step(request, number, named, groups.step(names, users), prices)
        drawn = draw_audit(self.key, number, rates)
        self._raters.remember(number, rater)
        with self._counting:
            self._waiting.update(list(rates))
        if drawn.audited:
            steps = {name: one.books.groups.step(names, users) for name, one in self._shelf()}
            self._draw(number, request, drawn, head, steps | {head: step}, served)
            return replace(asked, price=0.0, looked_at=True)
        if self._waiting[EVERYTHING] >= _COUNTED_AT:
            self._put({})
        if self.replay_all:
            replay = Replay(self.heads[head], prices, asked.min_tokens)
            self._courses[id(request)] = Course(replay)
        return replace(asked, price=served, looked_at=asked.looked_at or self.replay_all)

    def _step(
        self, request: ThoughtRequest, number: str, named: bool, top: int, prices: Float
    ) -> tuple[int, float]:
        """Returns the step that a request is served, and its price.

        Args:
            request: What is asked.
            number: Its id.
            named: Whether it names its price.
            top: The step that its groups are served.
            prices: (K,) those of the head that serves it.
        """
        asked, urgency = request.terms.price, request.about.get("urgency")
        if urgency is not None and self.mode == "apply":
            step = self._paced(number, asked, top, float(urgency), prices)
            return step, price_of(prices, step)
        served = asked if self.mode == "observe" else price_of(prices, top)
        if named and served > asked:
            return int(np.searchsorted(prices, asked, side="right")), asked
        if self.explore and self.mode == "apply" and top:
            step = self._explored(number, top)
            return step, price_of(prices, step)
        return top, served

    def _shelf(self) -> list[tuple[str, Shelved]]:
        """Returns, with their digests, the books of the heads that are loaded here."""
        return [(n, one) for n, one in self.keeper.library.shelf.items() if n in self.heads]

    def _draw(
        self,
        number: str,
        request: ThoughtRequest,
        drawn: AuditDraw,
        head: str,
        steps: Mapping[str, int],
        price: float,
    ) -> None:
        """Begins an audit, which all heads replay.

        Args:
            number: The request's id.
            request: What is asked.
            drawn: What was drawn.
            head: The head that watches it.
            steps: By head, the step that it would be served.
            price: The one that it would be served.
        """
        replays = {n: replay_of(self.heads[n], self._prices[n], request) for n in steps}
        dense, process = self._is_dense(number), self.keeper.process
        self._audits[id(request)] = AuditedRequest(
            number, request, drawn, head, steps[head], price, replays, dense
        )
        self._put(
            {name: Entry(Drawn(number, at, drawn.groups, process)) for name, at in steps.items()}
        )

    def _paced(self, number: str, asked: float, top: int, urgency: float, prices: Float) -> int:
        """Returns the step of a request whose spending is paced, drawn from two beside each other.

        Args:
            number: The request's id.
            asked: The price that it asks for, where nothing is urgent.
            top: The step that its groups are served, where everything is.
            urgency: How urgent it is, in [0, 1].
            prices: (K,) those of the head that serves it.
        """
        low = min(int(np.searchsorted(prices, asked, side="right")), top)
        exact = low + urgency * (top - low)
        step = int(exact)
        return step + self._drawn(number, exact - step)

    def _explored(self, number: str, top: int) -> int:
        """Returns the step of a request in exploring: now and then the next stricter one.

        Args:
            number: The request's id.
            top: The step that its groups are served.
        """
        return top - self._drawn(number, self.explore)

    def _drawn(self, number: str, share: float) -> bool:
        """Returns whether the second of two prices is drawn, and remembers with which probability.

        Args:
            number: The request's id.
            share: The probability of the second one.
        """
        is_second = draw(self.key, number, "price") < share
        self._probabilities[number] = share if is_second else 1 - share
        if len(self._probabilities) > _MOST_RECENT:
            self._probabilities.popitem(last=False)
        return is_second

    def _is_dense(self, number: str) -> bool:
        """Returns whether an audit is dense, which those of a head that looks at answers are."""
        if self.traces is None:
            return False
        looks = self.head.config.halting.probing == "always"
        return looks or draw(self.key, number, "dense") < self.dense_audits

    def _may_have_learned_from(self, question: str) -> frozenset[str]:
        """Returns the heads here that may have learned from a question, in any earlier audit."""
        if is_kept_back(self.key, question_id_of(self.key, question)):
            return frozenset()
        here = name_of(self.key)
        return frozenset(n for n, head in self.heads.items() if head.config.installation == here)

    def _put(
        self, entries: Entry | Mapping[str, Entry], learned: frozenset[str] = frozenset()
    ) -> None:
        """Puts entries on their way, with the requests that have come since the last ones.

        Args:
            entries: By head; a single one is for all.
            learned: The heads that may have learned from the question that they are about.
        """
        with self._counting:
            counted, self._waiting = self._waiting, Counter()
        nothing = entries if isinstance(entries, Entry) else Entry()
        told = {} if isinstance(entries, Entry) else entries
        try:
            note = {name: told.get(name, nothing) for name in self.keeper.library.shelf}
            by_head = {n: replace(one, num_requests=dict(counted)) for n, one in note.items()}
            self.keeper.put(Note(by_head, arms=self.roster.taken(), learned=learned))
        except Exception as error:
            self.failures.add("an entry of the books", error)

    def price(self, running: RunningRequest) -> float:
        """Returns the price of its terms; an audit's decision point is replayed at all prices."""
        asked = id(running.report.request)
        audit, course = self._audits.get(asked), self._courses.get(asked)
        if course is not None and running.point is not None:
            try:
                course.add(*running.point, running)
            except Exception as error:
                self.failures.add("a replay", error)
                del self._courses[asked]
        if audit is not None and running.point is not None:
            try:
                signals, place = running.point
                for replay in audit.replays.values():
                    replay.add(signals, place)
                reached, spent = running.thought.position, running.report.num_probe_tokens
                at = int(signals.position[place])
                audit.looks[at] = Look(signals.rows(np.array([place])), reached, spent)
            except Exception as error:
                self.failures.add("a replay", error)
                self.break_off(audit, "it could not be replayed")
        return running.terms.price

    def finished(self, report: ThoughtReport) -> None:
        """Takes in what happened to a request."""
        audit = self._audits.get(id(report.request))
        if audit is not None:
            audit.report = audit.thought = report
            if not self.asks_answers:
                self.break_off(audit, "nobody asks for its answers")
            return
        self._note(report, None)

    # Once an audit has ended

    def taken(self, request: ThoughtRequest) -> AuditedRequest | None:
        """Returns the audit that a request is, for whom tells its answers or breaks it off."""
        return self._audits.get(id(request))

    def tell(
        self,
        audit: AuditedRequest,
        full: GivenAnswer,
        halted: Mapping[int, GivenAnswer | None],
        num_tokens: int,
    ) -> None:
        """Takes in the answers of an audit.

        Args:
            audit: The audit.
            full: The answer that the client got.
            halted: By position, the answer if its thought is closed there before its end; None
                where the LM would have been left to think on.
            num_tokens: Tokens that were generated for the audit alone.
        """
        if self._audits.pop(id(audit.request), None) is None:
            return
        self.num_audit_tokens += num_tokens
        answers = audit.answers(full, halted)
        try:
            self._put(
                {
                    name: self._told_entry(replay, answers, audit.id, name)
                    for name, replay in audit.replays.items()
                },
                self._may_have_learned_from(audit.question),
            )
            self._note_answers(audit, answers)
            self._note(audit.report, audit, num_tokens)
            if self.promotion == "auto":
                self.roster.propose()
        except Exception as error:
            self.failures.add("an audit", error)
            self._put(Entry(BrokenOff(audit.id), why="its answers could not be taken in"))

    def _told_entry(self, replay: Replay, answers: Answers, request: str, head: str) -> Entry:
        """Returns what an audit tells the books of one head."""
        outcomes, full = replay.outcomes(answers), answers.full
        agrees = np.array([one.answer.compared == full.compared for one in outcomes])
        cost = np.array([one.cost for one in outcomes], dtype=np.float64)
        told = Audit(agrees, cost, replay.full_cost(full))
        losses = tuple(told.losses[_DISAGREEMENT].tolist())
        waits = told.due.any() and not self.keeper.library.shelf[head].books.is_too_long(told)
        awaited = self._awaited(outcomes, full) if waits else None
        due = told.due if awaited else np.zeros_like(told.due)
        return Entry(Told(request, losses, tuple(due.tolist())), told, {}, awaited)

    def keep(self, audit: DenseAudit) -> None:
        """Keeps a dense audit as a trace; one that cannot be kept is counted."""
        if self.traces is not None:
            try:
                self.traces.put(audit)
            except Exception as error:
                self.lose_trace(error)

    def lose_trace(self, error: BaseException) -> None:
        """Takes in that a dense audit cannot be kept."""
        log.warning("a trace is lost (%s)", reason_of(error))
        if self.traces is not None:
            self.traces.writer.lose(reason_of(error))

    def break_off(self, audit: AuditedRequest, why: str, num_tokens: int = 0) -> None:
        """Takes in that a request can tell nothing: it is no audit.

        Args:
            audit: What was to be one.
            why: Why it is none; of no content, as it is kept.
            num_tokens: Tokens that were generated for it alone.
        """
        if self._audits.pop(id(audit.request), None) is not None:
            self.num_audit_tokens += num_tokens
            self._put(Entry(BrokenOff(audit.id), why=why))
            self._note(audit.report, audit, num_tokens)

    def _awaited(self, outcomes: Sequence[Outcome], full: GivenAnswer) -> Awaited | None:
        """Returns what is waited for of an audit whose answers differ; None if nothing is."""
        if not self.label_seconds:
            return None
        answers = [*(one.answer for one in outcomes), full]
        digests = tuple(digest(self.key, one.compared) for one in answers)
        places = tuple(one.place for one in outcomes)
        return Awaited(digests, self.clock() + self.label_seconds, places)

    def _note(
        self, report: ThoughtReport | None, audit: AuditedRequest | None, num_tokens: int = 0
    ) -> None:
        """Puts the row of a request into the record."""
        if report is None:
            return
        try:
            self.roster.ended(report)
            self.record.put(self._row(report, audit, num_tokens))
        except Exception as error:
            self.failures.add("a row of the record", error)

    def _row(
        self, report: ThoughtReport, audit: AuditedRequest | None, num_tokens: int
    ) -> RequestRow:
        about, head = report.request.about, self.roster.head_of(report.request.about)
        groups = self.keeper.library.shelf[head].books.groups
        names, segment = groups_of(report.request), report.request.terms.segment
        known = {name: about.get(name) for name in ("tenant", "session", "user", "task")}
        digests: dict[str, Any] = {
            name: digest(self.key, str(told))
            for name, told in (known | {"segment": segment}).items()
            if told
        }
        rates = {EVERYTHING: self.audit} if self.mode == "observe" else groups.rates(names)
        probability = 0.0 if _is_apart(report.request) else max(rates.values())
        return RequestRow(
            id=str(about.get("id") or (audit.id if audit else uuid.uuid4().hex)),
            at=float(self.clock()),
            operation=_OPERATIONS.get(str(about.get("endpoint"))),
            lm=str(about["model"])[:LONGEST_NAME] if about.get("model") else None,
            head=head,
            head_probability=about.get("head_probability"),
            certificate=_name_of(self.heads[head].config.certificate),
            price_asked=report.request.terms.price,
            price_ceiling=price_of(self._prices[head], groups.ceiling(names)),
            price_served=report.price,
            price_due=audit.price if audit else report.price,
            price_probability=self._probabilities.pop(str(about.get("id")), None),
            audited=audit is not None,
            audit_probability=audit.drawn.probability if audit else probability,
            halted=report.halted,
            reason="escalated" if report.escalated else report.reason,
            position=report.position,
            audit_tokens=num_tokens,
            halts=self._halts(report, audit, head),
            **digests,
            **vars(report.spent),
        )

    def _halts(self, report: ThoughtReport, audit: AuditedRequest | None, head: str) -> str | None:
        """Returns from which price on a thought has how many tokens, where that was replayed."""
        prices, course = self._prices[head], self._courses.pop(id(report.request), None)
        if course is not None:
            return course.told(prices, report)
        if audit is None or not self.replay_all:
            return None
        end = float(report.position + report.num_probe_tokens)
        positions = audit.replay.positions.tolist()
        spent = {at: look.num_probe_tokens for at, look in audit.looks.items()}
        return halts_of(prices, [at + spent[at] if at in spent else end for at in positions])

    def _note_answers(self, audit: AuditedRequest, answers: Answers) -> None:
        positions, full = audit.replay.positions, answers.full
        for position, answer in answers.halted.items():
            if answer is not None:
                prices = self._prices[audit.head][positions == position]
                if not len(prices):
                    continue  # another head would have halted there, or no price answers there
                bounds = (float(prices[0]), float(prices[-1]))
                self.record.put(self._answer_row(audit, position, bounds, answer, full))
        end = audit.report.position if audit.report else 0
        self.record.put(self._answer_row(audit, end, (None, None), full, full))

    def _answer_row(
        self,
        audit: AuditedRequest,
        position: int,
        bounds: tuple[float, float] | tuple[None, None],
        answer: GivenAnswer,
        full: GivenAnswer,
    ) -> AnswerRow:
        return AnswerRow(
            audit.id,
            position,
            bounds[0],
            bounds[1],
            digest(self.key, answer.compared),
            answer.compared == full.compared,
            answer.num_tokens,
            self.head.config.halting.answer_rule,
        )

    # What is said later

    def label(self, /, request: Any = None, gold: Any = None, **others: Any) -> None:
        """Takes in the right answer of an audit whose answers differ, or that is kept as a trace.

        Args:
            request: The request's id.
            gold: The right answer.
            others: There are none.

        Raises:
            InputError: If no label of the request is waited for, or the answer is none.
        """
        try:
            if others or not (isinstance(request, str) and isinstance(gold, str) and gold.strip()):
                raise InputError('expected {"request": "ID", "gold": "ANSWER"}')
            right = GivenAnswer.of_label(gold, self.head.config.halting.answer_rule)
            found = self._awaiting(request)
            is_awaited = bool(found) and request not in self._labelled
            is_kept = self.traces is not None and self.traces.awaits(request)
            if is_kept and not is_awaited and not right.read:
                raise InputError(f"gold is {gold!r:.80}, expected what the answer rule can read")
            if not is_awaited and not is_kept:
                raise InputError(
                    f"no label of request {request!r:.80} is waited for: it is unknown, no audit, "
                    "labelled already or too old, or its answers agree"
                )
        except InputError:
            self.num_refused += 1
            raise
        if is_awaited:
            self._labelled.add(request)
            self._put({n: self._labelled_entry(request, *one, right) for n, one in found.items()})
        try:
            if self.traces is not None:
                self.traces.label(request, right)
            self.record.put(LabelRow(request, 0, "gold", 1.0, None, float(self.clock())))
        except Exception as error:
            self.failures.add("a row of the record", error)

    def judge(
        self, /, request: Any = None, source: Any = None, right: Any = None, **others: Any
    ) -> None:
        """Takes in how right somebody holds the answers of an audit to be, where they differ.

        Args:
            request: The request's id.
            source: Who says so: judge or test.
            right: By place as `awaited` tells it, how right the answer there is, from 0 to 1.
            others: There are none.

        Raises:
            InputError: If no label of the request is waited for, or a place or number is wrong.
        """
        try:
            known = isinstance(request, str) and isinstance(right, dict)
            if others or not known or source not in JUDGES:
                raise InputError(
                    'expected {"request": "ID", "source": "judge" or "test", '
                    '"right": {"full": 0 to 1, "POSITION": 0 to 1, ...}}'
                )
            found = self._awaiting(request) if isinstance(request, str) else {}
            if not found or request in self._labelled:
                raise InputError(f"no label of request {request!r:.80} is waited for")
            check_verdicts(right, places_due(found))
        except InputError:
            self.num_refused += 1
            raise
        self._labelled.add(request)
        self._put({n: self._judged_entry(request, *one, right) for n, one in found.items()})
        try:
            for place, value in right.items():
                at = 0 if place == FULL else int(place)
                self.record.put(LabelRow(request, at, source, value, None, float(self.clock())))
        except Exception as error:
            self.failures.add("a row of the record", error)

    def awaited(self) -> list[dict[str, Any]]:
        """Returns, as JSON objects, the audits that wait for labels, the oldest first.

        Of each, the places of the answers that differ, in tokens of the thought where they were
        forced, and the seconds since 1970 until when it waits.
        """
        told = [
            {"request": request, "places": places_due(found), "until": due_until(found)}
            for request in self._all_awaited()
            if request not in self._labelled and (found := self._awaiting(request))
        ]
        return told[:_MOST_TOLD]

    def _awaiting(self, request: str) -> dict[str, tuple[Audit, Awaited]]:
        """Returns, by head whose books wait for labels of a request, what they wait for."""
        shelf = self.keeper.library.shelf.items()
        found = {name: one.books.awaited.get(request) for name, one in shelf}
        return {name: one for name, one in found.items() if one is not None}

    def _all_awaited(self) -> dict[str, None]:
        """Returns the requests of which some head's books wait for labels, each once."""
        shelf = self.keeper.library.shelf.values()
        return dict.fromkeys(request for one in shelf for request in one.books.awaited)

    def _labelled_entry(
        self, request: str, audit: Audit, awaited: Awaited, gold: GivenAnswer
    ) -> Entry:
        """Returns what a right answer says about an audit: digests tell who was right."""
        right = digest(self.key, gold.compared)
        *halted, full = [float(answer == right) for answer in awaited.answers]
        return told_by_labels(request, replace(audit, right=np.array(halted), full_right=full))

    def _judged_entry(
        self, request: str, audit: Audit, awaited: Awaited, right: Mapping[str, float]
    ) -> Entry:
        """Returns what verdicts by place say about an audit."""
        halted = np.array([float(right.get(place, np.nan)) for place in awaited.places])
        return told_by_labels(request, replace(audit, right=halted, full_right=right[FULL]))

    def _expire(self) -> None:
        """Waits no longer for labels that are late: what they would say counts as lost."""
        waiting = self._all_awaited()
        self._labelled &= waiting.keys()
        for request in waiting:
            if request not in self._labelled:
                found = self._awaiting(request)
                if found and due_until(found) < self.clock():
                    self._labelled.add(request)
                    self._put(dict.fromkeys(found, Entry(Expired(request))))

    def rate(self, /, request: Any = None, score: Any = None, **others: Any) -> None:
        """Takes in how content somebody was with an answer.

        It moves the dial of the request's user; without one, it can only make its tenant stricter.

        Args:
            request: The request's id.
            score: From 0, at which the next ones are halted later, to 1.
            others: There are none.

        Raises:
            InputError: If the request is unknown, has neither user nor tenant or was rated already,
                or the score is none.
        """
        try:
            if others or not isinstance(request, str):
                raise InputError('expected {"request": "ID", "score": 0 to 1}')
            is_number = isinstance(score, int | float) and not isinstance(score, bool)
            if not is_number or not 0 <= score <= 1:
                raise InputError(f"score is {score!r:.40}, expected a number from 0 to 1")
            rater = self._raters.who_rates(request, self.groups)
        except InputError:
            self.num_refused += 1
            raise
        self._raters.remember(request, None)
        self.roster.complained(rater.head, rater.probability, 1 - float(score))
        self._put(Entry(rater.says(float(score))))
        try:
            self.record.put(LabelRow(request, 0, "user", score, None, float(self.clock())))
        except Exception as error:
            self.failures.add("a row of the record", error)

    def open_breaker(self, /, group: Any = None, **others: Any) -> None:
        """Opens the breaker of a group by hand: it halts nothing until it is certified anew.

        Args:
            group: The group's name, as `status` tells it.
            others: There are none.

        Raises:
            InputError: If there is no such group, or its breaker is open.
        """
        try:
            if others or not isinstance(group, str):
                raise InputError('expected {"group": "NAME"}')
            if not int(self._group(group).ceiling):
                raise InputError(
                    f"group {group!r:.80} halts nothing, as no price is certified for it"
                )
        except InputError:
            self.num_refused += 1
            raise
        self._put({self.champion: Entry(Opened(group))})

    def _group(self, name: str) -> GroupState:
        """Returns the state of a group.

        Raises:
            InputError: If there is none of that name.
        """
        groups = self.groups.groups
        if name not in groups:
            likely = get_close_matches(name, groups, _MOST_NAMED, 0.0)
            others = " ..." if len(likely) < len(groups) else ""
            raise InputError(
                f"no group has the name {name!r:.80}, expected one of {', '.join(likely)}{others}"
            )
        return groups[name]

    # What a person sees

    def status(self, group: str | None = None) -> dict[str, Any]:
        """Returns, as a JSON object, what every group loses and saves, and what it is served.

        Args:
            group: The one group to tell of, and of its history; None for all without that.

        Raises:
            InputError: If there is no such group.
        """
        books, kind, canary = self.keeper.books, self.history.kind, self.keeper.library.canary
        if group is not None:
            self._group(group)
        failed = self.failures.last or self.keeper.trouble or self.record.trouble
        return {
            "mode": self.mode,
            "target": books.groups.promise.target,
            "loss": LOSSES[kind],
            "reference": reference_of(self.champion),
            "labels_due": len(books.awaited),
            "audits_due": books.groups.audits_due(),
            "under_way": len(books.groups.under_way),
            "broken_off": {"audits": books.num_broken_off, "why": books.why_broken_off},
            "dials": len(books.groups.dials),
            "audit_tokens": self.num_audit_tokens,
            "traces": self._trace_status(),
            "failures": self.num_failures,
            "rows_dropped": self.record.num_dropped,
            "most_tokens": books.most_tokens,
            "too_long": books.num_too_long,
            "pooled": books.groups.num_pooled,
            "refused": books.groups.num_refused + self.num_refused + self.roster.num_refused,
            "trouble": failed,
            "heads": self._head_status(),
            "canary": None if canary is None else canary.status(),
            "groups": {
                name: group_status(books, name, self.prices, kind, usual_price(name, self.usual))
                | ({"history": self.history.series(name)} if group else {})
                for name in ([group] if group else books.groups.groups)
            },
        } | self.history.told(books, group)

    def _head_status(self) -> list[dict[str, Any]]:
        """Returns, as JSON objects, the heads and what they would be served; the champion first."""
        library = self.keeper.library
        shelf = sorted(library.shelf.items(), key=lambda pair: pair[0] != library.champion)
        return [head_status(library, name, one) for name, one in shelf]

    def _trace_status(self) -> dict[str, Any] | None:
        if self.traces is None:
            return None
        writer = self.traces.writer
        told = {"written": writer.num_written, "lost": writer.num_lost, "trouble": writer.trouble}
        return {"share": self.dense_audits} | told

    def close(self) -> None:
        """Writes what waits."""
        self._put(Entry())
        self.keeper.close()
        self.record.close()
        if self.traces is not None:
            self.traces.close()
        if self.telemetry is not None:
            self.telemetry.close()


def _names_price(request: ThoughtRequest) -> bool:
    """Whether a request names its own price."""
    return bool(request.about.get("names_price", True))


def _is_apart(request: ThoughtRequest) -> bool:
    """Whether a request is neither audited nor counted: nothing of it is this control's choice."""
    is_off = _names_price(request) and request.terms.price == 0
    return is_off or bool(request.about.get("unescalated"))


def _name_of(certificate: Certificate | None) -> str | None:
    """Returns what tells a certificate from others of its head."""
    if certificate is None:
        return None
    told = f"{certificate.max_em_drop} at {certificate.price} by {certificate.traces}"
    return told[:LONGEST_NAME]
