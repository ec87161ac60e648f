"""A control in one file: it halts nobody before a position, and everybody from there on."""

from dataclasses import replace

from haltwise import RunningRequest, Terms, ThoughtReport, ThoughtRequest

HALTS_FROM = 12
HIGH = 10.0


class RisingPrice:
    """Every instance adds to one list of reports, since servers make their control themselves."""

    moves_prices = True
    reports: list[ThoughtReport] = []  # noqa: RUF012

    def terms(self, request: ThoughtRequest) -> Terms:
        return replace(request.terms, price=0.0)

    def price(self, running: RunningRequest) -> float:
        return HIGH if running.thought.position >= HALTS_FROM else 0.0

    def finished(self, report: ThoughtReport) -> None:
        self.reports.append(report)


class BrokenControl(RisingPrice):
    def terms(self, request: ThoughtRequest) -> Terms:
        raise RuntimeError("no terms")

    def price(self, running: RunningRequest) -> float:
        return float("nan")

    def finished(self, report: ThoughtReport) -> None:
        raise RuntimeError("full")
